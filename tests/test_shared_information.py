"""Shared information against closed forms and float64."""

import functools

import jax
import numpy as np
import pytest
import scipy.special
from conftest import in_programs, smoke_config
from test_models import random_variables
from test_variational import gaussian_net

from ibjax.errors import InputError
from ibjax.information import hsic
from ibjax.models import cnn, stochastic
from ibjax.net import linen_net
from ibjax.objectives.pgd_at import pgd_at
from ibjax.objectives.shared_information import beta_at, measure, shared_information
from ibjax.optim import sgd
from ibjax.step import Problem, init_state, make_train_step, trainable
from ibjax.training.experiment import _optimizer

CNN = dict(name="cnn", widths=((6,),), hidden=(), padding=1, batch_norm=True, pool="average")
MODEL = stochastic.Model(4, backbone=CNN, latent=5)
RNG = np.random.default_rng(0)
BATCH = {
    "image": np.float32(RNG.random((12, 8, 8, 1))),
    "label": np.int32(np.arange(12) % 4),
    "index": np.arange(12, dtype=np.int32),
    "epoch": np.float32(200),
    "step": np.int32(0),
}
X_ADV = np.float32(np.clip(BATCH["image"] + 0.1 * RNG.normal(size=(12, 8, 8, 1)), 0, 1))
NET = in_programs(linen_net(MODEL))
KEY = jax.random.key(3)


@functools.cache
def initial():
    """Variables of the network."""
    return random_variables(MODEL, BATCH["image"].shape)


def passes(key=KEY):
    """(output on x', output on x), in the order and with the keys of the batch-norm policy."""
    key_adv, key_clean, _ = jax.random.split(key, 3)
    adv, variables = NET.forward(initial(), X_ADV, key_adv)
    clean, variables = NET.forward(variables, BATCH["image"], key_clean)
    return adv, clean, variables


def cross_entropy(logits):
    """The mean over the batch, in float64."""
    return -scipy.special.log_softmax(np.float64(logits), axis=-1)[np.arange(12), BATCH["label"]].mean()


def values(*options):
    """(loss, (variables after it, metrics)) with each of these options, all as one program."""
    objectives = [shared_information(**each) for each in options]
    found = jax.jit(lambda variables: [each.loss(NET, variables, BATCH, X_ADV, KEY) for each in objectives])
    return found(initial())


@functools.cache
def with_and_without_the_other_terms():
    return values(dict(alpha=0.3, beta=4.0, lam=2.0), dict(alpha=1.0, beta=0.0, lam=0.0))


def test_beta_is_small_then_rises_exponentially_to_its_value():
    at, off = jax.jit(lambda epoch: [beta_at(epoch, beta, 1e-3, 10, 90) for beta in (4.0, 0.0)])(
        np.float32([0, 9.9, 10, 55, 100, 150])
    )
    np.testing.assert_allclose(at, [1e-3, 1e-3, 1e-3, np.sqrt(4.0 * 1e-3), 4.0, 4.0], rtol=1e-5)
    assert off == 0


@functools.cache
def losses_within_an_epoch():
    """{stepping: the losses near its begin and near its end}, all by one program."""
    makes = {each: shared_information(warmup=0.5, ramp=10.0, lam=0.0, stepping=each) for each in ("epoch", "step")}

    @jax.jit
    def losses(epoch):
        given = NET, initial(), {**BATCH, "epoch": epoch}, X_ADV, KEY
        return {stepping: objective.loss(*given)[0] for stepping, objective in makes.items()}

    return jax.tree.map(lambda *pair: pair, *(losses(np.float32(epoch)) for epoch in (9.1, 9.9)))


@pytest.mark.parametrize("stepping, same", [("epoch", True), ("step", False)])
def test_beta_moves_by_epoch_or_by_step(stepping, same):
    early, late = losses_within_an_epoch()[stepping]
    assert (early == late) == same and early <= late


