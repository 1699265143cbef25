"""Targeted PGD: Kurakin, Goodfellow & Bengio, "Adversarial Machine Learning at Scale", ICLR 2017.

    t       = the class that the attack shall make the network predict, t ≠ y
    x_{t+1} = Π( x_t + step_size · direction(∇_x L(f(x_t), t)) )              L = −CE(f(x), t), or z_t − z_y

| symbol      | code      | default        |
|-------------|-----------|----------------|
| t           | towards   | "least_likely" | see below
| L           | loss      | "ce"           | −CE(f(x), t); "margin": z_t − z_y
| ε           | eps       | "8/255"        |
| step        | step_size | "2/255"        |
| k           | steps     | 10             |
| first point | init      | "uniform"      | as in `pgd`

| towards        | t                                                                                        |
|----------------|------------------------------------------------------------------------------------------|
| "least_likely" | the class with the smallest logit at x, the paper's choice                                |
| "most_likely"  | the class other than y with the largest logit at x, the easiest one                       |
| "random"       | drawn uniformly from the classes other than y, with the key of the image                  |
| "next"         | (y + 1) mod K                                                                             |
| a number       | this class for every image; images of this class are returned unchanged                   |
| "given"        | the target of the call is a tuple (y, t), each of shape (B,)                              |

An image that ends in any class other than y counts as broken in an evaluation, as for every attack. Deviation: the
paper starts at x; init="none" does so.

Guarantees (tests of the same names): x_adv lies in the eps-ball and in [0, 1]; no image is attacked
towards its true class.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ibjax import losses
from ibjax.attacks import Attack, checks, geometry
from ibjax.attacks.checks import first
from ibjax.attacks.entrance import LABELS, checked
from ibjax.attacks.pgd import pgd
from ibjax.errors import InputError, nearest

_RANDOM = 0x746172  # folded into the key, so that the target class and the first point are drawn independently
LOSSES = {
    "ce": lambda logits, y, t: -losses.cross_entropy(logits, t),
    "margin": losses.margin_targeted,
}


def targeted(
    *,
    towards: "str | int" = "least_likely",
    loss: str = "ce",
    norm: str = "linf",
    eps: "str | float | Array" = "8/255",
    step_size: "str | float | Array" = "2/255",
    steps: int = 10,
    init: str = "uniform",
    restarts: int = 1,
    unroll: bool | None = None,
) -> Attack:
    """An attack `(key, logits_fn, x, y) -> x_adv` towards another class.

    Args:
      towards: the target class, see above.
      loss: "ce" or "margin".
      norm, eps, step_size, steps, init, unroll: as in `pgd`.
      restarts: number of independent runs towards the same class. For each image a misclassified result is preferred,
        then the larger loss.

    Returns:
      The attack. `y` holds the true labels (B,), or with towards="given" it is a tuple (labels, target classes).

    Raises:
      InputError: an unknown `towards` or loss, a class that the network does not have, and as in `pgd`.
    """
    numbered = isinstance(towards, int) and not isinstance(towards, bool)
    if not numbered and towards not in (*_CLASSES, "given"):
        raise InputError(f"towards={towards!r} is unknown; {nearest(str(towards), (*_CLASSES, 'given'))}, or a class")
    if loss not in LOSSES:
        raise InputError(f"the loss '{loss}' of a targeted attack is unknown; {nearest(loss, LOSSES)}")

    def value(output, target):
        labels, classes = target
        return LOSSES[loss](first(output), labels, classes)

    climb = pgd(
        loss=value, norm=norm, eps=eps, step_size=step_size, steps=steps, init=init, restarts=restarts, unroll=unroll
    )

    def attack(key: Array, logits_fn: Callable, x: Array, target: Any) -> Array:
        if towards == "given":
            labels, classes = _given(target)
        else:
            labels = first(target)
            classes = _class_of(towards, key, first(logits_fn(x)), labels)
        x_adv = climb(key, logits_fn, x, (labels, classes))
        return jnp.where(geometry.per_image(classes == labels, x), x, x_adv)

    return checked(attack, LABELS)


def _given(target):
    if not (isinstance(target, tuple) and len(target) == 2):
        raise InputError("towards='given' needs the target (labels, target classes), two arrays of integers (B,)")
    labels, classes = target
    checks.kind_of_labels(classes, len(labels))
    return labels, jnp.asarray(classes, jnp.int32)


def _class_of(towards, key, logits, labels):
    """The target class of each image, (B,) int32."""
    count = logits.shape[-1]
    if towards in _CLASSES:
        return _CLASSES[towards](key, logits, labels).astype(jnp.int32)
    if not 0 <= towards < count:
        raise InputError(f"towards={towards} is no class of the network; give 0 to {count - 1}")
    return jnp.full(labels.shape, towards, jnp.int32)


def _random(key, logits, labels):
    keys = geometry.fold(geometry.keys_per_image(key, labels), _RANDOM)
    shift = jax.vmap(lambda key: jax.random.randint(key, (), 1, logits.shape[-1]))(keys)
    return (labels + shift) % logits.shape[-1]


def _without(logits, labels, instead):
    """The logits with another value at the true class."""
    return jnp.where(jax.nn.one_hot(labels, logits.shape[-1], dtype=bool), instead, logits)


_CLASSES: dict[Any, Callable[[Array, Array, Array], Array]] = {
    "least_likely": lambda key, logits, labels: jnp.argmin(_without(logits, labels, jnp.inf), axis=-1),
    "most_likely": lambda key, logits, labels: jnp.argmax(_without(logits, labels, -jnp.inf), axis=-1),
    "random": _random,
    "next": lambda key, logits, labels: (labels + 1) % logits.shape[-1],
}
