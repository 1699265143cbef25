"""C&W l2 by optimisation: Carlini & Wagner, "Towards Evaluating the Robustness of Neural Networks", S&P 2017.

    x'(w) = (tanh w + 1) / 2
    min_w ||x'(w) − x||² + c · max( z_y − max_{k≠y} z_k, −κ )         z = f(x'(w)), Adam, w_0 = artanh(2x − 1)

For every image the attack returns the nearest misclassified iterate, or the image itself if no iterate was
misclassified. The distance is bounded only if `eps` is given. The l_inf attack that other papers call CW is
`pgd(loss="margin")`.

| symbol     | code  | default |
|------------|-------|---------|
| c          | c     | 1.0     | shared information (MERL TR2022-141): c=1, 20 steps, lr 0.01 (MNIST 0.003)
| κ          | kappa | 0.0     | IB-RAR: c=0.1, 200 steps, lr 0.1
| iterations | steps | 200     |
| step       | lr    | 0.01    |

Deviations: c is fixed, without the paper's binary search, as in torchattacks. 2x − 1 is clamped to ±(1 − 1e-6), where
artanh is finite, so that pixels of 0 and 1 can change.

`torchattacks_compat=True` reproduces torchattacks 3.5.1 with its faults, for comparison with published numbers:
- z_y and the best other logit are maxima over logits masked with 0, not −∞. If all logits are negative, as for a
  network that ends in log-softmax, both maxima are 0, the classification term vanishes and the attack has no effect.
- Pixels of exactly 0 and 1 start at ±∞ and never change.
- Every max(steps // 10, 1) steps the whole batch stops if its summed cost rose, so an image's result depends on the
  other images of the batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from ibjax import losses
from ibjax.attacks import Attack, geometry
from ibjax.attacks.entrance import SOFT_LABELS, checked
from ibjax.errors import check_count, check_range


class _State(NamedTuple):
    step: Array
    w: Array
    adam: Any
    x_best: Array
    smallest: Array  # (B,) squared distance of x_best; initially eps²
    cost: Array  # cost of the batch at the last check
    stopped: Array


def cw(
    *,
    c: float = 1.0,
    kappa: float = 0.0,
    steps: int = 200,
    lr: float = 0.01,
    eps: "str | float | Array | None" = None,
    torchattacks_compat: bool = False,
) -> Attack:
    """An attack `(key, logits_fn, x, target) -> x_adv`; `key` is not used.

    Args:
      c: weight of the classification term.
      kappa: confidence: how far the best other logit is pushed above the true one.
      steps: number of Adam steps.
      lr: Adam's learning rate, in w.
      eps: l2 radius within which an iterate must lie to count as a success; None for no bound.
      torchattacks_compat: see above.

    Raises:
      InputError: an eps that is not an l2 radius for [0, 1] images, numbers out of range.
    """
    radius = jnp.inf if eps is None else geometry.radius(eps, "l2")
    for name, number in (("c", c), ("kappa", kappa), ("lr", lr)):
        check_range(name, number, 0)
    check_count("steps", steps)
    limit, lead = (1.0, _zero_masked_lead) if torchattacks_compat else (1 - 1e-6, _lead)
    optimizer, check_every = optax.adam(lr), max(steps // 10, 1)

    def attack(key: Array, logits_fn: Callable, x: Array, target: Array) -> Array:
        labels = losses.as_labels(target)

        def cost(w):
            x_adv = (jnp.tanh(w) + 1) / 2
            logits = logits_fn(x_adv)
            squared = jnp.sum((x_adv - x) ** 2, axis=tuple(range(1, x.ndim)))
            total = jnp.sum(squared + c * jnp.maximum(lead(logits, labels), -kappa))
            return total, (x_adv, squared, ~losses.correct(logits, labels))

        def step(s):
            (total, (x_adv, squared, fooled)), gradient = jax.value_and_grad(cost, has_aux=True)(s.w)
            better = fooled & (squared < s.smallest)
            updates, adam = optimizer.update(gradient, s.adam)
            check = jnp.bool(torchattacks_compat) & (s.step % check_every == 0)
            return _State(
                step=s.step + 1,
                w=s.w + updates,
                adam=adam,
                x_best=jnp.where(geometry.per_image(better, x), x_adv, s.x_best),
                smallest=jnp.where(better, squared, s.smallest),
                cost=jnp.where(check, total, s.cost),
                stopped=check & (total > s.cost),
            )

        w = jnp.arctanh(jnp.clip(2 * x - 1, -limit, limit))
        smallest = jnp.broadcast_to(jnp.square(jnp.asarray(radius, x.dtype)), x.shape[:1])
        first = _State(jnp.int32(0), w, optimizer.init(w), x, smallest, jnp.float32(jnp.inf), jnp.bool(False))
        return lax.while_loop(lambda s: (s.step < steps) & ~s.stopped, step, first).x_best

    return checked(attack, SOFT_LABELS, draws=False)


def _lead(logits, labels):
    """z_y − max_{k≠y} z_k"""
    return -losses.margin(logits, labels)


def _zero_masked_lead(logits, labels):
    """max_k [k=y] z_k − max_k [k≠y] z_k: right only where both maxima are positive."""
    logits = logits.astype(jnp.float32)
    is_true = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    return jnp.max(jnp.where(is_true, logits, 0.0), axis=-1) - jnp.max(jnp.where(is_true, 0.0, logits), axis=-1)
