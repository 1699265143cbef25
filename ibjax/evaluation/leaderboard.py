"""Where a run would stand on RobustBench: its entry as a file, and its place in words.

An entry has the keys of RobustBench's `model_info`, and the accuracies of the run's records on the whole test set (of
ImageNet on 5,000 images, which are not RobustBench's own). Entries are ranked by the lowest robust accuracy that is
known, as on its page; the leaderboard is that of `ibjax.pytorch.published`.
"""

import json
from pathlib import Path
from typing import Any

import jax

from ibjax import files
from ibjax.attacks import geometry
from ibjax.attacks.names import in_file_name
from ibjax.errors import InputError
from ibjax.pytorch import exports
from ibjax.pytorch.published import Published, entries
from ibjax.runs import run

DATA = {"cifar10": "cifar10", "cifar100": "cifar100", "imagenet2012": "imagenet"}
NORMS = {"linf": "l_inf", "l2": "l2"}
_CLOSE = 0.015  # relative: entries with 0.5 stand beside 128/255, those with 0.031 beside 8/255; 0.03 does not


def write(workdir: Path, checkpoint: str, norm: str, eps: str) -> tuple[Path, dict[str, Any]]:
    """Writes leaderboard/CHECKPOINT.NORM.EPS.json into a run's folder; returns file and entry. All processes call it.

    Raises InputError where the run has no AutoAttack record of the whole test set for this threat.
    """
    trained = run.load(workdir, checkpoint)
    info = exports.model_info(trained, checkpoint, norm, eps)
    if info["autoattack_acc"] is None:
        raise InputError(
            f"{workdir} has no record of AutoAttack on the whole test set in {norm} at {eps} for checkpoint "
            f"{checkpoint}; evaluate it with --attacks=autoattack and all test images"
        )
    file = workdir / "leaderboard" / f"{checkpoint}.{norm}.{in_file_name(eps)}.json"
    if jax.process_index() == 0:
        file.parent.mkdir(exist_ok=True)
        with files.replacing(file) as temporary:  # without a digest, which is no key of RobustBench's
            temporary.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    return file, info


def rows(dataset: str, norm: str, eps: str) -> list[Published]:
    """The entries of a leaderboard, the most robust first; InputError where RobustBench has none for this threat."""
    data = DATA.get(dataset)
    found = [row for row in entries().values() if row.data == data and row.norm == norm]
    asked = geometry.fraction(eps)
    found = [row for row in found if abs(geometry.fraction(row.eps) - asked) <= _CLOSE * asked]
    if not found:
        known = sorted({f"{row.data} in {row.norm} at {row.eps}" for row in entries().values() if row.norm in NORMS})
        raise InputError(f"there is no leaderboard of {dataset} in {norm} at {eps}; there are: {', '.join(known)}")
    return sorted((row for row in found if row.robust is not None), key=_robust, reverse=True)


def place(dataset: str, norm: str, eps: str, robust: float) -> str:
    """Where a robust accuracy in percent would stand, in words; raises InputError as `rows`."""
    board = rows(dataset, norm, eps)
    ahead = [row for row in board if _robust(row) > robust]
    behind = board[len(ahead) :]
    words = f"{robust:.2f} % would stand at rank {len(ahead) + 1} of {len(board) + 1} on {dataset}, {NORMS[norm]} {eps}"
    beside = [f"behind {_named(row)}" for row in ahead[-1:]] + [f"ahead of {_named(row)}" for row in behind[:1]]
    return f"{words}: {', '.join(beside)}"


def _robust(row: Published) -> float:
    return row.robust or 0.0


def _named(row):
    return f"{row.name} ({row.robust:.2f} %)"
