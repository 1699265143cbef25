"""ARD, IAD, RSLAD, and the ablations of IBD: closed forms, and what they reduce to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import in_programs
from test_models import random_variables

from ibjax import losses
from ibjax.errors import InputError
from ibjax.models import cnn
from ibjax.net import linen_net
from ibjax.objectives import ibd_matching
from ibjax.objectives.ard import ard
from ibjax.objectives.iad import iad
from ibjax.objectives.ibd import ibd
from ibjax.objectives.ibd_matching import AttentionMatching, energy_differences, hand_matching, layers_of
from ibjax.objectives.rslad import rslad
from ibjax.perturb import awp
from ibjax.step import trainable, with_trainable

RNG = np.random.default_rng(0)
BATCH = {
    "image": RNG.random((12, 6, 6, 1), np.float32),
    "label": np.arange(12, dtype=np.int32) % 4,
    "index": np.arange(12, dtype=np.int32),
}
X_ADV = np.float32(np.clip(BATCH["image"] + 0.1 * RNG.normal(size=BATCH["image"].shape), 0, 1))
MODEL = cnn.Model(4, widths=((3,),), hidden=(), padding=1, batch_norm=True, pool="average")
VARIABLES, TEACHER, ASSISTANT = (random_variables(MODEL, BATCH["image"].shape, seed) for seed in range(3))
NET = in_programs(linen_net(MODEL, {"teacher": MODEL}, {"teacher": TEACHER}))
BOTH = in_programs(
    linen_net(MODEL, {"teacher": MODEL, "assistant": MODEL}, {"teacher": TEACHER, "assistant": ASSISTANT})
)
LATE = {**BATCH, "epoch": np.float32(100)}
KEY = jax.random.key(2)
C = 4


def loss_of(objective, batch=LATE, net=BOTH):
    """The loss as a function of what is trained; no objective here has a head."""
    assert objective.head is None
    return lambda trained: objective.loss(net, with_trainable(VARIABLES, trained), batch, X_ADV, KEY)[0]


def with_gradients(*losses):
    """(loss, gradient) of each function of the network's parameters, all as one program."""
    found = jax.jit(lambda trained: [jax.value_and_grad(loss)(trained) for loss in losses])(trainable(VARIABLES))
    return [(loss, gradient["params"]) for loss, gradient in found]


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **(tolerance or dict(rtol=1e-4, atol=1e-6))), a, b)


def probabilities(logits, T=1.0):
    return np.asarray(jax.nn.softmax(np.asarray(logits, np.float64).astype(np.float32) / np.float32(T)), np.float64)


def kl(p, q):
    return (p * np.log(p / q)).sum(-1)


@functools.cache
def passes():
    """Logits of the student on x' and then x, as the files of ARD, IAD and RSLAD have it."""

    @jax.jit
    def found(variables):
        (adv, _), after = BOTH.forward(variables, X_ADV, KEY)
        (clean, _), after = BOTH.forward(after, BATCH["image"], KEY)
        return clean, adv, after

    return found(VARIABLES)


ARDS = [("mean", 30.0, 1.0), ("mean", 5.0, 0.6), ("sum", 1.0, 0.9)]  # reduction, T, α
BEGINNING = {"after": LATE, "before": {**BATCH, "epoch": np.float32(39)}}  # of IAD-II, in epoch 40


@functools.cache
def computed():
    """{objective: (loss, batch statistics after it)} of all that are compared with their formula, as one program."""
    chosen = {("ard", *ours): ard(alpha=ours[2], temperature=ours[1], reduction=ours[0]) for ours in ARDS}
    chosen |= {"rslad": rslad(), "scaled rslad": rslad(scale=10.0)}
    chosen |= {("iad-1", weighted): iad(weight_teacher_term=weighted) for weighted in (True, False)}
    calls = {name: (objective, LATE) for name, objective in chosen.items()}
    calls |= {("iad-2", when): (iad(variant="II"), batch) for when, batch in BEGINNING.items()}

    @jax.jit
    def found(variables):
        results = [objective.loss(BOTH, variables, batch, X_ADV, KEY) for objective, batch in calls.values()]
        return [(loss, after["batch_stats"]) for loss, (after, _) in results]

    return dict(zip(calls, found(VARIABLES), strict=True))


