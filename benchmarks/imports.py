"""Measures how soon the package answers: seconds of `import ibjax`, of `ibjax --help` and of what loads JAX.

    python benchmarks/imports.py [--rounds 5] [--out=PATH.json]

Every time is that of a fresh Python process, of which the first per row is not counted, as it may read files from disk
and compile them. Prints the table; with --out writes it, and a JSON file with every single time beside it.
"""

import subprocess
import sys
import time
from typing import Any

import measuring
from parts import bare, refuse_other

from ibjax import errors, files

ROWS = {
    "python alone": ["-c", "pass"],
    "import ibjax": ["-c", "import ibjax"],
    "ibjax --version": ["-m", "ibjax", "--version"],
    "ibjax --help": ["-m", "ibjax", "--help"],
    "import jax": ["-c", "import jax"],
    "from ibjax import load": ["-c", "from ibjax import load"],
    "ibjax train --help": ["-m", "ibjax", "train", "--help"],
    "ibjax train --list": ["-m", "ibjax", "train", "--list"],
}


def seconds(words: list[str]) -> float:
    """The time of one process."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def table(records: list[dict[str, Any]]) -> str:
    """The records as Markdown."""
    rows = ((record["process"], measuring.spread(record["seconds"], ".2f")) for record in records)
    return measuring.markdown(("process", "s, median (min – max)"), rows)


def main() -> None:
    """The command line."""
    parser = bare(__file__, __doc__)
    parser.add_argument("--rounds", type=int, default=5, help="processes of each row; default: %(default)s")
    parser.add_argument("--out", type=files.path, help="a JSON file, with the table beside it; default: print only")
    given = parser.parse_args()

    def command():
        errors.check_count("--rounds", given.rounds)
        if given.out:
            refuse_other(given.out)
        records = []
        for name, words in ROWS.items():
            seconds(words)
            records.append({"process": name, "seconds": [seconds(words) for _ in range(given.rounds)]})
        measuring.report("imports", given.out, table, records)

    errors.exit_with(command)


if __name__ == "__main__":
    main()
