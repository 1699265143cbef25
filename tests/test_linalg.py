"""Factorisations of many matrices: right, split among devices, and on a CPU without calls that wait for its threads."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from ibjax import cluster, cores
from ibjax.aot import collectives
from ibjax.information import hsic
from ibjax.information.linalg import each_matrix
from ibjax.information.svd import singular_values_and_polar


def nhsic(x):
    layers = [x, x.reshape(len(x), -1)[:, :7]]
    return jnp.sum(hsic.nhsic_layers(hsic.correlation_operator(hsic.scaled_gram(x))[None], layers))


def svd(x):
    return sum(jnp.sum(part) for part in singular_values_and_polar(x) + singular_values_and_polar(2 * x))


def test_each_matrix_is_vmap():
    x = jax.random.normal(jax.random.key(0), (5, 4, 4))
    got = each_matrix(lambda m: (m @ m.T, jnp.trace(m)), x, chunk=2)
    expected = jax.vmap(lambda m: (m @ m.T, jnp.trace(m)))(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about LAPACK")
@pytest.mark.parametrize("f", [nhsic, svd], ids=["nhsic", "svd"])
def test_lapack_gets_one_matrix_at_a_time(f):
    """Several in one call can hang a program for good: see `each_matrix`."""
    text = jax.jit(jax.grad(f)).lower(jnp.ones((6, 5, 5))).as_text()
    calls = [line for line in text.splitlines() if re.search(r"@(lapack|blas)_\w+", line)]
    assert calls
    for line in calls:
        operands = re.findall(r"tensor<([\dx]*)x?f32>", line.split(" : ")[-1])
        assert all(len([n for n in shape.split("x") if n not in ("", "1")]) <= 2 for shape in operands), line


def test_two_svds_in_one_program_finish():
    x = jax.random.normal(jax.random.key(0), (128, 16, 16))
    both = jax.jit(svd)
    assert all(np.isfinite(both(x)) for _ in range(20))


needs_devices = pytest.mark.skipif(jax.device_count() < 4, reason="needs several devices")


def over_devices(f, *arrays):
    """(f of arrays split among the devices, the program that computed it), as within a train step."""
    mesh = cluster.mesh()
    arrays = [jax.device_put(array, NamedSharding(mesh, cluster.BATCH)) for array in arrays]

    def inside(*arrays):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return f(*arrays)

    compiled = jax.jit(inside, out_shardings=NamedSharding(mesh, cluster.REPLICATED)).lower(*arrays).compile()
    return compiled(*arrays), compiled.as_text()


def of_images(x):
    """What depends on singular values and polar factors of images (B, H, W, C), and on all images."""
    s, p = singular_values_and_polar(jnp.moveaxis(x, -1, 1))
    return jnp.sum(jnp.square(s)) + jnp.sum(p[..., 0, :] ** 3)


def of_channels(z, y):
    """nHSIC of labels with each channel of features (B, …, C)."""
    operator = hsic.correlation_operator(hsic.scaled_gram(y), ridge=0.1)
    return jnp.sum(hsic.nhsic_channels(operator[None], z, ridge=0.1, chunk=2) ** 2)


@needs_devices
@pytest.mark.parametrize("accelerator", (False, True))
@pytest.mark.parametrize("channels", (jax.device_count() * 3, 3))  # which do, and do not, divide among the devices
def test_several_devices_compute_what_one_does(accelerator, channels):
    rng = np.random.default_rng(0)
    size = 2 * jax.device_count()
    x, z, y = (rng.normal(size=shape).astype("float32") for shape in ((size, 6, 6, 3), (size, 4, channels), (size, 5)))
    for f, arrays in ((of_images, (x,)), (of_channels, (z, y))):
        differentiated = jax.value_and_grad(f)
        expected = differentiated(*arrays)
        if accelerator:
            differentiated = cores.elsewhere()(differentiated)
        found, _ = over_devices(differentiated, *arrays)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected)


@needs_devices
@pytest.mark.parametrize("accelerator", (False, True))
def test_no_device_waits_for_another_within_a_loop(accelerator):
    size = jax.device_count()
    x, z, y = (jnp.ones(shape) for shape in ((size, 6, 6, 3), (size, 4, 2 * size), (size, 5)))
    for f, arrays in ((of_images, (x,)), (of_channels, (z, y))):
        traced = cores.elsewhere()(jax.grad(f)) if accelerator else jax.grad(f)
        _, program = over_devices(traced, *arrays)
        found = collectives(program)
        assert found and {item.depth for item in found} == {0}
