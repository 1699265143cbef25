"""Temporal ensembling: the buffer's arithmetic, the ramp, both bases, and what a weight perturbation may not reach."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import once
from test_objectives import BATCH, NET, VARIABLES, X_ADV, first_state, softmax

from ibjax.errors import InputError
from ibjax.objectives.pgd_at import pgd_at
from ibjax.objectives.te import te
from ibjax.objectives.trades import trades
from ibjax.optim import sgd
from ibjax.step import Problem, make_train_step

KEY = jax.random.key(0)
E = np.float32(np.random.default_rng(0).random((20, 4)))  # what is remembered of 20 images; the batch has the first 12


@once
def P():
    """The predictions for the clean images."""
    return softmax(NET.predict(VARIABLES, BATCH["image"])[0])


def at(epoch, memory=E):
    """(batch, variables) in the given epoch, counted from 1, at its middle."""
    return {**BATCH, "epoch": np.float32(epoch - 0.5)}, {**VARIABLES, "memory": memory}


def ensemble(e):
    return e[:12] / e[:12].sum(1, keepdims=True)


@functools.cache
def programs(base="pgd_at"):
    """The objective, whose functions are compiled."""
    made = te(base=base)
    names = "target", "remember", "loss"
    return made._replace(**{name: jax.jit(getattr(made, name), static_argnums=0) for name in names})


def remembered(epoch, memory=E):
    batch, variables = at(epoch, memory)
    return np.asarray(programs().remember(NET, variables, batch, KEY)["memory"])


def test_the_buffer_averages_clean_predictions_from_its_first_epoch_on():
    np.testing.assert_array_equal(remembered(89), E)
    after = remembered(90)
    np.testing.assert_allclose(after[:12], 0.9 * E[:12] + 0.1 * P(), rtol=1e-5)
    np.testing.assert_array_equal(after[12:], E[12:])
    from_zero = remembered(90, np.zeros_like(E))
    batch, variables = at(90, from_zero)
    np.testing.assert_allclose(programs().target(NET, variables, batch, KEY)["t"], P(), rtol=1e-5)


@pytest.mark.parametrize(("epoch", "expected"), [
    (1, 0), (89, 0), (90, 300 * np.exp(-5)), (120, 300 * np.exp(-1.25)), (150, 300), (151, 300), (200, 300),
])  # fmt: skip
def test_the_weight_ramps_up(epoch, expected):
    batch, variables = at(epoch)
    np.testing.assert_allclose(programs().target(NET, variables, batch, KEY)["w"], expected, rtol=1e-5)


@functools.cache
def plain(base):
    """The base's own result."""
    return jax.jit({"pgd_at": pgd_at, "trades": trades}[base]().loss, static_argnums=0)(
        NET, VARIABLES, BATCH, X_ADV, KEY
    )


@pytest.mark.parametrize("base", ["pgd_at", "trades"])
def test_the_loss_adds_the_distance_to_the_ensemble(base):
    """Of p(x') on PGD training, of p(x) on TRADES; mean over images and classes."""
    batch, variables = at(120)
    value, (after, metrics) = programs(base).loss(NET, variables, batch, X_ADV, KEY)
    base_value, (base_after, _) = plain(base)
    (logits, _), _ = NET.forward(VARIABLES, {"pgd_at": X_ADV, "trades": BATCH["image"]}[base], KEY)
    squares = np.square(softmax(logits) - ensemble(E))
    np.testing.assert_allclose(value, float(base_value) + 300 * np.exp(-1.25) * squares.mean(), rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, after["batch_stats"], base_after["batch_stats"])
    np.testing.assert_allclose(metrics["ensemble"], squares.mean(), rtol=1e-4)


@pytest.mark.parametrize("base", ["pgd_at", "trades"])
def test_before_its_first_epoch_it_is_its_base(base):
    batch, variables = at(89, np.zeros_like(E))
    value, _ = programs(base).loss(NET, variables, batch, X_ADV, KEY)
    np.testing.assert_allclose(value, plain(base)[0], rtol=1e-6)


@pytest.mark.parametrize("base", ["pgd_at", "trades"])
def test_the_attack_climbs_the_full_loss(base):
    batch, variables = at(120)
    objective = programs(base)
    output = NET.predict(VARIABLES, X_ADV)
    found = jax.jit(objective.attack_loss)(output, objective.target(NET, variables, batch, KEY))
    q = softmax(output[0])
    fit = {
        "pgd_at": -np.log(q[np.arange(12), BATCH["label"]]),
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
        state = first_state(optimizer, {**VARIABLES, "memory": jnp.asarray(np.zeros_like(E))})
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
