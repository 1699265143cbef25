"""Projected gradient descent: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018.

    x_0     = start(x)
    x_{t+1} = Π( x_t + step_size · direction(∇_x L(f(x_t), target)) )          Π: eps-ball, then [0, 1]

| symbol      | code        | default  |
|-------------|-------------|----------|
| L           | loss        | "ce"     | or "kl" (to a distribution), "margin" (C&W), or a function: see below
| ε           | eps         | "8/255"  |
| step        | step_size   | "2/255"  |
| k           | steps       | 10       |
| first point | init        | "uniform"| see geometry.STARTS

Basic iterative method (Kurakin et al., 2017): init="none". Margin PGD, called "CW l_inf" in many papers: loss="margin".

An adaptive attack passes its own loss(output, target). If the loss needs more than logits, the network returns a tuple
(logits, …), as `Net.predict` does; if it needs more than labels, the target is a tuple (labels, …). The loss returns
one value per image (B,) or, if it couples the images of a batch (HSIC), one scalar (). With a scalar loss the result
depends on the composition of the batch; keep the batch size fixed and report it.

    def loss(output, target):                              # cross-entropy plus a term on a tap
        (logits, features), (labels, tap) = output, target
        return losses.cross_entropy(logits, labels) + jnp.mean((features["stage1"] - tap) ** 2, (1, 2, 3))

    x_adv = pgd(loss=loss)(key, lambda x: net.predict(variables, x), x, (y, tap))

Guarantees (tests of the same names): x_adv lies in the eps-ball and in [0, 1]; eps=0 returns x; the same key
gives the same result; each image's result is independent of the others in its batch (unless the loss couples them).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ibjax import losses
from ibjax.attacks import Attack, StatefulAttack, geometry
from ibjax.attacks.checks import first
from ibjax.attacks.entrance import ANYTHING, DISTRIBUTIONS, SOFT_LABELS, checked, enter
from ibjax.devices import cores, precision
from ibjax.errors import InputError, check_count, nearest

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
    clip_input: bool = False,
    unroll: bool | None = None,
) -> Attack:
    """An attack `(key, logits_fn, x, target) -> x_adv`.

    Args:
      loss: what to maximise: "ce", "kl", "margin" or a function (output, target) -> (B,) or ().
      norm: "linf" or "l2".
      eps: radius in [0, 1] pixel units, as "8/255", a float, or an array (scalar or one per image).
      step_size: length of one step, same units.
      steps: number of gradient steps.
      init: the first point, a name in `geometry.STARTS`.
      clip_input: clip every point to [0, 1] before the network sees it, so that pixels outside have no gradient. With
        init="uniform_unclipped" and one step, this is Fast-AT's rule on ImageNet. Without it the first point may lie
        outside [0, 1].
      restarts: number of independent runs. For each image a misclassified result is preferred, then the larger loss
        (the larger margin if the loss couples the batch and so has no value per image).
      unroll: whether to unroll the loop; None: on CPUs only, where XLA runs the body of a rolled loop on fewer threads.

    Returns:
      The attack. `x` is (B, H, W, C) in [0, 1], `target` is what `loss` takes, `key` is one key or one per image.

    Raises:
      InputError: an eps that is not a radius for [0, 1] images, an unknown loss, norm or init, a loss of another shape.
    """
    threat = dict(norm=norm, eps=eps, step_size=step_size)
    ascend = _ascent(loss=loss, steps=steps, init=init, clip_input=clip_input, unroll=unroll, **threat)
    value = loss_function(loss)
    check_count("restarts", restarts)

    def once(key, logits_fn, x, target):
        return ascend(key, lambda x, state: (logits_fn(x), state), x, target, ())[0]

    def attack(key: Array, logits_fn: Callable, x: Array, target: Array) -> Array:
        if restarts == 1:
            return once(key, logits_fn, x, target)

        def run(i, best):
            x_best, score_best = best
            x_adv = once(fold_in(key, i), logits_fn, x, target)
            output = logits_fn(x_adv)
            logits, labels, height = first(output), first(target), value(output, target)
            height = losses.margin(logits, labels) if height.ndim == 0 else height
            score = (~losses.correct(logits, labels), height)  # compared lexicographically
            better = (score[0] > score_best[0]) | ((score[0] == score_best[0]) & (score[1] > score_best[1]))
            x_best = jnp.where(geometry.per_image(better, x), x_adv, x_best)
            return x_best, jax.tree.map(lambda new, old: jnp.where(better, new, old), score, score_best)

        batch = x.shape[0]
        none_yet = (x, (jnp.zeros(batch, bool), jnp.full(batch, -jnp.inf)))
        return lax.fori_loop(0, restarts, run, none_yet, unroll=unrolled(unroll))[0]

    return checked(attack, target_kind(loss))


def stateful_pgd(
    *,
    loss: "str | Callable" = "ce",
    norm: str = "linf",
    eps: "str | float | Array" = "8/255",
    step_size: "str | float | Array" = "2/255",
    steps: int = 10,
    init: str = "uniform",
    clip_input: bool = False,
    unroll: bool | None = None,
) -> StatefulAttack:
    """PGD on a network whose state each evaluation updates: `(key, forward, x, target, state) -> (x_adv, state)`.

    `forward(x, state) -> (output, state)`. Rice et al., ARD and IAD attack with batch-norm in training mode, so each of
    their attack steps updates the running statistics, which are the state here. Arguments as in `pgd`.
    """
    threat = dict(norm=norm, eps=eps, step_size=step_size)
    ascend = _ascent(loss=loss, steps=steps, init=init, clip_input=clip_input, unroll=unroll, **threat)

    @precision.evaluated  # in training the train step says otherwise
    def attack(key: Array, forward: Callable, x: Array, target: Any, state: Any) -> tuple[Array, Any]:
        network = lambda x: forward(x, state)[0]  # noqa: E731 - with batch statistics, in training
        key, x, target = enter(key, network, x, target, target_kind(loss), coupled=True)
        return ascend(key, forward, x, target, state)

    return attack


def _ascent(*, loss, norm, eps, step_size, steps, init, clip_input, unroll):
    """`stateful_pgd` without the checks of its arguments."""
    norm = geometry.check_norm(norm, ("linf", "l2"))
    value, eps = loss_function(loss), geometry.radius(eps, norm)
    step_size = geometry.step(step_size, norm, eps)
    geometry.check_start(init)
    check_count("steps", steps)

    def attack(key, forward, x, target, state):
        def shown(x_adv, state):
            return forward(jnp.clip(x_adv, 0.0, 1.0) if clip_input else x_adv, state)

        def step(_, carry):
            x_adv, state = carry
            gradient, state = loss_gradient(value, shown, x_adv, target, state)
            x_adv = x_adv + geometry.per_image(step_size, x) * geometry.ascent_direction(gradient, norm)
            return geometry.project(x_adv, x, norm, eps), state

        x_start = geometry.start(key, x, norm, eps, init)
        return lax.fori_loop(0, steps, step, (x_start, state), unroll=unrolled(unroll))

    return attack


# ---- what attacks of other files share with this one --------------------------------------------------------


def loss_function(loss: "str | Callable") -> Callable:
    """The loss (output, target) -> (B,) or () of a name, or a given function with a check of its result's shape.

    The named losses use only the `first` element of output and target: the logits, and the labels or distributions.
    """
    if not callable(loss):
        if loss not in LOSSES:
            raise InputError(f"attack loss '{loss}' is unknown; {nearest(loss, LOSSES)}")
        return lambda output, target: LOSSES[loss](first(output), first(target))

    def per_image(output, target):
        value = loss(output, target)
        if value.ndim > 1:
            raise InputError(
                f"the attack's loss has shape {value.shape}; return one value per image (B,), or one for the batch ()"
            )
        return value

    return per_image


def loss_gradient(value: Callable, forward: Callable, x: Array, target: Array, state: Any) -> tuple[Array, Any]:
    """(∇_x Σ value(output, target), state) with output, state = forward(x, state).

    The gradient is 0 for images without a predicted class, for example with NaN logits: these count as broken, and
    their gradient carries no information.
    """

    def total(x):
        output, after = forward(x, state)
        return jnp.sum(value(output, target)), (first(output), after)  # the sum's gradient is that of each image

    gradient, (logits, state) = jax.grad(total, has_aux=True)(x)
    broken = losses.predicted(logits.reshape(x.shape[0], -1)) < 0
    return jnp.where(geometry.per_image(broken, x), 0.0, gradient), state


def target_kind(loss: "str | Callable") -> str:
    """The kind of target that a loss takes, one of the constants in entrance.py."""
    return ANYTHING if callable(loss) else DISTRIBUTIONS if loss == "kl" else SOFT_LABELS


def fold_in(key: Array, data: "int | Array") -> Array:
    """Folds a number into one key, or into each of a key per image (B,)."""
    return (jax.random.fold_in if key.ndim == 0 else jax.vmap(jax.random.fold_in, (0, None)))(key, data)


def unrolled(unroll: bool | None) -> bool:
    """Whether a short loop is unrolled: as given, or if None, on CPUs only."""
    return cores.form().unroll if unroll is None else unroll
