"""One train step in plain PyTorch, of the objectives in `twin_methods.py`.

x_0     = start(x)
x_{t+1} = Π( x_t + step · sign ∇_x climb(f(x_t)) )      batch-norm in evaluation mode, gradients to x alone
w       = SGD( ∇_w L )                                  batch-norm in training mode; momentum 0.9, weight decay 5e-4
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Nets(NamedTuple):
    """What a step evaluates; logits are float32."""

    student: nn.Module
    logits: Callable[[Tensor], Tensor]
    outputs: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]  # (logits, features)
    teacher: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]] | None  # without gradients
    head: nn.Module | None
    memory: Tensor | None  # an entry for each training image


class Batch(NamedTuple):
    """Images (B, C, H, W), labels and indices (B,), the epoch (0: the first), what the attack climbed away from."""

    x: Tensor
    y: Tensor
    index: Tensor
    epoch: float = 0.0
    target: Any = None


def _labels(nets, batch):
    return batch.y


def _cross_entropy(nets, x, target):
    return F.cross_entropy(nets.logits(x), target, reduction="none")


class Twin(NamedTuple):
    """A paper.

    loss: (nets, batch, x_adv) -> scalar, in training mode.
    target: (nets, batch) -> what `climb` takes, in evaluation mode.
    climb: (nets, x_adv, target) -> (B,) that the attack climbs.
    start: the attack's first point: "uniform", "gaussian", or None without an attack.
    attack: (nets, batch, start) -> x_adv of any form, a method's own.
    remember: (nets, batch) changes the memory before the attack.
    memory: (images, classes) -> what is remembered before the first step.
    gamma: of a weight perturbation.
    """

    loss: Callable[[Nets, Batch, Any], Tensor]
    target: Callable[[Nets, Batch], Any] = _labels
    climb: Callable[[Nets, Tensor, Any], Tensor] = _cross_entropy
    start: str | None = "uniform"
    attack: Callable[..., Any] | None = None
    remember: Callable[[Nets, Batch], None] | None = None
    memory: Callable[[int, int], Tensor] | None = None
    gamma: float = 0.0


# ---- the step --------------------------------------------------------------------------------------------------

STARTS = {
    "uniform": lambda x, eps: (x + eps * torch.empty_like(x).uniform_(-1, 1)).clamp(0, 1),
    "gaussian": lambda x, eps: x + 0.001 * torch.randn_like(x),
}


def ascend(nets, x, target, climb, x_adv, eps, step_size, steps):
    """Projected gradient ascent from x_adv in the l_inf ball of x."""
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(climb(nets, x_adv, target).sum(), x_adv)
        x_adv = x_adv.detach() + step_size * gradient.sign()
        x_adv = torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)
    return x_adv


@contextlib.contextmanager
def mode(network: nn.Module, training: bool):
    """The network in training or evaluation mode for a while."""
    before = network.training
    network.train(training)
    yield
    network.train(before)


@contextlib.contextmanager
def kept_statistics(network: nn.Module):
    """Whatever runs inside leaves no trace in the running statistics."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    yield
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def perturbation(network: nn.Module, gamma: float) -> list[Tensor]:
    """γ ‖w‖ g / ‖g‖ of every tensor of weights, 0 of vectors, from the gradients that are there."""
    weights = list(network.parameters())
    with torch.no_grad():
        return [
            gamma * w.norm() * w.grad / (w.grad.norm() + 1e-20) if w.ndim > 1 else torch.zeros_like(w) for w in weights
        ]


def networks(student, teacher, head, memory, bfloat16, compile) -> Nets:
    """What a step evaluates, of `make_step`'s networks."""
    kind = next(student.parameters()).device.type

    def cast(function):
        function = torch.compile(function) if compile else function

        def call(x):
            with torch.autocast(kind, torch.bfloat16, enabled=bfloat16):
                output = function(x)
            return (output[0].float(), output[1]) if isinstance(output, tuple) else output.float()

        return call

    taught = None if teacher is None else torch.no_grad()(cast(teacher.eval().outputs))
    return Nets(student, cast(student), cast(student.outputs), taught, head, memory)


def attacked(twin: Twin, nets: Nets, batch: Batch, first: Callable | None, ball: tuple) -> tuple[Any, Batch]:
    """(x_adv, the batch with the attack's target); `ball` is (eps, step size, steps)."""
    if twin.attack is not None:
        return twin.attack(nets, batch, first), batch
    if twin.start is None:
        return None, batch
    with torch.no_grad():
        batch = batch._replace(target=twin.target(nets, batch))
    return ascend(nets, batch.x, batch.target, twin.climb, first(batch.x, ball[0]), *ball), batch


def make_step(
    twin: Twin,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    teacher: nn.Module | None = None,
    head: nn.Module | None = None,
    eps: float = 8 / 255,
    step_size: float = 2 / 255,
    steps: int = 10,
    start: Callable[[Tensor, Any], Tensor] | None = None,
    memory: Tensor | None = None,
    epoch: float = 0.0,
    bfloat16: bool = False,
    compile: bool = False,
) -> Callable[[Tensor, Tensor], Tensor]:
    """`(x (B, C, H, W), y (B,)) -> loss`, a tensor that nothing waits for.

    Args:
      twin: of twin_methods.TWINS.
      student, teacher, head: on their device and in their memory format; modes are set by the step.
      optimizer: over the parameters of student and head.
      eps, step_size, steps: of the attack in l_inf.
      start: (x, eps) -> the attack's first point; None: the method's own, at random.
      epoch: at which the step is taken.
      memory: the method's, `twin.memory(images, classes)` at first; the batch is the first of the images.
      bfloat16: autocast, with float32 weights and loss.
      compile: `torch.compile` the networks.
    """
    nets = networks(student, teacher, head, memory, bfloat16, compile)
    first, ball = start or STARTS.get(twin.start), (eps, step_size, steps)

    def step(x, y):
        batch = Batch(x, y, torch.arange(len(x), device=x.device), epoch)
        student.eval().requires_grad_(False)  # no weight gradients are computed in the attack
        if twin.remember is not None:
            with torch.no_grad():
                twin.remember(nets, batch)
        x_adv, batch = attacked(twin, nets, batch, first, ball)
        student.train().requires_grad_(True)
        optimizer.zero_grad(set_to_none=True)
        offset = None
        if twin.gamma:
            with kept_statistics(student):
                twin.loss(nets, batch, x_adv).backward()
            offset = perturbation(student, twin.gamma)
            move(student, offset, 1)
            optimizer.zero_grad(set_to_none=True)
        loss = twin.loss(nets, batch, x_adv)
        loss.backward()
        optimizer.step()
        if offset is not None:
            move(student, offset, -1)
        return loss.detach()

    return step


@torch.no_grad()
def move(network: nn.Module, offset: list[Tensor], sign: int) -> None:
    """Adds an offset to the weights, or takes it away."""
    torch._foreach_add_(list(network.parameters()), offset, alpha=sign)
