"""SSGE and MIGE on Gaussians, whose scores and mutual information are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibjax.information.mige import information_surrogate, score

RNG = np.random.default_rng(0)
M = 40  # samples, where more would show the same: sorting their distances takes longer to compile
# as one program each, or JAX compiles one for every operation and shape
score_of, surrogate = jax.jit(score), jax.jit(jax.value_and_grad(information_surrogate, (0, 1)))


def cosine(a, b):
    a, b = np.ravel(a), np.ravel(b)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def ssge(x, share):
    """The estimator as it is defined, in loops and float64: eigenfunctions, their mean gradients, their sum.

    J is the first number of eigenvalues whose sum reaches the share.
    """
    m = len(x)
    differences = x[:, None] - x[None]
    squared = (differences**2).sum(-1)
    width = np.median(squared[np.triu_indices(m, 1)])
    k = np.exp(-squared / (2 * width))
    values, vectors = np.linalg.eigh(k)
    values, vectors = values[::-1], vectors[:, ::-1]
    j_kept = np.searchsorted(np.cumsum(values) / values.sum(), share) + 1
    result = np.zeros_like(x)
    for j in range(j_kept):
        u = vectors[:, j]
        psi = [np.sqrt(m) / values[j] * np.sum(u * k[i]) for i in range(m)]
        gradients = [
            np.sqrt(m) / values[j] * np.sum((u * k[i])[:, None] * -differences[i] / width, axis=0) for i in range(m)
        ]
        result += np.outer(psi, -np.mean(gradients, axis=0))
    return result


@pytest.mark.parametrize("share", [0.9, 0.99])
def test_the_score_is_its_definition(share):
    x = RNG.normal(size=(M, 2))
    expected = ssge(x, share)
    with jax.enable_x64(True):
        np.testing.assert_allclose(score_of(x, share), expected, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(score_of(np.float32(x), share), expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("sigma", [0.3, 2.0])
def test_the_score_of_a_gaussian_is_minus_x_over_its_variance(sigma):
    x = sigma * np.random.default_rng(3).normal(size=(128, 2))
    got = np.asarray(score_of(np.float32(x), 0.95))
    expected = -x / sigma**2
    assert cosine(got, expected) > 0.9
    np.testing.assert_allclose(np.sum(got * expected) / np.sum(expected**2), 1.0, atol=0.15)


def test_the_surrogates_gradient_is_that_of_the_information_of_gaussians():
    """z'_k = ρ_k z_k + √(1 − ρ_k²) ε_k:  ∂I/∂ρ_k = ρ_k / (1 − ρ_k²)."""
    z, noise = (jnp.asarray(RNG.normal(size=(600, 2)), jnp.float32) for _ in range(2))

    def surrogate(rho):
        return information_surrogate(z, rho[None] * z + jnp.sqrt(1 - rho**2)[None] * noise)

    gradient = jax.jit(jax.grad(surrogate))
    for rho in ([0.7, 0.3], [-0.6, 0.6], [0.1, -0.8]):
        rho = np.asarray(rho, np.float32)
        assert cosine(gradient(rho), rho / (1 - rho**2)) > 0.95
    assert np.abs(gradient(np.zeros(2, np.float32))).max() < 0.3  # independent: a minimum


def test_climbing_the_surrogate_raises_the_information():
    """From ρ = 0.2; the correlation of the samples is what rises."""
    z, noise = (np.float32(RNG.normal(size=(128, 2))) for _ in range(2))
    angle = np.float32(0.2)
    for _ in range(20):
        _, (_, gradient) = surrogate(z, np.sin(angle) * z + np.cos(angle) * noise)
        angle += np.float32(0.05) * np.sum(np.asarray(gradient) * (np.cos(angle) * z - np.sin(angle) * noise))
    assert np.sin(angle) > 0.5


def test_no_gradient_passes_through_the_scores():
    x = np.float32(RNG.normal(size=(20, 2)))
    assert not np.any(jax.jit(jax.grad(lambda x: jnp.sum(score(x))))(x))


@pytest.mark.parametrize(
    "x",
    [
        np.zeros((M, 2)),
        np.ones((M, 2)),
        np.repeat(RNG.normal(size=(2, 2)), M // 2, axis=0),
        np.eye(M)[:, :2],
        1e4 * RNG.normal(size=(M, 2)),
        1e-4 * RNG.normal(size=(M, 2)),
    ],
    ids=["black", "saturated", "two points", "mostly equal", "large", "small"],
)
def test_degenerate_samples_give_finite_gradients(x):
    x = np.float32(x)
    value, gradients = surrogate(x, x[::-1])
    assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in gradients)
    assert np.ptp(x, axis=0).any() or not np.any(score_of(x, 0.99))
