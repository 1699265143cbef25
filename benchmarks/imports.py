"""Measures how soon the package answers: seconds of `import ibjax`, of `ibjax --help` and of what loads JAX.

    python benchmarks/imports.py [--rounds 5]

Every time is that of a fresh Python process, of which the first per row is not counted, as it may read files from disk
and compile them. Prints the median and the range.
"""

import statistics
import subprocess
import sys
import time

from parts import bare

from ibjax import errors
from ibjax.runs import provenance

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


def main() -> None:
    """The command line."""
    parser = bare(__file__, __doc__)
    parser.add_argument("--rounds", type=int, default=5, help="processes of each row; default: %(default)s")
    given = parser.parse_args()

    def command():
        errors.check_count("--rounds", given.rounds)
        print(f"{provenance.versions()}, {provenance.hardware()}")
        for name, words in ROWS.items():
            seconds(words)
            times = [seconds(words) for _ in range(given.rounds)]
            print(f"{name:24} {statistics.median(times):.2f} s ({min(times):.2f} – {max(times):.2f})")

    errors.exit_with(command)


if __name__ == "__main__":
    main()