def test_the_loss_is_its_formula():
    """α CE(x') + (1−α) CE(x) + β D_SKL − λ HSIC, each in NumPy and float64 from the outputs of the two passes."""
    adv, clean, after = passes()
    gaussians = [(np.asarray(f["mu"], np.float64), np.asarray(f["sigma"], np.float64)) for _, f in (clean, adv)]
    (m, s), (n, t) = gaussians
    one_way = [
        (np.log(b / a) + (a**2 + (p - q) ** 2) / (2 * b**2) - 0.5).sum(1) for p, a, q, b in ((m, s, n, t), (n, t, m, s))
    ]
    skl = 0.5 * (one_way[0] + one_way[1]).mean()
    shared = independent_hsic(*(np.asarray(f["z"], np.float64) for _, f in (clean, adv)))
    expected = 0.3 * cross_entropy(adv[0]) + 0.7 * cross_entropy(clean[0]) + 4.0 * skl - 2.0 * shared
    got, (got_after, metrics) = with_and_without_the_other_terms()[0]
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    np.testing.assert_allclose([metrics["skl"], metrics["shared"]], [skl, shared], rtol=1e-4)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, got_after["batch_stats"], after["batch_stats"])


def independent_hsic(z, w, k=10):
    """The biased estimator by explicit traces, widths from explicit neighbours."""

    def gram(v):
        distances = np.linalg.norm(v[:, None] - v[None], axis=-1)
        width = np.mean([np.sort(np.delete(row, i))[:k].mean() for i, row in enumerate(distances)])
        return np.exp(-(distances**2) / (2 * width**2))

    n = len(z)
    centre = np.eye(n) - np.ones((n, n)) / n
    return np.trace(gram(z) @ centre @ gram(w) @ centre) / (n - 1) ** 2


def test_only_the_cross_entropy_of_x_adv_is_left_without_the_other_terms():
    adv, _, _ = passes()
    got, _ = with_and_without_the_other_terms()[1]
    np.testing.assert_allclose(got, cross_entropy(adv[0]), rtol=1e-6)


