"""HAT against its formula in float64."""

import jax
import numpy as np
import pytest
import scipy.special
from test_objectives import BATCH, NET, VARIABLES, X_ADV, loss_and_gradient, losses_and_gradients

from ibjax.errors import InputError
from ibjax.objectives.hat import hat
from ibjax.objectives.trades import trades

KEY = jax.random.key(0)


@pytest.mark.parametrize("base", ["trades", "pgd_at"])
def test_it_is_its_formula(base):
    """The helper goes h times as far as x', with the class that the teacher sees in x'."""
    variables, p = VARIABLES, []
    x, x_adv = np.asarray(BATCH["image"]), np.asarray(X_ADV)
    for seen in (x, x_adv, x + np.float32(3) * (x_adv - x)):
        (logits, _), variables = NET.forward(variables, seen, KEY)
        p.append(scipy.special.softmax(np.float64(logits), axis=-1))
    rows, y = np.arange(12), np.asarray(BATCH["label"])
    helper = np.asarray(NET.teacher(X_ADV)[0]).argmax(1)
    robust = (p[0] * np.log(p[0] / p[1])).sum(1) if base == "trades" else -np.log(p[1][rows, y])
    expected = -np.log(p[0][rows, y]) + 2 * robust - 0.7 * np.log(p[2][rows, helper])
    value, _, after, _ = loss_and_gradient(hat(base=base, beta=2.0, gamma=0.7, h=3.0))
    np.testing.assert_allclose(value, expected.mean(), rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), after["batch_stats"], variables["batch_stats"]
    )
    assert not np.array_equal(helper, y)


def test_without_helpers_it_is_trades():
    (value, gradient, *_), (other, expected, *_) = losses_and_gradients(hat(beta=6.0, gamma=0.0), trades())
    np.testing.assert_allclose(value, other, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, expected)


def test_wrong_options_are_refused():
    with pytest.raises(InputError, match=r"objective.base='mart' is unknown"):
        hat(base="mart")
    with pytest.raises(InputError, match=r"objective.gamma=-1 is not allowed"):
        hat(gamma=-1.0)
    assert hat().teachers == ("teacher",) and hat(base="pgd_at").attack_losses == ("ce", "margin")
