"""Square Attack: Andriushchenko, Croce, Flammarion & Hein, "Square Attack: a query-efficient black-box adversarial
attack via random search", ECCV 2020; in l1: Croce & Hein, "Mind the box", ICML 2021.

    x_0 = vertical stripes of ±ε (l_inf), or a grid of bumps (l2, l1)
    each query: a random square of side s gets new values, and the result is projected onto ball and box; it replaces
    x_t if its margin z_y − max_{k≠y} z_k is smaller, or if it is ≤ 0, which ends the search

    s = max( round(√(p·H·W)), 1 )          l2, l1: at least 3, and odd; at most the image's shorter side

| symbol | code    | default |
|--------|---------|---------|
| N      | queries | 5000    |
| p      | p_init  | 0.8     | divided by 2, 4, 8 … 512 after 10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000 queries
|        | rescale | False   | True: the schedule is for 10,000 queries, rescaled to N (the paper's)

l_inf: ±2ε is added in the square, with one sign per channel. l2 and l1: the perturbation in the square becomes the sum
of a bump η of the square's size and the old perturbation there, each first scaled to length 1 in the attack's norm. A
second square is set to zero. The sum is scaled so that it takes up the mass of both squares and what the ball has left.
The k-th ring of a bump has weight 1/k² in l2 and 1/k⁴ in l1. The differences between l1 and l2, which include the first
point, follow the authors' code (fra31/auto-attack, a392200).

Deviation from the authors' code: it draws one square and one orientation of the bump for a whole batch, so results
depend on the rest of the batch; here each image draws from its own key. Both draw uniformly, and neither ever chooses
the last possible row or column.

Guarantees (tests of the same names): x_adv lies in the eps-ball and in [0, 1]; the margin never rises; each image's
result is independent of the others in its batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ibjax.attacks import Attack, geometry
from ibjax.attacks.iterative import Iterative, as_attack, lead
from ibjax.errors import check_count, check_range

_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def square(
    *,
    norm: str = "linf",
    eps: "str | float" = "8/255",
    queries: int = 5000,
    p_init: float = 0.8,
    restarts: int = 1,
    rescale: bool = False,
) -> Attack:
    """An attack `(key, logits_fn, x, y) -> x_adv` that uses no gradient.

    Args:
      norm: "linf", "l2" or "l1".
      eps: radius in [0, 1] pixel units, as "8/255" or a float.
      queries: number of proposals after the first point.
      p_init: share of the pixels that the first squares cover.
      restarts: number of runs, each on the images that are not broken yet.
      rescale: rescale the schedule of square sizes from 10,000 queries to `queries`.

    Returns:
      The attack. `x` is (B, H, W, C) in [0, 1], `y` labels (B,), `key` one key or one per image.

    Raises:
      InputError: an unknown norm, an invalid eps, or a number out of range.
    """
    return as_attack(iterative_square(norm, eps, queries, p_init, restarts, rescale))


class State(NamedTuple):
    """The state of a run; images are (B, H, W, C), numbers (B,)."""

    keys: Array
    x_best: Array
    margin: Array  # the margin at x_best; infinite before the first query


def iterative_square(
    norm: str,
    eps: "str | float",
    queries: int = 5000,
    p_init: float = 0.8,
    restarts: int = 1,
    rescale: bool = False,
) -> Iterative:
    """Square as an `Iterative`, for the runner; arguments as in `square`. Step 0 only evaluates the first point."""
    norm, radius = geometry.check_norm(norm), geometry.one_radius(eps, norm)
    check_range("square's p_init", p_init, 0, 1)
    check_count("square's queries", queries)
    check_count("square's restarts", restarts)
    shares = p_init / 2 ** halvings(queries, rescale)

    def init(keys, restart, x, y):
        draw_keys = geometry.fold(keys, 0)
        start = _stripes if norm == "linf" else _bumps
        return State(keys, start(draw_keys, x, norm, radius), jnp.full(x.shape[0], jnp.inf, x.dtype))

    def step(i, logits_fn, x, y, other, state, exact=None):
        keys = geometry.fold(state.keys, i)
        sides = side_lengths(shares, x.shape[1:3], norm)
        propose = _squares if norm == "linf" else _moved_mass
        proposal = jnp.where(i == 0, state.x_best, propose(keys, x, state.x_best, norm, radius, sides, i - 1))
        margin = lead(logits_fn, exact, proposal, y, state.margin > 0)
        accept = (state.margin > 0) & ((margin < state.margin) | (margin <= 0))
        x_best = jnp.where(geometry.per_image(accept, x), proposal, state.x_best)
        return State(state.keys, x_best, jnp.where(accept, margin, state.margin))

    def done(state):
        return state.margin <= 0

    def ends(x, state):
        return (state.x_best,)

    def x_adv(x, state):
        return jnp.where(geometry.per_image(done(state), x), state.x_best, x)

    return Iterative(
        "square", norm, radius, init, step, queries + 1, x_adv, done, gradient=False, restarts=restarts, ends=ends,
        settings=dict(p_init=p_init, rescale=rescale),
    )  # fmt: skip


def halvings(queries: int, rescale: bool = False) -> np.ndarray:
    """The number of times that p has been halved before each query, (queries,)."""
    count = np.arange(queries)
    if rescale:
        count = (count / queries * 10_000).astype(int)
    return np.sum(count[:, None] > np.array(_HALVED_AFTER), axis=1)


def side_lengths(shares: np.ndarray, image: tuple[int, int], norm: str) -> np.ndarray:
    """The side of each query's square, in an image of size (H, W): (queries,) int."""
    height, width = image
    least = 1 if norm == "linf" else 3
    sides = np.maximum(np.round(np.sqrt(shares * height * width)).astype(int), least)
    if norm != "linf":
        sides += sides % 2 == 0
    return np.minimum(sides, min(image))


