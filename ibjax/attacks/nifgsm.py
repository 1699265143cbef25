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
    """`mim` with its look-ahead; raises InputError as it does, so for every norm but "linf"."""
    options = dict(eps=eps, step_size=step_size, steps=steps, decay=decay, init=init, unroll=unroll)
    return mim(loss=loss, norm=norm, **options, lookahead=True)
