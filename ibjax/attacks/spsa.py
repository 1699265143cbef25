"""SPSA: Uesato et al., "Adversarial Risk and the Dangers of Evaluating Against Weak Attacks", ICML 2018. Gradient-free.

    g       = mean_q [ L(f(x_t + δ v_q)) − L(f(x_t − δ v_q)) ] / 2δ · v_q        v_q ∈ {−1, 1}^{H×W×C}
    x_{t+1} = Π( x_t + Adam(g) )                                                  x_0 = x

| symbol | code    | default  |
|--------|---------|----------|
| L      | loss    | "margin" |
| ε      | eps     | "8/255"  |
| δ      | delta   | 0.01     |
| q      | samples | 128      |
| lr     | lr      | 0.01     | Adam's
| T      | steps   | 10       |

A step costs 2 · samples forward passes. The queries x ± δ v are not clipped to the box, as in advertorch.
Deviation: advertorch draws one v for all images of a batch, so its result depends on the batch; here every image has
its own v.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from ibjax.attacks import Attack, geometry
from ibjax.attacks.entrance import checked
from ibjax.attacks.pgd import fold_in, loss_function, target_kind
from ibjax.errors import InputError, check_count, check_range


def spsa(
    *,
    loss: "str | Callable" = "margin",
    norm: str = "linf",
    eps: "str | float | Array" = "8/255",
    delta: float = 0.01,
    samples: int = 128,
    lr: float = 0.01,
    steps: int = 10,
) -> Attack:
    """An attack `(key, logits_fn, x, target) -> x_adv` that never differentiates `logits_fn`.

    Args:
      loss: what to maximise, as in `pgd`, with a value per image.
      norm, eps: as in `pgd`.
      delta: half the length of the finite differences, in pixel units.
      samples: number of directions v per step; they are evaluated one after the other.
      lr: Adam's learning rate, about the length of a step in each pixel.
      steps: number of Adam steps.

    Raises:
      InputError: an eps that is not a radius for [0, 1] images, an unknown loss or norm, numbers out of range.
    """
    norm = geometry.check_norm(norm, ("linf", "l2"))
    value, eps, optimizer = loss_function(loss), geometry.radius(eps, norm), optax.adam(lr)
    check_range("delta", delta, 1e-6)
    check_range("lr", lr, 0)
    check_count("samples", samples)
    check_count("steps", steps)

    def attack(key: Array, logits_fn: Callable, x: Array, target: Array) -> Array:
        def loss_at(x):
            values = value(logits_fn(x), target)
            if values.ndim == 0:
                raise InputError("spsa needs a loss with a value per image (B,); use pgd where it couples the batch")
            return values

        def estimate(key, x_adv):
            def add(q, total):
                v = geometry.draw(jax.random.rademacher, fold_in(key, q), x)
                difference = loss_at(x_adv + delta * v) - loss_at(x_adv - delta * v)
                return total + geometry.per_image(geometry.finite(difference), x) * v  # 0 for NaN logits

            return lax.fori_loop(0, samples, add, jnp.zeros_like(x)) / (2 * delta * samples)

        def step(t, carry):
            x_adv, adam = carry
            g = estimate(fold_in(key, t), x_adv)
            updates, adam = optimizer.update(-g, adam)  # optax minimises
            return geometry.project(x_adv + updates, x, norm, eps), adam

        return lax.fori_loop(0, steps, step, (x, optimizer.init(x)))[0]

    return checked(attack, target_kind(loss))
