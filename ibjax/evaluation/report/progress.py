"""How far runs have come, from their rows in metrics.jsonl: for the page of runs that train."""

import time
from collections.abc import Sequence
from typing import Any

from ibjax.evaluation.report.grids import Grid


def grid(runs: Sequence[Any]) -> Grid:
    """A line for each of some `report.RunResults`: its state, step, loss, images per second and time left."""
    header = ["run", "state", "step", "epoch", "loss", "images/s", "time left", "last row"]
    notes = ["The time left counts validation, and not the evaluation after the last step."]
    return Grid("Progress", header, [_line(run) for run in runs], 2, notes)


def _line(run):
    rows = [row for row in run.metrics if row.get("kind") == "train"]
    row = rows[-1] if rows else {}
    step, epochs = max((row["step"] for row in run.metrics), default=0), run.config.get("epochs")
    total = run.steps_per_epoch and isinstance(epochs, int) and run.steps_per_epoch * epochs
    done = bool(total) and step >= total
    return [
        run.title,
        _state(run, done),
        f"{step} of {total}" if total else str(step),
        _number(row.get("epoch"), ".2f") + (f" of {epochs}" if total else ""),
        _number(row.get("loss"), ".4g"),
        _number(row.get("images_per_s"), ",.0f"),
        "–" if done else duration(row.get("seconds_left")),
        _age(run.folder / "metrics.jsonl"),
    ]


def _state(run, done):
    last = run.metrics[-1].get("kind") if run.metrics else None
    if "imported" in run.facts:
        return "imported"
    if last in ("diverged", "preempted"):
        return last
    if done:
        return "evaluated" if run.records else "trained"
    return "training" if run.metrics else "no row yet"


def _age(file):
    try:
        return f"{duration(max(0.0, time.time() - file.stat().st_mtime))} ago"
    except OSError:
        return "–"


def _number(value, form):
    return format(value, form) if isinstance(value, int | float) else "–"


def duration(seconds: Any) -> str:
    """A length of time in words, as "2 h 05 min"; "–" for what is no number."""
    if not isinstance(seconds, int | float) or not 0 <= seconds < 1e9:
        return "–"
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 120:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
