"""SiRIIB's `info_stop`: does training diverge where the clean f_i are a target of L_info, without gradient?

    python benchmarks/info_stop.py [--data=digits] [--steps=400] [--lr=0.1] [--seeds=3]
    python benchmarks/info_stop.py --data=mnist:FILE.npz --fraction=0.1

Trains SiRIIB on PGD-AT with λ₁ = 20 on the network of `effects.py`, in batches of 64 at a constant learning rate, with
`info_stop=False` and `True`, from the same weights and on the same images, and notes L_info and accuracy on the way. A
run has diverged at the first step whose loss or gradient is not finite; it ends there. Writes OUT.json after every run,
and the table beside it as Markdown.
"""

import argparse
from pathlib import Path
from typing import Any

import effects
import measuring
import numpy as np
from ml_collections import ConfigDict

from ibjax import feed
from ibjax.experiment import build, initial_state, run_key

SHOWN = (10, 50, 100, 200, 400)  # the steps whose L_info the table shows


def settings(given: argparse.Namespace, seed: int, stop: bool) -> ConfigDict:
    """The configuration of one run."""
    given = argparse.Namespace(**{**vars(given), "epochs": 1, "workdir": Path(), "n": None})
    made = effects.settings("SiRIIB", seed, given)
    made.objective.update(info_stop=stop, lam=given.lam)
    made.optimizer.lr = given.lr
    made.schedule = dict(name="constant")
    return made


def train(given: argparse.Namespace, seed: int, stop: bool) -> dict[str, Any]:
    """The record of one run: metrics of every step, up to the first that is not finite."""
    experiment = build(settings(given, seed, stop))
    state, key = initial_state(experiment), run_key(seed, 1, experiment.mesh)
    step = feed.feed(experiment, key, 0).dispatch
    rows = {name: [] for name in ("loss", "base", "svd", "info", "adv_acc", "grad_norm")}
    diverged = None
    for i in range(1, given.steps + 1):
        state, metrics = step(state, 1)
        found = {name: float(metrics[name][0]) for name in rows}
        if not all(np.isfinite(list(found.values()))):
            diverged = i
            break
        for name, values in rows.items():
            values.append(found[name])
    return {
        "info_stop": stop,
        "seed": seed,
        "lr": given.lr,
        "lam": given.lam,
        "steps": given.steps,
        "diverged_at": diverged,
        "metrics": {name: [float(f"{value:.5g}") for value in values] for name, values in rows.items()},
    }


def table(records: list[dict]) -> str:
    """The records as Markdown."""
    heads = ("info_stop", "seed", "diverged at step", *(f"L_info at {n}" for n in SHOWN), "training accuracy on x', %")
    rows = []
    for record in records:
        info, accuracy = (record["metrics"][name] for name in ("info", "adv_acc"))
        shown = [f"{info[n - 1]:.3g}" if n <= len(info) else "" for n in SHOWN]
        last = f"{100 * np.mean(accuracy[-20:]):.1f}" if accuracy else ""
        rows.append((record["info_stop"], record["seed"], record["diverged_at"] or "no", *shown, last))
    return measuring.markdown(heads, rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, mnist:FILE.npz or cifar10:FOLDER")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the training images")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--lam", type=float, default=20.0, help="λ₁")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, …")
    parser.add_argument("--out", type=Path, help="default: results/info_stop-BACKEND-DATE.json")
    given = parser.parse_args()
    kind = given.data.partition(":")[0]
    note = (
        f"SiRIIB on PGD-AT, {kind}, fraction {given.fraction:g} of the training images, λ₁ {given.lam:g}, lr "
        f"{given.lr:g} constant, {given.steps} steps of 64; training accuracy: mean of the last 20 steps"
    )
    page = measuring.Page("info_stop", given.out, table, note)
    for seed in range(given.seeds):
        for stop in (False, True):
            page.add({"data": kind, **train(given, seed, stop)})
    page.finish()


if __name__ == "__main__":
    main()
