"""Checks before any robustness is reported: what makes every number wrong is refused, what casts doubt is a warning."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ibjax.errors import InputError

_PROBED, _REPEATED = 256, 64  # images that are asked about once, and again
_OVERSHOOT = 1e-6  # of pixels outside [0, 1] by rounding


def images_and_labels(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) where x is (N, H, W, C) float32 in [0, 1], and y (N,) integers.

    What rounding has left up to 1e-6 outside [0, 1] is clipped. Raises InputError on anything else.
    """
    kind_of_images(x)
    kind_of_labels(y, len(x))
    return in_the_box(x), y


def kind_of_images(x: Any, name: str = "images", dtypes: Sequence[str] = ("float32",)) -> None:
    """Raises InputError unless x has the shape (N, H, W, C) and the type of images; looks at no value."""
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
    """x in [0, 1], clipped where rounding has left it up to 1e-6 outside; raises InputError where it is farther."""
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
    """Raises InputError unless y has the shape (N,) and the type of labels; looks at no value."""
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


def network(logits_fn: Callable, x: np.ndarray, y: np.ndarray) -> list[str]:
    """Asks the network about up to 256 of the images, several times; returns warnings.

    Raises InputError on what makes every number wrong: labels outside the classes, NaN logits, or logits of an image
    that depend on the others in its batch.
    """
    images = jnp.asarray(x[:_PROBED])
    answer = logits_fn(images)
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
    if randomised(logits_fn, images[:_REPEATED]):
        warnings.append("two passes over the same images differ: the network is randomised, use EOT attacks")
    elif len(images) > 1:
        tolerance = 1e-2 * max(float(np.abs(logits).max()), 1e-6)  # other batch sizes may choose other algorithms
        if np.abs(np.asarray(logits_fn(images[:1])) - logits[:1]).max() > tolerance:
            raise InputError("an image's logits depend on the other images of its batch; evaluate in evaluation mode")
    return warnings


def randomised(logits_fn: Callable, x: jax.Array) -> bool:
    """Whether one of four more passes moves an image's logits by more than 1e-4 of their length."""
    logits = np.asarray(logits_fn(x), np.float64)
    length = np.linalg.norm(logits, axis=1, keepdims=True) + 1e-12
    passes = (np.asarray(logits_fn(x), np.float64) for _ in range(4))
    return any(np.max(np.linalg.norm((again - logits) / length, axis=1)) > 1e-4 for again in passes)
