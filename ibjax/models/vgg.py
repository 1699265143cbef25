"""VGG with batch-norm: Simonyan & Zisserman, ICLR 2015.

Five groups of 3×3 convolutions (with bias) – BN – ReLU, each group followed by 2×2 max-pooling; then linear layers, the
last of which gives the logits. `variant` selects between published implementations, which differ as follows:

| variant                                     | "ib_rar" (CIFAR, VGG16-BN)  | "torchvision" (ImageNet)           |
|---------------------------------------------|-----------------------------|------------------------------------|
| between convolutions and linear layers      | global average              | adaptive average to 7×7, flattened |
| after each linear layer but the last        | BN, ReLU                    | ReLU, dropout of one half          |
| initialisation of convolutions              | PyTorch's default           | N(0, 2/(k²·C_out)), biases 0       |
| initialisation of linear layers             | PyTorch's default           | N(0, 0.01²), biases 0              |

Taps: `convN` (after the ReLU); `stage1` … `stage5` (after the pooling), `fc1` and `fc2`, which are the seven layers of
IB-RAR; and `pre_logits`, the same as `fc2`.
"""

from typing import Any

import flax.linen as nn
from jax import Array

from ibjax.errors import InputError, nearest
from ibjax.models import layers

# depth -> number of convolutions in each group; a group's width is its entry in WIDTHS times `width`
DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
WIDTHS = (1, 2, 4, 8, 8)
VARIANTS = ("ib_rar", "torchvision")
POOLED = 7  # side of torchvision's map before the linear layers


class Model(nn.Module):
    """(B, H, W, C) in [0, 1] -> (logits (B, num_classes), features); num_classes None: (pre_logits, features).

    depth: 11, 13, 16 or 19. width: channels of the first group. hidden: widths of the hidden linear layers.
    """

    num_classes: int | None
    depth: int = 16
    width: int = 64
    hidden: tuple[int, ...] = (4096, 4096)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    bn_groups: int = 1
    dtype: str = "float32"
    variant: str = "ib_rar"

    @nn.compact
    def __call__(
        self, x: Array, train: bool = False, edits: layers.Edits | layers.Taps | None = None
    ) -> tuple[Array, dict[str, Array]]:
        if self.depth not in DEPTHS:
            raise InputError(f"vgg has no depth {self.depth}; allowed: {sorted(DEPTHS)}")
        if self.variant not in VARIANTS:
            raise InputError(f"model.variant '{self.variant}' is unknown; {nearest(self.variant, VARIANTS)}")
        dtype, tap, torchvision = layers.compute_dtype(self.dtype), layers.Taps(edits), self.variant == "torchvision"
        of_convolutions, of_linear = _start(self.variant)

        def norm_relu(layer, x, name):
            norm = layers.BatchNorm(groups=self.bn_groups, dtype=dtype, name=name)
            return layers.normed(x, train, norm, conv=layer, activation="relu")

        x = layers.normalize(x, self.mean, self.std)
        index = 0
        for stage, (count, factor) in enumerate(zip(DEPTHS[self.depth], WIDTHS, strict=True), 1):
            for _ in range(count):
                index += 1
                options = dict(use_bias=True, dtype=dtype, pixels=index == 1, name=f"conv{index}", **of_convolutions)
                conv = layers.Conv(self.width * factor, **options)
                x = tap(f"conv{index}", norm_relu(conv, x, f"bn{index}"))
            x = tap(f"stage{stage}", layers.MaxPool()(x))
        if torchvision:
            x = layers.AdaptiveAverage(POOLED)(x).reshape(x.shape[0], -1)
        else:
            x = layers.GlobalAverage()(x).astype(dtype)
        for i, width in enumerate(self.hidden, 1):
            linear = layers.Dense(width, dtype=dtype, name=f"fc{i}", **of_linear)
            if torchvision:
                x = nn.Dropout(0.5, deterministic=not train)(layers.Activation()(linear(x)))
            else:
                x = norm_relu(linear, x, f"bn_fc{i}")
            x = tap(f"fc{i}", x)
        x = tap("pre_logits", x)
        return layers.classifier(x, self.num_classes, **of_linear), tap.finish()


def _start(variant: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that initialise a variant's convolutions and its linear layers."""
    if variant == "ib_rar":
        return {}, {}
    zeros = nn.initializers.zeros
    convolutions = dict(kernel_init=layers.fan_out_normal, bias_init=zeros)
    return convolutions, dict(kernel_init=nn.initializers.normal(0.01), bias_init=zeros)
