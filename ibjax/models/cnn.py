"""Small convolutional networks for small images.

The defaults are the four-convolution network of the MNIST experiments (TRADES's SmallCNN): 3×3 convolutions
without padding, 32-32-pool-64-64-pool, then linear layers with 200, 200 and `num_classes` outputs, dropout after the
first, and zeros as initial weights of the last.

Taps: `conv1` … (after the activation), `stage1` … (after the stage's pooling), `fc1` …, `pre_logits` (the last hidden
layer).
"""

import flax.linen as nn
from jax import Array

from ibjax.errors import InputError, check_range, nearest
from ibjax.models import layers


class Model(nn.Module):
    """(B, H, W, C) in [0, 1] -> (logits (B, num_classes), features); num_classes None: (pre_logits, features).

    widths: channels of the convolutions; an inner tuple is a stage, which ends with 2×2 max-pooling.
    hidden: widths of the hidden linear layers; () with `pool="average"` gives a fully convolutional network.
    linear_init: initialisation of the hidden linear layers, "torch" or "xavier": see `layers.LINEAR_INITS`.
    """

    num_classes: int | None
    widths: tuple[tuple[int, ...], ...] = ((32, 32), (64, 64))
    hidden: tuple[int, ...] = (200, 200)
    padding: int = 0
    batch_norm: bool = False
    pool: str = "flatten"  # or "average": the operation between convolutions and linear layers
    dropout: float = 0.5  # after the first hidden layer
    linear_init: str = "torch"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    bn_groups: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Array, train: bool = False, edits: layers.Edits | layers.Taps | None = None
    ) -> tuple[Array, dict[str, Array]]:
        if self.pool not in ("flatten", "average"):
            raise InputError(f"model.pool '{self.pool}' is unknown; {nearest(self.pool, ('flatten', 'average'))}")
        check_range("model.dropout", self.dropout, 0, 1, below=True)
        dtype, zeros = layers.compute_dtype(self.dtype), nn.initializers.zeros
        linear, start = layers.linear_init(self.linear_init), dict(kernel_init=layers.kaiming_normal, bias_init=zeros)
        tap = layers.Taps(edits)
        x = layers.normalize(x, self.mean, self.std)
        index = 0
        for stage, widths in enumerate(self.widths, 1):
            for width in widths:
                index += 1
                if min(x.shape[1:3]) + 2 * self.padding < 3 or width < 1:
                    raise InputError(
                        f"images are too small for the model: a 3×3 convolution of width {width} cannot "
                        f"follow a map of {x.shape[1:3]}"
                    )
                options = dict(dtype=dtype, pixels=index == 1, name=f"conv{index}", **start)
                conv = layers.Conv(width, padding=self.padding, use_bias=not self.batch_norm, **options)
                options = dict(groups=self.bn_groups, dtype=dtype, name=f"bn{index}")
                norm = layers.BatchNorm(**options) if self.batch_norm else None
                x = tap(f"conv{index}", layers.normed(x, train, norm, conv=conv, activation="relu"))
            x = tap(f"stage{stage}", layers.MaxPool()(x))
        x = layers.GlobalAverage()(x).astype(dtype) if self.pool == "average" else x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden, 1):
            x = layers.Activation()(layers.Dense(width, **linear, dtype=dtype, name=f"fc{i}")(x))
            if i == 1:
                x = nn.Dropout(self.dropout, deterministic=not train)(x)
            x = tap(f"fc{i}", x)
        x = tap("pre_logits", x)
        logits = layers.classifier(x, self.num_classes, kernel_init=zeros, bias_init=zeros)
        return logits, tap.finish()
