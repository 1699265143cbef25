"""Maps of 64 channels with two rows side by side in the channels, which fill the 128 lanes of a TPU.

    rows(x)[b, q, w] = [x[b, 2q, w], x[b, 2q + 1, w]]                (B, H, W, C) -> (B, H/2, W, 2C)

A 3×3 convolution of such maps is one with a larger kernel, which has zeros where an input row does not reach an output
row. It needs twice the multiplications but no more time: with 64 channels half of a TPU's lanes would be idle. The
convolution of the pixels writes packed maps, and one with a stride of 2 reads them; sums and ReLUs stay as they are.
`ibjax.devices.forms` says where it is worth it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

CHANNELS = 64


class Packed(NamedTuple):
    """Maps (B, H, W, C) as rows(x), (B, H/2, W, 2C)."""

    maps: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, H, W, C)."""
        b, h, w, c = self.maps.shape
        return b, 2 * h, w, c // 2


def unpacked(x: Array | Packed) -> Array:
    """(B, H, W, C), of packed maps or as it is."""
    if not isinstance(x, Packed):
        return x
    b, h, w, c = x.maps.shape
    return x.maps.reshape(b, h, w, 2, c // 2).transpose(0, 1, 3, 2, 4).reshape(x.shape)


class Convolution(NamedTuple):
    """What to convolve with what."""

    x: Array
    kernel: Array
    strides: Sequence[int]
    padding: Sequence[tuple[int, int]]
    packs: bool  # whether the result is packed


def arranged(x: Array | Packed, kernel: Array, stride: int, pads: tuple[int, int], begins: bool = False) -> Convolution:
    """The convolution of x with a kernel (k, k, C, O), in packed maps where x is packed and a form for it exists.

    begins: whether maps that are not packed may be the input of a packed result.
    """
    plain = Convolution(unpacked(x), kernel, (stride, stride), (pads, pads), False)
    size, out = kernel.shape[0], kernel.shape[3]
    three = size == 3 and pads == (1, 1)
    if not isinstance(x, Packed):
        if begins and three and stride == 1 and out == CHANNELS and x.shape[1] % 2 == 0:
            return Convolution(x, _first(kernel), (2, 1), (pads, pads), True)
        return plain
    if three and stride == 1 and out == CHANNELS:
        return Convolution(x.maps, _inner(kernel), (1, 1), (pads, pads), True)
    if three and stride == 2:
        return Convolution(x.maps, _last(kernel), (1, 2), ((1, 0), pads), False)
    if size == 1 and stride == 2 and pads == (0, 0):  # of the upper rows alone
        upper = jnp.concatenate([kernel, jnp.zeros_like(kernel)], 2)
        return Convolution(x.maps, upper, (1, 2), (pads, pads), False)
    return plain


def _first(w):
    """(3, 3, C, O) -> (4, 3, C, 2·O): x -> rows(conv(x, w)), strides (2, 1)."""
    zero = jnp.zeros_like(w[:1])
    return jnp.concatenate([jnp.concatenate([w, zero]), jnp.concatenate([zero, w])], -1)


def _inner(w):
    """(3, 3, C, O) -> (3, 3, 2·C, 2·O): rows(x) -> rows(conv(x, w))."""
    zero = jnp.zeros_like(w[0])
    above = _squared(zero, zero, w[0], zero)
    return jnp.stack([above, _squared(w[1], w[0], w[2], w[1]), _squared(zero, w[2], zero, zero)])


def _last(w):
    """(3, 3, C, O) -> (2, 3, 2·C, O): rows(x) -> conv(x, w) of stride 2, strides (1, 2)."""
    above = jnp.concatenate([jnp.zeros_like(w[0]), w[0]], 1)
    return jnp.stack([above, jnp.concatenate([w[1], w[2]], 1)])


def _squared(a, b, c, d):
    return jnp.concatenate([jnp.concatenate([a, b], -1), jnp.concatenate([c, d], -1)], 1)
