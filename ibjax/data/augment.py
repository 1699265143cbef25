"""Random crop and horizontal flip, inside the jitted step, image by image."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from ibjax.errors import InputError, nearest

# np.pad's names for the paddings of the papers: zero (TRADES, MART), reflect (Rice, AWP), edge (IBD)
PADDINGS = {"zero": "constant", "reflect": "reflect", "edge": "edge"}


def crop_and_flip(*, pad: int = 4, padding: str = "zero", flip: bool = True) -> Callable[[Array, Array], Array] | None:
    """(key, images (B, H, W, C)) -> images: a random H×W window of the padded image, flipped with probability ½.

    Returns None if the options leave images unchanged. Raises InputError on an unknown padding.
    """
    if padding not in PADDINGS:
        raise InputError(f"augment.padding '{padding}' is unknown; {nearest(padding, PADDINGS)}")
    if pad < 0:
        raise InputError(f"augment.pad={pad} is negative; give the number of pixels, or 0 for no crop")
    if not pad and not flip:
        return None

    def augment(key: Array, images: Array) -> Array:
        crop_key, flip_key = jax.random.split(key)
        batch, *shape = images.shape
        if pad:
            padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), PADDINGS[padding])
            corner = jax.random.randint(crop_key, (batch, 2), 0, 2 * pad + 1)
            images = jax.vmap(lambda image, c: lax.dynamic_slice(image, (c[0], c[1], 0), shape))(padded, corner)
        if flip:
            flipped = jax.random.bernoulli(flip_key, 0.5, (batch, 1, 1, 1))
            images = jnp.where(flipped, images[:, :, ::-1], images)
        return images

    return augment
