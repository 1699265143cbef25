"""ARD, IAD, RSLAD, and the ablations of IBD: closed forms, and what they reduce to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import in_programs
from test_objectives import BATCH, MODEL, NET, TEACHER, VARIABLES, X_ADV, random_variables

from ibjax import losses
from ibjax.errors import InputError
from ibjax.net import linen_net
from ibjax.objectives import ibd_matching
from ibjax.objectives.ard import ard
from ibjax.objectives.iad import iad
from ibjax.objectives.ibd import ibd
from ibjax.objectives.ibd_matching import AttentionMatching, energy_differences, hand_matching, layers_of
from ibjax.objectives.rslad import rslad
from ibjax.perturb import awp
from ibjax.step import trainable, with_trainable

ASSISTANT = random_variables(9)
BOTH = in_programs(
    linen_net(MODEL, {"teacher": MODEL, "assistant": MODEL}, {"teacher": TEACHER, "assistant": ASSISTANT})
)
LATE = {**BATCH, "epoch": jnp.float32(100)}
KEY = jax.random.key(2)
C = 4


def run(objective, batch=LATE, x_adv=X_ADV, net=BOTH):
    """(loss, gradient) of the network's parameters."""

    @jax.jit
    def found(variables):
        if objective.head is not None:
            features = net.predict(variables, batch["image"])[1]
            variables = {**variables, "head": objective.head.init(jax.random.key(5), features, features, train=False)}

        def value(params):
            return objective.loss(net, with_trainable(variables, params), batch, x_adv, KEY)[0]

        return jax.value_and_grad(value)(trainable(variables))

    loss, gradient = found(VARIABLES)
    return loss, gradient["params"]


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **(tolerance or dict(rtol=1e-4, atol=1e-6))), a, b)


def probabilities(logits, T=1.0):
    return np.asarray(jax.nn.softmax(np.asarray(logits, np.float64).astype(np.float32) / np.float32(T)), np.float64)


def kl(p, q):
    return (p * np.log(p / q)).sum(-1)


def passes():
    """Logits of the student on x' and then x, as the files of ARD, IAD and RSLAD have it."""
    (adv, _), after = BOTH.forward(VARIABLES, X_ADV, KEY)
    (clean, _), after = BOTH.forward(after, BATCH["image"], KEY)
    return clean, adv, after


# ---- ARD ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction, T, alpha", [("mean", 30.0, 1.0), ("mean", 5.0, 0.6), ("sum", 1.0, 0.9)])
def test_ard_is_its_formula(reduction, T, alpha):
    clean, adv, _ = passes()
    teacher, y = BOTH.teacher(BATCH["image"])[0], np.asarray(BATCH["label"])
    robust = kl(probabilities(teacher, T), probabilities(adv, T)).mean() / (C if reduction == "mean" else 1)
    natural = -np.log(probabilities(clean)[np.arange(12), y]).mean()
    loss, _ = run(ard(alpha=alpha, temperature=T, reduction=reduction))
    np.testing.assert_allclose(loss, alpha * T**2 * robust + (1 - alpha) * natural, rtol=1e-3)


def test_ard_with_alpha_zero_is_cross_entropy_on_clean_images():
    def cross_entropy(params):
        _, variables = BOTH.forward(with_trainable(VARIABLES, params), X_ADV, KEY)
        (clean, _), _ = BOTH.forward(variables, BATCH["image"], KEY)
        return jnp.mean(losses.cross_entropy(clean, BATCH["label"]))

    value, gradient = jax.jit(jax.value_and_grad(cross_entropy))(trainable(VARIABLES))
    assert_close(run(ard(alpha=0.0)), (value, gradient["params"]))


@pytest.mark.parametrize("objective", [ard(), iad(), iad(variant="II"), rslad()], ids=["ard", "iad", "iad-2", "rslad"])
def test_the_statistics_see_x_adv_first_and_then_x(objective):
    _, _, expected = passes()
    _, (after, _) = jax.jit(lambda variables: objective.loss(BOTH, variables, LATE, X_ADV, KEY))(VARIABLES)
    assert_close(after["batch_stats"], expected["batch_stats"])


@pytest.mark.parametrize("method", [ard, rslad])
def test_the_two_reductions_differ_by_the_number_of_classes(method):
    of_mean, of_sum = run(method(reduction="mean")), run(method(reduction="sum"))
    assert_close(jax.tree.map(lambda leaf: C * leaf, of_mean), of_sum, rtol=1e-4, atol=1e-4)


# ---- RSLAD -------------------------------------------------------------------------------------------------


