"""IB-RAR and HBaR against their formulas in float64, the channel mask and the adaptive attack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ibjax.errors import InputError
from ibjax.information import hsic
from ibjax.net import Net
from ibjax.objectives.hbar import hbar
from ibjax.objectives.ib_rar import (
    adaptive_attack,
    batch_mask,
    channel_information,
    dependence,
    ib_rar,
    layers_of,
    masked,
    permanent_mask,
)
from ibjax.objectives.pgd_at import pgd_at
from ibjax.step import Objective, Problem, TrainState, make_train_step, trainable

B, CLASSES, WIDTHS = 16, 3, (12, 9)
RNG = np.random.default_rng(0)
X = RNG.random((B, 4, 4, 1)).astype(np.float32)
X_ADV = np.clip(X + RNG.uniform(-0.2, 0.2, X.shape), 0, 1).astype(np.float32)
Y = np.arange(B) % CLASSES
BATCH = {
    "image": jnp.asarray(X),
    "label": jnp.asarray(Y, jnp.int32),
    "epoch_step": jnp.int32(20),
    "epoch": jnp.float32(1.5),
}
VARIABLES = {
    "params": {
        "fc1": jnp.asarray(RNG.normal(size=(16, WIDTHS[0])), jnp.float32),
        "fc2": jnp.asarray(RNG.normal(size=WIDTHS), jnp.float32),
        "out": jnp.asarray(RNG.normal(size=(WIDTHS[1], CLASSES)), jnp.float32),
    },
    "batch_stats": {"passes": jnp.float32(0)},
}


def taps(params, x, edits=None):
    """Three matrices with tanh between, whose taps are `stage1` and `fc1`."""
    edits = edits or {}
    first = jnp.tanh(x.reshape(len(x), -1) @ params["fc1"])
    first = edits.get("stage1", lambda z: z)(first)
    second = edits.get("fc1", lambda z: z)(jnp.tanh(first @ params["fc2"]))
    return second @ params["out"], {"stage1": first, "fc1": second}


def predict(variables, x, edits=None):
    return taps(variables["params"], x, edits)


def forward(variables, x, key, edits=None):
    """Its statistic is the order of passes: 10·before + (1 for clean images, 2 for others)."""
    kind = jnp.where(jnp.all(x == BATCH["image"]), 1.0, 2.0)
    passes = 10 * variables["batch_stats"]["passes"] + kind
    return taps(variables["params"], x, edits), {**variables, "batch_stats": {"passes": passes}}


NET = Net(predict, forward)


def evaluate(objective, batch=BATCH):
    def loss(params):
        return objective.loss(NET, {**VARIABLES, "params": params}, batch, jnp.asarray(X_ADV), jax.random.key(0))

    # as one program, or JAX compiles one for every operation and shape
    (value, (after, metrics)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(VARIABLES["params"])
    return float(value), gradient, float(after["batch_stats"]["passes"]), metrics


def value_of(objective):
    """(loss, order of passes, metrics), without the gradient."""
    loss = jax.jit(lambda: objective.loss(NET, VARIABLES, BATCH, X_ADV, jax.random.key(0)))
    value, (after, metrics) = loss()
    return float(value), float(after["batch_stats"]["passes"]), metrics


@functools.cache
def losses_by_step():
    """{step of the epoch: {mask: loss}} without a mask, with that of the authors' code and with the paper's.

    Of the base, which sees the mask too: without terms of its own there are fewer factorisations to compile.
    """
    make = functools.partial(ib_rar, alpha=0.0, beta=0.0)
    objectives = {
        "none": make(),
        "code": make(mask_tap="stage1", mask_channels=2),
        "paper": make(mask_tap="stage1", mask_rule="paper", mask_every=1),
    }

    @jax.jit  # one program for all steps and masks
    def losses(step):
        given = NET, VARIABLES, {**BATCH, "epoch_step": step}, X_ADV, jax.random.key(0)
        return {name: objective.loss(*given)[0] for name, objective in objectives.items()}

    return {step: jax.device_get(losses(np.int32(step))) for step in (0, 5, 10, 20)}


# ---- the oracle, in float64 ----------------------------------------------------------------------------------


def features(x, **edits):
    parts = {name: np.asarray(w, np.float64) for name, w in VARIABLES["params"].items()}
    first = np.tanh(x.reshape(B, -1).astype(np.float64) @ parts["fc1"])
    second = np.tanh(first @ parts["fc2"])
    logits = second @ parts["out"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True), [first, second]


def operator(u, kernel="gaussian"):
    u = np.asarray(u, np.float64).reshape(B, -1)
    squared = ((u[:, None] - u[None]) ** 2).sum(-1)
    k = u @ u.T if kernel == "linear" else np.exp(-squared / (2 * 25 * u.shape[1]))
    h = np.eye(B) - 1 / B
    k = h @ k @ h
    return k @ np.linalg.inv(k + 1e-5 * B * np.eye(B))


def information(layers, x=X, kernel="linear"):
    """(Σ nHSIC(X, T), Σ nHSIC(Y, T))."""
    r_x, r_y = operator(x), operator(np.eye(CLASSES)[Y], kernel)
    return np.array([sum(np.trace(r @ operator(t)) for t in layers) for r in (r_x, r_y)])


(P, CLEAN), (Q, ADV) = features(X), features(X_ADV)
ROWS = np.arange(B)
CE, CE_ADV = -np.log(P[ROWS, Y]).mean(), -np.log(Q[ROWS, Y]).mean()
KL = (P * np.log(P / Q)).sum(1)
OTHER = np.where(np.eye(CLASSES)[Y] > 0, 0, Q).max(1)
BCE = (-np.log(Q[ROWS, Y]) - np.log(1.0001 - OTHER)).mean()
WEIGHTED = ((1 - P[ROWS, Y]) * KL).mean()
# (base, form) -> (L_base, the layers that count, passes)
BASES = {
    ("standard", "code"): (CE, CLEAN, 1),
    ("pgd_at", "code"): (CE_ADV, ADV, 2),
    ("trades", "code"): (CE_ADV + 0.5 * KL.mean(), CLEAN + ADV, 12),
    ("trades", "original"): (CE + 6 * KL.mean(), CLEAN + ADV, 12),
    ("mart", "code"): (BCE + 0.5 * WEIGHTED, CLEAN + ADV, 12),
    ("mart", "original"): (BCE + 5 * WEIGHTED, CLEAN + ADV, 12),
}


@pytest.mark.parametrize(("base", "form"), BASES, ids=["-".join(key) for key in BASES])
def test_ib_rar_is_its_formula_on_every_base(base, form):
    """Both forms of every base, and the order of the passes."""
    expected, layers, passes = BASES[base, form]
    with_x, with_y = information(layers)
    value, gradient, order, metrics = evaluate(ib_rar(base=base, form=form, alpha=0.02, beta=0.3))
    np.testing.assert_allclose(value, expected + 0.02 * with_x - 0.3 * with_y, rtol=2e-5)
    np.testing.assert_allclose([metrics["nhsic_x"], metrics["nhsic_y"]], [with_x, with_y], rtol=2e-5)
    assert order == passes
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


HBAR = {
    "standard": (CE, 1),
    "pgd_at": (CE_ADV, 21),
    "trades": (CE + 6 * KL.mean(), 12),
    "mart": (BCE + 5 * WEIGHTED, 12),
}


@pytest.mark.parametrize("base", HBAR)
def test_hbar_is_its_formula_with_the_clean_features(base):
    expected, passes = HBAR[base]
    with_x, with_y = information(CLEAN)
    value, order, _ = value_of(hbar(base=base, base_weight=0.7, lambda_x=0.02, lambda_y=0.3))
    np.testing.assert_allclose(value, 0.7 * expected + 0.02 * with_x - 0.3 * with_y, rtol=2e-5)
    assert order == passes


@pytest.mark.parametrize("base", ["pgd_at", "trades", "mart"])
def test_hbar_on_adversarial_features_is_its_formula(base):
    """X = x' and its features in both terms, and the same passes."""
    expected, passes = HBAR[base]
    with_x, with_y = information(ADV, X_ADV)
    value, order, _ = value_of(hbar(base=base, lambda_x=0.02, lambda_y=0.3, hsic_adv=True))
    np.testing.assert_allclose(value, expected + 0.02 * with_x - 0.3 * with_y, rtol=2e-5)
    assert order == passes
    with pytest.raises(InputError, match="needs adversarial images"):
        hbar(base="standard", hsic_adv=True)


