"""Divergences against numerical integrals and SciPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from ibjax.information import divergence

RNG = np.random.default_rng(0)
B, K = 5, 6
MEAN, OTHER_MEAN = RNG.normal(size=(2, B, K))
STD, OTHER_STD = np.exp(0.5 * RNG.normal(size=(2, B, K)))

symmetrised_gaussian_kl = jax.jit(divergence.symmetrised_gaussian_kl)
gaussian_kl = jax.jit(divergence.gaussian_kl)
symmetrised_categorical_kl = jax.jit(divergence.symmetrised_categorical_kl)


def f32(*arrays):
    return tuple(np.float32(a) for a in arrays)


def total(mean, std, other_mean, other_std):
    """KL between normal distributions on a line, by quadrature of its definition, summed over dimensions, (B,)."""
    z = mean + std * np.linspace(-12, 12, 2001)[:, None, None]  # where the trapezoidal rule is exact to rounding
    p, q = stats.norm(mean, std), stats.norm(other_mean, other_std)
    return integrate.trapezoid(p.pdf(z) * (p.logpdf(z) - q.logpdf(z)), z, axis=0).sum(1)


def test_symmetrised_gaussian_kl_is_the_integral_summed_over_dimensions():
    got = symmetrised_gaussian_kl(*f32(MEAN, STD, OTHER_MEAN, OTHER_STD))
    one, other = (MEAN, STD), (OTHER_MEAN, OTHER_STD)
    expected = (total(*one, *other) + total(*other, *one)) / 2
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(got, symmetrised_gaussian_kl(*f32(*other, *one)), rtol=1e-6)


def test_rates_are_the_integral_summed_over_dimensions():
    zeros, ones = np.zeros_like(MEAN), np.ones_like(MEAN)
    got = gaussian_kl(*f32(MEAN, STD))
    np.testing.assert_allclose(got, total(MEAN, STD, zeros, ones), rtol=1e-5)
    got = gaussian_kl(*f32(MEAN, ones, OTHER_MEAN))
    np.testing.assert_allclose(got, total(MEAN, ones, OTHER_MEAN, ones), rtol=1e-5)


def test_symmetrised_categorical_kl_is_the_mean_of_both_directions():
    logits, other = 2 * RNG.normal(size=(2, B, K))
    p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (logits, other))
    expected = [(stats.entropy(a, b) + stats.entropy(b, a)) / 2 for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(symmetrised_categorical_kl(*f32(logits, other)), expected, rtol=1e-5)


def test_divergences_vanish_at_equality_and_nowhere_else():
    mean, std, other_mean = f32(MEAN, STD, OTHER_MEAN)
    assert not np.any(symmetrised_gaussian_kl(mean, std, mean, std))
    assert not np.any(gaussian_kl(mean, np.ones_like(mean), mean))
    assert not np.any(symmetrised_categorical_kl(mean, mean))
    assert np.all(symmetrised_gaussian_kl(mean, std, mean, std * np.float32(1.001)) > 0)
    assert np.all(symmetrised_categorical_kl(mean, other_mean) > 0)
    assert not np.any(gaussian_kl(np.zeros_like(mean), np.ones_like(mean)))


def test_close_distributions_keep_their_digits():
    """σ²/σ'² + σ'²/σ² − 2 in float32 would be lost to rounding at a relative difference of 1e-4."""
    std = np.full((1, 1), 0.7)
    other = np.float64(np.float32(0.7 * (1 + 1e-4)))
    std32 = np.float64(np.float32(0.7))
    expected = ((std32**2 - other**2) / (std32 * other)) ** 2 / 4
    zero = np.zeros((1, 1))
    got = symmetrised_gaussian_kl(*f32(zero, std, zero, np.full((1, 1), other)))
    np.testing.assert_allclose(got, [expected], rtol=1e-5)


@pytest.mark.parametrize("extreme", [1e-4, 1e2])
def test_extreme_widths_and_logits_are_finite(extreme):
    ones, zeros = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)

    @jax.jit
    def values_and_gradients(std):
        return [
            jax.value_and_grad(lambda s, f=f: jnp.sum(f(s)))(std)
            for f in (
                lambda s: divergence.symmetrised_gaussian_kl(zeros, s, ones, 1e2 * ones),
                lambda s: divergence.gaussian_kl(ones, s),
                lambda s: divergence.symmetrised_categorical_kl(s.at[:, 0].set(1e3), -s),
            )
        ]

    for value, gradient in values_and_gradients(np.full((2, 3), extreme, np.float32)):
        assert np.isfinite(value) and np.all(np.isfinite(gradient))
