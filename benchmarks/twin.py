"""PyTorch twins of the benchmarks' networks, with ibjax's parameter names: the baseline for ibjax's speed.

The module has a ResNet (11,173,962 parameters at depth 18 and 10 classes), the stochastic layer of VIB, CEB and shared
information, IBD's attention, and the small network on which attacks are compared. `twin_methods.py` has the objectives,
`twin_step.py` the train step.

Guarantees (tests of the same names): the same weights give the same logits; one step from the same weights gives the
same loss, weights and running statistics.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibjax.models import cnn

Features = dict[str, Tensor]


class Block(nn.Module):
    """relu(x + BN-conv-ReLU-BN-conv(x)), the shortcut a 1×1 convolution with batch-norm where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.has_shortcut = stride != 1 or channels != width
        if self.has_shortcut:
            self.conv_shortcut = nn.Conv2d(channels, width, 1, stride, bias=False)
            self.bn_shortcut = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width, H/stride, W/stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.has_shortcut:
            x = self.bn_shortcut(self.conv_shortcut(x))
        return F.relu(x + y)


class ResNet(nn.Module):
    """(B, C, H, W) in [0, 1] -> logits (B, num_classes); submodules are named as in `ibjax.models.resnet`.

    num_classes None: without the last layer.
    """

    def __init__(
        self, num_classes: int | None = 10, blocks: tuple[int, ...] = (2, 2, 2, 2), width: int = 64, channels: int = 3
    ):
        super().__init__()
        self.stem, self.bn_stem = nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        stages = [(width * 2**stage, 2 if stage and not i else 1) for stage, n in enumerate(blocks) for i in range(n)]
        before = [width] + [out for out, _ in stages[:-1]]
        self.names = [f"block{i}" for i in range(1, len(stages) + 1)]
        for name, channels_in, (out, stride) in zip(self.names, before, stages, strict=True):
            self.add_module(name, Block(channels_in, out, stride))
        self.block_widths = [out for out, _ in stages]
        self.head = nn.Identity() if num_classes is None else nn.Linear(self.block_widths[-1], num_classes)

    def outputs(self, x: Tensor) -> tuple[Tensor, Features]:
        """(logits, features) of images in [0, 1]: `stem`, `block1` … (B, C, H, W), `pre_logits` (B, C)."""
        x = F.relu(self.bn_stem(self.stem(x)))
        features = {"stem": x}
        for name in self.names:
            x = features[name] = getattr(self, name)(x)
        features["pre_logits"] = x.mean((2, 3))
        return self.head(features["pre_logits"]), features

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images in [0, 1]."""
        return self.outputs(x)[0]


class CNN(nn.Module):
    """The twin of `ibjax.models.cnn` with batch-norm, padding 1 and average pooling: (B, C, H, W) -> logits."""

    def __init__(self, channels: int, widths: tuple[tuple[int, ...], ...], num_classes: int):
        super().__init__()
        self.stages, count = [], 0
        for stage in widths:
            for width in stage:
                count += 1
                self.add_module(f"conv{count}", nn.Conv2d(channels, width, 3, 1, 1, bias=False))
                self.add_module(f"bn{count}", nn.BatchNorm2d(width))
                channels = width
            self.stages.append(range(count - len(stage) + 1, count + 1))
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images in [0, 1]."""
        for stage in self.stages:
            for i in stage:
                x = F.relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
            x = F.max_pool2d(x, 2)
        return self.head(x.mean((2, 3)))


class Stochastic(nn.Module):
    """z = μ + σ·ξ in training, else μ, before the last layer: the twin of `ibjax.models.stochastic`.

    sigma: "softplus", or "unit": 1. class_means: also a trainable table (num_classes, latent).
    """

    def __init__(self, backbone: ResNet, num_classes: int = 10, latent: int = 256, sigma: str = "softplus",
                 class_means: bool = False):  # fmt: skip
        super().__init__()
        self.backbone, self.sigma, self.noise = backbone, sigma, torch.randn_like
        self.gaussian = nn.Linear(backbone.block_widths[-1], latent * (1 if sigma == "unit" else 2))
        self.head = nn.Linear(latent, num_classes)
        if class_means:
            self.class_means = nn.Parameter(torch.empty(num_classes, latent).uniform_(-0.1, 0.1))

    def outputs(self, x: Tensor) -> tuple[Tensor, Features]:
        """(logits, features): the backbone's, `mu`, `sigma` and `z` (B, latent)."""
        h, features = self.backbone.outputs(x)
        mu = self.gaussian(h).float()
        if self.sigma == "unit":
            sigma = torch.ones_like(mu)
        else:
            mu, s = mu.chunk(2, dim=1)
            sigma = (F.softplus(s) + 1e-7).clamp(1e-4, 1e2)
        z = mu + sigma * self.noise(mu) if self.training else mu
        return self.head(z), {**features, "mu": mu, "sigma": sigma, "z": z}

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images in [0, 1]."""
        return self.outputs(x)[0]


def student(name: str, **shape: Any) -> "ResNet | Stochastic":
    """The network that an objective trains; `shape` is the ResNet's."""
    if name in ("vib", "ceb", "shared_information"):
        options = dict(sigma="unit", class_means=True) if name == "ceb" else {}
        return Stochastic(ResNet(None, **shape), **options)
    return ResNet(**shape)


