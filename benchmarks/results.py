"""What the papers claim, at the scale that is here: trains and attacks one network after another, and keeps records.

    python benchmarks/results.py --list                                        what is missing, and what it would cost
    python benchmarks/results.py --only='mnist-*-0' --mnist=mnist.npz --budget=8m           what fits into eight minutes
    python benchmarks/results.py --only=mnist-trades-0 --mnist=mnist.npz                     one cell, however long
    python benchmarks/results.py --only=mnist-trades-0 --mnist=mnist.npz --again             the same, once more
    python benchmarks/results.py --page                                        writes results/README.md again

A *cell* is one network, or AutoAttack on it; `benchmarks/cells.py` lists them in their order. A finished cell has a
folder results/cells/NAME with its configuration, metrics, records and cell.json, which says where and with what it was
made; results/README.md is generated from these folders. Weights stay in --work. A cell that was stopped goes on there:
training from its last checkpoint, AutoAttack from its last batch, any other attack from its start. A working folder of
another configuration is refused.

With --budget, cells run one after another in processes of their own. First comes what was begun, then what fits. On a
CPU, where nothing fits, the first missing cell is begun and is stopped in time. On an accelerator no cell is stopped:
it starts only if it fits. A cell whose teacher, or whose attacked network, is not in --work trains it first.

--mnist is an .npz in Keras's layout; --cifar10 such a file, or class folders, which are packed into one below --work.
The digits need no data. --quick tries every step at tiny sizes, on random images, and writes below --work only.
"""

import argparse
import contextlib
import fnmatch
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import results_page
from cells import Cell, cells
from one_cell import execute, forget, is_trained, seconds, spent
from parts import ROOT, bare

from ibjax import errors, files
from ibjax.errors import InputError

GRACE = 0.2  # of the budget, at most GRACE_S: how long before its end a cell is asked to save and stop
GRACE_S = 100.0


# ---- many cells ------------------------------------------------------------------------------------------------------


class Machine(NamedTuple):
    """Where the cells run."""

    accelerator: bool
    hardware: str
    slower: float = 1.0  # its minutes over those of cells.py


def machine(given: argparse.Namespace) -> Machine:
    """This machine, asked in a process of its own, since an accelerator may serve one process only."""
    ask = "import jax, json; from ibjax.runs import provenance; "
    ask += "print(json.dumps([jax.default_backend() != 'cpu', provenance.hardware()]))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, encoding="utf-8")
    if done.returncode:
        raise InputError(f"JAX finds no device ({done.stderr.strip().splitlines()[-1]}); see `ibjax doctor`")
    accelerator, hardware = json.loads(done.stdout.strip().splitlines()[-1])
    known, ratios = cells(), []
    for name, found in results_page.finished(given.cells).items():
        same = found.about["environment"]["hardware"] == hardware
        if same and name in known and not found.about["failed"] and found.about["seconds"]:
            ratios.append(sum(found.about["seconds"].values()) / 60 / known[name].minutes)
    return Machine(accelerator, hardware, statistics.median(ratios) if ratios else 1.0)


def minutes(cell: Cell, given: argparse.Namespace, slower: float) -> float:
    """What a cell would still cost here, with the networks that it needs and that are not there."""
    known = cells()
    needed = [known[name] for name in (cell.teacher, cell.of) if name and not is_trained(given.work / name)]
    own = max(cell.minutes * slower - spent(given.work / cell.name) / 60, 0.1 * cell.minutes * slower)
    return own + sum(minutes(other, given, slower) for other in needed)


def choose(missing: list[Cell], left: float, here: Machine, given: argparse.Namespace) -> Cell | None:
    """The next cell for `left` minutes; None: there is none."""
    allowed = [cell for cell in missing if here.accelerator or given.quick or not cell.accelerator]
    allowed.sort(key=lambda cell: cell.accelerator != here.accelerator)  # on an accelerator, what needs one comes first
    fitting = [cell for cell in allowed if minutes(cell, given, here.slower) <= left]
    if here.accelerator:
        return fitting[0] if fitting else None
    begun = [cell for cell in allowed if (given.work / cell.name / "seconds.json").is_file()]
    return next(iter(begun or fitting or allowed), None)


def go_through(chosen: list[Cell], given: argparse.Namespace) -> None:
    """Runs missing cells until the budget is spent; results/README.md is up to date after each."""
    end, here, tried = time.monotonic() + 60 * given.budget, machine(given), set[str]()
    while True:
        done = results_page.finished(given.cells)
        missing = [cell for cell in chosen if cell.name not in done and cell.name not in tried]
        left = (end - time.monotonic()) / 60
        cell = choose(missing, left, here, given)
        if cell is None or left <= 0:
            print(f"{len(missing)} cells are missing, none for {max(left, 0):.1f} minutes here", flush=True)
            return
        tried.add(cell.name)
        print(f"{cell.name}: about {minutes(cell, given, here.slower):.1f} minutes, {left:.1f} are left", flush=True)
        grace = min(GRACE * 60 * given.budget, GRACE_S)
        code = in_process(cell, given, None if here.accelerator else 60 * left, grace)
        if code == errors.EXIT_PREEMPTED:
            print(f"{cell.name}: stopped; the same command continues", flush=True)
            return
        print(f"{cell.name}: " + ("finished" if not code else f"ended with {code}"), flush=True)


