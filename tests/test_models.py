"""Architectures: parameter counts, taps, PyTorch's conventions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibjax.errors import InputError
from ibjax.models import cnn, layers, preact_resnet, resnet, wide_resnet

CIFAR, MNIST = (2, 32, 32, 3), (2, 28, 28, 1)


def parameters(model, shape):
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize(
    "model, shape, count",
    [
        (cnn.Model(10), MNIST, 312_202),  # TRADES's SmallCNN
        (preact_resnet.Model(10, depth=18), CIFAR, 11_172_170),
        (resnet.Model(10, depth=18), CIFAR, 11_173_962),
        (wide_resnet.Model(10, depth=28, width=10), CIFAR, 36_479_194),
        (wide_resnet.Model(10, depth=34, width=10), CIFAR, 46_160_474),
    ],
)
def test_parameter_counts_are_the_published_ones(model, shape, count):
    assert parameters(model, shape) == count


@pytest.mark.parametrize(
    "model, blocks, sizes",
    [
        (preact_resnet.Model(10, depth=18, width=4), 8, [32, 32, 16, 16, 8, 8, 4, 4]),
        (resnet.Model(10, depth=18, width=4), 8, [32, 32, 16, 16, 8, 8, 4, 4]),
        (wide_resnet.Model(10, depth=16, width=1), 6, [32, 32, 16, 16, 8, 8]),
    ],
)
def test_every_block_is_a_tap_of_the_right_size(model, blocks, sizes):
    variables = model.init(jax.random.key(0), jnp.zeros(CIFAR))
    logits, features = model.apply(variables, jnp.ones(CIFAR) / 3)
    assert logits.shape == (2, 10) and logits.dtype == jnp.float32
    assert [features[f"block{i}"].shape[1] for i in range(1, blocks + 1)] == sizes
    assert {"stem", "stage1", "stage2", "stage3", "pre_logits"} <= set(features)
    last = features.get(f"block{blocks}_relu", features[f"block{blocks}"])
    assert last.min() >= 0
    np.testing.assert_allclose(features["pre_logits"], last.mean((1, 2)), rtol=1e-5)


def test_pre_activation_taps_are_the_normalised_block_outputs():
    model = preact_resnet.Model(10, depth=10, width=4)
    variables = model.init(jax.random.key(1), jnp.zeros(CIFAR))
    _, features = model.apply(variables, jax.random.uniform(jax.random.key(2), CIFAR))
    expected = jax.nn.relu(features["block1"] / np.sqrt(1 + 1e-5))  # running statistics 0 and 1, scale 1
    np.testing.assert_allclose(features["block1_relu"], expected, rtol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_where_it_matters():
    model = preact_resnet.Model(10, depth=10, width=8, dtype="bfloat16")
    x = jax.random.uniform(jax.random.key(0), CIFAR)
    variables = model.init(jax.random.key(1), x)
    (logits, features), updated = model.apply(variables, x, train=True, mutable=["batch_stats"])
    assert features["block1"].dtype == jnp.bfloat16 and logits.dtype == features["pre_logits"].dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves([variables, updated]))
    exact, _ = model.clone(dtype="float32").apply(variables, x)
    np.testing.assert_allclose(model.apply(variables, x)[0], exact, atol=0.05)


def test_batch_norm_keeps_pytorchs_running_statistics():
    """Against torch.nn.BatchNorm1d on a small batch, where biased and unbiased variance differ by a quarter."""
    torch = pytest.importorskip("torch", reason="the oracle is PyTorch")
    x = np.random.default_rng(0).normal(2.0, 3.0, (5, 3)).astype(np.float32)
    reference = torch.nn.BatchNorm1d(3)
    expected = reference(torch.tensor(x)).detach().numpy()
    norm = layers.BatchNorm()
    variables = norm.init(jax.random.key(0), jnp.asarray(x), train=False)
    y, updated = norm.apply(variables, jnp.asarray(x), train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], reference.running_mean.numpy(), rtol=1e-6)
    np.testing.assert_allclose(updated["batch_stats"]["var"], reference.running_var.numpy(), rtol=1e-6)
    variables = {**variables, **updated}
    np.testing.assert_allclose(
        norm.apply(variables, jnp.asarray(x), train=False),
        reference.eval()(torch.tensor(x)).detach().numpy(),
        atol=1e-5,
    )


def test_batch_norm_groups_normalise_each_part_of_the_batch_by_itself():
    x = jax.random.normal(jax.random.key(0), (8, 4, 4, 3)) * jnp.arange(1.0, 9.0).reshape(8, 1, 1, 1)
    norm, grouped = layers.BatchNorm(), layers.BatchNorm(groups=2)
    variables = norm.init(jax.random.key(0), x, train=False)
    together = grouped.apply(variables, x, train=True, mutable=["batch_stats"])[0]
    halves = [norm.apply(variables, half, train=True, mutable=["batch_stats"])[0] for half in (x[:4], x[4:])]
    np.testing.assert_allclose(together, jnp.concatenate(halves), atol=1e-5)


def test_stride_two_pads_both_sides_as_pytorch_does():
    """ "SAME" would pad one side only, and shift every feature map after it."""
    x = jnp.zeros((1, 4, 4, 1)).at[0, 0, 0, 0].set(1.0)
    conv = layers.Conv(1, stride=2, kernel_init=lambda key, shape, dtype: jnp.arange(9.0).reshape(shape))
    y = conv.apply(conv.init(jax.random.key(0), x), x)
    assert y[0, 0, 0, 0] == 4.0  # the kernel's centre, at (1, 1) of 3×3, meets the corner pixel


@pytest.mark.parametrize(
    "init, std", [(layers.torch_uniform, (3 * 9 * 16) ** -0.5), (layers.fan_out_normal, (2 / (9 * 32)) ** 0.5)]
)
def test_initialisers_have_the_papers_scale(init, std):
    kernel = init(jax.random.key(0), (3, 3, 16, 32), jnp.float32)
    assert abs(float(kernel.std()) / std - 1) < 0.03
    if init is layers.torch_uniform:
        assert abs(float(jnp.abs(kernel).max()) * (9 * 16) ** 0.5 - 1) < 0.01


def test_normalisation_is_inside_the_model():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    x = jax.random.uniform(jax.random.key(0), CIFAR)
    plain, normalising = resnet.Model(10, 10, 4), resnet.Model(10, 10, 4, mean=mean, std=std)
    variables = plain.init(jax.random.key(1), x)
    outside = (x - jnp.array(mean).reshape(1, 1, 1, 3)) / jnp.array(std).reshape(1, 1, 1, 3)
    np.testing.assert_allclose(normalising.apply(variables, x)[0], plain.apply(variables, outside)[0], atol=1e-5)


@pytest.mark.parametrize(
    "model", [preact_resnet.Model(10, depth=19), resnet.Model(10, depth=7), wide_resnet.Model(10, 30)]
)
def test_an_impossible_depth_is_refused(model):
    with pytest.raises(InputError, match="allowed"):
        model.init(jax.random.key(0), jnp.zeros(CIFAR))
