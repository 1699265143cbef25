"""Wide residual networks: Zagoruyko & Komodakis, BMVC 2016.

Pre-activation blocks, in three stages of (depth − 4) / 6 blocks with widths 16·width·(1, 2, 4), after a 3×3 stem of 16
channels. If a block's input and output have the same width, the shortcut is its raw input. `variant` selects between
published implementations, which differ as follows:

| variant                 | "trades"           | "deepmind"                 | "ib_rar"                    |
|-------------------------|--------------------|----------------------------|-----------------------------|
| used by                 | TRADES, MART, AWP, | Gowal et al., Rebuffi et   | IB-RAR (meliketoy's file;   |
|                         | most of RobustBench| al. (with `activation=     | there with `dropout=0.3`)   |
|                         |                    | "silu"`, mean and std)     |                             |
| stride 2 in             | the first conv     | the first conv             | the second conv             |
| its padding             | (1, 1)             | (0, 1), TensorFlow's SAME  | (1, 1)                      |
| input of the projection | activated x        | activated x                | raw x                       |
| dropout                 | after BN-ReLU 2    | after BN-ReLU 2            | before BN-ReLU 2            |
| biases of convolutions  | no                 | no                         | yes                         |
| initialisation of conv. | N(0, 2/(k²·C_out)) | N(0, 2/(k²·C_out))         | PyTorch's default           |
| … of the linear bias    | 0                  | 0                          | PyTorch's default           |
| `keep` of the final BN  | 0.9                | 0.99                       | 0.1 (momentum 0.9)          |
| … of the other BNs      | 0.9                | 0.99                       | 0.9                         |

For images other than 32×32 meliketoy's file also pools to 8×8 before the final BN. Paddings are (before, after). Taps
as in `preact_resnet`: `stem`, `blockN`, `blockN_relu`, `stageN`, `stageN_relu`, `pre_logits`.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ibjax.errors import InputError, check_range, nearest
from ibjax.models import layers, stages

VARIANTS = ("trades", "deepmind", "ib_rar")


class Block(nn.Module):
    """x -> x + residual; `see` taps the activated input, as the `_relu` feature of the previous block."""

    width: int
    stride: int = 1
    variant: str = "trades"
    activation: str = "relu"
    dropout: float = 0.0
    bn_groups: int = 1
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool, see: Callable[[Array], Array] = lambda x: x) -> Array:
        ib_rar = self.variant == "ib_rar"
        strides = (1, self.stride) if ib_rar else (self.stride, 1)
        same = (0, 1) if self.variant == "deepmind" and self.stride == 2 else None

        def activated(x, name, conv=None):
            keep = 0.99 if self.variant == "deepmind" else 0.9
            norm = layers.BatchNorm(keep, groups=self.bn_groups, dtype=self.dtype, name=name)
            return layers.normed(x, train, norm, conv=conv, activation=self.activation)

        def conv(stride, name, kernel=3, padding=None):
            options = conv_options(self.variant)
            return layers.Conv(self.width, kernel, stride, padding, dtype=self.dtype, name=name, **options)

        dropout = nn.Dropout(self.dropout, deterministic=not train)

        def residual(_, x, seen):
            first = conv(strides[0], "conv1", padding=same)
            y = activated(dropout(first(seen)), "bn2") if ib_rar and train else dropout(activated(seen, "bn2", first))
            y = conv(strides[1], "conv2")(y)
            if self.stride != 1 or x.shape[-1] != self.width:
                x = conv(self.stride, "shortcut", kernel=1)(x if ib_rar else seen)
            return layers.Add()(x, y)

        return layers.remat(residual, self.remat and train)(self, x, see(activated(x, "bn1")))


class Model(nn.Module):
    """(B, H, W, C) in [0, 1] -> (logits (B, num_classes), features); num_classes None: (pre_logits, features).

    depth: 6n + 4. width: the widening factor, 10 in WRN-28-10. standardize: first standardise each image to mean 0 and
    deviation 1, as in MMA's networks. border: width of a border of zeros around the image, added before normalisation;
    Gowal et al. enlarge MNIST's 28×28 pixels to 32×32 by a border of 2. remat: saves memory, see `layers.remat`.
    """

    num_classes: int | None
    depth: int = 34
    width: int = 10
    dropout: float = 0.0
    variant: str = "trades"
    activation: str = "relu"
    standardize: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    bn_groups: int = 1
    dtype: str = "float32"
    remat: bool = False
    border: int = 0

    @nn.compact
    def __call__(
        self, x: Array, train: bool = False, edits: layers.Edits | layers.Taps | None = None
    ) -> tuple[Array, dict[str, Array]]:
        count, remainder = divmod(self.depth - 4, 6)
        if remainder or count < 1:
            raise InputError(f"wide_resnet has no depth {self.depth}; allowed: 6n + 4, as 10, 16, 28, 34, 70")
        if self.variant not in VARIANTS:
            raise InputError(f"model.variant '{self.variant}' is unknown; {nearest(self.variant, VARIANTS)}")
        check_range("model.dropout", self.dropout, 0, 1, below=True)
        dtype, tap = layers.compute_dtype(self.dtype), layers.Taps(edits)
        x = layers.zero_border(layers.standardize(x) if self.standardize else x, self.border)
        x = layers.normalize(x, self.mean, self.std)
        x = tap("stem", layers.Conv(16, dtype=dtype, pixels=True, name="stem", **conv_options(self.variant))(x))

        def block(x, see, **place):
            return Block(
                variant=self.variant,
                activation=self.activation,
                dropout=self.dropout,
                bn_groups=self.bn_groups,
                dtype=dtype,
                remat=self.remat,
                **place,
            )(x, train, see)

        x, see = stages.through(x, tap, (count,) * 3, 16 * self.width, block)
        keep = {"trades": 0.9, "deepmind": 0.99, "ib_rar": 0.1}[self.variant]
        norm = layers.BatchNorm(keep, groups=self.bn_groups, dtype=dtype, name="bn")
        x = see(layers.normed(x, train, norm, activation=self.activation))
        x = tap("pre_logits", layers.GlobalAverage()(x))
        bias_init = None if self.variant == "ib_rar" else nn.initializers.zeros
        return layers.classifier(x, self.num_classes, bias_init=bias_init), tap.finish()


def conv_options(variant: str) -> dict[str, Any]:
    """The options of a variant's convolutions: biases and initialisation."""
    return dict(use_bias=True) if variant == "ib_rar" else dict(kernel_init=layers.fan_out_normal)
