"""WideResNet (Zagoruyko & Komodakis, BMVC 2016) in the version of TRADES, which most of RobustBench uses."""

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {"relu": lambda x: F.relu(x), "silu": lambda x: F.silu(x)}


class Block(nn.Module):
    """BN – activation – conv – BN – activation – conv, added to x; a projection sees the activated x."""

    def __init__(self, c_in, c_out, stride, activation):
        super().__init__()
        self.activation = activation
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.convShortcut = None if c_in == c_out else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x):
        seen = self.activation(self.bn1(x))
        y = self.conv2(self.activation(self.bn2(self.conv1(seen))))
        return torch.add(x if self.convShortcut is None else self.convShortcut(seen), y)


class Group(nn.Module):
    """The blocks of one stage."""

    def __init__(self, count, c_in, c_out, stride, activation):
        super().__init__()
        self.layer = nn.Sequential(
            *[Block(c_out if i else c_in, c_out, 1 if i else stride, activation) for i in range(count)]
        )

    def forward(self, x):
        return self.layer(x)


class Model(nn.Module):
    """(B, channels, H, W) in [0, 1] -> logits (B, num_classes); depth 6n + 4."""

    def __init__(self, num_classes, depth=34, width=10, activation="relu", mean=None, std=None, border=0, channels=3):
        super().__init__()
        self.register_buffer("mean", None if mean is None else torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", None if std is None else torch.tensor(std).view(-1, 1, 1))
        self.pad, self.activation = nn.ZeroPad2d(border), ACTIVATIONS[activation]
        count, c = (depth - 4) // 6, 16 * width
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.block1 = Group(count, 16, c, 1, self.activation)
        self.block2 = Group(count, c, 2 * c, 2, self.activation)
        self.block3 = Group(count, 2 * c, 4 * c, 2, self.activation)
        self.bn1 = nn.BatchNorm2d(4 * c)
        self.fc = nn.Linear(4 * c, num_classes)

    def forward(self, x):
        x = self.pad(x)
        if self.mean is not None:
            x = (x - self.mean) / self.std
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(self.activation(self.bn1(x)), 1).flatten(1))
