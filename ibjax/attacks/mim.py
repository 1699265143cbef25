"""Momentum iterative method: Dong et al., "Boosting Adversarial Attacks with Momentum", CVPR 2018.

    g_{t+1} = μ · g_t + ∇_x L(f(x_t), target) / mean|∇_x L(f(x_t), target)|
    x_{t+1} = Π( x_t + step_size · direction(g_{t+1}) )                         g_0 = 0, x_0 = x

| symbol | code      | default |
|--------|-----------|---------|
| μ      | decay     | 1.0     | with μ = 0 it is the basic iterative method, `pgd(init="none")`
| ε      | eps       | "8/255" |
| α      | step_size | "2/255" |
| T      | steps     | 10      |

Deviations: the paper divides by the l_1 norm. This file, like torchattacks, divides by the mean of absolute values,
which scales g by the number of pixels and does not change its direction. A gradient of exactly zero stays zero, where
torchattacks computes NaN.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from ibjax.attacks import Attack, geometry
from ibjax.attacks.entrance import checked
from ibjax.attacks.pgd import loss_function, loss_gradient, target_kind, unrolled
from ibjax.errors import InputError, check_count, check_range


def mim(
    *,
    loss: "str | Callable" = "ce",
    norm: str = "linf",
    eps: "str | float | Array" = "8/255",
    step_size: "str | float | Array" = "2/255",
    steps: int = 10,
    decay: float = 1.0,
    init: str = "none",
    unroll: bool | None = None,
    lookahead: bool = False,
) -> Attack:
    """An attack `(key, logits_fn, x, target) -> x_adv`; `decay` is μ, the other options are as in `pgd`.

    `lookahead` evaluates the gradient at x_t + μ · step_size · g_t instead of x_t, in l_inf only: see `nifgsm`.

    Raises:
      InputError: an eps that is not a radius for [0, 1] images, an unknown loss, norm or init, steps < 1, decay < 0, or
        `lookahead` with a norm other than "linf", since the length of the look-ahead is defined for sign steps only.
    """
    norm = geometry.check_norm(norm, ("linf", "l2"))
    if lookahead and norm != "linf":
        raise InputError(f"norm '{norm}' is not allowed with a look-ahead (NI-FGSM); give linf, or mim without it")
    value, eps = loss_function(loss), geometry.radius(eps, norm)
    step_size = geometry.step(step_size, norm, eps)
    geometry.check_start(init)
    check_count("steps", steps)
    check_range("decay", decay, 0)

    def attack(key: Array, logits_fn: Callable, x: Array, target: Array) -> Array:
        step_length = geometry.per_image(step_size, x)
        ahead = decay * step_length if lookahead else 0.0

        def step(_, carry):
            x_adv, g = carry
            gradient, _ = loss_gradient(value, lambda x, state: (logits_fn(x), state), x_adv + ahead * g, target, ())
            g = decay * g + _of_unit_mean(gradient)
            x_adv = x_adv + step_length * geometry.ascent_direction(g, norm)
            return geometry.project(x_adv, x, norm, eps), g

        first = (geometry.start(key, x, norm, eps, init), jnp.zeros_like(x))
        return lax.fori_loop(0, steps, step, first, unroll=unrolled(unroll))[0]

    return checked(attack, target_kind(loss))


def _of_unit_mean(gradient):
    mean = jnp.mean(jnp.abs(gradient), axis=tuple(range(1, gradient.ndim)), keepdims=True)
    return gradient / jnp.maximum(mean, jnp.finfo(gradient.dtype).tiny)
