"""Projected gradient descent: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018.

    x_0     = start(x)
    x_{t+1} = Π( x_t + step_size · direction(∇_x L(f(x_t), target)) )          Π: eps-ball, then [0, 1]

| symbol      | code        | default  |
|-------------|-------------|----------|
| L           | loss        | "ce"     | also "kl" (to a distribution), "margin" (C&W), or (logits, target) -> (B,)
| ε           | eps         | "8/255"  |
| step        | step_size   | "2/255"  |
| k           | steps       | 10       |
| first point | init        | "uniform"| see geometry.STARTS

Guarantees (tests of the same names): x_adv lies in the eps-ball and in [0, 1]; eps=0 returns x; the same key
gives the same result; each image's result is independent of the others in its batch.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from ibjax import losses
from ibjax.attacks import Attack, StatefulAttack, geometry
from ibjax.errors import InputError, nearest

LOSSES = {"ce": losses.cross_entropy, "kl": losses.kl, "margin": losses.margin}


def pgd(
    *,
    loss: "str | Callable" = "ce",
    norm: str = "linf",
    eps: "str | float | Array" = "8/255",
    step_size: "str | float | Array" = "2/255",
    steps: int = 10,
    init: str = "uniform",
    restarts: int = 1,
    unroll: bool | None = None,
) -> Attack:
    """An attack `(key, logits_fn, x, target) -> x_adv`.

    Args:
      loss: what to maximise, per example: "ce", "kl", "margin" or a function (logits, target) -> (B,).
      norm: "linf" or "l2".
      eps: radius in [0, 1] pixel units, as "8/255", a float, or an array (scalar or one per image).
      step_size: length of one step, same units.
      steps: number of gradient steps.
      init: the first point, a name in `geometry.STARTS`.
      restarts: independent runs; of each image the misclassified one is kept, among equals the one of larger loss.
      unroll: unroll the loop; None means on CPU only, where XLA runs a rolled body on fewer threads.

    Returns:
      The attack. `x` is (B, H, W, C) in [0, 1], `target` what `loss` takes, `key` one key or one per image.

    Raises:
      InputError: an eps that is no radius on [0, 1] images, or an unknown loss, norm or init.
    """
    ascend = stateful_pgd(loss=loss, norm=norm, eps=eps, step_size=step_size, steps=steps, init=init, unroll=unroll)
    per_example = _loss(loss)
    if restarts < 1:
        raise InputError(f"restarts={restarts} is not allowed; at least 1 run is needed")

    def once(key, logits_fn, x, target):
        return ascend(key, lambda x, state: (logits_fn(x), state), x, target, ())[0]

    def attack(key: Array, logits_fn: Callable, x: Array, target: Array) -> Array:
        if restarts == 1:
            return once(key, logits_fn, x, target)

        def run(i, best):
            x_best, score_best = best
            fold = jax.random.fold_in if key.ndim == 0 else jax.vmap(jax.random.fold_in, (0, None))
            x_adv = once(fold(key, i), logits_fn, x, target)
            logits = logits_fn(x_adv)
            score = (~losses.correct(logits, target), per_example(logits, target))  # compared in this order
            better = (score[0] > score_best[0]) | ((score[0] == score_best[0]) & (score[1] > score_best[1]))
            x_best = jnp.where(geometry.per_image(better, x), x_adv, x_best)
            return x_best, jax.tree.map(lambda new, old: jnp.where(better, new, old), score, score_best)

        batch = x.shape[0]
        first = (x, (jnp.zeros(batch, bool), jnp.full(batch, -jnp.inf)))
        return lax.fori_loop(0, restarts, run, first, unroll=_unroll(unroll))[0]

    return attack


def stateful_pgd(
    *,
    loss: "str | Callable" = "ce",
    norm: str = "linf",
    eps: "str | float | Array" = "8/255",
    step_size: "str | float | Array" = "2/255",
    steps: int = 10,
    init: str = "uniform",
    unroll: bool | None = None,
) -> StatefulAttack:
    """PGD on a network that changes as it is evaluated: `(key, forward, x, target, state) -> (x_adv, state)`.

    `forward(x, state) -> (logits, state)`. Rice et al., ARD and IAD attack in batch-norm's training mode, so each
    step of theirs moves the running statistics; here these are the state. Arguments as `pgd`.
    """
    geometry.check_norm(norm, ("linf", "l2"))
    per_example, eps = _loss(loss), geometry.radius(eps, norm)
    step_size = geometry.radius(step_size, norm, "step_size")
    geometry.check_start(init)
    if steps < 1:
        raise InputError(f"steps={steps} is not allowed; at least 1 step is needed")

    def attack(key, forward, x, target, state):
        def objective(x_adv, state):
            logits, state = forward(x_adv, state)
            return jnp.sum(per_example(logits, target)), state  # a sum: gradients stay per image

        def step(_, carry):
            x_adv, state = carry
            gradient, state = jax.grad(objective, has_aux=True)(x_adv, state)
            x_adv = x_adv + geometry.per_image(step_size, x) * geometry.ascent_direction(gradient, norm)
            return geometry.project(x_adv, x, norm, eps), state

        x_start = geometry.start(key, x, norm, eps, init)
        return lax.fori_loop(0, steps, step, (x_start, state), unroll=_unroll(unroll))

    return attack


def _loss(loss: "str | Callable") -> Callable:
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise InputError(f"attack loss '{loss}' is unknown; {nearest(loss, LOSSES)}")
    return LOSSES[loss]


def _unroll(unroll: bool | None) -> bool:
    return jax.default_backend() == "cpu" if unroll is None else unroll
