"""Scoring: one attack on one network over a split, with a flag for each image.

An image counts as robust if it is classified correctly both clean and under attack; with `count="attacked"`, as some
papers count, only the prediction under attack matters. A network is called as `predict(variables, x, keys)`, with one
random key per image; deterministic networks ignore the keys. An attack may see rounded products; what it finds, and the
clean image, are judged at "highest" (`ibjax.devices.precision`).

Guarantees (tests of the same names): batch size and number of devices change no flag; every x_adv lies in [0, 1] and,
to rounding (`geometry.tolerance`: 1e-6 for small images and radii), in the eps-ball, checked per example in float32.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from tqdm import tqdm

from ibjax import losses
from ibjax.attacks import Attack, autoattack, eot, geometry
from ibjax.attacks.programs import Compiler
from ibjax.attacks.representation import guides
from ibjax.data import Split
from ibjax.devices import cluster, cores, precision
from ibjax.errors import CodeError, InputError, PreemptedError
from ibjax.net import Variables, as_output, float_on_host, to_float

_EVALUATION = 0x65766C  # folded into the seed, so that evaluation uses other keys than training
# folded into an image's key. A random network must draw independently of the attack, and not the same when it is scored
# as when it is attacked: an attack that keeps its best image would otherwise profit from lucky draws
_ATTACKED, _JUDGED = 0x617474, 0x6A7564


class GradientError(InputError):
    """The gradient of a network is not finite, so that its robustness to an attack cannot be measured."""


class Flags(NamedTuple):
    """Per image of the split, in its order."""

    clean: np.ndarray  # (N,) bool: the clean image is classified correctly
    robust: np.ndarray  # (N,) bool: counts as robust, see `count`
    loss: np.ndarray  # (N,) float32: cross-entropy under the attack; NaN where the logits are NaN
    distance: np.ndarray  # (N,) float32: size of the perturbation, in the attack's norm
    changed: np.ndarray  # (N,) bool: `clean` or `robust` would differ if judged in the precision of the attack


def nan_warnings(flags: Flags) -> list[str]:
    """A record's warning about images whose logits under attack are NaN or infinite; empty where there are none."""
    undefined = int(np.sum(np.isnan(flags.loss)))  # NaN exactly where `losses.predicted` finds no class
    if not undefined:
        return []
    return [f"the network returns NaN or infinite logits for {undefined} images under attack: they count as not robust"]


def percent(flags: np.ndarray) -> float:
    """The share of true flags in percent."""
    return round(100 * float(np.mean(flags)), 4)


