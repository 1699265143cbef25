"""The documentation site, as far as it can be tested without its packages: equations, tables, links, lists.

`.ci/run` builds the site itself, strictly.
"""

import importlib
import json
import re
from pathlib import Path

import pytest

from ibjax.analysis.__main__ import analyses

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# modules without a section in docs/api: wings, which hold nothing themselves, command lines, what exports copy
UNLISTED = r"ibjax\.(devices|evaluation|models|objectives|runs|training|(.*\.)?__main__|pytorch\.networks\..*)"


@pytest.fixture
def hooks(monkeypatch):
    """The modules of docs/hooks and docs/gallery.py, by name."""
    monkeypatch.syspath_prepend(str(DOCS / "hooks"))
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module


@pytest.mark.parametrize(
    "text, latex",
    [
        ("L_feat = Σ_i mean_b ê_s^j", r"L_{\mathrm{feat}} = \sum_{i} \operatorname*{mean}_{b} \hat{e}_{s}^{j}"),
        ("U Σ Vᵀ, Σ_avg", r"U \Sigma  V^{\top}, \Sigma _{\mathrm{avg}}"),
        ("KL(t || p_s(u)), ||w||²", r"\operatorname{KL}(t \,\|\, p_{s}(u)), \|w\|^{2}"),
        ("from x + 0.001·N(0, 1)", r"\text{from}\ x + 0.001\cdot N(0, 1)"),
        ("the mean distance", r"\text{the mean distance}"),
        ("a term of x'", r"\text{a term of}\ x'"),
        ("e^{−ρ}, (β/β₀)^clip(e, 1)", r"e^{-\rho}, (\beta /\beta _{0})^{\operatorname{clip}(e, 1)}"),
        ("√(d/2), √dimension", r"\sqrt{d/2}, \sqrt{\text{dimension}}"),
        ("x_{t+1} + step_size·z", r"x_{t+1} +\ \texttt{step\_size}\cdot z"),
        ("{−1, 1}^{H×W}, 1e-5", r"\{-1, 1\}^{H\times W}, 1\cdot 10^{-5}"),
        ("ε*·u at epoch `begin`", r"\varepsilon ^{*}\cdot u\ \text{at epoch}\ \texttt{begin}"),
    ],
)
def test_plain_mathematics_becomes_latex(hooks, text, latex):
    def alike(line):  # spaces behind a command mean nothing to LaTeX
        return re.sub(r"(\\[a-z]+) +(?=[^a-z])", r"\1", line).replace("  ", " ")

    assert alike(hooks("equations").convert(text)) == alike(latex)


def test_a_block_is_aligned_at_its_relations_and_remarks_stand_below(hooks):
    equations = hooks("equations")
    block = "    L  = f(x)\n         + g(x)        a remark\n    e <- 1"
    assert equations.latex(block).splitlines()[1:-1] == [
        r"L &= f(x) \\",
        r"&\quad + g(x) \\",
        r"&\quad {\small \text{a remark}} \\",
        r"e &\leftarrow 1",
    ]
    assert equations.is_equation(block) and equations.is_equation('    base "trades":   L = 1')
    for code in ("    x_adv = pgd(loss=loss)(key, f)", "    python -m ibjax.main --config=a", "    passes   order"):
        assert not equations.is_equation(code)


def test_every_equation_of_a_method_is_latex_throughout(hooks):
    """No character is left that KaTeX would set as it stands; every bracket and environment is closed."""
    equations, docstrings = hooks("equations"), hooks("docstrings")
    count = 0
    for file in sorted(ROOT.glob("ibjax/objectives/*.py")):
        for block in re.split(r"\n{2,}", docstrings.of_module(file)):
            if block.startswith("    ") and equations.is_equation(block):
                made, count = equations.latex(block), count + 1
                assert made.isascii(), f"{file.name}: {re.findall(r'[^ -~]', made)}"
                assert made.replace(r"\{", "").count("{") == made.replace(r"\}", "").count("}"), file.name
    assert count > 20


