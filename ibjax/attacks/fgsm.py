"""Fast gradient sign method: Goodfellow et al., "Explaining and Harnessing Adversarial Examples", ICLR 2015.

x_adv = clip( x + ε · sign(∇_x CE(f(x), y)), 0, 1 )          no random start
"""

from jax import Array

from ibjax.attacks import Attack
from ibjax.attacks.pgd import pgd


def fgsm(
    *,
    loss: str = "ce",
    norm: str = "linf",
    eps: "str | float | Array" = "8/255",
    init: str = "none",
    step_size: "str | float | Array | None" = None,
) -> Attack:
    """One full step of PGD. Fast adversarial training: init="uniform", step_size="10/255"."""
    return pgd(loss=loss, norm=norm, eps=eps, step_size=eps if step_size is None else step_size, steps=1, init=init)
