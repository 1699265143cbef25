"""Pre-activation ResNet for CIFAR: that of Rice et al. (projections of the activated input, final batch-norm) and its
variants.
"""

import torch
import torch.nn.functional as F
from torch import nn

DEPTHS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
ACTIVATIONS = {"relu": lambda x: F.relu(x), "silu": lambda x: F.silu(x)}


class Block(nn.Module):
    """BN – activation – conv – BN – activation – conv, added to x; a projection sees the activated x, or x if `raw`."""

    def __init__(self, c_in, c_out, stride, activation, raw):
        super().__init__()
        self.activation, self.raw = activation, raw
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.shortcut = None
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False))

    def forward(self, x):
        seen = self.activation(self.bn1(x))
        y = self.conv2(self.activation(self.bn2(self.conv1(seen))))
        return y + (x if self.shortcut is None else self.shortcut(x if self.raw else seen))


class Model(nn.Module):
    """(B, channels, H, W) in [0, 1] -> logits (B, num_classes); `blocks` in each stage, or by depth."""

    def __init__(
        self,
        num_classes,
        depth=18,
        width=64,
        blocks=None,
        projection="activated",
        final_norm=True,
        activation="relu",
        mean=None,
        std=None,
        border=0,
        channels=3,
    ):
        super().__init__()
        self.register_buffer("mean", None if mean is None else torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", None if std is None else torch.tensor(std).view(-1, 1, 1))
        self.pad, self.activation = nn.ZeroPad2d(border), ACTIVATIONS[activation]
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        c_in, self.stages = width, []
        for stage, count in enumerate(blocks or DEPTHS[depth]):
            group, c = [], width * 2**stage
            for i in range(count):
                group.append(Block(c_in, c, 2 if stage and not i else 1, self.activation, projection == "raw"))
                c_in = c
            self.stages.append(f"layer{stage + 1}")
            self.add_module(self.stages[-1], nn.Sequential(*group))
        self.bn = nn.BatchNorm2d(c_in) if final_norm else None
        self.linear = nn.Linear(c_in, num_classes)

    def forward(self, x):
        x = self.pad(x)
        if self.mean is not None:
            x = (x - self.mean) / self.std
        x = self.conv1(x)
        for name in self.stages:
            x = getattr(self, name)(x)
        if self.bn is not None:
            x = self.activation(self.bn(x))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
