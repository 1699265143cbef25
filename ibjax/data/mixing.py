"""Images mixed in pairs, with their labels: CutMix and MixUp, inside the jitted step, after the augmentation.

    x̃_i = w_i·x_i + (1 − w_i)·x_j,     ỹ_i = s_i·y_i + (1 − s_i)·y_j        s_i: the mean of w_i over the pixels

    mixup    w_i = λ for every pixel                     Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018
    cutmix   w_i = 0 in a box, 1 elsewhere               Yun et al., "CutMix: Regularization Strategy …", ICCV 2019

| symbol | code      | default |
|--------|-----------|---------|
| λ      | alpha     | 1       | λ ~ Beta(alpha, alpha)
|        | per_image | False   | True: one λ and one box for each image, False: for the whole batch

The box of CutMix has its centre anywhere in the image and the sides ⌊H√(1−λ)⌋ and ⌊W√(1−λ)⌋, rounded down to even
numbers, as in the code of Yun et al. and of Rebuffi et al. ("Data Augmentation Can Improve Robustness", NeurIPS 2021).
The part of the box outside the image is cut off, so s, the image's own share, exceeds λ on average.

In a batch of n images, the partner of image i is j = (i + d) mod n; one d in 1 … n − 1 is drawn per step. The papers
draw a permutation. As batches are in random order, a shift pairs any two images equally often, and none with itself.
On several devices each exchanges only its own part; a permutation would gather the whole batch on each.
All draws are functions of (seed, step); with per_image, those of λ and the box also of index. The attack and the loss
see x̃ and ỹ.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ibjax.errors import CodeError, check_range


class Mixed(NamedTuple):
    """A batch of mixed images."""

    image: Array  # (B, H, W, C)
    label: Array  # (B, classes), distributions
    share: Array  # (B,), the share of an image that is its own


# (key, images (B, H, W, C), distributions (B, classes), index in the training images (B,)) -> Mixed
Mix = Callable[[Array, Array, Array, Array], Mixed]


def cutmix(*, alpha: float = 1.0, per_image: bool = False) -> Mix:
    """A box of each image is replaced by that of another one."""
    check_range("mix.alpha", alpha, 1e-6)

    def weights(key: Array, size: tuple[int, int]) -> Array:
        key_length, key_centre = jax.random.split(key)
        ratio = jnp.sqrt(1.0 - jax.random.beta(key_length, alpha, alpha))
        inside = jnp.ones(size, bool)
        for axis, (side, key_axis) in enumerate(zip(size, jax.random.split(key_centre), strict=True)):
            half = jnp.floor(side * ratio).astype(jnp.int32) // 2
            centre = jax.random.randint(key_axis, (), 0, side)
            place = jnp.arange(side)
            along = (place >= centre - half) & (place < centre + half)
            inside &= jnp.expand_dims(along, 1 - axis)
        return 1.0 - inside.astype(jnp.float32)

    return _mixer(weights, per_image)


def mixup(*, alpha: float = 1.0, per_image: bool = False) -> Mix:
    """Each image is averaged with another one."""
    check_range("mix.alpha", alpha, 1e-6)

    def weights(key: Array, size: tuple[int, int]) -> Array:
        return jnp.full(size, jax.random.beta(key, alpha, alpha))

    return _mixer(weights, per_image)


def _mixer(weights, per_image):
    """`Mix` of a function (key, (H, W)) -> w, the weight (H, W) of an image's own pixels."""

    def mix(key: Array, images: Array, labels: Array, index: Array) -> Mixed:
        size = tuple(images.shape[1:3])
        key_partner, key_weights = jax.random.split(key)
        partners, partners_labels = _shifted(key_partner, images, labels)
        if per_image:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key_weights, index)
            w = jax.vmap(lambda k: weights(k, size))(keys)[..., None]  # (B, H, W, 1)
        else:
            w = jnp.broadcast_to(weights(key_weights, size)[..., None], (len(images), *size, 1))
        share = jnp.mean(w, axis=(1, 2, 3))
        own = share[:, None]
        return Mixed(w * images + (1.0 - w) * partners, own * labels + (1.0 - own) * partners_labels, share)

    return mix


def _shifted(key: Array, *arrays: Array) -> tuple[Array, ...]:
    """`arrays` (n, …) with entry (i + d) mod n in the place of i, d uniform in 1 … n − 1.

    The shift is put together from those by powers of two: a compiler knows only of fixed ones what to send where.
    """
    n = arrays[0].shape[0]
    distance = jax.random.randint(key, (), 1, max(n, 2))
    for bit in range((n - 1).bit_length()):
        turn = functools.partial(jax.tree.map, lambda a, by=2**bit: jnp.roll(a, -by, axis=0))
        arrays = jax.lax.cond((distance >> bit) & 1 > 0, turn, lambda same: same, arrays)
    return arrays


MIXES = {"cutmix": cutmix, "mixup": mixup}


def own_mix(source: Any, made: Any, options: Any) -> Mix:
    """The mix that a factory of the user's own has made; its images are clipped to [0, 1].

    Raises CodeError unless it is a function, and, while JAX traces it, unless it returns `Mixed` of the right shapes.
    """
    if not callable(made):
        raise CodeError(f"{source} is a {type(made).__name__}; return a function (key, images, labels, index) -> Mixed")

    def mix(key: Array, images: Array, labels: Array, index: Array) -> Mixed:
        found: Any = made(key, images, labels, index)
        shapes = [images.shape, labels.shape, index.shape]
        if not isinstance(found, tuple) or [jnp.shape(part) for part in found] != shapes:
            raise CodeError(f"{source} returns other arrays than it got; return Mixed(images, labels, share (B,))")
        return Mixed(jnp.clip(found[0], 0.0, 1.0), *found[1:])

    return mix
