"""SCORE against its formula in float64, and its two published forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objectives import BATCH, NET, VARIABLES, X_ADV, loss_and_gradient

from ibjax import losses
from ibjax.errors import InputError
from ibjax.objectives.pgd_at import pgd_at
from ibjax.objectives.score import score
from ibjax.objectives.trades import trades

Y = np.eye(4)[np.asarray(BATCH["label"])]


def predictions():
    """(p, p') of the training-mode passes over x, then x', in float64."""
    (clean, _), after = NET.forward(VARIABLES, BATCH["image"], jax.random.key(0))
    (adv, _), _ = NET.forward(after, X_ADV, jax.random.key(0))
    return (np.asarray(jax.nn.softmax(z), np.float64) for z in (clean, adv))


def square(q, p):
    return ((q - p) ** 2).sum(1)


@pytest.mark.parametrize(("options", "expected"), [
    (dict(beta=4.0), lambda p, q: square(p, Y) + 4 * square(q, p)),
    (dict(beta=4.0, clip=0.5), lambda p, q: np.maximum(square(p, Y) + 4 * square(q, p) - 0.5**2 * (1 + 1 / 3), 0)),
    (dict(clip=0.1, clipped="robust"), lambda p, q: square(p, Y) + np.maximum(4 * square(q, p) - 0.16 / 3, 0)),
    (dict(base="pgd_at"), lambda p, q: square(q, Y)),
    (dict(base="pgd_at", clip=0.4), lambda p, q: np.maximum(square(q, Y) - 0.4**2 * (1 + 1 / 3), 0)),
    (dict(base="pgd_at", divergence="kl", clip=0.4), lambda p, q: np.maximum(-np.log((Y * q).sum(1)) + np.log(0.6), 0)),
], ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "")  # fmt: skip
def test_it_is_its_formula(options, expected):
    p, q = predictions()
    if options.get("base") == "pgd_at":  # the pass over x' comes first and alone, and in training mode it is the same
        q = np.asarray(jax.nn.softmax(NET.forward(VARIABLES, X_ADV, jax.random.key(0))[0][0]), np.float64)
    value = expected(p, q)
    assert value.mean() > 0
    np.testing.assert_allclose(loss_and_gradient(score(**options))[0], value.mean(), rtol=2e-5)


def test_with_kl_it_is_trades_and_pgd_at():
    for ours, theirs in (
        (score(divergence="kl", beta=6.0), trades()),
        (score(base="pgd_at", divergence="kl"), pgd_at()),
    ):
        (value, gradient, *_), (other, expected, *_) = loss_and_gradient(ours), loss_and_gradient(theirs)
        np.testing.assert_allclose(value, other, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, expected)


def test_the_gradient_is_that_of_finite_differences():
    """To the logits of x, through p in both terms, and of x'; in float64 along random directions."""
    rng = np.random.default_rng(0)
    z, z_adv = rng.normal(size=(2, 12, 4)) * 2

    def on_logits(clean, adv):
        def forward(variables, x, key, edits=None):
            return (clean if x is BATCH["image"] else adv, {}), variables

        return score().loss(NET._replace(forward=forward), {}, BATCH, X_ADV, jax.random.key(0))[0]

    def expected(clean, adv):
        p, q = (np.exp(u) / np.exp(u).sum(1, keepdims=True) for u in (clean, adv))
        return (square(p, Y) + 4 * square(q, p)).mean()

    for argument, gradient in enumerate(jax.grad(on_logits, (0, 1))(jnp.float32(z), jnp.float32(z_adv))):
        way, h = rng.normal(size=(12, 4)), 1e-5
        ends = [[z, z_adv], [z, z_adv]]
        for end, sign in zip(ends, (1, -1), strict=True):
            end[argument] = end[argument] + sign * h * way
        slope = (expected(*ends[0]) - expected(*ends[1])) / (2 * h)
        np.testing.assert_allclose(np.sum(gradient * way), slope, rtol=1e-3)


def test_its_attack_climbs_the_squared_error():
    objective = score()
    target = objective.target(NET, VARIABLES, BATCH, jax.random.key(0))
    output = NET.predict(VARIABLES, X_ADV)
    p, q = (np.asarray(jax.nn.softmax(NET.predict(VARIABLES, x)[0]), np.float64) for x in (BATCH["image"], X_ADV))
    np.testing.assert_allclose(target, p, rtol=1e-5)
    np.testing.assert_allclose(objective.attack_loss(output, target), square(q, p), rtol=1e-3, atol=1e-7)
    labels = score(base="pgd_at")
    assert losses.is_labels(labels.target(NET, VARIABLES, BATCH, jax.random.key(0)))
    np.testing.assert_allclose(labels.attack_loss(output, BATCH["label"]), square(q, Y), rtol=1e-4)
    assert objective.flat_at_x and not labels.flat_at_x


def test_wrong_options_are_refused():
    for options, text in (
        (dict(base="mart"), "objective.base='mart' is unknown"),
        (dict(divergence="l1"), "objective.divergence='l1' is unknown"),
        (dict(clip=1.0), "objective.clip=1 is not allowed"),
        (dict(base="pgd_at", clipped="robust"), "objective.clipped='robust' needs base='trades'"),
        (dict(passes="adv"), "objective.passes='adv' is not allowed"),
    ):
        with pytest.raises(InputError, match=text):
            score(**options)