# ---- ARD ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction, T, alpha", ARDS)
def test_ard_is_its_formula(reduction, T, alpha):
    clean, adv, _ = passes()
    teacher, y = BOTH.teacher(BATCH["image"])[0], np.asarray(BATCH["label"])
    robust = kl(probabilities(teacher, T), probabilities(adv, T)).mean() / (C if reduction == "mean" else 1)
    natural = -np.log(probabilities(clean)[np.arange(12), y]).mean()
    loss, _ = computed()["ard", reduction, T, alpha]
    np.testing.assert_allclose(loss, alpha * T**2 * robust + (1 - alpha) * natural, rtol=1e-3)


def test_ard_with_alpha_zero_is_cross_entropy_on_clean_images():
    def cross_entropy(trained):
        _, variables = BOTH.forward(with_trainable(VARIABLES, trained), X_ADV, KEY)
        (clean, _), _ = BOTH.forward(variables, BATCH["image"], KEY)
        return jnp.mean(losses.cross_entropy(clean, BATCH["label"]))

    assert_close(*with_gradients(loss_of(ard(alpha=0.0)), cross_entropy))


@pytest.mark.parametrize(
    "name", [("ard", *ARDS[0]), ("iad-1", True), ("iad-2", "after"), "rslad"], ids=["ard", "iad", "iad-2", "rslad"]
)
def test_the_statistics_see_x_adv_first_and_then_x(name):
    _, _, expected = passes()
    _, statistics = computed()[name]
    assert_close(statistics, expected["batch_stats"])


@pytest.mark.parametrize("method", [ard, rslad])
def test_the_two_reductions_differ_by_the_number_of_classes(method):
    of_mean, of_sum = with_gradients(*(loss_of(method(reduction=each)) for each in ("mean", "sum")))
    assert_close(jax.tree.map(lambda leaf: C * np.asarray(leaf), of_mean), of_sum, rtol=1e-4, atol=1e-4)


# ---- RSLAD -------------------------------------------------------------------------------------------------


def test_rslad_is_ibd_without_features():
    """With the sum over classes and equal weights: gradients agree; values but for the constant of 1e-5.

    In evaluation mode, so that the order of the two passes does not matter.
    """
    frozen = BOTH._replace(forward=lambda variables, x, key: (BOTH.predict(variables, x), variables))
    objectives = rslad(alpha=0.7, reduction="sum"), ibd(alpha=0.7, beta=0.0)
    (ours, gradient), (theirs, expected) = with_gradients(*(loss_of(each, net=frozen) for each in objectives))
    p_t = probabilities(BOTH.teacher(BATCH["image"])[0])
    np.testing.assert_allclose(ours - theirs, (p_t * np.log((p_t + 1e-5) / p_t)).sum(-1).mean(), atol=1e-5)
    assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_rslads_weights_are_five_and_one_sixth():
    clean, adv, _ = passes()
    p_t = probabilities(BOTH.teacher(BATCH["image"])[0])
    of_adv, of_clean = ((p_t * np.log((p_t + 1e-5) / probabilities(z))).sum(-1).mean() for z in (adv, clean))
    expected = (5 * of_adv + of_clean) / 6 / C
    np.testing.assert_allclose(computed()["rslad"][0], expected, atol=1e-5)
    np.testing.assert_allclose(computed()["scaled rslad"][0], 10 * expected, atol=1e-4)


def test_rslad_attacks_the_teachers_prediction():
    got = jax.jit(lambda variables: rslad().target(BOTH, variables, BATCH, KEY))(VARIABLES)
    np.testing.assert_allclose(got, probabilities(BOTH.teacher(BATCH["image"])[0]), rtol=1e-5)


# ---- IAD ---------------------------------------------------------------------------------------------------

EARLY = {**BATCH, "epoch": np.float32(59.9)}


def test_iad_is_ard_before_it_begins():
    """A = 1: the whole trust is the teacher's."""
    as_ard, early, without_beta = with_gradients(
        loss_of(ard(temperature=1.0, reduction="sum")), loss_of(iad(), EARLY), loss_of(iad(beta=0.0))
    )
    assert_close(early, as_ard, rtol=1e-4, atol=1e-5)
    assert_close(without_beta, as_ard, rtol=1e-4, atol=1e-5)
    assert abs(float(computed()["iad-1", True][0]) - float(early[0])) > 1e-3


@pytest.mark.parametrize("weighted", [True, False])
def test_iad_1_is_its_formula(weighted):
    clean, adv, _ = passes()
    of_x, of_x_adv = (probabilities(BOTH.teacher(x)[0]) for x in (BATCH["image"], X_ADV))
    A = of_x_adv[np.arange(12), np.asarray(BATCH["label"])] ** 0.1
    itself = (1 - A) * kl(probabilities(clean), probabilities(adv))
    expected = (A if weighted else 1) * kl(of_x, probabilities(adv)) + itself
    np.testing.assert_allclose(computed()["iad-1", weighted][0], expected.mean(), rtol=1e-4)


