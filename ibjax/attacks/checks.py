"""Checks before robust accuracy is reported: errors that invalidate every number are refused, doubts are warnings."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from ibjax.attacks.hoist import hoisted, unjitted
from ibjax.errors import InputError

_PROBED, _REPEATED = 256, 64  # numbers of images: evaluated once; evaluated repeatedly
_DIFFERENTIATED, _PRINTED = 16, 8  # numbers of images: with gradients; in the fingerprint
# Largest difference attributed to rounding, as a share of the vector's length: other batch sizes and devices choose
# other algorithms, and a gradient jumps where rounding switches a ReLU.
_LOGITS, _GRADIENT = 1e-2, 5e-2
_OVERSHOOT = 1e-6  # how far rounding may leave pixels outside [0, 1]


def images_and_labels(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(x, y), checked: x is (N, H, W, C) float32 in [0, 1], and y holds integers (N,).

    Pixels up to 1e-6 outside [0, 1], as left by rounding, are clipped. Raises InputError on anything else.
    """
    kind_of_images(x)
    kind_of_labels(y, len(x))
    return in_the_box(x), y


def kind_of_images(x: Any, name: str = "images", dtypes: Sequence[str] = ("float32",)) -> None:
    """Raises InputError unless x has the shape (N, H, W, C) and a dtype of images; does not read the values."""
    if not isinstance(x, jax.Array | np.ndarray):
        raise InputError(
            f"{name} are a {type(x).__name__}; give an array (N, height, width, channels), float32 in [0, 1]"
        )
    if x.ndim != 4 or not len(x):
        raise InputError(f"{name} have shape {x.shape}; give (N, height, width, channels) with at least one image")
    if x.shape[1] in (1, 3) and x.shape[3] not in (1, 3):
        raise InputError(f"{name} have shape {x.shape}, channels first; transpose them to (N, height, width, channels)")
    if x.dtype not in dtypes:
        grey = jnp.issubdtype(x.dtype, jnp.integer)
        how = f"; divide by 255: {name}.astype('float32') / 255" if grey else f": {name}.astype('float32')"
        raise InputError(f"{name} are {x.dtype}; give float32 in [0, 1]{how}")


def in_the_box(x: np.ndarray, name: str = "images") -> np.ndarray:
    """x clipped to [0, 1], where rounding left it up to 1e-6 outside; raises InputError if it is farther outside."""
    low, high = x.min(), x.max()
    if low >= 0 and high <= 1:
        return x
    if low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT:
        return np.clip(x, 0, 1)
    if not np.isfinite(low + high):
        count = int(np.sum(~np.isfinite(x).all(axis=(1, 2, 3))))
        raise InputError(f"{count} of {len(x)} {name} hold NaN or Inf; give pixels in [0, 1]")
    instead = "divide by 255" if low >= 0 and high > 2 else "normalise inside logits_fn"
    raise InputError(f"{name} reach from {low!s} to {high!s}; give pixels in [0, 1], {instead}")


def kind_of_labels(y: Any, count: int) -> None:
    """Raises InputError unless y has the shape (N,) and an integer dtype; does not read the values."""
    if not isinstance(y, jax.Array | np.ndarray):
        raise InputError(f"labels are a {type(y).__name__}; give an array of integers of shape ({count},)")
    if y.ndim == 2 and len(y) == count:
        raise InputError(
            f"labels have shape {y.shape}, one-hot perhaps; give integers of shape ({count},): labels.argmax(axis=1)"
        )
    if y.shape != (count,) or not jnp.issubdtype(y.dtype, jnp.integer):
        raise InputError(f"labels have shape {y.shape} and type {y.dtype}; give integers of shape ({count},)")


def in_classes(y: np.ndarray, classes: int) -> None:
    """Raises InputError unless the labels are among the classes of the network."""
    if y.min() < 0 or y.max() >= classes:
        raise InputError(f"labels reach from {y.min()} to {y.max()}; the network has {classes} classes")