class Attention(nn.Module):
    """IBD's feature term, a weighted distance of energy maps; d = 128, student's and teacher's blocks in order.

    q_i = BN(W_i GAP(t_i)),  k_j = ReLU(BN(W_j GAP(s_j))),  k_ji = BN(W k_j)_i
    a_bi = softmax_j( (⟨k_bji, q_bi⟩ + ⟨p_i, p_j⟩) / √d ),    Σ_i mean_b Σ_j a_bij mean_hw (e(s_j) − e(t_i))²
    """

    def __init__(self, student: list[int], teacher: list[int], d: int = 128):
        super().__init__()
        self.n, self.m, self.d = len(teacher), len(student), d
        for kind, widths in (("query", teacher), ("key", student)):
            for i, width in enumerate(widths, 1):
                self.add_module(f"{kind}{i}", nn.Linear(width, d))
                self.add_module(f"{kind}_bn{i}", nn.BatchNorm1d(d))
        self.bilinear, self.bilinear_bn = nn.Linear(d, d * self.n), nn.BatchNorm1d(d * self.n)
        self.position_t = nn.Parameter(nn.init.xavier_normal_(torch.empty(self.n, d)))
        self.position_s = nn.Parameter(nn.init.xavier_normal_(torch.empty(self.m, d)))

    def project(self, kind: str, maps: list[Tensor]) -> list[Tensor]:
        """BN(W_i GAP(z_i)) of every map, (B, d) each."""
        pooled = [z.float().mean((2, 3)) for z in maps]
        return [getattr(self, f"{kind}_bn{i}")(getattr(self, f"{kind}{i}")(z)) for i, z in enumerate(pooled, 1)]

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """Maps (B, C, H, W) of m student and n teacher blocks -> a scalar."""
        query = torch.stack(self.project("query", teacher), 1)  # (B, n, d)
        key = torch.stack([F.relu(k) for k in self.project("key", student)], 1)  # (B, m, d)
        key = self.bilinear_bn(self.bilinear(key.flatten(0, 1))).unflatten(0, (-1, self.m)).unflatten(2, (self.n, -1))
        score = torch.einsum("bmnd,bnd->bnm", key, query) + self.position_t @ self.position_s.T
        weights = (score / math.sqrt(self.d)).softmax(2)

        energies = [z.float().square().mean(1) for z in student]
        resized = {}  # by size: (B, m, H·W), of unit norm
        total = weights.new_zeros(())
        for i, z in enumerate(teacher):
            size = z.shape[2:]
            if size not in resized:
                maps = torch.stack([F.adaptive_avg_pool2d(e, size) for e in energies], 1)
                resized[size] = F.normalize(maps.flatten(2), dim=2)
            e_t = F.normalize(z.float().square().mean(1).flatten(1), dim=1)
            total = total + (weights[:, i] * (resized[size] - e_t[:, None]).square().mean(2)).sum(1).mean()
        return total


def cnn_like(model: cnn.Model, variables: Mapping[str, Any]) -> CNN:
    """The twin of a network of `ibjax.models.cnn`, with its weights, in evaluation mode and not to be trained."""
    wanted = dict(batch_norm=True, padding=1, pool="average", hidden=())
    if any(getattr(model, name) != value for name, value in wanted.items()):
        raise KeyError(f"the twin has {wanted}; given {model}")
    channels = variables["params"]["conv1"]["conv"]["kernel"].shape[2]
    network = CNN(channels, model.widths, model.num_classes)
    copy_weights(network, jax.device_get(variables))
    return network.eval().requires_grad_(False)


def nchw(x: np.ndarray) -> Tensor:
    """(B, H, W, C) -> a tensor (B, C, H, W)."""
    return torch.tensor(np.moveaxis(x, -1, 1)).contiguous()


def copy_weights(twin: nn.Module, variables: Mapping[str, Any]) -> None:
    """Writes the weights and running statistics of ibjax's network, or of its head, into its twin.

    Raises KeyError or RuntimeError where the two are not the same architecture.
    """
    state = {name: torch.tensor(value) for name, value in torch_entries(variables)}
    missing, unexpected = twin.load_state_dict(state, strict=False)
    wrong = [*unexpected, *(name for name in missing if not name.endswith("num_batches_tracked"))]
    if wrong:
        raise KeyError(f"not the same architecture: {', '.join(wrong)}")


def torch_entries(variables: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(name in PyTorch, value as PyTorch lays it out) of every leaf of ibjax's `variables`."""
    norm = {"scale": "weight", "mean": "running_mean", "var": "running_var"}

    def walk(tree, path):
        for name, value in tree.items():
            if isinstance(value, Mapping):
                yield from walk(value, (*path, name))
            elif path[-1:] == ("conv",):
                yield (*path[:-1], "weight"), np.transpose(value, (3, 2, 0, 1))  # HWIO -> OIHW
            elif path[-1:] == ("dense",):
                yield (*path[:-1], "weight" if name == "kernel" else name), np.transpose(value)
            else:
                yield (*path, norm.get(name, name)), value

    for part in ("params", "batch_stats"):
        for path, value in walk(variables[part], ()):
            yield ".".join(path), np.array(value, np.float32)


def sgd(*modules: nn.Module | None, lr: float) -> torch.optim.Optimizer:
    """The optimiser of a step, over all modules that are there."""
    parameters = list(itertools.chain(*(module.parameters() for module in modules if module is not None)))
    return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=5e-4, fused=parameters[0].is_cuda)
