"""Pre-activation ResNet: He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016, in its CIFAR form.

A 3×3 stem without batch-norm, basic blocks BN-ReLU-conv-BN-ReLU-conv, average pooling. Published implementations differ
in the following points, and weights trained with one give other logits in another:

| projection | the projection shortcut is | strided 3×3 convolutions pad | used by                             |
|------------|----------------------------|------------------------------|-------------------------------------|
| activated  | 1×1 of ReLU(BN(x))         | (1, 1)                       | Rice et al., pytorch-cifar,         |
|            |                            |                              | RobustBench's PreActBlockV2         |
| raw        | 1×1 of x                   | (1, 1)                       | Wong et al., RobustBench's          |
|            |                            |                              | PreActBlock                         |
| deepmind   | 3×3 of x                   | (0, 1), TensorFlow's SAME    | Rebuffi et al. (with `activation=   |
|            |                            |                              | "silu"`, mean and std)              |

`final_norm` adds BN and ReLU before the pooling, as in Rice et al. and Rebuffi et al.; pytorch-cifar has neither. Under
"deepmind" batch-norm keeps 0.99 of its running statistics in each step, otherwise 0.9.

| tap                     | feature                                                                                    |
|-------------------------|--------------------------------------------------------------------------------------------|
| `stem`                  | output of the first convolution                                                            |
| `blockN`                | output of block N, the sum of shortcut and residual                                        |
| `blockN_relu`           | the same after the following BN-ReLU: the input of the next block's convolutions           |
| `stageN`, `stageN_relu` | those of the last block of stage N                                                         |
| `pre_logits`            | after the pooling                                                                          |

Without `final_norm` the last block has no `_relu` tap. Convolutions and the linear layer have PyTorch's default
initialisation.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from jax import Array

from ibjax.errors import InputError, nearest
from ibjax.models import layers, stages

PROJECTIONS = ("activated", "raw", "deepmind")
DEPTHS = stages.BASIC


def _keep(projection):
    return 0.99 if projection == "deepmind" else 0.9


class Block(nn.Module):
    """x -> x + residual; `see` taps the activated input, as the `_relu` feature of the previous block."""

    width: int
    stride: int
    projection: str
    activation: str
    bn_groups: int
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, x: Array, train: bool, see: Callable[[Array], Array]) -> Array:
        def activated(x, name, conv=None):
            norm = layers.BatchNorm(_keep(self.projection), groups=self.bn_groups, dtype=self.dtype, name=name)
            return layers.normed(x, train, norm, conv=conv, activation=self.activation)

        def conv(stride, name, kernel=3):
            same = (0, 1) if self.projection == "deepmind" and stride == 2 else None
            return layers.Conv(self.width, kernel, stride, same, dtype=self.dtype, name=name)

        def residual(_, x, seen):
            y = activated(seen, "bn2", conv(self.stride, "conv1"))
            second = conv(1, "conv2")
            if self.stride != 1 or x.shape[-1] != self.width:
                shortcut = conv(self.stride, "shortcut", 3 if self.projection == "deepmind" else 1)
                x = layers.normed(seen if self.projection == "activated" else x, train, None, conv=shortcut)
            return layers.normed(y, train, None, conv=second, skip=x)

        return layers.remat(residual, self.remat and train)(self, x, see(activated(x, "bn1")))


class Model(nn.Module):
    """(B, H, W, C) in [0, 1] -> (logits (B, num_classes), features); num_classes None: (pre_logits, features).

    depth: 10, 18 or 34; or give `blocks`, the number of blocks of each stage (stages after the first halve the
    resolution and double the width). width: channels of the first stage. projection, final_norm: see above. border:
    width of a border of zeros around the image, added before normalisation. remat: saves memory, see `layers.remat`.
    """

    num_classes: int | None
    depth: int = 18
    width: int = 64
    blocks: tuple[int, ...] | None = None
    projection: str = "activated"
    final_norm: bool = True
    activation: str = "relu"
    mean: tuple[float, ...] | None = None  # the authors' networks do not normalise
    std: tuple[float, ...] | None = None
    bn_groups: int = 1
    dtype: str = "float32"
    remat: bool = False
    border: int = 0

    @nn.compact
    def __call__(
        self, x: Array, train: bool = False, edits: layers.Edits | layers.Taps | None = None
    ) -> tuple[Array, dict[str, Array]]:
        if self.projection not in PROJECTIONS:
            raise InputError(
                f"model.projection '{self.projection}' is unknown; {nearest(self.projection, PROJECTIONS)}"
            )
        counts = stages.block_counts("preact_resnet", self.depth, self.blocks, DEPTHS)
        dtype, tap = layers.compute_dtype(self.dtype), layers.Taps(edits)
        x = layers.normalize(layers.zero_border(x, self.border), self.mean, self.std)
        stem = layers.Conv(self.width, dtype=dtype, pixels=True, name="stem")
        x = tap("stem", layers.normed(x, train, None, conv=stem, packs=True))

        def block(x, see, **place):
            return Block(
                projection=self.projection,
                activation=self.activation,
                bn_groups=self.bn_groups,
                dtype=dtype,
                remat=self.remat,
                **place,
            )(x, train, see)

        x, see = stages.through(x, tap, counts, self.width, block)
        if self.final_norm:
            norm = layers.BatchNorm(_keep(self.projection), groups=self.bn_groups, dtype=dtype, name="bn")
            x = see(layers.normed(x, train, norm, activation=self.activation))
        x = tap("pre_logits", layers.GlobalAverage()(x))
        return layers.classifier(x, self.num_classes), tap.finish()
