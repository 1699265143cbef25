"""Operations of networks with a gradient of their own, for the platforms that compute the usual one slowly.

`ibjax.devices.forms` says which platform is given which of them. All agree with the usual gradients up to rounding.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from ibjax.devices import precision

NHWC = ("NHWC", "HWIO", "NHWC")

# ---- ReLU --------------------------------------------------------------------------------------------------------


@jax.custom_vjp
def relu_by_output(x: Array) -> Array:
    """max(x, 0), whose gradient looks at its output y: it passes where y ≠ 0.

    cuDNN's convolution with bias, residual sum and ReLU writes y alone. The mask must be y ≠ 0:
    XLA rewrites y > 0 to x > 0, then x is read twice, and the fusion is lost.
    """
    return jnp.maximum(x, 0)


def _relu_forward(x):
    y = jnp.maximum(x, 0)
    return y, y


def _relu_backward(y, g):
    return (jnp.where(y != 0, g, jnp.zeros_like(g)),)


relu_by_output.defvjp(_relu_forward, _relu_backward)


# ---- the convolution of pixels -----------------------------------------------------------------------------------


def convolve_pixels(
    x: Array, kernel: Array, strides: Sequence[int], padding: Sequence[tuple[int, int]], dtype: Any, by_product: bool
) -> Array:
    """The convolution of float32 pixels (B, H, W, C) with a float32 kernel (k, k, C, O), in `dtype`, bfloat16.

        W·x = [W, W]·[high, low],    x ≈ high + low, two bfloat16 numbers side by side in the channels

    Together they keep 16 bits of a pixel's mantissa, so that an attack's small steps are not rounded away. The gradient
    of x is that of the sum, in bfloat16; that of the kernel is the float32 convolution's.

    by_product: whether the gradient of x is one matrix product for all pixels, (B·H·W, O)·(O, k²·C), and a sum of k²
    shifted maps, in place of a convolution; for a stride of 1 only.
    """
    pads = [kernel.shape[0] - 1 - before for before, _ in padding]
    by_product = by_product and max(strides) == 1 and padding[0] == padding[1] and min(pads) >= 0
    narrow = lax.stop_gradient(kernel).astype(dtype)
    if by_product:
        back = _in_eights(1, narrow.transpose(3, 0, 1, 2).reshape(kernel.shape[3], -1))
    else:
        back = _in_eights(2, narrow)
    static = (tuple(strides), tuple(padding), by_product, precision.stated())  # a gradient may be traced elsewhere
    return _pixels(static, x, kernel, _in_eights(2, narrow, narrow), back)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pixels(static, x, kernel, twice, back):
    high, low = _halves(x, twice.dtype)
    strides, padding, _, stated = static
    return convolve(_in_eights(3, high, low), twice, strides, padding, stated)


def _halves(x, dtype):
    """(high, low) with x ≈ high + low, in `dtype`.

    A plain conversion to bfloat16 and back is no rounding for XLA's GPU compiler, which drops the pair (its option
    xla_allow_excess_precision is on), so that x − x = 0 would be left of `low`. `reduce_precision` always rounds.
    """
    digits = jnp.finfo(dtype)
    rounded = lax.reduce_precision(x, exponent_bits=digits.nexp, mantissa_bits=digits.nmant)
    return rounded.astype(dtype), (x - rounded).astype(dtype)


def _pixels_forward(static, x, kernel, twice, back):
    return _pixels(static, x, kernel, twice, back), (x, kernel, back)


def _pixels_backward(static, saved, g):
    (strides, padding, by_product, stated), (x, kernel, back) = static, saved
    _, of_kernel = jax.vjp(lambda kernel: convolve(x, kernel, strides, padding, stated), kernel)
    if by_product:
        dx = _shifted_sums(jnp.matmul(g, back, precision=stated), kernel.shape[0], padding[0], x.shape)
    else:
        wide = jnp.zeros((*x.shape[:3], back.shape[2]), g.dtype)
        _, of_pixels = jax.vjp(lambda x: convolve(x, back, strides, padding, stated), wide)
        dx = of_pixels(g)[0][..., : x.shape[3]].astype(x.dtype)
    return dx, *of_kernel(g.astype(kernel.dtype)), None, None


_pixels.defvjp(_pixels_forward, _pixels_backward)


def _shifted_sums(columns, k, pads, shape):
    """Σ_ij of the columns (B, H', W', ≥ k²·C) of kernel row i and column j, shifted to their pixels."""
    _, height, width, channels = shape
    columns = columns[..., : k * k * channels].reshape(*columns.shape[:3], k, k, channels)
    around = [(k - 1 - before, k - 1 - after) for before, after in (pads, pads)]
    columns = jnp.pad(columns, ((0, 0), *around, *[(0, 0)] * 3))
    rows = (slice(k - 1 - i, k - 1 - i + height) for i in range(k))
    parts = [
        columns[:, row, k - 1 - j : k - 1 - j + width, i, j].astype(jnp.float32)
        for i, row in enumerate(rows)
        for j in range(k)
    ]
    return sum(parts[1:], parts[0])


def _in_eights(axis, *arrays):
    """Arrays side by side along an axis, filled up with zeros to a multiple of 8, as matrix units of GPUs need it."""
    whole = jnp.concatenate(arrays, axis)
    widths = [(0, -whole.shape[axis] % 8 if i == axis else 0) for i in range(whole.ndim)]
    return jnp.pad(whole, widths)


def convolve(
    x: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    stated: lax.Precision | None,
    groups: int = 1,
) -> Array:
    """The convolution of maps (B, H, W, C) with a kernel (k, k, C/groups, O), in the precision that it states."""
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=NHWC, feature_group_count=groups, precision=stated
    )


# ---- batch-norm --------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def scale_shift(x: Array, mul: Array, add: Array, dtype: Any) -> Array:
    """x·mul + add per channel, mul and add (C,) float32, computed in float32; the gradient of x in its own dtype.

    A TPU's compiler fuses this gradient with a convolution and, in float32, broadcasts `mul` to whole float32 maps.
    Where the channels do not fill its 128 lanes, as in a WideResNet, such a fusion is slow even so, and an optimisation
    barrier ends it; elsewhere the fusion saves a pass over memory.
    """
    return (x.astype(mul.dtype) * _wide(mul, x) + _wide(add, x)).astype(dtype)


def _scale_shift_forward(x, mul, add, dtype):
    return scale_shift(x, mul, add, dtype), (x, mul)


def _scale_shift_backward(dtype, saved, g):
    x, mul = saved
    dx = (g * _wide(mul.astype(g.dtype), x)).astype(x.dtype)
    if x.shape[-1] % 128:
        dx = lax.optimization_barrier(dx)
    axes, wide = tuple(range(x.ndim - 1)), g.astype(mul.dtype)
    return dx, jnp.sum(wide * x.astype(mul.dtype), axes), jnp.sum(wide, axes)


scale_shift.defvjp(_scale_shift_forward, _scale_shift_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def norm_add_relu(
    x: Array, scale: Array, bias: Array, shift: Array, skip: Array | None, epsilon: float, relu: bool
) -> tuple[Array, Array, Array]:
    """Batch-norm over the whole batch, sum and ReLU as one function: (y, mean (C,), biased variance (C,)).

        y = max(x·a + b (+ skip), 0)        a = scale/√(var + ε), b = bias − mean·a

    Both moments are from one pass over x, Σ(x − shift) and Σ(x − shift)², and both sums of the gradient from one over g
    and x, Σg and Σg·x̂, with g masked by the ReLU. They are plain sums in the dtype of `scale`: one `lax.reduce` of
    pairs turns into all-gathers on several devices, and takes nine times as long on a CPU. `shift` (C,), near the mean,
    keeps the difference of the moments exact; the running mean is such a one. mean and variance have no gradient.

    The mask is y ≠ 0 where there is a skip, whose gradient is the masked g itself; else it is computed again from x.
    """
    return _norm_forward(x, scale, bias, shift, skip, epsilon, relu)[0]


def _norm_forward(x, scale, bias, shift, skip, epsilon, relu):
    axes, n, wide = tuple(range(x.ndim - 1)), x.size // x.shape[-1], scale.dtype
    centred = x.astype(wide) - _wide(shift, x)
    first, second = jnp.sum(centred, axes) / n, jnp.sum(jnp.square(centred), axes) / n
    mean, var = shift + first, jnp.maximum(second - jnp.square(first), 0)
    inverse = lax.rsqrt(var + epsilon)
    y = _normalised(x, mean, inverse, scale, bias)
    y = y if skip is None else y + skip.astype(wide)
    y = (jnp.maximum(y, 0) if relu else y).astype(x.dtype)
    mask = y if relu and skip is not None else None
    return (y, mean, var), (x, mean, inverse, scale, bias, mask, None if skip is None else ())


def _norm_backward(epsilon, relu, saved, gradients):
    x, mean, inverse, scale, bias, y, skip = saved
    axes, n, wide = tuple(range(x.ndim - 1)), x.size // x.shape[-1], scale.dtype
    g = gradients[0]
    if relu:
        alive = y != 0 if y is not None else _normalised(x, mean, inverse, scale, bias) > 0
        g = jnp.where(alive, g, jnp.zeros_like(g))
    normal = (x.astype(wide) - _wide(mean, x)) * _wide(inverse, x)
    sum_g, sum_gn = jnp.sum(g.astype(wide), axes), jnp.sum(g.astype(wide) * normal, axes)
    dx = _wide(inverse * scale, x) * (g.astype(wide) - _wide(sum_g / n, x) - normal * _wide(sum_gn / n, x))
    return dx.astype(x.dtype), sum_gn, sum_g, None, None if skip is None else g


norm_add_relu.defvjp(_norm_forward, _norm_backward)


def _normalised(x, mean, inverse, scale, bias):
    mul = inverse * scale
    return x.astype(scale.dtype) * _wide(mul, x) + _wide(bias - mean * mul, x)


def _wide(values, x):
    return values.reshape((1,) * (x.ndim - 1) + (-1,))


# ---- max-pooling -------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_of_windows(x: Array, size: int) -> Array:
    """Max-pooling with windows that do not overlap; among equal values the first receives the gradient, as usual.

    The gradient is implemented here because XLA's (select-and-scatter) takes three times as long on CPUs, longer than
    the neighbouring convolutions. The forward pass keeps where each maximum is. To look for the value again would not
    be safe: where XLA computes x twice, in two fusions, the two results may differ in their last bit.
    """
    return nn.max_pool(x, (size, size), (size, size))


def _max_forward(x, size):
    b, h, w, c = x.shape[0], x.shape[1] // size, x.shape[2] // size, x.shape[3]
    windows = x[:, : h * size, : w * size].reshape(b, h, size, w, size, c)
    pooled, place = windows[:, :, 0, :, 0], jnp.zeros((b, h, w, c), jnp.int8 if size < 12 else jnp.int32)
    for i in range(1, size**2):
        value = windows[:, :, i // size, :, i % size]
        place = jnp.where(value > pooled, i, place)
        pooled = jnp.maximum(pooled, value)
    return pooled, (place, x.shape)


def _max_backward(size, saved, gradient):
    place, shape = saved
    b, h, w, c = gradient.shape
    spread = lambda a: a[:, :, None, :, None]  # noqa: E731  (b, h, 1, w, 1, c)
    places = jnp.arange(size**2, dtype=place.dtype).reshape(1, 1, size, 1, size, 1)
    back = jnp.where(places == spread(place), spread(gradient), 0).reshape(b, h * size, w * size, c)
    return (jnp.pad(back, ((0, 0), (0, shape[1] - h * size), (0, shape[2] - w * size), (0, 0))),)


max_of_windows.defvjp(_max_forward, _max_backward)
