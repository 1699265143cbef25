"""Transfer: Papernot et al., "Transferability in Machine Learning", 2016. The attack sees a surrogate of the victim.

    x_adv = attack(surrogate, x, y)        robust where victim(x_adv) = y

Gradients of the victim play no part, so a transfer that beats the white-box attack shows that those are masked.
"""

from collections.abc import Callable

from jax import Array

from ibjax.attacks import Attack


def transfer(*, attack: Attack, surrogate: Callable[[Array], Array]) -> Attack:
    """`attack`, computed on `surrogate`, a `logits_fn` (B, H, W, C) -> (B, classes), whatever network it is given.

    A surrogate that closes over its weights bakes them into a program that is jitted around the attack. `attack` checks
    what it is given, labels against the surrogate's classes.
    """

    def on_surrogate(key: Array, logits_fn: Callable, x: Array, target: Array) -> Array:
        return attack(key, surrogate, x, target)

    return on_surrogate