def test_the_options_of_the_terms_are_what_they_say():
    def terms(**options):
        metrics = value_of(ib_rar(**options))[2]
        return [float(metrics["nhsic_x"]), float(metrics["nhsic_y"])]

    np.testing.assert_allclose(terms(x_input="adv"), information(ADV, X_ADV), rtol=2e-5)
    np.testing.assert_allclose(terms(y_kernel="gaussian"), information(ADV, kernel="gaussian"), rtol=2e-5)
    np.testing.assert_allclose(terms(layers="fc1"), information(ADV[1:]), rtol=2e-5)
    assert max(terms(estimator="hsic")) < 0.05  # another measure, not another scale
    np.testing.assert_allclose(terms(until_epoch=2.0), terms(), rtol=1e-5)
    assert terms(until_epoch=1.0) == [0.0, 0.0]
    value, gradient, _, _ = evaluate(ib_rar(until_epoch=1.0))
    plain, plain_gradient, _, _ = evaluate(pgd_at())
    np.testing.assert_allclose(value, plain, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), gradient, plain_gradient)


def test_terms_without_weight_are_not_computed(monkeypatch):
    """The base's loss and gradient, none of the measures' metrics, and no factorisation."""
    monkeypatch.setattr(hsic, "correlation_operator", lambda *_: pytest.fail("a term of weight 0 is computed"))
    value, gradient, _, metrics = evaluate(ib_rar(alpha=0.0, beta=0.0))
    plain, plain_gradient, _, _ = evaluate(pgd_at())
    np.testing.assert_allclose(value, plain, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), gradient, plain_gradient)
    assert not {"nhsic_x", "nhsic_y"} & set(metrics)


