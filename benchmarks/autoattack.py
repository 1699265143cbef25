"""AutoAttack's parts against torchattacks', on the same weights, images, steps and queries: accuracy and time.

    pip install torch torchvision && pip install --no-deps torchattacks==3.5.1
    python -m ibjax.main --config=configs/small_cnn.py --workdir=runs/small_cnn --config.data.path=FOLDER
    python benchmarks/autoattack.py --workdir=runs/small_cnn [--n=256] [--queries=5000] [--eps=4/255] [--rounds=1]

Each part attacks all correctly classified images by itself: APGD on cross-entropy, APGD on targeted DLR and FAB with
100 steps and 9 targets, Square with torchattacks' schedule. In each round ibjax runs first, then PyTorch; the first
round of ibjax includes tracing and compilation. `flags` counts the images on which the two disagree; both draw at
random.

Writes a JSON after every run, and the table beside it as Markdown.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pgd_step
import torch
import torch.nn.functional as F
import torchattacks
import twin
from torch import Tensor, nn

import ibjax
from ibjax import evaluate, run
from ibjax.attacks import geometry
from ibjax.attacks.apgd import iterative_apgd
from ibjax.attacks.autoattack import autoattack
from ibjax.attacks.fab import iterative_fab
from ibjax.attacks.iterative import Iterative
from ibjax.attacks.square import iterative_square


class CNN(nn.Module):
    """The twin of `ibjax.models.cnn` with batch-norm, padding 1 and average pooling: (B, C, H, W) -> logits."""

    def __init__(self, channels: int, widths: tuple[tuple[int, ...], ...], num_classes: int):
        super().__init__()
        self.stages, count = [], 0
        for stage in widths:
            for width in stage:
                count += 1
                self.add_module(f"conv{count}", nn.Conv2d(channels, width, 3, 1, 1, bias=False))
                self.add_module(f"bn{count}", nn.BatchNorm2d(width))
                channels = width
            self.stages.append(range(count - len(stage) + 1, count + 1))
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images in [0, 1]."""
        for stage in self.stages:
            for i in stage:
                x = F.relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
            x = F.max_pool2d(x, 2)
        return self.head(x.mean((2, 3)))


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


def compare(workdir: Path, n: int, eps: str, steps: int, queries: int, rounds: int, save: Callable) -> dict[str, Any]:
    """The whole comparison as plain data; `save` gets it after every run."""
    trained = ibjax.load(workdir)
    split = evaluate._test_split(trained, n)
    x, y = np.float32(split.images / 255), split.labels
    network = CNN(x.shape[-1], trained.model.widths, trained.model.num_classes)
    twin.copy_weights(network, jax.device_get(trained.variables))
    network.eval().requires_grad_(False)
    x_torch, y_torch = torch.tensor(x).permute(0, 3, 1, 2).contiguous(), torch.tensor(y.astype(np.int64))
    logits = np.asarray(trained.logits_fn(x)), network(x_torch).numpy()
    clean = [float(np.mean(z.argmax(1) == y)) * 100 for z in logits]
    found = {"n": n, "eps": eps, "steps": steps, "queries": queries, "clean": clean, "parts": {}}
    found["largest difference of logits"] = float(np.abs(logits[0] - logits[1]).max())
    radius = geometry.fraction(eps)
    survive: list[dict[str, np.ndarray]] = [{}, {}]
    for round_ in range(rounds):
        for name, (ours, theirs) in parts(radius, steps, queries).items():
            key = jax.random.key(round_)
            result, seconds, busy = timed(
                lambda key=key, name=name, ours=ours: autoattack(
                    key, trained.logits_fn, x, y, "linf", radius, attacks={name: ours}
                )
            )
            attack = theirs(network, seed=round_)
            x_adv, seconds_torch, busy_torch = timed(lambda attack=attack: attack(x_torch, y_torch))
            distance = float((x_adv - x_torch).abs().max())
            flags = result.robust, (network(x_adv).argmax(1) == y_torch).numpy() & (logits[1].argmax(1) == y)
            for side, kept in zip(survive, flags, strict=True):
                side[name] = side.get(name, True) & kept
            part = found["parts"].setdefault(name, {"rounds": []})
            part["rounds"].append({
                "robust": [100 * float(kept.mean()) for kept in flags],
                "flags": int(np.sum(flags[0] != flags[1])),
                "seconds": [round(seconds, 2), round(seconds_torch, 2)],
                "busy elsewhere": [round(busy, 2), round(busy_torch, 2)],
                "distance": [float(np.abs(result.x_adv - x).max()), distance],
                "warnings": result.warnings,
            })  # fmt: skip
            save(found)
    found["worst case"] = [100 * float(np.logical_and.reduce(list(side.values())).mean()) for side in survive]
    return found


def timed(call: Callable) -> tuple[Any, float, float]:
    """(result, seconds, processors that others kept busy meanwhile)."""
    results = []
    started = time.perf_counter()
    _, busy = pgd_step.busy_elsewhere(lambda: results.append(call()))
    return results[0], time.perf_counter() - started, busy


def table(found: Mapping[str, Any]) -> str:
    """The comparison as Markdown; the first round's accuracies, the sum of all rounds' seconds."""
    lines = [
        "| attack | ibjax | torchattacks | flags | ibjax, s | torchattacks, s | speed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, part in found["parts"].items():
        first = part["rounds"][0]
        seconds = [sum(round_["seconds"][side] for round_ in part["rounds"]) for side in (0, 1)]
        robust = " | ".join(f"{value:.2f}" for value in first["robust"])
        times = " | ".join(f"{value:.1f}" for value in seconds)
        lines.append(f"| {name} | {robust} | {first['flags']} | {times} | {seconds[1] / seconds[0]:.2f} |")
    if "worst case" in found:
        lines.append(f"| worst case | {found['worst case'][0]:.2f} | {found['worst case'][1]:.2f} | | | | |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="of a run of configs/small_cnn.py")
    parser.add_argument("--n", type=int, default=256, help="test images, each class in proportion")
    parser.add_argument("--eps", default="4/255")
    parser.add_argument("--steps", type=int, default=100, help="of APGD and FAB")
    parser.add_argument("--queries", type=int, default=5000, help="of Square")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="default: results/autoattack-BACKEND-DATE.json")
    given = parser.parse_args()
    about = pgd_step.environment()
    about["versions"]["torchattacks"] = "3.5.1"
    out = given.out or Path("results") / f"autoattack-{jax.default_backend()}-{about['date'][:10]}.json"

    def save(found):
        run.write_json(out, {"benchmark": "autoattack", **about, **found})

    found = compare(given.workdir, given.n, given.eps, given.steps, given.queries, given.rounds, save)
    save(found)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    text = (
        f"{table(found)}\n\nrobust accuracy in percent of {given.n} images, l_inf, eps {given.eps}, clean "
        f"{found['clean'][0]:.2f}; {given.steps} steps, {given.queries} queries; seconds with compilation, "
        f"{given.rounds} round(s); {about['hardware']}; {versions}; {about['date'][:10]}\n"
    )
    out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
