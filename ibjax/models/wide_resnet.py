"""Wide residual networks: Zagoruyko & Komodakis, BMVC 2016, as TRADES, MART and RobustBench have them.

Pre-activation, three stages of (depth − 4) / 6 blocks with widths 16·width·(1, 2, 4), 3×3 stem of 16 channels.
The projection shortcut sees the activated input; where input and output widths agree, the raw one is added.
Convolutions start from N(0, 2/(k²·C_out)), linear biases from zero.

Taps: as `preact_resnet`: `stem`, `blockN`, `blockN_relu`, `stageN`, `stageN_relu`, `pre_logits`.
"""

from typing import Any

import flax.linen as nn
from jax import Array

from ibjax.errors import InputError, check_range
from ibjax.models import layers
from ibjax.models.preact_resnet import stage_taps


class Block(nn.Module):
    """x -> (activated x, x + residual); dropout stands between the two convolutions."""

    width: int
    stride: int
    dropout: float
    bn_groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> tuple[Array, Array]:
        def norm(name):
            return layers.BatchNorm(groups=self.bn_groups, dtype=self.dtype, name=name)

        def conv(stride, name, kernel=3):
            return layers.Conv(
                self.width, kernel, stride, kernel_init=layers.fan_out_normal, dtype=self.dtype, name=name
            )

        activated = nn.relu(norm("bn1")(x, train))
        y = conv(self.stride, "conv1")(activated)
        y = nn.relu(norm("bn2")(y, train))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        y = conv(1, "conv2")(y)
        if x.shape[-1] != self.width:
            x = conv(self.stride, "shortcut", kernel=1)(activated)
        return activated, x + y


class Model(nn.Module):
    """(B, H, W, C) in [0, 1] -> (logits (B, num_classes), features); depth = 6n + 4."""

    num_classes: int
    depth: int = 34
    width: int = 10
    dropout: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    bn_groups: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> tuple[Array, dict[str, Array]]:
        count, remainder = divmod(self.depth - 4, 6)
        if remainder or count < 1:
            raise InputError(f"wide_resnet has no depth {self.depth}; allowed: 6n + 4, as 10, 16, 28, 34, 70")
        check_range("model.dropout", self.dropout, 0, 1, below=True)
        dtype = layers.compute_dtype(self.dtype)
        x = layers.normalize(x, self.mean, self.std)
        x = layers.Conv(16, kernel_init=layers.fan_out_normal, name="stem")(x).astype(dtype)
        features = {"stem": x}
        stage_ends, index = {}, 0
        for stage in (1, 2, 3):
            for i in range(count):
                stride = 2 if stage > 1 and i == 0 else 1
                activated, x = Block(
                    16 * self.width * 2 ** (stage - 1),
                    stride,
                    self.dropout,
                    self.bn_groups,
                    dtype,
                    name=f"block{index + 1}",
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
        return layers.Dense(self.num_classes, bias_init=nn.initializers.zeros, name="head")(x), features
