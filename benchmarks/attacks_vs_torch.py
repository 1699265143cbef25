"""Robust accuracy under ibjax's attacks and under torchattacks' on the same weights and images, and what they cost.

    pip install torch torchvision && pip install --no-deps torchattacks==3.5.1
    python benchmarks/attacks_vs_torch.py [--data=mnist.npz --eps=0.2 --step-size=0.05] [--n=256]

A small CNN is trained for a minute on FGSM from a random start; its weights go into a PyTorch twin, whose logits are
compared first. Without `--data` it sees the digits that scikit-learn ships. Random attacks run `--repeats` times and
give the mean; `flags` counts the images on which the two disagree in the first run.

Writes a JSON, and the table beside it as Markdown.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import measuring
import numpy as np
import optax
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibjax import losses, run
from ibjax.attacks import Attack, geometry
from ibjax.attacks.cw import cw
from ibjax.attacks.fgsm import fgsm
from ibjax.attacks.mim import mim
from ibjax.attacks.nifgsm import nifgsm
from ibjax.attacks.pgd import pgd
from ibjax.attacks.spsa import spsa
from ibjax.data import Arrays, digits, load_splits, npz
from ibjax.models import cnn
from ibjax.step import to_float


class CNN(nn.Module):
    """The twin of `ibjax.models.cnn` without batch-norm: (B, C, H, W) in [0, 1] -> logits."""

    def __init__(self, params: Mapping[str, Any], widths: tuple[tuple[int, ...], ...], padding: int):
        super().__init__()
        self.stages, self.padding, count = [], padding, 0
        for stage in widths:
            self.stages.append([f"conv{count + i}" for i in range(1, len(stage) + 1)])
            count += len(stage)
        self.linear = [name for name in sorted(params) if name.startswith("fc")] + ["head"]
        for name, value in params.items():
            entry = value.get("conv", value.get("dense"))
            order = (3, 2, 0, 1) if "conv" in value else (1, 0)
            self._add(f"{name}_weight", np.transpose(entry["kernel"], order))
            self._add(f"{name}_bias", entry["bias"])

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images in [0, 1]."""
        for names in self.stages:
            for name in names:
                x = F.relu(F.conv2d(x, *self._weights(name), padding=self.padding))
            x = F.max_pool2d(x, 2)
        x = x.permute(0, 2, 3, 1).flatten(1)  # as NHWC is flattened
        for name in self.linear[:-1]:
            x = F.relu(F.linear(x, *self._weights(name)))
        return F.linear(x, *self._weights("head"))

    def _add(self, name, value):
        self.register_parameter(name, nn.Parameter(torch.tensor(np.array(value)), requires_grad=False))

    def _weights(self, name):
        return getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")


def trained(arrays: Arrays, model: cnn.Model, eps: float, steps: int) -> Any:
    """Variables after `steps` of Adam on FGSM from a uniform start, batch 128."""
    x_all, y_all = (jnp.asarray(part) for part in arrays.train)
    variables = model.init(jax.random.key(0), to_float(x_all[:1]))
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    attack = fgsm(eps=eps, init="uniform", step_size=1.25 * eps)

    def step(i, carry):
        variables, state = carry
        rows, start, dropout = jax.random.split(jax.random.fold_in(jax.random.key(1), i), 3)
        chosen = jax.random.randint(rows, (128,), 0, len(y_all))
        x, y = to_float(x_all[chosen]), y_all[chosen]
        x_adv = attack(start, lambda x: model.apply(variables, x)[0], x, y)

        def loss(variables):
            logits, _ = model.apply(variables, x_adv, train=True, rngs={"dropout": dropout})
            return losses.cross_entropy(logits, y).mean()

        updates, state = optimizer.update(jax.grad(loss)(variables), state)
        return optax.apply_updates(variables, updates), state

    step, carry = jax.jit(step), (variables, optimizer.init(variables))
    for i in range(steps):
        carry = step(i, carry)
    return carry[0]


class Row(NamedTuple):
    name: str
    ours: Attack
    theirs: Callable[[nn.Module], Any] | None  # None where torchattacks has no such attack
    random: bool = False
    norm: str = "linf"