def in_process(cell: Cell, given: argparse.Namespace, left: float | None, grace: float) -> int:
    """Runs a cell in a process, which is told to save and stop `grace` seconds before `left` are over; its exit code.

    Whoever does not stop in time is killed and loses what came after its last checkpoint or batch; the time counts.
    """
    folder, begun = given.work / cell.name, time.monotonic()
    known = spent(folder)
    words = [
        f"--only={cell.name}",
        *(f"--{key}={getattr(given, key)}" for key in ("mnist", "cifar10", "work", "cells")),
    ]
    process = subprocess.Popen([sys.executable, __file__, *words, *(["--quick"] if given.quick else [])])

    def stop(*_):
        process.send_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(None if left is None else max(left - grace, 1.0))
        stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(grace)
        process.kill()
        process.wait()
        lost = time.monotonic() - begun - (spent(folder) - known)
        files.write_json(folder / "seconds.json", {**seconds(folder), "lost": seconds(folder).get("lost", 0.0) + lost})
        return errors.EXIT_PREEMPTED
    finally:
        signal.signal(signal.SIGTERM, before)
        if process.poll() is None:
            process.kill()


def listing(chosen: list[Cell], given: argparse.Namespace) -> str:
    """What is missing and what it would cost here."""
    here, done = machine(given), results_page.finished(given.cells)
    lines, total = [], dict.fromkeys((False, True), 0.0)
    for cell in chosen:
        if cell.name in done:
            continue
        slower = here.slower if cell.accelerator == here.accelerator else 1.0
        cost, begun = minutes(cell, given, slower), bool(seconds(given.work / cell.name))
        total[cell.accelerator] += cell.minutes * slower
        place = "needs an accelerator" if cell.accelerator and not here.accelerator else "begun" if begun else ""
        lines.append(f"{cost:8.1f} min  {cell.name:70} {place}".rstrip())
    hours = {kind: f"{value / 60:.1f} hours" for kind, value in total.items()}
    lines.append(
        f"{len(chosen) - len(lines)} of {len(chosen)} cells are done; missing: about {hours[False]} here "
        f"({here.hardware}), {hours[True]} on an accelerator"
    )
    return "\n".join(lines)


# ---- the command line ------------------------------------------------------------------------------------------------


def span(text: str) -> float:
    """Minutes of "8m", "90s" or "1.5h"."""
    unit = {"s": 1 / 60, "m": 1.0, "h": 60.0}.get(text[-1:])
    try:
        value = float(text[:-1]) if unit else 0.0
    except ValueError:
        value = 0.0
    if not unit or not value > 0:
        raise argparse.ArgumentTypeError(f"'{text}' is no length of time; give it as 90s, 8m or 1.5h")
    return value * unit


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = bare(__file__, __doc__)
    parser.add_argument("--only", default="*", help="names of cells, * and ? stand for others, separated by commas")
    parser.add_argument("--list", action="store_true", help="show what is missing and what it would cost here")
    parser.add_argument("--page", action="store_true", help="write results/README.md again from the records")
    parser.add_argument(
        "--budget", type=span, help="as 8m: run missing cells for so long; default: as long as it takes"
    )
    parser.add_argument("--mnist", type=files.path, default=Path("mnist.npz"), help="default: %(default)s")
    parser.add_argument("--cifar10", type=files.path, default=Path("cifar10"), help="default: %(default)s")
    parser.add_argument(
        "--work", type=files.path, help="working folders with checkpoints; default: in the user's cache"
    )
    parser.add_argument("--cells", type=files.path, help="folder of the records; default: results/cells")
    parser.add_argument("--again", action="store_true", help="run finished cells once more, from the beginning")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and random images, to try the script")
    given = parser.parse_args(argv)
    if given.again and given.budget is not None:
        parser.error("--again and --budget exclude each other: a budget is for missing cells; give one of them")
    given.work = (given.work or files.cache_folder() / "results").resolve()
    given.work = given.work / "quick" if given.quick and given.work.name != "quick" else given.work
    given.cells = (given.cells or (given.work / "records" if given.quick else ROOT / "results" / "cells")).resolve()
    given.mnist, given.cifar10 = given.mnist.resolve(), given.cifar10.resolve()
    return given


def chosen(pattern: str) -> list[Cell]:
    """The cells whose names match, pattern by pattern; raises InputError where one of the patterns matches none."""
    known, found = cells(), {}
    for word in pattern.split(","):
        matching = fnmatch.filter(known, word)
        if not matching:
            raise InputError(f"--only={word} names no cell; {errors.nearest(word, known)}")
        found |= dict.fromkeys(matching)
    return [known[name] for name in found]


def with_data(selected: list[Cell], given: argparse.Namespace) -> list[Cell]:
    """The cells whose data are there; raises InputError where there are none."""
    paths = {} if given.quick else {name: getattr(given, name) for name in ("mnist", "cifar10")}
    absent = {name: path for name, path in paths.items() if not path.exists()}
    kept = [cell for cell in selected if cell.data not in absent]
    if not kept:
        name, path = next((name, path) for name, path in absent.items() if name == selected[0].data)
        raise InputError(f"--{name}={path} is not there; give MNIST as an .npz, CIFAR-10 as an .npz or class folders")
    return kept


def main() -> None:
    """The command line of this script."""
    given = parse()
    selected = chosen(given.only)
    page = given.cells.parent / "README.md"
    if given.list:
        print(listing(selected, given))
    elif given.page:
        results_page.write(page, given.cells)
    elif given.budget is None:
        done = results_page.finished(given.cells)
        for cell in with_data(selected, given):
            if given.again:
                forget(cell, given)
            if given.again or cell.name not in done:
                execute(cell, given)
                results_page.write(page, given.cells)
    else:
        go_through(with_data(selected, given), given)


if __name__ == "__main__":
    errors.exit_with(main)
