"""Compares our attacks with published robust accuracies, on the published networks.

    python benchmarks/published.py --folder=FOLDER --data=mnist.npz [--only=LPD_MLP_B_0.1,WK17a] [--n=1000]
        [--attacks=clean,pgd-40,autoattack] [--state=FOLDER] [--batch_size=1000] [--out=results/published-cpu.json]

FOLDER contains, at any depth, one or more of these PyTorch files. They are read with PyTorch's restricted unpickler
(weights_only), and a file with another SHA-256 is refused. Images are MNIST's test set, divided by 255.

| file                                  | network               | known                        | source |
|---------------------------------------|-----------------------|------------------------------|--------|
| WK17a_linf0.1.pth                     | KW, two convolutions  | exact robust accuracy (MIP)  | [1]    |
| LPD_MLP_B_0.1.pth … LPD_MLP_B_0.4.pth | MLP-B, 784-100-100-10 | exact robust accuracy (MILP) | [2]    |
| model_mnist_smallcnn.pt               | TRADES' SmallCNN      | AutoAttack                   | [3]    |

[1] vtjeng/MIPVerify_data: Tjeng et al., ICLR 2019; network of Wong & Kolter, ICML 2018. [2] Hadisalman/
robust-verify-benchmark: Salman et al., NeurIPS 2019. [3] yaodongyu/TRADES: Zhang et al., ICML 2019; AutoAttack's number
is that of fra31/auto-attack.

A valid attack cannot report a robust accuracy below the exact one, and AutoAttack should be at most one point above it.
If a number on all 10,000 images violates this, its row says so and the script exits with 1. With fewer images nothing
is checked, since the published numbers are for all of them. PGD-40 maximises cross-entropy in steps of 0.01 from x, as
in the evaluation of TRADES' authors; it also reproduces the numbers of [2].

AutoAttack stores its progress in --state after each batch of --batch_size images, from which an interrupted command
continues; the size does not change the result. --out is a JSON file, with the
table beside it as Markdown; records of other networks in it are kept, each with its number of images.
"""

import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measuring
import numpy as np
from jax import Array, lax
from parts import added_to, bare

from ibjax import files, losses
from ibjax.attacks.autoattack import autoattack
from ibjax.attacks.pgd import pgd
from ibjax.devices import cluster
from ibjax.errors import DataError, InputError
from ibjax.files import read_npz
from ibjax.pytorch import torch_file, verified
from ibjax.pytorch.published import Published, table
from ibjax.pytorch.verified import Weights, conv, flat, linear

_SLACK = 1.0  # points that AutoAttack may leave above the exact robust accuracy
_EXACT = 1e-2  # points by which the published percentages are rounded

# ---- the networks --------------------------------------------------------------------------------------------


def halved(x: Array) -> Array:
    """`MaxPool2d(2)`."""
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def small_cnn(weights: Weights, x: Array) -> Array:
    """TRADES' network on MNIST; its dropout does nothing in evaluation mode."""
    for number in (1, 2, 3, 4):
        x = jax.nn.relu(conv(weights, f"feature_extractor.conv{number}", x))
        x = halved(x) if number % 2 == 0 else x
    x = flat(x)
    for number in (1, 2):
        x = jax.nn.relu(linear(weights, f"classifier.fc{number}", x))
    return linear(weights, "classifier.fc3", x)


NETWORKS = {row.name: row for row in table().values() if row.data == "mnist"}
_PREDICT = {"small_cnn": small_cnn, **verified.NETWORKS}


def load(folder: Path, published: Published) -> Callable[[Array], Array]:
    """The network (B, 28, 28, 1) -> (B, 10) of a file below `folder`; raises InputError where it is not there."""
    found = sorted(folder.rglob(published.file))
    if not found:
        raise InputError(f"--folder={folder} has no {published.file}; give the folder that it was downloaded to")
    (node,) = torch_file.read(found[0], published.sha256).nodes
    weights = {name: jnp.asarray(torch_file.array(found[0], name, tensor)) for name, tensor in node.tensors.items()}
    return lambda x: _PREDICT[published.arch](weights, x)


