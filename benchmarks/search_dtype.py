"""Counts the flags of AutoAttack that differ between a search in float32 and one in bfloat16, on the same networks.

    export XLA_FLAGS=--xla_allow_excess_precision=false
    python benchmarks/search_dtype.py [--folder=FOLDER --data=mnist.npz] [--only=digits,WK17a] [--n=1000]
        [--state=FOLDER] [--out=results/search-dtype-cpu.json]

| network                            | what it is                                            | attacked images       |
|------------------------------------|-------------------------------------------------------|-----------------------|
| digits                             | ResNet of two blocks, 16 and 32 channels, trained     | 1,000 it was not      |
|                                    | here with PGD on 797 digits of scikit-learn, eps 2/16 | trained on            |
| WK17a, LPD_MLP_B_0.1 … 0.4, TRADES | those of `published.py`, from --folder                | MNIST's first n tests |

Both searches have the same key and run the standard version in l_inf. What they find is judged in float32
(`ibjax/attacks/autocast.py`), so a flag that differs is one that a search missed. A CPU has no products in bfloat16,
and emulates them: seconds there say nothing of an accelerator. Without the flag it keeps float32 where an accelerator
stores bfloat16.

Writes a JSON file after each evaluation, with the flag of every image, and the table beside it as Markdown. The same
command continues; records of other networks are kept.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measuring
import numpy as np
import optax
import published
from parts import ROOT, added_to, bare

from ibjax import files, losses
from ibjax.attacks.autoattack import autoattack
from ibjax.attacks.autocast import DTYPES
from ibjax.attacks.pgd import pgd
from ibjax.devices import cluster
from ibjax.errors import InputError
from ibjax.models import resnet
from ibjax.net import linen_net

EPOCHS, BATCH, EPS = 20, 128, 0.125
NAMES = ("digits", *published.NETWORKS)


def digits(n: int) -> tuple[Callable, np.ndarray, np.ndarray, float]:
    """(network, images (n, 8, 8, 1), labels, eps): a residual network, and digits that it was not trained on."""
    from sklearn.datasets import load_digits

    if n > 1000:
        raise InputError(f"--n={n}: the digits are 1,797, of which 797 are for training; give up to 1000")
    raw: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(raw.target))
    images, labels = np.float32(raw.images[order, :, :, None] / 16), raw.target[order].astype(np.int32)
    model = resnet.Model(num_classes=10, blocks=(1, 1), width=16)
    net, optimiser = linen_net(model), optax.adam(2e-3)
    attack = pgd(eps=EPS, step_size=EPS / 4, steps=5)

    @jax.jit
    def step(variables, state, x, y, key):
        x_adv = attack(key, lambda x: net.predict(variables, x)[0], x, y)

        def loss(params):
            (logits, _), updated = net.forward({**variables, "params": params}, x_adv, key)
            return losses.cross_entropy(logits, y).mean(), updated

        gradient, updated = jax.grad(loss, has_aux=True)(variables["params"])
        change, state = optimiser.update(gradient, state)
        params = optax.apply_updates(variables["params"], change)
        return {**variables, "batch_stats": updated["batch_stats"], "params": params}, state

    variables = jax.jit(lambda key: model.init(key, jnp.asarray(images[:2]), train=False))(jax.random.key(0))
    state, train = optimiser.init(variables["params"]), np.arange(1000, len(images))
    for number in range(EPOCHS * len(train) // BATCH):
        rows = np.random.default_rng(number).choice(train, BATCH, replace=False)
        variables, state = step(variables, state, images[rows], labels[rows], jax.random.key(number))
    return lambda x: net.predict(variables, x)[0], images[:n], labels[:n], EPS


def chosen(name: str, given: Any) -> tuple[Callable, np.ndarray, np.ndarray, float]:
    """(network, images, labels, eps) of a name."""
    if name == "digits":
        return digits(given.n)
    if given.folder is None or given.data is None:
        raise InputError(f"{name} is a published network of MNIST; give --folder and --data")
    of = published.NETWORKS[name]
    return published.load(given.folder, of), *published.images(given.data, given.n), float(of.eps)


def table(networks: Mapping[str, Any]) -> str:
    """The comparison as Markdown."""
    heads = ("network", "eps", "n", "clean", "robust, float32", "robust, bfloat16", "robust in float32 only")
    rows = []
    for name, found in networks.items():
        flags = [np.array(list(found[dtype]["robust"])) == "1" for dtype in DTYPES if dtype in found]
        if len(flags) < 2:
            continue
        accuracies = [f"{100 * each.mean():.2f}" for each in flags]
        only = [np.sum(flags[0] & ~flags[1]), np.sum(flags[1] & ~flags[0])]
        times = [f"{found[dtype]['seconds']:.0f}" for dtype in DTYPES]
        rows.append((name, found["eps"], found["n"], f"{found['clean']:.2f}", *accuracies, *only, *times))
    return measuring.markdown((*heads, "robust in bfloat16 only", "float32, s", "bfloat16, s"), rows)


def page(found: Mapping[str, Any]) -> str:
    """The table, and what made it, as Markdown."""
    return (
        f"{table(found['networks'])}\n\nAutoAttack standard, l_inf, one key, accuracies in percent; seconds with "
        f"compiling; {measuring.provenance_line(found)}\n"
    )


def continued(out: Path, about: dict[str, Any], given: Any) -> dict[str, Any]:
    """The content of `out` to which this call adds; raises InputError where it would lose a network or its images."""
    before = added_to(out, "search_dtype").get("networks", {})
    found = measuring.kept(out, about)
    lost = [
        f"{name} on {of['n']} images"
        for name, of in before.items()
        if (of["n"] != given.n if name in given.only else not found)
    ]
    if lost:
        raise InputError(f"--out={out} holds {', '.join(lost)}, which would be lost; give another --out")
    return found or {"benchmark": "search_dtype", **about, "networks": {}}


def main() -> None:
    """The command line."""
    parser = bare(__file__, __doc__)
    parser.add_argument("--folder", type=files.path, help="with the published files, anywhere below it")
    parser.add_argument("--data", type=files.path, help="MNIST as an .npz in Keras's layout")
    parser.add_argument("--only", type=partial(str.split, sep=","), default=["digits"], help=f"of {', '.join(NAMES)}")
    parser.add_argument("--n", type=int, default=1000, help="images; default: %(default)s")
    parser.add_argument("--state", type=files.path, help="a folder for AutoAttack's progress")
    parser.add_argument("--out", type=files.path, help="default: results/search-dtype-BACKEND.json")
    given = parser.parse_args()
    if unknown := [name for name in given.only if name not in NAMES]:
        parser.error(f"--only: {', '.join(unknown)} is unknown; allowed: {', '.join(NAMES)}")
    about = measuring.environment()
    out = given.out or ROOT / "results" / f"search-dtype-{jax.default_backend()}.json"
    found = continued(out, about, given)
    cluster.keep_memory()
    for name in given.only:
        network, x, y, eps = chosen(name, given)
        kept = found["networks"].setdefault(name, {})
        if not kept:
            kept.update(eps=eps, n=len(x), clean=100 * float(np.mean(np.argmax(network(x), 1) == y)))
        for dtype in DTYPES:
            if dtype in kept:
                continue
            state = given.state and given.state / f"{name}-{len(x)}-{dtype}.npz"
            options = dict(
                norm="linf", eps=eps, batch_size=250, search_dtype=dtype, state=state, progress=f"{name} {dtype}"
            )
            result = autoattack(jax.random.key(0), network, x, y, **options)
            after = {part: 100 * float(flags.mean()) for part, flags in result.robust_after.items()}
            flags = "".join(map(str, result.robust.astype(int)))
            kept[dtype] = dict(
                robust=flags, robust_after=after, seconds=sum(result.seconds.values()), warnings=result.warnings
            )
            files.write_json(out, found)
        text = page(found)
        out.with_suffix(".md").write_text(text, encoding="utf-8")
        print(text, flush=True)


if __name__ == "__main__":
    measuring.run(main)
