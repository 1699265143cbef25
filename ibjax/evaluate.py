"""Evaluation: restore, attack the test set, write one result record per attack.

    python -m ibjax.evaluate --workdir=DIR [--checkpoint=best|last|STEP] [--attacks=autoattack,pgd-20] [--n=1000]

An attack's name is one of `attacks/named.py`: `fgsm`, `pgd-STEPS` (cross-entropy), `cw-STEPS` (PGD on the margin loss),
`autoattack` and its parts. An image counts as robust when it is classified correctly both as it is and under attack.
AutoAttack runs at the main eps only, and goes on where it was ended.

Guarantees (tests of the same names): batch size and number of devices change no flag; a record that is there is not
computed again; every x_adv lies in the eps-ball and in [0, 1] to 1e-6, checked per example in float32.
"""

import argparse
import base64
import datetime
import functools
import hashlib
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
from ibjax.attacks import Attack, autoattack, checks, geometry
from ibjax.attacks.named import check, named
from ibjax.data import Split
from ibjax.errors import InputError, PreemptedError
from ibjax.step import Variables, linen_net, to_float

log = logging.getLogger(__name__)
_TOLERANCE = 1e-6  # of ball and box, in float32
_EVALUATION = 0x65766C  # folded into the seed: keys of evaluation are not those of training


class Flags(NamedTuple):
    """Per image of the split, in its order."""

    clean: np.ndarray  # (N,) bool: classified correctly as it is
    robust: np.ndarray  # (N,) bool: and under the attack
    loss: np.ndarray  # (N,) float32: cross-entropy under the attack
    distance: np.ndarray  # (N,) float32: size of the perturbation, in the attack's norm


class Scorer:
    """One attack on one network, compiled once for all images and all eps.

    `make_attack(eps=…, step_size=…)` gives the attack; where it is not `bounded`, only the box is checked. The last
    batch is padded and the padding discarded; each image's randomness comes from its index in the split.
    """

    def __init__(
        self,
        predict: Callable,
        make_attack: Callable[..., Attack],
        mesh: Any,
        batch_size: int,
        norm: str,
        bounded: bool = True,
    ):
        self.bounded = bounded
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        self.sharded = NamedSharding(mesh, cluster.BATCH)

        def score(variables, images, labels, index, seed, eps, step_size):
            def logits_fn(x):
                return predict(variables, x)[0]

            x = to_float(images)
            key = jax.random.fold_in(jax.random.key(seed), _EVALUATION)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
            x_adv = make_attack(eps=eps, step_size=step_size)(keys, logits_fn, x, labels)
            clean, logits = logits_fn(x), logits_fn(x_adv)
            correct = losses.correct(clean, labels)
            in_box = jnp.all((x_adv >= 0) & (x_adv <= 1), axis=(1, 2, 3))
            distance = jnp.where(in_box, geometry.distance(x_adv, x, norm), jnp.inf)
            robust = correct & losses.correct(logits, labels)
            return Flags(correct, robust, losses.cross_entropy(logits, labels), distance), x_adv

        replicated = NamedSharding(mesh, cluster.REPLICATED)
        self.score = jax.jit(score, out_shardings=replicated)

    def trace(self, variables: Any, split: Split) -> None:
        """Traces the program without compiling or running it; raises what is wrong with it."""
        images, labels = (jax.ShapeDtypeStruct((self.batch_size, *a.shape[1:]), a.dtype) for a in split)
        scalars = (np.uint32(0), np.float32(0), np.float32(0))
        jax.eval_shape(self.score, variables, images, labels, labels, *scalars)

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
    ) -> tuple[Flags, np.ndarray]:
        """(flags of the whole split, the first `keep` adversarial images (keep, H, W, C)).

        With `progress`, its name, a bar is shown and a preemption notice ends the evaluation. Raises RuntimeError
        when an adversarial image leaves the ball or the box.
        """
        eps, step_size = (np.float32(geometry.fraction(value)) for value in (eps, step_size))
        total, size = len(split.labels), self.batch_size
        parts, kept = [], [np.zeros((0, *split.images.shape[1:]), np.float32)]
        bar = tqdm(
            total=total, desc=progress, unit="image", leave=False, disable=not (progress and sys.stderr.isatty())
        )
        with bar:
            for first in range(0, total, size):
                index = np.arange(first, first + size, dtype=np.int32)
                chosen = np.minimum(index, total - 1)  # the padding repeats the last image
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
        if not worst <= (float(eps) + _TOLERANCE if self.bounded else sys.float_info.max):
            raise RuntimeError(f"an adversarial image is {worst:.8g} away or outside [0, 1]; eps is {float(eps):.8g}")
        return flags, np.concatenate(kept)[:keep]

    def _shard(self, array):
        return jax.make_array_from_callback(array.shape, self.sharded, array.__getitem__)


