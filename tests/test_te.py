"""Temporal ensembling: the buffer's arithmetic, the ramp, both bases, and what a weight perturbation may not reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import once
from test_objectives import BATCH, MODEL, NET, VARIABLES, X_ADV

from ibjax import losses
from ibjax.errors import InputError
from ibjax.objectives.pgd_at import pgd_at
from ibjax.objectives.te import te
from ibjax.objectives.trades import trades
from ibjax.optim import sgd
from ibjax.step import Problem, init_state, make_train_step

KEY = jax.random.key(0)
E = np.float32(np.random.default_rng(0).random((20, 4)))  # what is remembered of 20 images; the batch has the first 12


@once
def P():
    """The predictions for the clean images."""
    return np.asarray(jax.nn.softmax(NET.predict(VARIABLES, BATCH["image"])[0]))


def at(epoch, memory=E):
    """(batch, variables) in the given epoch, counted from 1, at its middle."""
    return {**BATCH, "epoch": jnp.float32(epoch - 0.5)}, {**VARIABLES, "memory": jnp.asarray(memory)}


def ensemble(e):
    return e[:12] / e[:12].sum(1, keepdims=True)


def remembered(objective, epoch, memory=E):
    batch, variables = at(epoch, memory)
    return objective.remember(NET, variables, batch, KEY)["memory"]


def test_the_buffer_averages_clean_predictions_from_its_first_epoch_on():
    np.testing.assert_array_equal(remembered(te(), 89), E)
    after = remembered(te(), 90)
    np.testing.assert_allclose(after[:12], 0.9 * E[:12] + 0.1 * P(), rtol=1e-5)
    np.testing.assert_array_equal(after[12:], E[12:])
    from_zero = remembered(te(), 90, np.zeros_like(E))
    batch, variables = at(90, from_zero)
    np.testing.assert_allclose(te().target(NET, variables, batch, KEY)["t"], P(), rtol=1e-5)


@pytest.mark.parametrize(("epoch", "expected"), [
    (1, 0), (89, 0), (90, 300 * np.exp(-5)), (120, 300 * np.exp(-1.25)), (150, 300), (151, 300), (200, 300),
])  # fmt: skip
def test_the_weight_ramps_up(epoch, expected):
    batch, variables = at(epoch)
    np.testing.assert_allclose(te().target(NET, variables, batch, KEY)["w"], expected, rtol=1e-5)


@pytest.mark.parametrize("base", ["pgd_at", "trades"])
def test_the_loss_adds_the_distance_to_the_ensemble(base):
    """Of p(x') on PGD training, of p(x) on TRADES; mean over images and classes."""
    batch, variables = at(120)
    value, (after, metrics) = te(base=base).loss(NET, variables, batch, X_ADV, KEY)
    plain = {"pgd_at": pgd_at(), "trades": trades()}[base].loss(NET, VARIABLES, BATCH, X_ADV, KEY)
    (logits, _), _ = NET.forward(VARIABLES, {"pgd_at": X_ADV, "trades": BATCH["image"]}[base], KEY)
    squares = np.square(np.asarray(jax.nn.softmax(logits), np.float64) - ensemble(E))
    np.testing.assert_allclose(value, plain[0] + 300 * np.exp(-1.25) * squares.mean(), rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, after["batch_stats"], plain[1][0]["batch_stats"])
    np.testing.assert_allclose(metrics["ensemble"], squares.mean(), rtol=1e-4)


@pytest.mark.parametrize("base", ["pgd_at", "trades"])
def test_before_its_first_epoch_it_is_its_base(base):
    batch, variables = at(89, np.zeros_like(E))
    value, _ = te(base=base).loss(NET, variables, batch, X_ADV, KEY)
    plain = {"pgd_at": pgd_at(), "trades": trades()}[base].loss(NET, VARIABLES, BATCH, X_ADV, KEY)[0]
    np.testing.assert_allclose(value, plain, rtol=1e-6)


@pytest.mark.parametrize("base", ["pgd_at", "trades"])
def test_the_attack_climbs_the_full_loss(base):
    batch, variables = at(120)
    objective = te(base=base)
    output = NET.predict(VARIABLES, X_ADV)
    found = objective.attack_loss(output, objective.target(NET, variables, batch, KEY))
    q = np.asarray(jax.nn.softmax(output[0]), np.float64)
    fit = {
        "pgd_at": losses.cross_entropy(output[0], BATCH["label"]),
        "trades": 6 * (P() * np.log(P() / q)).sum(1),
    }[base]
    np.testing.assert_allclose(found, fit + 300 * np.exp(-1.25) * np.square(q - ensemble(E)).mean(1), rtol=1e-4)


def test_what_is_remembered_is_of_the_unperturbed_weights():
    """With a weight perturbation as without; and the attack's target already holds it."""
    objective = te(start=1, end=2)
    targets = []

    def spy(key, logits_fn, x, target):
        targets.append(target["t"])
        return X_ADV

    def memory(perturb):
        optimizer = sgd(lr=lambda step: 0.1)
        initial = lambda: init_state(KEY, NET, MODEL, None, optimizer, BATCH["image"], False, jnp.zeros((20, 4)))  # noqa: E731
        state = jax.jit(initial)()
        state = state._replace(variables={**state.variables, **VARIABLES})
        step = make_train_step(Problem(lambda _: NET, objective, spy), optimizer, perturb=perturb)
        return step(state, BATCH, KEY)[0].variables["memory"]

    far = memory(lambda params, gradients, epoch: jax.tree.map(lambda w: 0.5 * jnp.ones_like(w), params))
    np.testing.assert_array_equal(far, memory(None))
    np.testing.assert_allclose(far[:12], 0.1 * P(), rtol=1e-4)
    for t in targets:
        np.testing.assert_allclose(t, P(), rtol=1e-4)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(base="mart"), "base='mart' is unknown"),
        (dict(weight=-1.0), "weight=-1 is not allowed"),
        (dict(momentum=1.0), "momentum=1 is not allowed"),
        (dict(start=5, end=5), "end=5 is not allowed; give a number of at least 6"),
    ],
)
def test_impossible_values_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        te(**options)