def test_rslad_is_ibd_without_features():
    """With the sum over classes and equal weights: gradients agree; values but for the constant of 1e-5.

    In evaluation mode, so that the order of the two passes does not matter.
    """
    frozen = BOTH._replace(forward=lambda variables, x, key: (BOTH.predict(variables, x), variables))
    ours, gradient = run(rslad(alpha=0.7, reduction="sum"), net=frozen)
    theirs, expected = run(ibd(alpha=0.7, beta=0.0), net=frozen)
    p_t = probabilities(BOTH.teacher(BATCH["image"])[0])
    np.testing.assert_allclose(ours - theirs, (p_t * np.log((p_t + 1e-5) / p_t)).sum(-1).mean(), atol=1e-5)
    assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_rslads_weights_are_five_and_one_sixth():
    clean, adv, _ = passes()
    p_t = probabilities(BOTH.teacher(BATCH["image"])[0])
    expected = (5 * kl(p_t, probabilities(adv)).mean() + kl(p_t, probabilities(clean)).mean()) / 6 / C
    np.testing.assert_allclose(run(rslad())[0], expected, atol=1e-5)
    np.testing.assert_allclose(run(rslad(scale=10.0))[0], 10 * expected, atol=1e-4)


def test_rslad_attacks_the_teachers_prediction():
    got = rslad().target(BOTH, VARIABLES, BATCH, KEY)
    np.testing.assert_allclose(got, probabilities(BOTH.teacher(BATCH["image"])[0]), rtol=1e-5)


# ---- IAD ---------------------------------------------------------------------------------------------------

EARLY = {**BATCH, "epoch": jnp.float32(59.9)}


def test_iad_is_ard_before_it_begins():
    """A = 1: the whole trust is the teacher's."""
    early, as_ard = run(iad(), EARLY), run(ard(temperature=1.0, reduction="sum"))
    assert_close(early, as_ard, rtol=1e-4, atol=1e-5)
    assert_close(run(iad(beta=0.0)), as_ard, rtol=1e-4, atol=1e-5)
    assert abs(float(run(iad())[0] - early[0])) > 1e-3


@pytest.mark.parametrize("weighted", [True, False])
def test_iad_1_is_its_formula(weighted):
    clean, adv, _ = passes()
    of_x, of_x_adv = (probabilities(BOTH.teacher(x)[0]) for x in (BATCH["image"], X_ADV))
    A = of_x_adv[np.arange(12), np.asarray(BATCH["label"])] ** 0.1
    itself = (1 - A) * kl(probabilities(clean), probabilities(adv))
    expected = (A if weighted else 1) * kl(of_x, probabilities(adv)) + itself
    np.testing.assert_allclose(run(iad(weight_teacher_term=weighted))[0], expected.mean(), rtol=1e-4)


@pytest.mark.parametrize("batch", [LATE, {**BATCH, "epoch": jnp.float32(39)}], ids=["after", "before"])
def test_iad_2_is_its_formula(batch):
    """With A from epoch 40 on; before it is AKD²: teacher, second teacher and labels on x'."""
    clean, adv, _ = passes()
    p_t, p_2 = probabilities(BOTH.teacher(X_ADV)[0]), probabilities(BOTH.assistant(X_ADV)[0])
    p_s, y = probabilities(adv), np.asarray(BATCH["label"])
    A = p_t[np.arange(12), y] ** 0.1 if float(batch["epoch"]) >= 40 else 1.0
    expected = 0.5 * (A * kl(p_t, p_s) + (1 - A) * kl(probabilities(clean), p_s)) + 0.25 * kl(p_2, p_s)
    expected = expected - 0.25 * np.log(p_s[np.arange(12), y])
    np.testing.assert_allclose(run(iad(variant="II"), batch)[0], expected.mean(), rtol=1e-4)


def test_iads_own_prediction_is_not_detached():
    """The gradient through p_s(x) is there: with A = 0 in the limit it is TRADES's term."""
    certain = BOTH._replace(teacher=lambda x: (jnp.tile(jnp.float32([[-40, -40, -40, 40]]), (12, 1)), {}))
    batch = {**LATE, "label": jnp.zeros(12, jnp.int32)}  # the teacher gives the label e^{-80}
    _, gradient = run(iad(beta=1.0), batch, net=certain)

    def own(params):
        (adv, _), after = BOTH.forward(with_trainable(VARIABLES, params), X_ADV, KEY)
        (clean, _), _ = BOTH.forward(after, BATCH["image"], KEY)
        return jnp.mean(losses.kl_logits(clean, adv))

    assert_close(gradient, jax.jit(jax.grad(own))(trainable(VARIABLES))["params"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: iad(variant="III"),
        lambda: iad(alpha_2=0.1),
        lambda: iad(variant="II", alpha=0.9, alpha_2=0.2),
        lambda: ard(reduction="batchmean"),
        lambda: rslad(alpha=1.5),
        lambda: ibd(labels="soft"),
        lambda: ibd(matching="none"),
    ],
)
def test_settings_that_contradict_are_refused(make):
    with pytest.raises(InputError, match=r"allowed|needs"):
        make()


