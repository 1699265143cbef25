"""Rehearses runs on several hosts, as processes of this machine that meet over the loopback: do they compute what one
process does, and what becomes of a run when something happens to one of them?

    python benchmarks/hosts.py [--processes 2 4] [--trials=10] [--only agreement elastic faults] [--out=PATH]

agreement: IBD, IB-RAR and shared information on the digits, on N processes with one device each and on one process with
N devices. Compared: the loss of every step, accuracies, AutoAttack's flags.

elastic: a run of IB-RAR that is preempted in the middle of epochs and continued as 4, 2 and 1 processes with a device
each. Compared: its losses with those of an uninterrupted run, and the steps in metrics.jsonl.

faults: each of FAULTS, to one process of N, `--trials` times. The others must end by themselves, and the same command
must then finish the run with the losses of an undisturbed one. Recorded: seconds until all have ended, exit codes.

One page, results/hosts-cpu-DATE.md unless `--out` says otherwise. Takes about two hours on two cores.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Page, markdown
from parts import bare

from ibjax import errors, files
from ibjax.evaluation import results
from ibjax.runs import metrics

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("ibd", "ib_rar", "shared_information")
RECIPE = """
import sys
from pathlib import Path

sys.path.insert(0, {benchmarks!r})
import comparison


def get_config(arg):
    config = comparison.settings(arg, {epochs}, 0, Path({teachers!r}))
    config.update(batch_size=64, log_every=1, checkpoint_every=1)
    config.evaluate.update(attacks={attacks!r}, n={n})
    for role in ("teacher", "assistant"):
        if config[role].recipe:
            config[role].recipe.evaluate.update(attacks=("fgsm",), n={n})
    return config
