"""Adversarial weight perturbation: size, direction, what it leaves alone, and the order of a step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objectives import BATCH, NET, VARIABLES, X_ADV, first_state

from ibjax.errors import InputError
from ibjax.objectives.pgd_at import pgd_at
from ibjax.optim import sgd
from ibjax.perturb import awp
from ibjax.step import Problem, make_train_step, with_trainable

# its loss is one program, the same in all steps: two of them can have equal bits
PGD_AT = pgd_at()
PGD_AT = PGD_AT._replace(loss=jax.jit(PGD_AT.loss, static_argnums=0))
PARAMS = VARIABLES["params"]
GRADIENT = jax.tree.map(lambda w: jnp.asarray(np.cos(17 * np.asarray(w))), PARAMS)
SGD, STILL = (sgd(lr=lambda step, lr=lr: lr, weight_decay=5e-4) for lr in (0.1, 0.0))  # each is compiled once


def stored_attack(key, logits_fn, x, target):
    return X_ADV


def program(**options):
    """A weight perturbation, compiled."""
    return jax.jit(awp(**options))


def take_step(objective, perturb, optimizer=SGD):
    compiled = optimizer._replace(update=jax.jit(optimizer.update))
    step = make_train_step(Problem(lambda _: NET, objective, stored_attack), compiled, perturb=perturb)
    return step(first_state(optimizer), BATCH, jax.random.key(0))[0].variables


@functools.cache
def plain_step():
    return take_step(PGD_AT, None)


def test_the_offset_is_gamma_times_the_weights_norm_along_the_gradient():
    offset = program(gamma=0.02)(PARAMS, GRADIENT, jnp.float32(0))
    for v, w, g in zip(*map(jax.tree.leaves, (offset, PARAMS, GRADIENT)), strict=True):
        if w.ndim > 1:
            np.testing.assert_allclose(np.linalg.norm(v), 0.02 * np.linalg.norm(w), rtol=1e-5)
            np.testing.assert_allclose(v / np.linalg.norm(v), g / np.linalg.norm(g), atol=1e-6)
        else:
            assert not np.any(v)


def test_there_is_no_offset_before_the_end_of_the_warm_up():
    perturb = program(gamma=0.02, warmup=10)
    for epoch, expected in ((9.99, False), (10.0, True)):
        offset = perturb(PARAMS, GRADIENT, jnp.float32(epoch))
        assert any(np.any(v) for v in jax.tree.leaves(offset)) == expected


def test_a_perturbation_of_size_zero_changes_no_bit():
    for perturb in (program(gamma=0.0), program(gamma=0.01, warmup=1)):
        jax.tree.map(np.testing.assert_array_equal, take_step(PGD_AT, perturb), plain_step())


def test_a_learning_rate_of_zero_restores_the_weights():
    still = take_step(PGD_AT, program(gamma=0.01), STILL)
    jax.tree.map(np.testing.assert_array_equal, still["params"], PARAMS)


def test_the_step_is_taken_at_the_perturbed_weights_decay_included():
    """In plain NumPy words: w − lr·(∇L(w + v) + wd·(w + v)), with v along the gradient of the proxy."""

    def loss(params):
        return PGD_AT.loss(NET, with_trainable(VARIABLES, {"params": params}), BATCH, X_ADV, jax.random.key(0))[0]

    weights = jax.device_get(PARAMS)
    offset = jax.device_get(program(gamma=0.01)(PARAMS, jax.grad(loss)(PARAMS), jnp.float32(0)))
    moved = jax.tree.map(np.add, weights, offset)
    gradient = jax.device_get(jax.grad(loss)(moved))
    expected = jax.tree.map(lambda w, p, g: w - 0.1 * (g + 5e-4 * p), weights, moved, gradient)
    got = jax.device_get(take_step(PGD_AT, program(gamma=0.01))["params"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), got, jax.device_get(plain_step()["params"]))
    assert max(jax.tree.leaves(differences)) > 1e-3


def test_the_proxys_batch_statistics_are_discarded():
    """One training-mode pass over x_adv moves the running means, at weights that shift only the activations."""
    statistics = take_step(PGD_AT, program(gamma=0.0))["batch_stats"]
    _, once = NET.forward(VARIABLES, X_ADV, jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), statistics, once["batch_stats"])


def test_an_objectives_own_proxy_is_what_is_climbed():
    """A proxy with the opposite gradient moves the weights the other way."""

    def negative(net, variables, batch, x_adv, key):
        return -PGD_AT.loss(net, variables, batch, x_adv, key)[0]

    seen = []

    def spy(params, gradients, epoch):
        seen.append(gradients)
        return jax.tree.map(np.zeros_like, params)

    take_step(PGD_AT, spy)
    take_step(PGD_AT._replace(proxy=negative), spy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, -b, rtol=1e-4, atol=1e-6), *seen)


@pytest.mark.parametrize("options", [dict(gamma=-0.1), dict(gamma=2.0), dict(warmup=-1)])
def test_impossible_values_are_refused(options):
    with pytest.raises(InputError, match="not allowed"):
        awp(**options)
