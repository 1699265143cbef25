"""Several processes of one command on this machine, which meet over the loopback; for hosts.py.

The processes are forked from one that has imported ibjax and begun nothing, which saves each of them the import.
"""

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ibjax import files
from ibjax.runs import metrics

# XLA on CPUs cuts products by its number of threads, at least one a device. With other cuts the last bits of a sum
# differ, and an attack that takes signs of gradients makes them the first digits of a loss within an epoch
THREADS = 8
LATEST = 900  # seconds after which a process that has not ended counts as hanging


class Started(NamedTuple):
    """A process of a job."""

    process: Any  # of multiprocessing
    output: Path

    def poll(self) -> int | None:
        """Its exit code, −N for signal N; None while it runs."""
        return self.process.exitcode

    def send(self, number: int) -> None:
        """Sends a signal, if it still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended in between
                os.kill(self.process.pid, number)

    def wait(self, seconds: float) -> int:
        """The exit code; a process that hangs is killed after so many seconds, and has the code −9."""
        self.process.join(max(seconds, 0.1))
        if self.poll() is None:
            self.send(signal.SIGKILL)
            self.process.join()
        return self.process.exitcode

    @property
    def text(self) -> str:
        """What it has written."""
        return self.output.read_text(encoding="utf-8", errors="replace")


def command(words: list[str], environment: dict[str, str], devices: int, output: str, clock: float) -> None:
    """The body of a process: `python -m ibjax.main WORDS`, whose clock is `clock` seconds fast."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the benchmark, however that ends
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment, NPROC=str(THREADS))  # as XLA reads it
    if clock:
        seconds, nanoseconds = time.time, time.time_ns
        time.time, time.time_ns = lambda: seconds() + clock, lambda: nanoseconds() + int(1e9 * clock)
    jax.config.update("jax_num_cpu_devices", devices)
    _keep_programs_of_all()
    sys.argv = ["ibjax.main", *words]
    from ibjax import main

    code = 1
    try:
        main.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    atexit._run_exitfuncs()  # a forked process would leave them out
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _keep_programs_of_all():
    """Lets every process keep its compiled programs.

    JAX keeps those of process 0, which on CPUs are of no use to the others: each start would compile for half a minute.
    """
    from jax._src import compiler, distributed

    write, state = compiler._cache_write, distributed.global_state

    def keep(*arguments):
        own, state.process_id = state.process_id, 0
        try:
            write(*arguments)
        finally:
            state.process_id = own

    compiler._cache_write = keep


class Job:
    """One command of ibjax on several processes; its outputs are collected in files."""

    fork = multiprocessing.get_context("forkserver")

    def __init__(self, folder: Path, processes: int, devices: int, *words: str, clocks: dict[int, float] | None = None):
        """`clocks`: by how many seconds the clock of a process is fast, as Python's code sees it."""
        folder.mkdir(parents=True, exist_ok=True)
        shared = {"JAX_NUM_PROCESSES": str(processes)}
        with socket.socket() as free:
            free.bind(("localhost", 0))
            shared |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{free.getsockname()[1]}"}
        self.processes: list[Started] = []
        for i in range(processes):
            own, output = {**shared, "JAX_PROCESS_ID": str(i)}, folder / f"output-{i}.txt"
            arguments = (list(words), own if processes > 1 else {}, devices, str(output), (clocks or {}).get(i, 0.0))
            process = self.fork.Process(target=command, args=arguments)
            process.start()
            self.processes.append(Started(process, output))

    def wait(self, those: Sequence[Started] | None = None) -> list[int]:
        """The exit codes of all processes, or of `those`; one that hangs is killed, and has the code −9."""
        deadline = time.monotonic() + LATEST + 600 * (len(self.processes) == 1)
        return [process.wait(deadline - time.monotonic()) for process in (self.processes if those is None else those)]

    def end(self) -> None:
        """Kills what still runs."""
        for process in self.processes:
            process.send(signal.SIGKILL)
            process.process.join()

    def text(self, i: int) -> str:
        """What process i has written."""
        return self.processes[i].text

    def finished(self) -> None:
        """Waits, and raises RuntimeError with the last lines unless all ended well."""
        codes = self.wait()
        if any(codes):
            worst = next(i for i, code in enumerate(codes) if code)
            raise RuntimeError(f"exit codes {codes}: {' '.join(self.text(worst).split()[-60:])}")


def train(
    recipe: Path, method: str, workdir: Path, processes: int, devices: int = 1, clocks: dict[int, float] | None = None
) -> Job:
    """Starts (or continues) the training of a method on `processes` times `devices` devices."""
    words = (f"--config={recipe}:{method}", f"--workdir={workdir}", "--trust=code")
    return Job(workdir.parent / f"{workdir.name}-output", processes, devices, *words, clocks=clocks)


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


def found_in(workdir: Path) -> dict[str, dict[str, Any]]:
    """{attack: record} of the best checkpoint."""
    records = map(files.read_json, sorted(workdir.glob("eval/best/*.json")))
    return {record["attack"]: record for record in records}


def difference(some: np.ndarray, others: np.ndarray) -> float:
    """The largest relative difference of two runs' losses; RuntimeError unless they have equally many steps."""
    if len(some) != len(others):
        raise RuntimeError(f"{len(some)} and {len(others)} steps")
    return float(np.max(np.abs(some - others) / np.abs(others)))


def until(condition: Callable[[], bool], job: Job, what: str) -> None:
    """Waits until a condition holds; raises RuntimeError if a process ends before, or after LATEST seconds."""
    deadline = time.monotonic() + LATEST
    while not condition():
        if time.monotonic() > deadline or any(process.poll() is not None for process in job.processes):
            raise RuntimeError(f"{what} did not come: {' '.join(job.text(0).split()[-40:])}")
        time.sleep(0.02)
