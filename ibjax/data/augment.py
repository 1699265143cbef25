"""Random crop and horizontal flip, inside the jitted step, image by image.

An augmentation of the user's own takes their place: a factory that returns a function (key, images (B, H, W, C)) ->
images. The key depends on the run's seed and on the step. Stronger augmentations: `ibjax.data.policies`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ibjax.devices import cores
from ibjax.errors import CodeError, InputError, nearest
from ibjax.step import Augment, PerImage

# np.pad's names for the paddings of the papers: zero (TRADES, MART), reflect (Rice, AWP), edge (IBD)
PADDINGS = {"zero": "constant", "reflect": "reflect", "edge": "edge"}


def crop_and_flip(*, pad: int = 4, padding: str = "zero", flip: bool = True) -> Callable[[Array, Array], Array] | None:
    """(key, images (B, H, W, C)) -> images: a random H×W window of the padded image, flipped with probability ½.

    Returns None if the options leave images unchanged. Raises InputError on an unknown padding.
    """
    check_padding(pad, padding)
    if not pad and not flip:
        return None

    def augment(key: Array, images: Array) -> Array:
        crop_key, flip_key = jax.random.split(key)
        batch, *shape = images.shape
        if pad:
            padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), PADDINGS[padding])
            corner = jax.random.randint(crop_key, (batch, 2), 0, 2 * pad + 1)
            images = crop(padded, corner, shape)
        if flip:
            flipped = jax.random.bernoulli(flip_key, 0.5, (batch, 1, 1, 1))
            images = jnp.where(flipped, images[:, :, ::-1], images)
        return images

    return augment


def check_padding(pad: int, padding: str) -> None:
    """Raises InputError on an unknown padding, or a negative number of pixels."""
    if padding not in PADDINGS:
        raise InputError(f"augment.padding '{padding}' is unknown; {nearest(padding, PADDINGS)}")
    if pad < 0:
        raise InputError(f"augment.pad={pad} is negative; give the number of pixels, or 0 for no crop")


def crop(images: Array, corner: Array, shape: Sequence[int]) -> Array:
    """The window of `shape` (H, W, C) of each image (B, H', W', C), with its upper left corner at `corner` (B, 2).

    A TPU would run a slice for each image, one after the other. There, rows and columns are chosen by products with
    zeros and ones, which are exact at the highest precision.
    """
    if cores.form().crop == "slice":
        return jax.vmap(lambda image, c: lax.dynamic_slice(image, (c[0], c[1], 0), tuple(shape)))(images, corner)
    for axis, formula in enumerate(("bij,bjwc->biwc", "bij,bhjc->bhic")):
        wanted = corner[:, axis, None] + jnp.arange(shape[axis])[None]
        chosen = jax.nn.one_hot(wanted, images.shape[axis + 1], dtype=images.dtype)
        images = jnp.einsum(formula, chosen, images, precision=lax.Precision.HIGHEST)
    return images


def own_augmentation(source: Any, made: Any, options: Any) -> Augment:
    """The augmentation that a factory of the user's own has made; its images are clipped to [0, 1].

    Raises CodeError unless it is a function, or `ibjax.step.PerImage` of one, and, while JAX traces it, unless it keeps
    shape and type of the images.
    """
    if isinstance(made, PerImage):
        return PerImage(own_augmentation(source, made.change, options))  # pyright: ignore[reportArgumentType]
    if not callable(made):
        raise CodeError(f"{source} is a {type(made).__name__}; return a function (key, images) -> images")

    def augment(key: Array, images: Array) -> Array:
        found: Any = made(key, images)
        if not isinstance(found, Array) or (found.shape, found.dtype) != (images.shape, images.dtype):
            given = f"{found.dtype}{list(found.shape)}" if hasattr(found, "dtype") else f"a {type(found).__name__}"
            raise CodeError(f"{source} returns {given}; return images as it got, {images.dtype}{list(images.shape)}")
        return jnp.clip(found, 0.0, 1.0)

    return augment
