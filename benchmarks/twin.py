"""A plain PyTorch twin of one step of PGD adversarial training of ibjax's ResNet: what ibjax's speed is held against.

The same architecture, start, attack steps, loss and optimiser (11,173,962 parameters at depth 18 and 10 classes):

    x_0     = clip(x + U(−ε, ε), 0, 1)
    x_{t+1} = Π( x_t + step · sign ∇_x CE(f(x_t), y) )      batch-norm in evaluation mode, gradients to x alone
    w       = SGD( ∇_w CE(f(x_k), y) )                      batch-norm in training mode; momentum 0.9, weight decay 5e-4

Guarantees (tests of the same names): the same weights give the same logits; one step from the same weights gives the
same loss, weights and running statistics.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    """(B, C, H, W) in [0, 1] -> logits (B, num_classes); submodules are named as in `ibjax.models.resnet`."""

    def __init__(
        self, num_classes: int = 10, blocks: tuple[int, ...] = (2, 2, 2, 2), width: int = 64, channels: int = 3
    ):
        super().__init__()
        self.stem, self.bn_stem = nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        stages = [(width * 2**stage, 2 if stage and not i else 1) for stage, n in enumerate(blocks) for i in range(n)]
        before = [width] + [out for out, _ in stages[:-1]]
        self.names = [f"block{i}" for i in range(1, len(stages) + 1)]
        for name, channels_in, (out, stride) in zip(self.names, before, stages, strict=True):
            self.add_module(name, Block(channels_in, out, stride))
        self.head = nn.Linear(stages[-1][0], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images in [0, 1]."""
        x = F.relu(self.bn_stem(self.stem(x)))
        for name in self.names:
            x = getattr(self, name)(x)
        return self.head(x.mean((2, 3)))


def copy_weights(twin: ResNet, variables: Mapping[str, Any]) -> None:
    """Writes the weights and running statistics of an `ibjax.models.resnet` network into its twin.

    Raises KeyError or RuntimeError where the two are not the same architecture.
    """
    state = {f"{name}.{key}": torch.tensor(value) for name, key, value in torch_entries(variables)}
    missing, unexpected = twin.load_state_dict(state, strict=False)
    wrong = [*unexpected, *(name for name in missing if not name.endswith("num_batches_tracked"))]
    if wrong:
        raise KeyError(f"not the same architecture: {', '.join(wrong)}")


def torch_entries(variables: Mapping[str, Any]) -> Iterator[tuple[str, str, np.ndarray]]:
    """(module, entry, value as PyTorch lays it out) of every leaf of ibjax's `variables`."""
    norm = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}

    def walk(tree, path):
        for name, value in tree.items():
            if isinstance(value, Mapping):
                yield from walk(value, (*path, name))
            elif path[-1] == "conv":
                yield ".".join(path[:-1]), "weight", np.transpose(value, (3, 2, 0, 1))  # HWIO -> OIHW
            elif path[-1] == "dense":
                yield ".".join(path[:-1]), *(("weight", np.transpose(value)) if name == "kernel" else ("bias", value))
            else:
                yield ".".join(path), norm[name], value

    for part in ("params", "batch_stats"):
        for module, entry, value in walk(variables[part], ()):
            yield module, entry, np.array(value, np.float32)


def sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The optimiser of the step."""
    fused = next(model.parameters()).is_cuda
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4, fused=fused)


def make_step(
    model: ResNet,
    optimizer: torch.optim.Optimizer,
    *,
    eps: float = 8 / 255,
    step_size: float = 2 / 255,
    steps: int = 10,
    init: str = "uniform",
    bfloat16: bool = False,
    compile: bool = False,
) -> Callable[[Tensor, Tensor], Tensor]:
    """`(x (B, C, H, W), y (B,)) -> loss`, a tensor that nothing waits for.

    Args:
      model: on its device and in its memory format; its batch-norm mode is set by the step.
      optimizer: over the model's parameters.
      eps, step_size, steps, init: of the attack in l_inf; init is "uniform" or "none".
      bfloat16: autocast, with float32 weights and loss.
      compile: `torch.compile` the network.
    """
    forward = torch.compile(model) if compile else model
    device = next(model.parameters()).device.type

    def loss_of(x, y, reduction):
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            logits = forward(x)
        return F.cross_entropy(logits.float(), y, reduction=reduction)

    def attack(x, y):
        x_adv = x if init == "none" else (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
        for _ in range(steps):
            x_adv.requires_grad_()
            (gradient,) = torch.autograd.grad(loss_of(x_adv, y, "sum"), x_adv)
            x_adv = x_adv.detach() + step_size * gradient.sign()
            x_adv = torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)
        return x_adv

    def step(x, y):
        model.eval().requires_grad_(False)  # no weight gradients are computed in the attack
        x_adv = attack(x.detach().clone(), y)
        model.train().requires_grad_(True)
        loss = loss_of(x_adv, y, "mean")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
