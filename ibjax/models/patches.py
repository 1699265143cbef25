"""The parts that networks on patches share: ConvNeXt, Swin, ViT and XCiT, with the constants of timm's.

| part                 | constant                                                                          |
|----------------------|-----------------------------------------------------------------------------------|
| layer norm           | ε = 1e-6 (Swin: 1e-5), biased variance, computed in float32                       |
| activation           | GELU with the exact normal distribution function, not its tanh approximation      |
| layer scale          | one factor per channel on each residual branch                                    |
| stochastic depth     | in training, each image skips a branch with the branch's rate; a branch that is   |
|                      | kept is divided by 1 − rate                                                       |
| initialisation       | linear layers: N(0, 0.02²), zero biases (timm's truncation at ±2 is at 100        |
|                      | deviations). Convolutions: PyTorch's default; those of ConvNeXt as linear layers  |
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ibjax.devices import precision
from ibjax.errors import InputError, check_count, nearest
from ibjax.models import layers

INIT: dict[str, Any] = dict(kernel_init=nn.initializers.normal(0.02), bias_init=nn.initializers.zeros)
STEMS = ("patch", "convstem")
MLP_RATIO = 4  # width of a block's hidden layer, in units of the block's width


def check_stem(stem: str) -> None:
    """Raises InputError unless `stem` is one of STEMS."""
    if stem not in STEMS:
        raise InputError(f"model.stem '{stem}' is unknown; {nearest(stem, STEMS)}")


def check_sides(name: str, x: Array, patch: int) -> None:
    """Raises InputError unless the sides of the images are multiples of the patch's."""
    check_count("model.patch", patch)
    if x.shape[1] % patch or x.shape[2] % patch:
        raise InputError(f"{name}: images of {x.shape[1:3]} pixels are not divisible into patches of {patch}×{patch}")


def check_heads(width: int, heads: int) -> None:
    """Raises InputError unless the heads of an attention divide its channels."""
    if heads < 1 or width % heads:
        raise InputError(f"model.heads={heads} does not divide model.width={width}")


def heads_for(width: int, heads: int | None, channels: int) -> int:
    """The number of heads that is given, or one for each so many channels; InputError if the width does not divide."""
    if heads is None and width % channels:
        raise InputError(f"model.width={width} is no multiple of {channels}; give model.heads too")
    heads = width // channels if heads is None else heads
    check_heads(width, heads)
    return heads


class LayerNorm(nn.Module):
    """(x − mean) / √(var + ε) · scale + bias, with mean and variance over the channels of each position."""

    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = layers.per_channel(self.param("scale", nn.initializers.ones, (x.shape[-1],)), x)
        bias = layers.per_channel(self.param("bias", nn.initializers.zeros, (x.shape[-1],)), x)
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, -1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), -1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.epsilon) * scale + bias).astype(self.dtype)


class Attend(nn.Module):
    """softmax(q kᵀ + bias)·v for q (B, heads, n, d), k (B, heads, m, d), v (B, heads, m, e); the softmax is in float32.

    bias: (k, heads, n, m) float32, of k entries of the batch in turn; None: 0. A module without parameters, so that
    `analysis.complexity` sees its products.
    """

    @nn.compact
    def __call__(self, q: Array, k: Array, v: Array, bias: Array | None = None) -> Array:
        stated = precision.stated()
        scores = jnp.einsum("bhnd,bhmd->bhnm", q, k, precision=stated).astype(jnp.float32)
        if bias is not None:
            scores = (scores.reshape(-1, *bias.shape) + bias[None]).reshape(scores.shape)
        return jnp.einsum("bhnm,bhme->bhne", jax.nn.softmax(scores).astype(v.dtype), v, precision=stated)


