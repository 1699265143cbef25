"""Injects failures of `open` and `read` below Python, one trial at a time, and records what a user would see.

    python benchmarks/failures.py [--trials=100] [--seed=0] [--out=results/failures.json]

The run, its data, its caches and the operations that read them are those of `readers.py`. Each trial draws an
operation, one of its calls of `open` (or `opendir`) or `read`, one of five errors, and whether only this call fails or
all calls from it on. A trial counts if a call has failed. Its outcome is one of

    the right numbers   the call was repeated, or a line said that the result was computed again
    refused             one line named what could not be read, and no number was shown
    traceback           an exception that was not reported as one line
    wrong               a number differed from the right one
    changed             a file of the run or of its data was changed: moved, removed, or written again

Needs Linux and gcc, for `tests/failing_disk.c`.
"""

import ctypes
import logging
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import readers
from parts import ROOT, bare, refuse_other

from ibjax import errors, files

ERRORS = {"EIO": 5, "ENOMEM": 12, "EACCES": 13, "EMFILE": 24, "ESTALE": 116}
OUTCOMES = ("the right numbers", "refused", "traceback", "wrong", "changed")
_ALL = 10**6
_FREE = ("env.json", ".lock")  # written by every start of a training


class Failing:
    """The preloaded library: which calls fail from here on."""

    def __init__(self, path: Path):
        self.library, self.libc = ctypes.CDLL(os.environ["LD_PRELOAD"]), ctypes.CDLL(None)
        self._set(PATH=path)

    def _set(self, **settings):
        for name, value in settings.items():
            self.libc.setenv(f"FAIL_{name}".encode(), str(value).encode(), 1)

    def during(self, calls: str, error: int, first: int, count: int, use: Callable[[], Any]) -> tuple[Any, int, int]:
        """(what `use` returns, how many such calls there were, how many of them failed)."""
        self._set(CALLS=calls, ERRNO=error, FIRST=first, COUNT=count)
        self.library.fail_reset()
        try:
            found = use()
        finally:
            self._set(CALLS="")
        return found, self.library.fail_seen(), self.library.fail_hits()


def content(root: Path) -> dict[str, bytes]:
    """All files of the run and of its data; of a cache nothing has to stay."""
    files = (file for part in ("run", "tfds") for file in sorted((root / part).rglob("*")))
    kept = {str(file.relative_to(root)): file.read_bytes() for file in files if file.is_file()}
    return {name: text for name, text in kept.items() if Path(name).name not in _FREE}


def restore(contents: dict[Path, bytes]) -> None:
    """Writes files as they were; env.json, which every start of a training writes anew and a report shows."""
    for file, text in contents.items():
        file.write_bytes(text)


def inject(root: Path, trials: int, seed: int) -> dict[str, Any]:
    """{"rows": {"open, EIO, once": {outcome: how often}}, "bad": lines}."""
    reader, failing = readers.prepare(root), Failing(root)
    workdirs = list(reader.jobs)
    uses = [use for workdir in workdirs for use in reader.of_run(workdir)] + [reader.trained_on, reader.streamed]
    environments = {file: file.read_bytes() for file in root.rglob("env.json")}
    right, calls = {}, {}
    for use in uses:
        right[readers.key(use)] = readers.plain(use())
        restore(environments)
    for use in uses:
        for call in ("open", "read"):
            _, calls[readers.key(use), call], _ = failing.during(call, 0, _ALL, 0, use)
            restore(environments)
    before, rng, rows, bad = content(root), np.random.default_rng(seed), {}, []
    while sum(map(Counter.total, rows.values())) < trials:
        use, call = uses[rng.integers(len(uses))], ("open", "read")[rng.integers(2)]
        error, count = list(ERRORS)[rng.integers(len(ERRORS))], (1, _ALL)[rng.integers(2)]
        first = int(rng.integers(max(calls[readers.key(use), call], 1)))
        (ended, text), _, hits = failing.during(
            call, ERRORS[error], first, count, lambda use=use: readers.outcome(use, right[readers.key(use)])
        )
        restore(environments)
        if not hits:
            continue
        after = content(root)
        if changed := sorted(name for name in {**before, **after} if before.get(name) != after.get(name)):
            ended, text, before = "changed", f"{', '.join(changed[:5])}; {text}", after
        ended = OUTCOMES[0] if ended in ("nothing", "computed again") else ended
        row = f"{call}, {error}, {'once' if count == 1 else 'for good'}"
        rows.setdefault(row, Counter())[ended] += 1
        if ended not in OUTCOMES[:2]:
            bad.append(f"{ended}: {row} at call {first} of {readers.key(use)}: {text[:600]}")
    return {"rows": {name: dict(row) for name, row in sorted(rows.items())}, "bad": bad}


def page(content: dict[str, Any]) -> str:
    """The table, and what made it, as Markdown."""
    table = readers.table(("failure", "injected"), content["rows"], OUTCOMES)
    return f"{table}\n\n{readers.origin_line(content['run'])}\n"


def command_line() -> None:
    """The command line of this script."""
    parser = bare(__file__, __doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=files.path, default=ROOT / "results" / "failures.json")
    given = parser.parse_args()
    refuse_other(given.out)
    with tempfile.TemporaryDirectory() as folder:
        if "FAIL_PATH" not in os.environ:  # once more, with the library preloaded
            library = Path(folder) / "failing_disk.so"
            source = ROOT / "tests" / "failing_disk.c"
            subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
            variables = {**os.environ, "LD_PRELOAD": str(library), "FAIL_PATH": "nothing yet"}
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=variables).returncode)
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        files._WAITS = (0.001, 0.001, 0.001)
        found = inject(Path(folder) / "root", given.trials, given.seed)
    content = {**found, "run": readers.origin()}
    files.write_json(given.out, content)
    given.out.with_suffix(".md").write_text(page(content), encoding="utf-8")
    print(page(content))
    for line in found["bad"]:
        print(line)
    sys.exit(1 if found["bad"] else 0)


if __name__ == "__main__":
    errors.exit_with(command_line)