@pytest.mark.parametrize("when", BEGINNING)
def test_iad_2_is_its_formula(when):
    """With A from epoch 40 on; before it is AKD²: teacher, second teacher and labels on x'."""
    clean, adv, _ = passes()
    p_t, p_2 = probabilities(BOTH.teacher(X_ADV)[0]), probabilities(BOTH.assistant(X_ADV)[0])
    p_s, y = probabilities(adv), np.asarray(BATCH["label"])
    A = p_t[np.arange(12), y] ** 0.1 if when == "after" else 1.0
    expected = 0.5 * (A * kl(p_t, p_s) + (1 - A) * kl(probabilities(clean), p_s)) + 0.25 * kl(p_2, p_s)
    expected = expected - 0.25 * np.log(p_s[np.arange(12), y])
    np.testing.assert_allclose(computed()["iad-2", when][0], expected.mean(), rtol=1e-4)


def test_iads_own_prediction_is_not_detached():
    """The gradient through p_s(x) is there: with A = 0 in the limit it is TRADES's term."""
    certain = BOTH._replace(teacher=lambda x: (jnp.tile(np.float32([[-40, -40, -40, 40]]), (12, 1)), {}))
    batch = {**LATE, "label": np.zeros(12, np.int32)}  # the teacher gives the label e^{-80}

    def own(trained):
        (adv, _), after = BOTH.forward(with_trainable(VARIABLES, trained), X_ADV, KEY)
        (clean, _), _ = BOTH.forward(after, BATCH["image"], KEY)
        return jnp.mean(losses.kl_logits(clean, adv))

    (_, gradient), (_, expected) = with_gradients(loss_of(iad(beta=1.0), batch, certain), own)
    assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


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
    kinds = "onehot", "smooth", "natural", "robust"

    @jax.jit
    def targets(variables):
        return [ibd(labels=labels, smoothing=0.3).target(BOTH, variables, BATCH, KEY) for labels in kinds]

    target = dict(zip(kinds, targets(VARIABLES), strict=True))
    onehot = np.eye(C)[np.asarray(BATCH["label"])]
    np.testing.assert_array_equal(target["onehot"], onehot)
    smooth = np.asarray(target["smooth"])
    np.testing.assert_allclose(smooth, np.where(onehot == 1, 0.7, 0.1), rtol=1e-6)  # 1 − δ and δ/(C − 1)
    np.testing.assert_allclose(smooth.sum(-1), 1, rtol=1e-6)
    x = BATCH["image"]
    np.testing.assert_allclose(target["natural"], probabilities(BOTH.assistant(x)[0]), rtol=1e-5)
    np.testing.assert_allclose(target["robust"], probabilities(BOTH.teacher(x)[0]), rtol=1e-5)


def test_labels_change_the_soft_label_terms_and_not_the_features():
    objectives = [ibd(labels=labels, matching="hand") for labels in ("robust", "natural", "smooth", "onehot")]
    given = LATE, X_ADV, KEY
    metrics = jax.jit(lambda variables: [each.loss(BOTH, variables, *given)[1][1] for each in objectives])(VARIABLES)
    assert len({float(m["feature"]) for m in metrics}) == 1
    assert len({float(m["robust"]) for m in metrics}) == 4


def test_onehot_labels_without_features_are_adversarial_training_with_two_terms():
    def expected(trained):
        (clean, _), after = NET.forward(with_trainable(VARIABLES, trained), BATCH["image"], KEY)
        (adv, _), _ = NET.forward(after, X_ADV, KEY)
        ce = (losses.cross_entropy(z, BATCH["label"]) for z in (clean, adv))
        return sum(w * jnp.mean(value) for w, value in zip((0.1, 0.9), ce, strict=True))

    objective = ibd(labels="onehot", beta=0.0)
    assert objective.teachers == ()
    assert_close(*with_gradients(loss_of(objective, net=linen_net(MODEL)), expected))


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


def matched(student, teacher, pairs, granularity="block", stem=False):
    """The loss of hand-made pairs, and the same of these pairs of layers: the sum of their mean differences."""

    @jax.jit
    def found(student, teacher, pairs):
        differences = (energy_differences([s], [t], "square").mean() for s, t in pairs)
        return hand_matching(student, teacher, granularity, "square", stem), sum(differences)

    return found(student, teacher, pairs)


