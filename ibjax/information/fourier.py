"""Modulation of images in the Fourier domain, where a change of coefficients changes the singular values.

    F = FFT(x)        F' = modulation of F by a map over channels        x' = FFT⁻¹(F')

A real linear map over channels that is applied equally to Re F and Im F commutes with the transform, so it would only
mix the colours of x. The three modulations here do more: `amplitude` and `amplitude_and_phase` are not linear in F, and
`parts` maps real and imaginary parts jointly, so it can treat them differently. Transforms are unitary, over height and
width of images (B, H, W, C).
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

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
    return jnp.fft.rfft2(x, axes=(1, 2), norm="ortho")


def inverse(f: Array, like: Array) -> Array:
    """(B, H, W//2 + 1, C) complex -> real, with the shape of `like`, (B, H, W, C)."""
    return jnp.fft.irfft2(f, s=like.shape[1:3], axes=(1, 2), norm="ortho")


def modulus(f: Array) -> Array:
    """√(Re² + Im² + 1e-12): |F| with a derivative everywhere."""
    return jnp.sqrt(jnp.square(f.real) + jnp.square(f.imag) + 1e-12)