def images(file: Path, n: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The first n test images (n, 28, 28, 1) float32 in [0, 1], and their labels (n,) int32."""
    if not file.is_file():
        raise InputError(f"--data={file} is no file; give MNIST as an .npz with x_test (10000, 28, 28) and y_test")
    arrays = read_npz(file)
    x, y = arrays.get("x_test", np.zeros(0)), arrays.get("y_test", np.zeros(0))
    if x.shape != (10_000, 28, 28) or x.dtype != np.uint8 or y.shape != (10_000,):
        raise DataError(f"{file} is not MNIST: x_test is {x.dtype}{list(x.shape)}, y_test {y.dtype}{list(y.shape)}")
    if n is not None and not 1 <= n <= len(x):
        raise InputError(f"--n={n} is not allowed; give 1 to {len(x)}")
    return np.float32(x[:n] / 255)[..., None], y[:n].astype(np.int32)


# ---- the attacks ---------------------------------------------------------------------------------------------


def clean(published: Published, network: Callable, x: np.ndarray, y: np.ndarray, **_: Any) -> np.ndarray:
    """Which images are classified correctly as they are."""
    return np.concatenate([np.asarray(losses.correct(network(x[part]), y[part])) for part in _batches(len(x))])


def pgd_40(published: Published, network: Callable, x: np.ndarray, y: np.ndarray, **_: Any) -> np.ndarray:
    """Which images withstand PGD-40 on cross-entropy."""
    attack = pgd(loss="ce", eps=float(published.eps), step_size=0.01, steps=40, init="none")

    @jax.jit
    def robust(keys, x, y):
        x_adv = attack(keys, network, x, y)
        return losses.correct(network(x), y) & losses.correct(network(x_adv), y)

    keys = jax.random.split(jax.random.key(0), len(x))
    return np.concatenate([np.asarray(robust(keys[part], x[part], y[part])) for part in _batches(len(x))])


def standard(
    published: Published, network: Callable, x: np.ndarray, y: np.ndarray, state: Path | None, batch_size: int
) -> Any:
    """AutoAttack's result."""
    options = dict(norm="linf", eps=float(published.eps), batch_size=batch_size, state=state, progress=published.file)
    return autoattack(jax.random.key(0), network, x, y, **options)


ATTACKS = {"clean": clean, "pgd-40": pgd_40, "autoattack": standard}
BATCH = 1000  # images at once, in AutoAttack; in PGD, whose steps a CPU's program has one after the other, a quarter


def _batches(count):
    return [slice(first, first + BATCH // 4) for first in range(0, count, BATCH // 4)]


def measure(
    name: str,
    attacks: list[str],
    folder: Path,
    x: np.ndarray,
    y: np.ndarray,
    states: Path | None,
    batch_size: int = BATCH,
) -> dict:
    """One network's record: what we find, with the seconds, beside what is published."""
    published = NETWORKS[name]
    network = jax.jit(load(folder, published))
    eps = float(published.eps)
    known = {key: value for key in _KNOWN if (value := getattr(published, key)) is not None}
    record: dict[str, Any] = dict(network=name, eps=eps, n=len(x), published=known, ours={}, seconds={})
    record["about"] = measuring.environment()
    for attack in attacks:
        state = None if states is None else states / f"{name}-{len(x)}.npz"
        started = time.perf_counter()
        found = ATTACKS[attack](published, network, x, y, state=state, batch_size=batch_size)
        if attack == "autoattack":
            record["robust_after"] = {part: _percent(flags) for part, flags in found.robust_after.items()}
            record["warnings"] = [f"{name}: {text}" for text in found.warnings]
            record["seconds"][attack] = round(sum(found.seconds.values()), 1)  # of interrupted runs too
            found = found.robust
        else:
            record["seconds"][attack] = round(time.perf_counter() - started, 1)
        record["ours"][attack] = _percent(found)
    record["faults"] = faults(record, published) if len(x) == 10_000 else []
    return record


_KNOWN = ("clean", "pgd", "autoattack", "exact")


def _percent(flags):
    return round(100 * float(np.mean(flags)), 4)


def faults(record: Mapping[str, Any], published: Published) -> list[str]:
    """What cannot be, given what is known of the network: clean accuracy, and the exact robust accuracy as a bound."""
    ours, found = record["ours"], []
    if "clean" in ours and abs(ours["clean"] - published.clean) > _EXACT:
        found.append(f"clean accuracy is {ours['clean']:.2f}, published {published.clean:.2f}")
    if published.exact is None:
        return found
    for attack in ours.keys() - {"clean"}:
        if ours[attack] < published.exact - _EXACT:
            found.append(f"{attack} leaves {ours[attack]:.2f}, exactly {published.exact:.2f} are robust")
    if ours.get("autoattack", 0.0) > published.exact + _SLACK:
        found.append(f"autoattack leaves {ours['autoattack']:.2f}, exactly {published.exact:.2f} are robust")
    return found


def table(records: list[dict]) -> str:
    """The records as Markdown; published numbers are of all 10,000 test images."""
    heads = ("network", "eps", "n", "clean", "published", "PGD-40", "published", "AutoAttack", "published", "exact")
    rows = []
    for record in records:
        ours, known = record["ours"], record["published"]
        pairs = (("clean", "clean"), ("pgd-40", "pgd"), ("autoattack", "autoattack"))
        numbers = [value for our, their in pairs for value in (ours.get(our), known.get(their))]
        cells = ["" if value is None else f"{value:.2f}" for value in (*numbers, known.get("exact"))]
        rows.append((record["network"], record["eps"], record["n"], *cells, "; ".join(record["faults"]) or "none"))
    return measuring.markdown((*heads, "contradictions"), rows)


def kept(out: Path, only: list[str], attacks: list[str], n: int) -> dict[str, dict]:
    """The records of a file that is there, by network.

    Raises InputError where one that is measured again has other images, or an attack that the new one would lack.
    """
    known = {record["network"]: record for record in added_to(out, "published").get("records", [])}
    for name in set(known) & set(only):
        if known[name]["n"] != n or known[name]["ours"].keys() - set(attacks):
            has = f"{', '.join(known[name]['ours'])} of {name} on {known[name]['n']:,} images"
            raise InputError(f"--out={out} holds {has}, which would be lost; give another --out")
    return known


def page(records: list[dict]) -> str:
    """The table, where each record was made, and the warnings, as Markdown."""
    made = "\n".join(dict.fromkeys(f"- {measuring.provenance_line(record['about'])}" for record in records))
    warnings = "\n".join(f"- {text}" for record in records for text in record.get("warnings", ()))
    text = f"{table(records)}\n\nAccuracies in percent, l_inf, one key.\n\n{made}\n\n{warnings}".rstrip()
    return f"{text}\n"


def save(out: Path, records: list[dict]) -> None:
    """Writes the JSON file and the table beside it, with where each record was made."""
    files.write_json(out, {"benchmark": "published", "records": records})
    out.with_suffix(".md").write_text(page(records), encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = bare(__file__, __doc__)
    listed = partial(str.split, sep=",")
    parser.add_argument("--folder", type=files.path, required=True, help="with the published files, anywhere below it")
    parser.add_argument("--data", type=files.path, required=True, help="MNIST as an .npz in Keras's layout")
    parser.add_argument("--only", type=listed, default=list(NETWORKS), help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--attacks", type=listed, default=list(ATTACKS), help=f"of {', '.join(ATTACKS)}")
    parser.add_argument("--n", type=int, help="the first so many test images; default: all 10,000")
    parser.add_argument("--state", type=files.path, help="a folder for AutoAttack's progress")
    parser.add_argument(
        "--batch_size", type=int, default=BATCH, help="images at once in AutoAttack; default: %(default)s"
    )
    parser.add_argument("--out", type=files.path, help="a JSON file, with the table beside it; default: print only")
    given = parser.parse_args()
    for option, allowed in (("only", NETWORKS), ("attacks", ATTACKS)):
        if unknown := [name for name in getattr(given, option) if name not in allowed]:
            parser.error(f"--{option}: {', '.join(unknown)} is unknown; allowed: {', '.join(allowed)}")
    if given.batch_size < 1:
        parser.error(f"--batch_size={given.batch_size} is not allowed; give 1 or more")

    cluster.keep_compiled()
    cluster.keep_memory()
    x, y = images(given.data, given.n)
    records = {} if given.out is None else kept(given.out, given.only, given.attacks, len(x))
    for name in given.only:
        records[name] = measure(name, given.attacks, given.folder, x, y, given.state, given.batch_size)
        print(table([records[name]]), flush=True)
        if given.out:
            save(given.out, [records[name] for name in NETWORKS if name in records])
    if any(records[name]["faults"] for name in given.only):
        sys.exit(1)


if __name__ == "__main__":
    measuring.run(main)
