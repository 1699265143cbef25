"""Flips random bits in all files that a result depends on, one at a time, and records what a user would see.

    python benchmarks/flips.py [--trials=1000] [--processes=20] [--seed=0] [--out=results/flips-DATE.json]

The script first creates the files, those of `readers.py`: a run with its teacher and the undefended network, its data,
streamed images with cached labels, and a cache of compiled programs.

A trial draws a file, flips one of its bits, and runs every operation that reads it: load a network and attack test
images; evaluate with the existing records; read the report; start training again; read the streamed images and their
labels; compile. Odd trials draw uniformly from all files, even trials draw a kind of file first. In the cache of
compiled programs a bit of every program is flipped, since few of them are used. Afterwards all files are restored. The
outcome is one of

    nothing             all numbers are right, and nothing was logged
    computed again      all numbers are right, and a line named what was damaged
    refused             one line named what was damaged, and no number was shown
    traceback           an exception that was not reported as one line
    wrong               a number differed from the right one, and nothing was logged

--processes is the number of additional trials that start `ibjax.main` again in a new process, as a user would.
"""

import contextlib
import datetime
import functools
import itertools
import logging
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import readers
from parts import ROOT, bare
from readers import OUTCOMES, Reader, key, plain

from ibjax import errors, files

# ---- trials --------------------------------------------------------------------------------------------------


def trial(reader: Reader, file: Path, bit: int, right: dict[str, dict]) -> tuple[str, str]:
    """The worst outcome of all uses of a file with one bit flipped; everything is as before afterwards."""
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    found = []
    for use in reader.uses(file):
        file.write_bytes(content)
        if file.name.endswith("-cache"):
            _flip_others(file, bit)
        with _unchanged(reader.root, file):
            found.append(readers.outcome(use, right[key(use)]))
    return max(found, key=lambda pair: OUTCOMES.index(pair[0]))


def _flip_others(file, bit):
    """Flips a bit of every other compiled program too."""
    for other in file.parent.glob("*-cache"):
        if other != file:
            content = bytearray(other.read_bytes())
            content[bit // 8 % len(content)] ^= 1 << bit % 8
            other.write_bytes(content)


@contextlib.contextmanager
def _unchanged(root, file):
    """The folder that the file belongs to is put back."""
    top = root / file.relative_to(root).parts[0]
    kept = root.parent / "kept" / top.name
    try:
        yield
    finally:
        if top.is_dir():
            shutil.rmtree(top)
            shutil.copytree(kept, top)
        else:
            shutil.copy(kept, top)


def command_trial(root: Path, file: Path, bit: int, table: str) -> tuple[str, str]:
    """The outcome of the whole command, started anew."""
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    config = root.parent / "config.py"
    config.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\nimport pathlib, readers\n"
        f"def get_config(): return readers.settings(pathlib.Path({str(root)!r}))\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "ibjax.main", f"--config={config}", f"--workdir={root / 'run'}"]
    with _unchanged(root, file):
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", cwd=ROOT)
    lines = [line for line in done.stderr.splitlines() if "damaged" in line or line.startswith("error")]
    text = "; ".join(lines)
    if "Traceback" in done.stderr or done.returncode not in (0, 2):
        return "traceback", f"exit code {done.returncode}: {done.stderr[-500:]}"
    if done.returncode == 2:
        return "refused", text
    if done.stdout != table and "moved to damaged/" not in text:
        return "wrong", f"{done.stdout} {text}"
    return ("computed again" if lines else "nothing"), text


def kind(root: Path, file: Path) -> str:
    """What the table calls a file."""
    name = file.relative_to(root).as_posix()
    if name == "data.npz":
        return "the data set, .npz"
    if name.startswith("tfds/"):
        return "the streamed data set"
    if file.suffix == ".labels":
        return "labels that are kept"
    if name.startswith("cache/"):
        return "compiled programs"
    if "checkpoints" in file.parts:
        return "checkpoints: manifests" if file.parent.name == "manifest" else "checkpoints: the rest"
    if "eval" in file.parts:
        return "records" if file.suffix == ".json" else "adversarial images"
    return file.name


def page(content: dict[str, Any]) -> str:
    """The table, and what made it, as Markdown."""
    seeds, made = ", ".join(map(str, content["seeds"])), readers.origin_line(content["run"])
    table = readers.table(("file", "flips"), content["kinds"], OUTCOMES)
    return f"{table}\n\nOne wrong bit each; seeds {seeds}. The last call: {made}\n"


_SAME = ("commit", "versions", "hardware", "compression")


def continued(out: Path, about: dict[str, Any], seed: int) -> dict[str, Any]:
    """What `out` holds, to be added to; raises InputError where another code has made it, or where it has the seed."""
    before = files.read_json(out) if out.is_file() else {"kinds": {}, "bad": [], "seeds": []}
    if "kinds" not in before:
        raise errors.InputError(f"--out={out} holds no flips; give another --out")
    if changed := [key for key in _SAME if "run" in before and before["run"].get(key) != about[key]]:
        raise errors.InputError(f"--out={out} has flips of other {', '.join(changed)}; give another --out")
    if seed in before["seeds"]:
        known = ", ".join(map(str, before["seeds"]))
        raise errors.InputError(f"--out={out} has the flips of --seed={seed} already; give one that is not in {known}")
    return before


def command_line() -> None:
    """The command line of this script."""
    parser = bare(__file__, __doc__)
    parser.add_argument("--trials", type=int, default=1000, help="flips in this process")
    parser.add_argument("--processes", type=int, default=20, help="flips with the command started anew")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=files.path, help="default: results/flips-DATE.json; what it holds is added to")
    given = parser.parse_args()
    out = given.out or ROOT / "results" / f"flips-{datetime.date.today()}.json"
    about = readers.origin()
    before = continued(out, about, given.seed)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        found = flip(Path(folder) / "root", given.trials, given.processes, given.seed)
    kinds = {
        name: dict(Counter(before["kinds"].get(name, {})) + Counter(found["kinds"].get(name, {})))
        for name in sorted({**before["kinds"], **found["kinds"]})
    }
    both = {"bad": before["bad"] + found["bad"], "seeds": [*before["seeds"], given.seed]}
    content = {"kinds": kinds, **both, "run": about}
    files.write_json(out, content)
    out.with_suffix(".md").write_text(page(content), encoding="utf-8")
    print(page(content))
    for line in found["bad"]:
        print(line)
    sys.exit(1 if found["bad"] else 0)