"""
LATEST = 300  # seconds after which a process that has not ended counts as hanging


class Job:
    """One command of ibjax on several processes; its outputs are collected in files."""

    def __init__(
        self, folder: Path, processes: int, devices: int, *command: str, special: dict[str, str] | None = None
    ):
        """`special` are environment variables of the last process alone."""
        folder.mkdir(parents=True, exist_ok=True)
        shared = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        if processes > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                shared |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{free.getsockname()[1]}"}
            shared |= {"JAX_NUM_PROCESSES": str(processes)}
        self.outputs = [folder / f"output-{i}.txt" for i in range(processes)]
        self.processes = []
        for i, output in enumerate(self.outputs):
            own = {"JAX_PROCESS_ID": str(i)} if processes > 1 else {}
            own |= special or {} if i == processes - 1 else {}
            with output.open("wb") as out:
                line = [sys.executable, *command]
                self.processes.append(subprocess.Popen(line, env={**shared, **own}, stdout=out, stderr=out, cwd=folder))

    def wait(self, those: Sequence[subprocess.Popen] | None = None) -> list[int]:
        """The exit codes of all processes, or of `those`; one that hangs is killed, and has the code -9."""
        those = self.processes if those is None else those
        deadline = time.monotonic() + LATEST + 600 * (len(self.processes) == 1)
        for process in those:
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
        return [process.wait() for process in those]

    def end(self) -> None:
        """Kills what still runs."""
        for process in self.processes:
            process.kill()
            process.wait()

    def text(self, i: int) -> str:
        """What process i has written."""
        return self.outputs[i].read_text(encoding="utf-8", errors="replace")

    def finished(self) -> None:
        """Waits, and raises RuntimeError with the last lines unless all ended well."""
        codes = self.wait()
        if any(codes):
            worst = next(i for i, code in enumerate(codes) if code)
            raise RuntimeError(f"exit codes {codes}: {' '.join(self.text(worst).split()[-60:])}")


def train(recipe: Path, method: str, workdir: Path, processes: int, devices: int = 1, **special: str) -> Job:
    """Starts (or continues) the training of a method on `processes` times `devices` devices."""
    command = ("-m", "ibjax.main", f"--config={recipe}:{method}", f"--workdir={workdir}", "--trust=code")
    return Job(workdir.parent / f"{workdir.name}-output", processes, devices, *command, special=special)


def losses(workdir: Path) -> np.ndarray:
    """(steps,) the loss of every step; raises RuntimeError if a step is missing or stands twice."""
    rows = [row for row in metrics.read(workdir / "metrics.jsonl") if row["kind"] == "train"]
    if [row["step"] for row in rows] != list(range(1, len(rows) + 1)):
        raise RuntimeError(f"{workdir}: metrics.jsonl has not every step once")
    return np.array([row["loss"] for row in rows])


def furthest(workdir: Path) -> int:
    """The last step in metrics.jsonl."""
    rows = metrics.read(workdir / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def until(condition: Callable[[], bool], job: Job, what: str) -> None:
    """Waits until a condition holds; raises RuntimeError if a process ends before, or after LATEST seconds."""
    deadline = time.monotonic() + LATEST
    while not condition():
        if time.monotonic() > deadline or any(process.poll() is not None for process in job.processes):
            raise RuntimeError(f"{what} did not come: {' '.join(job.text(0).split()[-40:])}")
        time.sleep(0.01)


# ---- agreement and elastic restarts ------------------------------------------------------------------------


def agreement(root: Path, recipe: Path, count: int) -> list[dict[str, Any]]:
    """One record a method: N processes beside one process with N devices."""
    records = []
    for method in METHODS:
        folders = {n: root / f"{method}-{n}-{count}" for n in (1, count)}
        for n, folder in folders.items():
            train(recipe, method, folder, n, count // n).finished()
        one, many = (losses(folders[n]) for n in (1, count))
        flags, accuracies = {}, {}
        for n, folder in folders.items():
            found = {
                record["attack"]: record for record in map(files.read_json, sorted(folder.glob("eval/best/*.json")))
            }
            flags[n] = {name: results.robust_flags(record) for name, record in found.items()}
            accuracies[n] = {name: (record["clean_acc"], record["robust_acc"]) for name, record in found.items()}
        records.append(
            {
                "part": "agreement",
                "method": method,
                "processes": count,
                "steps": len(one),
                "largest difference of a loss": float(np.max(np.abs(one - many) / np.abs(one))),
                "accuracies": accuracies[count],
                "accuracies equal": accuracies[1] == accuracies[count],
                "flags that differ": {name: int(np.sum(flags[1][name] != flags[count][name])) for name in flags[1]},
            }
        )
    return records


def elastic(root: Path, recipe: Path, plan: Sequence[int] = (1, 4, 2, 1)) -> dict[str, Any]:
    """One run, preempted in the middle of epochs and continued on other numbers of processes."""
    whole, changing = root / "elastic-whole", root / "elastic"
    train(recipe, "ib_rar", whole, 1).finished()
    expected = losses(whole)
    stops = []
    for i, count in enumerate(plan[:-1]):
        job = train(recipe, "ib_rar", changing, count)
        goal = (i + 1) * len(expected) // len(plan)
        until(lambda goal=goal: furthest(changing) >= goal, job, f"step {goal}")
        job.processes[-1].send_signal(signal.SIGTERM)
        codes = job.wait()
        if set(codes) != {errors.EXIT_PREEMPTED}:
            raise RuntimeError(f"preempted on {count} processes: exit codes {codes}: {job.text(0)[-500:]}")
        stops.append(furthest(changing))
    train(recipe, "ib_rar", changing, plan[-1]).finished()
    found = losses(changing)
    return {
        "part": "elastic",
        "processes": list(plan),
        "stopped at": stops,
        "steps of an epoch": len(expected) // EPOCHS,
        "steps": len(found),
        "largest difference of a loss": float(np.max(np.abs(found - expected) / np.abs(expected))),
        "largest difference before the first stop": float(np.max(np.abs(found - expected)[: stops[0]])),
    }


# ---- faults ------------------------------------------------------------------------------------------------


def terminate(job: Job, workdir: Path) -> None:
    """SIGTERM to one process"""
    job.processes[-1].send_signal(signal.SIGTERM)


def kill(job: Job, workdir: Path) -> None:
    """kill -9 of one process in training"""
    job.processes[-1].kill()


def kill_first(job: Job, workdir: Path) -> None:
    """kill -9 of the process that coordinates the others and writes"""
    job.processes[0].kill()


def kill_while_saving(job: Job, workdir: Path) -> None:
    """kill -9 of the process that writes, while it saves a checkpoint"""

    def saving():
        return any("orbax-checkpoint-tmp" in str(file) for file in (workdir / "checkpoints").glob("*"))

    until(saving, job, "a save")
    job.processes[0].kill()


def stop(job: Job, workdir: Path) -> None:
    """SIGSTOP of one process, for longer than the others wait"""
    job.processes[-1].send_signal(signal.SIGSTOP)


def kill_in_autoattack(job: Job, workdir: Path) -> None:
    """kill -9 of one process in AutoAttack"""
    until(lambda: "autoattack" in job.text(0), job, "AutoAttack")
    time.sleep(2)
    job.processes[-1].kill()


FAULTS = (terminate, kill, kill_first, kill_while_saving, stop, kill_in_autoattack)


def ended(job: Job, inject: Callable) -> tuple[list[int], float]:
    """(exit codes, seconds) of all that have to end by themselves; RuntimeError if one did not do so as it should."""
    victim = None if inject is terminate else job.processes[0 if inject in (kill_first, kill_while_saving) else -1]
    began, due = time.monotonic(), errors.EXIT_PEER_LOST if victim else errors.EXIT_PREEMPTED
    codes = job.wait([process for process in job.processes if process is not victim])
    seconds = time.monotonic() - began
    job.end()
    if set(codes) != {due}:
        said = " ".join(word for i in range(len(job.processes)) for word in job.text(i).split()[-30:])
        raise RuntimeError(f"exit codes {codes}, {due} was due: {said}")
    return codes, seconds


def fault(root: Path, recipe: Path, inject: Callable, count: int, trial: int, expected: np.ndarray) -> dict[str, Any]:
    """Injects a fault at a random step, and lets the same command finish the run."""
    workdir = root / f"{inject.__name__}-{count}-{trial}"
    at = int(np.random.default_rng(trial).integers(3, len(expected) - 10))
    if inject is kill_in_autoattack:
        at = len(expected)
    job = train(recipe, "ib_rar", workdir, count)
    try:
        until(lambda: furthest(workdir) >= at, job, f"step {at}")
        inject(job, workdir)
        codes, seconds = ended(job, inject)
        again = train(recipe, "ib_rar", workdir, count)
        again.finished()
        difference = float(np.max(np.abs(losses(workdir) - expected) / np.abs(expected)))
    finally:
        job.end()
    shutil.rmtree(workdir)
    return {"at": at, "codes": codes, "seconds": round(seconds, 1), "difference": difference}


def faults(root: Path, recipe: Path, count: int, trials: int, kinds: Sequence[Callable]) -> list[dict[str, Any]]:
    """One record a kind of fault."""
    whole = root / f"whole-{count}"
    train(recipe, "ib_rar", whole, count).finished()
    expected, records = losses(whole), []
    for inject in kinds:
        found = []
        for trial in range(trials):
            try:
                found.append(fault(root, recipe, inject, count, trial, expected))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                found.append({"error": " ".join(str(error).split())[:600]})
            print(inject.__name__, found[-1], flush=True)
        records.append({"part": "faults", "fault": inject.__doc__, "processes": count, "trials": found})
    return records


# ---- the page ----------------------------------------------------------------------------------------------


def page(records: list[dict]) -> str:
    """The tables of all records so far."""
    agreed = [
        [
            r["method"],
            r["processes"],
            r["steps"],
            f"{r['largest difference of a loss']:.1e}",
            "equal" if r["accuracies equal"] else "differ",
            ", ".join(f"{name}: {count}" for name, count in r["flags that differ"].items()),
        ]
        for r in records
        if r["part"] == "agreement"
    ]
    moved = [
        [
            " → ".join(map(str, r["processes"])),
            ", ".join(map(str, r["stopped at"])),
            r["steps of an epoch"],
            r["steps"],
            f"{r['largest difference of a loss']:.1e}",
            f"{r['largest difference before the first stop']:.1e}",
        ]
        for r in records
        if r["part"] == "elastic"
    ]
    injected = []
    for r in records:
        if r["part"] == "faults":
            good = [t for t in r["trials"] if "error" not in t]
            times = [t["seconds"] for t in good]
            codes = sorted({str(c) for t in good for c in t["codes"]})
            worst = max((t["difference"] for t in good), default=float("nan"))
            span = f"{min(times)} to {max(times)}" if times else ""
            row = [r["fault"], r["processes"], len(r["trials"]), len(good), span, ", ".join(codes), f"{worst:.1e}"]
            injected.append(row)
    heads = (
        ("method", "processes", "steps", "largest relative difference of a loss", "accuracies", "flags that differ"),
        ("processes", "stopped at step", "steps of an epoch", "steps", "largest difference of a loss", "before a stop"),
        ("fault", "processes", "injected", "survived", "seconds until all ended", "exit codes", "difference of a loss"),
    )
    tables = (markdown(head, rows) for head, rows in zip(heads, (agreed, moved, injected), strict=True) if rows)
    return "\n\n".join(tables)


EPOCHS = 4


def command_line() -> None:
    """The command line of this script."""
    parser = bare(__file__, __doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--only", nargs="+", choices=("agreement", "elastic", "faults"), default=None)
    parser.add_argument("--faults", nargs="+", choices=[f.__name__ for f in FAULTS], help="default: all")
    parser.add_argument("--out", type=files.path)
    given = parser.parse_args()
    wanted = given.only or ("agreement", "elastic", "faults")
    kinds = [inject for inject in FAULTS if not given.faults or inject.__name__ in given.faults]
    out = Page("hosts", given.out, page)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        about = dict(benchmarks=str(ROOT / "benchmarks"), epochs=EPOCHS, teachers=str(root / "teachers"))
        full, short = root / "full.py", root / "short.py"
        full.write_text(RECIPE.format(**about, attacks=("pgd-20", "autoattack"), n=128), encoding="utf-8")
        short.write_text(RECIPE.format(**about, attacks=("autoattack",), n=64), encoding="utf-8")
        if "agreement" in wanted:
            for count in given.processes:
                for record in agreement(root, full, count):
                    out.add(record)
        if "elastic" in wanted:
            out.add(elastic(root, short))
        if "faults" in wanted:
            for count in given.processes:
                for record in faults(root, short, count, given.trials, kinds):
                    out.add(record)
    out.finish()


if __name__ == "__main__":
    errors.exit_with(command_line)
