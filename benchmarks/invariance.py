"""Do AutoAttack's flags depend on the batch size, on the number of devices or on an interruption? They should not.

    python -m ibjax.main --config=configs/small_cnn.py --workdir=runs/small_cnn --config.data.path=FOLDER
    python benchmarks/invariance.py --workdir=runs/small_cnn [--n=256] [--eps=4/255]

Runs the standard version in separate processes: with batch 256 and batch 1 on one device, on eight devices, and killed
several times without notice (SIGKILL) and continued from its state file. `flags` counts the images, after each attack
and at the end, on which a run differs from the first run; `images` is the largest difference in a pixel. Batch size and
number of devices may change rounding, and so flip an image on the decision boundary; an interruption must change no
bit.

The eight devices are virtual devices of a CPU; on an accelerator, all available ones are used. Writes a JSON file after
every run, and the table beside it as Markdown.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import measuring
import numpy as np
from parts import bare

import ibjax
from ibjax import errors, files
from ibjax.attacks.autoattack import autoattack
from ibjax.runs import run

_KILLED_AFTER = (20, 45, 60, 45)  # seconds of each process, its start included; then one runs to its end


def attack(work: dict[str, Any]) -> None:
    """The child: attacks, and writes the result to work["out"]."""
    trained = ibjax.load(work["workdir"])
    split = run.test_split(trained, work["n"])
    x, options = np.float32(split.images / 255), dict(batch_size=work["batch"], state=work["state"])
    found = autoattack(jax.random.key(0), trained.logits_fn, x, split.labels, "linf", work["eps"], **options)
    after = {f"after {name}": flags for name, flags in found.robust_after.items()}
    np.savez(work["out"], x_adv=found.x_adv, clean=found.clean, **after)


def results(folder: Path, given: argparse.Namespace, batch: int, devices: int, kills: tuple[int, ...] = ()) -> dict:
    """Arrays of one run, and how it went."""
    work = dict(workdir=str(given.workdir), n=given.n, eps=given.eps, batch=batch)
    work |= dict(out=str(folder / "found.npz"), state=str(folder / "state.npz"))
    command = [sys.executable, __file__, f"--child={json.dumps(work)}"]
    environment = dict(os.environ)
    if devices > 1 and jax.default_backend() == "cpu":
        flags = os.environ.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"
    begun, killed = time.perf_counter(), 0
    for limit in (*kills, None):
        try:
            subprocess.run(command, env=environment, check=True, timeout=limit)  # ends with SIGKILL at the limit
            break
        except subprocess.TimeoutExpired:
            killed += 1
    with np.load(folder / "found.npz") as stored:
        return {"seconds": round(time.perf_counter() - begun, 1), "killed": killed, **stored}


def difference(found: dict, first: dict) -> dict[str, Any]:
    """What the table says of one run."""
    names = [name for name in first if name == "clean" or name.startswith("after")]
    return {
        "robust_acc": 100 * float(found[names[-1]].mean()),
        "flags": int(sum(np.sum(found[name] != first[name]) for name in names)),
        "images": float(np.abs(found["x_adv"] - first["x_adv"]).max()),
        "seconds": found["seconds"],
        "killed": found["killed"],
    }


def table(records: list[dict]) -> str:
    """The records as Markdown."""
    heads = ("run", "robust, %", "flags that differ", "images differ by", "times killed", "s")
    rows = [
        (r["run"], f"{r['robust_acc']:.2f}", r["flags"], f"{r['images']:.2g}", r["killed"], r["seconds"])
        for r in records
    ]
    return measuring.markdown(heads, rows)


def main() -> None:
    """The command line."""
    parser = bare(__file__, __doc__)
    parser.add_argument("--workdir", type=files.path, help="of a trained network with test data")
    parser.add_argument("--n", type=int, default=256, help="test images, each class in proportion")
    parser.add_argument("--eps", default="4/255")
    parser.add_argument("--out", type=files.path, help="default: results/invariance-BACKEND-DATE.json")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return attack(given.child)
    if not given.workdir:
        parser.error("--workdir is needed: of a run of configs/small_cnn.py")
    note = f"AutoAttack, l_inf, eps {given.eps}, {given.n} images, workdir {given.workdir.name}"
    page, first = measuring.Page("invariance", given.out, table, note), None
    devices = 8 if jax.default_backend() == "cpu" else jax.device_count()
    runs = {
        "batch 256": dict(batch=256, devices=1),
        f"{devices} devices": dict(batch=256, devices=devices),
        "killed and started again": dict(batch=256, devices=1, kills=_KILLED_AFTER),
        "batch 1": dict(batch=1, devices=1),
    }
    for name, options in runs.items():
        with tempfile.TemporaryDirectory() as folder:
            found = results(Path(folder), given, **options)
        first = first or found
        page.add({"run": name, **difference(found, first)})
    page.finish()


if __name__ == "__main__":
    errors.exit_with(main)
