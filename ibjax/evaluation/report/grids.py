"""Tables as grids of cells, and their text: for a terminal, as Markdown, CSV and LaTeX.

The page, the terminal and the files show the same `Grid`, so that no number can differ between them.

Guarantee (test of the same name): whatever a title holds, it is text in every format.
"""

import csv
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ibjax import files


class Value(NamedTuple):
    """An accuracy in percent, or its mean over seeds."""

    mean: float
    std: float | None  # the sample standard deviation over seeds, or the standard error of one run; None: neither
    count: int  # number of runs that have the accuracy
    of: int  # number of runs in the line
    bound: bool = False  # an upper bound, since the line lacks an attack that could lower it


Cell = str | Value | None


class Grid(NamedTuple):
    """A table: cells in lines, and the words around them."""

    title: str
    header: list[str]
    lines: list[list[Cell]]
    words: int  # so many of the first columns are words, the others are numbers
    notes: list[str]  # one sentence each

    def cells(self) -> list[list[str]]:
        """The text of all cells, header first."""
        lines = ([cell if isinstance(cell, str) else text_of(cell) for cell in row] for row in self.lines)
        return [self.header, *lines]


def text_of(value: Value | None) -> str:
    """The text of a cell: "83.33"; "83.33 ± 0.42" over seeds; "45.00 (1/3)" if one of three runs has it; else "–"."""
    if value is None:
        return "–"
    spread = "" if value.std is None else f" ± {value.std:.2f}"
    runs = f" ({value.count}/{value.of})" if value.count < value.of else ""
    return f"{'≤ ' * value.bound}{value.mean:.2f}{spread}{runs}"


def in_terminal(text: str) -> str:
    """A line of printable characters; what a terminal would act on is shown as Python's escape sequence."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def aligned(grid: Grid) -> list[str]:
    """Lines for a terminal, header first: words left-aligned, numbers right-aligned."""
    cells = [[in_terminal(cell) for cell in row] for row in grid.cells()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = [str.ljust] * grid.words + [str.rjust] * (len(widths) - grid.words)
    return ["  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)) for row in cells]


def markdown(grid: Grid) -> str:
    """A table of GitHub's Markdown, with its title above and its notes below."""
    head, *body = ([in_markdown(cell) for cell in row] for row in grid.cells())
    rule = ["---"] * grid.words + ["---:"] * (len(head) - grid.words)
    table = "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body))
    return "\n\n".join([f"**{in_markdown(grid.title)}**", table, *map(in_markdown, grid.notes)]) + "\n"


def as_csv(grid: Grid) -> str:
    """CSV with one number per cell; spread, counts of runs and bounds have columns of their own.

    "PGD-20 std" is there where a cell of the column has a spread, "PGD-20 runs" where one is over fewer runs than its
    line, "worst case bound" (True, False) where one is an upper bound.
    """
    columns = []
    for i, name in enumerate(grid.header):
        cells = [row[i] for row in grid.lines]
        columns.append([name, *(f"{cell.mean:.2f}" if isinstance(cell, Value) else cell or "" for cell in cells)])
        for suffix, said in _BESIDE.items():
            beside = [said(cell) if isinstance(cell, Value) else "" for cell in cells]
            if any(beside):
                columns.append([f"{name} {suffix}", *map(str, beside)])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(zip(*columns, strict=True))
    return text.getvalue()


_BESIDE: dict[str, Callable[[Value], str | bool]] = {
    "std": lambda value: "" if value.std is None else f"{value.std:.2f}",
    "runs": lambda value: "" if value.count == value.of else f"{value.count}/{value.of}",
    "bound": lambda value: value.bound,
}


def latex(grid: Grid) -> str:
    r"""A LaTeX table; it needs \usepackage{booktabs}."""
    head, *body = (" & ".join(map(_in_latex, row)) + r" \\" for row in grid.cells())
    notes = f"\n{_in_latex(' '.join(grid.notes))}" if grid.notes else ""
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_in_latex(grid.title)}{'.' * bool(notes)}{notes}}}",
            rf"\begin{{tabular}}{{{'l' * grid.words}{'r' * (len(grid.header) - grid.words)}}}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


FORMATS: dict[str, Callable[[Grid], str]] = {"csv": as_csv, "md": markdown, "tex": latex}


def write(grid: Grid, folder: Path, name: str) -> Iterator[Path]:
    """Writes `folder`/`name`.csv, .md and .tex, each whole or not at all."""
    for suffix, text in FORMATS.items():
        with files.replacing(file := folder / f"{name}.{suffix}") as temporary:
            temporary.write_text(text(grid), encoding="utf-8", errors="replace")
        yield file


def in_markdown(text):
    """Text without its meaning in Markdown; a line break would end the row."""
    return re.sub(r"([\\`*_\[\]<>|~$&#])", r"\\\1", " ".join(text.split()))


_LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    **{letter: f"{{{letter}}}" for letter in "[*"},  # at the start of a row they would be options of the rule above
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "`": r"\textasciigrave{}",
    "–": "--",
    "±": r"$\pm$",
    "≤": r"$\leq$",
    "∞": r"$\infty$",
    "×": r"$\times$",
}


def _in_latex(text):
    """Text without its meaning in LaTeX."""
    apart = re.sub(r"-(?=-)", "-\0", " ".join(text.split()))  # two hyphens would become a dash
    return "".join(_LATEX.get(letter, letter) for letter in apart).replace("\0", "{}")
