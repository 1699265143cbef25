"""XCiT, cross-covariance image transformer: El-Nouby et al., NeurIPS 2021.

    block:  x + γ₁ XCA(LN(x)),  then  x + γ₃ LPI(LN(x)),  then  x + γ₂ MLP(LN(x))
    XCA:    v softmax(τ · k̂ᵀ q̂) over the channels of each head; q̂, k̂: every channel divided by its norm over the
            tokens, or by 1e-12; τ: a learnt factor of each head
    LPI:    3×3 depthwise convolution, GELU, BN, 3×3 depthwise convolution
    class blocks: the class token attends to all tokens (CaiT); LN of all tokens; MLP of the class token
    head:   linear layer on the class token of LN(x)

Logits equal timm's (with `tokens_norm`, as in its networks from S on), and those of Debenedetti, Sehwag & Mittal (SaTML
2023), who train it robustly.

| size | depth | width | heads |
|------|-------|-------|-------|
| S12  | 12    | 384   | 8     |
| M12  | 12    | 512   | 8     |
| L12  | 12    | 768   | 16    |

Patches are made by 3×3 convolutions to w/8, w/4, w/2, w with BN, and GELU between them; their strides are (2, 2, 2, 2)
for patches of 16 pixels, (1, 1, 2, 2) for those of 4, as on CIFAR. Positions are a linear layer on sines and cosines
of the coordinates, so that images may have any size.

Taps: `stem` (patches with positions) and `blockN` (B, H, W, C), before the class token joins; `pre_logits`.
"""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from ibjax.errors import InputError, check_range
from ibjax.models import layers, patches

STRIDES = {16: (2, 2, 2, 2), 4: (1, 1, 2, 2)}  # side of a patch -> strides of the convolutions
WAVES = 32  # sines and cosines of each coordinate
_SMALLEST = 1e-12  # least norm by which a channel is divided, PyTorch's


class Stem(nn.Module):
    """(B, H, W, C) -> (B, H/patch, W/patch, width)."""

    width: int
    strides: tuple[int, ...]
    bn_groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        for i, stride in enumerate(self.strides, 1):
            width = self.width // 2 ** (len(self.strides) - i)
            conv = layers.Conv(width, 3, stride, dtype=self.dtype, pixels=i == 1, name=f"embed{i}")
            norm = layers.BatchNorm(groups=self.bn_groups, dtype=self.dtype, name=f"embed_norm{i}")
            activation = "gelu" if i < len(self.strides) else None
            x = layers.normed(x, train, norm, conv=conv, activation=activation)
        return x


