"""Vision transformer: Dosovitskiy et al., ICLR 2021; with the ConvStem of Singh, Croce & Hein, NeurIPS 2023.

    tokens  z = [class; patches] + positions                       learnt class token and positions
    block:  z + W Attn(LN(z)),  then  z + MLP(LN(z))               Attn: softmax(q kᵀ / √d) v in each head
    head:   linear layer on the class token of LN(z)

Logits equal timm's, whose DeiT without distillation is this network.

| size | depth | width | heads |
|------|-------|-------|-------|
| S    | 12    | 384   | 6     |
| B    | 12    | 768   | 12    |

| stem       | layers                                                                            | as in              |
|------------|-----------------------------------------------------------------------------------|--------------------|
| "patch"    | one convolution, kernel and stride `patch`                                        | Dosovitskiy et al. |
| "convstem" | 3×3 convolutions with stride 2 to 48, 96, 192, 384 channels, each followed by LN  | Singh et al.       |
|            | and GELU; then 1×1 to the width: patches of 16 pixels. 48 is `stem_width`         |                    |

The positions have the size of the images with which the network is initialised; it takes no other size.

Taps: `stem`, `blockN` (B, H/patch, W/patch, C), the patch tokens as a map, so that methods treat them as other
networks' features; `stem_class`, `blockN_class` (B, C), the class token; `pre_logits`. There are no stages.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ibjax.errors import InputError, check_range
from ibjax.models import layers, patches

HEAD = 64  # channels of a head where the number of heads is not given
CONVSTEM_PATCH = 16  # four convolutions of stride 2


class Attention(nn.Module):
    """W softmax(q kᵀ / √d) v over all tokens (B, N, C), with one linear layer for q, k and v."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return patches.attention(x, self.heads, self.dtype)


class Model(nn.Module):
    """(B, H, W, C) in [0, 1] -> (logits (B, num_classes), features); num_classes None: (pre_logits, features).

    heads: None: one for each 64 channels. patch: side of the patches in pixels, 16 with `stem="convstem"`. stem_width:
    channels of the ConvStem's first convolution. drop_path: rate of stochastic depth in the last block; it rises
    linearly from 0. remat: saves memory, see `layers.remat`.
    """

    num_classes: int | None
    depth: int = 12
    width: int = 384
    heads: int | None = None
    patch: int = 16
    stem: str = "patch"
    stem_width: int = 48
    drop_path: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    dtype: str = "float32"
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: Array, train: bool = False, edits: layers.Edits | layers.Taps | None = None
    ) -> tuple[Array, dict[str, Array]]:
        heads = self._check(x)
        dtype, tap = layers.compute_dtype(self.dtype), layers.Taps(edits)
        x = self._stem(layers.normalize(x, self.mean, self.std), dtype).astype(dtype)
        shape, tokens = x.shape, patches.tokens_of(x)
        first = self.param("cls_token", nn.initializers.normal(1e-6), (1, 1, self.width))
        positions = self.param("pos_embed", nn.initializers.normal(0.02), (1, 1 + tokens.shape[1], self.width))
        first = jnp.broadcast_to(first.astype(dtype), (shape[0], 1, self.width))
        tokens = jnp.concatenate([first, tokens], 1) + positions.astype(dtype)
        tokens = self._tap(tap, "stem", tokens, shape)
        for i, rate in enumerate(patches.rates(self.drop_path, self.depth), 1):
            attention = functools.partial(Attention, heads, dtype, name="attn")
            tokens = patches.Block(attention, rate, dtype, self.remat, name=f"block{i}")(tokens, train)
            tokens = self._tap(tap, f"block{i}", tokens, shape)
        x = tap("pre_logits", patches.LayerNorm(name="norm")(tokens[:, 0]))
        return layers.classifier(x, self.num_classes, **patches.INIT), tap.finish()

    def _check(self, x):
        """The number of heads."""
        patches.check_stem(self.stem)
        check_range("model.drop_path", self.drop_path, 0, 1, below=True)
        if self.stem == "convstem" and self.patch != CONVSTEM_PATCH:
            raise InputError(f"model.patch={self.patch}: the convstem makes patches of {CONVSTEM_PATCH}; leave it out")
        patches.check_sides("vit", x, self.patch)
        return patches.heads_for(self.width, self.heads, HEAD)

    def _stem(self, x, dtype):
        if self.stem == "convstem":
            widths = tuple(self.stem_width * 2**i for i in range(4))
            return patches.ConvStem(widths, (2,) * 4, self.width, dtype, name="stem")(x)
        options = dict(padding=0, use_bias=True, dtype=dtype, pixels=True)
        return layers.Conv(self.width, self.patch, self.patch, name="stem", **options)(x)

    def _tap(self, tap, name, tokens, shape):
        """The tokens (B, 1 + N, C) after the edits of their class token and of their map (B, H, W, C)."""
        first = tap(f"{name}_class", tokens[:, 0])
        rest = tap(name, tokens[:, 1:].reshape(shape))
        return jnp.concatenate([first[:, None], patches.tokens_of(rest)], 1)
