"""Evaluation: restore, attack the test set, write one result record per attack.

    python -m ibjax.evaluate --workdir=DIR [--checkpoint=best|last|STEP] [--attacks=fgsm,pgd-20,cw-20] [--n=1000]

An attack's name is `fgsm`, `pgd-STEPS` (cross-entropy) or `cw-STEPS` (PGD on the margin loss). An image counts as
robust when it is classified correctly both as it is and under the attack.

Guarantees (tests of the same names): batch size and number of devices change no flag; a record that is there is not
computed again; every x_adv lies in the eps-ball and in [0, 1] to 1e-6, checked per example in float32.
"""

import argparse
import base64
import datetime
import functools
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from tqdm import tqdm

from ibjax import checkpoint as checkpoints
from ibjax import cluster, config, errors, losses, report, results, run
from ibjax.attacks import geometry
from ibjax.attacks.pgd import Attack, pgd
from ibjax.data import Split
from ibjax.errors import InputError, PreemptedError, nearest
from ibjax.step import Variables, linen_net, to_float

log = logging.getLogger(__name__)
_TOLERANCE = 1e-6  # of ball and box, in float32


class Flags(NamedTuple):
    """Per image of the split, in its order."""

    clean: np.ndarray  # (N,) bool: classified correctly as it is
    robust: np.ndarray  # (N,) bool: and under the attack
    loss: np.ndarray  # (N,) float32: cross-entropy under the attack
    distance: np.ndarray  # (N,) float32: size of the perturbation, in the attack's norm


class Scorer:
    """One attack on one network, compiled once for all images and all eps.

    The last batch is padded and the padding discarded; each image's randomness comes from its index.
    """

    def __init__(
        self,
        predict: Callable,
        make_attack: Callable[..., Attack],  # of eps and step_size
        mesh: Any,
        batch_size: int,
        norm: str = "linf",
    ):
        self.mesh, self.norm = mesh, norm
        count = mesh.size
        self.batch_size = -(-batch_size // count) * count
        self.sharded = NamedSharding(mesh, cluster.BATCH)

        def score(variables, images, labels, index, seed, eps, step_size):
            def logits_fn(x):
                return predict(variables, x)[0]

            x = to_float(images)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), index)
            x_adv = make_attack(eps=eps, step_size=step_size)(keys, logits_fn, x, labels)
            clean, logits = logits_fn(x), logits_fn(x_adv)
            correct = losses.correct(clean, labels)
            in_box = jnp.all((x_adv >= 0) & (x_adv <= 1), axis=(1, 2, 3))
            distance = jnp.where(in_box, geometry.distance(x_adv, x, norm), jnp.inf)
            robust = correct & losses.correct(logits, labels)
            return Flags(correct, robust, losses.cross_entropy(logits, labels), distance), x_adv

        replicated = NamedSharding(mesh, cluster.REPLICATED)
        self.score = jax.jit(score, out_shardings=replicated)

    def __call__(
        self,
        variables: Variables,
        split: Split,
        seed: int,
        *,
        eps: Any,
        step_size: Any,
        progress: str | None = None,
        keep: int = 0,
    ) -> Any:
        """Flags of the whole split, and with `keep` the first adversarial images: (flags, x_adv (keep, H, W, C)).

        Raises RuntimeError when an adversarial image leaves the ball or the box.
        """
        eps, step_size = (np.float32(geometry.fraction(value)) for value in (eps, step_size))
        total, size = len(split.labels), self.batch_size
        parts, kept = [], []
        bar = tqdm(
            total=total, desc=progress, unit="image", leave=False, disable=not (progress and sys.stderr.isatty())
        )
        with bar:
            for first in range(0, total, size):
                index = np.arange(first, first + size, dtype=np.int32)
                chosen = np.minimum(index, total - 1)
                arrays = (split.images[chosen], split.labels[chosen], index)
                images, labels, index = (self._shard(array) for array in arrays)
                flags, x_adv = self.score(variables, images, labels, index, np.uint32(seed), eps, step_size)
                count = min(size, total - first)
                parts.append(jax.tree.map(lambda value, n=count: np.asarray(value)[:n], flags))
                if first < keep:
                    kept.append(np.asarray(x_adv)[:count])
                if progress and cluster.preempted():  # in validation the train loop notices, and saves
                    raise PreemptedError(f"stopped during {progress}; finished records are kept")
                bar.update(count)
                bar.set_postfix_str(f"robust {100 * np.mean(np.concatenate([p.robust for p in parts])):.1f} %")
        flags = Flags(*(np.concatenate(values) for values in zip(*parts, strict=True)))
        worst = float(flags.distance.max())
        if not worst <= float(eps) + _TOLERANCE:
            raise RuntimeError(f"an adversarial image is {worst:.8g} away or outside [0, 1]; eps is {float(eps):.8g}")
        return (flags, np.concatenate(kept)[:keep]) if keep else flags

    def _shard(self, array):
        return jax.make_array_from_callback(array.shape, self.sharded, array.__getitem__)