def test_hand_matching_pairs_equal_networks_block_by_block():
    other = taps(2, (8, 4, 2, 1), (1, 2, 3, 4))
    pairs = list(zip(layers_of(other, "block"), layers_of(RESNET, "block"), strict=True))
    found, expected = matched(other, RESNET, pairs)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_hand_matching_pairs_the_ends_of_stages_of_different_networks():
    """Stages 1 to 3; the teacher's are seen after their activation, the student's fourth has no partner."""
    ends = [(RESNET[f"stage{i}"], WIDE[f"stage{i}_relu"]) for i in (1, 2, 3)]
    found, expected = matched(RESNET, WIDE, ends)
    np.testing.assert_allclose(found, 6 / 3 * expected, rtol=1e-5)


@pytest.mark.parametrize("student", [RESNET, WIDE], ids=["different", "equal"])
def test_the_weights_of_both_matchings_sum_to_the_number_of_teacher_layers(student, monkeypatch):
    """With differences of one everywhere L_feat is that number: β means the same."""
    monkeypatch.setattr(ibd_matching, "energy_differences", lambda s, t, _: jnp.ones((12, len(t), len(s))))
    by_hand = jax.jit(lambda student: hand_matching(student, WIDE, "block", "square"))
    assert float(by_hand(student)) == 6
    head = AttentionMatching(8)
    shapes = jax.eval_shape(functools.partial(head.init, train=False), KEY, student, WIDE)
    variables = jax.tree.map(lambda leaf: RNG.random(leaf.shape, leaf.dtype), shapes)
    loss, _ = jax.jit(functools.partial(head.apply, train=False))(variables, student, WIDE)
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
    by_hand, expected = matched(student, teacher, ends, "stage", stem=True)
    np.testing.assert_allclose(by_hand, 4 / 4 * expected, rtol=1e-5)
    attend = functools.partial(AttentionMatching(8, "stage", stem=True).init_with_output, train=False)
    (_, attention), _ = jax.eval_shape(attend, KEY, student, teacher)
    assert attention.shape == (12, 4, 5)
    with pytest.raises(InputError, match="need a 'stem'"):
        layers_of(RESNET, "stage", stem=True)
    assert ibd(stem=True, granularity="stage").head.stem


def test_hand_matching_has_no_weights_of_its_own():
    objective = ibd(matching="hand")
    assert objective.head is None
    loss, (_, metrics) = jax.jit(lambda variables: objective.loss(NET, variables, LATE, X_ADV, KEY))(VARIABLES)
    np.testing.assert_allclose(
        loss, 0.1 * metrics["natural"] + 0.9 * metrics["robust"] + 0.8 * metrics["feature"], rtol=1e-5
    )
    assert float(metrics["feature"]) > 0


# ---- natural IBD, IBD + AWP --------------------------------------------------------------------------------


def test_natural_ibd_sees_no_attack():
    """L = D(x, y_t) + β·L_feat(x); the attack section must be None."""
    objective = ibd(adversarial=False, matching="hand", beta=0.5)
    assert objective.attack_losses == ()

    @jax.jit
    def found(variables):
        (clean, features), after = BOTH.forward(variables, BATCH["image"], KEY)
        teacher, features_t = BOTH.teacher(BATCH["image"])
        feature = hand_matching(features, features_t, "block", "square")
        return clean, teacher, feature, after, objective.loss(BOTH, variables, LATE, None, KEY)

    clean, teacher, feature, after, (loss, (got, metrics)) = found(VARIABLES)
    expected = kl(probabilities(teacher), probabilities(clean)).mean() + 0.5 * float(feature)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert "robust" not in metrics and "adv_acc" not in metrics
    assert_close(got["batch_stats"], after["batch_stats"])


def test_the_perturbation_climbs_the_loss_without_features():
    """IBD's proxy is its loss with β = 0, and so is the direction of AWP's step."""
    with_features, without = ibd(beta=30.0, matching="hand"), ibd(beta=0.0)

    @jax.jit
    def found(params):
        climbed = [
            lambda w, o=o: o.proxy(BOTH, {**VARIABLES, "params": w}, LATE, X_ADV, KEY) for o in (with_features, without)
        ]
        gradients = [jax.grad(each)(params) for each in climbed]
        offsets = [awp(gamma=0.005, warmup=10)(params, gradient, jnp.float32(10)) for gradient in gradients]
        return climbed[0](params), loss_of(without)({"params": params}), offsets

    proxy, loss, offsets = found(VARIABLES["params"])
    np.testing.assert_allclose(proxy, loss, rtol=1e-6)
    assert_close(*offsets)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(offsets[0])) > 0
