"""DKL and IKL: the gradients of KL, the formula with all pairs of classes, and the class means over the epochs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objectives import BATCH, NET, VARIABLES, X_ADV

from ibjax import losses
from ibjax.errors import InputError
from ibjax.objectives.dkl import dkl, weighted_square

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
Z, Z_ADV = RNG.normal(size=(2, 12, 4)) * 2
MEANS = RNG.dirichlet(np.ones(4), 4)
MEMORY = {"means": np.float32(MEANS), "sums": np.zeros((4, 4), np.float32), "epoch": np.int32(0)}
NOW = {**BATCH, "epoch": jnp.float32(0.5)}


def on_logits(objective, clean, adv, memory=MEMORY):
    """The loss of an objective whose network returns given logits for x and x'."""

    def forward(variables, x, key, edits=None):
        return (clean if x is BATCH["image"] else adv, {}), variables

    return objective.loss(NET._replace(forward=forward), {"memory": memory}, NOW, X_ADV, KEY)[0]


def pairs(z, z_adv, w):
    """W by its double sum over classes, in float64."""
    gaps, gaps_adv = (u[:, :, None] - u[:, None] for u in (z, z_adv))
    return 0.25 * (w[:, :, None] * w[:, None] * (gaps - gaps_adv) ** 2).sum((1, 2))


def softmax(z):
    return np.exp(z) / np.exp(z).sum(1, keepdims=True)


def test_the_square_is_its_double_sum():
    w = RNG.uniform(size=(12, 4))
    np.testing.assert_allclose(
        jax.jit(weighted_square)(np.float32(Z - Z_ADV), np.float32(w)), pairs(Z, Z_ADV, w), rtol=1e-4
    )


def test_dkl_has_the_gradients_of_kl():
    """With α = β = 1: to the logits of x and of x'. The loss has another value."""
    objective = dkl(variant="dkl", alpha=1.0, beta=1.0)

    def decoupled(clean, adv):
        return on_logits(objective, clean, adv) - jnp.mean(losses.cross_entropy(clean, BATCH["label"]))

    def kl(clean, adv):
        return jnp.mean(losses.kl_logits(clean, adv))

    both = jax.jit(lambda *arguments: [jax.value_and_grad(f, (0, 1))(*arguments) for f in (decoupled, kl)])
    (value, gradients), (other_value, others) = both(np.float32(Z), np.float32(Z_ADV))
    for ours, theirs in zip(gradients, others, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert abs(float(value) - float(other_value)) > 0.1


@pytest.mark.parametrize("power", [1.0, 0.4])
def test_ikl_is_its_formula_and_both_logits_move(power):
    """Class means as weights, all of W differentiated: against float64 and finite differences."""
    objective, y = dkl(alpha=3.0, beta=7.0, power=power), np.asarray(BATCH["label"])
    w = MEANS[y] ** power / (MEANS[y] ** power).sum(1, keepdims=True)

    def expected(z, z_adv, held=None):
        p = softmax(Z if held is None else held)
        soft = -(p * np.log(softmax(z_adv))).sum(1)
        natural = -np.log(softmax(z)[np.arange(12), y])
        return (natural + 3 * soft + 7 * pairs(z, z_adv, w)).mean()

    both = jax.jit(jax.value_and_grad(lambda z, z_adv: on_logits(objective, z, z_adv), (0, 1)))
    value, gradients = both(np.float32(Z), np.float32(Z_ADV))
    np.testing.assert_allclose(value, expected(Z, Z_ADV), rtol=1e-5)
    for argument, gradient in enumerate(gradients):
        way, h = RNG.normal(size=(12, 4)), 1e-5
        ends = [[Z, Z_ADV], [Z, Z_ADV]]
        for end, sign in zip(ends, (1, -1), strict=True):
            end[argument] = end[argument] + sign * h * way
        slope = (expected(*ends[0]) - expected(*ends[1])) / (2 * h)
        np.testing.assert_allclose(np.sum(gradient * way), slope, rtol=1e-3)


def test_the_attack_climbs_both_terms_or_the_first():
    for attack_beta in (1.0, 0.0):
        objective = dkl(attack_beta=attack_beta)
        target = objective.target(NET, {**VARIABLES, "memory": MEMORY}, NOW, KEY)
        output = NET.predict(VARIABLES, X_ADV)
        z, z_adv = (np.asarray(NET.predict(VARIABLES, x)[0], np.float64) for x in (BATCH["image"], X_ADV))
        w = MEANS[np.asarray(BATCH["label"])]
        expected = -(softmax(z) * np.log(softmax(z_adv))).sum(1) + attack_beta * pairs(z, z_adv, w)
        np.testing.assert_allclose(objective.attack_loss(output, target), expected, rtol=1e-4, atol=1e-5)


def test_class_means_are_those_of_the_epoch_before():
    """Sums of softmax(z / T) by class; a new epoch makes means of them once, and an unseen class keeps its own."""
    objective = dkl(temperature=2.0)
    memory = objective.memory(99, 4)
    np.testing.assert_allclose(memory["means"], 0.25)
    seen = jnp.asarray([0, 1, 2] * 4)  # not class 3

    def forward(variables, x, key, edits=None):
        return (jnp.float32(Z if x is BATCH["image"] else Z_ADV), {}), variables

    @jax.jit
    def step(variables, epoch):
        """(what is remembered before the step, the variables after it)."""
        now = {**NOW, "label": seen, "epoch": epoch}
        variables = objective.remember(NET, variables, now, KEY)
        return variables, objective.loss(NET._replace(forward=forward), variables, now, X_ADV, KEY)[1][0]

    variables = {"memory": memory}
    for epoch, count in ((0.0, 2), (1.0, 1)):
        for number in range(count):
            remembered, variables = step(variables, np.float32(epoch + number / 2))
            if epoch:
                p = softmax(Z / 2)
                expected = np.stack([p[np.asarray(seen) == c].mean(0) for c in range(3)] + [np.full(4, 0.25)])
                np.testing.assert_allclose(remembered["memory"]["means"], expected, rtol=1e-5)
                np.testing.assert_array_equal(remembered["memory"]["sums"], 0)
    again, _ = step(variables, np.float32(1.5))
    np.testing.assert_array_equal(again["memory"]["sums"], variables["memory"]["sums"])  # not in the middle of an epoch


def test_wrong_options_are_refused():
    for options, text in (
        (dict(variant="kl"), "objective.variant='kl' is unknown"),
        (dict(temperature=0.0), "objective.temperature=0 is not allowed"),
        (dict(passes="adv"), "objective.passes='adv' is not allowed"),
    ):
        with pytest.raises(InputError, match=text):
            dkl(**options)
    assert dkl(variant="dkl").memory is None
