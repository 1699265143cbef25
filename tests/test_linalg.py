"""Factorisations of many matrices: right, and on a CPU without calls that wait for the threads they occupy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibjax.information import hsic
from ibjax.information.linalg import each_matrix
from ibjax.information.svd import singular_values_and_polar


def nhsic(x):
    layers = [x, x.reshape(len(x), -1)[:, :7]]
    return jnp.sum(hsic.nhsic_layers(hsic.correlation_operator(hsic.scaled_gram(x))[None], layers))


def svd(x):
    return sum(jnp.sum(part) for part in singular_values_and_polar(x) + singular_values_and_polar(2 * x))


def test_each_matrix_is_vmap():
    x = np.random.default_rng(0).normal(size=(5, 4, 4)).astype(np.float32)
    got = jax.jit(lambda x: each_matrix(lambda m: (m @ m.T, jnp.trace(m)), x, chunk=2))(x)
    expected = jax.jit(jax.vmap(lambda m: (m @ m.T, jnp.trace(m))))(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about LAPACK")
@pytest.mark.parametrize("f", [nhsic, svd], ids=["nhsic", "svd"])
def test_lapack_gets_one_matrix_at_a_time(f):
    """Several in one call can hang a program for good: see `each_matrix`."""
    text = jax.jit(jax.grad(f)).lower(np.ones((6, 5, 5), np.float32)).as_text()
    calls = [line for line in text.splitlines() if re.search(r"@(lapack|blas)_\w+", line)]
    assert calls
    for line in calls:
        operands = re.findall(r"tensor<([\dx]*)x?f32>", line.split(" : ")[-1])
        assert all(len([n for n in shape.split("x") if n not in ("", "1")]) <= 2 for shape in operands), line


def test_two_svds_in_one_program_finish():
    x = np.random.default_rng(0).normal(size=(128, 16, 16)).astype(np.float32)
    both = jax.jit(svd)
    assert all(np.isfinite(both(x)) for _ in range(20))
