"""metrics.jsonl: one JSON object per line, with "kind" and "step"; accuracies are in percent.

| kind      | content                                                                                                |
|-----------|--------------------------------------------------------------------------------------------------------|
| train     | means over the `steps` steps that end at `step`; every step is in exactly one row. `compiles` counts   |
|           | the programs compiled meanwhile, which should be 0 after the first rows; `seconds_left` is an estimate |
|           | up to the last step, validation included; `saved` is the newest checkpoint on disk                     |
| val       | the validation accuracies that select a checkpoint                                                     |
| diverged  | the reason why training stopped                                                                        |
| preempted | `step` is the step that was saved                                                                      |

Every row ends with the CRC-32 of the text before it in its line; rows of older versions have none.

Guarantees (tests of the same names): a line that is damaged is left out and told of, and stops nothing.
"""

import contextlib
import json
import logging
import os
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ibjax import files
from ibjax.runs.writers import Background

_CRC = ', "crc": "'
log = logging.getLogger(__name__)


class MetricsLog:
    """Appends rows. Opening drops the rows after `step`: a run that crashed takes those steps again.

    Every row is handed to `writers` too, which are closed with the file.
    """

    def __init__(self, workdir: Path, step: int, writers: Sequence[Background] = ()):
        self.file = workdir / "metrics.jsonl"
        rows, damaged = read_lines(self.file)
        kept = [row for row in rows if row["step"] <= step]
        if damaged:
            log.warning(
                "%s: %d damaged lines are left out; %s",
                self.file,
                damaged,
                _gap(kept) or "no step of training is missing",
            )
        with files.replacing(self.file) as temporary:
            temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
        self.handle = self.file.open("a", encoding="utf-8")
        self.writers = writers

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Writes one row; it is on disk when this returns."""
        with files.naming(self.file):
            self.handle.write(_line({"kind": kind, "step": step, **values}))
            self.handle.flush()
            os.fsync(self.handle.fileno())
        for writer in self.writers:
            writer.write(kind, step, values)

    def close(self) -> None:
        """Closes the file, without an error: `write` has already raised where the disk was full."""
        with contextlib.suppress(OSError):
            self.handle.close()
        for writer in self.writers:
            writer.close()


def _line(row):
    text = json.dumps(row)[:-1]
    return f'{text}{_CRC}{zlib.crc32(text.encode()):08x}"}}\n'


def _gap(rows):
    """A sentence that names the training steps which no row covers; "" where there are none."""
    last, missing = 0, []
    for row in rows:
        if row.get("kind") == "train" and type(row.get("steps")) is int:
            first = row["step"] - row["steps"]
            missing += [f"{last + 1} to {first}"] if first > last else []
            last = row["step"]
    return f"no row tells of steps {', '.join(missing)}" if missing else ""


_compiled = []  # one entry for each program compiled in this process


def _count_compilations(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(seconds)


jax.monitoring.register_event_duration_secs_listener(_count_compilations)


class Window:
    """The metrics of the steps since the last row, which are still on the device."""

    def __init__(self, step: int):
        self.first, self.parts, self.started, self.compiled = step, [], time.perf_counter(), len(_compiled)

    def add(self, count: int, values: dict[str, Any]) -> None:
        """Adds the arrays of a dispatch, whose first `count` entries are valid; nothing is fetched from the device."""
        self.parts.append((count, values))

    def fetch(self) -> dict[str, np.ndarray]:
        """{name: array (steps,)} of all values; this waits for the device."""
        parts = [(count, jax.device_get(values)) for count, values in self.parts]
        return {name: np.concatenate([values[name][:count] for count, values in parts]) for name in parts[0][1]}

    def row(self, values: dict[str, np.ndarray], step: int, batch_size: int) -> dict[str, float]:
        """Means over the window (accuracies in percent), the number of steps, images per second, and `compiles`."""
        steps, seconds = step - self.first, time.perf_counter() - self.started
        percent = {name: 100.0 if name.endswith("_acc") else 1.0 for name in values}
        means = {name: percent[name] * float(np.mean(value)) for name, value in values.items()}
        compiles = len(_compiled) - self.compiled
        return {"steps": steps, **means, "images_per_s": round(steps * batch_size / seconds, 1), "compiles": compiles}


def read(file: Path) -> list[dict[str, Any]]:
    """All undamaged rows of a metrics file; empty where there is no file."""
    return read_lines(file)[0]


def read_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """(undamaged rows, number of damaged lines); the last line, which a crash may have cut off, does not count."""
    try:
        lines = files.read_bytes(file).split(b"\n")
    except FileNotFoundError:
        return [], 0
    rows = [_row(line) for line in lines]
    damaged = sum(row is None for line, row in zip(lines[:-1], rows, strict=False) if line.strip())
    return [row for row in rows if row is not None], damaged


def _row(line):
    """The row of a line, without its CRC; None where the CRC does not match or the line is no row."""
    try:
        text = line.decode("utf-8")
        before, separator, rest = text.rpartition(_CRC)
        if separator and rest.rstrip() != f'{zlib.crc32(before.encode()):08x}"}}':
            return None
        row = json.loads(before + "}" if separator else text)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def saved_step(file: Path) -> int | None:
    """The last step at which a run saved a checkpoint, according to its rows; None where they tell of none.

    A row of a validation is written before its checkpoint and after the one before it, so the last one tells of none.
    Rows of older versions do not say what was `saved`.
    """
    rows = read(file)
    validated, preempted = ([row["step"] for row in rows if row.get("kind") == kind] for kind in ("val", "preempted"))
    said = [row["saved"] for row in rows if type(row.get("saved")) is int]
    return max([*sorted(set(validated))[:-1], *preempted, *said], default=None)
