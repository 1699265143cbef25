"""DeepFool: Moosavi-Dezfooli, Fawzi & Frossard, "DeepFool: a simple and accurate method to fool deep neural networks",
CVPR 2016. The nearest misclassified image, as far as linearised boundaries tell.

    f_k = z_k − z_y, w_k = ∇f_k at x_i;   l = argmin_{k≠y} |f_k| / ||w_k||_q           q dual to the norm
    r_i = |f_l| / ||w_l||_2² · w_l   in l2,     |f_l| / ||w_l||_1 · sign(w_l)   in l_inf
    x_{i+1} = clip( x + (1 + η) · Σ_{j≤i} r_j, 0, 1 ),   until x_{i+1} is misclassified

| symbol | code      | default |
|--------|-----------|---------|
| η      | overshoot | 0.02    |
| N      | steps     | 50      | at most

Like FAB it searches for the nearest adversarial image and does not use a radius; a result counts only if it lies within
eps. FAB steps back towards x and respects [0, 1] in its steps, so it finds nearer images.

Deviations: the paper looks for the boundary of the predicted class, here it is that of the label; images that are
misclassified without attack are returned unchanged. As in the authors' code, the overshoot is part of every point that
is evaluated. The paper has no box: here every point is clipped to [0, 1]. The authors' code considers the 10 classes
with the largest logits, this file all of them.

Guarantees (tests of the same names): x_adv lies in the eps-ball and in [0, 1]; on a linear network, away from the
box, the distance is (1 + η) times the distance to the boundary.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from ibjax import losses
from ibjax.attacks import Attack, geometry
from ibjax.attacks.entrance import checked
from ibjax.attacks.fab import nearest_boundary
from ibjax.errors import check_count, check_range


def deepfool(
    *, norm: str = "linf", eps: "str | float | Array | None" = "8/255", steps: int = 50, overshoot: float = 0.02
) -> Attack:
    """An attack `(key, logits_fn, x, y) -> x_adv`; `key` is not used.

    Args:
      norm: "linf" or "l2".
      eps: radius in [0, 1] pixel units; if the result lies farther away, x is returned. None for no bound.
      steps: largest number of steps; a step costs the gradient of every class. The loop ends once every image is
        misclassified.
      overshoot: η, by which a point lies behind the linearised boundary.

    Raises:
      InputError: an unknown norm, an invalid eps, or a number out of range.
    """
    norm = geometry.check_norm(norm, ("linf", "l2"))
    radius = jnp.inf if eps is None else geometry.radius(eps, norm)
    check_count("deepfool's steps", steps)
    check_range("deepfool's overshoot", overshoot, 0)

    def attack(key: Array, logits_fn: Callable, x: Array, y: Array) -> Array:
        labels = losses.as_labels(y)

        def step(carry):
            i, x_adv, total, fooled = carry
            df, w = nearest_boundary(logits_fn, x_adv, labels, norm)
            total = total + geometry.finite(_onto_boundary(df, w, norm))  # with NaN logits there is no boundary
            moved = jnp.clip(x + (1 + overshoot) * total, 0.0, 1.0)
            x_adv = jnp.where(geometry.per_image(fooled, x), x_adv, moved)
            return i + 1, x_adv, total, ~losses.correct(logits_fn(x_adv), labels)

        start = (jnp.int32(0), x, jnp.zeros_like(x), ~losses.correct(logits_fn(x), labels))
        _, x_adv, _, fooled = lax.while_loop(lambda s: (s[0] < steps) & ~jnp.all(s[3]), step, start)
        near = geometry.size(x_adv - x, norm) <= geometry.per_image(radius, x)
        return jnp.where(geometry.per_image(fooled, x) & near, x_adv, x)

    return checked(attack, draws=False)


def _onto_boundary(df, w, norm):
    """The shortest step onto { x' : f + <w, x' − x> = 0 } for f < 0, in the whole space."""
    gap = geometry.per_image(jnp.abs(df), w)
    if norm == "linf":
        return gap / (geometry.size(w, "l1") + 1e-30) * jnp.sign(w)
    length = geometry.size(w, "l2") + 1e-30
    return gap / length * (w / length)
