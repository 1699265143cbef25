"""Modulation of images in the Fourier domain, where a change of coefficients changes the singular values.

    F = FFT(x)        F' = modulation of F by a map over channels        x' = FFT⁻¹(F')

A real linear map over channels that is applied equally to Re F and Im F commutes with the transform, so it would only
mix the colours of x. The three modulations here do more: `amplitude` and `amplitude_and_phase` are not linear in F, and
`parts` maps real and imaginary parts jointly, so it can treat them differently. With one channel `amplitude` is the
exception: there a map without bias is a factor, and x' = w·x. Transforms are unitary, over height and width of images
(B, H, W, C).

The gain of `amplitude` is limited only by the floor 1e-6 of |F|: if one channel is constant and another is not, the
constant channel's rounding errors are amplified.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ibjax.devices import cores

Mix = Callable[[Array], Array]  # (B, H, W//2 + 1, C') -> the same shape, position by position


def amplitude(x: Array, mix: Mix) -> Array:
    """F'_c = mix(|F|)_c · F_c / |F_c|; phases do not change.    |F_c| = √(Re² + Im² + 1e-12), smooth at zero"""
    f = transform(x)
    gain = mix(modulus(f)) / modulus(f)
    return inverse(lax.complex(gain * f.real, gain * f.imag), x)


def amplitude_and_phase(x: Array, mix: Mix) -> Array:
    """F' = a · exp(i·φ), (a, φ) = mix(|F|, ∠F), with both parts concatenated along the channels."""
    f = transform(x)
    zero = jnp.abs(f.real) + jnp.abs(f.imag) < 1e-6  # here the angle has no derivative, and F no influence
    angle = jnp.where(zero, 0.0, jnp.arctan2(f.imag, jnp.where(zero, 1.0, f.real)))
    a, phi = jnp.split(mix(jnp.concatenate([modulus(f), angle], -1)), 2, -1)
    return inverse(lax.complex(a * jnp.cos(phi), a * jnp.sin(phi)), x)


def parts(x: Array, mix: Mix) -> Array:
    """F' = a + i·b, (a, b) = mix(Re F, Im F), with both parts concatenated along the channels."""
    f = transform(x)
    a, b = jnp.split(mix(jnp.concatenate([f.real, f.imag], -1)), 2, -1)
    return inverse(lax.complex(a, b), x)


def transform(x: Array) -> Array:
    """(B, H, W, C) real -> (B, H, W//2 + 1, C) complex: the half of the spectrum that determines the other half."""
    if _by_products():
        height, width = (_unitary(n) for n in x.shape[1:3])
        return _product("bhwc,hj,wk->bjkc", lax.complex(x, jnp.zeros_like(x)), height, width[:, : len(width) // 2 + 1])
    return jnp.fft.rfft2(x, axes=(1, 2), norm="ortho")


def inverse(f: Array, like: Array) -> Array:
    """(B, H, W//2 + 1, C) complex -> real, with the shape of `like`, (B, H, W, C)."""
    if _by_products():
        height, width = (_unitary(n).conj() for n in like.shape[1:3])
        n = len(width)
        twice = np.where((2 * np.arange(n // 2 + 1)) % n == 0, 1, 2)  # all but these two stand for two coefficients
        return _product("bjkc,jh,kw->bhwc", f, height, twice[:, None] * width[: n // 2 + 1]).real
    return jnp.fft.irfft2(f, s=like.shape[1:3], axes=(1, 2), norm="ortho")


def _by_products():
    """Whether a transform must be a product with the matrix of the discrete Fourier transform.

    From jaxlib 0.11 on, an FFT on a CPU divides its work among the threads of the pool that it runs on and waits for
    them (https://github.com/openxla/xla/pull/46347). A program hangs for good once each of these threads runs an FFT,
    as with several devices, with batches in parts or on one core. No release without this fault is known yet.
    """
    return cores.form().fourier == "product" and jax.__version_info__ >= (0, 11)


def _unitary(n):
    """The matrix (n, n) of the unitary transform."""
    return np.exp(-2j * np.pi * (np.outer(np.arange(n), np.arange(n)) % n) / n) / np.sqrt(n)


def _product(formula, f, *matrices):
    return jnp.einsum(formula, f, *(jnp.asarray(m, f.dtype) for m in matrices), precision=lax.Precision.HIGHEST)


def modulus(f: Array) -> Array:
    """√(Re² + Im² + 1e-12): |F| with a derivative everywhere."""
    return jnp.sqrt(jnp.square(f.real) + jnp.square(f.imag) + 1e-12)
