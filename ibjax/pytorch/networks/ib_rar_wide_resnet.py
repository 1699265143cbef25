"""WideResNet of IB-RAR (meliketoy's file): biased convolutions, the stride in the second one, raw projections."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """BN – ReLU – conv – BN – ReLU – conv, added to x; a projection sees x itself."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, c_out, 3, 1, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), nn.Conv2d(c_out, c_out, 3, stride, 1)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride))

    def forward(self, x):
        y = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return y + self.shortcut(x)


class Model(nn.Module):
    """(B, channels, H, W) in [0, 1] -> logits (B, num_classes); depth 6n + 4."""

    def __init__(self, num_classes, depth=28, width=10, mean=None, std=None, border=0, channels=3):
        super().__init__()
        self.register_buffer("mean", None if mean is None else torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", None if std is None else torch.tensor(std).view(-1, 1, 1))
        self.pad, count, c = nn.ZeroPad2d(border), (depth - 4) // 6, 16 * width
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1)
        self.layer1 = self.group(count, 16, c, 1)
        self.layer2 = self.group(count, c, 2 * c, 2)
        self.layer3 = self.group(count, 2 * c, 4 * c, 2)
        self.bn1 = nn.BatchNorm2d(4 * c, momentum=0.9)
        self.linear = nn.Linear(4 * c, num_classes)

    @staticmethod
    def group(count, c_in, c_out, stride):
        return nn.Sequential(*[Block(c_out if i else c_in, c_out, 1 if i else stride) for i in range(count)])

    def forward(self, x):
        x = self.pad(x)
        if self.mean is not None:
            x = (x - self.mean) / self.std
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.linear(F.adaptive_avg_pool2d(F.relu(self.bn1(x)), 1).flatten(1))
