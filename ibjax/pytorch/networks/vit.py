"""ViT (Dosovitskiy et al., ICLR 2021) as in timm, also with the ConvStem of Singh, Croce & Hein (NeurIPS 2023)."""

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-6


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvStem(nn.Module):
    """Four 3×3 convolutions of stride 2, each followed by layer norm and GELU, and a 1×1 convolution."""

    def __init__(self, channels, first, width):
        super().__init__()
        parts, before = [], channels
        for after in (first, 2 * first, 4 * first, 8 * first):
            parts += [nn.Conv2d(before, after, 3, 2, 1), LayerNorm2d(after, EPS), nn.GELU()]
            before = after
        self.stem = nn.Sequential(*parts, nn.Conv2d(before, width, 1))

    def forward(self, x):
        return self.stem(x)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, EPS), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, EPS), Mlp(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """(B, channels, H, W) in [0, 1] -> logits (B, num_classes); `image`: (H, W) of the images that it takes."""

    def __init__(
        self,
        num_classes,
        depth=12,
        width=384,
        heads=None,
        patch=16,
        stem="patch",
        stem_width=48,
        mean=None,
        std=None,
        channels=3,
        image=(224, 224),
    ):
        super().__init__()
        self.register_buffer("mean", None if mean is None else torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", None if std is None else torch.tensor(std).view(-1, 1, 1))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + image[0] // patch * (image[1] // patch), width))
        patches = nn.Conv2d(channels, width, patch, patch)
        stem = ConvStem(channels, stem_width, width) if stem == "convstem" else patches
        self.patch_embed = nn.ModuleDict({"proj": stem})
        self.blocks = nn.Sequential(*(Block(width, heads or width // 64) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width, EPS), nn.Linear(width, num_classes)

    def forward(self, x):
        if self.mean is not None:
            x = (x - self.mean) / self.std
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x)[:, 0]))