# ---- IBD's labels ------------------------------------------------------------------------------------------


def test_the_four_kinds_of_labels():
    def target(**options):
        return np.asarray(ibd(**options).target(BOTH, VARIABLES, BATCH, KEY))

    onehot = np.eye(C)[np.asarray(BATCH["label"])]
    np.testing.assert_array_equal(target(labels="onehot"), onehot)
    smooth = target(labels="smooth", smoothing=0.3)
    np.testing.assert_allclose(smooth, np.where(onehot == 1, 0.7, 0.1), rtol=1e-6)  # 1 − δ and δ/(C − 1)
    np.testing.assert_allclose(smooth.sum(-1), 1, rtol=1e-6)
    x = BATCH["image"]
    np.testing.assert_allclose(target(labels="natural"), probabilities(BOTH.assistant(x)[0]), rtol=1e-5)
    np.testing.assert_allclose(target(labels="robust"), probabilities(BOTH.teacher(x)[0]), rtol=1e-5)


def test_labels_change_the_soft_label_terms_and_not_the_features():
    metrics = [
        ibd(labels=labels, matching="hand").loss(BOTH, VARIABLES, LATE, X_ADV, KEY)[1][1]
        for labels in ("robust", "natural", "smooth", "onehot")
    ]
    assert len({float(m["feature"]) for m in metrics}) == 1
    assert len({float(m["robust"]) for m in metrics}) == 4


def test_onehot_labels_without_features_are_adversarial_training_with_two_terms():
    def expected(params):
        (clean, _), after = NET.forward(with_trainable(VARIABLES, params), BATCH["image"], KEY)
        (adv, _), _ = NET.forward(after, X_ADV, KEY)
        ce = (losses.cross_entropy(z, BATCH["label"]) for z in (clean, adv))
        return sum(w * jnp.mean(value) for w, value in zip((0.1, 0.9), ce, strict=True))

    value, gradient = jax.value_and_grad(expected)(trainable(VARIABLES))
    objective = ibd(labels="onehot", beta=0.0)
    assert objective.teachers == ()
    assert_close(run(objective, net=linen_net(MODEL)), (value, gradient["params"]))


@pytest.mark.parametrize(
    "options, teachers",
    [
        (dict(), ("teacher",)),
        (dict(beta=0.0), ("teacher",)),
        (dict(labels="natural"), ("teacher", "assistant")),
        (dict(labels="natural", beta=0.0), ("assistant",)),
        (dict(labels="smooth"), ("teacher",)),
        (dict(labels="smooth", beta=0.0), ()),
    ],
)
def test_ibd_asks_for_the_teachers_it_uses(options, teachers):
    assert ibd(**options).teachers == teachers


# ---- IBD's matching ----------------------------------------------------------------------------------------


def taps(seed, sizes, stage_ends, pre_activation=False):
    """Features of a network of one block for each size, whose stages end with the blocks named."""
    rng = np.random.default_rng(seed)
    draw = iter(np.float32(rng.uniform(size=(12, n, n, 3))) for n in [*sizes, *sizes])
    features = {f"block{i}": next(draw) for i in range(1, len(sizes) + 1)}
    if pre_activation:
        features |= {f"block{i}_relu": next(draw) for i in range(1, len(sizes) + 1)}
    for stage, end in enumerate(stage_ends, 1):
        features |= {
            f"stage{stage}{s}": features[f"block{end}{s}"] for s in ("", "_relu") if f"block{end}{s}" in features
        }
    return features


RESNET = taps(0, (8, 4, 2, 1), (1, 2, 3, 4))  # four stages of one block
WIDE = taps(1, (8, 8, 4, 4, 2, 2), (2, 4, 6), pre_activation=True)  # three stages of two


def test_hand_matching_pairs_equal_networks_block_by_block():
    other = taps(2, (8, 4, 2, 1), (1, 2, 3, 4))
    z_s, z_t = layers_of(other, "block"), layers_of(RESNET, "block")
    expected = sum(energy_differences([s], [t], "square").mean() for s, t in zip(z_s, z_t, strict=True))
    np.testing.assert_allclose(hand_matching(other, RESNET, "block", "square"), expected, rtol=1e-5)


def test_hand_matching_pairs_the_ends_of_stages_of_different_networks():
    """Stages 1 to 3; the teacher's are seen after their activation, the student's fourth has no partner."""
    ends = [(RESNET[f"stage{i}"], WIDE[f"stage{i}_relu"]) for i in (1, 2, 3)]
    expected = 6 / 3 * sum(energy_differences([s], [t], "square").mean() for s, t in ends)
    np.testing.assert_allclose(hand_matching(RESNET, WIDE, "block", "square"), expected, rtol=1e-5)


