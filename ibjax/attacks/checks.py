"""Checks before any robustness is reported: what makes every number wrong is refused, what casts doubt is a warning."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ibjax.errors import InputError

_PROBED, _REPEATED = 256, 64  # images that are asked about once, and again


def images_and_labels(x: np.ndarray, y: np.ndarray) -> None:
    """Raises InputError unless x is (N, H, W, C) float32 in [0, 1] and y (N,) integers."""
    if x.ndim != 4 or not len(x):
        raise InputError(f"images have shape {x.shape}; give (N, height, width, channels) with at least one image")
    if x.shape[1] in (1, 3) and x.shape[3] not in (1, 3):
        raise InputError(f"images have shape {x.shape}, channels first; transpose them to (N, height, width, channels)")
    if x.dtype != np.float32:
        divide = "; divide by 255" if np.issubdtype(x.dtype, np.integer) else ""
        raise InputError(f"images are {x.dtype}; give float32 in [0, 1]{divide}")
    low, high = float(np.min(x)), float(np.max(x))
    if not (low >= 0 and high <= 1):  # NaN fails too
        raise InputError(f"images reach from {low:g} to {high:g}; give pixels in [0, 1], normalise inside logits_fn")
    if y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer):
        raise InputError(f"labels have shape {y.shape} and type {y.dtype}; give integers of shape ({len(x)},)")


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
