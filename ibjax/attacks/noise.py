"""Random noise: a lower bound on the strength of any attack.

uniform   x_adv = Π( x + U(−ε, ε) )                l2: a Gaussian direction, at a radius uniform in [0, ε]
sign      x_adv = Π( x + ε · v ),  v ∈ {−1, 1}     l2: the direction v at distance ε, clipped to the box
"""

from collections.abc import Callable

import jax
from jax import Array

from ibjax.attacks import Attack, geometry
from ibjax.attacks.entrance import ANYTHING, checked
from ibjax.errors import InputError, nearest

KINDS = ("uniform", "sign")


def noise(*, kind: str = "uniform", norm: str = "linf", eps: "str | float | Array" = "8/255") -> Attack:
    """An attack `(key, logits_fn, x, target) -> x_adv` that uses neither network nor target.

    Args:
      kind: "uniform" draws from the whole ball; "sign" takes a random corner of the l_inf cube, or in l2 the direction
        of one.
      norm, eps: as in `pgd`.

    Raises:
      InputError: an eps that is not a radius for [0, 1] images, an unknown kind or norm.
    """
    norm = geometry.check_norm(norm, ("linf", "l2"))
    eps = geometry.radius(eps, norm)
    if kind not in KINDS:
        raise InputError(f"noise kind '{kind}' is unknown; {nearest(kind, KINDS)}")

    def attack(key: Array, logits_fn: Callable, x: Array, target: Array) -> Array:
        if kind == "uniform":
            return geometry.start(key, x, norm, eps, "uniform")
        signs = geometry.draw(jax.random.rademacher, key, x)
        return geometry.project(x + geometry.per_image(eps, x) * signs, x, norm, eps)

    return checked(attack, ANYTHING, network=False)