class Scorer:
    """One attack on one network, compiled once for all images and all eps.

    The last batch is padded, and the results of the padding are discarded. The random key of an image depends on its
    index in the split. Each process reads the images of its own devices; all processes receive all results.

    Args:
      predict: the network, (variables, x, keys) -> (logits, features).
      make_attack: (eps=, step_size=) -> attack.
      mesh, batch_size, norm: of the evaluation.
      bounded: whether the attack is bounded by eps; if not, only the range [0, 1] is checked.
      features: whether the attack sees (logits, features) instead of the logits alone.
      guided: whether its target is (labels, guides), with one guide image of another class for each image.
      count: which images count as robust, "both" or "attacked": see above.
      attacked: a surrogate with the signature of `predict`, which is attacked in place of `predict`.
      own: the name of an attack of the user's own, for messages.
      attacked_in, judged_in: precisions of float32 products in the attack, and in the predictions that are judged.
    """

    def __init__(
        self,
        predict: Callable,
        make_attack: Callable[..., Attack],
        mesh: Any,
        batch_size: int,
        norm: str,
        *,
        bounded: bool = True,
        features: bool = False,
        guided: bool = False,
        count: str = "both",
        attacked: Callable | None = None,
        own: str | None = None,
        attacked_in: str = precision.EVALUATION,
        judged_in: str = precision.JUDGEMENT,
    ):
        self.bounded, self.guided, self.own, self.mesh = bounded, guided, own, mesh
        self.batch_size = cluster.rounded_up(batch_size, mesh.size)

        def score(variables, images, labels, guide, index, seed, eps, step_size):
            x = to_float(images)
            keys = _image_keys(seed, index)
            while_attacked, when_judged = (geometry.fold(keys, data) for data in (_ATTACKED, _JUDGED))

            def shown(x):
                output = (attacked or predict)(variables, x, while_attacked)
                return output if features else output[0]

            def judge(name):
                with precision.at(name):
                    clean, logits = (predict(variables, seen, when_judged)[0] for seen in (x, x_adv))
                correct, robust = losses.correct(clean, labels), losses.correct(logits, labels)
                return correct, correct & robust if count == "both" else robust, logits

            target = (labels, to_float(guide)) if guided else labels
            with precision.at(attacked_in):
                x_adv = make_attack(eps=eps, step_size=step_size)(keys, shown, x, target)
            correct, robust, logits = judge(judged_in)
            changed = jnp.zeros(labels.shape, bool)
            if cores.differ(attacked_in, judged_in):
                changed = _changed(judge(attacked_in), (correct, robust))
            in_box = jnp.all((x_adv >= 0) & (x_adv <= 1), axis=(1, 2, 3))
            distance = jnp.where(in_box, geometry.distance(x_adv, x, norm), jnp.inf)
            distance = jnp.where(jnp.all(jnp.isfinite(x_adv), axis=(1, 2, 3)), distance, jnp.nan)
            return Flags(correct, robust, losses.cross_entropy(logits, labels), distance, changed), x_adv

        replicated = NamedSharding(mesh, cluster.REPLICATED)
        self.score = jax.jit(score, out_shardings=replicated)

    def arguments(self, variables: Any, split: Split) -> tuple:
        """The shapes that `score` is called with for a split; those of the variables are given."""
        images, labels = (
            cluster.shapes(jax.ShapeDtypeStruct((self.batch_size, *a.shape[1:]), a.dtype), self.mesh, cluster.BATCH)
            for a in split
        )
        scalars = (np.uint32(0), np.float32(0), np.float32(0))
        return variables, images, labels, images if self.guided else None, labels, *scalars

    def __call__(
        self,
        variables: Variables,
        split: Split,
        seed: int,
        *,
        eps: Any,
        step_size: Any,
        progress: str | None = None,
        keep: int | np.ndarray = 0,
    ) -> tuple[Flags, np.ndarray]:
        """Attacks and scores a split: (flags of all images, the adversarial images that `keep` selects).

        keep: ascending indices, or the number of images to keep from the start. progress: a name, with which a progress
        bar is shown and a preemption notice ends the evaluation with PreemptedError. Raises RuntimeError where an
        adversarial image leaves the eps-ball or [0, 1] (CodeError for an attack of the user's own), and
        GradientError where the network's gradient is not finite.
        """
        eps, step_size = (np.float32(geometry.fraction(value)) for value in (eps, step_size))
        total, size = len(split.labels), self.batch_size
        rows, place = cluster.parts_of_batch(self.mesh, size)
        keep = np.arange(min(keep, total)) if isinstance(keep, int) else keep
        parts, kept = [], [np.zeros((0, *split.images.shape[1:]), np.float32)]
        guide = guides(split.labels) if self.guided else np.zeros(total, int)
        bar = tqdm(
            total=total, desc=progress, unit="image", leave=False, disable=not (progress and sys.stderr.isatty())
        )
        with bar:
            for first in range(0, total, size):
                index = (first + rows).astype(np.int32)
                chosen = index % total  # padded with real images, for attacks that couple a batch
                guiding = split.images[guide[chosen]] if self.guided else None
                arrays = (split.images[chosen], split.labels[chosen], guiding, index)
                arrays = (None if array is None else place(array) for array in arrays)
                flags, x_adv = self.score(variables, *arrays, np.uint32(seed), eps, step_size)
                count = min(size, total - first)
                parts.append(jax.tree.map(lambda value, n=count: np.asarray(value)[:n], flags))
                if len(here := keep[(first <= keep) & (keep < first + count)]):
                    kept.append(np.asarray(x_adv)[here - first])
                if progress and cluster.preempted():  # during validation the train loop handles it
                    raise PreemptedError(f"stopped during {progress}; finished records are kept")
                bar.update(count)
                bar.set_postfix_str(f"robust {100 * np.mean(np.concatenate([p.robust for p in parts])):.1f} %")
        flags = Flags(*(np.concatenate(values) for values in zip(*parts, strict=True)))
        self._refuse_wrong(flags, float(eps), split.images.shape[1:])
        return flags, np.concatenate(kept)

    def _refuse_wrong(self, flags, eps, shape):
        """Raises what `__call__` says where adversarial images of this shape lie outside, or are no numbers."""
        if unusable := int(np.isnan(flags.distance).sum()):
            raise GradientError(
                f"the network's gradient is NaN or infinite on {unusable} images, so that this attack cannot judge it"
            )
        worst = float(flags.distance.max())
        farthest = eps + geometry.tolerance(eps, shape) if self.bounded else sys.float_info.max
        if not worst <= farthest:
            if self.own:
                raise CodeError(
                    f"attack '{self.own}' leaves the eps-ball or [0, 1]: an image is {worst:.8g} away or outside, eps "
                    f"is {eps:.8g}; end it with ibjax.attacks.geometry.project(x_adv, x, norm, eps)"
                )
            raise RuntimeError(f"an adversarial image is {worst:.8g} away or outside [0, 1]; eps is {eps:.8g}")