def test_hsic_of_the_layers_is_the_trace():
    with jax.enable_x64(True):
        layers = [jnp.asarray(z) for z in CLEAN]
        x, h = np.asarray(X, np.float64), np.eye(B) - 1 / B

        def gram(u):
            u = u.reshape(B, -1)
            return np.exp(-((u[:, None] - u[None]) ** 2).sum(-1) / (50 * u.shape[1]))

        expected = sum(np.trace(gram(x) @ h @ gram(z) @ h) for z in CLEAN) / (B - 1) ** 2
    layers = [jnp.asarray(z, jnp.float32) for z in CLEAN]
    got = jax.jit(lambda x, y, layers: dependence(x, y, CLASSES, layers, estimator="hsic")[0])(
        BATCH["image"], BATCH["label"], layers
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_the_gradient_lowers_what_it_should_lower():
    """One small step along −gradient of the terms alone: less of X and more of Y in the layers."""
    for alpha, beta, index, sign in ((1.0, 0.0, "nhsic_x", -1), (0.0, 1.0, "nhsic_y", 1)):
        objective = ib_rar(base="standard", alpha=alpha, beta=beta)

        def change(step, objective=objective, index=index):
            gradient = evaluate(objective)[1]
            params = jax.tree.map(lambda w, g: w - step * g, VARIABLES["params"], gradient)
            variables = {**VARIABLES, "params": params}
            return float(objective.loss(NET, variables, BATCH, None, jax.random.key(0))[1][1][index])

        assert sign * (change(0.01) - change(0.0)) > 1e-4


# ---- layers --------------------------------------------------------------------------------------------------


def test_the_papers_layers_are_chosen_by_name():
    def names(features, layers="all"):
        features = {name: name for name in features}
        return layers_of(features, layers)

    resnet = ["stem", *(f"block{i}" for i in range(1, 13)), "block1_relu", "stage1", "pre_logits"]
    assert names(resnet) == ["stem", *(f"block{i}" for i in range(1, 13)), "pre_logits"]
    vgg = ["conv1", "conv2", *(f"stage{i}" for i in range(1, 6)), "fc1", "fc2", "pre_logits"]
    assert names(vgg) == [*(f"stage{i}" for i in range(1, 6)), "fc1", "fc2"]
    assert names(vgg, "robust") == ["stage5", "fc1", "fc2"]
    assert names(["conv1", "stage1", "pre_logits"]) == ["stage1", "pre_logits"]
    assert names(vgg, ("fc2", "conv1")) == names(vgg, "fc2,conv1") == ["fc2", "conv1"]
    with pytest.raises(InputError, match="no layer 'stage5'"):
        names(resnet, "robust")


# ---- the channel mask ----------------------------------------------------------------------------------------


@functools.cache
def first_layer_with_and_without_the_mask():
    """The features of the first layer after the mask of both rules, two channels each, and after it where it is off."""
    edit = jax.jit(lambda active, z: batch_mask(BATCH["image"], BATCH["label"], CLASSES, active, 2)(z))
    return tuple(np.asarray(edit(active, np.float32(CLEAN[0]))) for active in (True, False))


def test_the_batch_mask_removes_the_channels_of_both_rules():
    """Lowest with Y, highest with X, the last channel never."""
    z = CLEAN[0]
    r_x, r_y = operator(X), operator(np.eye(CLASSES)[Y])
    with_x, with_y = ([np.trace(r @ operator(z[:, c])) for c in range(WIDTHS[0] - 1)] for r in (r_x, r_y))
    worst = set(np.argsort(with_y)[:2]) | set(np.argsort(with_x)[-2:])
    on, off = first_layer_with_and_without_the_mask()
    assert set(np.flatnonzero(~on.any(0))) == worst
    np.testing.assert_array_equal(off, np.float32(z))
    with pytest.raises(InputError, match="less than half"):
        batch_mask(BATCH["image"], BATCH["label"], CLASSES, True, 2)(np.ones((B, 4), np.float32))


def test_the_papers_rule_masks_the_share_that_tells_least_of_the_label():
    """All channels can be chosen, the last one too."""
    z = RNG.random((B, 40)) + np.linspace(0, 2, 40) * (Y == 0)[:, None]
    z[:, -1] = RNG.random(B)
    with_y = [np.trace(operator(np.eye(CLASSES)[Y]) @ operator(z[:, c])) for c in range(40)]
    edit = batch_mask(BATCH["image"], BATCH["label"], CLASSES, jnp.bool_(True), None)
    kept = np.asarray(jax.jit(edit)(np.float32(z))).any(0)
    assert set(np.flatnonzero(~kept)) == set(np.argsort(with_y)[:2])
    losses = losses_by_step()[20]
    assert losses["paper"] == pytest.approx(losses["none"])  # 5 % of 12 channels are none


def test_the_mask_comes_every_tenth_step_of_an_epoch_but_not_at_its_first():
    """The authors' `batch_idx % 10 == 0 and batch_idx != 0`; the paper's rule leaves none out."""
    plain = losses_by_step()[20]["none"]
    values = [losses["code"] for losses in losses_by_step().values()]
    np.testing.assert_allclose(values[:2], plain, rtol=1e-6)
    assert abs(values[2] - plain) > 1e-3 and values[2] == values[3]


def test_the_steps_of_an_epoch_are_counted_from_its_first():
    """Step 490 of epochs of 490 steps is the first of the second: no mask there, as in the authors' code."""
    seen = {}

    def record(net, variables, batch, x_adv, key):
        seen.update({name: batch[name] for name in ("step", "epoch_step", "epoch")})
        return jnp.sum(variables["params"]["out"]), (variables, dict(seen))

    objective = Objective(lambda net, variables, batch, key: batch["label"], record, attack_losses=())
    optimizer = optax.sgd(0.0)
    step = jax.jit(make_train_step(Problem(lambda _: NET, objective, steps_per_epoch=490), optimizer))
    state = TrainState(jnp.int32(0), VARIABLES, optimizer.init(trainable(VARIABLES)), None)
    batch = {"image": BATCH["image"], "label": BATCH["label"], "index": jnp.arange(len(BATCH["label"]))}
    for done, expected in ((0, 0), (489, 489), (490, 0), (500, 10), (980, 0)):
        _, metrics = step(state._replace(step=jnp.int32(done)), batch, jax.random.key(0))
        assert (int(metrics["step"]), int(metrics["epoch_step"])) == (done, expected)
        assert float(metrics["epoch"]) == pytest.approx(done / 490)


def test_the_terms_see_the_masked_feature_but_of_pre_logits_the_unmasked():
    """As the authors' VGG16 appends the feature after its mask, and their ResNet-18 the pooled vector before it."""

    def renamed(forward):
        def call(variables, x, key, edits=None):
            edits = {"stage1": edits["pre_logits"]} if edits else None
            (logits, features), variables = forward(variables, x, key, edits)
            return (logits, {"pre_logits": features["stage1"], "fc1": features["fc1"]}), variables

        return call

    def terms(tap, net):
        objective = ib_rar(base="standard", mask_tap=tap, mask_channels=2, layers=tap)
        loss, (_, metrics) = objective.loss(net, VARIABLES, BATCH, None, jax.random.key(0))
        return [metrics[name] for name in ("nhsic_x", "nhsic_y")], loss

    z, (masked_z, _) = CLEAN[0], first_layer_with_and_without_the_mask()
    resnet = NET._replace(forward=renamed(NET.forward))
    both = jax.jit(lambda: (terms("stage1", NET), terms("pre_logits", resnet)))
    (vgg_terms, vgg_loss), (resnet_terms, resnet_loss) = jax.device_get(both())
    np.testing.assert_allclose(vgg_terms, information([masked_z]), rtol=2e-5)
    np.testing.assert_allclose(resnet_terms, information([z]), rtol=2e-5)
    assert abs(vgg_terms[1] - resnet_terms[1]) > 1e-3
    # what follows is masked in both: the losses differ by the terms alone
    difference = np.array([0.008, -0.08]) @ (np.array(vgg_terms) - np.array(resnet_terms))
    np.testing.assert_allclose(vgg_loss - resnet_loss, difference, atol=1e-5)


def test_the_masks_channels_get_no_gradient_and_the_mask_passes_none():
    objective = ib_rar(base="standard", mask_tap="stage1", mask_channels=2, alpha=0.0, beta=0.0)
    gradient = np.asarray(evaluate(objective)[1]["fc1"])
    assert 2 <= np.sum(~gradient.any(axis=0)) <= 4


def test_the_permanent_mask_removes_the_share_with_the_least_information():
    @jax.jit  # as one program, or JAX compiles one for every operation and shape
    def found(x, y):
        scores = channel_information(NET, VARIABLES, x, y, "stage1")
        mask = permanent_mask(scores[1], 0.25)
        after = masked(mask)(jnp.ones((2, 3, 3, WIDTHS[0])))
        return scores, mask, after, permanent_mask(jnp.arange(512.0))

    scores, mask, after, of_many = jax.device_get(found(X, BATCH["label"]))
    assert scores.shape == (2, WIDTHS[0])
    assert set(np.flatnonzero(mask == 0)) == set(np.argsort(scores[1])[:3])
    assert of_many.sum() == 512 - 25
    np.testing.assert_array_equal(after, np.broadcast_to(mask, after.shape))


# ---- the attacks ---------------------------------------------------------------------------------------------


def test_the_adaptive_attack_climbs_the_loss_it_names():
    """Higher than the attack on cross-entropy alone, inside the ball."""

    def objective(x):
        logits, features = taps(VARIABLES["params"], jnp.asarray(x))
        with_x, with_y = dependence(BATCH["image"], BATCH["label"], CLASSES, layers_of(features), y_kernel="gaussian")
        ce = -jnp.mean(jax.nn.log_softmax(logits)[ROWS, Y])
        return float(ce + 0.8 * with_x - 0.8 * with_y)

    def attacked(alpha, beta):
        attack = adaptive_attack(alpha=alpha, beta=beta, steps=20, eps="8/255")
        return attack(jax.random.key(0), lambda x: predict(VARIABLES, x), BATCH["image"], BATCH["label"])

    adaptive, plain = attacked(0.8, 0.8), attacked(0.0, 0.0)
    assert objective(adaptive) > objective(plain) > objective(X)
    assert np.abs(np.asarray(adaptive) - X).max() <= 8 / 255 + 1e-6


def test_attack_losses_follow_the_base():
    assert ib_rar(base="trades").attack_losses == ("ce", "margin")
    assert ib_rar(base="trades", form="original").attack_losses == hbar(base="trades").attack_losses == ("kl",)
    assert ib_rar(base="standard").attack_losses == hbar(base="standard").attack_losses == ()
    key = jax.random.key(0)
    np.testing.assert_array_equal(ib_rar(base="trades").target(NET, VARIABLES, BATCH, key), Y)
    np.testing.assert_allclose(hbar().target(NET, VARIABLES, BATCH, key), P, rtol=1e-4)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(base="awp"), "base='awp' is unknown"),
        (dict(form="paper"), "form='paper' is unknown"),
        (dict(estimator="mine"), "estimator='mine' is unknown"),
        (dict(y_kernel="cubic"), "y_kernel='cubic' is unknown"),
        (dict(x_input="noise"), "x_input='noise' is unknown"),
        (dict(base="standard", x_input="adv"), "x_input='adv' needs adversarial images"),
        (dict(sigma=0.0), "sigma=0 is not allowed"),
        (dict(alpha=-1.0), "alpha=-1 is not allowed"),
        (dict(mask_channels=0), "mask_channels=0 is not allowed"),
        (dict(mask_rule="random"), "mask_rule='random' is unknown"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        ib_rar(**options)
