"""SiRIIB's `info_stop`: does training diverge if L_info sends no gradient to the clean f_i?

    python benchmarks/info_stop.py [--lr=0.1] [--lam=20] [--seeds=3]
    python benchmarks/info_stop.py --data digits mnist:FILE.npz --fraction 1 0.1 --steps 400 60

Trains SiRIIB on PGD-AT with λ₁ = 20 on the network of `effects.py`, in batches of 64 at a constant learning rate, with
`info_stop=False` and `True`, from the same weights and on the same images, and records L_info and accuracy. A run
diverges, and ends, at the first step whose loss or gradient is not finite. Writes OUT.json after every run, with the
metrics of about twenty of its steps, and the table beside it as Markdown. The same command with the same --out
continues where it was stopped; if code or versions have changed since, it begins again.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import effects
import measuring
import numpy as np
from ml_collections import ConfigDict
from parts import bare

from ibjax import files
from ibjax.training import feed
from ibjax.training.experiment import build, initial_state, run_key

SHOWN = (10, 50, 100, 200, 400)  # the steps whose L_info the table shows


def settings(given: argparse.Namespace, data: str, fraction: float, seed: int, stop: bool) -> ConfigDict:
    """The configuration of one run."""
    of_effects = dict(data=data, fraction=fraction, epochs=1, workdir=Path(), n=None)
    made = effects.settings("SiRIIB", seed, argparse.Namespace(**of_effects))
    made.objective.update(info_stop=stop, lam=given.lam)
    made.optimizer.lr = given.lr
    made.schedule = dict(name="constant")
    return made


def train(given: argparse.Namespace, data: str, fraction: float, steps: int, seed: int, stop: bool) -> dict[str, Any]:
    """The record of one run: what `summary` keeps of all steps up to the first that is not finite."""
    experiment = build(settings(given, data, fraction, seed, stop))
    state, key = initial_state(experiment), run_key(seed, 1, experiment.mesh)
    step = feed.feed(experiment, key, 0).dispatch
    rows = {name: [] for name in ("loss", "base", "svd", "info", "adv_acc", "grad_norm")}
    diverged = None
    for i in range(1, steps + 1):
        state, metrics = step(state, 1)
        found = {name: float(metrics[name][0]) for name in rows}
        if not all(np.isfinite(list(found.values()))):
            diverged = i
            break
        for name, values in rows.items():
            values.append(found[name])
    return {"diverged_at": diverged, **summary(rows)}


def summary(rows: dict[str, list[float]]) -> dict[str, Any]:
    """Of the metrics of all steps: those of the table's steps, of 15 more and of the last ones, and what sums up."""
    count = len(rows["info"])
    spread = np.geomspace(1, max(count, 1), 15).round().astype(int).tolist()
    kept = [n for n in sorted({*SHOWN, *spread, count - 2, count - 1}) if 0 < n <= count]
    return {
        "largest_info": max(rows["info"], default=None),
        "last_adv_acc": float(np.mean(rows["adv_acc"][-20:])) if count else None,
        "steps_kept": kept,
        "metrics": {name: [float(f"{values[n - 1]:.5g}") for n in kept] for name, values in rows.items()},
    }


def table(records: list[dict]) -> str:
    """The records as Markdown."""
    shown_at = [f"L_info at step {n}" for n in SHOWN]
    heads = ("data", "info_stop", "seed", "diverged at step", *shown_at, "its largest", "training accuracy on x', %")
    rows = []
    for record in records:
        info = dict(zip(record["steps_kept"], record["metrics"]["info"], strict=True))
        shown = [f"{info[n]:.3g}" if n in info else "" for n in SHOWN]
        largest, last = record["largest_info"], record["last_adv_acc"]
        about = (record["data"], record["info_stop"], record["seed"], record["diverged_at"] or "no")
        sums = ("" if largest is None else f"{largest:.3g}", "" if last is None else f"{100 * last:.1f}")
        rows.append((*about, *shown, *sums))
    return measuring.markdown(heads, rows)


def main() -> None:
    """The command line."""
    parser = bare(__file__, __doc__)
    data = "digits, mnist:FILE.npz or cifar10:FOLDER; one or more"
    parser.add_argument("--data", nargs="+", default=["digits"], help=data)
    parser.add_argument("--fraction", type=float, nargs="+", default=[1.0], help="of the training images, for each")
    parser.add_argument("--steps", type=int, nargs="+", default=[400], help="for each")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--lam", type=float, default=20.0, help="λ₁")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, …")
    parser.add_argument("--out", type=files.path, help="default: results/info_stop-BACKEND-DATE.json")
    given = parser.parse_args()
    if not len(given.data) == len(given.fraction) == len(given.steps):
        parser.error("give as many values of --fraction and --steps as of --data")
    sets = list(zip(given.data, given.fraction, given.steps, strict=True))
    said = "; ".join(f"{steps} steps on {fraction:g} of {data.partition(':')[0]}" for data, fraction, steps in sets)
    note = (
        f"SiRIIB on PGD-AT, λ₁ {given.lam:g}, lr {given.lr:g} constant, batch 64, {said}; training accuracy: mean of "
        f"the last 20 steps that were finite"
    )
    page = measuring.Page("info_stop", given.out, table, note)
    known = measuring.kept(page.out, page.found).get("records", [])
    for (data, fraction, steps), seed, stop in itertools.product(sets, range(given.seeds), (False, True)):
        about = dict(data=data.partition(":")[0], fraction=fraction, info_stop=stop, seed=seed)
        about |= dict(lr=given.lr, lam=given.lam, steps=steps)
        found = next((record for record in known if about.items() <= record.items()), None)
        page.add(found or {**about, **train(given, data, fraction, steps, seed, stop)})
    page.finish()


if __name__ == "__main__":
    measuring.run(main)
