"""Pre-activation ResNet: He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016, in its CIFAR form.

As Rice et al. and most adversarial-training code have it: a 3×3 stem without batch-norm, basic blocks
BN-ReLU-conv-BN-ReLU-conv whose projection shortcut sees the activated input, a final BN-ReLU and average pooling.

Taps: `stem`; `blockN`, the sum that leaves block N; `blockN_relu`, the same after the BN-ReLU that follows it
(what the next block's convolutions see); `stageN`, `stageN_relu` the last block of a stage; `pre_logits`.
"""

from typing import Any

import flax.linen as nn
from jax import Array

from ibjax.errors import InputError
from ibjax.models import layers

DEPTHS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


class Block(nn.Module):
    """x -> (activated x, x + residual); the activated input is the tap of the block before."""

    width: int
    stride: int
    bn_groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> tuple[Array, Array]:
        def norm(name):
            return layers.BatchNorm(groups=self.bn_groups, dtype=self.dtype, name=name)

        def conv(stride, name, kernel=3):
            return layers.Conv(self.width, kernel, stride, dtype=self.dtype, name=name)

        activated = nn.relu(norm("bn1")(x, train))
        y = conv(self.stride, "conv1")(activated)
        y = conv(1, "conv2")(nn.relu(norm("bn2")(y, train)))
        if self.stride != 1 or x.shape[-1] != self.width:
            x = conv(self.stride, "shortcut", kernel=1)(activated)
        return activated, x + y


class Model(nn.Module):
    """(B, H, W, C) in [0, 1] -> (logits (B, num_classes), features).

    depth: 10, 18 or 34; or give `blocks`, the number of blocks of each stage (stages after the first halve the
    image and double the width). width: channels of the first stage.
    """

    num_classes: int
    depth: int = 18
    width: int = 64
    blocks: tuple[int, ...] | None = None
    mean: tuple[float, ...] | None = None  # the authors' networks do not normalise
    std: tuple[float, ...] | None = None
    bn_groups: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> tuple[Array, dict[str, Array]]:
        counts = block_counts("preact_resnet", self.depth, self.blocks)
        dtype = layers.compute_dtype(self.dtype)
        x = layers.normalize(x, self.mean, self.std)
        x = layers.Conv(self.width, name="stem")(x).astype(dtype)
        features = {"stem": x}
        stage_ends, index = {}, 0
        for stage, count in enumerate(counts, 1):
            for i in range(count):
                stride = 2 if stage > 1 and i == 0 else 1
                activated, x = Block(
                    self.width * 2 ** (stage - 1), stride, self.bn_groups, dtype, name=f"block{index + 1}"
                )(x, train)
                features["stem_relu" if index == 0 else f"block{index}_relu"] = activated
                index += 1
                features[f"block{index}"] = x
            stage_ends[stage] = index
        x = nn.relu(layers.BatchNorm(groups=self.bn_groups, dtype=dtype, name="bn")(x, train))
        features[f"block{index}_relu"] = x
        features |= stage_taps(features, stage_ends)
        x = layers.global_average(x)
        features["pre_logits"] = x
        return layers.Dense(self.num_classes, name="head")(x), features


def block_counts(name: str, depth: int, blocks: tuple[int, ...] | None) -> tuple[int, ...]:
    """The number of blocks of each stage; raises InputError on a depth or a list that there is not."""
    if blocks is None and depth in DEPTHS:
        return DEPTHS[depth]
    if blocks and min(blocks) >= 1:
        return blocks
    given = f"depth {depth}" if blocks is None else f"blocks {blocks}"
    raise InputError(f"{name} has no {given}; allowed: depth {sorted(DEPTHS)}, or blocks as (2, 2, 2, 2)")


def stage_taps(features: dict[str, Array], stage_ends: dict[int, int]) -> dict[str, Array]:
    """`stageN` and, for pre-activation networks, `stageN_relu`: the taps of each stage's last block."""
    return {
        f"stage{stage}{suffix}": features[f"block{block}{suffix}"]
        for stage, block in stage_ends.items()
        for suffix in ("", "_relu")
        if f"block{block}{suffix}" in features
    }
