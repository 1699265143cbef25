"""Nesterov iterative fast gradient sign method: Lin et al., "Nesterov Accelerated Gradient and Scale Invariance for
Adversarial Attacks", ICLR 2020.

    ahead   = x_t + μ · α · g_t                                                 not projected
    g_{t+1} = μ · g_t + ∇_x L(f(ahead), target) / mean|∇_x L(f(ahead), target)|
    x_{t+1} = Π( x_t + α · sign(g_{t+1}) )                                      g_0 = 0, x_0 = x

| symbol | code      | default |
|--------|-----------|---------|
| μ      | decay     | 1.0     | with μ = 0 it is the basic iterative method, `pgd(init="none")`
| ε      | eps       | "8/255" |
| α      | step_size | "2/255" |
| T      | steps     | 10      |

Deviation: the paper divides by the l_1 norm. This file, like torchattacks, divides by the mean of absolute values. This
changes the method, not only the scale of g: it lengthens the look-ahead by a factor of the number of pixels, to about
one step size per pixel.
"""

from collections.abc import Callable

from jax import Array

from ibjax.attacks import Attack
from ibjax.attacks.mim import mim


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
    """`mim` with `lookahead`; raises InputError as `mim` does, and so for every norm but "linf"."""
    options = dict(eps=eps, step_size=step_size, steps=steps, decay=decay, init=init, unroll=unroll)
    return mim(loss=loss, norm=norm, **options, lookahead=True)
