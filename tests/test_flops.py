"""A compiled step costs what its method needs: nothing twice, and no weight gradients in the attack."""

import jax
import pytest

from ibjax import config, optim, step
from ibjax.analysis import flops
from ibjax.attacks import geometry
from ibjax.attacks.pgd import pgd
from ibjax.models import resnet
from ibjax.objectives.alp import alp
from ibjax.objectives.ibd import ibd
from ibjax.objectives.infoat_r import infoat_r
from ibjax.objectives.label_smoothing import label_smoothing
from ibjax.objectives.mart import mart
from ibjax.objectives.mma import mma
from ibjax.objectives.te import te
from ibjax.objectives.trades import trades
from ibjax.perturb import awp

BAR = 1.05
IMAGES = jax.ShapeDtypeStruct((8, 32, 32, 3), "float32")
LABELS = jax.ShapeDtypeStruct((8,), "int32")
STUDENT = resnet.Model(num_classes=10, blocks=(1, 1, 1), width=8)
TEACHER = resnet.Model(num_classes=10, blocks=(1, 1, 1), width=32)  # 15 forward passes of the student
ATTACK = pgd(loss="kl", init="gaussian", steps=3, unroll=True)


def cost(objective, attack, teacher=None, perturb=None):
    """(FLOPs of a step, of one forward pass of the teacher), in forward passes of the student."""
    optimizer = optim.sgd(lr=0.1)
    teachers = {} if teacher is None else {"teacher": teacher}
    frozen = {role: jax.eval_shape(module.init, jax.random.key(0), IMAGES) for role, module in teachers.items()}

    def bind_net(frozen):
        return step.linen_net(STUDENT, teachers, frozen)

    def init(x, frozen):
        memory = objective.memory(8, 10) if objective.memory else None
        return step.init_state(
            jax.random.key(0), bind_net(frozen), STUDENT, objective.head, optimizer, x, False, memory
        )

    state = jax.eval_shape(init, IMAGES, frozen)
    train_step = step.make_train_step(bind_net, objective, optimizer, attack, perturb=perturb)
    found = flops.step_cost(train_step, bind_net, state, {"image": IMAGES, "label": LABELS, "index": LABELS}, frozen)
    return found["step"] / found["forward"], found["teacher"] / found["forward"]


def expected(name, teacher=0.0, perturb=None, **options):
    settings = config.base()
    settings.perturb = perturb
    settings.attack.steps = 3
    if name == "mma" or options.get("base") == "standard":
        settings.attack = None
    settings.objective = dict(name=name, **options)
    return flops.expected_forwards(settings, teacher)


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
    ratio, _ = cost(trades(), ATTACK)
    assert expected("trades") == 2 * 3 + 1 + 6
    assert ratio <= BAR * expected("trades")


@pytest.mark.parametrize(("made", "section", "passes"), [
    (mart(), dict(name="mart"), 2 * 3 + 6),
    (alp(), dict(name="alp"), 2 * 3 + 6),
    (mma(steps=3, search_steps=4), dict(name="mma", steps=3, search_steps=4), 2 * 3 + 2 + 4 + 6),
    (te(), dict(name="te"), 2 * 3 + 1 + 3),
    (te(base="trades"), dict(name="te", base="trades"), 2 * 3 + 1 + 6),
    (label_smoothing(), dict(name="label_smoothing"), 2 * 3 + 3),
    (infoat_r(), dict(name="infoat_r"), 2 * 3 + 1 + 6),
])  # fmt: skip
def test_a_baselines_step_costs_no_more_than_its_count(made, section, passes):
    assert expected(**section) == passes
    attack = None if not made.attack_losses else pgd(loss=made.attack_loss or "ce", steps=3, unroll=True)
    ratio, _ = cost(made, attack)
    assert 0.9 * passes < ratio <= BAR * passes


@pytest.mark.parametrize(("teacher_features", "passes"), [("adv", 2), ("nat", 1)])
def test_an_ibd_step_asks_the_teacher_once_for_each_image_it_needs(teacher_features, passes):
    ratio, teacher = cost(ibd(teacher_features=teacher_features), ATTACK, TEACHER)
    wanted = expected("ibd", teacher, teacher_features=teacher_features)
    assert teacher > 10  # so that one more pass could not hide
    assert wanted == pytest.approx(2 * 3 + 6 + passes * teacher)
    assert ratio <= BAR * wanted


def test_forward_passes_too_many_are_noticed():
    def wasteful(key, logits_fn, x, target):
        """Three forward passes more than the method needs."""
        x_adv = ATTACK(key, logits_fn, x, target)
        for _ in range(3):
            x_adv = geometry.project(x_adv + 1e-3 * logits_fn(x_adv).sum(), x, "linf", 8 / 255)
        return x_adv

    ratio, _ = cost(trades(), wasteful)
    assert ratio > BAR * expected("trades")


def test_an_unknown_method_has_no_count():
    assert expected("some_method") is None


def test_without_an_attack_an_update_is_all():
    assert expected("standard", base="standard") == expected("label_smoothing", base="standard") == 3


def test_a_weight_perturbation_costs_one_more_update():
    ratio, _ = cost(trades(), ATTACK, perturb=awp())
    assert expected("trades", perturb=dict(name="awp")) == 2 * 3 + 1 + 2 * 6
    assert 18 < ratio <= BAR * 19
