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

from ibjax.errors import CodeError, check_range
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


def own_perturbation(source: Any, made: Any, options: Any) -> Perturb:
    """The perturbation that a factory of the user's own has made.

    Raises CodeError unless it is a function, and, while JAX traces it, unless it returns a tree like the parameters.
    """
    if not callable(made):
        raise CodeError(f"{source} is a {type(made).__name__}; return a function (params, gradients, epoch) -> offsets")

    def perturb(params: Any, gradients: Any, epoch: Array) -> Any:
        found, form = made(params, gradients, epoch), lambda tree: jax.tree.map(jnp.shape, tree)
        if form(found) != form(params):
            raise CodeError(f"{source} returns other arrays than the parameters that it got; return an offset for each")
        return found

    return perturb
