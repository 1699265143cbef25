"""A pass in parts of the batch: the same values, and whole wherever parts would change what is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ibjax import config, losses
from ibjax.devices import cores
from ibjax.net import linen_net


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def noise(batch, side=32):
    return np.random.default_rng(0).random((batch, side, side, 3), np.float32)


def seen_by(f, *arrays):
    """The batch sizes that `f` is called with; nothing is computed."""
    sizes = []

    def recording(x, *rest):
        sizes.append(x.shape[0])
        return f(x, *rest)

    jax.eval_shape(cores.in_parts(recording), *arrays)
    return sizes


@pytest.mark.parametrize(
    "batch, side, sizes",
    [(128, 32, [32] * 4), (48, 32, [16] * 3), (32, 32, [16] * 2), (31, 32, [31]), (16, 32, [16]), (128, 8, [128])],
)
def test_parts_are_equal_and_not_too_small(batch, side, sizes):
    assert seen_by(lambda x: x.mean((1, 2, 3)), noise(batch, side)) == sizes


def test_all_arrays_are_divided_alike():
    x, y = noise(64), np.arange(64, dtype=np.int32)
    answer = jax.jit(cores.in_parts(lambda x, y: {"sum": x.sum((1, 2, 3)) * y.astype(float), "y": y}))(x, y)
    np.testing.assert_array_equal(answer["y"], y)
    np.testing.assert_allclose(answer["sum"], x.sum((1, 2, 3)) * y, rtol=1e-5)


def test_what_has_no_batch_is_computed_of_the_whole_one():
    x = noise(64)
    mean = cores.in_parts(jnp.mean)(x)
    assert mean.shape == () and float(mean) == float(jnp.mean(x))


def test_parts_within_parts_and_programs_for_elsewhere_stay_whole(monkeypatch):
    inner = []

    def f(x):
        inner.extend(seen_by(lambda x: x, x))
        return x

    assert seen_by(f, noise(128)) == [32] * 4 and inner == [32] * 4
    with cores.whole():
        assert seen_by(lambda x: x, noise(128)) == [128]
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert seen_by(lambda x: x, noise(128)) == [128]
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert seen_by(lambda x: x, noise(128)) == [128]


def test_a_network_answers_the_same_in_parts():
    """Logits, features, batch statistics and the gradients of both modes, at 1e-5 of their size."""
    model = config.build(
        "models", ConfigDict({"name": "resnet", "blocks": (1, 1), "width": 8, "dtype": "float32"}), "model",
        num_classes=10,
    )  # fmt: skip
    net, x, y = linen_net(model), noise(64), jnp.arange(64) % 10
    variables = model.init(jax.random.key(1), x[:1], train=False)

    def everything():
        def value(params, x, train):
            weights = {**variables, "params": params}
            if train:
                (logits, features), updated = net.forward(weights, x, jax.random.key(2))
            else:
                (logits, features), updated = net.predict(weights, x), {}
            return losses.cross_entropy(logits, y).mean(), (logits, features, updated)

        gradients = jax.grad(value, (0, 1), has_aux=True)
        return [gradients(variables["params"], x, train) for train in (False, True)]

    in_parts = jax.jit(everything)()
    with cores.whole():
        whole = jax.jit(lambda: everything())()  # a function of its own, or its trace would be the first one's
    assert "concatenate" in str(jax.make_jaxpr(everything)())
    for a, b in zip(jax.tree.leaves(in_parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max() + 1e-3))


def test_an_edit_sees_the_whole_batch():
    """As an edit may couple the images: a shift by the mean of the batch."""
    model = config.build(
        "models", ConfigDict({"name": "resnet", "blocks": (1, 1), "width": 8}), "model", num_classes=10
    )
    net, x = linen_net(model), noise(64)
    variables, seen = model.init(jax.random.key(1), x[:1], train=False), []

    def edit(feature):
        seen.append(feature.shape[0])
        return feature - feature.mean(0, keepdims=True)

    net.predict(variables, x, edits={"stage1": edit})
    assert seen == [64]
