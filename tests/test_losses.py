"""Losses against float64 closed forms written independently."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibjax import losses

RNG = np.random.default_rng(0)
cross_entropy, kl, margin = (jax.jit(loss) for loss in (losses.cross_entropy, losses.kl, losses.margin))
LOGITS = 3 * RNG.normal(size=(7, 5))
LABELS = RNG.integers(0, 5, 7)
TARGET = RNG.dirichlet(np.ones(5), 7)


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_cross_entropy_of_labels_and_of_distributions():
    q = softmax(LOGITS)
    got = cross_entropy(np.float32(LOGITS), np.int32(LABELS))
    np.testing.assert_allclose(got, -np.log(q[np.arange(7), LABELS]), rtol=1e-5)
    got = cross_entropy(np.float32(LOGITS), np.float32(TARGET))
    np.testing.assert_allclose(got, -(TARGET * np.log(q)).sum(1), rtol=1e-5)


def test_kl_is_the_sum_over_classes_and_zero_at_equality():
    q = softmax(LOGITS)
    got = kl(np.float32(LOGITS), np.float32(TARGET))
    np.testing.assert_allclose(got, (TARGET * np.log(TARGET / q)).sum(1), rtol=1e-4)
    np.testing.assert_allclose(kl(np.float32(LOGITS), np.float32(q)), 0, atol=1e-6)


def test_kl_of_a_hard_label_is_cross_entropy_and_finite():
    """A target with zeros must not turn 0·log 0 into NaN, in the value or the gradient."""
    one_hot = np.float32(np.eye(5)[LABELS])
    got = kl(np.float32(LOGITS), one_hot)
    np.testing.assert_allclose(got, cross_entropy(np.float32(LOGITS), np.int32(LABELS)), rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda z: jnp.sum(losses.kl(z, one_hot))))(np.float32(LOGITS))
    assert np.all(np.isfinite(gradient))


def test_kl_logits_differentiates_both_arguments():
    a, b = np.float32(LOGITS), np.float32(RNG.normal(size=(7, 5)))

    def total(a, b):
        value = losses.kl_logits(a, b)
        return jnp.sum(value), value

    gradients, value = jax.jit(jax.grad(total, (0, 1), has_aux=True))(a, b)
    np.testing.assert_allclose(value, kl(b, np.float32(softmax(a))), rtol=1e-4)
    assert all(np.abs(g).max() > 1e-3 for g in gradients)


@pytest.mark.parametrize("shift", [0.0, -100.0])
def test_margin_is_positive_exactly_when_misclassified(shift):
    """Also where all logits are negative, which masking with zero gets wrong."""
    z = LOGITS + shift
    got = np.asarray(margin(np.float32(z), np.int32(LABELS)))
    others = np.array([np.delete(row, y).max() for row, y in zip(z, LABELS, strict=True)])
    np.testing.assert_allclose(got, others - z[np.arange(7), LABELS], rtol=1e-4, atol=1e-4)
    assert ((got > 0) == (z.argmax(1) != LABELS)).all()
