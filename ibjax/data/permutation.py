"""A pseudorandom permutation of 0 … n − 1 that is computed place by place, without a table and without sorting.

    a = ⌈√n⌉,  b = ⌈n/a⌉,   v = (L, R) with v = b·L + R
    L <- (L + F(R, w_1)) mod a,  R <- (R + F(L, w_2)) mod b,  …  eight rounds; again while v >= n

A Feistel network over numbers, with cycle walking: Black & Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA
2002. F is the finaliser of MurmurHash3. It is meant for the order of images, not for secrets. The same code runs on the
host and inside a compiled program, with the same values, so that 50 million images need no memory for their order.

Guarantees (tests of the same names): it is a permutation; host and program agree; neighbours and passes are unrelated.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

_ROUNDS = 8


def permuted(places: Any, n: int, words: Any, xp: Any = jnp) -> Any:
    """The images at `places` (k,) of the permutation of n that `words` choose, (k,) uint32.

    Args:
      places: in [0, n), integers.
      n: at most 2³¹.
      words: numbers, such as those of a key, of the source and of the pass.
      xp: jnp inside a program, np on the host.
    """
    a = math.isqrt(n - 1) + 1 if n > 1 else 1
    b = -(-n // a)
    keys = xp.arange(_ROUNDS, dtype=xp.uint32)
    for word in words:
        keys = _hash(keys, xp.asarray(word).astype(xp.uint32), xp)

    def once(v):
        left, right = v // xp.uint32(b), v % xp.uint32(b)
        for i in range(0, _ROUNDS, 2):
            left = (left + _hash(right, keys[i], xp) % xp.uint32(a)) % xp.uint32(a)
            right = (right + _hash(left, keys[i + 1], xp) % xp.uint32(b)) % xp.uint32(b)
        return left * xp.uint32(b) + right

    def outside(v):
        return xp.any(v >= xp.uint32(n))

    def again(v):
        return xp.where(v >= xp.uint32(n), once(v), v)

    v = once(xp.asarray(places).astype(xp.uint32))
    if xp is jnp:
        return lax.while_loop(outside, again, v)
    while outside(v):
        v = again(v)
    return v


def _hash(x, word, xp):
    """A hash of each number of x (k,) uint32 with a word: MurmurHash3's finaliser."""
    with np.errstate(over="ignore"):
        h = x * xp.uint32(0x9E3779B1) + word
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            h = (h ^ (h >> xp.uint32(shift))) * xp.uint32(factor)
        return h ^ (h >> xp.uint32(16))