def test_tables_of_docstrings_keep_their_remarks_and_their_bars(hooks):
    made = hooks("docstrings").markdown(
        "| s | code | default |\n|---|---|---|\n| β | beta, b | 1 | p(z|x)\n|  |  |  | or q\n| ε* |  |\n"
    )
    assert made.splitlines() == [
        "| s | code | default |  |",
        "| --- | --- | --- | --- |",
        "| β | `beta`, `b` | 1 | p(z&#124;x) or q |",
        r"| ε\* |  |  |  |",
    ]


def test_the_fields_of_a_class_become_a_section(hooks):
    text = "A net.\n\nx, y: sizes\n  in pixels\nnote: of none\n\nThe end.\n"
    made = hooks("docstrings").with_fields(text, {"x": "", "y": "", "z": "a comment", "w": ""})
    rest, section = made.split("Attributes:\n")
    assert rest == "A net.\n\nnote: of none\n\nThe end.\n\n"
    assert section.splitlines() == ["  x: sizes in pixels", "  y: sizes in pixels", "  z: a comment", "  w: –"]


def test_docstrings_show_tags_as_text_and_keep_code(hooks):
    made = hooks("docstrings").markdown("In train/<class>/ and `<class>`.\n\n    python -m x\n")
    assert made == "In train/&lt;class>/ and `<class>`.\n\n```text\npython -m x\n```\n"


def test_links_lead_to_pages_modules_copies_or_the_code_host(hooks):
    pages = hooks("pages")
    known = {"docs/faq.md": "faq.md", "results/a.md": "results/a.md"}
    modules = {"ibjax.step": "api/core.md"}

    def made(text, repository=""):
        return pages.relinked(text, "docs/methods/ibd.md", pages.Links("methods/ibd.md", known, modules, repository))

    assert made("[a](../faq.md#nan)") == "[a](../faq.md#nan)"
    assert made("[`a`](../../results/a.md)") == "[`a`](../results/a.md)"
    assert made("[a](../../ibjax/step.py)") == "[a](../api/core.md#ibjax.step)"
    assert made("[a](../../launch/local.sh)") == "a"
    assert made("[a](../../launch/local.sh)", "https://host/x/") == "[a](https://host/x/blob/main/launch/local.sh)"
    assert made("[a](https://x.y) [b](#c) `[c](d)`") == "[a](https://x.y) [b](#c) `[c](d)`"
    with pytest.raises(pages.Missing, match=r"links to docs/absent.md"):
        made("[a](../absent.md)")


def test_every_page_can_be_assembled_and_every_marker_names_something(hooks):
    pages = hooks("pages")
    known = {file.relative_to(ROOT).as_posix(): "x.md" for file in DOCS.rglob("*.*")} | pages.OUTSIDE
    for file in [*DOCS.rglob("*.md"), *(ROOT / name for name in pages.OUTSIDE)]:
        source = file.relative_to(ROOT).as_posix()
        text = pages.assembled(file.read_text(encoding="utf-8"))
        assert not re.search(r"^<!-- (docstring|rows|section)", text, re.MULTILINE)
        pages.relinked(text, source, pages.Links("x.md", known, pages.api_modules(), ""))
    for marker in ("section: configs/README.md#No such", "rows: results/flips.md: no such", "docstring: ibjax/no.py"):
        with pytest.raises(pages.Missing):
            pages.assembled(f"<!-- {marker} -->")


def test_the_api_reference_lists_every_module_once(hooks):
    listed = [
        module
        for page in (DOCS / "api").glob("*.md")
        for module in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert len(listed) == len(set(listed))
    files = [file.relative_to(ROOT).with_suffix("") for file in (ROOT / "ibjax").rglob("*.py")]
    modules = {".".join(file.parts).removesuffix(".__init__") for file in files}
    assert modules - set(listed) == {name for name in modules if re.fullmatch(UNLISTED, name)}
    assert set(listed) <= modules


def test_the_gallery_has_every_analysis_and_is_current(hooks):
    gallery = hooks("gallery")
    assert set(gallery.ENTRIES) == set(analyses())
    assert gallery.page() == (DOCS / "gallery.md").read_text(encoding="utf-8")
    for name, entry in gallery.ENTRIES.items():
        assert json.loads((DOCS / "gallery" / f"{name}.json").read_text(encoding="utf-8"))["printed"]
        if entry.picture:
            assert (DOCS / "gallery" / f"{name}.webp").stat().st_size <= gallery.LIMIT
