"""A compiled step costs what its method needs: nothing twice, and no weight gradients in the attack."""

import jax
import pytest

from ibjax import config, optim, step
from ibjax.analysis import flops
from ibjax.attacks import geometry
from ibjax.attacks.pgd import pgd
from ibjax.models import cnn, resnet
from ibjax.net import linen_net
from ibjax.objectives.alp import alp
from ibjax.objectives.ard import ard
from ibjax.objectives.dkl import dkl
from ibjax.objectives.hbar import hbar
from ibjax.objectives.iad import iad
from ibjax.objectives.ib_rar import ib_rar
from ibjax.objectives.ibd import ibd
from ibjax.objectives.infoat_r import infoat_r
from ibjax.objectives.label_smoothing import label_smoothing
from ibjax.objectives.mart import mart
from ibjax.objectives.mma import mma
from ibjax.objectives.rslad import rslad
from ibjax.objectives.score import score
from ibjax.objectives.shared_information import shared_information
from ibjax.objectives.te import te
from ibjax.objectives.trades import trades
from ibjax.perturb import awp

BAR = 1.05
IMAGES = jax.ShapeDtypeStruct((8, 32, 32, 3), "float32")
LABELS = jax.ShapeDtypeStruct((8,), "int32")
STUDENT = resnet.Model(num_classes=10, blocks=(1, 1, 1), width=8)
TEACHER = resnet.Model(num_classes=10, blocks=(1, 1, 1), width=32)  # 15 forward passes of the student
SMALL, LARGE, LARGER = (  # a plain network, which compiles in a third of the time
    cnn.Model(10, widths=((w, w), (w, w)), hidden=(), padding=1, batch_norm=True, pool="average") for w in (16, 48, 64)
)
ATTACK = pgd(loss="kl", init="gaussian", steps=3, unroll=True)


def cost(objective, attack, teacher=None, perturb=None, assistant=None, student=STUDENT):
    """FLOPs (of a step, of one forward pass of the teacher, of the assistant), in forward passes of the student."""
    optimizer = optim.sgd(lr=0.1)
    given = {"teacher": teacher, "assistant": assistant}
    teachers = {role: module for role, module in given.items() if module is not None}
    frozen = {role: jax.eval_shape(module.init, jax.random.key(0), IMAGES) for role, module in teachers.items()}

    def bind_net(frozen):
        return linen_net(student, teachers, frozen)

    def init(x, frozen):
        memory = objective.memory(8, 10) if objective.memory else None
        return step.init_state(
            jax.random.key(0), bind_net(frozen), student, objective.head, optimizer, x, False, memory
        )

    state = jax.eval_shape(init, IMAGES, frozen)
    train_step = step.make_train_step(step.Problem(bind_net, objective, attack), optimizer, perturb=perturb)
    found = flops.step_cost(train_step, bind_net, state, {"image": IMAGES, "label": LABELS, "index": LABELS}, frozen)
    return tuple(found[part] / found["forward"] for part in ("step", "teacher", "assistant"))


def expected(name, teacher=0.0, assistant=0.0, perturb=None, attack_steps=3, **options):
    settings = config.base()
    settings.perturb = perturb
    settings.attack = None if attack_steps is None else dict(name="pgd", steps=attack_steps)
    if name == "mma" or options.get("base") == "standard":
        settings.attack = None
    settings.objective = dict(name=name, **options)
    return flops.expected_forwards(settings, teacher, assistant)


def test_a_pgd_10_step_of_resnet_18_costs_23_forward_passes():
    settings = config.base()
    settings.data = dict(name="synthetic", shape=(32, 32, 3), num_classes=10, val_size=8, split_seed=0)
    settings.model = dict(name="resnet", depth=18)
    settings.batch_size = 8
    result = flops.audit(settings)
    assert result["expected"] == 23
    assert 22 < result["ratio"] <= BAR * 23
    assert result["quotient"] == result["ratio"] / 23
    assert 0.8 * 1.11e9 < result["forward_flops"] / 8 < 1.11e9  # XLA leaves out padding
    assert "unroll" not in settings.attack  # the caller's configuration is untouched


def test_a_trades_step_costs_no_more_than_its_count():
    ratio, *_ = cost(trades(), ATTACK)
    assert expected("trades") == 2 * 3 + 1 + 6
    assert ratio <= BAR * expected("trades")


