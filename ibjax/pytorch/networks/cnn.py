"""The small convolutional network of ibjax: stages of 3×3 convolutions, each ending with 2×2 max-pooling."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Model(nn.Module):
    """(B, channels, *image) in [0, 1] -> logits (B, num_classes).

    `widths`: the channels of the convolutions, stage by stage; `padding`: of each convolution; `pool`: "flatten" or
    "average"; `hidden`: widths of linear layers with ReLU, and dropout after the first.
    """

    def __init__(
        self,
        num_classes,
        widths=((32, 32), (64, 64)),
        hidden=(200, 200),
        padding=0,
        batch_norm=False,
        pool="flatten",
        dropout=0.5,
        mean=None,
        std=None,
        channels=3,
        image=(32, 32),
    ):
        super().__init__()
        self.register_buffer("mean", None if mean is None else torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", None if std is None else torch.tensor(std).view(-1, 1, 1))
        self.average, self.dropout, self.count, self.stages = pool == "average", dropout, len(hidden), []
        c_in, sides, index = channels, image, 0
        for number, stage in enumerate(widths, 1):
            layers = nn.Sequential()
            for c in stage:
                index += 1
                layers.add_module(f"conv{index}", nn.Conv2d(c_in, c, 3, 1, padding, bias=not batch_norm))
                if batch_norm:
                    layers.add_module(f"bn{index}", nn.BatchNorm2d(c))
                layers.add_module(f"relu{index}", nn.ReLU())
                c_in, sides = c, [side + 2 * padding - 2 for side in sides]
            layers.add_module("pool", nn.MaxPool2d(2))
            sides = [side // 2 for side in sides]
            self.stages.append(f"stage{number}")
            self.add_module(self.stages[-1], layers)
        c_in *= 1 if self.average else math.prod(sides)
        for i, c in enumerate(hidden, 1):
            self.add_module(f"fc{i}", nn.Linear(c_in, c))
            c_in = c
        self.head = nn.Linear(c_in, num_classes)

    def forward(self, x):
        if self.mean is not None:
            x = (x - self.mean) / self.std
        for name in self.stages:
            x = getattr(self, name)(x)
        x = (F.adaptive_avg_pool2d(x, 1) if self.average else x).flatten(1)
        for i in range(1, self.count + 1):
            x = F.relu(getattr(self, f"fc{i}")(x))
            x = F.dropout(x, self.dropout, self.training) if i == 1 else x
        return self.head(x)