# ---- l_inf ---------------------------------------------------------------------------------------------------


def _signs(keys, shape):
    return jax.vmap(lambda key: jax.random.rademacher(key, shape, jnp.float32))(keys)


def _stripes(keys, x, norm, eps):
    """x ± ε with a random sign per image, column and channel."""
    _, _, width, channels = x.shape
    return jnp.clip(x + eps * _signs(keys, (1, width, channels)), 0.0, 1.0)


def _corner(keys, x, side):
    """floor(U·(H − s)), floor(U·(W − s)) for each image: (B, 2) int32."""
    free = (jnp.asarray(x.shape[1:3]) - side).astype(jnp.float32)
    return jax.vmap(lambda key: jnp.floor(jax.random.uniform(key, (2,)) * free).astype(jnp.int32))(keys)


def _offsets(x, corner):
    """Row and column of each pixel, counted from the square's corner: (B, H, 1, 1) and (B, 1, W, 1)."""
    rows, columns = jnp.arange(x.shape[1]), jnp.arange(x.shape[2])
    rows = rows[None] - corner[:, :1]
    columns = columns[None] - corner[:, 1:]
    return rows[:, :, None, None], columns[:, None, :, None]


def _inside(x, corner, side):
    """Whether each pixel lies in the square: (B, H, W, 1)."""
    rows, columns = _offsets(x, corner)
    return (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)


def _squares(keys, x, x_best, norm, eps, sides, query):
    """x_best ± 2ε in a random square, with a random sign per channel."""
    side = jnp.asarray(sides)[jnp.maximum(query, 0)]
    corner = _corner(geometry.fold(keys, 1), x, side)
    delta = 2 * eps * _signs(geometry.fold(keys, 2), (1, 1, x.shape[-1]))
    return geometry.project(x_best + jnp.where(_inside(x, corner, side), delta, 0.0), x, norm, eps)


# ---- l2 and l1 -----------------------------------------------------------------------------------------------


_RING_POWER = {"l2": 2, "l1": 4}


