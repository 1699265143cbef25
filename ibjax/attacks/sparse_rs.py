"""Sparse-RS: Croce, Andriushchenko, Singh, Flammarion & Hein, "Sparse-RS: a versatile framework for query-efficient
sparse black-box adversarial attacks", AAAI 2022. In l0: at most k pixels change, each in any way.

    M_0 = k random pixels; at these x_0 has random colours of {0, 1}^C, elsewhere it is x
    each query: a pixels of M_t, drawn uniformly, go back to x, and a pixels outside M_t get random colours of {0, 1}^C;
    this replaces x_t if its margin z_y − max_{k≠y} z_k is smaller, or if it is ≤ 0, which ends the search

    a = max( ⌊α·k⌋, 1 )          α = α_init, divided by 2, 4, 5, 6, 8, 10, 12, 15, 20 after 0, 50, 200, 500, 1000, 2000,
                                 4000, 6000, 8000 of 10,000 queries; rescaled to N queries

| symbol | code   | default |
|--------|--------|---------|
| k      | eps    |         | a whole number: the radius in l0
| N      | queries| 10000   |
| α_init | p_init | 0.3     |

l0 counts pixels, not channels: a pixel counts once, whichever of its channels change. It uses no gradient.

If a is 1, the new colour differs from that of the pixel. Deviation from the authors' code (fra31/sparse-rs, 21d8759):
it draws the positions within the lists of pixels once for a whole batch; here each image draws from its own key.

Guarantees (tests of the same names): x_adv differs from x in at most k pixels and lies in [0, 1]; the margin never
rises; each image's result is independent of the others in its batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ibjax.attacks import Attack, geometry
from ibjax.attacks.iterative import Iterative, as_attack, lead
from ibjax.errors import InputError, check_count, check_range

_AFTER = np.array([0, 50, 200, 500, 1000, 2000, 4000, 6000, 8000])  # queries of 10,000
_DIVISORS = np.array([1, 2, 4, 5, 6, 8, 10, 12, 15, 20])


def sparse_rs(
    *, norm: str = "l0", eps: "int | str | float" = 24, queries: int = 10_000, p_init: float = 0.3, restarts: int = 1
) -> Attack:
    """An attack `(key, logits_fn, x, y) -> x_adv` that changes at most `eps` pixels.

    Args:
      norm: "l0".
      eps: number of pixels, a whole number of at least 1 and below the number of an image's pixels.
      queries: number of evaluations of the network, that of the first point included.
      p_init: α_init, the share of the changed pixels that the first proposals exchange.
      restarts: number of runs, each on the images that are not broken yet.

    Returns:
      The attack. `x` is (B, H, W, C) in [0, 1], `y` labels (B,), `key` one key or one per image.

    Raises:
      InputError: another norm, an eps that is no number of pixels, or a number out of range.
    """
    return as_attack(iterative_sparse_rs(norm, eps, queries, p_init, restarts))


class State(NamedTuple):
    """The state of a run."""

    keys: Array
    x_best: Array  # (B, H, W, C)
    changed: Array  # (B, H, W) bool, M_t
    margin: Array  # (B,) the margin at x_best; infinite before the first query


def iterative_sparse_rs(
    norm: str, eps: "int | str | float", queries: int = 10_000, p_init: float = 0.3, restarts: int = 1
) -> Iterative:
    """Sparse-RS as an `Iterative`, for the runner; arguments as in `sparse_rs`."""
    norm = geometry.check_norm(norm, ("l0",))
    pixels = geometry.one_radius(eps, norm)
    if pixels != int(pixels) or pixels < 1:
        raise InputError(f"eps={eps} is no number of pixels; give a whole number of at least 1, as 24, in l0")
    check_range("sparse-rs's p_init", p_init, 0, 1)
    check_count("sparse-rs's queries", queries)
    check_count("sparse-rs's restarts", restarts)
    k, exchanged = int(pixels), exchanges(int(pixels), queries, p_init)

    def init(keys, restart, x, y):
        if k >= x.shape[1] * x.shape[2]:
            raise InputError(f"eps={k} pixels are all of an image of {x.shape[1]}×{x.shape[2]}; give fewer")
        draws = geometry.fold(keys, 0)
        changed = _some(geometry.fold(draws, 1), jnp.ones(x.shape[:3], bool), k, k)
        x_best = jnp.where(changed[..., None], _of_colours(_colours(geometry.fold(draws, 2), x), x), x)
        return State(keys, x_best, changed, jnp.full(x.shape[0], jnp.inf, x.dtype))

    def step(i, logits_fn, x, y, other, state, exact=None):
        proposal, changed = _exchange(geometry.fold(state.keys, i), x, state, exchanged, i)
        proposal = jnp.where(i == 0, state.x_best, proposal)
        margin = lead(logits_fn, exact, proposal, y, state.margin > 0)
        accept = (state.margin > 0) & ((margin < state.margin) | (margin <= 0))
        x_best = jnp.where(geometry.per_image(accept, x), proposal, state.x_best)
        moved = (accept & (i > 0))[:, None, None]
        return State(
            state.keys, x_best, jnp.where(moved, changed, state.changed), jnp.where(accept, margin, state.margin)
        )

    def done(state):
        return state.margin <= 0

    def ends(x, state):
        return (state.x_best,)

    def x_adv(x, state):
        return jnp.where(geometry.per_image(done(state), x), state.x_best, x)

    return Iterative(
        "sparse-rs", norm, pixels, init, step, queries, x_adv, done, gradient=False, restarts=restarts, ends=ends,
        settings=dict(p_init=p_init),
    )  # fmt: skip


def exchanges(k: int, queries: int, p_init: float = 0.3) -> np.ndarray:
    """a, the number of pixels that each query exchanges, (queries,) int; query 0 only evaluates the first point."""
    count = (np.arange(queries) / queries * 10_000).astype(int)
    share = p_init / _DIVISORS[np.sum(count[:, None] > _AFTER, axis=1)]
    return np.maximum((share * k).astype(int), 1)


def _exchange(keys, x, state, exchanged, i):
    """(x_best with some of its changed pixels put back and as many others changed, the pixels changed now)."""
    count, most = jnp.asarray(exchanged)[i], int(exchanged.max())
    leaving = _some(geometry.fold(keys, 1), state.changed, count, most)
    entering = _some(geometry.fold(keys, 2), ~state.changed, count, most)
    colours, channels = _colours(geometry.fold(keys, 3), x), x.shape[-1]
    bits = x.astype(jnp.int32) << _places(channels)
    old = jnp.where(jnp.all((x == 0) | (x == 1), -1), jnp.sum(bits, -1, dtype=jnp.int32), -1)  # -1: no corner
    shift = _integers(geometry.fold(keys, 4), x, 1)
    another = (old + shift) % 2**channels  # evenly among the other colours
    colours = jnp.where((count == 1) & (colours == old), another, colours)
    proposal = jnp.where(leaving[..., None], x, state.x_best)
    proposal = jnp.where(entering[..., None], _of_colours(colours, x), proposal)
    return proposal, (state.changed & ~leaving) | entering


def _some(keys, allowed, count, most):
    """`count` ≤ `most` of the pixels that are allowed, drawn evenly, (B, H, W) bool; all of them if there are fewer."""
    scores = jax.vmap(lambda key: jax.random.uniform(key, allowed.shape[1:]))(keys)
    scores = jnp.where(allowed, scores, -1.0).reshape(len(allowed), -1)
    _, places = lax.top_k(scores, most)
    chosen = jnp.zeros(scores.shape, bool).at[jnp.arange(len(scores))[:, None], places].set(jnp.arange(most) < count)
    return chosen.reshape(allowed.shape) & allowed


def _colours(keys, x):
    """A random corner of {0, 1}^C for each pixel, as the number of its bits, (B, H, W) int32."""
    return _integers(keys, x, 0)


def _integers(keys, x, low):
    """A number from `low` to 2^C − 1 for each pixel, (B, H, W) int32."""
    return jax.vmap(lambda key: jax.random.randint(key, x.shape[1:3], low, 2 ** x.shape[-1], jnp.int32))(keys)


def _of_colours(colours, x):
    """The corners as pixels, (B, H, W, C)."""
    return ((colours[..., None] >> _places(x.shape[-1])) & 1).astype(x.dtype)


def _places(channels):
    return jnp.arange(channels, dtype=jnp.int32)[None, None, None]
