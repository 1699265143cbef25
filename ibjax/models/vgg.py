"""VGG with batch-norm: Simonyan & Zisserman, ICLR 2015, in the CIFAR form that IB-RAR trains (VGG16-BN).

Five groups of 3×3 convolutions (biased) – BN – ReLU, each group followed by 2×2 max-pooling; global average; two
linear layers of 4096 – BN – ReLU; the final linear layer. All start as PyTorch's default.

Taps: `convN` (after the ReLU); `stage1` … `stage5` (after the pooling), `fc1`, `fc2`: these are IB-RAR's seven;
`pre_logits`, which is `fc2`.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ibjax.errors import InputError
from ibjax.models import layers

# how many convolutions each group has; their widths are WIDTHS times `width`
DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
WIDTHS = (1, 2, 4, 8, 8)


class Model(nn.Module):
    """(B, H, W, C) in [0, 1] -> (logits (B, num_classes), features); num_classes None: (pre_logits, features).

    depth: 11, 13, 16 or 19. width: channels of the first group. hidden: widths of the linear layers between.
    """

    num_classes: int | None
    depth: int = 16
    width: int = 64
    hidden: tuple[int, ...] = (4096, 4096)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    bn_groups: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Array, train: bool = False, edits: layers.Edits | layers.Taps | None = None
    ) -> tuple[Array, dict[str, Array]]:
        if self.depth not in DEPTHS:
            raise InputError(f"vgg has no depth {self.depth}; allowed: {sorted(DEPTHS)}")
        dtype, tap = layers.compute_dtype(self.dtype), layers.Taps(edits)

        def norm_relu(x, name):
            return layers.Activation()(layers.BatchNorm(groups=self.bn_groups, dtype=dtype, name=name)(x, train))

        x = layers.normalize(x, self.mean, self.std)
        index = 0
        for stage, (count, factor) in enumerate(zip(DEPTHS[self.depth], WIDTHS, strict=True), 1):
            for _ in range(count):
                index += 1
                first = jnp.float32 if index == 1 else dtype  # it sees pixels: see layers.py
                conv = layers.Conv(self.width * factor, use_bias=True, dtype=first, name=f"conv{index}")
                x = tap(f"conv{index}", norm_relu(conv(x).astype(dtype), f"bn{index}"))
            x = tap(f"stage{stage}", layers.MaxPool()(x))
        x = layers.GlobalAverage()(x).astype(dtype)
        for i, width in enumerate(self.hidden, 1):
            x = tap(f"fc{i}", norm_relu(layers.Dense(width, dtype=dtype, name=f"fc{i}")(x), f"bn_fc{i}"))
        x = tap("pre_logits", x)
        return layers.classifier(x, self.num_classes), tap.finish()
