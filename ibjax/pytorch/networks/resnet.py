"""ResNet (He et al., CVPR 2016): for CIFAR as in pytorch-cifar, or for ImageNet as in torchvision and timm."""

import torch
import torch.nn.functional as F
from torch import nn

DEPTHS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class Block(nn.Module):
    """conv – BN – ReLU – conv – BN, added to x, ReLU; a bottleneck is 1×1, 3×3, 1×1 to four times the width."""

    def __init__(self, c_in, c, stride, bottleneck, inner_width, projection):
        super().__init__()
        self.projection = projection
        if bottleneck:
            inner = inner_width * c
            shapes = [(c_in, inner, 1, 1), (inner, inner, 3, stride), (inner, 4 * c, 1, 1)]
        else:
            shapes = [(c_in, c, 3, stride), (c, c, 3, 1)]
        for i, (before, after, kernel, s) in enumerate(shapes, 1):
            self.add_module(f"conv{i}", nn.Conv2d(before, after, kernel, s, kernel // 2, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(after))
        self.count, self.c_out = len(shapes), shapes[-1][1]
        if stride != 1 or c_in != self.c_out:
            conv = nn.Conv2d(c_in, self.c_out, 1, stride, bias=False)
            self.add_module(projection, nn.Sequential(conv, nn.BatchNorm2d(self.c_out)))

    def forward(self, x):
        y = x
        for i in range(1, self.count + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = F.relu(y) if i < self.count else y
        y += getattr(self, self.projection)(x) if hasattr(self, self.projection) else x
        return F.relu(y)


class Model(nn.Module):
    """(B, channels, H, W) in [0, 1] -> logits (B, num_classes).

    `blocks` in each stage, or by depth; bottlenecks from 50. `projection` and `head` are what the files call the
    shortcuts and the last layer: "shortcut" and "linear" in pytorch-cifar, "downsample" and "fc" in torchvision.
    """

    def __init__(
        self,
        num_classes,
        depth=18,
        width=64,
        blocks=None,
        stem="cifar",
        inner_width=1,
        mean=None,
        std=None,
        channels=3,
        projection="shortcut",
        head="linear",
    ):
        super().__init__()
        self.register_buffer("mean", None if mean is None else torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", None if std is None else torch.tensor(std).view(-1, 1, 1))
        self.imagenet, self.head = stem == "imagenet", head
        kernel, stride = (7, 2) if self.imagenet else (3, 1)
        self.conv1 = nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        c_in, self.stages = width, []
        for stage, count in enumerate(blocks or DEPTHS[depth]):
            group = []
            for i in range(count):
                strided = 2 if stage and not i else 1
                group.append(Block(c_in, width * 2**stage, strided, depth >= 50, inner_width, projection))
                c_in = group[-1].c_out
            self.stages.append(f"layer{stage + 1}")
            self.add_module(self.stages[-1], nn.Sequential(*group))
        self.add_module(head, nn.Linear(c_in, num_classes))

    def forward(self, x):
        if self.mean is not None:
            x = (x - self.mean) / self.std
        x = F.relu(self.bn1(self.conv1(x)))
        if self.imagenet:
            x = F.max_pool2d(x, 3, 2, 1)
        for name in self.stages:
            x = getattr(self, name)(x)
        return getattr(self, self.head)(F.adaptive_avg_pool2d(x, 1).flatten(1))
