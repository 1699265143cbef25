"""Singular values and polar factor against NumPy and finite differences in float64, also where they are not smooth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from ibjax.devices import cores
from ibjax.errors import InputError
from ibjax.information import jacobi
from ibjax.information.svd import singular_values_and_polar

RNG = np.random.default_rng(0)
N = 8
SMOOTH = np.outer(np.linspace(0.2, 0.9, N), np.linspace(1, 0.3, N))  # rank one


@pytest.fixture(autouse=True, params=["cpu", pytest.param("tpu", marks=pytest.mark.slow)])
def platform(request):
    """Every test holds for the library's decomposition and, slow but for one, for that by rotations."""
    with cores.elsewhere(request.param):
        yield request.param


@functools.cache
def programs(platform):
    """Of a platform: the decomposition, and the gradient of ⟨weights_s, σ⟩ + ⟨weights_p, P⟩ beside its value."""

    def value(a, weights_s, weights_p):
        s, p = singular_values_and_polar(a)
        return jnp.sum(weights_s * s) + jnp.sum(weights_p * p)

    return jax.jit(lambda a: singular_values_and_polar(a)), jax.jit(jax.value_and_grad(value))


def decomposed(a):
    return programs(cores.platform())[0](a)


def rotation(seed):
    return linalg.qr(np.random.default_rng(seed).normal(size=(N, N)))[0]


def with_values(values):
    return rotation(1) @ np.diag(values) @ rotation(2)


def random_stack():
    return RNG.normal(size=(2, 3, N, N))


def directional_derivative(a, direction, weights_s, weights_p):
    """Of ⟨weights_s, σ⟩ + ⟨weights_p, P⟩, by reverse mode in float64."""
    with jax.enable_x64(True):
        _, gradient = programs(cores.platform())[1](a, weights_s, weights_p)
        return float(np.sum(np.asarray(gradient) * direction))


def finite_difference(a, direction, weights_s, weights_p, rank=None, step=1e-6):
    """The same from NumPy's SVD; with `rank`, P is U Vᵀ of the first `rank` singular vectors."""

    def value(a):
        u, s, vt = np.linalg.svd(a)
        return np.sum(weights_s * s) + np.sum(weights_p * (u[..., :rank] @ vt[..., :rank, :]))

    return (value(a + step * direction) - value(a - step * direction)) / (2 * step)


# ---- values --------------------------------------------------------------------------------------------------


