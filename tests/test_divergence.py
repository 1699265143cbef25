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


def f32(*arrays):
    return tuple(jnp.asarray(a, jnp.float32) for a in arrays)


def kl(mean, std, other_mean, other_std):
    """KL between two normal distributions on a line, by quadrature of its definition."""
    p, q = stats.norm(mean, std), stats.norm(other_mean, other_std)
    integrand = lambda z: p.pdf(z) * (p.logpdf(z) - q.logpdf(z))  # noqa: E731
    return integrate.quad(integrand, mean - 12 * std, mean + 12 * std, epsabs=1e-12, limit=200)[0]


def total(b, *parameters):
    """The sum over dimensions of row b."""
    return sum(kl(*(p[b, k] for p in parameters)) for k in range(K))


def test_symmetrised_gaussian_kl_is_the_integral_summed_over_dimensions():
    got = divergence.symmetrised_gaussian_kl(*f32(MEAN, STD, OTHER_MEAN, OTHER_STD))
    one, other = (MEAN, STD), (OTHER_MEAN, OTHER_STD)
    expected = [(total(b, *one, *other) + total(b, *other, *one)) / 2 for b in range(B)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(got, divergence.symmetrised_gaussian_kl(*f32(*other, *one)), rtol=1e-6)


def test_rates_are_the_integral_summed_over_dimensions():
    zeros, ones = np.zeros_like(MEAN), np.ones_like(MEAN)
    got = divergence.gaussian_kl(*f32(MEAN, STD))
    np.testing.assert_allclose(got, [total(b, MEAN, STD, zeros, ones) for b in range(B)], rtol=1e-5)
    got = divergence.gaussian_kl(*f32(MEAN, ones, OTHER_MEAN))
    np.testing.assert_allclose(got, [total(b, MEAN, ones, OTHER_MEAN, ones) for b in range(B)], rtol=1e-5)


def test_symmetrised_categorical_kl_is_the_mean_of_both_directions():
    logits, other = 2 * RNG.normal(size=(2, B, K))
    p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (logits, other))
    expected = [(stats.entropy(a, b) + stats.entropy(b, a)) / 2 for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(divergence.symmetrised_categorical_kl(*f32(logits, other)), expected, rtol=1e-5)


def test_divergences_vanish_at_equality_and_nowhere_else():
    mean, std, other_mean = f32(MEAN, STD, OTHER_MEAN)
    assert not np.any(divergence.symmetrised_gaussian_kl(mean, std, mean, std))
    assert not np.any(divergence.gaussian_kl(mean, jnp.ones_like(mean), mean))
    assert not np.any(divergence.symmetrised_categorical_kl(mean, mean))
    assert np.all(divergence.symmetrised_gaussian_kl(mean, std, mean, std * 1.001) > 0)
    assert np.all(divergence.symmetrised_categorical_kl(mean, other_mean) > 0)
    assert not np.any(divergence.gaussian_kl(jnp.zeros((2, 3)), jnp.ones((2, 3))))


def test_close_distributions_keep_their_digits():
    """σ²/σ'² + σ'²/σ² − 2 in float32 would be lost to rounding at a relative difference of 1e-4."""
    std = np.full((1, 1), 0.7)
    other = np.float64(np.float32(0.7 * (1 + 1e-4)))
    std32 = np.float64(np.float32(0.7))
    expected = ((std32**2 - other**2) / (std32 * other)) ** 2 / 4
    zero = np.zeros((1, 1))
    got = divergence.symmetrised_gaussian_kl(*f32(zero, std, zero, np.full((1, 1), other)))
    np.testing.assert_allclose(got, [expected], rtol=1e-5)


@pytest.mark.parametrize("extreme", [1e-4, 1e2])
def test_extreme_widths_and_logits_are_finite(extreme):
    std, ones, zeros = jnp.full((2, 3), extreme), jnp.ones((2, 3)), jnp.zeros((2, 3))
    for f in (
        lambda s: divergence.symmetrised_gaussian_kl(zeros, s, ones, 1e2 * ones),
        lambda s: divergence.gaussian_kl(ones, s),
        lambda s: divergence.symmetrised_categorical_kl(s.at[:, 0].set(1e3), -s),
    ):
        value, gradient = jax.value_and_grad(lambda s, f=f: jnp.sum(f(s)))(std)
        assert np.isfinite(value) and np.all(np.isfinite(gradient))
