"""L-BFGS-B: Byrd, Lu, Nocedal & Zhu, "A Limited Memory Algorithm for Bound Constrained Optimization", SIAM J. Sci.
Comput. 1995; the projected subspace step of Morales & Nocedal, ACM TOMS 2011. For `jit` and `vmap`.

    min_x f(x)   subject to   l ≤ x ≤ u

Each iteration minimises the model  m(z) = gᵀz + ½ zᵀBz,  B = θI − W K⁻¹ Wᵀ,  from the last `memory` pairs (s, y):

    1. Cauchy point: the first minimum of m along the path P(x − t g)
    2. on the variables that are free there: the minimum of m, projected onto the box
    3. a line search from x towards that point

with W = [Y, θS], K = [[−D, Lᵀ], [L, θSᵀS]], D and L the diagonal and the strictly lower part of SᵀY, θ = yᵀy / sᵀy.

Differences from the Fortran code: every pair is scaled so that sᵀy = 1, which leaves B as it is and K well conditioned
in float32; the path's segments are computed at once rather than one after the other; the line search requires only
sufficient decrease (its first and longest step, 1, leads to the minimum of the model) and interpolates by parabolas, so
the iterates differ from the Fortran code's once a step was shortened; pairs without curvature are dropped.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

_matmul = partial(jnp.matmul, precision="highest")  # GPUs would round to TF32
_DECREASE = 1e-3  # a step must achieve this share of the decrease that the slope predicts
_SEARCHES = 20


class _State(NamedTuple):
    x: Array  # (D,)
    value: Array  # f(x)
    gradient: Array  # (D,)
    s: Array  # (D, m) differences of x, the newest last; columns of zeros are empty
    y: Array  # (D, m) differences of the gradient


class _Model(NamedTuple):
    theta: Array
    w: Array  # (D, 2m)
    k: Array  # (2m, 2m)


def minimize(
    fun: Callable[[Array], Array], x: Array, lower: Array, upper: Array, *, steps: int, memory: int = 10
) -> tuple[Array, Array]:
    """(x, fun(x)) after at most `steps` iterations from x (D,), which lies between `lower` and `upper` (D,).

    `fun` maps (D,) to a scalar. It is called once per iteration, and again each time the line search shortens the step;
    under `vmap`, as often as the problem that needs most calls.
    """
    value_and_gradient = jax.value_and_grad(fun)

    def iteration(_, state):
        model = _model(state.s, state.y)
        cauchy = _cauchy_point(state.x, state.gradient, lower, upper, model)
        target = _subspace_minimum(state.x, state.gradient, cauchy, lower, upper, model)
        moved, x, value, gradient = _line_search(value_and_gradient, state, target - state.x, lower, upper)
        s, y = _remember(state.s, state.y, x - state.x, gradient - state.gradient)
        s, y = (jnp.where(moved, pairs, 0.0) for pairs in (s, y))  # no decrease: clear the memory
        new = _State(x, value, gradient, s, y)
        return jax.tree.map(lambda new, old: jnp.where(moved, new, old), new, state)._replace(s=s, y=y)

    empty = jnp.zeros((x.size, memory), x.dtype)
    state = lax.fori_loop(0, steps, iteration, _State(x, *value_and_gradient(x), empty, empty))
    return state.x, state.value


def _remember(s_all, y_all, s, y):
    """The memory with a new pair, scaled to sᵀy = 1, in place of the oldest; a pair without curvature is ignored."""
    sy, yy = jnp.sum(s * y), jnp.sum(y * y)
    curved = sy > jnp.finfo(s.dtype).eps * yy
    scale = lax.rsqrt(jnp.where(curved, sy, 1.0))

    def push(pairs, new):
        return jnp.where(curved, jnp.concatenate([pairs[:, 1:], scale * new[:, None]], axis=1), pairs)

    return push(s_all, s), push(y_all, y)


def _model(s, y):
    """The model's B as (θ, W, K). An unused pair has 1 on the diagonals of K, and columns of zeros in W."""
    sy, ss, yy = _matmul(s.T, y), _matmul(s.T, s), jnp.sum(y[:, -1] ** 2)
    there = jnp.diagonal(sy) > 0
    theta = jnp.where(there[-1], yy, 1.0)
    lower = jnp.tril(sy, -1)
    padded = theta * ss + jnp.diag(jnp.where(there, 0.0, 1.0))
    k = jnp.block([[-jnp.eye(len(there), dtype=s.dtype), lower.T], [lower, padded]])
    return _Model(theta, jnp.concatenate([y, theta * s], axis=1), k)


