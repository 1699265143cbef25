"""docs/recipes.md: current, complete, and no setting that differs from the paper's without a reason."""

import importlib.util
import sys
import tomllib
from pathlib import Path

import pytest
from test_passes import ORDERS

from ibjax.errors import InputError

DOCS = Path(__file__).parent.parent / "docs"
sys.path.insert(0, str(DOCS))
SPEC = importlib.util.spec_from_file_location("docs_recipes", DOCS / "recipes.py")
recipes = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(recipes)
TABLE = tomllib.loads((DOCS / "papers.toml").read_text())
OURS = dict.fromkeys(recipes.ASPECTS, "a")
PAPER = {**OURS, "why": {}}


def test_the_page_is_current():
    """Every row of every recipe, each setting that differs with its reason; else: python docs/recipes.py."""
    assert (DOCS / "recipes.md").read_text() == recipes.page()


def test_a_difference_needs_a_reason_and_a_reason_a_difference():
    def compare(entry, paper=PAPER, **ours):
        return recipes.compare(entry, paper, {"row": {**OURS, **ours}}, "a.py: row")

    assert all(mine == said and not why for _, mine, said, why in compare({}))
    with pytest.raises(InputError, match=r"a.py: row: attack of row: 'b' here, 'a' there"):
        compare({}, attack="b")
    with pytest.raises(InputError, match="a reason for attack, which does not differ"):
        compare({"why": {"attack": "it does"}})
    with pytest.raises(InputError, match="the paper's schedule is missing"):
        compare({}, {key: value for key, value in PAPER.items() if key != "schedule"})
    explained = {aspect: why for aspect, *_, why in compare({"why": {"attack": "so"}}, attack="b")}
    assert explained["attack"] == "so" and not explained["schedule"]
    unstated = compare({"paper_says": {"attack": "?"}}, attack="b")
    assert {aspect: said for aspect, _, said, _ in unstated}["attack"] == {"row": "?"}
    same = compare({"paper_says": {"attack": "row"}}, attack="b")
    assert {aspect: said for aspect, _, said, _ in same}["attack"] == {"row": "b"}


def test_every_row_has_exactly_one_entry():
    rows = {"a": {"one": None, "two": None}}
    entries = recipes.entries({"row": [{"recipe": "a", "rows": ["o*"]}, {"recipe": "a", "rows": ["two"]}]}, rows)
    assert [own for _, own in entries["a"]] == [["one"], ["two"]]
    for wrong in ([{"recipe": "a", "rows": ["one"]}], [{"recipe": "a"}, {"recipe": "a", "rows": ["two"]}]):
        with pytest.raises(InputError, match="needs one entry for each of two"):
            recipes.entries({"row": wrong}, rows)
    with pytest.raises(InputError, match="has no row three"):
        recipes.entries({"row": [{"recipe": "a"}, {"recipe": "a", "rows": ["three"]}]}, rows)


# what `ORDERS` runs, as a configuration names it
NAMED = {
    "pgd_at": dict(name="pgd_at"),
    "pgd_at, Rice et al.": dict(name="pgd_at", passes="adv,adv,clean"),
    "pgd_at, IBD's code": dict(name="pgd_at", passes="clean,adv"),
    "pgd_at of older runs": dict(name="pgd_at", clean_forward=True),
    "trades": dict(name="trades"),
    "trades, its authors": dict(name="trades", passes="clean,adv,clean"),
    "trades of older runs": dict(name="trades", forwards=3),
    "trades, AWP's authors": dict(name="trades", passes="adv,clean,clean"),
    "score": dict(name="score"),
    "score of adversarial images": dict(name="score", base="pgd_at"),
    "dkl": dict(name="dkl", variant="dkl"),
    "label_smoothing": dict(name="label_smoothing"),
    "label_smoothing of clean images": dict(name="label_smoothing", base="standard"),
    "label_smoothing, Pang et al.": dict(name="label_smoothing", passes="adv,clean,clean"),
    "mart": dict(name="mart"),
    "te": dict(name="te"),
    "te on trades": dict(name="te", base="trades"),
    "ard": dict(name="ard"),
    "rslad": dict(name="rslad"),
    "ibd": dict(name="ibd"),
    "iad I": dict(name="iad"),
    "iad II": dict(name="iad", variant="II"),
    "iad I, its authors": dict(name="iad", passes="code"),
    "iad II, its authors": dict(name="iad", variant="II", passes="code"),
}


def test_the_page_says_the_order_in_which_passes_are_made():
    assert NAMED.keys() == ORDERS.keys()
    for name, (_, order) in ORDERS.items():
        said = recipes.passes(NAMED[name]).replace("from epoch `begin` on ", "").split(", ")
        assert "".join({"x": "1", "x'": "2"}[one] for one in said) == str(order), name


def test_a_sweep_shows_what_differs_from_its_first_row():
    texts = {"a": "f(x=1, y=(1, 2))", "b": "f(x=3, y=(1, 2))", "c": "f(y=(1, 2), z=g(u=1, v=2))", "d": "none"}
    assert recipes._cell(texts) == "a: f(x=1, y=(1, 2))<br>b: x=3<br>c: z=g(u=1, v=2), no x<br>d: none"
    assert recipes._cell({"a": "?", "b": "?"}, "not stated") == "not stated"
