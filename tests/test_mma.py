"""MMA on a linear network, whose margins have a closed form: (z_y − z_k) / ‖w_y − w_k‖₁."""

import jax
import numpy as np
import pytest

from ibjax.attacks.pgd import pgd
from ibjax.errors import InputError
from ibjax.net import Net
from ibjax.objectives.mma import bisect, mma, soft_logit_margin

pytestmark = pytest.mark.usefixtures("rolled")
RNG = np.random.default_rng(0)
SHAPE, B, N = (3, 3, 1), 32, 40
W = RNG.normal(size=(9, 2)).astype(np.float32)
X = np.float32(0.35 + 0.3 * RNG.random((B, *SHAPE)))  # no perturbation below 0.35 meets the box
LOGITS = X.reshape(B, 9) @ W
LABELS = LOGITS.argmax(1)
LABELS[:4] = 1 - LABELS[:4]  # four wrong ones
MARGINS = np.abs(LOGITS[:, 0] - LOGITS[:, 1]) / np.abs(W[:, 0] - W[:, 1]).sum()
D_MAX = float(np.median(MARGINS))  # of which half of the images lie beyond
BATCH = {"image": X, "label": np.int32(LABELS), "index": np.arange(5, 5 + B, dtype=np.int32)}
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
    return {"params": W, "batch_stats": np.int32(0), "memory": np.full(N, memory, np.float32)}


def program(objective):
    net = counting_net()
    return jax.jit(lambda variables: objective.attack(net, variables, BATCH, KEY))


STEPS = 2  # of PGD: on a linear network, two of 1.25·ε reach the corner of the ball from everywhere
OBJECTIVE = mma(max_eps=D_MAX, steps=STEPS)
attack = program(OBJECTIVE)


@pytest.mark.parametrize("memory", [0.0, 0.1, 0.21])
def test_the_bisection_finds_the_exact_margin_of_a_linear_network(memory):
    """To 2^-10 · 1.05 · d_max, from whatever margin was stored."""
    mixed, variables = attack(start(memory))
    right = LOGITS.argmax(1) == LABELS
    exact = np.minimum(MARGINS[right], 1.05 * D_MAX)
    np.testing.assert_allclose(mixed["eps"][right], exact, atol=2**-10 * 1.05 * D_MAX + 1e-6)
    np.testing.assert_array_equal(variables["memory"][5 : 5 + B], mixed["eps"])
    np.testing.assert_array_equal(variables["memory"][:5], np.full(5, memory, np.float32))


def test_right_images_move_to_the_boundary_and_wrong_ones_stay():
    mixed, _ = program(mma(max_eps=0.3, steps=STEPS, search_steps=16))(start())  # far enough for all
    right = LOGITS.argmax(1) == LABELS
    np.testing.assert_array_equal(mixed["correct"], right)
    np.testing.assert_array_equal(mixed["image"][~right], X[~right])
    np.testing.assert_array_equal(mixed["eps"][~right], np.zeros(4))
    logits = np.asarray(mixed["image"]).reshape(B, 9) @ W  # of two classes: the soft margin is their difference
    np.testing.assert_allclose((logits[:, 0] - logits[:, 1])[right], 0.0, atol=1e-4)


def test_images_beyond_the_largest_margin_do_not_count():
    mixed, _ = attack(start())
    right = LOGITS.argmax(1) == LABELS
    clear = np.abs(MARGINS - D_MAX) > 2**-9 * D_MAX
    np.testing.assert_array_equal(mixed["counts"][clear], (~right | (D_MAX > MARGINS))[clear])
    assert 0 < int(mixed["counts"].sum()) < B


def test_the_loss_is_two_thirds_margin_and_one_third_clean():
    mixed, variables = attack(start())
    loss = jax.jit(lambda variables, mixed: OBJECTIVE.loss(counting_net(), variables, BATCH, mixed, KEY))
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
    z = np.log(np.float32([[0.4, 0.3, 0.3], [0.6, 0.2, 0.2]]))
    margins = jax.jit(soft_logit_margin)(z, np.zeros(2, np.int32))
    np.testing.assert_allclose(margins, np.log([0.6 / 0.4, 0.4 / 0.6]), rtol=1e-5)


def test_bisection_halves_from_the_given_point():
    """Roots inside, below and above the interval; the state is handed through every evaluation."""
    root = np.float32([0.3, 0.71, -1.0, 5.0])

    def margin(eps, seen):
        return eps - root, seen + 1

    eps, seen = jax.jit(lambda eps: bisect(margin, eps, 1.0, 10, 0))(np.full(4, 0.4, np.float32))
    np.testing.assert_allclose(eps, [0.3, 0.71, 0.0, 1.0], atol=2**-10)
    assert seen == 11


def test_pgd_takes_a_radius_for_each_image():
    eps = np.linspace(0.01, 0.2, B, dtype=np.float32)
    ascend = pgd(loss=soft_logit_margin, eps=eps, step_size=0.25 * eps, steps=10, unroll=False)
    x_adv = jax.jit(lambda x: ascend(KEY, lambda x: x.reshape(B, 9) @ W, x, BATCH["label"]))(X)
    np.testing.assert_allclose(np.abs(x_adv - X).max((1, 2, 3)), eps, rtol=1e-4)


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
