"""Closed forms of the small baselines: label smoothing, logit pairing, and the reconstruction of InfoAT."""

import functools

import jax
import numpy as np
import pytest
import scipy.special
import test_objectives
from test_step import BATCH, NET, VARIABLES, X_ADV, X, after_passes

from ibjax import losses
from ibjax.errors import InputError
from ibjax.objectives.alp import alp
from ibjax.objectives.infoat_r import infoat_r, moments, rate
from ibjax.objectives.label_smoothing import label_smoothing
from ibjax.objectives.mart import boosted_cross_entropy, mart
from ibjax.objectives.pgd_at import pgd_at
from ibjax.objectives.standard import standard

KEY = jax.random.key(2)


def loss_and_gradient(objective, x_adv=X_ADV):
    return test_objectives.loss_and_gradient(objective, VARIABLES, NET, x_adv)


def logits_of(*parts):
    """Of one training-mode pass over these images together, in float64."""
    images = np.concatenate(parts).astype(np.float64)
    return np.einsum("bhwc,hwck->bk", images - images.mean(0), VARIABLES["params"]["w"])


def test_smoothing_leaves_the_true_class_one_minus_delta():
    """Not (1 − δ)·onehot + δ/C, which leaves it 1 − δ + δ/C."""
    expected = [[0.02, 0.9, 0.02, 0.02, 0.02, 0.02], [0.9, 0.02, 0.02, 0.02, 0.02, 0.02]]
    np.testing.assert_allclose(jax.jit(lambda y: losses.smooth(y, 6, 0.1))(np.int32([1, 0])), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("base", "x", "plain"), [("pgd_at", X_ADV, pgd_at()), ("standard", BATCH["image"], standard())]
)
def test_label_smoothing_is_cross_entropy_to_the_smoothed_labels(base, x, plain):
    log_p = scipy.special.log_softmax(logits_of(x), 1)
    labels = np.asarray(BATCH["label"])
    true, total = log_p[np.arange(12), labels], log_p.sum(1)
    expected = -(0.7 * true + 0.1 * (total - true)).mean()
    np.testing.assert_allclose(loss_and_gradient(label_smoothing(delta=0.3, base=base))[0], expected, rtol=1e-5)
    zero, gradient, _, _ = loss_and_gradient(label_smoothing(delta=0.0, base=base))
    value, expected, _, _ = loss_and_gradient(plain)
    np.testing.assert_allclose(zero, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, expected)


def test_only_adversarial_label_smoothing_takes_an_attack():
    assert label_smoothing(base="standard").attack_losses == () != label_smoothing().attack_losses
    with pytest.raises(InputError, match="unknown"):
        label_smoothing(base="trades")


def test_logit_pairing_is_its_formula_on_one_mixed_minibatch():
    clean, adv = np.split(logits_of(X, X_ADV), 2)

    def cross_entropy(z):
        return (np.log(np.exp(z).sum(1)) - z[np.arange(12), np.asarray(BATCH["label"])]).mean()

    expected = 0.5 * cross_entropy(clean) + 0.5 * cross_entropy(adv) + 0.5 * ((clean - adv) ** 2).sum() / 48
    value, _, variables, _ = loss_and_gradient(alp())
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    expected = after_passes(np.concatenate([X, X_ADV]))
    np.testing.assert_allclose(variables["batch_stats"]["mean"], expected["mean"], rtol=1e-5)
    alone = cross_entropy(adv) + 2.0 * ((clean - adv) ** 2).mean()
    np.testing.assert_allclose(loss_and_gradient(alp(pairing=2.0, clean_weight=0.0))[0], alone, rtol=1e-5)


def test_logit_pairing_of_equal_images_is_standard_training():
    found = loss_and_gradient(alp(pairing=3.0), x_adv=BATCH["image"])
    plain = loss_and_gradient(standard())
    np.testing.assert_allclose(found[0], plain[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found[1], plain[1])


def test_the_reconstructed_rate_is_half_the_features_at_unit_variance():
    """Each standardised feature contributes ½ on average: Σ_b r = B·d/2."""
    features = {"pre_logits": np.float32(np.random.default_rng(0).normal(3, 2, (12, 6)))}
    r = jax.jit(lambda features: rate(features, moments(features)))(features)
    np.testing.assert_allclose(np.mean(r), 6 / 2, rtol=1e-3)


def test_the_reconstruction_weighs_marts_kl_by_the_rate():
    (_, features), after = NET.forward(VARIABLES, BATCH["image"], KEY)
    (clean, _), _ = NET.forward(VARIABLES, BATCH["image"], KEY)
    (adv, features_adv), _ = NET.forward(after, X_ADV, KEY)
    z, z_adv = (np.asarray(f["pre_logits"], np.float64) for f in (features, features_adv))
    r = (((z_adv - z.mean(0)) ** 2) / (z.var(0) + 1e-5)).sum(1) / 2
    w = np.exp(r / np.sqrt(z.shape[1] / 2))
    w *= 12 / w.sum()
    boosted = np.mean(boosted_cross_entropy(adv, BATCH["label"]))
    robust = (np.asarray(losses.kl_logits(clean, adv)) * w).mean()
    np.testing.assert_allclose(loss_and_gradient(infoat_r())[0], boosted + 5 * robust, rtol=1e-4)
    np.testing.assert_allclose(
        loss_and_gradient(infoat_r(beta=0.0))[0], loss_and_gradient(mart(beta=0.0))[0], rtol=1e-6
    )


def test_the_reconstructions_attack_adds_the_rate_to_cross_entropy():
    mean = VARIABLES["batch_stats"]["mean"]
    z, z_adv = (np.float64(x - mean).reshape(12, -1) for x in (X, np.asarray(X_ADV)))
    log_p = scipy.special.log_softmax(z_adv @ VARIABLES["params"]["w"].reshape(-1, 4), 1)
    r = (((z_adv - z.mean(0)) ** 2) / (z.var(0) + 1e-5)).sum(1) / 2

    @functools.partial(jax.jit, static_argnums=0)
    def attack_loss(tau):
        target = infoat_r(tau=tau).target(NET, VARIABLES, BATCH, KEY)
        return infoat_r(tau=tau).attack_loss(NET.predict(VARIABLES, X_ADV), target)

    for tau in (0.0, 0.5):
        expected = -log_p[np.arange(12), BATCH["label"]] + tau * r
        np.testing.assert_allclose(attack_loss(tau), expected, rtol=1e-5)
