"""XCiT (El-Nouby et al., NeurIPS 2021) as in timm; with patches of 4 pixels as Debenedetti et al. (SaTML 2023)."""

import math

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-6
STRIDES = {16: (2, 2, 2, 2), 4: (1, 1, 2, 2)}


class Positions(nn.Module):
    """A linear layer on sines and cosines of 32 waves of each coordinate."""

    def __init__(self, width):
        super().__init__()
        self.token_projection = nn.Conv2d(64, width, 1)

    def forward(self, height, width):
        def waves(count):
            angle = torch.arange(1, count + 1)[:, None] / (count + 1e-6) * 2 * math.pi
            angle = angle / 10000 ** (torch.arange(0, 32, 2) / 32)
            return torch.stack([angle.sin(), angle.cos()], -1).flatten(1).T  # (32, count)

        rows, columns = waves(height)[:, :, None], waves(width)[:, None]
        both = torch.cat([rows.expand(-1, -1, width), columns.expand(-1, height, -1)])
        return self.token_projection(both[None])


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class CrossCovariance(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.temperature = heads, nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 4, 1)  # (b, heads, d, n)
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature).softmax(-1)
        return self.proj((weights @ v).permute(0, 3, 1, 2).reshape(b, n, c))


class Local(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, 1, 1, groups=width) for _ in range(2))
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x, height, width):
        x = x.transpose(1, 2).unflatten(2, (height, width))
        return self.conv2(self.bn(F.gelu(self.conv1(x)))).flatten(2).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.gamma1, self.gamma2, self.gamma3 = (nn.Parameter(torch.ones(width)) for _ in range(3))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, EPS) for _ in range(3))
        self.attn, self.local_mp, self.mlp = CrossCovariance(width, heads), Local(width), Mlp(width)

    def forward(self, x, height, width):
        x = x + self.gamma1 * self.attn(self.norm1(x))
        x = x + self.gamma3 * self.local_mp(self.norm3(x), height, width)
        return x + self.gamma2 * self.mlp(self.norm2(x))


class ClassAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        first, rest = (-1, (self.heads, x.shape[-1] // self.heads)), x
        q, k, v = (
            f(y).unflatten(*first).transpose(1, 2) for f, y in ((self.q, x[:, :1]), (self.k, rest), (self.v, rest))
        )
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class ClassBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.gamma1, self.gamma2 = (nn.Parameter(torch.ones(width)) for _ in range(2))
        self.norm1, self.norm2 = nn.LayerNorm(width, EPS), nn.LayerNorm(width, EPS)
        self.attn, self.mlp = ClassAttention(width, heads), Mlp(width)

    def forward(self, x):
        y = self.norm1(x)
        x = self.norm2(x + self.gamma1 * torch.cat([self.attn(y), y[:, 1:]], 1))
        return x + torch.cat([self.gamma2 * self.mlp(x[:, :1]), x[:, 1:]], 1)


class Model(nn.Module):
    """(B, channels, H, W) in [0, 1] -> logits (B, num_classes)."""

    def __init__(
        self, num_classes, depth=12, width=384, heads=8, patch=16, class_depth=2, mean=None, std=None, channels=3
    ):
        super().__init__()
        self.register_buffer("mean", None if mean is None else torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", None if std is None else torch.tensor(std).view(-1, 1, 1))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        parts, before = [], channels
        for after, stride in zip((width // 8, width // 4, width // 2, width), STRIDES[patch], strict=True):
            conv = nn.Conv2d(before, after, 3, stride, 1, bias=False)
            parts += [nn.Sequential(conv, nn.BatchNorm2d(after)), nn.GELU()]
            before = after
        self.patch_embed = nn.ModuleDict({"proj": nn.Sequential(*parts[:-1])})
        self.pos_embed = Positions(width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.cls_attn_blocks = nn.ModuleList([ClassBlock(width, heads) for _ in range(class_depth)])
        self.norm, self.head = nn.LayerNorm(width, EPS), nn.Linear(width, num_classes)

    def forward(self, x):
        if self.mean is not None:
            x = (x - self.mean) / self.std
        x = self.patch_embed["proj"](x)
        size = x.shape[2:]
        x = (x + self.pos_embed(*size)).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, *size)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.cls_attn_blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))
