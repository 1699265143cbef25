"""metrics.jsonl: one JSON object a line, with "kind" and "step"; accuracies are in percent.

"train" averages its metrics over the `steps` steps that end at `step`: every step is in one row; `compiles` counts
the programs that were compiled meanwhile, which should be 0 after the first rows. "val" has the
accuracies that select a checkpoint. "diverged" has the reason why training stopped.
"""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np


class MetricsLog:
    """Appends rows; on opening, rows after `step` (written before a crash, to be written again) are dropped."""

    def __init__(self, workdir: Path, step: int):
        self.file = workdir / "metrics.jsonl"
        kept = [row for row in read(self.file) if row["step"] <= step]
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(self.file)
        self.handle = self.file.open("a")
        self.board = _tensorboard(workdir)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One row; it is on disk when this returns."""
        self.handle.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self.handle.flush()
        os.fsync(self.handle.fileno())
        if self.board:
            for name, value in values.items() if kind != "diverged" else ():
                self.board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Closes the file."""
        self.handle.close()
        if self.board:
            self.board.close()


_compiled = []  # one entry for each program compiled in this process


def _count_compilations(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(seconds)


jax.monitoring.register_event_duration_secs_listener(_count_compilations)


class Window:
    """Metrics that are still on the device: those of the steps since the last row."""

    def __init__(self, step: int):
        self.first, self.parts, self.started, self.compiled = step, [], time.perf_counter(), len(_compiled)

    def add(self, count: int, values: dict[str, Any]) -> None:
        """Takes a dispatch's arrays, of which the first `count` entries count; nothing is fetched."""
        self.parts.append((count, values))

    def fetch(self) -> dict[str, np.ndarray]:
        """All values, one array (steps,) a name; this waits for the device."""
        parts = [(count, jax.device_get(values)) for count, values in self.parts]
        return {name: np.concatenate([values[name][:count] for count, values in parts]) for name in parts[0][1]}

    def row(self, values: dict[str, np.ndarray], step: int, batch_size: int) -> dict[str, float]:
        """Means over the window, accuracies in percent, with the number of steps and the rate."""
        steps, seconds = step - self.first, time.perf_counter() - self.started
        percent = {name: 100.0 if name.endswith("_acc") else 1.0 for name in values}
        means = {name: percent[name] * float(np.mean(value)) for name, value in values.items()}
        compiles = len(_compiled) - self.compiled
        return {"steps": steps, **means, "images_per_s": round(steps * batch_size / seconds, 1), "compiles": compiles}


def read(file: Path) -> list[dict[str, Any]]:
    """All whole rows of a metrics file; a line cut by a crash is left out. Empty where there is no file."""
    rows = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def _tensorboard(workdir):
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None  # the extra [tensorboard] is not installed
    return SummaryWriter(str(workdir / "tensorboard"))
