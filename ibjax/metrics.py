"""metrics.jsonl: one JSON object a line, with "kind" and "step"; accuracies are in percent.

"train" averages its metrics over the `steps` steps that end at `step`: every step is in one row. "val" has the
accuracies that select a checkpoint. "diverged" has the reason why training stopped.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any


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
