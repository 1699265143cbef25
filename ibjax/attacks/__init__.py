"""Attacks: one family, one file. An attack is a function `(key, logits_fn, x, target) -> x_adv`."""

import typing
from collections.abc import Callable
from typing import Any

from jax import Array

from ibjax import lazy

Attack = Callable[[Array, Callable[[Array], Array], Array, Array], Array]
# an attack on a network whose state each evaluation updates: (key, forward, x, target, state) -> (x_adv, state)
StatefulAttack = Callable[[Array, Callable, Array, Array, Any], tuple[Array, Any]]

if typing.TYPE_CHECKING:
    from ibjax.attacks import (
        apgd,
        autoattack,
        cw,
        eot,
        fab,
        fgsm,
        mim,
        nifgsm,
        noise,
        pgd,
        pgd_adam,
        representation,
        spsa,
        square,
        transfer,
    )

__all__ = [
    "Attack",
    "StatefulAttack",
    "apgd",
    "autoattack",
    "cw",
    "eot",
    "fab",
    "fgsm",
    "mim",
    "nifgsm",
    "noise",
    "pgd",
    "pgd_adam",
    "representation",
    "spsa",
    "square",
    "transfer",
]
__getattr__, __dir__ = lazy.attach(__name__, __all__)
