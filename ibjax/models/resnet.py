"""ResNet: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, in its CIFAR form (basic blocks).

A 3×3 stem with batch-norm and ReLU, stages of widths 64·(1, 2, 4, 8), projection shortcuts with batch-norm.

Taps, all after the ReLU: `stem`, `blockN`, `stageN`, `pre_logits`.
"""

from typing import Any

import flax.linen as nn
from jax import Array

from ibjax.models import layers
from ibjax.models.preact_resnet import block_counts, stage_taps


class Block(nn.Module):
    """relu(x + BN-conv-ReLU-BN-conv(x))."""

    width: int
    stride: int
    bn_groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        def conv_norm(x, stride, suffix, kernel=3):
            x = layers.Conv(self.width, kernel, stride, dtype=self.dtype, name=f"conv{suffix}")(x)
            return layers.BatchNorm(groups=self.bn_groups, dtype=self.dtype, name=f"bn{suffix}")(x, train)

        y = conv_norm(nn.relu(conv_norm(x, self.stride, "1")), 1, "2")
        if self.stride != 1 or x.shape[-1] != self.width:
            x = conv_norm(x, self.stride, "_shortcut", kernel=1)
        return nn.relu(x + y)


class Model(nn.Module):
    """(B, H, W, C) in [0, 1] -> (logits (B, num_classes), features); depth 10, 18 or 34, or `blocks` per stage."""

    num_classes: int
    depth: int = 18
    width: int = 64
    blocks: tuple[int, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    bn_groups: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> tuple[Array, dict[str, Array]]:
        counts = block_counts("resnet", self.depth, self.blocks)
        dtype = layers.compute_dtype(self.dtype)
        x = layers.normalize(x, self.mean, self.std)
        x = layers.Conv(self.width, name="stem")(x).astype(dtype)
        x = nn.relu(layers.BatchNorm(groups=self.bn_groups, dtype=dtype, name="bn_stem")(x, train))
        features = {"stem": x}
        stage_ends, index = {}, 0
        for stage, count in enumerate(counts, 1):
            for i in range(count):
                index += 1
                x = Block(
                    self.width * 2 ** (stage - 1),
                    2 if stage > 1 and i == 0 else 1,
                    self.bn_groups,
                    dtype,
                    name=f"block{index}",
                )(x, train)
                features[f"block{index}"] = x
            stage_ends[stage] = index
        features |= stage_taps(features, stage_ends)
        x = layers.global_average(x)
        features["pre_logits"] = x
        return layers.Dense(self.num_classes, name="head")(x), features
