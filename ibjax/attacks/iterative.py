"""An attack taken apart into its steps, so that whoever runs it decides how many at once, and for which images.

`as_attack` runs all steps of all restarts and targets in one traceable function; `runner.py` drives the same parts from
the host over many images, as AutoAttack does. Every leaf of a state holds one entry per image, and no image sees
another, so a state may be split, padded and compacted between any two steps.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from ibjax import losses
from ibjax.attacks import Attack, geometry
from ibjax.attacks.entrance import checked

State = Any
_ANSWERS = 1 << 20  # folded into keys for what a random network answers, apart from those of the passes


class Iterative(NamedTuple):
    """The parts; `other` (B,) is the class to reach where the attack is targeted, any class where it is not.

    With `eot`, `logits_fn` takes `(x, keys)`, a key per image, and answers with another sample for each.
    """

    kind: str  # "apgd", "fab" or "square"
    norm: str
    eps: float
    init: Callable[[Array, Array, Array, Array], State]  # (keys (B,), restart, x, y) -> state, without the network
    step: Callable[..., State]  # (i, logits_fn, x, y, other, state) -> state, for i = 0 … steps − 1
    steps: int  # evaluations of the network in one run, each with its gradient if the attack has one
    x_adv: Callable[[Array, State], Array]  # (x, state) -> what was found, x itself where nothing was
    done: Callable[[State], Array] | None = None  # (B,) bool: further steps change nothing; None: never
    flat: Callable[[State], Array] | None = None  # (B,) bool: the gradient was zero or not finite at the start
    gradient: bool = True  # whether a step has a backward pass
    restarts: int = 1
    targets: int = 0  # classes to attack, from the second largest clean logit down; 0: untargeted
    eot: int | None = None
    settings: Mapping[str, Any] = MappingProxyType({})  # what else its results depend on
    best: Callable[[Array, State], Array] | None = (
        None  # (x, state) -> of a random network: x_adv, or what comes closest
    )

    def identity(self) -> dict[str, Any]:
        """All that says which attack it is, as plain data."""
        counts = dict(steps=self.steps, restarts=self.restarts, targets=self.targets, eot=self.eot)
        return dict(kind=self.kind, norm=self.norm, eps=self.eps, **counts, **self.settings)


def other_classes(logits: Array) -> Array:
    """Classes by falling clean logit, the largest left out: (B, classes − 1)."""
    return jnp.argsort(-logits, axis=-1)[:, 1:]


def as_attack(attack: Iterative) -> Attack:
    """`(key, logits_fn, x, y) -> x_adv`: images that are wrong as they are, or withstand every pass, come back as x.

    Of an image that several passes break, the first one's result is returned.
    """

    def run(key: Array, logits_fn: Callable, x: Array, y: Array) -> Array:
        keys = geometry.keys_per_image(key, x)

        def answer(x, number):
            return logits_fn(x) if attack.eot is None else logits_fn(x, geometry.fold(keys, number + _ANSWERS))

        clean = answer(x, -1)
        others = other_classes(clean) if attack.targets else y[:, None]
        passes = attack.restarts * min(max(attack.targets, 1), others.shape[1])

        def once(number, found):
            x_adv, broken = found
            restart, other = number % attack.restarts, jnp.take(others, number // attack.restarts, axis=1)
            state = attack.init(geometry.fold(keys, number), restart, x, y)
            state = lax.fori_loop(0, attack.steps, lambda i, s: attack.step(i, logits_fn, x, y, other, s), state)
            candidate = attack.x_adv(x, state)
            new = ~broken & ~losses.correct(answer(candidate, number), y)
            return jnp.where(geometry.per_image(new, x), candidate, x_adv), broken | new

        return lax.fori_loop(0, passes, once, (x, ~losses.correct(clean, y)))[0]

    return checked(run, stochastic=attack.eot is not None)
