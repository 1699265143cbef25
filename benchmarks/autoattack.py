"""Compares AutoAttack's parts with those of torchattacks on the same weights and images: robust accuracy and time.

    pip install torch torchvision && pip install --no-deps torchattacks==3.5.1
    python -m ibjax.main --config=configs/small_cnn.py --workdir=runs/small_cnn --config.data.path=FOLDER
    python benchmarks/autoattack.py --workdir=runs/small_cnn [--n=256] [--queries=5000] [--eps=4/255] [--rounds=1]
        [--search_dtype=bfloat16]

Each part attacks all correctly classified images by itself: APGD on cross-entropy, APGD on targeted DLR and FAB with
100 steps and 9 targets, Square with torchattacks' schedule. Steps and queries are equal on both sides. In each round
ibjax runs first, then PyTorch. The first round of ibjax includes compilation; if there are more rounds, its times do
not count. Later rounds trace the programs again and load them from the cache. `flags` counts the images on which the
two disagree; both are random.

Writes a JSON file after every attack, and the table beside it as Markdown. The same command with the same code,
versions and machine continues from this file.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import measuring
import numpy as np
import torch
import torchattacks
import twin
from parts import bare, refuse_other

import ibjax
from ibjax import files
from ibjax.attacks import geometry
from ibjax.attacks.apgd import iterative_apgd
from ibjax.attacks.autoattack import autoattack
from ibjax.attacks.autocast import DTYPES
from ibjax.attacks.fab import iterative_fab
from ibjax.attacks.iterative import Iterative
from ibjax.attacks.square import iterative_square
from ibjax.devices import cluster
from ibjax.runs import run

SIDES = ("ibjax", "torchattacks")


def parts(eps: float, steps: int, queries: int) -> dict[str, tuple[Iterative, Callable]]:
    """name -> (ibjax's attack, torchattacks' factory)."""
    return {
        "APGD-CE": (
            iterative_apgd("ce", "linf", eps, steps),
            partial(torchattacks.APGD, eps=eps, steps=steps, loss="ce"),
        ),
        "APGD-T": (
            iterative_apgd("dlr_targeted", "linf", eps, steps),
            partial(torchattacks.APGDT, eps=eps, steps=steps),
        ),
        "FAB-T": (
            iterative_fab("linf", eps, steps, targets=9),
            partial(torchattacks.FAB, eps=eps, steps=steps, multi_targeted=True),
        ),
        "Square": (
            iterative_square("linf", eps, queries, rescale=True),
            partial(torchattacks.Square, eps=eps, n_queries=queries),
        ),
    }


def compare(workdir: Path, found: dict[str, Any], rounds: int, save: Callable) -> None:
    """Fills `found` with what it does not have yet; `save` is called after every run."""
    trained = ibjax.load(workdir)
    split = run.test_split(trained, found["n"])
    x, y = np.float32(split.images / 255), split.labels
    network = twin.cnn_like(trained.model, trained.variables)
    x_torch, y_torch = twin.nchw(x), torch.tensor(y.astype(np.int64))
    logits = np.asarray(trained.logits_fn(x)), network(x_torch).numpy()
    right = [z.argmax(1) == y for z in logits]
    found["clean"] = [100 * float(np.mean(kept)) for kept in right]
    found["largest difference of logits"] = float(np.abs(logits[0] - logits[1]).max())
    eps = geometry.fraction(found["eps"])
    for round_, (name, (ours, theirs)) in itertools.product(
        range(rounds), parts(eps, found["steps"], found["queries"]).items()
    ):
        done = found["parts"].setdefault(name, [])
        if len(done) <= round_:
            done.append({})
        if "ibjax" not in done[round_]:
            key, own = jax.random.key(round_), {name: ours}
            run_ours = partial(
                autoattack,
                key,
                trained.logits_fn,
                x,
                y,
                "linf",
                eps,
                attacks=own,
                search_dtype=found.get("search_dtype", DTYPES[0]),
            )
            result, *times = timed(run_ours)
            done[round_]["ibjax"] = measured(result.robust, result.x_adv - x, *times) | {"warnings": result.warnings}
            save()
        if "torchattacks" not in done[round_]:
            attack = theirs(network, seed=round_)
            x_adv, *times = timed(lambda attack=attack: attack(x_torch, y_torch).detach())
            kept = (network(x_adv).argmax(1) == y_torch).numpy() & right[1]
            done[round_]["torchattacks"] = measured(kept, (x_adv - x_torch).numpy(), *times)
            save()


def measured(kept: np.ndarray, delta: np.ndarray, seconds: float, busy: float) -> dict[str, Any]:
    """What one run found, as plain data; `robust` has a digit for each image."""
    flags, distance = "".join(map(str, kept.astype(int))), float(np.abs(delta).max())
    return dict(robust=flags, distance=distance, seconds=round(seconds, 2), busy_elsewhere=round(busy, 2))


def timed(call: Callable) -> tuple[Any, float, float]:
    """(result, seconds, processors that others kept busy meanwhile)."""
    results = []
    started = time.perf_counter()
    _, busy = measuring.busy_elsewhere(lambda: results.append(call()))
    return results[0], time.perf_counter() - started, busy


def table(found: Mapping[str, Any]) -> str:
    """The comparison as Markdown: accuracies of the first round, seconds of those after it, or of the only one."""
    heads = ("attack", "ibjax", "torchattacks", "flags", "ibjax, s", "torchattacks, s", "speed")
    lines, survive = [], []
    for name, rounds in found["parts"].items():
        if any(side not in each for each in rounds for side in SIDES):
            continue
        kept = [np.array(list(rounds[0][side]["robust"])) == "1" for side in SIDES]
        survive.append(kept)
        seconds = [statistics.mean(each[side]["seconds"] for each in rounds[1:] or rounds) for side in SIDES]
        robust = [f"{100 * flags.mean():.2f}" for flags in kept]
        differing = int(np.sum(kept[0] != kept[1]))
        lines.append(
            (name, *robust, differing, *(f"{value:.1f}" for value in seconds), f"{seconds[1] / seconds[0]:.2f}")
        )
    worst = np.logical_and.reduce(survive)
    lines.append(
        ("worst case", *(f"{100 * flags.mean():.2f}" for flags in worst), int(np.sum(worst[0] != worst[1])), "", "", "")
    )
    return measuring.markdown(heads, lines)


def page(found: Mapping[str, Any]) -> str:
    """The table with its settings, hardware and versions, as Markdown."""
    rounds = max(map(len, found["parts"].values()), default=0)
    return (
        f"{table(found)}\n\nrobust accuracy in percent of {found['n']} images, l_inf, eps {found['eps']}, clean "
        f"{found['clean'][0]:.2f}; {found['steps']} steps, {found['queries']} queries; {rounds} round(s), ibjax's "
        f"search in {found.get('search_dtype', DTYPES[0])}; {measuring.provenance_line(found)}\n"
    )


def main() -> None:
    """The command line."""
    parser = bare(__file__, __doc__)
    parser.add_argument("--workdir", type=files.path, required=True, help="of a run of configs/small_cnn.py")
    parser.add_argument("--n", type=int, default=256, help="test images, each class in proportion")
    parser.add_argument("--eps", default="4/255")
    parser.add_argument("--steps", type=int, default=100, help="of APGD and FAB")
    parser.add_argument("--queries", type=int, default=5000, help="of Square")
    parser.add_argument("--search_dtype", choices=DTYPES, default=DTYPES[0], help="of ibjax")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=files.path, help="default: results/autoattack-BACKEND-DATE.json")
    given = parser.parse_args()
    out = given.out or measuring.default_out("autoattack")
    refuse_other(out)
    about = measuring.environment()
    about["versions"] = {**about["versions"], "torchattacks": torchattacks.__version__}
    asked = {
        "workdir": given.workdir.name,
        "n": given.n,
        "eps": given.eps,
        "steps": given.steps,
        "queries": given.queries,
        "search_dtype": given.search_dtype,
    }
    found = measuring.kept(out, about) or {"benchmark": "autoattack", **about, **asked, "parts": {}}
    cluster.keep_memory()  # as `python -m ibjax.evaluate` does; PyTorch profits too
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        compare(given.workdir, found, given.rounds, lambda: files.write_json(out, found))
    text = page(found)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    measuring.run(main)
