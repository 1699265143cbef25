"""FAB: Croce & Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack", ICML 2020.

Let df_k = z_k − z_y, and let k be the class with the smallest |df_k| / ||∇df_k||_q (q dual to p). The decision boundary
to class k is linearised at x_t to the hyperplane { x' : df_k + <∇df_k, x' − x_t> = 0 }. Each step computes

    d₁, d₀ = the shortest steps, in l_p, from x_t and from x onto that hyperplane inside [0, 1]
    α      = min( ||d₁|| / (||d₁|| + ||d₀||), α_max )
    x_{t+1} = clip( (1 − α)·(x_t + η·d₁) + α·(x + η·d₀), 0, 1 )
    if x_{t+1} is misclassified: it is stored if it is the nearest to x so far, then x_{t+1} ← x + β·(x_{t+1} − x)

| symbol     | code     | default |
|------------|----------|---------|
| N_iter     | steps    | 100     |
| N_restarts | restarts | 1       | all but the first start at random, eps/2 away
| α_max      |          | 0.1     |
| η          |          | 1.05    |
| β          |          | 0.9     |
| k          | targets  | 0       | 9: one run for each of the 9 largest other clean logits (FAB-T)

FAB searches for the nearest adversarial image and does not use a radius; a result counts only if it lies within eps.

Guarantees (tests of the same names): x_adv lies in the eps-ball and in [0, 1]; the steps onto the hyperplane
agree with the solvers of a quadratic and a linear programme.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ibjax import losses
from ibjax.attacks import Attack, geometry
from ibjax.attacks.iterative import Iterative, as_attack
from ibjax.errors import check_count

_ALPHA_MAX, _ETA, _BETA = 0.1, 1.05, 0.9


def fab(
    *, norm: str = "linf", eps: "str | float" = "8/255", steps: int = 100, restarts: int = 1, targets: int = 0
) -> Attack:
    """An attack `(key, logits_fn, x, y) -> x_adv`.

    Args:
      norm: "linf", "l2" or "l1".
      eps: radius in [0, 1] pixel units, as "8/255" or a float; if the result lies farther away, x is returned.
      steps: steps of each run; a step costs two forward passes and the gradient of every class, or with `targets` of
        one class.
      restarts: number of runs; only the first one starts at x.
      targets: 0 attacks all classes at once; n > 0 attacks the classes of the n largest other clean logits in turn.

    Returns:
      The attack. `x` is (B, H, W, C) in [0, 1], `y` labels (B,), `key` one key or one per image.

    Raises:
      InputError: an unknown norm, an invalid eps, or a number out of range.
    """
    return as_attack(iterative_fab(norm, eps, steps, restarts, targets))


class State(NamedTuple):
    """The state of a run; images are (B, H, W, C), numbers (B,)."""

    x: Array  # x_t
    x_best: Array  # nearest misclassified image
    nearest: Array  # the distance of x_best from x; infinite if no misclassified image was found


def iterative_fab(norm: str, eps: "str | float", steps: int = 100, restarts: int = 1, targets: int = 0) -> Iterative:
    """FAB as an `Iterative`, for the runner; arguments as in `fab`."""
    norm, radius = geometry.check_norm(norm), geometry.one_radius(eps, norm)
    for name, value, least in (("steps", steps, 1), ("restarts", restarts, 1), ("targets", targets, 0)):
        check_count(f"fab's {name}", value, least)
    slopes = _slope_to if targets else _slope_to_nearest

    def init(keys, restart, x, y):
        t = _direction(keys, x, norm)
        x_start = jnp.where(geometry.per_image(restart > 0, x), jnp.clip(x + 0.5 * radius * t, 0.0, 1.0), x)
        return State(x_start, x, jnp.full(x.shape[0], jnp.inf))

    def step(i, logits_fn, x, y, other, state, exact=None):
        df, w = slopes(logits_fn, state.x, y, other, norm)
        df, w = geometry.finite(df), geometry.finite(w)  # with NaN logits there is no boundary to step to
        above = df + jnp.sum((w * (x - state.x)).reshape(x.shape[0], -1), 1)  # the same linear function, at x
        points, normals, excess = (jnp.concatenate(pair) for pair in ((state.x, x), (w, w), (df, above)))
        d1, d0 = jnp.split(step_onto_hyperplane(points, normals, excess, norm), 2)
        a1, a0 = (jnp.maximum(geometry.size(d, norm), 1e-8) for d in (d1, d0))
        alpha = jnp.minimum(a1 / (a1 + a0), _ALPHA_MAX)
        moved = jnp.clip((state.x + _ETA * d1) * (1 - alpha) + (x + _ETA * d0) * alpha, 0.0, 1.0)
        wrong = ~losses.correct((exact or logits_fn)(moved), y)
        distance = geometry.distance(moved, x, norm)
        nearer = wrong & (distance < state.nearest)
        back = jnp.where(geometry.per_image(wrong, x), x + _BETA * (moved - x), moved)
        x_best = jnp.where(geometry.per_image(nearer, x), moved, state.x_best)
        return State(back, x_best, jnp.where(nearer, distance, state.nearest))

    def x_adv(x, state):
        return jnp.where(geometry.per_image(state.nearest <= radius, x), state.x_best, x)

    def ends(x, state):
        return (jnp.where(geometry.per_image(geometry.distance(state.x, x, norm) <= radius, x), state.x, x),)

    return Iterative("fab", norm, radius, init, step, steps, x_adv, restarts=restarts, targets=targets, ends=ends)


def _direction(keys, x, norm):
    if norm == "linf":
        t = geometry.draw(lambda k, s, d: jax.random.uniform(k, s, d, -1.0, 1.0), keys, x)
    else:
        t = geometry.draw(jax.random.normal, keys, x)
    return t / (geometry.size(t, norm) + 1e-12)


# ---- the boundary, linearised --------------------------------------------------------------------------------


def _slope_to(logits_fn, x, y, other, norm):
    """(df (B,), its gradient) towards the class `other`."""

    def total(x):
        df = losses.margin_targeted(logits_fn(x), y, other)
        return jnp.sum(df), df

    w, df = jax.grad(total, has_aux=True)(x)
    return df, w


def _slope_to_nearest(logits_fn, x, y, other, norm):
    return nearest_boundary(logits_fn, x, y, norm)


def nearest_boundary(logits_fn: Callable, x: Array, y: Array, norm: str) -> tuple[Array, Array]:
    """(df (B,), its gradient (B, H, W, C)) of the class whose linearised boundary is nearest in `norm`."""
    logits, pull_back = jax.vjp(logits_fn, x)
    classes = logits.shape[-1]
    is_true = jax.nn.one_hot(y, classes, dtype=bool)
    # one vector-Jacobian product per class, for all images at once: ∇(z_k − z_y)
    towards = jnp.eye(classes, dtype=logits.dtype)[:, None, :] - is_true.astype(logits.dtype)[None]  # (K, B, K)
    gradients = jax.vmap(lambda cotangent: pull_back(cotangent)[0])(towards)  # (K, B, H, W, C)
    z_y = jnp.sum(jnp.where(is_true, logits, 0.0), axis=-1, keepdims=True)
    df = logits - z_y  # (B, K)
    dual = {"linf": "l1", "l2": "l2", "l1": "linf"}[norm]
    lengths = jax.vmap(lambda g: geometry.size(g, dual).reshape(-1))(gradients)  # (K, B)
    distance = jnp.where(is_true, jnp.inf, jnp.abs(df) / (lengths.T + 1e-12))
    nearest = jnp.argmin(distance, axis=-1)
    df = jnp.take_along_axis(df, nearest[:, None], axis=-1)[:, 0]
    return df, jax.vmap(lambda k, g: g[k], (0, 1))(nearest, gradients)


# ---- the shortest step onto a hyperplane inside the box ------------------------------------------------------


def step_onto_hyperplane(x: Array, w: Array, above: Array, norm: str) -> Array:
    """argmin ||d||_p subject to <w, d> = −above and x + d in [0, 1].

    If the hyperplane does not meet the box, the result is the step to the corner of the box that is nearest to it.
    With the sign of w chosen so that above ≥ 0, every pixel moves against sign(w_i), at most by its distance c_i to the
    bound:

        l_inf: |d_i| = min(λ, c_i)        l2: |d_i| = min(λ·|w_i|, c_i)        l1: steepest pixels first, each up to c_i

    with the smallest λ that satisfies Σ |w_i|·|d_i| = above.

    Args:
      x, w: images and the hyperplane's normals, (B, H, W, C).
      above: <w, x> − b, (B,), for the hyperplane <w, ·> = b.
      norm: "linf", "l2" or "l1".
    """
    excess = above.reshape((-1,) + (1,) * (x.ndim - 1))
    w = jnp.where(excess < 0, -w, w)
    scale = jnp.maximum(geometry.size(w, "linf"), 1e-30)  # so that squares of tiny gradients do not vanish
    steepness, excess = jnp.abs(w) / scale, jnp.abs(excess) / scale
    room = jnp.where(w > 0, x, 1.0 - x)
    if norm == "l1":
        length = _steepest_first(steepness, room, excess)
    else:
        rate = jnp.ones_like(w) if norm == "linf" else steepness
        multiplier = _multiplier(steepness * rate, steepness * room, excess)
        length = jnp.where(steepness > 0, jnp.minimum(multiplier * rate, room), 0.0)
    return -jnp.sign(w) * length


def _multiplier(slope, most, wanted):
    """The smallest λ with Σ_i min(λ·slope_i, most_i) = wanted, (B, 1, 1, 1); infinite if there is none.

    The sum is concave and piecewise linear in λ, so Newton's method from 0 approaches the root from below and is exact
    once it reaches the linear piece that contains the root.
    """
    axes = tuple(range(1, slope.ndim))

    def newton(low):
        free = low * slope < most
        full = jnp.sum(jnp.where(free, 0.0, most), axes, keepdims=True)
        total_slope = jnp.sum(jnp.where(free, slope, 0.0), axes, keepdims=True)
        return jnp.where(total_slope > 0, (wanted - full) / jnp.where(total_slope > 0, total_slope, 1.0), jnp.inf)

    def go_on(carry):
        low, high, count = carry
        return jnp.any(high > low) & (count < 100)

    def climb(carry):
        _, low, count = carry
        return low, jnp.maximum(newton(low), low), count + 1

    zero = jnp.zeros_like(wanted)
    multiplier = lax.while_loop(go_on, climb, (zero - 1.0, zero, 0))[1]
    return jnp.where(jnp.sum(most, axes, keepdims=True) <= wanted, jnp.inf, multiplier)


def _steepest_first(steepness, room, wanted):
    """Moves the steepest pixels, each to its bound, until Σ steepness·length = wanted.

    The last ones, which are equally steep, all move by the same share of their room.
    """
    axes, gain = tuple(range(1, steepness.ndim)), steepness * room

    def gained(pixels):
        return jnp.sum(jnp.where(pixels, gain, 0.0), axes, keepdims=True)

    least = geometry.largest_threshold(lambda t: gained(steepness >= t) >= wanted, steepness)
    last = steepness == least
    missing, most = wanted - gained(steepness > least), gained(last)
    share = jnp.clip(missing / jnp.where(most > 0, most, 1.0), 0.0, 1.0)
    moved = jnp.where(steepness > least, room, jnp.where(last, share * room, 0.0))
    return jnp.where(steepness > 0, moved, 0.0)