class Mlp(nn.Module):
    """Linear layer to MLP_RATIO times the width, GELU, linear layer back."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        x = layers.Dense(MLP_RATIO * width, dtype=self.dtype, name="fc1", **INIT)(x)
        return layers.Dense(width, dtype=self.dtype, name="fc2", **INIT)(layers.Activation("gelu")(x))


class Block(nn.Module):
    """(B, …, C) -> the same: x + A(LN(x)), then x + MLP(LN(x)), both under stochastic depth.

    attention: makes A, a module of the same shapes, within the block. remat: saves memory, see `layers.remat`.
    """

    attention: Callable[[], nn.Module]
    drop_path: float
    dtype: Any
    remat: bool
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        def norm(x, number):
            return LayerNorm(self.epsilon, self.dtype, name=f"norm{number}")(x)

        def block(_, x):
            x = x + dropped(self.attention()(norm(x, 1)), self.drop_path, train)
            return x + dropped(Mlp(self.dtype, name="mlp")(norm(x, 2)), self.drop_path, train)

        return layers.remat(block, self.remat and train)(self, x)


class ConvStem(nn.Module):
    """Singh, Croce & Hein (NeurIPS 2023): 3×3 convolutions, each followed by layer norm and GELU, in place of patches.

    widths, strides: of the 3×3 convolutions. out: channels of a final 1×1 convolution; None: there is none.
    """

    widths: tuple[int, ...]
    strides: tuple[int, ...]
    out: int | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i, (width, stride) in enumerate(zip(self.widths, self.strides, strict=True), 1):
            x = layers.Conv(width, 3, stride, use_bias=True, dtype=self.dtype, pixels=i == 1, name=f"embed{i}")(x)
            x = layers.Activation("gelu")(LayerNorm(dtype=self.dtype, name=f"embed_norm{i}")(x))
        if self.out is not None:
            x = layers.Conv(self.out, 1, use_bias=True, dtype=self.dtype, name=f"embed{len(self.widths) + 1}")(x)
        return x


def scaled(module: nn.Module, name: str, x: Array, start: float) -> Array:
    """x times a module's parameter `name` (C,), a layer scale that starts at `start`."""
    gamma = module.param(name, nn.initializers.constant(start), (x.shape[-1],))
    return x * layers.per_channel(gamma, x).astype(x.dtype)


def dropped(x: Array, rate: float, train: bool) -> Array:
    """A residual branch under stochastic depth: in training 0 for an image with probability `rate`."""
    return nn.Dropout(rate, broadcast_dims=tuple(range(1, x.ndim)), deterministic=not train)(x)


def rates(last: float, count: int) -> list[float]:
    """Rates of stochastic depth that rise linearly from 0 at the first block to `last` at the last one."""
    return [last * i / max(count - 1, 1) for i in range(count)]


def heads_of(x: Array, heads: int) -> Array:
    """(B, N, C) -> (B, heads, N, C/heads)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def joined(x: Array) -> Array:
    """(B, heads, N, d) -> (B, N, heads·d), the inverse of `heads_of`."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def qkv(x: Array, heads: int, dtype: Any) -> list[Array]:
    """q, k and v (B, heads, N, d) of tokens (B, N, C) by one linear layer of the calling module."""
    made = layers.Dense(3 * x.shape[-1], dtype=dtype, name="qkv", **INIT)(x)
    return [heads_of(part, heads) for part in jnp.split(made, 3, -1)]


def attention(x: Array, heads: int, dtype: Any, bias: Array | None = None) -> Array:
    """Self-attention of tokens (B, N, C), with linear layers of the calling module; bias: see `Attend`."""
    width = x.shape[-1]
    q, k, v = qkv(x, heads, dtype)
    y = joined(Attend()(q * (width // heads) ** -0.5, k, v, bias=bias))
    return layers.Dense(width, dtype=dtype, name="proj", **INIT)(y)


def tokens_of(x: Array) -> Array:
    """(B, H, W, C) -> (B, H·W, C), rows first."""
    return x.reshape(x.shape[0], -1, x.shape[-1])
