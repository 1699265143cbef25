"""MMA on a linear network, whose margins have a closed form: (z_y − z_k) / ‖w_y − w_k‖₁."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibjax.attacks.pgd import pgd
from ibjax.errors import InputError
from ibjax.net import Net
from ibjax.objectives.mma import bisect, mma, soft_logit_margin

RNG = np.random.default_rng(0)
SHAPE, B, N = (3, 3, 1), 32, 40
W = RNG.normal(size=(9, 2)).astype(np.float32)
X = jnp.asarray(np.float32(0.35 + 0.3 * RNG.random((B, *SHAPE))))  # no perturbation below 0.35 meets the box
LOGITS = np.asarray(X).reshape(B, 9) @ W
LABELS = LOGITS.argmax(1)
LABELS[:4] = 1 - LABELS[:4]  # four wrong ones
MARGINS = np.abs(LOGITS[:, 0] - LOGITS[:, 1]) / np.abs(W[:, 0] - W[:, 1]).sum()
D_MAX = 0.2
BATCH = {"image": X, "label": jnp.asarray(LABELS), "index": jnp.arange(B) + 5}
KEY = jax.random.key(0)


def counting_net():
    """x·W; "batch_stats" counts the passes in training mode and adds up their images' means."""

    def predict(variables, x, edits=None):
        return x.reshape(len(x), -1) @ variables["params"], {}

    def forward(variables, x, key, edits=None):
        passes = variables["batch_stats"] + 1
        return predict(variables, x), {**variables, "batch_stats": passes}

    return Net(predict, forward)


def start(memory=0.0):
    return {"params": jnp.asarray(W), "batch_stats": jnp.int32(0), "memory": jnp.full(N, memory)}


made = functools.cache(mma)


@functools.cache
def program(objective):
    net = counting_net()
    return jax.jit(lambda variables: objective.attack(net, variables, BATCH, KEY))


def attack(objective, memory=0.0):
    return program(objective)(start(memory))


@pytest.mark.parametrize("memory", [0.0, 0.1, 0.21])
def test_the_bisection_finds_the_exact_margin_of_a_linear_network(memory):
    """To 2^-10 · 1.05 · d_max, from whatever margin was stored."""
    mixed, variables = attack(made(max_eps=D_MAX), memory)
    right = LOGITS.argmax(1) == LABELS
    exact = np.minimum(MARGINS[right], 1.05 * D_MAX)
    np.testing.assert_allclose(mixed["eps"][right], exact, atol=2**-10 * 1.05 * D_MAX + 1e-6)
    np.testing.assert_array_equal(variables["memory"][5 : 5 + B], mixed["eps"])
    np.testing.assert_array_equal(variables["memory"][:5], np.full(5, memory, np.float32))


def test_right_images_move_to_the_boundary_and_wrong_ones_stay():
    mixed, _ = attack(mma(max_eps=0.3, search_steps=20))  # far enough for all
    right = LOGITS.argmax(1) == LABELS
    np.testing.assert_array_equal(mixed["correct"], right)
    np.testing.assert_array_equal(mixed["image"][~right], X[~right])
    np.testing.assert_array_equal(mixed["eps"][~right], np.zeros(4))
    margins = soft_logit_margin(mixed["image"].reshape(B, 9) @ W, BATCH["label"])
    np.testing.assert_allclose(margins[right], 0.0, atol=1e-4)


def test_images_beyond_the_largest_margin_do_not_count():
    d_max = float(np.median(MARGINS))
    mixed, _ = attack(made(max_eps=d_max))
    right = LOGITS.argmax(1) == LABELS
    clear = np.abs(MARGINS - d_max) > 2**-9 * d_max
    np.testing.assert_array_equal(mixed["counts"][clear], (~right | (d_max > MARGINS))[clear])
    assert 0 < int(mixed["counts"].sum()) < B


def test_the_loss_is_two_thirds_margin_and_one_third_clean():
    objective = made(max_eps=float(np.median(MARGINS)))
    mixed, variables = attack(objective)
    loss = jax.jit(lambda variables, mixed: objective.loss(counting_net(), variables, BATCH, mixed, KEY))
    value, (after, metrics) = loss(variables, mixed)

    def cross_entropy(x):
        z = np.asarray(x, np.float64).reshape(B, 9) @ W
        return np.log(np.exp(z).sum(1)) - z[np.arange(B), LABELS]

    margin = (cross_entropy(mixed["image"]) * np.asarray(mixed["counts"])).sum() / B
    np.testing.assert_allclose(value, 2 / 3 * margin + 1 / 3 * cross_entropy(X).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["mean_eps"], np.mean(mixed["eps"]), rtol=1e-6)
    # x; the result of PGD and ten bisections; the mixed minibatch
    assert int(variables["batch_stats"]) == 1 + 11 and int(after["batch_stats"]) == 1 + 11 + 1


def test_the_soft_margin_is_stricter_than_being_right():
    z = jnp.log(jnp.float32([[0.4, 0.3, 0.3], [0.6, 0.2, 0.2]]))
    np.testing.assert_allclose(soft_logit_margin(z, jnp.array([0, 0])), np.log([0.6 / 0.4, 0.4 / 0.6]), rtol=1e-5)


def test_bisection_halves_from_the_given_point():
    """Roots inside, below and above the interval; the state is handed through every evaluation."""
    root = jnp.float32([0.3, 0.71, -1.0, 5.0])

    def margin(eps, seen):
        return eps - root, seen + 1

    eps, seen = bisect(margin, jnp.full(4, 0.4), 1.0, 10, 0)
    np.testing.assert_allclose(eps, [0.3, 0.71, 0.0, 1.0], atol=2**-10)
    assert seen == 11


def test_pgd_takes_a_radius_for_each_image():
    eps = jnp.linspace(0.01, 0.2, B)
    ascend = pgd(loss=soft_logit_margin, eps=eps, step_size=0.25 * eps, steps=10, unroll=False)
    x_adv = jax.jit(lambda x: ascend(KEY, lambda x: x.reshape(B, 9) @ W, x, BATCH["label"]))(X)
    np.testing.assert_allclose(jnp.abs(x_adv - X).max((1, 2, 3)), eps, rtol=1e-4)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(max_eps="12"), r"max_eps=12 is outside \[0, 1\)"),
        (dict(min_eps=0), "min_eps=0 and max_eps=12/255 are not allowed"),
        (dict(min_eps=0.1, max_eps=0.05), r"min_eps=0\.1 and max_eps=0\.05 are not allowed"),
        (dict(steps=0), "steps=0 is not allowed"),
    ],
)
def test_impossible_values_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        mma(**options)