def rows(eps: float, step_size: float) -> Iterator[Row]:
    """What is compared: the same settings on both sides."""
    import torchattacks

    ball, theirs = dict(eps=eps, step_size=step_size), dict(eps=eps, alpha=step_size)
    far, theirs_l2 = dict(norm="l2", eps=1.0, step_size=0.2), dict(eps=1.0, alpha=0.2)
    yield Row("fgsm", fgsm(eps=eps), lambda f: torchattacks.FGSM(f, eps=eps))
    yield Row("bim-10", pgd(init="none", **ball), lambda f: torchattacks.BIM(f, steps=10, **theirs))
    yield Row("mim-10", mim(**ball), lambda f: torchattacks.MIFGSM(f, steps=10, **theirs))
    yield Row("nifgsm-10", nifgsm(**ball), lambda f: torchattacks.NIFGSM(f, steps=10, **theirs))
    yield Row("pgd-20", pgd(steps=20, **ball), lambda f: torchattacks.PGD(f, steps=20, **theirs), True)
    yield Row("pgd-20 l2", pgd(steps=20, **far), lambda f: torchattacks.PGDL2(f, steps=20, **theirs_l2), True, "l2")
    yield Row("margin pgd-20 (cw-20)", pgd(loss="margin", steps=20, **ball), None, True)
    queries = dict(delta=0.01, lr=0.01)
    yield Row(
        "spsa-10, 64 samples",
        spsa(eps=eps, samples=64, **queries),
        lambda f: torchattacks.SPSA(f, eps=eps, nb_iter=10, nb_sample=64, **queries),
        True,
    )
    for settings in (dict(c=1.0, steps=20, lr=0.01), dict(c=0.1, steps=200, lr=0.1)):  # the papers'
        name, same = "cw-l2 c={c} steps={steps} lr={lr}".format(**settings), partial(_cw, **settings)
        yield Row(f"{name}, compat", cw(torchattacks_compat=True, **settings), same, norm="l2")
        yield Row(f"{name}, fixed", cw(**settings), same, norm="l2")


def _cw(model, **settings):
    import torchattacks

    return torchattacks.CW(model, **settings)


def compare(row: Row, logits_fn: Callable, twin: nn.Module, x: np.ndarray, y: np.ndarray, repeats: int) -> dict:
    """One line of the table."""
    repeats = repeats if row.random else 1
    keys = [jax.random.split(jax.random.key(seed), len(x)) for seed in range(repeats)]
    attack = jax.jit(lambda keys, x, y: row.ours(keys, logits_fn, x, y))
    x_jax, y_jax = jnp.asarray(x), jnp.asarray(y)
    started = time.perf_counter()
    compiled = attack.lower(keys[0], x_jax, y_jax).compile()
    compile_s = time.perf_counter() - started

    def ours(seed):
        return np.asarray(compiled(keys[seed], x_jax, y_jax))

    def theirs(seed):
        torch.manual_seed(seed)
        x_adv = row.theirs(twin)(nchw(x), torch.from_numpy(y.astype(np.int64)))
        return np.moveaxis(x_adv.numpy(), 1, -1)

    record = {"attack": row.name, "repeats": repeats, "compile_s": compile_s}
    correct = {}
    for side, call in (("ours", ours), ("theirs", theirs)):
        if side == "theirs" and row.theirs is None:
            continue
        started = time.perf_counter()
        results = [call(seed) for seed in range(repeats)]
        record[f"{side}_s"] = (time.perf_counter() - started) / repeats
        correct[side] = [np.asarray(losses.correct(logits_fn(jnp.asarray(x_adv)), y_jax)) for x_adv in results]
        record[f"{side}_robust_acc"] = [100 * float(np.mean(flags)) for flags in correct[side]]
        size = np.asarray(geometry.distance(jnp.asarray(results[0]), x_jax, row.norm))
        fooled = ~correct[side][0]
        record[f"{side}_distance"] = float(size[fooled].mean()) if fooled.any() else None
    if row.theirs is not None:
        record["flags"] = int(np.sum(correct["ours"][0] != correct["theirs"][0]))
    return record


