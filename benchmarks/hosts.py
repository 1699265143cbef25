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

faults: each of FAULTS, to one process of N, `--trials` times. The others must end by themselves with the exit code that
is due and name the process; the same command must then finish the run, with the losses of an undisturbed one and, where
AutoAttack runs, its flags. Recorded: seconds until all have ended, exit codes.

The same command continues: what is recorded in the JSON file is not done again. With --minutes, no new part begins
after so long, and the command ends with exit code 75 until all is recorded. One page, results/hosts-cpu-DATE.md unless
`--out` says otherwise. The disk that fills up is a tmpfs, which only root can mount. Takes a few hours on two cores.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # before JAX is imported
    os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np
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


# ---- faults ------------------------------------------------------------------------------------------------


class Trial(NamedTuple):
    """A run to which something happens."""

    job: Job
    workdir: Path
    steps: int  # of the whole run


def saving(trial: Trial) -> None:
    """Waits until a checkpoint is being saved."""

    def now():
        return any("orbax-checkpoint-tmp" in file.name for file in (trial.workdir / "checkpoints").glob("*"))

    until(now, trial.job, "a save")


def attacking(trial: Trial) -> None:
    """Waits until AutoAttack has run for some time."""
    until(lambda: "after apgd-ce" in trial.job.text(0), trial.job, "AutoAttack")
    time.sleep(1)


def anywhere(trial: Trial) -> None:
    """Waits for nothing: the step was chosen at random."""


def fill(trial: Trial) -> None:
    """Leaves no byte on the disk that holds the workdir."""
    with contextlib.suppress(OSError), (trial.workdir / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(1 << 16))


class Fault(NamedTuple):
    """What happens to one process, when, and how the others end."""

    text: str
    when: Callable[[Trial], None] = anywhere
    victim: int = -1  # the last process, or the first one, which coordinates the others and writes
    number: int | None = None  # of the signal
    codes: tuple[int, ...] = (errors.EXIT_PEER_LOST,)  # with which the other processes may end
    stays: bool = False  # whether it ends as the others do, and is no victim
    clock: float = 0.0  # seconds by which its clock is fast from the beginning
    attack: bool = False  # whether the run ends with AutoAttack
    fills: bool = False  # whether the disk that it writes to fills up


_CRASH = (errors.EXIT_PEER_LOST, -signal.SIGABRT)  # JAX's C++ code ends a process whose process 0 is gone
_PREEMPTED = dict(number=signal.SIGTERM, codes=(errors.EXIT_PREEMPTED,), stays=True)
FAULTS = {
    "terminate": Fault("SIGTERM to one in training", **_PREEMPTED),
    "terminate_saving": Fault("SIGTERM to one while a checkpoint is saved", saving, **_PREEMPTED),
    "terminate_attack": Fault("SIGTERM to one in AutoAttack", attacking, attack=True, **_PREEMPTED),
    "kill": Fault("kill -9 of one in training", number=signal.SIGKILL),
    "kill_first": Fault("kill -9 of the first, which coordinates and writes", anywhere, 0, signal.SIGKILL, _CRASH),
    "kill_saving": Fault("kill -9 of the first while it saves a checkpoint", saving, 0, signal.SIGKILL, _CRASH),
    "kill_attack": Fault("kill -9 of one in AutoAttack", attacking, number=signal.SIGKILL, attack=True),
    "stop": Fault("SIGSTOP of one for longer than the heartbeat", number=signal.SIGSTOP),
    "fill": Fault("the disk of the workdir fills up", victim=0, codes=(errors.EXIT_INPUT,), fills=True),
    "clocks": Fault("the clock of one is a day fast", clock=86_400.0),
    "clocks_first": Fault("the clock of the first is a day slow", victim=0, clock=-86_400.0),
}


def appears(condition: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether a condition holds, now or within some seconds."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def ended(trial: Trial, fault: Fault) -> dict[str, Any]:
    """What became of a run after its fault; RuntimeError unless all ended by themselves as they should."""
    job, victim = trial.job, fault.victim % len(trial.job.processes)
    others = [i for i in range(len(job.processes)) if fault.stays or fault.fills or i != victim]
    began = time.monotonic()
    codes = job.wait([job.processes[i] for i in others])
    seconds = time.monotonic() - began
    if fault.number == signal.SIGSTOP:  # it wakes up after it was lost, and ends too
        job.processes[victim].send(signal.SIGCONT)
        last = job.wait([job.processes[victim]])
        if last[0] in (0, -signal.SIGKILL):
            raise RuntimeError(f"the stopped process ended with {last[0]} when it went on")
    job.end()
    said = " ".join(word for i in others for word in job.text(i).split()[-30:])
    if any(code not in fault.codes for code in codes):
        raise RuntimeError(f"exit codes {codes}, due were {fault.codes}: {said}")
    for i in others:  # the last word of a process that was aborted comes from another one, a moment later
        if not fault.stays and i != victim and not appears(lambda i=i: f"process {victim}" in job.text(i)):
            raise RuntimeError(f"process {i} does not name process {victim}: {said}")
    if fault.fills and "disk full" not in job.text(victim):
        raise RuntimeError(f"process {victim} does not name the disk: {said}")
    return {"codes": codes, "seconds": round(seconds, 1)}


@contextlib.contextmanager
def disk(folder: Path, own: bool) -> Iterator[None]:
    """A folder that exists while the block runs, with `own` on a small disk of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if own:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        if own:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        shutil.rmtree(folder, ignore_errors=True)


_one_at_a_time = threading.Lock()


def undisturbed(root: Path, count: int) -> Path:
    """The folder of the run on so many processes to which nothing happens, with the records of both recipes."""
    whole = root / f"whole-{count}"
    with _one_at_a_time:
        if len(list(whole.glob("eval/best/*.json"))) < 2:
            for recipe in ("short", "attacked"):  # the second one adds its attack to the same run
                train(root / f"{recipe}.py", "ib_rar", whole, count).finished()
    return whole


def inject(root: Path, name: str, count: int, trial: int) -> dict[str, Any]:
    """Lets a fault happen at a random step, and the same command finish the run; compares it with `undisturbed`."""
    whole = undisturbed(root, count)
    fault, expected = FAULTS[name], losses(whole)
    workdir = root / "trials" / f"{name}-{count}-{trial}"
    at = int(np.random.default_rng((trial, count)).integers(3, len(expected) - 30))
    at = len(expected) if fault.attack else at
    recipe = root / ("attacked.py" if fault.attack else "short.py")
    clocks = {fault.victim % count: fault.clock}
    with disk(workdir, own=fault.fills), contextlib.ExitStack() as jobs:
        first = Trial(train(recipe, "ib_rar", workdir, count, clocks=clocks), workdir, len(expected))
        jobs.callback(first.job.end)
        found: dict[str, Any] = {}
        if not fault.clock:
            until(lambda: furthest(workdir) >= at, first.job, f"step {at}")
            fault.when(first)
            if fault.fills:
                fill(first)
            else:
                first.job.processes[fault.victim].send(fault.number)
            found = ended(first, fault)
            (workdir / "filler").unlink(missing_ok=True)
            again = train(recipe, "ib_rar", workdir, count)
            jobs.callback(again.end)
            again.finished()
        else:
            first.job.finished()
        flags = [{name: r["robust_flags"] for name, r in found_in(folder).items()} for folder in (workdir, whole)]
        if not flags[0] or any(flags[0][name] != flags[1][name] for name in flags[0]):
            raise RuntimeError("the flags of the attacks are not those of an undisturbed run")
        return {"at": at, **found, "difference": difference(losses(workdir), expected)}


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
