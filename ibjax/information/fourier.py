"""Modulating images in the Fourier domain, where changing coefficients changes singular values.

    F = FFT(x)        F' = modulation of F by a map over channels        x' = FFT⁻¹(F')

The same real map over channels on Re F and Im F alike commutes with the transform: it mixes the colours of x and does
nothing else. `amplitude` and `amplitude_and_phase` are not linear in F, and `parts` sees real and imaginary parts
together, which may differ. Transforms are over height and width, unitary, of images (B, H, W, C).
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

Mix = Callable[[Array], Array]  # (B, H, W//2 + 1, C') -> the same shape, position by position


def amplitude(x: Array, mix: Mix) -> Array:
    """F'_c = mix(|F|)_c · F_c / |F_c|: the phase stays.    |F_c| = √(Re² + Im² + 1e-12), smooth at zero"""
    f = transform(x)
    return inverse(mix(modulus(f)) * f / modulus(f), x)


def amplitude_and_phase(x: Array, mix: Mix) -> Array:
    """F' = a · exp(i·φ), (a, φ) = mix(|F|, ∠F), one after the other along the channels."""
    f = transform(x)
    zero = jnp.abs(f.real) + jnp.abs(f.imag) < 1e-6  # where the angle has no derivative, and F no weight
    angle = jnp.where(zero, 0.0, jnp.arctan2(f.imag, jnp.where(zero, 1.0, f.real)))
    a, phi = jnp.split(mix(jnp.concatenate([modulus(f), angle], -1)), 2, -1)
    return inverse(a * (jnp.cos(phi) + 1j * jnp.sin(phi)), x)


def parts(x: Array, mix: Mix) -> Array:
    """F' = a + i·b, (a, b) = mix(Re F, Im F), one after the other along the channels."""
    f = transform(x)
    a, b = jnp.split(mix(jnp.concatenate([f.real, f.imag], -1)), 2, -1)
    return inverse(a + 1j * b, x)


def transform(x: Array) -> Array:
    """(B, H, W, C) real -> (B, H, W//2 + 1, C) complex: the half of the spectrum that says all."""
    return jnp.fft.rfft2(x, axes=(1, 2), norm="ortho")


def inverse(f: Array, like: Array) -> Array:
    """(B, H, W//2 + 1, C) complex -> real, of the shape of `like` (B, H, W, C)."""
    return jnp.fft.irfft2(f, s=like.shape[1:3], axes=(1, 2), norm="ortho")


def modulus(f: Array) -> Array:
    """√(Re² + Im² + 1e-12): |F| with a derivative everywhere."""
    return jnp.sqrt(jnp.square(f.real) + jnp.square(f.imag) + 1e-12)
