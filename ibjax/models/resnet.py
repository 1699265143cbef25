"""ResNet: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.

Stages of widths 64·(1, 2, 4, 8); basic blocks up to depth 34, and from depth 50 bottlenecks (1×1, 3×3 with the stride,
1×1 to four times the width); projection shortcuts with batch-norm. `inner_width=2` makes the bottlenecks' 3×3
convolutions twice as wide, as in WideResNet-50-2 of torchvision and timm.

| stem       | layers                                                      | initialisation of conv. | as in          |
|------------|-------------------------------------------------------------|-------------------------|----------------|
| "cifar"    | 3×3 convolution, BN, ReLU                                   | PyTorch's default       | pytorch-cifar  |
| "imagenet" | 7×7 convolution with stride 2, BN, ReLU, 3×3 max-pooling    | N(0, 2/(k²·C_out))      | torchvision    |
|            | with stride 2 and padding 1                                 |                         |                |

Taps, all after the ReLU: `stem` (what enters stage 1), `blockN`, `stageN`, `pre_logits`.
"""

from typing import Any

import flax.linen as nn
from jax import Array

from ibjax.errors import InputError, nearest
from ibjax.models import layers, stages

DEPTHS = {**stages.BASIC, 50: (3, 4, 6, 3)}


class Block(nn.Module):
    """relu(x + BN-conv-ReLU-BN-conv(x)); the bottleneck has three convolutions."""

    width: int
    stride: int
    bottleneck: bool
    inner_width: int
    kernel_init: Any
    bn_groups: int
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        def conv_norm(x, width, kernel, stride, suffix, skip=None, activation="relu"):
            conv = layers.Conv(
                width, kernel, stride, kernel_init=self.kernel_init, dtype=self.dtype, name=f"conv{suffix}"
            )
            norm = layers.BatchNorm(groups=self.bn_groups, dtype=self.dtype, name=f"bn{suffix}")
            return layers.normed(x, train, norm, conv=conv, skip=skip, activation=activation)

        width = self.width
        out, last = (4 * width, (1, 1, "3")) if self.bottleneck else (width, (3, 1, "2"))

        def block(_, x):
            if self.bottleneck:
                y = conv_norm(x, self.inner_width * width, 1, 1, "1")
                y = conv_norm(y, self.inner_width * width, 3, self.stride, "2")
            else:
                y = conv_norm(x, width, 3, self.stride, "1")
            if self.stride != 1 or x.shape[-1] != out:
                x = conv_norm(x, out, 1, self.stride, "_shortcut", activation=None)
            return conv_norm(y, out, *last, skip=x)

        return layers.remat(block, self.remat and train)(self, x)


class Model(nn.Module):
    """(B, H, W, C) in [0, 1] -> (logits (B, num_classes), features); num_classes None: (pre_logits, features).

    depth: 10, 18, 34 or 50. blocks: number of blocks in each stage, in place of the depth's default. inner_width: a
    factor on the width of a bottleneck's first two convolutions. remat: saves memory, see `layers.remat`.
    """

    num_classes: int | None
    depth: int = 18
    width: int = 64
    blocks: tuple[int, ...] | None = None
    stem: str = "cifar"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    bn_groups: int = 1
    dtype: str = "float32"
    remat: bool = False
    inner_width: int = 1

    @nn.compact
    def __call__(
        self, x: Array, train: bool = False, edits: layers.Edits | layers.Taps | None = None
    ) -> tuple[Array, dict[str, Array]]:
        if self.stem not in ("cifar", "imagenet"):
            raise InputError(f"model.stem '{self.stem}' is unknown; {nearest(self.stem, ('cifar', 'imagenet'))}")
        if self.inner_width < 1 or (self.inner_width > 1 and self.depth < 50):
            raise InputError(f"model.inner_width={self.inner_width}: give 1 or more, and 1 for depths below 50")
        counts = stages.block_counts("resnet", self.depth, self.blocks, DEPTHS)
        dtype, tap = layers.compute_dtype(self.dtype), layers.Taps(edits)
        imagenet = self.stem == "imagenet"
        kernel_init = layers.fan_out_normal if imagenet else layers.torch_uniform
        kernel, stride = (7, 2) if imagenet else (3, 1)
        x = layers.normalize(x, self.mean, self.std)
        stem = layers.Conv(self.width, kernel, stride, kernel_init=kernel_init, dtype=dtype, pixels=True, name="stem")
        norm = layers.BatchNorm(groups=self.bn_groups, dtype=dtype, name="bn_stem")
        x = layers.normed(x, train, norm, conv=stem, activation="relu", packs=not imagenet and self.depth < 50)
        x = tap("stem", layers.MaxPool(3, 2, 1)(x) if imagenet else x)

        def block(x, see, **place):
            return Block(
                bottleneck=self.depth >= 50,
                inner_width=self.inner_width,
                kernel_init=kernel_init,
                bn_groups=self.bn_groups,
                dtype=dtype,
                remat=self.remat,
                **place,
            )(x, train)

        x, _ = stages.through(x, tap, counts, self.width, block)
        x = tap("pre_logits", layers.GlobalAverage()(x))
        return layers.classifier(x, self.num_classes), tap.finish()
