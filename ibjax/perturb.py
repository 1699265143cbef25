"""Adversarial weight perturbation: Wu, Xia & Wang, "Adversarial Weight Perturbation Helps Robust Generalization",
NeurIPS 2020.

    v_l = γ · ‖w_l‖ · g_l / ‖g_l‖,      g = ∇_w L_proxy(w)           one ascent step for every weight tensor l
    w  <- (w + v after the optimiser's step with ∇L(w + v)) − v

| symbol  | code   | default                                         |
|---------|--------|-------------------------------------------------|
| γ       | gamma  | 0.01 (PGD-AT; 0.005 with TRADES)                |
|         | warmup | 0 epochs without perturbation (9 with TRADES)   |
| L_proxy | `Objective.proxy`; the objective's own loss where it has none           |

The adversarial images are computed at the unperturbed weights. Norms are Frobenius norms of whole tensors.
One-dimensional tensors (biases, batch-norm) and the weights of the objective's head are not perturbed. Weight decay
applies to w + v. The batch-norm statistics that the proxy's forward pass computes are discarded.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ibjax.errors import check_range
from ibjax.step import Perturb


def awp(*, gamma: float = 0.01, warmup: int = 0) -> Perturb:
    """`(params, gradients, epoch) -> v`, a tree like `params`; zero in the first `warmup` epochs."""
    check_range("perturb.gamma", gamma, 0, 1)
    check_range("perturb.warmup", warmup, 0)

    def perturb(params: Any, gradients: Any, epoch: Array) -> Any:
        size = jnp.where(epoch >= warmup, gamma, 0.0)

        def offset(w, g):
            if w.ndim <= 1:
                return jnp.zeros_like(w)
            return size * jnp.linalg.norm(w.ravel()) * g / (jnp.linalg.norm(g.ravel()) + 1e-20)

        return jax.tree.map(offset, params, gradients)

    return perturb


PERTURBATIONS = {"awp": awp}