class CrossCovariance(nn.Module):
    """Attention between the channels of each head, over all tokens (B, N, C)."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        q, k, v = (part.swapaxes(2, 3) for part in patches.qkv(x, self.heads, self.dtype))  # (B, heads, d, N)
        tau = self.param("temperature", nn.initializers.ones, (self.heads, 1, 1))
        y = patches.Attend()(_unit(q) * tau[None].astype(q.dtype), _unit(k), v)
        y = patches.joined(y.swapaxes(2, 3))
        return layers.Dense(width, dtype=self.dtype, name="proj", **patches.INIT)(y)


def _unit(x):
    """Each channel (…, N) divided by its norm over the tokens; its gradient is finite at 0."""
    wide = x.astype(jnp.float32)
    square = jnp.sum(jnp.square(wide), -1, keepdims=True)
    return (wide / jnp.sqrt(jnp.maximum(square, _SMALLEST**2))).astype(x.dtype)


class Local(nn.Module):
    """Local patch interaction of (B, H, W, C): 3×3 depthwise convolution, GELU, BN, 3×3 depthwise convolution."""

    bn_groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        options = dict(use_bias=True, groups=x.shape[-1], dtype=self.dtype)
        x = layers.Activation("gelu")(layers.Conv(x.shape[-1], 3, name="conv1", **options)(x))
        x = layers.BatchNorm(groups=self.bn_groups, dtype=self.dtype, name="bn")(x, train)
        return layers.Conv(x.shape[-1], 3, name="conv2", **options)(x)


class Block(nn.Module):
    """(B, H, W, C) -> the same."""

    heads: int
    layer_scale: float
    drop_path: float
    bn_groups: int
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        def norm(x, number):
            return patches.LayerNorm(dtype=self.dtype, name=f"norm{number}")(x)

        def add(module, x, y, number):
            y = patches.scaled(module, f"gamma{number}", y.reshape(x.shape), self.layer_scale)
            return x + patches.dropped(y, self.drop_path, train)

        def block(module, x):
            attention = CrossCovariance(self.heads, self.dtype, name="attn")
            x = add(module, x, attention(patches.tokens_of(norm(x, 1))), 1)
            x = add(module, x, Local(self.bn_groups, self.dtype, name="local")(norm(x, 3), train), 3)
            return add(module, x, patches.Mlp(self.dtype, name="mlp")(norm(x, 2)), 2)

        return layers.remat(block, self.remat and train)(self, x)


class ClassBlock(nn.Module):
    """(B, 1 + N, C) -> the same: the class token collects from all tokens; LN and the factors act on all of them."""

    heads: int
    layer_scale: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        seen = patches.LayerNorm(dtype=self.dtype, name="norm1")(x)
        found = ClassAttention(self.heads, self.dtype, name="attn")(seen)
        x = x + patches.scaled(self, "gamma1", jnp.concatenate([found, seen[:, 1:]], 1), self.layer_scale)
        x = patches.LayerNorm(dtype=self.dtype, name="norm2")(x)
        first = patches.scaled(self, "gamma2", patches.Mlp(self.dtype, name="mlp")(x[:, :1]), self.layer_scale)
        return x + jnp.concatenate([first, x[:, 1:]], 1)


class ClassAttention(nn.Module):
    """(B, 1 + N, C) -> (B, 1, C): what the class token collects from all tokens."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]

        def linear(x, name):
            return layers.Dense(width, dtype=self.dtype, name=name, **patches.INIT)(x)

        q, k, v = (
            patches.heads_of(linear(part, name), self.heads) for part, name in ((x[:, :1], "q"), (x, "k"), (x, "v"))
        )
        return linear(patches.joined(patches.Attend()(q * (width // self.heads) ** -0.5, k, v)), "proj")


class Model(nn.Module):
    """(B, H, W, C) in [0, 1] -> (logits (B, num_classes), features); num_classes None: (pre_logits, features).

    patch: 16 or 4 pixels. class_depth: number of class blocks. layer_scale: where all γ start. drop_path: rate of
    stochastic depth, equal in all blocks; class blocks have none. remat: saves memory, see `layers.remat`.
    """

    num_classes: int | None
    depth: int = 12
    width: int = 384
    heads: int = 8
    patch: int = 16
    class_depth: int = 2
    layer_scale: float = 1.0
    drop_path: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    bn_groups: int = 1
    dtype: str = "float32"
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: Array, train: bool = False, edits: layers.Edits | layers.Taps | None = None
    ) -> tuple[Array, dict[str, Array]]:
        if self.patch not in STRIDES:
            raise InputError(f"model.patch={self.patch} is not allowed; give {' or '.join(map(str, STRIDES))}")
        if self.width % 8:
            raise InputError(f"model.width={self.width} is not allowed; give a multiple of 8")
        check_range("model.drop_path", self.drop_path, 0, 1, below=True)
        patches.check_sides("xcit", x, self.patch)
        patches.check_heads(self.width, self.heads)
        dtype, tap = layers.compute_dtype(self.dtype), layers.Taps(edits)
        x = layers.normalize(x, self.mean, self.std)
        x = Stem(self.width, STRIDES[self.patch], self.bn_groups, dtype, name="stem")(x, train)
        waves = jnp.asarray(positions(*x.shape[1:3]))[None]
        x = tap("stem", x + layers.Conv(self.width, 1, use_bias=True, dtype=dtype, name="position")(waves))
        for i in range(1, self.depth + 1):
            block = Block(
                self.heads, self.layer_scale, self.drop_path, self.bn_groups, dtype, self.remat, name=f"block{i}"
            )
            x = tap(f"block{i}", block(x, train))
        first = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, self.width)).astype(dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, self.width)), patches.tokens_of(x)], 1)
        for i in range(1, self.class_depth + 1):
            x = ClassBlock(self.heads, self.layer_scale, dtype, name=f"class_block{i}")(x)
        x = tap("pre_logits", patches.LayerNorm(name="norm")(x[:, 0]))
        return layers.classifier(x, self.num_classes, **patches.INIT), tap.finish()


def positions(height: int, width: int) -> np.ndarray:
    """(height, width, 2·WAVES) float32: sines and cosines of rows, then of columns, numbered from 1 and scaled to 2π.

    Neighbours 2i and 2i + 1 are sin and cos of the same wave, of the coordinate divided by 10000^(2i / WAVES).
    """

    def waves(count):
        place = np.arange(1, count + 1, dtype=np.float32) / (count + 1e-6) * 2 * math.pi
        angle = place[:, None] / 10000 ** (np.arange(0, WAVES, 2) / WAVES)  # (count, WAVES/2)
        return np.stack([np.sin(angle), np.cos(angle)], -1).reshape(count, WAVES).astype(np.float32)

    rows, columns = waves(height)[:, None], waves(width)[None]
    shape = (height, width, WAVES)
    return np.concatenate([np.broadcast_to(rows, shape), np.broadcast_to(columns, shape)], -1)
