"""Adversarial weight perturbation: size, direction, what it leaves alone, and the order of a step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_objectives import BATCH, MODEL, NET, VARIABLES, X_ADV

from ibjax.errors import InputError
from ibjax.objectives.pgd_at import pgd_at
from ibjax.objectives.trades import trades
from ibjax.optim import sgd
from ibjax.perturb import awp
from ibjax.step import Problem, init_state, make_train_step, with_trainable

PARAMS = VARIABLES["params"]
GRADIENT = jax.tree.map(lambda w: jnp.asarray(np.cos(17 * np.asarray(w))), PARAMS)


def stored_attack(key, logits_fn, x, target):
    return X_ADV


def take_step(objective, perturb, optimizer=None, epoch=0, variables=VARIABLES):
    optimizer = optimizer or sgd(lr=lambda step: 0.1, weight_decay=5e-4)
    state = jax.jit(lambda: init_state(jax.random.key(0), NET, MODEL, None, optimizer, BATCH["image"], False))()
    state = state._replace(variables=variables, step=jnp.int32(epoch))
    step = make_train_step(Problem(lambda _: NET, objective, stored_attack), optimizer, perturb=perturb)
    return step(state, BATCH, jax.random.key(0))[0].variables


def test_the_offset_is_gamma_times_the_weights_norm_along_the_gradient():
    offset = awp(gamma=0.02)(PARAMS, GRADIENT, jnp.float32(0))
    for v, w, g in zip(*map(jax.tree.leaves, (offset, PARAMS, GRADIENT)), strict=True):
        if w.ndim > 1:
            np.testing.assert_allclose(np.linalg.norm(v), 0.02 * np.linalg.norm(w), rtol=1e-5)
            np.testing.assert_allclose(v / np.linalg.norm(v), g / np.linalg.norm(g), atol=1e-6)
        else:
            assert not v.any()


def test_there_is_no_offset_before_the_end_of_the_warm_up():
    perturb = awp(gamma=0.02, warmup=10)
    for epoch, expected in ((9.99, False), (10.0, True)):
        offset = perturb(PARAMS, GRADIENT, jnp.float32(epoch))
        assert any(bool(jnp.any(v)) for v in jax.tree.leaves(offset)) == expected


def test_a_perturbation_of_size_zero_changes_no_bit():
    without = take_step(trades(), None)
    for perturb in (awp(gamma=0.0), awp(gamma=0.01, warmup=1)):
        jax.tree.map(np.testing.assert_array_equal, take_step(trades(), perturb), without)


def test_a_learning_rate_of_zero_restores_the_weights():
    still = take_step(trades(), awp(gamma=0.01), sgd(lr=lambda step: 0.0, weight_decay=5e-4))
    jax.tree.map(np.testing.assert_array_equal, still["params"], PARAMS)


def test_the_step_is_taken_at_the_perturbed_weights_decay_included():
    """In plain NumPy words: w − lr·(∇L(w + v) + wd·(w + v)), with v along the gradient of the proxy."""

    def loss(params):
        return pgd_at().loss(NET, with_trainable(VARIABLES, {"params": params}), BATCH, X_ADV, jax.random.key(0))[0]

    offset = awp(gamma=0.01)(PARAMS, jax.grad(loss)(PARAMS), jnp.float32(0))
    moved = optax.apply_updates(PARAMS, offset)
    expected = jax.tree.map(lambda w, p, g: w - 0.1 * (g + 5e-4 * p), PARAMS, moved, jax.grad(loss)(moved))
    got = take_step(pgd_at(), awp(gamma=0.01))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got["params"], expected)
    plain = take_step(pgd_at(), None)["params"]
    differences = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), got["params"], plain)
    assert max(jax.tree.leaves(differences)) > 1e-3


def test_the_proxys_batch_statistics_are_discarded():
    """One training-mode pass over x_adv moves the running means, at weights that shift only the activations."""
    statistics = take_step(pgd_at(), awp(gamma=0.0))["batch_stats"]
    _, once = NET.forward(VARIABLES, X_ADV, jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), statistics, once["batch_stats"])


def test_an_objectives_own_proxy_is_what_is_climbed():
    """A proxy with the opposite gradient moves the weights the other way."""
    loss = pgd_at()

    def negative(net, variables, batch, x_adv, key):
        return -loss.loss(net, variables, batch, x_adv, key)[0]

    seen = []

    def spy(params, gradients, epoch):
        seen.append(gradients)
        return jax.tree.map(jnp.zeros_like, params)

    take_step(loss, spy)
    take_step(loss._replace(proxy=negative), spy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, -b, rtol=1e-4, atol=1e-6), *seen)


@pytest.mark.parametrize("options", [dict(gamma=-0.1), dict(gamma=2.0), dict(warmup=-1)])
def test_impossible_values_are_refused(options):
    with pytest.raises(InputError, match="not allowed"):
        awp(**options)
