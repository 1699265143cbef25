"""Projected steps of Adam: the training attack of Gowal et al., "Uncovering the Limits of Adversarial Training against
Norm-Bounded Adversarial Examples", arXiv 2010.03593, 2020; Rebuffi et al. and Gowal et al., NeurIPS 2021.

    x_0     = start(x)
    x_{t+1} = Π( x_t + η_t · m̂_t / (√v̂_t + 1e-9) )         m̂, v̂: Adam's moments of ∇_x L(f(x_t), target), by pixel
    η_t     = step_size · Π_{(s, f) in decay, t >= s} f

| symbol      | code      | default      |
|-------------|-----------|--------------|
| L           | loss      | "kl"         | as in `pgd`
| ε           | eps       | "8/255"      |
| η           | step_size | None: 0.1    | in [0, 1] pixel units; it does not follow ε, and Π cuts the step
|             | decay     | ((5, 0.1),)  | from step 5 on a tenth
| k           | steps     | 10           |
| β_1, β_2    | b1, b2    | 0.9, 0.999   |
| first point | init      | "uniform"    | see geometry.STARTS

The authors start at x + U(−ε, ε), project before the first step, and take 10 steps in training. Only l_inf.

Guarantees (tests of the same names): x_adv lies in the eps-ball and in [0, 1]; eps=0 returns x; the same key gives the
same result; each image's result is independent of the others in its batch.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ibjax.attacks import Attack, geometry
from ibjax.attacks.entrance import checked
from ibjax.attacks.pgd import loss_function, loss_gradient, target_kind, unrolled
from ibjax.errors import InputError, check_count, check_range

_FLOOR = 1e-9  # added to √v̂, as in the authors' code


def pgd_adam(
    *,
    loss: "str | Callable" = "kl",
    norm: str = "linf",
    eps: "str | float | Array" = "8/255",
    step_size: "str | float | Array | None" = None,
    decay: tuple[tuple[int, float], ...] = ((5, 0.1),),
    steps: int = 10,
    b1: float = 0.9,
    b2: float = 0.999,
    init: str = "uniform",
    unroll: bool | None = None,
) -> Attack:
    """An attack `(key, logits_fn, x, target) -> x_adv`; arguments as in `pgd`, and of Adam.

    decay: pairs (step, factor): from that step on, counted from 0, the rate is multiplied by the factor.

    Raises InputError on a value that `pgd` refuses, another norm than l_inf, and wrong pairs.
    """
    norm = geometry.check_norm(norm, ("linf",))
    value, eps = loss_function(loss), geometry.radius(eps, norm)
    step_size = geometry.step(0.1 if step_size is None else step_size, norm, eps)
    geometry.check_start(init)
    check_count("steps", steps)
    for name, moment in (("b1", b1), ("b2", b2)):
        check_range(f"attack.{name}", moment, 0, 1, below=True)
    for pair in decay:
        if len(pair) != 2 or not pair[0] >= 0 or not pair[1] > 0:
            raise InputError(f"attack.decay={decay} is not allowed; give pairs (step, factor), as ((5, 0.1),)")

    def attack(key: Array, logits_fn: Callable, x: Array, target: Any) -> Array:
        def step(i, carry):
            x_adv, first, second = carry
            gradient, _ = loss_gradient(value, lambda x, state: (logits_fn(x), state), x_adv, target, ())
            t = jnp.asarray(i, jnp.float32) + 1.0
            first, second = b1 * first + (1.0 - b1) * gradient, b2 * second + (1.0 - b2) * gradient * gradient
            direction = first / (1.0 - b1**t) / (jnp.sqrt(second / (1.0 - b2**t)) + _FLOOR)
            rate = geometry.per_image(step_size, x)
            for begin, factor in decay:
                rate = rate * jnp.where(t > begin, factor, 1.0)
            return geometry.project(x_adv + rate * direction, x, norm, eps), first, second

        start = geometry.project(geometry.start(key, x, norm, eps, init), x, norm, eps)
        carry = (start, jnp.zeros_like(x), jnp.zeros_like(x))
        return lax.fori_loop(0, steps, step, carry, unroll=unrolled(unroll))[0]

    return checked(attack, target_kind(loss))