class Asked(NamedTuple):
    """What the checks before an attack found out about a network."""

    warnings: list[str]
    fingerprint: np.ndarray  # summary of its logits and gradients on a few images: see `fingerprint`
    dtype: str  # dtype of its logits
    randomised: bool  # two passes over the same images differ


def network(logits_fn: Callable, x: np.ndarray, y: np.ndarray, keys: Array | None = None) -> Asked:
    """Evaluates the network several times on up to 256 of the images and checks the results.

    The network returns logits, or (logits, …). With `keys` (N,), a key per image, it is called as
    `logits_fn(x, keys)`. Raises InputError on errors that invalidate every number: labels outside the classes, NaN
    logits, or logits of an image that depend on the rest of its batch.
    """
    network, images = _Network(logits_fn, x, keys, _PROBED), x[:_PROBED]
    given = network.answer()
    answer: Any = given[0] if isinstance(given, tuple) and given else given
    outside_traces(answer)
    if not hasattr(answer, "shape"):
        raise InputError(f"logits_fn returns a {type(answer).__name__}; return the logits alone, (B, classes)")
    logits = np.asarray(answer, np.float64)
    if logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] < 2:
        raise InputError(f"logits have shape {logits.shape}; expected ({len(images)}, classes)")
    if not np.all(np.isfinite(logits)):
        raise InputError(f"the network returns NaN or Inf for {int(np.sum(~np.isfinite(logits).all(1)))} images")
    if y.min() < 0 or y.max() >= logits.shape[1]:
        raise InputError(f"labels reach from {y.min()} to {y.max()}; the network has {logits.shape[1]} classes")
    warnings = []
    if logits.min() >= -1e-5 and logits.max() <= 1 + 1e-5 and np.allclose(logits.sum(1), 1, atol=1e-5):
        warnings.append("the network returns probabilities, not logits: gradients of attacks may vanish")
    if len(images) > 1 and np.ptp(logits, axis=0).max() < 1e-6:
        warnings.append("the network returns the same logits for every image")
    randomised = _randomised(network)
    warnings += [_DRAWS] if randomised else _dependence(network)
    return Asked(warnings, _fingerprint(network), str(answer.dtype), randomised)


_DRAWS = (
    "two passes over the same images differ: the network is randomised, use EOT attacks, as apgd(eot=20), "
    "eot(attack=pgd, samples=20) or autoattack(version='rand'), on logits_fn(x, keys) with a key per image"
)
ONE_IMAGE = "there is one image: whether its logits depend on the rest of a batch could not be checked"


def _randomised(network, passes=4, size=_REPEATED):
    """Whether one of `passes` more forward passes on up to `size` images changes logits by over 1e-4 of their norm."""
    rows = np.arange(min(network.count, size))
    logits = network.logits(rows)
    length = np.linalg.norm(logits, axis=1, keepdims=True) + 1e-12
    again = (network.logits(rows) for _ in range(passes))
    return any(np.max(np.linalg.norm((other - logits) / length, axis=1)) > 1e-4 for other in again)


def inside_a_trace(*values: Any) -> bool:
    """Whether one of the values is a tracer, or JAX is tracing anyway, as within `jax.jit(lambda: …)`."""
    return any(isinstance(value, Tracer) for value in (*values, jnp.zeros(())))


def outside_traces(*values: Any) -> None:
    """Raises InputError inside a JAX trace, where code that is driven from the host cannot run."""
    if inside_a_trace(*values):
        raise InputError(
            "autoattack cannot run inside jax.jit, vmap, grad or a loop of lax: it steers its programs from the host; "
            "call it outside, or use apgd, fab or square there"
        )


# ---- what an image's answer depends on ------------------------------------------------------------------------