def bump(side: int, norm: str) -> np.ndarray:
    """η of the paper: two halves of opposite sign, each a pyramid of 1/k² (l1: 1/k⁴) on the k-th ring.

    (s, s) float32; its length in `norm` is 1.
    """

    def of_length_one(value):
        return value / (np.sqrt(np.sum(value**2)) if norm == "l2" else np.sum(np.abs(value)))

    def pyramid(height, width):
        middle, total = (height // 2, width // 2), np.zeros((height, width))
        for ring in range(max(height // 2, width // 2) + 1):
            rows = slice(max(middle[0] - ring, 0), middle[0] + ring + 1)
            columns = slice(max(middle[1] - ring, 0), middle[1] + ring + 1)
            total[rows, columns] += 1 / (ring + 1) ** _RING_POWER[norm]
        return of_length_one(total)

    top = side // 2
    halves = np.concatenate([pyramid(top, side), -pyramid(side - top, side)] if top else [-pyramid(1, 1)])
    return of_length_one(halves).astype(np.float32)


def _scaled(delta, norm, x, eps):
    """x + delta inside the box: in l2 delta is first scaled to length ε, in l1 it is projected onto the ball."""
    if norm == "l1":
        return geometry.project(x + delta, x, norm, eps)
    return geometry.project(x + eps * delta / (geometry.l2_norm(delta) + 1e-12), x, norm, eps)


def _bumps(keys, x, norm, eps):
    """A grid of five by five bumps, each with a random orientation and a random sign per channel.

    In l1 each bump has length 1 in each channel before the projection onto the ball, whose radius may be larger.
    """
    _, height, width, channels = x.shape
    side = max(height // 5, 1)
    first = (height - 5 * side) // 2
    shape = (height // side, width // side)
    signs = _signs(geometry.fold(keys, 1), (*shape, channels))
    turned = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, shape))(geometry.fold(keys, 2))
    place = [np.arange(length) - max(first, 0) for length in (height, width)]
    tile = [np.clip(p // side, 0, n - 1) for p, n in zip(place, shape, strict=True)]
    covered = [(p >= 0) & (p < n * side) for p, n in zip(place, shape, strict=True)]
    value = bump(side, norm)[place[0][:, None] % side, place[1][None] % side]
    other = bump(side, norm).T[place[0][:, None] % side, place[1][None] % side]
    at = np.ix_(*tile)
    eta = jnp.where(turned[:, at[0], at[1]], other[None], value[None])[..., None] * signs[:, at[0], at[1]]
    delta = eta * np.float32(covered[0][:, None] & covered[1][None])[None, :, :, None]
    return _scaled(delta, norm, x, eps)


def _moved_mass(keys, x, x_best, norm, eps, sides, query):
    """Moves the mass of two random squares, and what the ball has left, into the first square as a bump."""
    kinds = np.unique(sides)
    table = np.zeros((len(kinds), kinds.max(), kinds.max()), np.float32)
    for row, kind in zip(table, kinds, strict=True):
        row[:kind, :kind] = bump(kind, norm)
    kind = jnp.asarray(np.searchsorted(kinds, sides))[jnp.maximum(query, 0)]
    side, eta = jnp.asarray(kinds)[kind], jnp.asarray(table)[kind]

    channels, delta = x.shape[-1], x_best - x
    corner, second = (_corner(geometry.fold(keys, n), x, side) for n in (1, 2))
    inside, inside_second = _inside(x, corner, side), _inside(x, second, side)
    turned = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5))(geometry.fold(keys, 3))
    rows, columns = (jnp.clip(offset, 0, len(eta) - 1) for offset in _offsets(x, corner))
    rows, columns = jnp.broadcast_arrays(rows[..., 0], columns[..., 0])  # (B, H, W)
    eta = jnp.where(turned[:, None, None], eta[columns, rows], eta[rows, columns])[..., None]
    signs = _signs(geometry.fold(keys, 4), (1, 1, channels))

    def length(value, axes):  # in the attack's norm
        if norm == "l2":
            return jnp.sqrt(jnp.sum(value**2, axes, keepdims=True))
        return jnp.sum(jnp.abs(value), axes, keepdims=True)

    old = jnp.where(inside, delta, 0.0)
    new = jnp.where(inside, eta * signs, 0.0) + old / (1e-12 + length(old, (1, 2)))
    new = new / (1e-12 + length(new, (1, 2)))  # each channel has length 1
    whole, windows = length(delta, (1, 2, 3)), length(jnp.where(inside | inside_second, delta, 0.0), (1, 2))
    if norm == "l2":
        mass = jnp.sqrt(jnp.maximum(eps**2 - whole**2, 0.0) / channels + windows**2)
    else:
        mass = jnp.maximum(eps - whole, 0.0) + channels * windows
    delta = jnp.where(inside, new * mass, jnp.where(inside_second, 0.0, delta))
    return _scaled(delta, norm, x, eps)
