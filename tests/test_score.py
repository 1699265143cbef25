"""SCORE against its formula in float64, and its two published forms."""

import functools

import jax
import numpy as np
import pytest
from test_distillation import BATCH, NET, VARIABLES, X_ADV, assert_close, loss_of, with_gradients

from ibjax import losses
from ibjax.errors import InputError
from ibjax.objectives.pgd_at import pgd_at
from ibjax.objectives.score import score
from ibjax.objectives.trades import trades
from ibjax.step import trainable

KEY = jax.random.key(0)
Y = np.eye(4)[np.asarray(BATCH["label"])]


def softmax(z):
    e = np.exp(np.float64(z))
    return e / e.sum(1, keepdims=True)


@functools.cache
def predictions():
    """(p, p') of the training-mode passes over x, then x', and (p') of a pass over x' alone, in float64."""

    @jax.jit
    def passes(variables):
        (clean, _), after = NET.forward(variables, BATCH["image"], KEY)
        return clean, NET.forward(after, X_ADV, KEY)[0][0], NET.forward(variables, X_ADV, KEY)[0][0]

    return tuple(map(softmax, passes(VARIABLES)))


def square(q, p):
    return ((q - p) ** 2).sum(1)


FORMULAS = [
    (dict(beta=4.0), lambda p, q: square(p, Y) + 4 * square(q, p)),
    (dict(beta=4.0, clip=0.5), lambda p, q: np.maximum(square(p, Y) + 4 * square(q, p) - 0.5**2 * (1 + 1 / 3), 0)),
    (dict(clip=0.1, clipped="robust"), lambda p, q: square(p, Y) + np.maximum(4 * square(q, p) - 0.16 / 3, 0)),
    (dict(base="pgd_at"), lambda p, q: square(q, Y)),
    (dict(base="pgd_at", clip=0.4), lambda p, q: np.maximum(square(q, Y) - 0.4**2 * (1 + 1 / 3), 0)),
    (dict(base="pgd_at", divergence="kl", clip=0.4), lambda p, q: np.maximum(-np.log((Y * q).sum(1)) + np.log(0.6), 0)),
]  # fmt: skip


def named(options):
    return "-".join(map(str, options.values()))


@functools.cache
def losses_with_formulas():
    """{name: loss}, as one program."""
    found = jax.jit(lambda trained: [loss_of(score(**options))(trained) for options, _ in FORMULAS])
    return dict(zip((named(options) for options, _ in FORMULAS), found(trainable(VARIABLES)), strict=True))


@pytest.mark.parametrize("options, expected", FORMULAS, ids=lambda value: named(value) if type(value) is dict else "")
def test_it_is_its_formula(options, expected):
    p, q, alone = predictions()
    if options.get("base") == "pgd_at":  # the pass over x' comes first and alone, and in training mode it is the same
        q = alone
    value = expected(p, q)
    assert value.mean() > 0
    np.testing.assert_allclose(losses_with_formulas()[named(options)], value.mean(), rtol=2e-5)


def test_with_kl_it_is_trades_and_pgd_at():
    as_trades, as_pgd_at = score(divergence="kl", beta=6.0), score(base="pgd_at", divergence="kl")
    found = with_gradients(*map(loss_of, (as_trades, trades(), as_pgd_at, pgd_at())))
    for (value, gradient), (other, expected) in (found[:2], found[2:]):
        np.testing.assert_allclose(value, other, rtol=1e-5)
        assert_close(gradient, expected, atol=1e-5)


def test_the_gradient_is_that_of_finite_differences():
    """To the logits of x, through p in both terms, and of x'; in float64 along random directions."""
    rng = np.random.default_rng(0)
    z, z_adv = rng.normal(size=(2, 12, 4)) * 2

    def on_logits(clean, adv):
        def forward(variables, x, key, edits=None):
            return (clean if x is BATCH["image"] else adv, {}), variables

        return score().loss(NET._replace(forward=forward), {}, BATCH, X_ADV, KEY)[0]

    def expected(clean, adv):
        p, q = softmax(clean), softmax(adv)
        return (square(p, Y) + 4 * square(q, p)).mean()

    for argument, gradient in enumerate(jax.jit(jax.grad(on_logits, (0, 1)))(np.float32(z), np.float32(z_adv))):
        way, h = rng.normal(size=(12, 4)), 1e-5
        ends = [[z, z_adv], [z, z_adv]]
        for end, sign in zip(ends, (1, -1), strict=True):
            end[argument] = end[argument] + sign * h * way
        slope = (expected(*ends[0]) - expected(*ends[1])) / (2 * h)
        np.testing.assert_allclose(np.sum(gradient * way), slope, rtol=1e-3)


def test_its_attack_climbs_the_squared_error():
    objective, labels = score(), score(base="pgd_at")

    @jax.jit
    def found(variables):
        target, output = objective.target(NET, variables, BATCH, KEY), NET.predict(variables, X_ADV)
        climbed = objective.attack_loss(output, target), labels.attack_loss(output, BATCH["label"])
        return NET.predict(variables, BATCH["image"])[0], output[0], target, *climbed

    clean, adv, target, from_target, from_labels = found(VARIABLES)
    p, q = softmax(clean), softmax(adv)
    np.testing.assert_allclose(target, p, rtol=1e-5)
    np.testing.assert_allclose(from_target, square(q, p), rtol=1e-3, atol=1e-7)
    assert losses.is_labels(labels.target(NET, VARIABLES, BATCH, KEY))
    np.testing.assert_allclose(from_labels, square(q, Y), rtol=1e-4)
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