def test_values_are_numpys_and_scipys():
    a = random_stack()
    s, p = decomposed(np.float32(a))
    np.testing.assert_allclose(s, np.linalg.svd(a)[1], rtol=1e-5, atol=1e-5)
    expected = np.stack([[linalg.polar(matrix)[0] for matrix in row] for row in a])
    np.testing.assert_allclose(p, expected, atol=2e-5)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_polar_factor_of_a_deficient_matrix_is_the_partial_isometry(rank):
    """It depends on the matrix alone: A = P (AᵀA)^½, and P Pᵀ projects on the columns of A."""
    a = with_values([3.0, 2.0, 2.0, 0, 0, 0, 0, 0][:rank] + [0.0] * (N - rank))
    s, p = (np.asarray(part) for part in decomposed(np.float32(a)))
    values, vectors = np.linalg.eigh(a.T @ a)
    root = vectors @ np.diag(np.sqrt(np.maximum(values, 0))) @ vectors.T
    np.testing.assert_allclose(p @ root, a, atol=1e-5)
    np.testing.assert_allclose(p @ p.T, a @ np.linalg.pinv(a, rcond=1e-8), atol=1e-5)
    np.testing.assert_allclose(s.sum(), np.linalg.svd(a)[1].sum(), atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_rotations_of_columns_give_the_decomposition(n):
    """Also of an odd number of columns, of equal ones, and of zeros; in float64 to 1e-12."""
    a = RNG.normal(size=(4, n, n))
    a[1] = 0
    a[2, :, n // 2] = a[2, :, 0]
    with jax.enable_x64(True):
        u, s, vt = (np.asarray(part) for part in jax.jit(lambda a: jacobi.svd(a))(jnp.asarray(a)))
    np.testing.assert_allclose(s, np.linalg.svd(a)[1], atol=1e-12)
    np.testing.assert_allclose(u * s[:, None] @ vt, a, atol=1e-12)
    np.testing.assert_allclose(vt @ vt.mT, np.broadcast_to(np.eye(n), a.shape), atol=1e-12)
    kept = (s > 1e-12) * 1.0
    np.testing.assert_allclose((u * kept[:, None]).mT @ u * kept[:, None], np.eye(n) * kept[:, None], atol=1e-12)


# ---- derivatives ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["values", "polar", "both"])
def test_derivatives_are_finite_differences(of):
    a, direction = random_stack(), random_stack()
    weights_s = RNG.normal(size=(2, 3, N)) * (of != "polar")
    weights_p = random_stack() * (of != "values")
    got = directional_derivative(a, direction, weights_s, weights_p)
    np.testing.assert_allclose(got, finite_difference(a, direction, weights_s, weights_p), rtol=1e-6)


def test_the_polar_derivative_is_exact_at_repeated_singular_values():
    """Where those of U and of V alone are infinite; and the values' sum, the nuclear norm, is smooth there as well."""
    a, direction, weights_p = with_values([2, 2, 2, 2, 1, 1, 1, 0.5]), RNG.normal(size=(N, N)), RNG.normal(size=(N, N))
    for weights in ((np.zeros(N), weights_p), (np.ones(N), np.zeros((N, N)))):
        got = directional_derivative(a, direction, *weights)
        np.testing.assert_allclose(got, finite_difference(a, direction, *weights), rtol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "tpu"], indirect=True)
def test_the_polar_derivative_of_a_deficient_matrix_is_that_within_its_rank():
    """Along changes that keep the rank: A = L Rᵀ with L and R of three columns."""
    left, right, d_left, d_right = RNG.normal(size=(4, N, 3))
    a, weights = left @ right.T, (np.zeros(N), RNG.normal(size=(N, N)))
    direction = d_left @ right.T + left @ d_right.T
    got = directional_derivative(a, direction, *weights)
    np.testing.assert_allclose(got, finite_difference(a, direction, *weights, rank=3), rtol=1e-6)


DEGENERATE = {
    "black": np.zeros((N, N)),
    "saturated": np.ones((N, N)),
    "flat grey": np.full((N, N), 0.5),
    "rank one": SMOOTH,
    "half black": np.where(np.arange(N) < N // 2, 0.0, 1.0) * np.ones((N, N)),
    "identity": np.eye(N),
    "pair of values 1e-7 apart": with_values([2, 1, 1 + 1e-7, 0.5, 0.4, 0.3, 0.2, 0.1]),
    "nearly deficient": with_values([2, 1, 1e-5, 1e-6, 1e-7, 1e-8, 0, 0]),
    "8-bit": np.round(255 * SMOOTH) / 255,
    "huge": 1e15 * SMOOTH,
    "tiny": 1e-30 * SMOOTH,
}


@pytest.mark.parametrize("image", DEGENERATE.values(), ids=list(DEGENERATE))
def test_derivatives_are_finite_on_degenerate_images(image):
    a, weights_p = np.float32(image / max(1.0, image.max() / 1e15)), np.float32(RNG.normal(size=(N, N)))
    s = np.asarray(decomposed(a)[0])
    value, gradient = programs(cores.platform())[1](a, 2 * s, weights_p)  # 2σ: the gradient of Σσ²
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_the_polar_gradient_is_bounded_by_its_floor():
    """‖Ā‖ ≤ 2‖P̄‖ / (10⁻⁴ σ_max), so one flat image cannot make a whole step large."""
    a = np.float32(with_values([1, 0.5] + [1e-6] * 6))
    _, gradient = programs(cores.platform())[1](a, np.zeros(N, np.float32), SMOOTH.astype(np.float32))
    assert np.linalg.norm(gradient) <= 2 * np.linalg.norm(SMOOTH) / 1e-4


def test_bfloat16_images_are_treated_in_float32():
    s, p = decomposed(SMOOTH.astype(jnp.bfloat16))
    assert s.dtype == p.dtype == jnp.float32


@pytest.mark.parametrize("shape", [(3, 4), (5,), (2, 3, 4)])
def test_matrices_that_are_not_square_are_refused(shape):
    with pytest.raises(InputError, match="square"):
        singular_values_and_polar(np.ones(shape, np.float32))
