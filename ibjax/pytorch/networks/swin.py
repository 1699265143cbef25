"""Swin transformer (Liu et al., ICCV 2021) as in timm from 0.9 on."""

import torch
import torch.nn.functional as F
from torch import nn

DEPTHS = {12: (2, 2, 6, 2), 24: (2, 2, 18, 2)}


def to_windows(x, rows, columns):
    """(b, h, w, …) -> (b * windows, rows * columns, …)."""
    x = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).transpose(2, 3)
    return x.flatten(3, 4).flatten(0, 2)


class Attention(nn.Module):
    """In windows of a map (b, h, w, c); relative positions have a learnt bias."""

    def __init__(self, width, heads, window, shift):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        rows, columns = window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * rows - 1) * (2 * columns - 1), heads))
        row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
        down, right = row[:, None] - row + rows - 1, column[:, None] - column + columns - 1
        self.register_buffer("relative_position_index", down * (2 * columns - 1) + right, persistent=False)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def bias(self, h, w):
        """(windows or 1, heads, n, n)."""
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]
        if not any(self.shift):
            return bias
        down, right = (torch.arange(side) >= side - shift for side, shift in zip((h, w), self.shift, strict=True))
        parts = to_windows((2 * down[:, None] + right).to(bias.device)[None], *self.window)
        return bias - 100.0 * (parts[:, None, :, None] != parts[:, None, None])

    def forward(self, x):
        b, h, w, c = x.shape
        rows, columns = self.window
        x = to_windows(x.roll((-self.shift[0], -self.shift[1]), (1, 2)), rows, columns)
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        bias = self.bias(h, w)
        weights = (scores.unflatten(0, (-1, len(bias))) + bias).flatten(0, 1).softmax(-1)
        x = self.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x.reshape(b, h // rows, w // columns, rows, columns, c).transpose(2, 3).reshape(b, h, w, c)
        return x.roll(self.shift, (1, 2))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width, heads, window, shift, epsilon):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, epsilon) for _ in range(2))
        self.attn, self.mlp = Attention(width, heads, window, shift), Mlp(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Merging(nn.Module):
    def __init__(self, width, epsilon):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width, epsilon), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x):
        parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class Stage(nn.Module):
    """Of maps (h, w); the first stage has no merging before its blocks."""

    def __init__(self, width, heads, count, sides, window, epsilon, first):
        super().__init__()
        self.downsample = nn.Identity() if first else Merging(width // 2, epsilon)
        window = tuple(min(side, window) for side in sides)
        shift = tuple(0 if side == length else length // 2 for side, length in zip(sides, window, strict=True))
        self.blocks = nn.Sequential(
            *(Block(width, heads, window, shift if i % 2 else (0, 0), epsilon) for i in range(count))
        )

    def forward(self, x):
        return self.blocks(self.downsample(x))


class Model(nn.Module):
    """(B, channels, H, W) in [0, 1] -> logits (B, num_classes); `image`: (H, W) of the images that it takes."""

    def __init__(
        self,
        num_classes,
        depth=12,
        width=96,
        blocks=None,
        heads=None,
        patch=4,
        window=7,
        epsilon=1e-5,
        mean=None,
        std=None,
        channels=3,
        image=(224, 224),
    ):
        super().__init__()
        self.register_buffer("mean", None if mean is None else torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", None if std is None else torch.tensor(std).view(-1, 1, 1))
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(channels, width, patch, patch), "norm": nn.LayerNorm(width, epsilon)}
        )
        counts, heads, made = blocks or DEPTHS[depth], heads or width // 32, []
        for i, count in enumerate(counts):
            sides = tuple(side // (patch * 2**i) for side in image)
            made.append(Stage(width * 2**i, heads * 2**i, count, sides, window, epsilon, not i))
        self.layers = nn.Sequential(*made)
        width = width * 2 ** (len(counts) - 1)
        self.norm, self.head = nn.LayerNorm(width, epsilon), nn.ModuleDict({"fc": nn.Linear(width, num_classes)})

    def forward(self, x):
        if self.mean is not None:
            x = (x - self.mean) / self.std
        x = self.patch_embed["norm"](self.patch_embed["proj"](x).permute(0, 2, 3, 1))
        return self.head["fc"](self.norm(self.layers(x)).mean((1, 2)))