# ---- AutoAttack ------------------------------------------------------------------------------------------


def auto_attack(
    network: Callable,
    split: Split,
    seed: int,
    options: dict[str, Any],
    *,
    norm: str,
    eps: Any,
    batch_size: int,
    title: str | None = None,
    keep: int | np.ndarray = 0,
    state: Path | None = None,
    attacked: Callable | None = None,
    count: str = "both",
    attacked_in: str = precision.EVALUATION,
) -> tuple[Flags, np.ndarray, dict[str, Any]]:
    """Runs AutoAttack: (flags of the whole split, the images that `keep` selects, further fields of the record).

    Args:
      network: (x, keys) -> logits; only version "rand" passes keys while it attacks.
      state: a file that holds the progress; the same call continues where an earlier one was stopped.
      attacked: a surrogate, (x, keys) -> logits. AutoAttack runs on it, and `network` is evaluated on the result.
        Images that the surrogate misclassifies or on which it stays robust are not perturbed.
      keep, count, attacked_in: as in `Scorer`. Without a surrogate, AutoAttack does not perturb misclassified images.

    With version "rand" the record's accuracies are means over fresh draws, the flags are those of the first draw, and
    `reference` holds the accuracies as the authors' code counts them: see autoattack.py.
    """
    climbed, x = attacked or network, float_on_host(split.images[:])
    key = jax.random.fold_in(jax.random.key(seed), _EVALUATION)
    logits_fn = climbed if options["version"] == "rand" else lambda x: climbed(x, None)
    result = autoattack.autoattack(
        key, logits_fn, x, split.labels, norm, eps, batch_size=batch_size, state=state, progress=title,
        precision=attacked_in, **options,
    )  # fmt: skip

    judge = _judge(network, seed, x, split.labels, norm, batch_size)
    if attacked is None:  # keep AutoAttack's own judgement: in another batch, rounding may change a flag
        _, loss, distance = judge(result.x_adv)
        flags = Flags(result.clean, result.robust, loss, distance, result.changed)
        more: dict[str, Any] = {"robust_after": {name: percent(kept) for name, kept in result.robust_after.items()}}
        if result.drawn is not None:
            flags = flags._replace(clean=result.drawn.clean[0], robust=result.drawn.robust[0])
            more |= drawn_record(result)
    else:
        flags, more = _of_transfer(judge, x, result.x_adv, count, attacked_in), {}
    more |= {
        "seconds_of": result.seconds,
        "seconds": round(sum(result.seconds.values()), 2),
        "warnings": result.warnings,
    }
    return flags, result.x_adv[:keep] if isinstance(keep, int) else result.x_adv[keep], more


