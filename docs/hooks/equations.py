"""Equations of docstrings, which are plain text with the papers' symbols, as LaTeX for KaTeX.

    L      = (1−α)·D(x, y_t) + α·D(x', y_t)        y_t = softmax(teacher(x))

A line is `left = right` and, after three spaces or more, remarks. Names of functions become operators, other words
text, and everything else is mathematics. So the site shows the equation of the source file, and there is no second copy
that could differ from it.
"""

import re
import textwrap
import unicodedata

LIMITS = ("argmax", "argmin", "max", "mean", "min", "softmax", "logsumexp")  # their index stands below them
NAMES = ("Attn", "BCE", "CE", "HSIC", "KL", "MINE", "PGD", "SLM", "clip", "exp", "ln", "log", "nHSIC", "sg", "tr")
OPERATORS = LIMITS + NAMES
SYMBOLS = {
    **{"·": r"\cdot", "−": "-", "×": r"\times", "±": r"\pm", "½": r"\tfrac{1}{2}", "∇": r"\nabla", "∂": r"\partial"},
    **{"≤": r"\le", "≥": r"\ge", "≠": r"\ne", "∈": r"\in", "~": r"\sim", "<-": r"\leftarrow", "→": r"\to"},
    **{"‖": r"\|", "||": r"\|", " || ": r" \,\|\, ", "{": r"\{", "}": r"\}", "⌊": r"\lfloor", "⌋": r"\rfloor"},
    **{"⊙": r"\odot", "…": r"\dots", "%": r"\%", "&": r"\&", "#": r"\#"},
    **{"²": "^{2}", "⁻¹": "^{-1}", "⁻²": "^{-2}", "ᵀ": r"^{\top}", "₀": "_{0}", "₁": "_{1}", "₂": "_{2}"},
}
LETTERS = "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ"


def _greek(letter):
    """α -> alpha, Σ -> Sigma, as LaTeX calls them."""
    name = unicodedata.name(letter).split()[-1].lower()
    name = {"lamda": "lambda", "epsilon": "varepsilon"}.get(name, name)
    return name.capitalize() if letter.isupper() else name.replace("phi", "varphi")


GREEK = {letter: _greek(letter) for letter in LETTERS}
ACCENTS = {"\u0302": "hat", "\u0303": "tilde", "\u0304": "bar"}
TOKEN = re.compile(
    rf"""
    (?P<quoted>"[^"]*"|`[^`]*`|\w+(?:/\w+)*\.py\b|[A-Za-z]{{2,}}(?:_[A-Za-z]{{2,}})+)
  | (?P<script>[_^](?=[{{(\w−]))
  | (?P<star>\*(?=[\s,.;)·]|$))                                      # of ε*
  | (?P<sum>Σ(?=_(?:\{{|[a-z]\b|[a-z][^a-z])))
  | (?P<root>√\([^()]*\)|√[A-Za-z]+)
  | (?P<word>[A-Za-z]{{2,}}(?:-[A-Za-z]{{2,}})*(?:'s\b)?|[a-z]'s\b)
  | (?P<letter>[A-Za-z{LETTERS}][\u0302-\u0304]?'*)
  | (?P<number>\d+(?:\.\d+)?(?:e-?\d+)?)
  | (?P<other>⁻[¹²]|\ \|\|\ |\|\||<-)
  | (?P<space>\s+)
  | (?P<rest>.)
    """,
    re.VERBOSE,
)
LABEL = re.compile(r'(\w+ "\w+": ) +')  # base "trades":   L = …
RELATION = re.compile(r"(?P<left>.*?) (?P<relation>=|<-) (?P<right>.*)")
WIDTH = 78  # characters of a remark in one line


def is_equation(block: str) -> bool:
    """Whether an indented block of a docstring begins with `left = right` or `left <- right`."""
    first = LABEL.sub("", block.strip(), count=1)
    code = re.search(r"\w=[\w\"']|\blambda ", block)
    return not code and bool(re.match(r"[^\s=]+(?: ?\([^)]*\))?\s+(?:=|<-)\s", first))


