"""ConvNeXt: Liu et al., "A ConvNet for the 2020s", CVPR 2022; with the ConvStem of Singh, Croce & Hein, NeurIPS 2023.

    block:        x + γ · W₂ GELU(W₁ LN(conv_7×7^depthwise(x)))         W₁ to four times the width, γ starts at 1e-6
    downsampling: LN, then a 2×2 convolution with stride 2              before each stage but the first
    head:         spatial mean, LN, linear layer

Stages have widths width·(1, 2, 4, 8). Logits equal timm's.

| size | depth | blocks         | width |
|------|-------|----------------|-------|
| T    | 18    | (3, 3, 9, 3)   | 96    |
| S    | 36    | (3, 3, 27, 3)  | 96    |
| B    | 36    | (3, 3, 27, 3)  | 128   |
| L    | 36    | (3, 3, 27, 3)  | 192   |

| stem       | layers                                                                       | as in             |
|------------|------------------------------------------------------------------------------|-------------------|
| "patch"    | 4×4 convolution with stride 4, LN                                            | Liu et al.        |
| "convstem" | T, S: 3×3 convolutions to w/2 and w, both with stride 2                      | Singh et al.      |
|            | B, L: 3×3 convolutions to w/2, 3w/4 and w with strides 2, 2, 1               |                   |
|            | each followed by LN and GELU                                                 |                   |

Taps: `stem` (what enters stage 1), `blockN`, `stageN`, `pre_logits`.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ibjax.errors import InputError, check_range
from ibjax.models import layers, patches, stages

DEPTHS = {18: (3, 3, 9, 3), 36: (3, 3, 27, 3)}
WIDE = 128  # from this width on, the ConvStem has three convolutions


class Block(nn.Module):
    """x + γ · MLP(LN(depthwise convolution of x)), under stochastic depth."""

    layer_scale: float
    drop_path: float
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        def block(module, x):
            width = x.shape[-1]
            conv = layers.Conv(width, 7, use_bias=True, groups=width, dtype=self.dtype, name="conv_dw", **patches.INIT)
            y = patches.LayerNorm(dtype=self.dtype, name="norm")(conv(x))
            y = patches.Mlp(dtype=self.dtype, name="mlp")(y)
            y = patches.scaled(module, "gamma", y, self.layer_scale)
            return x + patches.dropped(y, self.drop_path, train)

        return layers.remat(block, self.remat and train)(self, x)


class Downsample(nn.Module):
    """LN, then a 2×2 convolution with stride 2."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = patches.LayerNorm(dtype=self.dtype, name="down_norm")(x)
        conv = layers.Conv(self.width, 2, 2, padding=0, use_bias=True, dtype=self.dtype, name="down", **patches.INIT)
        return conv(x)


class Model(nn.Module):
    """(B, H, W, C) in [0, 1] -> (logits (B, num_classes), features); num_classes None: (pre_logits, features).

    depth: 18 or 36. blocks: number of blocks in each stage, in place of the depth's default. layer_scale: where γ
    starts. drop_path: rate of stochastic depth in the last block; it rises linearly from 0. remat: saves memory, see
    `layers.remat`.
    """

    num_classes: int | None
    depth: int = 18
    width: int = 96
    blocks: tuple[int, ...] | None = None
    stem: str = "patch"
    layer_scale: float = 1e-6
    drop_path: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    dtype: str = "float32"
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: Array, train: bool = False, edits: layers.Edits | layers.Taps | None = None
    ) -> tuple[Array, dict[str, Array]]:
        patches.check_stem(self.stem)
        check_range("model.drop_path", self.drop_path, 0, 1, below=True)
        counts = stages.block_counts("convnext", self.depth, self.blocks, DEPTHS)
        dtype, tap = layers.compute_dtype(self.dtype), layers.Taps(edits)
        if min(x.shape[1:3]) < 4 * 2 ** (len(counts) - 1):
            raise InputError(f"convnext: images of {x.shape[1:3]} pixels are too small for {len(counts)} stages")
        x = self._stem(layers.normalize(x, self.mean, self.std), dtype)
        x, rates = tap("stem", x), patches.rates(self.drop_path, sum(counts))

        def block(x, stage, i, number):
            if stage > 1 and i == 0:
                x = Downsample(self.width * 2 ** (stage - 1), dtype, name=f"downsample{stage}")(x)
            rate = rates[number - 1]
            return Block(self.layer_scale, rate, dtype, self.remat, name=f"block{number}")(x, train)

        x = stages.in_turn(x, tap, counts, block)
        x = patches.LayerNorm(name="norm_head")(layers.GlobalAverage()(x))
        return layers.classifier(tap("pre_logits", x), self.num_classes, **patches.INIT), tap.finish()

    def _stem(self, x, dtype):
        if self.stem == "convstem":
            return patches.ConvStem(*stem_plan(self.width), dtype=dtype, name="stem")(x)
        options = dict(padding=0, use_bias=True, dtype=dtype, pixels=True, **patches.INIT)
        x = layers.Conv(self.width, 4, 4, name="stem", **options)(x)
        return patches.LayerNorm(dtype=jnp.dtype(dtype), name="norm_stem")(x)


def stem_plan(width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(widths, strides) of the ConvStem's convolutions before stages of this width."""
    if width < WIDE:
        return (width // 2, width), (2, 2)
    return (width // 2, width // 4 * 3, width), (2, 2, 1)