def _solve(a, b):
    """a⁻¹b by Gauss-Jordan elimination with pivoting, for a (n, n) and b (n,) or (n, k).

    LAPACK is not used: under `vmap`, a batched call waits on XLA's threads for its own parts, and two such calls at the
    same time deadlock on two cores (see `ibjax.information.linalg`).
    """
    n, rows = len(a), jnp.concatenate([a, b.reshape(len(a), -1)], axis=1)

    def eliminate(i, rows):
        here = jnp.arange(n) == i
        column = jnp.where(jnp.arange(n) < i, -1.0, jnp.abs(rows[:, i]))
        pivot = jnp.argmax(column)
        swapped = rows.at[pivot].set(rows[i]).at[i].set(rows[pivot])
        row = swapped[i] / swapped[i, i]
        return jnp.where(here[:, None], row[None], swapped - swapped[:, i, None] * row[None])

    return lax.fori_loop(0, n, eliminate, rows)[:, n:].reshape(b.shape)


def _cauchy_point(x, g, lower, upper, model):
    """The first minimum of m along P(x − t g), a parabola between the values of t where a variable meets its bound.

    After j of these, with d the direction of the variables still free, S = ‖d‖², p = Wᵀd and c = Wᵀ(P(x − t g) − x):
    m' = −S + θ t S − pᵀK⁻¹c and m'' = θS − pᵀK⁻¹p.
    """
    bound = jnp.where(g < 0, upper, lower)
    times = jnp.where(g == 0, 0.0, (x - bound) / jnp.where(g == 0, 1.0, g))
    order = jnp.argsort(times)
    times, g_sorted, w = times[order], g[order], model.w[order]
    still_free = jnp.concatenate([g_sorted[:, None] ** 2, -w * g_sorted[:, None]], axis=1)  # terms of S and p
    still_free = jnp.concatenate([jnp.cumsum(still_free[::-1], axis=0)[::-1], jnp.zeros_like(still_free[:1])])
    size, p = still_free[:, 0], still_free[:, 1:]  # (D + 1,), (D + 1, 2m): of each segment
    start = jnp.concatenate([jnp.zeros_like(times[:1]), times])
    c = jnp.concatenate([jnp.zeros_like(p[:1]), jnp.cumsum(jnp.diff(start)[:, None] * p[:-1], axis=0)])
    k_p = _solve(model.k, p.T).T
    slope = -size + model.theta * start * size - jnp.sum(k_p * c, axis=1)
    curvature = model.theta * size - jnp.sum(k_p * p, axis=1)
    step = jnp.where(slope < 0, -slope / jnp.maximum(curvature, jnp.finfo(x.dtype).tiny), 0.0)
    step = step.at[-1].set(0.0)  # all variables at their bounds: the path ends
    end = jnp.concatenate([times, jnp.full_like(times[:1], jnp.inf)])
    t = (start + step)[jnp.argmax(start + step <= end)]
    return jnp.clip(x - t * g, lower, upper)


def _subspace_minimum(x, g, cauchy, lower, upper, model):
    """The minimum of m over the variables that are free at the Cauchy point, projected onto the box.

    With the residual r = ∇m at the Cauchy point: d = −r/θ − W (K − WᵀW/θ)⁻¹ Wᵀr/θ², restricted to the free variables.
    """
    theta, free = model.theta, (lower < cauchy) & (cauchy < upper)
    w = jnp.where(free[:, None], model.w, 0.0)
    k_c = _solve(model.k, _matmul(model.w.T, cauchy - x))
    r = jnp.where(free, g + theta * (cauchy - x) - _matmul(model.w, k_c), 0.0)
    inner = _solve(model.k - _matmul(w.T, w) / theta, _matmul(w.T, r))
    d = -r / theta - _matmul(w, inner) / theta**2
    projected = jnp.clip(cauchy + d, lower, upper)
    room = jnp.where(d > 0, upper - cauchy, lower - cauchy) / jnp.where(d == 0, 1.0, d)
    shortened = cauchy + jnp.minimum(1.0, jnp.min(jnp.where(d == 0, 1.0, room))) * d
    return jnp.where(jnp.sum((projected - x) * g) < 0, projected, jnp.clip(shortened, lower, upper))


def _line_search(value_and_gradient, state, d, lower, upper):
    """(whether f decreased enough, x, f(x), ∇f(x)): tries t = 1, then minima of the interpolating parabola."""
    slope = jnp.sum(state.gradient * d)

    def try_step(t):
        x = jnp.clip(state.x + t * d, lower, upper)  # x + d lies in the box; clipping removes rounding
        return x, *value_and_gradient(x)

    def too_long(carry):
        count, t, _, value, _ = carry
        return (count < _SEARCHES) & ~(value <= state.value + _DECREASE * t * slope)

    def shorten(carry):
        count, t, _, value, _ = carry
        parabola = -slope * t / (2 * (value - state.value - slope * t))
        t = t * jnp.where(parabola > 0, jnp.clip(parabola, 0.1, 0.5), 0.5)  # one half also if the value is NaN
        return count + 1, t, *try_step(t)

    descends = slope < 0
    one = jnp.ones((), state.x.dtype)
    count, _, x, value, gradient = lax.while_loop(
        lambda carry: descends & too_long(carry), shorten, (jnp.int32(0), one, *try_step(one))
    )
    return descends & (count < _SEARCHES), x, value, gradient