def flip(root: Path, trials: int, processes: int, seed: int) -> dict[str, Any]:
    """{"kinds": {kind of file: {outcome: how often}}, "bad": lines}."""
    reader = readers.prepare(root)
    files = sorted(file for file in root.rglob("*") if file.is_file() and file.stat().st_size and file.name != ".lock")
    uses = {key(use): use for file in files for use in reader.uses(file)}
    right = {name: plain(use()) for name, use in uses.items()}
    files = sorted(file for file in root.rglob("*") if file.is_file() and file.stat().st_size and file.name != ".lock")
    shutil.copytree(root, root.parent / "kept", dirs_exist_ok=True)
    of_kind: dict[str, list[Path]] = {}
    for file in files:
        of_kind.setdefault(kind(root, file), []).append(file)
    names, rng, kinds, bad = sorted(of_kind), np.random.default_rng(seed), {}, []
    tries = [functools.partial(trial, reader, right=right)] * trials
    if processes:
        table = subprocess.run(
            [sys.executable, "-c", _PRINT.format(root=str(root), benchmarks=str(ROOT / "benchmarks"))],
            capture_output=True, encoding="utf-8", check=True, cwd=ROOT,
        ).stdout  # fmt: skip
        tries += [functools.partial(command_trial, root, table=table)] * processes
    for number, attempt in zip(itertools.count(1), tries, strict=False):
        among = files if number % 2 else of_kind[names[rng.integers(len(names))]]
        file = among[rng.integers(len(among))]
        bit = int(rng.integers(8 * file.stat().st_size))
        ended, text = attempt(file=file, bit=bit)
        name = kind(root, file)
        kinds.setdefault(name, Counter())[ended] += 1
        if ended in ("traceback", "wrong"):
            bad.append(f"{ended}: bit {bit} of {file.relative_to(root)}: {text[:600]}")
        if number % 100 == 0:
            print(number, dict(sum(kinds.values(), Counter())), flush=True)
    return {"kinds": {name: dict(row) for name, row in sorted(kinds.items())}, "bad": bad}


_PRINT = """
import sys; sys.path.insert(0, {benchmarks!r})
import pathlib, readers
root = pathlib.Path({root!r})
from ibjax import report
from ibjax.devices import cluster
cluster.initialize()
records = readers.main.execute(readers.settings(root), root / "run")
print(report.table(records))
print(f"report: {{root / 'run' / 'report.html'}}")
"""

if __name__ == "__main__":
    measuring.run(command_line)
