"""WideResNet of Gowal et al. 2020 and Rebuffi et al. 2021: SiLU, and TensorFlow's padding of strided convolutions."""

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {"relu": lambda x: F.relu(x), "silu": lambda x: F.silu(x)}


def norm(channels):
    """Batch-norm as in the training codes of these networks: a step changes the running statistics by a hundredth."""
    return nn.BatchNorm2d(channels, momentum=0.01)


class Block(nn.Module):
    """BN – activation – conv – BN – activation – conv, added to x; a projection sees the activated x."""

    def __init__(self, c_in, c_out, stride, activation):
        super().__init__()
        self.activation = activation
        self.padding = (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1)
        self.batchnorm_0, self.conv_0 = norm(c_in), nn.Conv2d(c_in, c_out, 3, stride, bias=False)
        self.batchnorm_1, self.conv_1 = norm(c_out), nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.shortcut = None if c_in == c_out else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x):
        seen = self.activation(self.batchnorm_0(x))
        y = self.conv_0(F.pad(seen, self.padding))
        y = self.conv_1(self.activation(self.batchnorm_1(y)))
        return torch.add(x if self.shortcut is None else self.shortcut(seen), y)


class Group(nn.Module):
    """The blocks of one stage."""

    def __init__(self, count, c_in, c_out, stride, activation):
        super().__init__()
        self.block = nn.Sequential(
            *[Block(c_out if i else c_in, c_out, 1 if i else stride, activation) for i in range(count)]
        )

    def forward(self, x):
        return self.block(x)


class Model(nn.Module):
    """(B, channels, H, W) in [0, 1] -> logits (B, num_classes); depth 6n + 4."""

    def __init__(self, num_classes, depth=28, width=10, activation="silu", mean=None, std=None, border=0, channels=3):
        super().__init__()
        self.register_buffer("mean", None if mean is None else torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", None if std is None else torch.tensor(std).view(-1, 1, 1))
        self.pad, self.activation = nn.ZeroPad2d(border), ACTIVATIONS[activation]
        count, c = (depth - 4) // 6, 16 * width
        self.init_conv = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.layer = nn.Sequential(
            Group(count, 16, c, 1, self.activation),
            Group(count, c, 2 * c, 2, self.activation),
            Group(count, 2 * c, 4 * c, 2, self.activation),
        )
        self.batchnorm = norm(4 * c)
        self.logits = nn.Linear(4 * c, num_classes)

    def forward(self, x):
        x = self.pad(x)
        if self.mean is not None:
            x = (x - self.mean) / self.std
        x = self.layer(self.init_conv(x))
        return self.logits(F.adaptive_avg_pool2d(self.activation(self.batchnorm(x)), 1).flatten(1))
