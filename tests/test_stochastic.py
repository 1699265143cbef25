"""The Gaussian bottleneck: what is drawn when, and how a configuration names its backbone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ibjax import config
from ibjax.errors import InputError
from ibjax.models import stochastic

BACKBONE = dict(name="cnn", widths=((4,),), hidden=(8,), dropout=0.0)
X = np.random.default_rng(0).random((3, 8, 8, 3), np.float32)


@functools.cache
def made(**options):
    """(model, its variables, (variables, rngs) -> what it returns in evaluation)"""
    model = stochastic.Model(5, BACKBONE, **{"latent": 6, **options})
    rng, shapes = np.random.default_rng(1), jax.eval_shape(model.init, jax.random.key(1), X)
    variables = jax.tree.map(lambda leaf: np.float32(rng.normal(size=leaf.shape) / 4), shapes)
    return model, variables, jax.jit(lambda variables, rngs=None: model.apply(variables, X, rngs=rngs))


def in_training(model, variables, key):
    """(logits, features)"""
    rngs = {"sample": key, "dropout": key}
    return model.apply(variables, X, train=True, mutable=["batch_stats"], rngs=rngs)[0]


def test_attacks_and_tests_see_the_mean_and_training_a_sample():
    model, variables, evaluate = made()

    @jax.jit
    def seen(variables, keys):
        (logits, features), head = evaluate(variables), variables["params"]["head"]["dense"]
        expected = features["mu"] @ head["kernel"] + head["bias"][None]
        return logits, expected, features, [in_training(model, variables, key)[1] for key in keys]

    logits, expected, features, (one, two) = seen(variables, jax.random.split(jax.random.key(0)))
    np.testing.assert_array_equal(features["z"], features["mu"])
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(one["mu"], features["mu"])
    assert np.all(np.not_equal(one["z"], two["z"]))


def test_samples_have_the_mean_and_the_width_that_are_stated():
    model, variables, evaluate = made()
    keys = jax.random.split(jax.random.key(5), 4000)
    z = np.asarray(jax.jit(jax.vmap(lambda key: in_training(model, variables, key)[1]["z"]))(keys))
    features = jax.tree.map(np.asarray, evaluate(variables)[1])
    error = np.abs(z.mean(0) - features["mu"]) / (features["sigma"] / 4000**0.5)
    assert error.max() < 4.5
    np.testing.assert_allclose(z.std(0), features["sigma"], rtol=0.06)


@pytest.mark.parametrize("sigma", ["softplus", "shifted", "unit"])
def test_sigma_is_what_its_name_says_and_stays_in_bounds(sigma):
    _, variables, evaluate = made(sigma=sigma)
    if sigma == "unit":
        assert variables["params"]["gaussian"]["dense"]["kernel"].shape == (8, 6)
        assert np.all(np.equal(evaluate(variables)[1]["sigma"], 1))
        return
    for bias, expected in [(0.3, np.log1p(np.exp(0.3 - 5 * (sigma == "shifted")))), (-50.0, 1e-4), (500.0, 100.0)]:
        layer = {"kernel": np.zeros((8, 12), np.float32), "bias": np.full(12, bias, np.float32)}
        changed = {**variables["params"], "gaussian": {"dense": layer}}
        found = evaluate({**variables, "params": changed})[1]["sigma"]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_sampling_at_test_needs_a_key_and_says_so():
    _, variables, evaluate = made(sample_at_test=True)
    with pytest.raises(InputError, match="rngs="):
        evaluate(variables)
    one, two = (evaluate(variables, {"sample": jax.random.key(seed)})[0] for seed in (1, 2))
    assert np.any(np.not_equal(one, two))


def test_class_means_are_trainable_parameters_that_an_objective_can_reach():
    """CEB's ½‖μ − m_y‖² has a gradient in the table, through the features alone."""
    model, variables, _ = made(sigma="unit", latent=None, class_means=True)
    y = np.array([0, 4, 4])

    @jax.grad
    def slope_of_rate(params):
        features = in_training(model, {**variables, "params": params}, jax.random.key(0))[1]
        return 0.5 * jnp.sum(jnp.square(features["mu"] - features["class_means"][y]))

    slope = jax.jit(slope_of_rate)(variables["params"])
    assert slope["class_means"].shape == (5, 8)
    assert np.any(slope["class_means"], axis=1).tolist() == [True, False, False, False, True]
    assert "gaussian" not in slope  # μ is the backbone's own output


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"sigma": "softplu"}, "did you mean 'softplus'"),
        ({"latent": None}, "model.latent=None"),
        ({"latent": 0}, "model.latent=0"),
        ({"backbone": {"name": "cnn", "width": 3}}, "model.backbone.width is unknown to 'cnn'"),
    ],
)
def test_impossible_options_are_refused(changed, message):
    with pytest.raises(InputError, match=message):
        model = stochastic.Model(5, **{"backbone": BACKBONE, **changed})
        jax.eval_shape(model.init, jax.random.key(0), X)


def section(**backbone):
    settings = config.base()
    settings.model = ConfigDict(dict(name="stochastic", latent=6, backbone=backbone))
    return settings


def test_a_nested_section_is_checked_and_completed_like_any_other():
    settings = section(name="wide_resnet", depth=10, width=1)
    config.check(settings)
    complete = config.complete(settings)
    assert complete.model.backbone.dropout == 0.0 and complete.model.backbone.variant == "trades"
    assert "num_classes" not in complete.model.backbone and complete.model.sigma == "softplus"
    config.check(complete)
    model = config.build("models", complete.model, "model", num_classes=10)
    assert jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


@pytest.mark.parametrize(
    "backbone, message",
    [
        (dict(name="wide_resnet", dept=10), "model.backbone.dept is unknown to 'wide_resnet'; .* did you mean 'depth'"),
        (dict(name="wideresnet"), "'wideresnet' is unknown; .* did you mean 'wide_resnet'"),
        (dict(name="wide_resnet", depth="10"), "model.backbone.depth='10' has the wrong type"),
        (dict(depth=10), "model.backbone=.* is not a model"),
    ],
)
def test_mistakes_in_a_nested_section_are_named(backbone, message):
    with pytest.raises(InputError, match=message):
        config.check(section(**backbone))
