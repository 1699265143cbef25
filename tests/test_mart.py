"""MART against PyTorch in float64, and its closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibjax.net import Net
from ibjax.objectives.mart import boosted_cross_entropy, floored_kl, mart

LABELS = np.arange(6) % 4


def memo_net():
    """A network whose logits are its parameters: "clean" for images of ones, "adv" for others."""

    def predict(variables, x, edits=None):
        params = variables["params"]
        return jnp.where(x.mean() == 1.0, params["clean"], params["adv"]), {}

    return Net(predict, lambda variables, x, key, edits=None: (predict(variables, x), variables))


def value_of(objective, clean, adv):
    batch = {"image": np.ones((6, 2, 2, 1), np.float32), "label": np.int32(LABELS)}
    variables = {"params": {"clean": clean, "adv": adv}}
    return objective.loss(memo_net(), variables, batch, 0 * batch["image"], jax.random.key(0))[0]


def loss_of(objective):
    """(clean logits, adversarial logits) -> loss, gradients."""
    return jax.jit(jax.value_and_grad(functools.partial(value_of, objective), (0, 1)))


DEFAULT, UNWEIGHTED = loss_of(mart()), loss_of(mart(beta=0.0))


def logits(seed, scale=3.0):
    return scale * np.random.default_rng(seed).normal(size=(6, 4))


@pytest.mark.parametrize("beta", [0.0, 5.0])
def test_value_and_gradients_are_pytorchs_in_float64(beta):
    torch = pytest.importorskip("torch", reason="the oracle is PyTorch")
    clean, adv = (torch.tensor(logits(seed), requires_grad=True) for seed in (0, 1))
    y = torch.tensor(LABELS)
    p, q = torch.softmax(clean, 1), torch.softmax(adv, 1)
    others = torch.stack([torch.cat([row[:k], row[k + 1 :]]).max() for row, k in zip(q, LABELS, strict=True)])
    boosted = torch.nn.functional.cross_entropy(adv, y) - torch.log(1.0001 - others + 1e-12).mean()
    divergence = torch.nn.functional.kl_div(torch.log(q + 1e-12), p, reduction="none").sum(1)
    weight = 1.0000001 - p[torch.arange(6), y]
    expected = boosted + beta * (divergence * weight).sum() / 6
    expected.backward()

    value, gradients = loss_of(mart(beta=beta))(np.float32(logits(0)), np.float32(logits(1)))
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    for got, reference in zip(gradients, (clean.grad, adv.grad), strict=True):
        reference = np.zeros((6, 4)) if reference is None else reference.numpy()
        np.testing.assert_allclose(got, reference, rtol=1e-3, atol=2e-6)


def test_without_the_robust_term_it_is_boosted_cross_entropy():
    q = np.exp(logits(1)) / np.exp(logits(1)).sum(1, keepdims=True)
    rows = np.arange(6)
    others = q.copy()
    others[rows, LABELS] = 0
    expected = np.mean(-np.log(q[rows, LABELS]) - np.log(1.0001 - others.max(1)))
    found, _ = UNWEIGHTED(np.float32(logits(0)), np.float32(logits(1)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_certain_and_right_clean_prediction_weighs_1e_minus_7():
    """Operation by operation: a compiler rounds 1 + 1e-7 first, to 1 + 1.2e-7, as the authors' 1.0000001 is rounded."""
    sure, flat = jax.device_put((np.float32(200 * np.eye(4)[LABELS]), np.zeros((6, 4), np.float32)))
    with_it, without = (value_of(mart(beta=beta), sure, flat) for beta in (1e7, 0.0))
    np.testing.assert_allclose(with_it - without, np.log(4), rtol=1e-4)  # 1e7·1e-7·KL(one-hot || uniform)


@pytest.mark.parametrize("right", [True, False])
def test_a_one_hot_adversarial_prediction_has_finite_loss_and_gradient(right):
    one_hot = np.float32(300.0 * np.eye(4)[LABELS if right else (LABELS + 1) % 4])
    per_example = jax.jit(boosted_cross_entropy)(one_hot, np.int32(LABELS))
    # right: −log 1 − log 1.0001; wrong: 300 − log 1e-4
    np.testing.assert_allclose(per_example, -np.log(1.0001) if right else 300 - np.log(1e-4), rtol=2e-3, atol=1e-6)
    value, gradients = DEFAULT(np.float32(logits(0)), one_hot)
    assert np.isfinite(value) and all(np.isfinite(gradient).all() for gradient in gradients)


def test_the_kl_has_its_floor():
    """At q = one-hot the divergence is −H(p) − Σ_{c≠y} p_c log 1e-12, not infinite."""
    p = np.float64([0.5, 0.25, 0.125, 0.125])
    found = jax.jit(floored_kl)(np.float32(np.log(p))[None], np.float32([[300, 0, 0, 0]]))[0]
    np.testing.assert_allclose(found, (p * np.log(p)).sum() - 0.5 * np.log(1e-12), rtol=1e-5)


def test_gradients_flow_through_the_clean_prediction():
    weighted, unweighted = (loss(np.float32(logits(0)), np.float32(logits(1)))[1][0] for loss in (DEFAULT, UNWEIGHTED))
    assert np.abs(weighted).max() > 1e-3 and np.abs(unweighted).max() == 0
