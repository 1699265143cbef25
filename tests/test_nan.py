"""Logits that are NaN only under attack: the image counts as not robust, whichever attack finds it, and is named."""

import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from ibjax import losses
from ibjax.analysis import attacked
from ibjax.attacks.apgd import iterative_apgd
from ibjax.attacks.autoattack import autoattack
from ibjax.attacks.cw import cw
from ibjax.attacks.fab import iterative_fab
from ibjax.attacks.mim import mim
from ibjax.attacks.nifgsm import nifgsm
from ibjax.attacks.pgd import pgd
from ibjax.attacks.spsa import spsa
from ibjax.attacks.square import iterative_square
from ibjax.data import Split
from ibjax.devices import cluster
from ibjax.errors import InputError
from ibjax.evaluation import scoring
from ibjax.training import loop

N, EPS = 8, 0.1
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(64, 192, (N, 6, 6, 1), dtype=np.uint8)
IMAGES[:, 0, 0] = 128
X, Y = np.float32(IMAGES) / 255, np.zeros(N, np.int32)  # class 0, which argmax answers to NaN
WEIGHTS = np.float32(RNG.normal(size=(36, 5)))


def certain(x):
    """Class 0 by far, wherever an attack goes."""
    return x.reshape(len(x), -1) @ jnp.asarray(WEIGHTS) + 50 * jax.nn.one_hot(0, 5)[None]


def moved(x):
    return jnp.abs(x[:, 0, 0, :1] - 128 / 255) - 0.02


NETWORKS = {
    "select": lambda x: jnp.where(moved(x) > 0, jnp.nan, certain(x)),  # without any gradient there
    "root": lambda x: certain(x) + 0 * jnp.sqrt(-moved(x)),  # with one that is NaN
    "overflow": lambda x: certain(x) + jnp.where(moved(x) > 0, jnp.inf, 0.0),
}
NETWORKS = {name: jax.jit(network) for name, network in NETWORKS.items()}
PLANS = {
    "apgd-ce": iterative_apgd("ce", "linf", EPS, 5),
    "apgd-t": iterative_apgd("margin_targeted", "linf", EPS, 5),
    "fab": iterative_fab("linf", EPS, 30),
    "fab-t": iterative_fab("linf", EPS, 30, targets=2),
    "square": iterative_square("linf", EPS, 5),
}
ATTACKS = {
    "pgd": lambda eps, step_size: pgd(eps=eps, step_size=step_size, steps=4),
    "pgd, restarts": lambda eps, step_size: pgd(eps=eps, step_size=step_size, steps=2, restarts=3),
    "mim": lambda eps, step_size: mim(eps=eps, step_size=step_size, steps=4),
    "nifgsm": lambda eps, step_size: nifgsm(eps=eps, step_size=step_size, steps=4),
    "spsa": lambda eps, step_size: spsa(eps=eps, steps=3, samples=4, lr=0.05),
    "cw": lambda eps, step_size: cw(steps=10, lr=0.1, c=1e3),
}


def test_a_row_of_nan_or_of_infinite_logits_has_no_class():
    nan, inf = np.nan, np.inf
    logits = np.float32([[2, 1, 0], [nan, nan, nan], [5, nan, 0], [inf, 0, 0], [-inf, -inf, -inf], [1, -inf, 0]])

    @jax.jit
    def found(logits, y):
        return losses.predicted(logits), losses.correct(logits, y), losses.cross_entropy(logits, y)

    predicted, correct, loss = found(logits, np.zeros(6, np.int32))
    np.testing.assert_array_equal(predicted, [0, -1, -1, -1, -1, 0])
    np.testing.assert_array_equal(correct, [1, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(np.isnan(loss), np.asarray(predicted) < 0)


@pytest.mark.parametrize("network", list(NETWORKS))
@pytest.mark.parametrize("part", list(PLANS))
def test_autoattack_breaks_what_becomes_nan_with_each_of_its_parts(network, part):
    plan = {part: PLANS[part]}
    result = autoattack(jax.random.key(0), NETWORKS[network], X, Y, "linf", EPS, attacks=plan, batch_size=8)
    assert not result.robust.any()
    assert np.isfinite(result.x_adv).all()
    assert any(f"NaN or Inf for {N} adversarial images" in text for text in result.warnings)
    assert not any("scored again" in text for text in result.warnings)


def scorer(network, attack, norm="linf", **options):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return scoring.Scorer(lambda v, x, keys: (NETWORKS[network](x), {}), ATTACKS[attack], mesh, 8, norm, **options)


@pytest.mark.parametrize("network", list(NETWORKS))
@pytest.mark.parametrize("attack", list(ATTACKS))
def test_an_image_whose_logits_become_nan_is_not_robust_and_named(network, attack):
    options = dict(norm="l2", bounded=False) if attack == "cw" else {}
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes a float with its integer count
        flags, x_adv = scorer(network, attack, **options)({}, Split(IMAGES, Y), 0, eps=EPS, step_size=EPS, keep=N)
    assert flags.clean.all() and not flags.robust.any() and np.isfinite(x_adv).all()
    assert scoring.nan_warnings(flags) == [
        f"the network returns NaN or infinite logits for {N} images under attack: they count as not robust"
    ]


@pytest.mark.usefixtures("rolled")
def test_validation_counts_them_as_not_robust_and_says_so(caplog):
    settings = SimpleNamespace(seed=0, select_on="val", title="a run")
    data = SimpleNamespace(val=Split(IMAGES, Y))
    experiment = SimpleNamespace(config=settings, data=data, select="robust", mesh=cluster.mesh())
    variables = {"params": {}, "batch_stats": {}}
    state = SimpleNamespace(variables=variables, ema_params=None, ema_stats=None, step=1, opt_state={})
    caplog.set_level(logging.WARNING)
    validator = scorer("root", "pgd"), dict(eps=EPS, step_size=EPS)
    scores = loop._validate(experiment, validator, state)
    assert (scores["clean_acc"], scores["robust_acc"]) == (100, 0)
    assert f"NaN or infinite logits for {N} images" in caplog.text


def test_an_analysis_that_needs_classes_refuses_nan():
    predict = lambda variables, x: (NETWORKS["root"](x), {})  # noqa: E731
    assert (attacked.predictions(predict, {}, X, 4) == 0).all()
    with pytest.raises(InputError, match=f"NaN or infinite logits for {N} of these images"):
        attacked.predictions(predict, {}, X + np.float32(0.1), 4)