def _judge(network, seed, x, labels, norm, batch_size):
    """`judge(images (N, H, W, C), precision)` -> (correct, loss, distance from x) of each image.

    network: as of `auto_attack`. Its weights are arguments of the program, which they would double as constants, and
    which no other weights could use again; the last batch is padded, so that there is one program for each precision.
    """
    compiler = Compiler()
    size = cluster.rounded_up(min(batch_size, len(x)), compiler.mesh.size)
    rows, place = cluster.parts_of_batch(compiler.mesh, size)

    def score(seed, index, images, x, y):
        logits = network(images, geometry.fold(_image_keys(seed, index), _JUDGED))
        return losses.correct(logits, y), losses.cross_entropy(logits, y), geometry.distance(images, x, norm)

    @functools.cache
    def program(name):
        return compiler.program(score, "cssss", gathered=True)

    def judge(images, name=precision.JUDGEMENT):
        parts = []
        for first in range(0, len(x), size):
            index = np.minimum(first + rows, len(x) - 1).astype(np.int32)
            arrays = (place(array) for array in (index, images[index], x[index], labels[index]))
            with precision.at(name):
                found = program(name)(np.uint32(seed), *arrays)
            parts.append([np.asarray(values)[: len(x) - first] for values in found])
        return [np.concatenate(column) for column in zip(*parts, strict=True)]

    return judge


def _of_transfer(judge, x, x_adv, count, attacked_in):
    """The flags of a network that plays no part in what was made of its images."""

    def outcome(name):
        (clean, *_), (withstood, loss, distance) = (judge(images, name) for images in (x, x_adv))
        robust = clean & withstood if count == "both" else withstood
        return Flags(clean, robust, loss, distance, np.zeros(len(x), bool))

    flags = outcome(precision.JUDGEMENT)
    if not cores.differ(attacked_in, precision.JUDGEMENT):
        return flags
    return flags._replace(changed=_changed(outcome(attacked_in), flags))


def _changed(before, judged):
    """Where the flags of an attack, (clean, robust, …), are not those that are judged."""
    return (before[0] != judged[0]) | (before[1] != judged[1])


def drawn_record(result: autoattack.Result) -> dict[str, Any]:
    """The fields of a record of version "rand"; accuracies are in percent."""
    drawn = result.drawn
    assert drawn is not None
    return {
        "clean_acc": percent(drawn.clean),
        "robust_acc": percent(drawn.robust),
        "standard_error": round(drawn.standard_error, 4),
        "draws": len(drawn.robust),
        "robust_acc_of_draws": [percent(flags) for flags in drawn.robust],
        "reference": {"clean_acc": percent(result.clean), "robust_acc": percent(result.robust)},
    }


# ---- predictions that are drawn ------------------------------------------------------------------------------


def sampling(model: nn.Module, samples: int) -> Callable:
    """`predict(variables, x, keys)` of a stochastic network: the logarithm of the mean of `samples` softmaxes.

        log p̄(x) = log 1/k Σ_s softmax(f(x, ξ_s))               ξ_s depends on an image's key and its pixels

    Every new point has fresh draws (see attacks/eot.py), so each step of an attack on log p̄ uses a mean over k
    samples: expectation over transformation, applied to the prediction that is evaluated.
    """
    drawing = model.clone(sample_at_test=True)

    def predict(variables, x, keys):
        def once(key, x):
            return as_output(drawing.apply(variables, x, train=False, rngs={"sample": key}))[0]

        _, logits = eot.sampled(keys, once, samples)(x)  # (k, B, classes)
        return jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0) - jnp.log(float(samples)), {}

    return predict


@functools.partial(jax.jit, static_argnums=(0, 1))
def draw_keys(seed: int, n: int) -> jax.Array:
    """The keys (n,) of images 0 to n − 1 of a split, from which a network draws when `Scorer` scores it."""
    return geometry.fold(_image_keys(seed, jnp.arange(n)), _JUDGED)


def _image_keys(seed, index):
    key = jax.random.fold_in(jax.random.key(seed), _EVALUATION)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)
