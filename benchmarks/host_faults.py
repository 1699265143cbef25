"""The faults that `hosts.py` lets happen to one process of a run, and what must become of the others and of the run."""

import contextlib
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rehearsal import Job, difference, found_in, furthest, losses, train, until

from ibjax import errors


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