def latex(block: str) -> str:
    """A block of equations as one aligned environment; a remark stands below its line."""
    rows = []
    for line in textwrap.dedent(block).splitlines():
        label = LABEL.match(line)
        if label:
            rows.append(rf"\text{{{label[1]}}}".replace("_", r"\_") + "&")
        text = re.sub(r"\s+(=|<-)\s+", r" \1 ", line[label.end() :] if label else line, count=1)
        main, *remarks = re.split(r"\s{3,}", text.strip())
        small = [rf"\quad {{\small {convert(part)}}}" for remark in remarks for part in textwrap.wrap(remark, WIDTH)]
        found = RELATION.match(main)
        if found:
            relation = SYMBOLS.get(found["relation"], found["relation"])
            rows.append(f"{convert(found['left'])} &{relation} {convert(found['right'])}")
        elif line.startswith(" "):  # the line before goes on
            small_too = r"{\small " in rows[-1]
            rows.append(rf"&\quad {{\small {convert(main)}}}" if small_too else rf"&\quad {convert(main)}")
        else:
            rows.append(f"{convert(main)} &{small.pop(0) if small else ''}")
        rows += [f"&{remark}" for remark in small]
    return "\\begin{aligned}\n" + " \\\\\n".join(rows) + "\n\\end{aligned}"


def convert(text: str) -> str:
    """One line of plain mathematics as LaTeX."""
    apart = unicodedata.normalize("NFD", text)
    text = apart if set(apart) & set(ACCENTS) else text
    parts, position = [], 0
    while position < len(text):
        match = TOKEN.match(text, position)
        assert match  # the last alternative takes any character
        position = match.end()
        if match.lastgroup == "script":
            inner, position = _script(text, position)
            parts.append(f"{match[0]}{{{inner}}}")
        else:
            parts.append(_token(match.lastgroup, match[0], text[position:]))
    return _spaced("".join(parts))


def _script(text, start):
    """What is raised or lowered at `start`, as LaTeX, and the position behind it."""
    if text[start] in "{(":
        end = _closing(text, start)
        inner = text[start + 1 : end - 1]
        inner = inner if re.fullmatch("[a-z]{2}", inner) else convert(inner)  # hw: two indices
        return (inner if text[start] == "{" else f"({inner})"), end
    match = re.compile(rf"−?[{LETTERS}]|[A-Za-z]+|\d+").match(text, start)
    assert match, text
    name, end = match[0], match.end()
    if name in OPERATORS and text[end : end + 1] == "(":  # b^clip(…)
        end = _closing(text, end)
        return convert(text[start:end]), end
    if re.fullmatch("[A-Za-z]{3,}|[A-Z]{2}", name):
        return rf"\mathrm{{{name}}}", end
    return (name if re.fullmatch("[a-z]{2}", name) else convert(name)), end


def _closing(text, start):
    """The position behind the bracket that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] in "{(") - (text[position] in "})")
        if not depth:
            return position + 1
    raise ValueError(f"a bracket is not closed: {text}")


def _token(kind, token, rest):
    if kind == "quoted":
        return r"\texttt{" + token.strip("`").replace("_", r"\_") + "}"
    if kind == "star":
        return "^{*}"
    if kind == "sum":
        return r"\sum"
    if kind == "root":
        return rf"\sqrt{{{convert(token[1:].strip('()'))}}}"
    if kind == "word":
        if token in OPERATORS and not re.match(r" [a-z]{2}", rest):
            return rf"\operatorname{'*' if token in LIMITS else ''}{{{token}}}"
        return rf"\text{{{token}}}"
    if kind == "letter":
        if token in ("a", "I") and re.match(r" [a-z]{2}", rest):
            return rf"\text{{{token}}}"
        letter, accent = token[0], ACCENTS.get(token[1:2])
        base = f"\\{GREEK[letter]} " if letter in GREEK else letter
        return (rf"\{accent}{{{base}}}" if accent else base) + "'" * token.count("'")
    if kind == "number":
        return re.sub(r"e-?\d+", lambda found: rf"\cdot 10^{{{found[0][1:]}}}", token)
    if kind == "space":
        return " " if len(token) == 1 else r"\quad "
    symbol = SYMBOLS.get(token, token)
    return symbol + " " * symbol[-1:].isalpha()


def _spaced(text):
    """Spaces beside words belong to the text; elsewhere LaTeX sets its own."""
    text = re.sub(r"(?<!\\) (?=\\text(?:tt)?\{)", r"\\ ", text)
    text = re.sub(r"(\\text(?:tt)?\{[^}]*\}[,;:.]?) ", r"\1\\ ", text)
    while (joined := re.sub(r"(\\text\{[^}]*)\}([,;:]?)\\ \\text\{", r"\1\2 ", text)) != text:
        text = joined
    return text.strip()