@pytest.mark.parametrize("information", ["trace", "nhsic", "mine", "mige"])
def test_every_measure_has_a_finite_gradient_and_more_of_it_is_rewarded(information):
    rewarded, plain = (shared_information(information=information, lam=lam) for lam in (1.0, 0.0))
    net, start = gaussian_net(unit=False)  # of one layer: a convolution would show nothing more

    def loss(params):
        variables = {**start, "params": params}
        if rewarded.head is not None:
            features = net.predict(start, BATCH["image"])[1]
            variables |= {"head": rewarded.head.init(KEY, features, None, train=False)}
        total, (_, metrics) = rewarded.loss(net, variables, BATCH, X_ADV, KEY)
        return total, (metrics["shared"], plain.loss(net, variables, BATCH, X_ADV, KEY)[0])

    (with_it, (shared, without)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(start["params"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    np.testing.assert_allclose(without - with_it, shared, rtol=1e-3, atol=1e-5)


def test_equal_views_share_more_than_unrelated_ones():
    rng = np.random.default_rng(0)
    z, w = rng.normal(size=(2, 40, 5)).astype(np.float32)
    kinds = ("hsic", "trace", "nhsic")
    measures = jax.jit(lambda z, w: [measure(z, w, information, 10) for information in kinds])
    equal, unrelated = measures(z, z), measures(z, w)
    assert all(a > 1.5 * b for a, b in zip(equal, unrelated, strict=True))
    np.testing.assert_allclose(unrelated[1] / unrelated[0], 39**2, rtol=1e-5)


def test_widths_come_from_the_data_and_carry_no_gradient():
    z = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    hsic_of = jax.jit(lambda z: measure(z, z, "hsic", 5))
    np.testing.assert_allclose(hsic_of(10 * z), hsic_of(z), rtol=1e-4)
    assert not np.any(jax.jit(jax.grad(lambda v: hsic.knn_width(v, 5)))(z))


def test_the_mine_head_is_trained_with_the_network():
    objective = shared_information(information="mine", lam=1.0)
    optimizer = sgd(lr=lambda step: 0.1)
    state = jax.jit(lambda x: init_state(KEY, NET, MODEL, objective.head, optimizer, x, False))(BATCH["image"])
    step = make_train_step(Problem(lambda _: NET, objective, lambda *_: X_ADV), optimizer)
    after, _ = jax.jit(step)(state, {k: BATCH[k] for k in ("image", "label", "index")}, KEY)
    for part in ("params", "head"):
        moved = jax.tree.map(
            lambda a, b: np.abs(a - b).max(),
            trainable(after.variables)[part],
            trainable(state.variables)[part],
        )
        assert max(jax.tree.leaves(moved)) > 0
    assert float(after.variables["head"]["batch_stats"]["count"]) == 1


def test_mines_network_follows_the_options():
    head = shared_information(information="mine", mine_widths=(7, 5), mine_projection=256).head
    features = NET.predict(initial(), BATCH["image"])[1]
    params = jax.eval_shape(lambda: head.init(KEY, features, None, train=False))["params"]
    shapes = {name: layer["dense"]["kernel"].shape for name, layer in params.items()}
    pair = 2 * features["z"].shape[1]
    assert shapes == {"projection": (pair, 256), "dense1": (256, 7), "dense2": (7, 5), "out": (5, 1)}
    assert shared_information(information="mine").head.widths == (512, 512)


def test_at_the_prediction_no_stochastic_layer_is_needed():
    values(dict(location="prediction", lam=0.1))
    model = cnn.Model(4, **{key: option for key, option in CNN.items() if key != "name"})
    plain, variables = linen_net(model), {"batch_stats": {}, **jax.jit(model.init)(KEY, BATCH["image"])}
    objective = shared_information(location="prediction", lam=0.1)
    assert np.isfinite(jax.jit(lambda variables: objective.loss(plain, variables, BATCH, X_ADV, KEY)[0])(variables))
    with pytest.raises(InputError, match="needs a stochastic layer"):
        jax.eval_shape(lambda: shared_information().loss(plain, variables, BATCH, X_ADV, KEY))


def test_without_a_stochastic_layer_in_evaluation_the_attack_sees_the_mean():
    """The network that PGD attacks is deterministic: two calls agree to the bit."""
    first, second = (NET.predict(initial(), X_ADV)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(
        pgd_at().target(NET, initial(), BATCH, KEY), shared_information().target(NET, initial(), BATCH, KEY)
    )


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(information="mi"), "information='mi' is unknown"),
        (dict(location="z"), "location='z' is unknown"),
        (dict(alpha=2.0), "alpha=2 is not allowed"),
        (dict(neighbours=0), "neighbours=0 is not allowed"),
        (dict(information="mine", location="prediction"), "goes with location='latent'"),
        (dict(information="mine", mine_widths=(512, 0)), "mine_widths and mine_projection=0 is not allowed"),
        (dict(information="mine", mine_projection=0), "mine_widths and mine_projection=0 is not allowed"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        shared_information(**options)


def test_the_statistics_network_of_mine_has_adam_of_its_own():
    """λ, which scales its gradient, leaves its steps alone: the first is 1e-4 in each coordinate."""
    settings = smoke_config("shared_information", "mine")
    optimizer, _ = _optimizer(settings, 10)
    ones = np.ones(3, np.float32)
    params = {"params": {"w": ones}, "head": {"w": ones}}
    gradient = {"params": {"w": ones}, "head": {"w": np.float32([0.01, -0.5, 3.0])}}
    update, _ = jax.jit(lambda gradient: optimizer.update(gradient, optimizer.init(params), params))(gradient)
    np.testing.assert_allclose(update["head"]["w"], [-1e-4, 1e-4, -1e-4], rtol=1e-4)
    np.testing.assert_allclose(update["params"]["w"], -0.1 * (1 + 5e-4), rtol=1e-5)
