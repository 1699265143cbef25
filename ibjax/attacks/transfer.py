"""Transfer: Papernot et al., "Transferability in Machine Learning", 2016. The attack is computed on a surrogate.

    x_adv = attack(surrogate, x, y)        robust where victim(x_adv) = y

The attack does not use gradients of the victim, so a transfer attack that is stronger than the white-box attack shows
gradient masking.
"""

from collections.abc import Callable

from jax import Array

from ibjax.attacks import Attack


def transfer(*, attack: Attack, surrogate: Callable[[Array], Array]) -> Attack:
    """`attack` computed on `surrogate`, a `logits_fn` (B, H, W, C) -> (B, classes), whatever network it is called with.

    If a surrogate closes over its weights, jitting the attack compiles them in as constants. `attack` checks its
    arguments against the surrogate, for example the labels against the surrogate's classes.
    """

    def on_surrogate(key: Array, logits_fn: Callable, x: Array, target: Array) -> Array:
        return attack(key, surrogate, x, target)

    return on_surrogate
