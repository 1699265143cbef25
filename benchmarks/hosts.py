"""Rehearses runs on several hosts, as processes of this machine that meet over the loopback: do they compute what one
process does, and what becomes of a run when something happens to one of them?

    python benchmarks/hosts.py --workdir=runs/hosts [--processes 2 4] [--trials=10] [--only agreement elastic faults]
                               [--faults kill stop …] [--parallel=2] [--minutes=9] [--out=PATH]

agreement: IBD, IB-RAR and shared information on the digits, on N processes with one device each and on one process with
N devices. Compared: the loss of every step, accuracies, AutoAttack's flags.

elastic: a run of IBD that is preempted in the middle of epochs and continued as 4, 2 and 1 processes with a device
each; a restart refuses a state that is not, to the bit, the one that was saved. Compared: the steps in metrics.jsonl,
and its losses with those of an uninterrupted run on one process, which are equal until the last bits of sums over other
numbers of devices show.

faults: each of those in `host_faults.py`, to one process of N, `--trials` times. The others must end by themselves with
the exit code that is due and name the process; the same command must then finish the run, with the losses of an
undisturbed one and, where AutoAttack runs, its flags. Recorded: seconds until all have ended, exit codes.

The same command continues: what is recorded in the JSON file is not done again. With --minutes, no new part begins
after so long, and the command ends with exit code 75 until all is recorded. One page, results/hosts-cpu-DATE.md unless
`--out` says otherwise. The disk that fills up is a tmpfs, which only root can mount. Takes a few hours on two cores.
"""

import concurrent.futures
import functools
import itertools
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before JAX is imported
    os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np
from host_faults import FAULTS, inject
from measuring import Page, markdown
from parts import ROOT, bare
from rehearsal import Job, difference, found_in, furthest, losses, train, until

from ibjax import errors, files
from ibjax.devices import peers
from ibjax.evaluation import results
from ibjax.runs import provenance

METHODS = ("ibd", "ib_rar", "shared_information")
RECIPE = """
import sys
from pathlib import Path

sys.path.insert(0, {benchmarks!r})
import comparison


def get_config(arg):
    config = comparison.settings(arg, {epochs}, 0, Path({teachers!r}))
    parts = [config] + [config[role].recipe for role in ("teacher", "assistant") if config[role].recipe]
    for part in parts:
        network = part.model.backbone if "backbone" in part.model else part.model
        network.widths = ((8,), (16,))
        part.evaluate.update(attacks=("fgsm",), n={n})
        part.validate.update(every=2, batch_size=256)
        part.update(batch_size=64, log_every=1, checkpoint_every=1)
    config.evaluate.update(attacks={attacks!r})
    return config
"""
EPOCHS, IMAGES = 6, 32


# ---- agreement and elastic restarts ------------------------------------------------------------------------