@pytest.mark.parametrize("student", [RESNET, WIDE], ids=["different", "equal"])
def test_the_weights_of_both_matchings_sum_to_the_number_of_teacher_layers(student, monkeypatch):
    """With differences of one everywhere L_feat is that number: β means the same."""
    monkeypatch.setattr(ibd_matching, "energy_differences", lambda s, t, _: jnp.ones((12, len(t), len(s))))
    assert float(hand_matching(student, WIDE, "block", "square")) == 6
    head = AttentionMatching(8)
    loss, _ = head.apply(head.init(KEY, student, WIDE, train=False), student, WIDE, train=False)
    np.testing.assert_allclose(loss, 6, rtol=1e-5)


def test_the_stem_is_a_layer_before_the_blocks_or_stages():
    """After its activation where there is one, in both matchings; a network without one is refused."""
    stems = {"stem": RESNET["block1"] + 1}, {"stem": WIDE["block1"] + 1, "stem_relu": WIDE["block1_relu"] + 2}
    student, teacher = RESNET | stems[0], WIDE | stems[1]
    found, expected = layers_of(teacher, "stage", stem=True), [teacher[f"{s}_relu"] for s in ("stem", "stage1")]
    assert len(found) == 4 and len(layers_of(student, "stage", stem=True)) == 5
    jax.tree.map(np.testing.assert_array_equal, found[:2], expected)
    jax.tree.map(np.testing.assert_array_equal, found[1:], layers_of(teacher, "stage"))
    ends = [(student[s], teacher[f"{s}_relu"]) for s in ("stem", "stage1", "stage2", "stage3")]
    by_hand = 4 / 4 * sum(energy_differences([s], [t], "square").mean() for s, t in ends)
    np.testing.assert_allclose(hand_matching(student, teacher, "stage", "square", True), by_hand, rtol=1e-5)
    head = AttentionMatching(8, "stage", stem=True)
    _, attention = head.apply(head.init(KEY, student, teacher, train=False), student, teacher, train=False)
    assert attention.shape == (12, 4, 5)
    with pytest.raises(InputError, match="need a 'stem'"):
        layers_of(RESNET, "stage", stem=True)
    assert ibd(stem=True, granularity="stage").head.stem


def test_hand_matching_has_no_weights_of_its_own():
    objective = ibd(matching="hand")
    assert objective.head is None
    loss, (_, metrics) = objective.loss(NET, VARIABLES, LATE, X_ADV, KEY)
    np.testing.assert_allclose(
        loss, 0.1 * metrics["natural"] + 0.9 * metrics["robust"] + 0.8 * metrics["feature"], rtol=1e-5
    )
    assert float(metrics["feature"]) > 0


# ---- natural IBD, IBD + AWP --------------------------------------------------------------------------------


def test_natural_ibd_sees_no_attack():
    """L = D(x, y_t) + β·L_feat(x); the attack section must be None."""
    objective = ibd(adversarial=False, matching="hand", beta=0.5)
    assert objective.attack_losses == ()
    (clean, features), after = BOTH.forward(VARIABLES, BATCH["image"], KEY)
    teacher, features_t = BOTH.teacher(BATCH["image"])
    feature = hand_matching(features, features_t, "block", "square")
    expected = kl(probabilities(teacher), probabilities(clean)).mean() + 0.5 * feature
    loss, (got, metrics) = objective.loss(BOTH, VARIABLES, LATE, None, KEY)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert "robust" not in metrics and "adv_acc" not in metrics
    assert_close(got["batch_stats"], after["batch_stats"])


def test_the_perturbation_climbs_the_loss_without_features():
    """IBD's proxy is its loss with β = 0, and so is the direction of AWP's step."""
    with_features, without = ibd(beta=30.0, matching="hand"), ibd(beta=0.0)
    proxy = with_features.proxy(BOTH, VARIABLES, LATE, X_ADV, KEY)
    np.testing.assert_allclose(proxy, without.loss(BOTH, VARIABLES, LATE, X_ADV, KEY)[0], rtol=1e-6)
    offsets = []
    for objective in (with_features, without):
        gradient = jax.grad(lambda w, o=objective: o.proxy(BOTH, {**VARIABLES, "params": w}, LATE, X_ADV, KEY))(
            VARIABLES["params"]
        )
        offsets.append(awp(gamma=0.005, warmup=10)(VARIABLES["params"], gradient, jnp.float32(10)))
    assert_close(*offsets)
    assert float(optax.tree.norm(offsets[0])) > 0