def nchw(x: np.ndarray) -> Tensor:
    """(B, H, W, C) -> a tensor (B, C, H, W)."""
    return torch.tensor(np.moveaxis(x, -1, 1)).contiguous()


def table(records: list[dict]) -> str:
    """The records as Markdown."""
    heads = ("attack", "runs", "ibjax", "torchattacks", "difference", "flags", "distance", "s + compile", "torch s")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for record in records:
        ours, theirs = record["ours_robust_acc"], record.get("theirs_robust_acc")
        sizes = [record.get(f"{side}_distance") for side in ("ours", "theirs")]
        cells = [
            record["attack"],
            record["repeats"],
            f"{np.mean(ours):.2f}",
            f"{np.mean(theirs):.2f}" if theirs else "",
            f"{np.mean(ours) - np.mean(theirs):+.2f}" if theirs else "",
            record.get("flags", ""),
            " / ".join("" if size is None else f"{size:.4f}" for size in sizes).removesuffix(" / "),
            f"{record['ours_s']:.2f} + {record['compile_s']:.1f}",
            f"{record['theirs_s']:.2f}" if theirs else "",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def page(found: dict, records: list[dict]) -> str:
    """The table with its settings, hardware and versions, as Markdown."""
    return (
        f"{found['data']}, {found['n']} test images, eps {found['eps']} (l2: 1.0), step {found['step_size']} (l2: 0.2)"
        f", {found['model']}; clean {found['clean_acc']:.2f} %; logits differ by {found['logits_apart']:.1e}\n\n"
        f"{table(records)}\n\n"
        f"Robust accuracy in percent; distance: mean of the broken images, ibjax / torchattacks; seconds per run.\n"
        f"{measuring.provenance(found)}\n"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an .npz in Keras's layout; default: scikit-learn's digits")
    parser.add_argument("--eps", default="2/16", help="l_inf radius, of training too")
    parser.add_argument("--step-size", default="1/32")
    parser.add_argument("--n", type=int, default=256, help="test images")
    parser.add_argument("--train-steps", type=int, default=800)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each random attack")
    parser.add_argument("--only", help="attacks whose names begin so")
    parser.add_argument("--out", type=Path, help="default: results/attacks-BACKEND-DATE.json")
    given = parser.parse_args()
    eps, step_size = (geometry.fraction(value) for value in (given.eps, given.step_size))
    source = partial(npz.load, path=str(given.data)) if given.data else digits.load
    arrays = load_splits(source, val_size=0)
    small = arrays.test.images.shape[1] < 16
    shape = dict(widths=((16,), (32,)), padding=1) if small else dict(widths=((16, 16), (32, 32)), padding=0)
    model = cnn.Model(num_classes=arrays.num_classes, hidden=(64,), **shape)
    variables = trained(arrays, model, eps, given.train_steps)
    twin = CNN(variables["params"], **shape).eval()
    x, y = np.asarray(to_float(jnp.asarray(arrays.test.images[: given.n]))), arrays.test.labels[: given.n]
    logits_fn = jax.jit(lambda x: model.apply(variables, x)[0])
    apart = float(np.abs(twin(nchw(x)).numpy() - np.asarray(logits_fn(x))).max())
    clean = 100 * float(np.mean(np.asarray(losses.correct(logits_fn(x), jnp.asarray(y)))))

    found = measuring.environment()
    import torchattacks

    found["versions"] = {**found["versions"], "torchattacks": torchattacks.__version__}
    out = given.out or Path("results") / f"attacks-{jax.default_backend()}-{found['date'][:10]}.json"
    settings = dict(data=arrays.label, n=len(y), eps=given.eps, step_size=given.step_size, clean_acc=clean)
    settings |= dict(model=f"cnn {shape}, hidden (64,)", train_steps=given.train_steps, logits_apart=apart)
    records = []
    for row in rows(eps, step_size):
        if row.name.startswith(given.only or ""):
            records.append(compare(row, logits_fn, twin, x, y, given.repeats))
            print(table(records[-1:]).splitlines()[-1], flush=True)
            run.write_json(out, {"benchmark": "attacks_vs_torch", **found, **settings, "records": records})
    text = page(found | settings, records)
    out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
