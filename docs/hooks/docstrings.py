"""Docstrings as Markdown, for the method pages and, as a Griffe extension, for the API reference.

In the source, docstrings are laid out for reading: the rows of a table may have a remark in a cell that its heading
does not have, cells hold p(z|x), and equations are indented blocks. Markdown would drop such remarks, split such cells
and show such blocks as code.
"""

import ast
import re
import textwrap
from pathlib import Path

import equations

try:
    from griffe import Extension
except ModuleNotFoundError:  # the tests read docstrings without the packages of the site
    Extension = object


def of_module(file: Path) -> str:
    """The docstring of a module, read without importing it."""
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


COLUMNS = re.compile(r"^(?! ).*\S {3,}\S", re.MULTILINE)  # a formatter has moved an indented block to the margin


def markdown(docstring: str, math: bool = True) -> str:
    """A dedented docstring as Markdown; with `math`, equations as LaTeX, else as they stand."""
    blocks = re.split(r"\n{2,}", docstring.strip("\n"))
    return "\n\n".join(_block(block, math) for block in _whole(blocks)) + "\n"


def table(lines: list[str]) -> str:
    """A Markdown table with as many cells in every row as the widest one has."""
    rows = []
    for row in map(_cells, lines):
        if len(rows) > 2 and len(row) == len(rows[-1]) and not any(row[:-1]):  # goes on with the cell above
            rows[-1][-1] += f" {row[-1]}"
        else:
            rows.append(row)
    width = max(map(len, rows))
    heads = [name.lower() for name in rows[0]]
    names = {heads.index(name) for name in ("code", "option") if name in heads}
    for index, row in enumerate(rows):
        row += ["---" if index == 1 else ""] * (width - len(row))
        if index > 1:  # identifiers, one or several
            row[:] = [
                re.sub(r"\w+", r"`\g<0>`", cell) if i in names and re.fullmatch(r"\w+(, \w+)*", cell) else escaped(cell)
                for i, cell in enumerate(row)
            ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def escaped(text: str) -> str:
    """Text of a docstring in which Markdown sees no emphasis, tag or cell that is none; code spans stay as they are."""
    parts = re.split(r"(`[^`]*`)", text)
    for index in range(0, len(parts), 2):
        part = re.sub(r"<(?=[\w/])", "&lt;", parts[index])
        part = re.sub(r"(?<=[α-ω])\*", r"\\*", part)
        parts[index] = re.sub(r"(?<=\w)_(?=[\s.,;:)]|$)|(?<![\w`])_(?=\w)", r"\\_", part)
    return "".join(parts)


def _whole(blocks):
    """The blocks; two indented ones in a row are parts of one, with an empty line in it, unless they are equations."""
    joined = []
    for block in blocks:
        if joined and all(_indented(one) and not equations.is_equation(one) for one in (block, joined[-1])):
            joined[-1] += "\n\n" + block
        else:
            joined.append(block)
    return joined


def _indented(block):
    return all(line.startswith("    ") for line in block.splitlines())


def _block(block, math):
    lines = block.splitlines()
    if _indented(block) or (COLUMNS.search(block) and not block.startswith(("|", "-"))):
        if math and equations.is_equation(block):
            return f"$$\n{equations.latex(block)}\n$$"
        return f"```text\n{textwrap.dedent(block)}\n```"
    if lines[0].startswith("|") and len(lines) > 1 and re.fullmatch(r"[|:\- ]+", lines[1]):
        rows = [line for line in lines if line.startswith("|")]
        rest = "\n".join(lines[len(rows) :])
        return table(rows) + (f"\n\n{escaped(rest)}" if rest else "")
    return escaped(block)


def _cells(line):
    """The cells of a row; a bar between two characters, as in p(z|x), or two in a row, as in ‖, do not divide."""
    line = line.strip()
    if re.fullmatch(r"[|:\- ]+", line) and "-" in line:
        return ["---"] * (line.strip("|").count("|") + 1)
    line = re.sub(r"(?<=[^\s|])\|(?=[^\s|])", "&#124;", line).replace("||", "&#124;&#124;")
    return [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")]


# one entry for several arguments, `  norm, eps: the threat model`, and its indented lines
SHARED = re.compile(r"^(?P<margin> +)(?P<names>\w+(?:, \w+)+): (?P<text>.*\n(?:(?P=margin) +\S.*\n)*)", re.MULTILINE)


def _each(found):
    """An entry for each of the arguments, as Griffe reads them."""
    return "".join(f"{found['margin']}{name}: {found['text']}" for name in found["names"].split(", "))


# `widths: channels of the convolutions` in the docstring of a class, with the lines that go on with it
FIELD = re.compile(
    r"^(?P<names>\w+(?:, \w+)*): (?P<text>.+(?:\n(?!\w+(?:, \w+)*: )\S.*|\n {2,}\S.*)*)\n?",
    re.MULTILINE,
)


def with_fields(text: str, comments: dict[str, str]) -> str:
    """The docstring of a class with a section for its fields, from its lines `name: …` and the fields' comments."""
    described = dict(comments)

    def take(found):
        names = found["names"].split(", ")
        if not set(names) <= set(comments):
            return found[0]
        described.update(dict.fromkeys(names, " ".join(found["text"].split())))
        return ""

    rest = FIELD.sub(take, text).strip()
    lines = "\n".join(f"  {name}: {words or '–'}" for name, words in described.items())
    return f"{rest}\n\nAttributes:\n{lines}\n" if lines else text


class Docstrings(Extension):
    """Griffe calls `on_object` for every module, class, function and attribute that it has read."""

    def on_object(self, *, obj, **_):
        if not obj.docstring or obj.is_alias:
            return
        text = with_fields(obj.docstring.value, _fields(obj)) if obj.is_class else obj.docstring.value
        obj.docstring.value = SHARED.sub(_each, markdown(text, math=obj.is_module))


def _fields(cls):
    """{annotated field without a docstring of its own: the comment behind it}, of a class as Griffe has read it."""
    found = {}
    for name, member in cls.members.items():
        if member.is_attribute and member.annotation is not None and not name.startswith("_") and not member.docstring:
            comment = re.search(r"  # (?!noqa|pyright)(.+)$", "\n".join(member.lines))
            found[name] = comment[1] if comment else ""
    return found