# ---- AutoAttack ------------------------------------------------------------------------------------------


def auto_attack(
    logits_fn: Callable,
    split: Split,
    seed: int,
    options: dict[str, Any],
    *,
    norm: str,
    eps: Any,
    batch_size: int,
    title: str | None = None,
    keep: int = 0,
    state: Path | None = None,
) -> tuple[Flags, np.ndarray, dict[str, Any]]:
    """(flags of the whole split, the first `keep` adversarial images, what the record says of each attack).

    `state` is a file that keeps the progress; with it, the same call goes on where it was ended.
    """
    x = np.asarray(to_float(jnp.asarray(split.images)))
    # "rand" asks for samples of the network; these have one
    network = (lambda x, keys: logits_fn(x)) if options["version"] == "rand" else logits_fn
    key = jax.random.fold_in(jax.random.key(seed), _EVALUATION)
    result = autoattack.autoattack(
        key, network, x, split.labels, norm, eps, batch_size=batch_size, state=state, progress=title, **options
    )
    scores = jax.jit(lambda x_adv, x, y: (losses.cross_entropy(logits_fn(x_adv), y), geometry.distance(x_adv, x, norm)))
    parts = [slice(first, first + batch_size) for first in range(0, len(x), batch_size)]
    values = [scores(result.x_adv[part], x[part], split.labels[part]) for part in parts]
    flags = Flags(result.clean, result.robust, *(np.concatenate(column) for column in zip(*values, strict=True)))
    more = {
        "robust_after": {name: round(100 * float(np.mean(kept)), 4) for name, kept in result.robust_after.items()},
        "seconds_of": result.seconds,
        "seconds": round(sum(result.seconds.values()), 2),
        "warnings": result.warnings,
    }
    return flags, result.x_adv[:keep], more


# ---- records ---------------------------------------------------------------------------------------------


