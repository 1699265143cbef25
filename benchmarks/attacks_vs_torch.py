"""Compares the attacks of ibjax and of torchattacks on the same weights and images: robust accuracy and time.

    pip install torch torchvision && pip install --no-deps torchattacks==3.5.1
    python -m ibjax.main --config=configs/small_cnn.py --workdir=runs/small_cnn --config.data.path=FOLDER
    python benchmarks/attacks_vs_torch.py --workdir=runs/small_cnn [--n=256] [--eps=4/255 --step-size=1/255]

The weights of a trained network are copied into a PyTorch twin, whose logits are compared first. Random attacks except
SPSA run `--repeats` times, and the table shows their mean; `flags` counts the images on which the two implementations
disagree in the first run. C&W has no perturbation budget, so its accuracy alone says little; the table also shows the
distances of its successful images.

Writes a JSON file, and the table beside it as Markdown.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import measuring
import numpy as np
import torch
import torchattacks
import twin
from parts import bare, refuse_other
from torch import nn

import ibjax
from ibjax import files, losses
from ibjax.attacks import Attack, geometry
from ibjax.attacks.cw import cw
from ibjax.attacks.fgsm import fgsm
from ibjax.attacks.mim import mim
from ibjax.attacks.nifgsm import nifgsm
from ibjax.attacks.pgd import pgd
from ibjax.attacks.spsa import spsa
from ibjax.runs import run


class Row(NamedTuple):
    name: str
    ours: Attack
    theirs: Callable[[nn.Module], Any] | None  # None where torchattacks has no such attack
    repeated: bool = False  # random, and run as often as --repeats says
    norm: str = "linf"


def rows(eps: float, step_size: float) -> Iterator[Row]:
    """What is compared: the same settings on both sides."""
    ball, theirs = dict(eps=eps, step_size=step_size), dict(eps=eps, alpha=step_size)
    far, theirs_l2 = dict(norm="l2", eps=0.5, step_size=0.1), dict(eps=0.5, alpha=0.1)
    yield Row("fgsm", fgsm(eps=eps), lambda f: torchattacks.FGSM(f, eps=eps))
    yield Row("bim-10", pgd(init="none", **ball), lambda f: torchattacks.BIM(f, steps=10, **theirs))
    yield Row("mim-10", mim(**ball), lambda f: torchattacks.MIFGSM(f, steps=10, **theirs))
    yield Row("nifgsm-10", nifgsm(**ball), lambda f: torchattacks.NIFGSM(f, steps=10, **theirs))
    yield Row("pgd-20", pgd(steps=20, **ball), lambda f: torchattacks.PGD(f, steps=20, **theirs), True)
    yield Row("pgd-20 l2", pgd(steps=20, **far), lambda f: torchattacks.PGDL2(f, steps=20, **theirs_l2), True, "l2")
    yield Row("margin pgd-20 (cw-20)", pgd(loss="margin", steps=20, **ball), None, True)
    queries = dict(delta=0.01, lr=0.01)
    yield Row(
        "spsa-10, 64 samples",  # once: 1,280 passes
        spsa(eps=eps, samples=64, **queries),
        lambda f: torchattacks.SPSA(f, eps=eps, nb_iter=10, nb_sample=64, **queries),
    )
    for settings in (dict(c=1.0, steps=20, lr=0.01), dict(c=0.1, steps=200, lr=0.1)):  # the papers'
        name, same = "cw-l2 c={c} steps={steps} lr={lr}".format(**settings), partial(torchattacks.CW, **settings)
        yield Row(f"{name}, compat", cw(torchattacks_compat=True, **settings), same, norm="l2")
        yield Row(f"{name}, fixed", cw(**settings), same, norm="l2")


def compare(row: Row, logits_fn: Callable, network: nn.Module, x: np.ndarray, y: np.ndarray, repeats: int) -> dict:
    """One line of the table."""
    repeats = repeats if row.repeated else 1
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
        x_adv = row.theirs(network)(twin.nchw(x), torch.from_numpy(y.astype(np.int64)))
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


def table(records: list[dict]) -> str:
    """The records as Markdown."""
    heads = ("attack", "runs", "ibjax", "torchattacks", "difference", "flags", "distance", "s + compile", "torch s")
    lines = []
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
        lines.append(cells)
    return measuring.markdown(heads, lines)


def page(found: dict) -> str:
    """The table with its settings, hardware and versions, as Markdown."""
    return (
        f"{found['data']}, {found['n']} test images, eps {found['eps']} (l2: 0.5), step {found['step_size']} (l2: 0.1)"
        f", {found['network']}; clean {found['clean_acc']:.2f} %; logits differ by {found['logits_apart']:.1e}\n\n"
        f"{table(found['records'])}\n\n"
        f"Robust accuracy in percent; distance: mean of the broken images, ibjax / torchattacks; seconds per run.\n"
        f"{measuring.provenance_line(found)}\n"
    )


def main() -> None:
    """The command line."""
    parser = bare(__file__, __doc__)
    parser.add_argument("--workdir", type=files.path, required=True, help="of a run of configs/small_cnn.py")
    parser.add_argument("--eps", default="4/255", help="l_inf radius; in l2 it is 0.5, in steps of 0.1")
    parser.add_argument("--step-size", default="1/255")
    parser.add_argument("--n", type=int, default=256, help="test images, each class in proportion")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each random attack")
    parser.add_argument("--only", help="attacks whose names begin so")
    parser.add_argument("--out", type=files.path, help="default: results/attacks-BACKEND-DATE.json")
    given = parser.parse_args()
    eps, step_size = (geometry.fraction(value) for value in (given.eps, given.step_size))
    chosen = [row for row in rows(eps, step_size) if row.name.startswith(given.only or "")]
    if not chosen:
        known = ", ".join(row.name for row in rows(eps, step_size))
        parser.error(f"--only={given.only} begins no attack's name; allowed: {known}")
    out = given.out or measuring.default_out("attacks")
    refuse_other(out)
    trained = ibjax.load(given.workdir)
    split = run.test_split(trained, given.n)
    x, y = np.float32(split.images / 255), split.labels
    network, logits_fn = twin.cnn_like(trained.model, trained.variables), trained.logits_fn
    logits = np.asarray(logits_fn(x))
    apart = float(np.abs(network(twin.nchw(x)).numpy() - logits).max())
    clean = 100 * float(np.mean(logits.argmax(1) == y))

    found = measuring.environment()
    found["versions"] = {**found["versions"], "torchattacks": torchattacks.__version__}
    settings = dict(data=trained.facts["label"], n=len(y), eps=given.eps, step_size=given.step_size, clean_acc=clean)
    settings |= dict(network=trained.config.title, logits_apart=apart)
    records = []
    for row in chosen:
        records.append(compare(row, logits_fn, network, x, y, given.repeats))
        print(table(records[-1:]).splitlines()[-1], flush=True)
        content = {"benchmark": "attacks_vs_torch", **found, **settings, "records": records}
        files.write_json(out, content)
        out.with_suffix(".md").write_text(page(content), encoding="utf-8")
    print(out.with_suffix(".md"))


if __name__ == "__main__":
    measuring.run(main)
