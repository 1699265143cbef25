"""The measures on several devices: the numbers of one, and little that changes hands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from ibjax import config
from ibjax.devices import cluster, cores, placement
from ibjax.information import hsic, svd
from ibjax.objectives import ib_rar
from ibjax.training import experiment, feed
from ibjax.training.ahead import collectives

needs_devices = pytest.mark.skipif(jax.device_count() < 4, reason="needs several devices")


def over_devices(f, *arrays, out=cluster.REPLICATED):
    """(f of arrays split among the devices, the program that computed it), as within a train step."""
    mesh = cluster.mesh()
    arrays = [jax.device_put(array, NamedSharding(mesh, cluster.BATCH)) for array in arrays]

    def inside(*arrays):
        with placement.over(mesh):
            return f(*arrays)

    compiled = jax.jit(inside, out_shardings=NamedSharding(mesh, out)).lower(*arrays).compile()
    return compiled(*arrays), compiled.as_text()


def ones(*shape):
    return np.ones(shape, np.float32)


def of_images(x):
    """What depends on singular values and polar factors of images (B, H, W, C), and on all images."""
    s, p = svd.singular_values_and_polar(jnp.moveaxis(x, -1, 1))
    return jnp.sum(jnp.square(s)) + jnp.sum(p[..., 0, :] ** 3)


def of_channels(z, y):
    """nHSIC of labels with each channel of features (B, …, C)."""
    operator = hsic.correlation_operator(hsic.scaled_gram(y), ridge=0.1)
    return jnp.sum(hsic.nhsic_channels(operator[None], z, ridge=0.1, chunk=2) ** 2)


def of_layers(z, y):
    """nHSIC of labels with features, themselves and their last entries."""
    operator = hsic.correlation_operator(hsic.scaled_gram(y), ridge=0.1)
    return jnp.sum(hsic.nhsic_layers(operator[None], [z, z[..., -2:]], ridge=0.1) ** 2)


@needs_devices
@pytest.mark.parametrize("accelerator", (False, True))
@pytest.mark.parametrize("channels", (jax.device_count() * 3, 3))  # which do, and do not, divide among the devices
def test_several_devices_compute_what_one_does(accelerator, channels):
    rng = np.random.default_rng(0)
    size = 2 * jax.device_count()
    x, z, y = (rng.normal(size=shape).astype("float32") for shape in ((size, 6, 6, 3), (size, 4, channels), (size, 5)))

    def differentiated(x, z, y):
        return jax.value_and_grad(of_images)(x), *(jax.value_and_grad(f)(z, y) for f in (of_channels, of_layers))

    expected = jax.jit(differentiated)(x, z, y)
    found, _ = over_devices(cores.elsewhere()(differentiated) if accelerator else differentiated, x, z, y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected)


@needs_devices
@pytest.mark.parametrize("accelerator", (False, True))
def test_no_device_waits_for_another_within_a_loop(accelerator):
    size = jax.device_count()
    x, z, y = ones(size, 6, 6, 3), ones(size, 4, 2 * size), ones(size, 5)
    for f, arrays in ((of_images, (x,)), (of_channels, (z, y))):
        traced = cores.elsewhere()(jax.grad(f)) if accelerator else jax.grad(f)
        _, program = over_devices(traced, *arrays)
        found = collectives(program)
        assert found and {item.depth for item in found} == {0}


@needs_devices
@pytest.mark.parametrize("f", (of_channels, of_layers))
def test_no_device_is_given_all_features(f):
    """They and their gradient change hands once each, a share per device; what is summed over devices is (B, B)."""
    size = jax.device_count()
    z, y = ones(size, 32, 8, 2 * size), ones(size, 5)
    _, program = over_devices(cores.elsewhere()(jax.grad(f)), z, y, out=cluster.BATCH)
    assert sum(item.bytes for item in collectives(program)) < z.nbytes


@needs_devices
def test_a_measure_communicates_at_most_three_times_a_layer():
    """Features there and back, and a share of sums; one device factorises a matrix. The images count as a layer."""
    size = jax.device_count()
    x, y = ones(2 * size, 4, 4, 3), np.arange(2 * size, dtype=np.int32) % 3
    layers = [ones(2 * size, 2, 2, size * n) for n in (1, 2)]

    def terms(x, y, *layers):
        return ib_rar.dependence(x, y, 3, list(layers)).sum()

    traced = cores.elsewhere()(jax.grad(terms, (2, 3)))
    _, program = over_devices(traced, x, y, *layers, out=cluster.BATCH)
    found = collectives(program)
    assert {item.depth for item in found} == {0} and sum(item.count for item in found) <= 3 * (len(layers) + 1), found


@needs_devices
def test_a_state_in_shares_trains_as_a_replicated_one(monkeypatch):
    """The same losses; weights and moments are spread over the devices, and gathered outside the attack's loop."""
    monkeypatch.setattr(placement, "_SMALL", 64)
    runs = {}
    for sharding in ("replicated", "fsdp"):
        settings = config.smoke(config.base(), (8, 8, 1), 10, {})
        settings.update(batch_size=jax.device_count() * 4, ema_decay=0.9, sharding=sharding)
        settings.augment.update(pad=0, flip=False)
        settings.attack.update(unroll=False, steps=2)
        settings.model = dict(name="cnn", widths=((8,), (16,)), hidden=(), padding=1, batch_norm=True, pool="average")
        built = experiment.build(settings)
        state, key = experiment.initial_state(built), experiment.run_key(0, 1, built.mesh)
        dispatch, data = feed.make_dispatch(built, 1), [cluster.replicate(a, built.mesh) for a in built.data.train]
        compiled = dispatch.lower(state, *data, key, built.frozen, 1).compile()
        losses = []
        for _ in range(3):
            state, metrics = compiled(state, *data, key, built.frozen, 1)
            losses.append(float(metrics["loss"][0]))
        runs[sharding] = losses, state, collectives(compiled.as_text())
    (expected, whole, _), (found, shared, changing_hands) = runs["replicated"], runs["fsdp"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), shared, whole)
    for tree in (shared.variables["params"], shared.opt_state, shared.ema_params):
        parts = [leaf for leaf in jax.tree.leaves(tree) if not leaf.is_fully_replicated]
        assert sum(leaf.size for leaf in parts) > 0.9 * sum(leaf.size for leaf in jax.tree.leaves(tree))
        assert all(leaf.addressable_shards[0].data.size * jax.device_count() == leaf.size for leaf in parts)
    assert {item.depth for item in changing_hands if item.kind == "all-gather"} == {0}
    gathered = sum(item.bytes for item in changing_hands if item.kind == "all-gather")
    assert gathered < 1.2 * sum(leaf.nbytes for leaf in jax.tree.leaves(shared.variables["params"]))
