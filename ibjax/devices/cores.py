"""What a program does otherwise where a CPU will run it.

There short loops are unrolled and factorisations made one after the other (`on_cpu`), and a pass is several passes, of
parts of the batch, in one program (`in_parts`):

XLA's CPU compiler runs a convolution of few channels on one thread, but what does not depend on each other side by
side; and what a part leaves behind still lies in the cache when its next layer asks for it. On two cores PGD on a
ResNet-18 at batch 128 so takes 9.5 s in place of 13.6, on a small network on 28×28 images half as long. Each part is
compiled: that takes a second longer per part and attack. Accelerators and several devices need none of it.
"""

import contextlib
import contextvars
from collections.abc import Callable

import jax
import jax.numpy as jnp

_MOST = 4  # parts: each is compiled
_PIXELS = 2**14  # of a part at least: 16 images of 32×32

_whole = contextvars.ContextVar("whole", default=False)
_elsewhere = contextvars.ContextVar("elsewhere", default=False)


def on_cpu() -> bool:
    """Whether a CPU will run what is traced now."""
    return jax.default_backend() == "cpu" and not _elsewhere.get()


@contextlib.contextmanager
def elsewhere():
    """Within it programs are traced for accelerators that are not here."""
    token = _elsewhere.set(True)
    try:
        yield
    finally:
        _elsewhere.reset(token)


def in_parts(f: Callable) -> Callable:
    """`f`, on one CPU in parts of the batch.

    Args:
      f: arrays (B, …), the first of them images (B, H, W, C) -> a tree of arrays (B, …), each image's part of it
        independent of the other images.

    Returns:
      A function of the same values, to rounding. Within it `in_parts` changes nothing; nor does it where the batch does
      not divide, where it is small, or where an array of the tree has no batch.
    """

    def apply(*arrays):
        count = _parts(arrays[0])
        if count == 1:
            return f(*arrays)
        parts = zip(*(jnp.split(array, count) for array in arrays), strict=True)
        with whole():
            outputs = [f(*part) for part in parts]
        size = arrays[0].shape[0] // count
        if any(leaf.shape[:1] != (size,) for leaf in jax.tree.leaves(outputs[0])):
            return f(*arrays)
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs)

    return apply


@contextlib.contextmanager
def whole():
    """Within it `in_parts` changes nothing."""
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


def _parts(x):
    if _whole.get() or not on_cpu() or jax.device_count() > 1 or x.ndim != 4:
        return 1
    batch, height, width, _ = x.shape
    most = min(_MOST, batch * height * width // _PIXELS)
    return next((count for count in range(most, 1, -1) if batch % count == 0), 1)
