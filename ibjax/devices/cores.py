"""Which platform a program is traced for, and passes over parts of the batch for CPUs.

`form()` is the row of `forms.TABLE` for that platform. Where it asks for parts, a forward pass is split into passes
over parts of the batch, within one program (`in_parts`).

The split helps because XLA's CPU compiler runs a convolution with few channels on one thread, but runs independent
operations in parallel, and because the activations of a part are still in the processor's cache when the next layer
reads them. On two cores, PGD on a ResNet-18 at batch 128 takes 9.5 s instead of 13.6 s, and half the time for a small
network on 28×28 images. Each part is compiled, which takes a second longer per part and attack. Accelerators and
several devices do not need the split.
"""

import contextlib
import contextvars
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ibjax.devices import forms
from ibjax.errors import InputError, nearest

_PIXELS = 2**14  # smallest number of pixels in a part: 16 images of 32×32

_whole = contextvars.ContextVar("whole", default=False)
_elsewhere = contextvars.ContextVar("elsewhere", default="")


def platform() -> str:
    """The platform that is traced for: "cpu", "cuda" or "tpu", the names of `lax.platform_dependent`.

    It is that of this process's devices, or the one that `elsewhere` names. Any other accelerator counts as "cuda".
    """
    here = _elsewhere.get() or jax.default_backend()
    return here if here in forms.TABLE else "cuda"  # jax.default_backend() calls it "gpu"


def form() -> forms.Form:
    """The forms of the platform that is traced for."""
    return forms.TABLE[platform()]


def differ(one: str, other: str) -> bool:
    """Whether float32 products of two precisions, by name, may differ on the platform that is traced for."""
    return one != other and form().products == "rounded"


@contextlib.contextmanager
def elsewhere(target: str | None = None):
    """A context in which programs are traced for a platform that this machine lacks (ahead-of-time compilation).

    `target` is "cuda" or "tpu" ("cpu" where an accelerator is here). None is the accelerator whose compiler is
    installed: a TPU if libtpu is, else a GPU. JAX keeps what it has traced of a jitted function: give this context one
    that was not traced for another platform before. Raises InputError on another name.
    """
    if target is None:
        target = "tpu" if importlib.util.find_spec("libtpu") else "cuda"
    if target not in forms.TABLE:
        raise InputError(f"the platform '{target}' is unknown; {nearest(target, forms.TABLE)}")
    token = _elsewhere.set(target)
    try:
        yield
    finally:
        _elsewhere.reset(token)


def in_parts(f: Callable) -> Callable:
    """`f`, applied to parts of the batch if one device of a CPU runs it.

    Args:
      f: a function of arrays (B, …), the first of them images (B, H, W, C), that returns a tree of arrays (B, …). The
        result for an image must not depend on the other images.

    Returns:
      A function with the same values, up to rounding. It calls `f` once, without a split, if the batch is small or not
      divisible, if an array of the result has no batch axis, or inside another `in_parts`.
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
    """A context in which `in_parts` does not split."""
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


def _parts(x):
    if _whole.get() or jax.device_count() > 1 or x.ndim != 4:
        return 1
    batch, height, width, _ = x.shape
    most = min(form().parts, batch * height * width // _PIXELS)
    return next((count for count in range(most, 1, -1) if batch % count == 0), 1)
