"""Reports the results of runs: a printed table, and one self-contained HTML page that checks itself.

Guarantees (tests of the same names): a file that cannot be read is named, and the rest is shown; the page refers to
nothing outside itself; whatever stands in a file is escaped; a page is there whole or not at all.
"""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from ibjax import files
from ibjax.errors import InputError
from ibjax.evaluation import picture_files
from ibjax.evaluation.report import grids, tables
from ibjax.evaluation.report.runs import RunResults, read
from ibjax.evaluation.results import Record

__all__ = ["RunResults", "read", "table", "write", "write_pictures", "write_tables"]


def table(records: Iterable[Record], each: bool = False) -> str:
    """The plain-text tables of records: a line for each run, a column for each attack at the main eps, in percent.

    Runs that differ only in their seed share a line with mean ± standard deviation; with `each` every run has its own.
    """
    return tables.as_text(records, each)


def write(workdirs: Iterable[str | os.PathLike], out: str | os.PathLike, each: bool = False) -> list[RunResults]:
    """Writes the HTML page of all runs in and below the folders, whole or not at all; returns the runs that it shows.

    each: show a line for every seed of a recipe instead of their mean.

    Raises InputError where a folder holds no run, or the page cannot be written.
    """
    picture_files.quiet_fonts()
    from ibjax.evaluation.report import page  # imports matplotlib, which training does not need

    found, out = read(workdirs), files.path(out)
    text = page.page(found, out, each)
    with _writable("--out", out), files.replacing(out) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")
    return found


def write_tables(runs: Iterable[RunResults], folder: str | os.PathLike, each: bool = False) -> list[Path]:
    """Writes every table of the page as CSV, Markdown and LaTeX into a folder, which is made; returns the files.

    Raises InputError where the folder cannot be written.
    """
    folder, records = files.path(folder), _records(runs)
    with _writable("--tables", folder):
        folder.mkdir(parents=True, exist_ok=True)
        return [file for name, grid in tables.named(records, each).items() for file in grids.write(grid, folder, name)]


def write_pictures(runs: Iterable[RunResults], folder: str | os.PathLike, each: bool = False) -> list[Path]:
    """Writes every figure of the page as PNG, SVG and PDF into a folder, which is made; returns the files.

    Raises InputError where the folder cannot be written.
    """
    picture_files.quiet_fonts()
    from ibjax.evaluation.report import figures

    folder, runs = files.path(folder), list(runs)
    curves = figures.curves(tables.families(_records(runs), each))
    drawn = [*([curves] if curves else []), *figures.training(runs), *figures.examples(runs)]
    with _writable("--pictures", folder):
        folder.mkdir(parents=True, exist_ok=True)
        return list(figures.write(drawn, folder))


def _records(runs):
    return tables.sources_told_apart(record for run in runs for record in run.records)


@contextlib.contextmanager
def _writable(option, path):
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); give another {option}") from None