def agreement(root: Path, recipe: Path, method: str, count: int) -> dict[str, Any]:
    """N processes beside one process with N devices."""
    folders = {n: root / f"{method}-{n}-{count}" for n in (1, count)}
    for n, folder in folders.items():
        train(recipe, method, folder, n, count // n).finished()
    one, many = (losses(folders[n]) for n in (1, count))
    records = {n: found_in(folder) for n, folder in folders.items()}
    flags = {n: {name: results.robust_flags(record) for name, record in records[n].items()} for n in folders}
    accuracies = {n: {k: (r["clean_acc"], r["robust_acc"]) for k, r in records[n].items()} for n in folders}
    return {
        "steps": len(one),
        "images": IMAGES,
        "difference": difference(many, one),
        "accuracies": accuracies[count],
        "accuracies_equal": accuracies[1] == accuracies[count],
        "flags_that_differ": {name: int(np.sum(flags[1][name] != flags[count][name])) for name in flags[1]},
    }


def elastic(root: Path, recipe: Path, plan: Sequence[int] = (1, 4, 2, 1)) -> dict[str, Any]:
    """One run, preempted in the middle of epochs and continued on other numbers of processes."""
    whole, changing = root / "elastic-whole", root / "elastic"
    shutil.rmtree(changing, ignore_errors=True)
    train(recipe, "ibd", whole, 1).finished()
    expected = losses(whole)
    stops, before = [], np.zeros(0)
    for count in plan[:-1]:
        goal = furthest(changing) + len(expected) // (len(plan) + 2)
        job = train(recipe, "ibd", changing, count)
        until(lambda goal=goal: furthest(changing) >= goal, job, f"step {goal}")
        job.processes[-1].send(signal.SIGTERM)
        codes = job.wait()
        if set(codes) != {errors.EXIT_PREEMPTED}:
            raise RuntimeError(f"preempted on {count} processes: exit codes {codes}: {job.text(0)[-500:]}")
        stops.append(furthest(changing))
        now = losses(changing)
        if not np.array_equal(now[: len(before)], before):  # a restart writes nothing of what was there anew
            raise RuntimeError("metrics.jsonl was changed by a restart")
        before = now
    train(recipe, "ibd", changing, plan[-1]).finished()
    found = losses(changing)
    equal = np.isclose(found, expected, rtol=1e-5, atol=0)
    return {
        "processes": list(plan),
        "stopped_at": stops,
        "steps_of_an_epoch": len(expected) // EPOCHS,
        "steps": len(found),
        "difference": difference(found, expected),
        "equal_steps": len(found) if equal.all() else int(np.argmin(equal)),
    }


# ---- the page ----------------------------------------------------------------------------------------------


def page(records: list[dict]) -> str:
    """The tables of all records so far."""

    def of(part):
        return [r for r in records if r["part"] == part]

    def numbers(values):
        return ", ".join(map(str, values))

    agreed = [
        (r["method"], r["processes"], r["steps"], f"{r['difference']:.1e}",
         "equal" if r["accuracies_equal"] else "differ",
         ", ".join(f"{name}: {n} of {r['images']}" for name, n in r["flags_that_differ"].items()))
        if "error" not in r else (r["method"], r["processes"], r["error"], "", "", "")
        for r in of("agreement")
    ]  # fmt: skip
    moved = [
        (" → ".join(map(str, r["processes"])), numbers(r["stopped_at"]), r["steps_of_an_epoch"], r["steps"],
         r["equal_steps"], f"{r['difference']:.1e}")
        if "error" not in r else (r["error"], *[""] * 5)
        for r in of("elastic")
    ]  # fmt: skip
    injected = []
    for name, count in sorted({(r["fault"], r["processes"]) for r in of("faults")}, key=_order):
        trials = [r for r in of("faults") if (r["fault"], r["processes"]) == (name, count)]
        good = [r for r in trials if "error" not in r]
        times = [r["seconds"] for r in good if "seconds" in r]
        codes = sorted({c for r in good for c in r.get("codes", [0])})
        worst = f"{max(r['difference'] for r in good):.1e}" if good else ""
        span = f"{min(times)} to {max(times)}" if times else "goes on"
        injected.append((FAULTS[name].text, count, len(trials), len(good), span, numbers(codes), worst))
    heads = (
        ("method", "processes", "steps", "largest relative difference of a loss", "accuracies", "flags that differ"),
        ("processes", "stopped at step", "steps of an epoch", "steps", "losses equal to 1e-5 up to step",
         "largest relative difference of a loss"),
        ("fault", "processes", "injected", "survived", "seconds until all had ended", "exit codes",
         "largest relative difference of a loss"),
    )  # fmt: skip
    tables = [markdown(head, rows) for head, rows in zip(heads, (agreed, moved, injected), strict=True) if rows]
    limit = (
        f"A process counts as lost after {peers.SILENCE} s without a sign of life. Processes shared the cores of one "
    )
    commits = sorted({r["commit"] for r in records if r.get("commit")})
    return "\n\n".join([*tables, f"{limit}machine with other work. Commits: {', '.join(commits)}."])


def _order(kind):
    return kind[1], list(FAULTS).index(kind[0])


class Records:
    """The page, to which several threads add; what it holds already is not done again."""

    KEYS = ("part", "method", "fault", "processes", "trial")

    def __init__(self, out: Path | None, minutes: float | None):
        self.page, self.lock, self.left_out = Page("hosts", out, page, adds=True), threading.Lock(), 0
        self.deadline = time.monotonic() + 60 * (1e9 if minutes is None else minutes)
        self.page.records = [r for r in self.page.records if "error" not in r]

    def key(self, record: dict[str, Any]) -> tuple:
        """What a record is of."""
        return tuple(record.get(key) for key in self.KEYS if key != "processes" or record["part"] != "elastic")

    def add(self, about: dict[str, Any], call: Callable[[], dict[str, Any]]) -> None:
        """Adds what a call finds, unless it is there, or the time is over; an error is recorded too."""
        if self.key(about) in map(self.key, self.page.records):
            return
        if time.monotonic() > self.deadline:
            self.left_out += 1
            return
        try:
            found = call()
        except Exception as error:  # the others are still wanted
            found = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:600].replace("|", "/")}
        with self.lock:
            self.page.add({**about, **found, "commit": provenance.commit()})
            print(about, found, flush=True)

    def finish(self) -> None:
        """Ends the command: 75 where something was left out, 1 where something failed."""
        if self.left_out:
            print(f"{self.left_out} parts are left; the same command goes on")
            sys.exit(errors.EXIT_PREEMPTED)
        self.page.finish()


def recipes(root: Path) -> None:
    """Writes the recipes of all parts."""
    about = dict(benchmarks=str(ROOT / "benchmarks"), epochs=EPOCHS, teachers=str(root / "teachers"), n=IMAGES)
    for name, attacks in (("full", ("pgd-20", "autoattack")), ("short", ("fgsm",)), ("attacked", ("autoattack",))):
        (root / f"{name}.py").write_text(RECIPE.format(**about, attacks=attacks), encoding="utf-8")


def command_line() -> None:
    """The command line of this script."""
    parser = bare(__file__, __doc__)
    parser.add_argument("--workdir", type=files.path, required=True, help="of the runs; the same command continues")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--only", nargs="+", choices=("agreement", "elastic", "faults"), default=None)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), help="default: all")
    parser.add_argument("--parallel", type=int, default=2, help="trials at a time; most of one is spent waiting")
    parser.add_argument("--minutes", type=float, help="begin nothing after so long")
    parser.add_argument("--out", type=files.path)
    given = parser.parse_args()
    wanted = given.only or ("agreement", "elastic", "faults")
    Job.fork.set_forkserver_preload(["__main__", "ibjax.main"])
    root, records = given.workdir.absolute(), Records(given.out, given.minutes)
    root.mkdir(parents=True, exist_ok=True)
    recipes(root)
    if "agreement" in wanted:
        for count in given.processes:
            for method in METHODS:
                about = {"part": "agreement", "method": method, "processes": count}
                records.add(about, lambda c=count, m=method: agreement(root, root / "full.py", m, c))
    if "elastic" in wanted:
        records.add({"part": "elastic"}, lambda: elastic(root, root / "short.py"))
    if "faults" in wanted:
        with concurrent.futures.ThreadPoolExecutor(given.parallel) as pool:
            for trial, count, name in itertools.product(range(given.trials), given.processes, given.faults):
                about = {"part": "faults", "fault": name, "processes": count, "trial": trial}
                work = functools.partial(inject, root, name, count, trial)
                pool.submit(records.add, about, work)
    records.finish()


if __name__ == "__main__":
    errors.exit_with(command_line)
