"""ConvNeXt (Liu et al., CVPR 2022) as in timm, also with the ConvStem of Singh, Croce & Hein (NeurIPS 2023)."""

import torch
import torch.nn.functional as F
from torch import nn

DEPTHS = {18: (3, 3, 9, 3), 36: (3, 3, 27, 3)}
EPS = 1e-6


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvStem(nn.Module):
    """3×3 convolutions, each followed by layer norm and GELU, in place of patches."""

    def __init__(self, channels, width):
        super().__init__()
        widths, strides = ((width // 2, width), (2, 2))
        if width >= 128:
            widths, strides = (width // 2, width // 4 * 3, width), (2, 2, 1)
        parts = []
        for before, after, stride in zip((channels, *widths), widths, strides, strict=False):
            parts += [nn.Conv2d(before, after, 3, stride, 1), LayerNorm2d(after, EPS), nn.GELU()]
        self.stem = nn.Sequential(*parts)

    def forward(self, x):
        return self.stem(x)


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(1e-6 * torch.ones(width))
        self.conv_dw = nn.Conv2d(width, width, 7, 1, 3, groups=width)
        self.norm, self.mlp = nn.LayerNorm(width, EPS), Mlp(width)

    def forward(self, x):
        y = self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1)))
        return x + (self.gamma * y).permute(0, 3, 1, 2)


class Stage(nn.Module):
    def __init__(self, width, count, first):
        super().__init__()
        down = nn.Sequential(LayerNorm2d(width // 2, EPS), nn.Conv2d(width // 2, width, 2, 2))
        self.downsample = nn.Identity() if first else down
        self.blocks = nn.Sequential(*(Block(width) for _ in range(count)))

    def forward(self, x):
        return self.blocks(self.downsample(x))


class Head(nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(width, EPS), nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.norm(x.mean((2, 3))))


class Model(nn.Module):
    """(B, channels, H, W) in [0, 1] -> logits (B, num_classes); `blocks` in each stage, or by depth."""

    def __init__(self, num_classes, depth=18, width=96, blocks=None, stem="patch", mean=None, std=None, channels=3):
        super().__init__()
        self.register_buffer("mean", None if mean is None else torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", None if std is None else torch.tensor(std).view(-1, 1, 1))
        patches = nn.Sequential(nn.Conv2d(channels, width, 4, 4), LayerNorm2d(width, EPS))
        self.stem = ConvStem(channels, width) if stem == "convstem" else patches
        counts = blocks or DEPTHS[depth]
        self.stages = nn.Sequential(*(Stage(width * 2**i, count, not i) for i, count in enumerate(counts)))
        self.head = Head(width * 2 ** (len(counts) - 1), num_classes)

    def forward(self, x):
        if self.mean is not None:
            x = (x - self.mean) / self.std
        return self.head(self.stages(self.stem(x)))
