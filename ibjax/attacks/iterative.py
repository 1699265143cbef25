"""An attack split into its steps, so that the caller decides how many steps to run at a time, and for which images.

`as_attack` runs all steps of all restarts and targets in one traceable function; `runner.py` drives the same parts from
the host over many images, as AutoAttack does. Every leaf of a state holds one entry per image, and images do not
influence each other, so a state may be split, padded and compacted between any two steps.
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
UNTARGETED = -1  # in place of a target class
_ANSWERS = 1 << 20  # folded into the keys of clean and final forward passes of a random network


class Iterative(NamedTuple):
    """The parts of an attack. `other` (B,) is the target class of a targeted attack, and `UNTARGETED` for all others.

    With `eot`, `logits_fn` takes `(x, keys)`, a key per image, and returns a sample for each image. Attacks that share
    their functions, as APGD on cross-entropy and on targeted DLR do, share their compiled programs too.

    A step may be given a network in bfloat16 and `exact`, the network itself. It searches with the former; where it
    stops at an image because it is misclassified, `exact` decides on that.
    """

    kind: str  # "apgd", "fab" or "square"
    norm: str
    eps: float
    init: Callable[[Array, Array, Array, Array], State]  # (keys (B,), restart, x, y) -> state, without the network
    step: Callable[..., State]  # (i, logits_fn, x, y, other, state, exact=None) -> state, for i < steps
    steps: int  # evaluations of the network in one run, each with a gradient if the attack uses gradients
    x_adv: Callable[[Array, State], Array]  # (x, state) -> the adversarial images found; x itself if none was found
    done: Callable[[State], Array] | None = None  # (B,) bool: further steps change nothing; None: never
    flat: Callable[[State], Array] | None = None  # (B,) bool: the gradient was zero or not finite at the start
    gradient: bool = True  # whether a step has a backward pass
    restarts: int = 1
    targets: int = 0  # classes to attack, from the second largest clean logit down; 0: untargeted
    eot: int | None = None
    settings: Mapping[str, Any] = MappingProxyType({})  # all other options that its results depend on
    best: Callable[[Array, State], Array] | None = (
        None  # for random networks, (x, state) -> x_adv, or the strongest image if none was found
    )
    ends: Callable[[Array, State], tuple[Array, ...]] | None = (
        None  # (x, state) -> where the search ended: images in ball and box that another network may call misclassified
    )
    check: Callable[[int], None] | None = None  # raises InputError where the network has too few classes

    def functions(self) -> tuple[Callable | None, ...]:
        """All that its compiled programs depend on, apart from the sizes of their arguments."""
        return self.init, self.step, self.x_adv, self.done, self.flat, self.best, self.ends

    def identity(self) -> dict[str, Any]:
        """Everything that identifies the attack, as plain data."""
        counts = dict(steps=self.steps, restarts=self.restarts, targets=self.targets, eot=self.eot)
        return dict(kind=self.kind, norm=self.norm, eps=self.eps, **counts, **self.settings)


def lead(logits_fn: Callable, exact: Callable | None, x: Array, y: Array, going: Array) -> Array:
    """z_y − max_{k≠y} z_k of the images x, (B,); −∞ with NaN logits, which count as misclassified.

    With `exact` it is that of `exact` for the images among `going` (B,) that logits_fn misclassifies.
    """

    def of(network):
        logits = network(x)
        return jnp.where(losses.predicted(logits) < 0, -jnp.inf, -losses.margin(logits, y))

    found = of(logits_fn)
    if exact is None:
        return found
    doubtful = going & (found <= 0)
    return jnp.where(doubtful, lax.cond(jnp.any(doubtful), lambda: of(exact), lambda: found), found)


def other_classes(logits: Array) -> Array:
    """Classes in order of decreasing clean logit, without the largest: (B, classes − 1)."""
    return jnp.argsort(-logits, axis=-1)[:, 1:]


def as_attack(attack: Iterative) -> Attack:
    """`(key, logits_fn, x, y) -> x_adv`, which runs every pass: each restart towards each target.

    An image that is misclassified without attack, or that no pass breaks, is returned unchanged. If several passes
    break an image, the result of the first one is returned.
    """

    def run(key: Array, logits_fn: Callable, x: Array, y: Array) -> Array:
        keys = geometry.keys_per_image(key, x)

        def answer(x, number):
            return logits_fn(x) if attack.eot is None else logits_fn(x, geometry.fold(keys, number + _ANSWERS))

        clean = answer(x, -1)
        if attack.check is not None:
            attack.check(clean.shape[-1])
        others = other_classes(clean) if attack.targets else jnp.full((len(x), 1), UNTARGETED)
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