@pytest.mark.parametrize(("made", "section", "passes"), [
    (mart(), dict(name="mart"), 2 * 3 + 6),
    pytest.param(alp(), dict(name="alp"), 2 * 3 + 6, marks=pytest.mark.slow),
    (mma(steps=3, search_steps=4), dict(name="mma", steps=3, search_steps=4), 2 * 3 + 2 + 4 + 6),
    pytest.param(te(), dict(name="te"), 2 * 3 + 1 + 3, marks=pytest.mark.slow),
    (te(base="trades"), dict(name="te", base="trades"), 2 * 3 + 1 + 6),
    pytest.param(label_smoothing(), dict(name="label_smoothing"), 2 * 3 + 3, marks=pytest.mark.slow),
    pytest.param(infoat_r(), dict(name="infoat_r"), 2 * 3 + 1 + 6, marks=pytest.mark.slow),
    pytest.param(score(), dict(name="score"), 2 * 3 + 1 + 6, marks=pytest.mark.slow),
    pytest.param(dkl(), dict(name="dkl"), 2 * 3 + 1 + 6, marks=pytest.mark.slow),
    (ib_rar(layers="pre_logits"), dict(name="ib_rar"), 2 * 3 + 3),
    pytest.param(hbar(layers="pre_logits"), dict(name="hbar"), 2 * 3 + 1 + 6, marks=pytest.mark.slow),
    pytest.param(
        shared_information(location="prediction"), dict(name="shared_information"), 2 * 3 + 6, marks=pytest.mark.slow
    ),
])  # fmt: skip
def test_a_baselines_step_costs_no_more_than_its_count(made, section, passes):
    assert expected(**section) == passes
    loss = made.attack_loss or (made.attack_losses or ("",))[0]
    attack = pgd(loss=loss, steps=3, unroll=True) if loss else None
    ratio, *_ = cost(made, attack)
    assert 0.9 * passes < ratio <= BAR * passes


@pytest.mark.parametrize(("teacher_features", "passes"), [("adv", 2), ("nat", 1)])
def test_an_ibd_step_asks_the_teacher_once_for_each_image_it_needs(teacher_features, passes):
    ratio, teacher, _ = cost(ibd(teacher_features=teacher_features), ATTACK, TEACHER)
    wanted = expected("ibd", teacher, teacher_features=teacher_features)
    assert teacher > 10  # so that one more pass could not hide
    assert wanted == pytest.approx(2 * 3 + 6 + passes * teacher)
    assert ratio <= BAR * wanted


@pytest.mark.parametrize(
    "method, options, passes",  # of the update, of the teacher, of the assistant
    [
        (ibd, dict(labels="natural", matching="hand"), (6, 1, 1)),
        (ibd, dict(adversarial=False), (3, 1, 0)),
        (rslad, dict(), (6, 1, 0)),
        pytest.param(ard, dict(), (4, 1, 0), marks=pytest.mark.slow),
        pytest.param(iad, dict(), (6, 2, 0), marks=pytest.mark.slow),
        (iad, dict(variant="II"), (6, 1, 1)),
    ],
)
def test_distillation_asks_its_teachers_once_for_each_image_it_needs(method, options, passes):
    objective, attacked = method(**options), options.get("adversarial", True)
    attack = pgd(loss=objective.attack_losses[0], steps=1) if attacked else None
    ratio, teacher, assistant = cost(objective, attack, LARGER, assistant=LARGE, student=SMALL)
    wanted = expected(method.__name__, teacher, assistant, attack_steps=1 if attacked else None, **options)
    update, of_teacher, of_assistant = passes
    assert wanted == pytest.approx(2 * attacked + update + of_teacher * teacher + of_assistant * assistant)
    assert teacher > 10 and assistant > 5
    assert 0.85 * wanted < ratio <= BAR * wanted


def test_ibds_weight_perturbation_does_not_ask_the_teacher_again():
    ratio, teacher, _ = cost(ibd(), ATTACK, TEACHER, perturb=awp())
    wanted = expected("ibd", teacher, perturb=dict(name="awp"))
    assert wanted == pytest.approx(2 * 3 + 2 * 6 + 2 * teacher)
    assert ratio <= BAR * wanted


def test_forward_passes_too_many_are_noticed():
    def wasteful(key, logits_fn, x, target):
        """Three forward passes more than the method needs."""
        x_adv = ATTACK(key, logits_fn, x, target)
        for _ in range(3):
            x_adv = geometry.project(x_adv + 1e-3 * logits_fn(x_adv).sum(), x, "linf", 8 / 255)
        return x_adv

    ratio, *_ = cost(trades(), wasteful)
    assert ratio > BAR * expected("trades")


@pytest.mark.parametrize(
    ("name", "passes", "wanted"),
    [
        ("pgd_at", "adv", 9),
        ("pgd_at", "adv,adv,clean", 11),
        ("trades", "clean,adv", 13),
        ("trades", "adv,clean,clean", 14),
        ("label_smoothing", None, 9),
        ("label_smoothing", "adv,clean,clean", 11),
    ],
)
def test_a_pass_for_the_statistics_costs_one_more(name, passes, wanted):
    assert expected(name, passes=passes) == wanted
    assert expected("pgd_at", clean_forward=True) == 10 and expected("trades", forwards=3) == 14


def test_an_unknown_method_has_no_count():
    assert expected("some_method") is None


def test_without_an_attack_an_update_is_all():
    assert expected("standard", base="standard") == expected("label_smoothing", base="standard") == 3


def test_a_weight_perturbation_costs_one_more_update():
    ratio, *_ = cost(trades(), ATTACK, perturb=awp())
    assert expected("trades", perturb=dict(name="awp")) == 2 * 3 + 1 + 2 * 6
    assert 18 < ratio <= BAR * 19
