"""The singular value decomposition of many small matrices by rotations of their columns, all matrices side by side.

    A V = W = U Σ        rotations V of pairs of columns, until all columns of W are orthogonal      (one-sided Jacobi)

In a round, all n columns form n/2 pairs, and each pair is rotated until it is orthogonal:

    a = ‖w_i‖², b = ‖w_j‖², g = ⟨w_i, w_j⟩,   ζ = (b − a) / (2g),   t = sign(ζ) / (|ζ| + √(1 + ζ²)),   c = 1/√(1 + t²)
    w_i, w_j  ←  c·w_i − c·t·w_j,  c·t·w_i + c·w_j

n − 1 rounds, in the order of a tournament, are a sweep: each pair has met once. Hestenes, "Inversion of matrices by
biorthogonalization and related results", 1958; Brent & Luk, "The solution of singular-value and symmetric eigenvalue
problems on multiprocessor arrays", 1985.

There are no matrix products and no factorisations: every operation is elementwise or a sum over a column. The matrices
lie along the last axis, so that they fill the lanes of a vector unit, however small they are.
"""

from functools import partial

import jax.numpy as jnp
from jax import Array, lax

SWEEPS = 15  # at most; smooth images of 32×32 take ten in float32


def svd(matrices: Array) -> tuple[Array, Array, Array]:
    """(u (N, n, n), s (N, n), vt (N, n, n)) of (N, n, n), s descending: A = u · diag(s) · vt.

    vt is orthogonal. So are the columns of u whose singular values exceed rounding; those of others have a length of 1
    or 0, and any direction.
    """
    n = matrices.shape[-1]
    even = n + n % 2  # an odd n gets a column of zeros, which no rotation touches
    largest = jnp.max(jnp.abs(matrices), (1, 2))
    scale = jnp.where(largest > 0, largest, 1)  # so that no square overflows or vanishes
    w = matrices.transpose(2, 1, 0) / scale[None, None]  # (column, row, matrix)
    w = jnp.pad(w, ((0, even - n), (0, 0), (0, 0)))
    v = jnp.broadcast_to(jnp.eye(even, n, dtype=w.dtype)[..., None], w.shape)
    tiny = jnp.square(jnp.finfo(w.dtype).eps) * jnp.sum(jnp.square(w), (0, 1))[None]  # of ‖w_i‖²: rounding alone

    def sweep(carry):
        pairs, _, swept = carry
        start = (*pairs, jnp.zeros((), bool))
        top, bottom, rotated = lax.fori_loop(0, even - 1, lambda _, at: _round(at[0], at[1], at[2], n, tiny), start)
        return (top, bottom), rotated, swept + 1

    both = jnp.concatenate([w, v], 1)
    halves = both[: even // 2], both[even // 2 :]
    start = (halves, jnp.ones((), bool), 0)
    (top, bottom), _, _ = lax.while_loop(lambda carry: carry[1] & (carry[2] < SWEEPS), sweep, start)
    both = jnp.concatenate([top, bottom])[:n]  # after a sweep, each column is back in its place
    u, s, vt = _in_order(both[:, :n], both[:, n:])
    return u, s * scale[:, None], vt


def _round(top, bottom, rotated, n, tiny):
    """Rotates the pairs (top[k], bottom[k]) and forms those of the next round; `rotated`: whether any had to be."""
    x, y = top[:, :n], bottom[:, :n]
    a, b, g = jnp.sum(x * x, 1), jnp.sum(y * y, 1), jnp.sum(x * y, 1)  # (n/2, N)
    eps = jnp.finfo(g.dtype).eps
    oblique = (jnp.abs(g) > n * eps * jnp.sqrt(a) * jnp.sqrt(b)) & (jnp.minimum(a, b) > tiny)
    zeta = (b - a) / (2 * jnp.where(oblique, g, 1))
    tangent = jnp.where(zeta < 0, -1.0, 1.0) / (jnp.abs(zeta) + jnp.sqrt(1 + zeta * zeta))
    tangent = jnp.where(oblique, tangent, 0)
    cosine = lax.rsqrt(1 + tangent * tangent)
    c, s = cosine[:, None], (cosine * tangent)[:, None]
    top, bottom = c * top - s * bottom, s * top + c * bottom
    if len(top) > 1:  # the first column stays, all others move on by one
        top, bottom = jnp.concatenate([top[:1], bottom[:1], top[1:-1]]), jnp.concatenate([bottom[1:], top[-1:]])
    return top, bottom, rotated | jnp.any(oblique)


def _in_order(w, v):
    """The decomposition from W and V (column, row, matrix)."""
    n = len(w)
    s = jnp.sqrt(jnp.sum(w * w, 1))  # (column, N)
    index = jnp.arange(n, dtype=jnp.int32)
    one, other = s[:, None], s[None]
    before = (other > one) | ((other == one) & (index[None] < index[:, None])[..., None])  # other goes before one
    place = jnp.sum(before, 1, dtype=jnp.int32)  # of each column
    at = (place[:, None] == index[None, :, None]).astype(w.dtype)  # (column, place, N), of zeros and ones
    u = w / jnp.where(s > 0, s, 1)[:, None]
    ordered = partial(jnp.einsum, precision=lax.Precision.HIGHEST)  # exact: each sum has one term
    return ordered("crN,cpN->Nrp", u, at), ordered("cN,cpN->Np", s, at), ordered("crN,cpN->Npr", v, at)
