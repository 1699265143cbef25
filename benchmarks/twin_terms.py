"""Divergences and measures of dependence in PyTorch, of which the losses in `twin_methods.py` are made."""

import torch
import torch.nn.functional as F
from torch import Tensor


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(softmax(p) || softmax(q)) of logits (B, C), shape (B,)."""
    log_p, log_q = p.log_softmax(1), q.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def kl_to(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || softmax(q)) of probabilities and logits (B, C), shape (B,)."""
    return F.kl_div(q.log_softmax(1), p, reduction="none").sum(1)


def distances(u: Tensor) -> Tensor:
    """‖u_a − u_b‖² of samples (B, …)."""
    u = u.flatten(1).float()
    u = u - u.mean(0)
    squares = u.square().sum(1)
    return (squares[:, None] + squares[None] - 2 * u @ u.T).clamp(min=0)


def centered(k: Tensor) -> Tensor:
    """H K H."""
    h = torch.eye(len(k), device=k.device) - 1 / len(k)
    return h @ k @ h


def operator(k: Tensor, ridge: float = 1e-5) -> Tensor:
    """(K̃ + ε B I)⁻¹ K̃."""
    k = centered(k)
    return torch.linalg.solve(k + ridge * len(k) * torch.eye(len(k), device=k.device), k)


def nhsic_terms(x: Tensor, y: Tensor, classes: int, taps: list[Tensor], with_x: float, with_y: float) -> Tensor:
    """Σ_l [ with_x · nHSIC(X, T_l) − with_y · nHSIC(Y, T_l) ]; Gaussian kernels of width 5·√dimension, Y's linear."""

    def gaussian(u):
        return torch.exp(distances(u) / (-2 * 5.0**2 * u[0].numel()))

    one_hot = F.one_hot(y, classes).float()
    r = with_x * operator(gaussian(x)) - with_y * operator(one_hot @ one_hot.T)
    return sum((r * operator(gaussian(t)).T).sum() for t in taps)


def taps(features: dict[str, Tensor]) -> list[Tensor]:
    """The stem, all blocks, and the pooled vector."""
    return [features["stem"], *blocks(features), features["pre_logits"]]


def blocks(features: dict[str, Tensor]) -> list[Tensor]:
    """All blocks in order."""
    return [value for name, value in features.items() if name.startswith("block")]