def check_settings(settings: Any) -> None:
    """Raises InputError where an `evaluate` section asks for what there is not, or for a length that is none."""
    if not settings["attacks"]:
        raise InputError("evaluate.attacks is empty; give names as ('fgsm', 'pgd-20', 'cw-20')")
    for name in settings["attacks"]:
        named(name)
    for name in ("eps", "step_size"):
        if not geometry.radius(settings[name], settings["norm"], f"evaluate.{name}") > 0:
            raise InputError(f"evaluate.{name}={settings[name]} is not allowed; give a length above 0, as '8/255'")
    for name in settings["attacks"]:
        check(name, settings["norm"], settings["eps"], settings["step_size"])
    for eps in settings["ladder"]:
        geometry.radius(eps, settings["norm"], "evaluate.ladder eps")
    n = settings["n"]
    if n is not None and (type(n) is not int or n < 1):
        raise InputError(f"evaluate.n={n!r} is not allowed; give a whole number of at least 1, or None for all")


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

    Networks trained in bfloat16 are attacked and scored in float32.

    Args:
      workdir: of the run.
      checkpoint: "best", "last" or a step.
      settings: an `evaluate` section; None takes the run's own.
      attacks, n: in place of the section's.
      keep: how many adversarial images of each attack at the main eps to keep for the report.

    A record whose identity (weights, images, attack, eps, seed) is on disk is read, not computed again.
    """
    trained = run.load(workdir, checkpoint)
    settings = config.plain(trained.config.evaluate if settings is None else settings)
    settings |= {} if attacks is None else {"attacks": tuple(attacks)}
    settings |= {} if n is None else {"n": n}
    check_settings(settings)
    split = run.test_split(trained, settings["n"])
    model = run.in_float32(trained.model)
    predict = linen_net(model).predict
    logits = jax.jit(predict)
    x = np.asarray(to_float(jnp.asarray(split.images[:256])))
    warnings = checks.network(lambda x: logits(trained.variables, x)[0], x, split.labels)
    with checkpoints.manager(workdir, read_only=True) as orbax:
        validation = checkpoints.metrics(orbax, trained.step)

    which = str(trained.step) if str(checkpoint).isdecimal() else str(checkpoint)
    folder = Path(workdir) / "eval" / which
    common = _common(trained, which, settings, split, validation, warnings)
    mesh, records = cluster.mesh(), []
    main = settings["eps"]
    for name in settings["attacks"]:
        attack = named(name)
        ladder = settings["ladder"] if attack.make and attack.bounded else ()
        execute = _executor(attack, predict, trained, split, settings, mesh)
        for eps in (main, *(eps for eps in ladder if eps != main)):
            step_size = eps if attack.full_step else _scaled_step(settings, eps) if attack.make else None
            own = {"attack": name, "attack_settings": attack.settings, "eps": eps, "step_size": step_size}
            identity = {**common, **own, "main": eps == main, "bounded": attack.bounded}
            file = folder / _file_name(name, eps, main, settings["n"])
            record = _existing(file, identity)
            if record is None:
                wanted = keep if eps == main else 0
                state = file.with_name(f".{file.stem}-{_state_digest(identity)}.npz")
                flags, x_adv, more = execute(eps, step_size, f"{name} {eps}", wanted, state)
                doubts = list(dict.fromkeys([*warnings, *more["warnings"]]))
                record = _record({**identity, **more, "warnings": doubts}, flags)
                if wanted:
                    _save_examples(file.with_suffix(".examples.npz"), split, x_adv, trained)
                if jax.process_index() == 0:
                    run.write_json(file, record)
                    state.unlink(missing_ok=True)
            records.append(record)
    return records


def _executor(attack, predict, trained, split, settings, mesh):
    """(eps, step_size, title, keep, state) -> (flags, the first `keep` x_adv, what the record says beside them)."""
    norm, batch_size, seed = settings["norm"], settings["batch_size"], trained.config.seed
    if attack.make is None:
        return lambda eps, step_size, title, keep, state: auto_attack(
            lambda x: predict(trained.variables, x)[0], split, seed, attack.settings,
            norm=norm, eps=eps, batch_size=batch_size, title=title, keep=keep, state=state,
        )  # fmt: skip
    measured = norm if attack.bounded else "l2"
    scorer = Scorer(
        predict, functools.partial(attack.make, norm=norm), mesh, batch_size, measured, bounded=attack.bounded
    )

    def execute(eps, step_size, title, keep, state):
        started = time.perf_counter()
        flags, x_adv = scorer(trained.variables, split, seed, eps=eps, step_size=step_size, progress=title, keep=keep)
        return flags, x_adv, {"seconds": round(time.perf_counter() - started, 2), "warnings": []}

    return execute


def _file_name(attack, eps, main, n):
    """ "pgd-20.json"; "pgd-20@4_255.json" on the ladder; "pgd-20.n1000.json" on part of the test set."""
    ladder = "" if eps == main else f"@{str(eps).replace('/', '_')}"
    return f"{attack}{ladder}{'' if n is None else f'.n{n}'}.json"


def _scaled_step(settings, eps):
    """The step for another eps: in the same proportion, so that every eps is within reach of the steps."""
    if eps == settings["eps"]:
        return settings["step_size"]
    main, step = geometry.fraction(settings["eps"]), geometry.fraction(settings["step_size"])
    return float(step * geometry.fraction(eps) / main)


def _common(trained, checkpoint, settings, split, validation, warnings):
    selected_on = {"best": trained.config.select_on, "last": "last"}.get(checkpoint, "step")
    return {
        "title": trained.config.title or trained.workdir.resolve().name,
        "dataset": trained.facts["label"],
        "norm": settings["norm"],
        "n": len(split.labels),
        "images": checkpoints.tree_digest(split),
        "dtype": "float32",
        "seed": trained.config.seed,
        "checkpoint": checkpoint,
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


_IDENTITY = ("weights", "images", "dtype", "attack", "attack_settings", "eps", "step_size", "norm", "seed")


def _state_digest(identity):
    """Names the file that keeps AutoAttack's progress by what it is of."""
    text = json.dumps({key: identity[key] for key in _IDENTITY}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


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


def _record(identity, flags):
    return {
        "clean_acc": round(100 * float(np.mean(flags.clean)), 4),
        "robust_acc": round(100 * float(np.mean(flags.robust)), 4),
        **identity,
        "max_distance": float(flags.distance.max()),
        "mean_loss": float(np.mean(flags.loss)),
        "date": datetime.date.today().isoformat(),
        "robust_flags": base64.b64encode(np.packbits(flags.robust).tobytes()).decode(),
    }


def _save_examples(file, split, x_adv, trained):
    """Clean and adversarial images with their predictions, for the report's picture."""
    count = len(x_adv)
    x = np.asarray(to_float(jnp.asarray(split.images[:count])))
    predicted, predicted_adv = (np.asarray(trained.logits_fn(jnp.asarray(images))).argmax(1) for images in (x, x_adv))
    if jax.process_index() == 0:  # the others only took part in the computation
        file.parent.mkdir(parents=True, exist_ok=True)
        with run.replacing(file) as temporary, temporary.open("wb") as handle:
            np.savez_compressed(
                handle, x=x, x_adv=x_adv, label=split.labels[:count], predicted=predicted, predicted_adv=predicted_adv
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
        attacks = None if given.attacks is None else given.attacks.split(",")
        records = evaluate(given.workdir, given.checkpoint, attacks=attacks, n=given.n)
        if jax.process_index() == 0:
            print(report.table(records))

    errors.exit_with(command)


if __name__ == "__main__":
    main()