def independent(logits_fn: Callable, x: Any, keys: Array | None = None) -> list[str]:
    """Raises InputError if an image's logits, or their gradient, depend on the rest of its batch.

    Attacks regroup images into other batches, so every number measured on such a network would be arbitrary. Results
    are compared between the batch, the reversed batch, a permuted batch, and the two halves: the logits of up to 256
    images, and for up to 16 slightly perturbed images the gradient of a random combination of their logits. A network
    that accepts only one batch size always gets that size; to fill it, the images of a half are repeated.

    Args:
      logits_fn: x -> logits (B, classes), or (logits, …); with `keys` (x, keys) -> the same.
      x: images (N, H, W, C), not a tracer.
      keys: (N,), a key per image, which stays with its image.

    Returns:
      A list with a warning if the check is impossible: for a single image, or if two passes over the same batch differ.
    """

    def ask(most, sizes):
        network = _Network(logits_fn, x, keys, most)
        return [_DRAWS] if _randomised(network, 1, *sizes) else _dependence(network, *sizes)

    try:
        return ask(_PROBED, ())
    except InputError:
        raise
    except Exception:  # any error of the caller's function; it may accept one batch size only
        return ask(len(x), (len(x),))


def _dependence(network, size=None):
    """The check of `independent`; with `size`, every batch has that many images."""
    count = network.count
    if count < 2:
        return [ONE_IMAGE]
    for what, answers, most, tolerance in (
        ("logits", network.logits, count, _LOGITS),
        ("gradients", network.gradients, min(count, _DIFFERENTIATED), _GRADIENT),
    ):
        rows = np.resize(np.arange(most), size or most)
        places = np.arange(len(rows))
        halves = [places[: most // 2], places[most - most // 2 : most]]
        if size or what == "gradients":  # repeated, for equal batch sizes: one program for all gradients
            halves = [np.resize(half, len(rows)) for half in halves]
        orders = (places[::-1], np.random.default_rng(0).permutation(places), *halves)
        before = answers(rows)
        for order in orders:
            if _distance(answers(rows[order]), before[order]) > tolerance:
                same = answers(np.zeros_like(rows))  # the same image at every position
                if _distance(same, same[:1]) > tolerance:
                    raise InputError(
                        f"an image's {what} depend on its place in the batch, as where noise of a fixed key is drawn "
                        f"by position; draw noise from a key per image, and attack with autoattack(version='rand') "
                        f"or apgd(eot=20)"
                    )
                raise InputError(
                    f"an image's {what} depend on the other images of its batch; evaluate in evaluation mode"
                )
    return []


def _distance(found, wanted):
    """The largest norm of a row's difference, relative to the largest norm of a row."""
    difference = np.linalg.norm(found - wanted, axis=1).max()
    return difference / max(np.linalg.norm(wanted, axis=1).max(), 1e-12)


# ---- whether a network is still the same one ------------------------------------------------------------------

FINGERPRINT_TOLERANCE = (5e-3, _GRADIENT)  # for logits and for gradients, relative to the largest norm of a row
_PROJECTIONS = 4


def fingerprint(logits_fn: Callable, x: Any, keys: Array | None = None) -> np.ndarray:
    """A summary that identifies a network to an attack: of its logits and gradients on the first 8 images.

    The weights alone do not identify it: an activation, a normalisation or a straight-through gradient changes every
    result too. Arguments as in `independent`.

    Returns:
      (images, 2, 5) float32: for the logits of each image, and for the gradient of a random combination of them, the
      norm and four random projections. Compare two with `differences`, since devices round differently.
    """
    return _fingerprint(_Network(logits_fn, x, keys, _PRINTED))


def _fingerprint(network):
    rows = np.arange(min(network.count, _PRINTED))
    repeated = np.resize(rows, min(network.count, _DIFFERENTIATED))  # the batch size of `_dependence`: the same program
    short = []
    for answers in (network.logits(rows), network.gradients(repeated)[: len(rows)]):
        directions = np.random.default_rng(1).standard_normal((answers.shape[1], _PROJECTIONS))
        short.append(np.concatenate([np.linalg.norm(answers, axis=1, keepdims=True), answers @ directions], axis=1))
    return np.stack(short, axis=1).astype(np.float32)


def differences(found: Any, wanted: Any, tolerance: Any = FINGERPRINT_TOLERANCE) -> list[str]:
    """Which of "logits" and "gradients" differ between two fingerprints by more than rounding."""
    names = ["logits", "gradients"]
    try:
        found, wanted = (np.asarray(value, np.float64) for value in (found, wanted))
    except (TypeError, ValueError):
        return names
    if found.shape != wanted.shape or found.shape[1:] != (2, 1 + _PROJECTIONS):
        return names
    parts = zip(names, found.swapaxes(0, 1), wanted.swapaxes(0, 1), tolerance, strict=True)
    return [name for name, one, other, most in parts if not _distance(one, other) <= most]


class _Network:
    """A network and some images, on which it can be evaluated in any order and in any batch.

    Images and keys are chosen on the host: on a device, each number of them would be some twenty programs to compile.
    """

    def __init__(self, logits_fn: Callable, x: Any, keys: Array | None, most: int):
        self.logits_fn, self.x = logits_fn, np.asarray(x[:most])
        self.keys, self.count = keys, len(self.x)
        self.words = None if keys is None else np.asarray(jax.random.key_data(keys))[: self.count]
        self.pulled: dict[int, Callable] = {}  # number of images -> the compiled gradient

    def answer(self, rows: Any = slice(None)) -> Any:
        """The network's output for these images."""
        return self.logits_fn(jax.device_put(self.x[rows]), *self._keys(rows))

    def logits(self, rows: np.ndarray) -> np.ndarray:
        """The logits (B, classes) in float64, with 0 in place of NaN and infinite values."""
        return np.nan_to_num(np.asarray(first(self.answer(rows)), np.float64), posinf=0.0, neginf=0.0)

    def gradients(self, rows: np.ndarray) -> np.ndarray:
        """The gradient of a random combination of each image's logits, (B, H·W·C) float64; 0 if there is none.

        It is taken at slightly perturbed images, so that no two pixels tie in a max-pooling window and no pixel lies on
        a discontinuity of rounding.
        """
        rng = np.random.default_rng(2)
        x = 0.98 * self.x[:_DIFFERENTIATED] + 0.02 * rng.random(self.x[:_DIFFERENTIATED].shape)
        arguments = (jax.device_put(x[rows].astype(self.x.dtype)), *self._keys(rows))
        if len(rows) not in self.pulled:
            self.pulled[len(rows)] = self._compiled(*arguments)
        gradient = np.asarray(self.pulled[len(rows)](rows, *arguments), np.float64)
        return np.nan_to_num(gradient.reshape(len(rows), -1), posinf=0.0, neginf=0.0)

    def _compiled(self, *arguments):
        """(rows, x, *keys) -> the gradient; zeros if the network has no derivative, as with some callbacks."""
        logits_fn = unjitted(self.logits_fn)

        def pull(weights, x, *keys):
            logits, back = jax.vjp(lambda x: first(logits_fn(x, *keys)), x)
            return back(weights.astype(logits.dtype))[0]

        classes = jax.eval_shape(lambda *a: first(logits_fn(*a)), *arguments).shape[-1]
        weights = np.random.default_rng(3).standard_normal((_DIFFERENTIATED, classes)).astype(np.float32)
        try:
            program, constants, _ = hoisted(pull, np.resize(weights, (len(arguments[0]), classes)), *arguments)
        except (ValueError, NotImplementedError):
            return lambda rows, x, *keys: np.zeros((len(rows), 1))
        program = jax.jit(program)
        return lambda rows, *arguments: program(constants, weights[rows], *arguments)[0]

    def _keys(self, rows):
        if self.words is None:
            return ()
        return (jax.random.wrap_key_data(self.words[rows], impl=jax.random.key_impl(self.keys)),)


def first(tree: Any) -> Array:
    """The logits of a network's output, or the labels of a target: the array itself, or the first of a tuple."""
    found = tree[0] if isinstance(tree, tuple) else tree
    if not hasattr(found, "dtype"):
        raise InputError(f"the attack was given a {type(tree).__name__}; give an array, or a tuple that begins with it")
    return found
