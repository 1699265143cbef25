"""Reports the results of runs: a printed table, and one self-contained HTML page that checks itself.

Guarantees (tests of the same names): a file that cannot be read is named, and the rest is shown; the page refers to
nothing outside itself; whatever stands in a file is escaped; a page is there whole or not at all.
"""

import logging
import os
from collections.abc import Iterable

from ibjax import files
from ibjax.errors import InputError
from ibjax.evaluation.report import tables
from ibjax.evaluation.report.runs import RunResults, read
from ibjax.evaluation.results import Record

__all__ = ["RunResults", "read", "table", "write"]


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
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it logs every font that it finds
    from ibjax.evaluation.report import page  # imports matplotlib, which training does not need

    found, out = read(workdirs), files.path(out)
    text = page.page(found, out, each)
    try:
        with files.replacing(out) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}); give another --out") from None
    return found
