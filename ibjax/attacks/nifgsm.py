"""Nesterov iterative fast gradient sign method: Lin et al., "Nesterov Accelerated Gradient and Scale Invariance for
Adversarial Attacks", ICLR 2020.

    ahead   = x_t + μ · α · g_t                                                 not projected
    g_{t+1} = μ · g_t + ∇_x L(f(ahead), target) / mean|∇_x L(f(ahead), target)|
    x_{t+1} = Π( x_t + α · sign(g_{t+1}) )                                      g_0 = 0, x_0 = x

| symbol | code      | default |
|--------|-----------|---------|
| μ      | decay     | 1.0     | 0 is the basic iterative method, `pgd(init="none")`
| ε      | eps       | "8/255" |
| α      | step_size | "2/255" |
| T      | steps     | 10      |

Deviation: the paper divides by the l_1 norm, here as in torchattacks it is the mean of absolute values. This is another
method, not another scale: it makes the look-ahead longer by the number of pixels, about one step per pixel.
"""

from collections.abc import Callable

from jax import Array

from ibjax.attacks import Attack, geometry
from ibjax.attacks.mim import momentum_ascent
from ibjax.errors import InputError


def nifgsm(
    *,
    loss: "str | Callable" = "ce",
    norm: str = "linf",
    eps: "str | float | Array" = "8/255",
    step_size: "str | float | Array" = "2/255",
    steps: int = 10,
    decay: float = 1.0,
    init: str = "none",
    unroll: bool | None = None,
) -> Attack:
    """An attack `(key, logits_fn, x, target) -> x_adv` in l_inf; `decay` is μ, all else as in `pgd`.

    Raises:
      InputError: as `mim`, and for a norm other than "linf": the length of the look-ahead is defined for signs only.
    """
    if geometry.check_norm(norm) != "linf":
        raise InputError(f"norm '{norm}' is not allowed; NI-FGSM is defined for linf, use mim for other norms")
    return momentum_ascent(loss, norm, eps, step_size, steps, decay, init, unroll, lookahead=True)
