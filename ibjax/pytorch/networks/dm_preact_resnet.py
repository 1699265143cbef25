"""Pre-activation ResNet of Rebuffi et al. 2021: SiLU, 3×3 projections of the raw x, TensorFlow's padding at strides."""

import torch
import torch.nn.functional as F
from torch import nn

DEPTHS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
ACTIVATIONS = {"relu": lambda x: F.relu(x), "silu": lambda x: F.silu(x)}


def norm(channels):
    """Batch-norm as in the training codes of these networks: a step changes the running statistics by a hundredth."""
    return nn.BatchNorm2d(channels, momentum=0.01)


class Block(nn.Module):
    """BN – activation – conv – BN – activation – conv, added to x or to a 3×3 projection of it."""

    def __init__(self, c_in, c_out, stride, activation):
        super().__init__()
        self.activation = activation
        self.padding = (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1)
        self.batchnorm_0, self.conv_2d_1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, stride, bias=False)
        self.batchnorm_1, self.conv_2d_2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.shortcut = None
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Conv2d(c_in, c_out, 3, stride, bias=False)

    def forward(self, x):
        y = self.conv_2d_1(F.pad(self.activation(self.batchnorm_0(x)), self.padding))
        y = self.conv_2d_2(self.activation(self.batchnorm_1(y)))
        return y + (x if self.shortcut is None else self.shortcut(F.pad(x, self.padding)))


class Model(nn.Module):
    """(B, channels, H, W) in [0, 1] -> logits (B, num_classes); `blocks` in each stage, or by depth."""

    def __init__(
        self,
        num_classes,
        depth=18,
        width=64,
        blocks=None,
        activation="silu",
        mean=None,
        std=None,
        border=0,
        channels=3,
    ):
        super().__init__()
        self.register_buffer("mean", None if mean is None else torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", None if std is None else torch.tensor(std).view(-1, 1, 1))
        self.pad, self.activation = nn.ZeroPad2d(border), ACTIVATIONS[activation]
        self.conv_2d = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        c_in, self.stages = width, []
        for stage, count in enumerate(blocks or DEPTHS[depth]):
            group, c = [], width * 2**stage
            for i in range(count):
                group.append(Block(c_in, c, 2 if stage and not i else 1, self.activation))
                c_in = c
            self.stages.append(f"layer_{stage}")
            self.add_module(self.stages[-1], nn.Sequential(*group))
        self.batchnorm = norm(c_in)
        self.logits = nn.Linear(c_in, num_classes)

    def forward(self, x):
        x = self.pad(x)
        if self.mean is not None:
            x = (x - self.mean) / self.std
        x = self.conv_2d(x)
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.logits(F.adaptive_avg_pool2d(self.activation(self.batchnorm(x)), 1).flatten(1))