def attack_settings(name: str) -> dict[str, Any]:
    """What a name as "fgsm", "pgd-20" or "cw-100" stands for, as arguments of `pgd`; raises InputError on others."""
    family, _, steps = name.partition("-")
    if name == "fgsm":
        return dict(loss="ce", init="none", steps=1, restarts=1)
    if family in ("pgd", "cw") and steps.isdigit() and int(steps) > 0:
        return dict(loss={"pgd": "ce", "cw": "margin"}[family], init="uniform", steps=int(steps), restarts=1)
    raise InputError(f"attack '{name}' is unknown; {nearest(name, ('fgsm', 'pgd-20', 'cw-20'))}")


# ---- before any robustness is reported -------------------------------------------------------------------


def gate(logits_fn: Callable, images: np.ndarray, labels: np.ndarray) -> list[str]:
    """Checks that robust accuracy would mean something, on up to 256 images; returns warnings.

    Raises InputError on what makes every number wrong: NaN logits, or logits of an image that depend on the others
    in its batch.
    """
    x, y = to_float(jnp.asarray(images[:256])), labels[:256]
    logits = np.asarray(logits_fn(x), np.float64)
    if logits.ndim != 2 or len(logits) != len(x):
        raise InputError(f"logits have shape {logits.shape}; expected ({len(x)}, classes)")
    if not np.all(np.isfinite(logits)):
        raise InputError(f"the network returns NaN or Inf for {int(np.sum(~np.isfinite(logits).all(1)))} images")
    if y.max() >= logits.shape[1]:
        raise InputError(f"label {y.max()} is outside the network's {logits.shape[1]} classes")
    warnings = []
    if logits.min() >= -1e-5 and logits.max() <= 1 + 1e-5 and np.allclose(logits.sum(1), 1, atol=1e-5):
        warnings.append("the network returns probabilities, not logits: gradients of attacks may vanish")
    if np.ptp(logits, axis=0).max() < 1e-6:
        warnings.append("the network returns the same logits for every image")
    scale = 1e-3 * max(float(np.abs(logits).max()), 1e-6)
    if np.abs(np.asarray(logits_fn(x)) - logits).max() > scale:
        warnings.append("two passes over the same images differ: the network is randomised, use EOT attacks")
    elif len(x) > 1 and np.abs(np.asarray(logits_fn(x[: len(x) // 2])) - logits[: len(x) // 2]).max() > scale:
        raise InputError("an image's logits depend on the other images of its batch; evaluate in evaluation mode")
    return warnings


# ---- records ---------------------------------------------------------------------------------------------


def check_settings(settings: Any) -> None:
    """Raises InputError where an `evaluate` section names an attack, norm or eps that there is not."""
    for name in settings["attacks"]:
        attack_settings(name)
    for eps in (settings["eps"], *settings["ladder"]):
        geometry.radius(eps, settings["norm"])


def evaluate(
    workdir: Path,
    checkpoint: str | int = "best",
    *,
    settings: Any = None,
    attacks: Sequence[str] | None = None,
    n: int | None = None,
    keep: int = 10,
) -> list[dict[str, Any]]:
    """Attacks a trained run's test set and writes `eval/<checkpoint>/<attack>.json`; returns the records.

    Args:
      workdir: of the run.
      checkpoint: "best", "last" or a step.
      settings: an `evaluate` section; None takes the run's own.
      attacks, n: in place of the section's.
      keep: how many adversarial images of each attack at the main eps to keep for the report.

    A record whose identity (checkpoint's step, attack, eps, n, seed) is on disk is read, not computed again.
    """
    trained = run.load(workdir, checkpoint)
    settings = config.plain(trained.config.evaluate if settings is None else settings)
    if attacks is not None:
        settings["attacks"] = tuple(attacks)
    check_settings(settings)
    main = settings["eps"]
    radii = [main, *(eps for eps in settings["ladder"] if eps != main)]
    split = _test_split(trained, settings["n"] if n is None else n)

    mesh = cluster.mesh()
    predict = linen_net(trained.model).predict
    warnings = gate(trained.logits_fn, split.images, split.labels)
    with checkpoints.manager(workdir, read_only=True) as orbax:
        validation = checkpoints.metrics(orbax, trained.step)
    folder = Path(workdir) / "eval" / str(checkpoint)
    common = _common(trained, checkpoint, settings, split, validation, warnings)
    records, seed = [], trained.config.seed
    for name in settings["attacks"]:
        options = attack_settings(name)
        attack = functools.partial(pgd, norm=settings["norm"], **options)
        scorer = Scorer(predict, attack, mesh, settings["batch_size"], settings["norm"])
        for eps in radii:
            step_size = eps if name == "fgsm" else _scaled_step(settings, eps)
            own = {"attack": name, "attack_settings": options, "eps": eps, "step_size": step_size, "main": eps == main}
            identity = {**common, **own}
            file = folder / (f"{name}.json" if eps == main else f"{name}@{str(eps).replace('/', '_')}.json")
            record = _existing(file, identity)
            if record is None:
                started, wanted = time.perf_counter(), keep if eps == main else 0
                result = scorer(
                    trained.variables, split, seed, eps=eps, step_size=step_size, progress=f"{name} {eps}", keep=wanted
                )
                flags, x_adv = result if wanted else (result, None)
                record = _record(identity, flags, time.perf_counter() - started)
                if jax.process_index() == 0:
                    if x_adv is not None:
                        _save_examples(folder, name, split, x_adv, trained)
                    run.write_json(file, record)
            records.append(record)
    return records


def _scaled_step(settings, eps):
    """The step for another eps: in the same proportion, so that every eps is within reach of the steps."""
    if eps == settings["eps"]:
        return settings["step_size"]
    main, step = geometry.fraction(settings["eps"]), geometry.fraction(settings["step_size"])
    return float(step * geometry.fraction(eps) / main)


def _test_split(trained, n):
    test = run.load_data(trained.config).test
    if n is not None and not 0 < n <= len(test.labels):
        raise InputError(f"n={n} is not allowed; the test set has {len(test.labels)} images")
    return Split(test.images[:n], test.labels[:n])


def _common(trained, checkpoint, settings, split, validation, warnings):
    selected_on = {"best": trained.config.select_on, "last": "last"}.get(str(checkpoint), "step")
    return {
        "title": trained.config.title or trained.workdir.resolve().name,
        "dataset": trained.facts["label"],
        "norm": settings["norm"],
        "n": len(split.labels),
        "seed": trained.config.seed,
        "checkpoint": str(checkpoint),
        "step": trained.step,
        "weights": checkpoints.tree_digest(trained.variables),
        "selected_on": selected_on,
        "validation": validation,
        "config": config.plain(trained.config),
        "versions": run.versions(),
        "commit": run.commit(),
        "hardware": run.hardware(),
        "warnings": warnings,
    }


_IDENTITY = ("weights", "attack", "attack_settings", "eps", "step_size", "norm", "n", "seed", "dataset")


def _existing(file, identity):
    """The record in `file`, under its present title, if it is of the same evaluation of the same weights."""
    try:
        record = json.loads(file.read_text())
        results.validate(record)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # absent or damaged: computed again
    wanted = json.loads(json.dumps(identity))
    if any(record.get(key) != wanted[key] for key in _IDENTITY):
        return None
    return {**record, **{key: wanted[key] for key in ("title", "config", "main")}}


def _record(identity, flags, seconds):
    return {
        "clean_acc": round(100 * float(np.mean(flags.clean)), 4),
        "robust_acc": round(100 * float(np.mean(flags.robust)), 4),
        **identity,
        "max_distance": float(flags.distance.max()),
        "mean_loss": float(np.mean(flags.loss)),
        "seconds": round(seconds, 2),
        "date": datetime.date.today().isoformat(),
        "robust_flags": base64.b64encode(np.packbits(flags.robust).tobytes()).decode(),
    }


def _save_examples(folder, name, split, x_adv, trained):
    """Clean and adversarial images with their logits, for the report's picture."""
    count = len(x_adv)
    x = np.asarray(to_float(jnp.asarray(split.images[:count])))
    logits, logits_adv = (np.asarray(trained.logits_fn(jnp.asarray(images))) for images in (x, x_adv))
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        folder / f"{name}.examples.npz",
        x=x,
        x_adv=x_adv,
        label=split.labels[:count],
        predicted=logits.argmax(1),
        predicted_adv=logits_adv.argmax(1),
    )


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m ibjax.evaluate", allow_abbrev=False, description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--checkpoint", default="best", help="best, last or a step")
    parser.add_argument("--attacks", help="names, separated by commas; default: those of the run's configuration")
    parser.add_argument("--n", type=int, help="number of test images; default: all")
    given = parser.parse_args()

    def command():
        cluster.initialize()
        attacks = given.attacks.split(",") if given.attacks else None
        records = evaluate(given.workdir, given.checkpoint, attacks=attacks, n=given.n)
        if jax.process_index() == 0:
            print(report.table(records))

    errors.exit_with(command)


if __name__ == "__main__":
    main()
