"""ARD, IAD and RSLAD: as distillation baselines in IBD's Table 1 (Kuang et al., NeurIPS 2023), and as published.

    python -m ibjax.main --config=configs/distillation.py:ROW --workdir=runs/distillation/ROW

PreActResNet-18 taught by a TRADES WRN-34-10; the numbers are those of IBD's Table 1, best / last checkpoint:

| ROW             | clean         | FGSM          | PGD-100       | CW-100        | AutoAttack    |
|-----------------|---------------|---------------|---------------|---------------|---------------|
| ard             | 83.94 / 84.32 | 59.32 / 59.35 | 52.16 / 51.41 | 51.21 / 51.22 | 49.17 / 48.89 |
| iad             | 83.24 / 83.76 | 59.34 / 59.17 | 54.24 / 53.84 | 51.92 / 51.60 | 50.63 / 50.17 |
| rslad           | 83.38 / 83.88 | 60.08 / 59.98 | 54.27 / 54.01 | 53.19 / 53.08 | 51.52 / 51.36 |
| ard-cifar100    | 60.58 / 60.79 | 33.43 / 32.67 | 29.07 / 28.11 | 27.54 / 26.76 | 25.62 / 24.62 |
| iad-cifar100    | 57.08 / 57.52 | 34.65 / 33.71 | 30.60 / 29.23 | 27.24 / 27.35 | 25.84 / 25.36 |
| rslad-cifar100  | 57.72 / 57.83 | 34.23 / 34.09 | 31.01 / 30.55 | 28.27 / 28.07 | 26.73 / 26.41 |
| iad_2           | IAD-II, not in that table                                                     |

In IBD's comparison every method uses IBD's schedule and, presumably, attacks in batch-norm's evaluation mode. The
settings specific to a method are those of its authors: for ARD T = 30 and the mean over B·C, for RSLAD the mean over
B·C (times 10 on CIFAR-100), for IAD its weights.

The authors' own settings (ResNet-18, zero padding, weight decay 2e-4):

| ROW             | differs in                                                                                       |
|-----------------|--------------------------------------------------------------------------------------------------|
| ard-original    | training-mode attack from an unclipped start; the learning rate stays 0.01 after epoch 100, due  |
|                 | to an error in the published schedule. The authors' student is a MobileNetV2, ours a ResNet-18   |
| iad-original    | the same attack and schedule; a ResNet-18 teacher; no A in front of the first term; two passes   |
|                 | over x' and two over x                                                                           |
| iad_2-original  | the same, with a naturally trained ResNet-18 as second teacher; no pass over x before epoch 40   |
| rslad-original  | 300 epochs; the learning rate drops at 215, 260 and 285                                          |

docs/recipes.md compares every setting with the papers and their code. `,smoke` shrinks any row. Cost: 24 to 26
forward passes of the student and 1 or 2 of the teacher per image; 200 epochs are 200·49,000·(26·1.11 + 2·13.3) GFLOP
= 0.54 EFLOP.
"""

from ibjax.config import base, held, parse_arg, smoke

METHODS = {
    "ard": dict(name="ard"),
    "iad": dict(name="iad", variant="I"),
    "iad_2": dict(name="iad", variant="II"),
    "rslad": dict(name="rslad"),
}
ROWS = (
    *METHODS,
    *(f"{method}-cifar100" for method in ("ard", "iad", "rslad")),
    *(f"{method}-original" for method in METHODS),
)
TRAINED = "python -m ibjax.main --config="


def get_config(arg=None):
    row, small = parse_arg(arg, ROWS)
    method, _, form = row.partition("-")
    config = base()
    config.title = f"{method.upper()} {form}".strip()
    config.data.dataset = "cifar100" if form == "cifar100" else "cifar10"
    config.augment.padding = "edge"
    config.model = dict(name="preact_resnet", depth=18, dtype="bfloat16")
    config.objective = METHODS[method]
    if method == "rslad":
        config.attack.update(loss="kl", init="gaussian")
    teach(config.teacher, "trades_wrn", "trades_wrn")
    if form == "cifar100":
        teach(config.teacher, "trades-wrn-cifar100", "teachers:trades-wrn-cifar100")
        if method == "rslad":
            config.objective.scale = 10.0
    if method == "iad_2":
        teach(config.assistant, "natural-resnet18", "teachers:natural-resnet18")
    config.validate.update(every=10, dense_from=95)
    config.evaluate.attacks = ("fgsm", "pgd-100", "margin-100")
    if form == "original":
        original(config, method)
    if small:
        smoke(config, (32, 32, 3), 10, dict(depth=10, width=4, dtype="float32"))
        config.teacher.update(workdir="", recipe=held(small_teacher("trades")))
        if method == "iad_2":
            config.assistant.update(workdir="", recipe=held(small_teacher("standard")))
    return config


def original(config, method):
    """The settings of the method's own code."""
    config.model = dict(name="resnet", depth=18, dtype="bfloat16")
    config.augment.padding = "zero"
    config.optimizer.weight_decay = 2e-4
    if method == "rslad":
        config.epochs = 300
        config.schedule.boundaries = (215, 260, 285)
        config.validate.attack.update(steps=20, step_size="0.003")
        config.validate.update(every=20, dense_from=215)
        return
    config.schedule.boundaries = (100,)  # at 150 the authors multiply the initial rate again: no change
    config.attack.init = config.validate.attack.init = "uniform_unclipped"
    config.attack_bn = "train"
    config.validate.update(every=1, dense_from=None)
    if method.startswith("iad"):
        config.objective.passes = "code"
        teach(config.teacher, "iad-at-resnet18", "teachers:iad-at-resnet18")
        config.evaluate.attacks = ("fgsm", "pgd-20", "margin-30")
    if method == "iad":
        config.objective.weight_teacher_term = False
    if method == "iad_2":
        teach(config.assistant, "iad-st-resnet18", "teachers:iad-st-resnet18")


def teach(section, workdir, recipe):
    section.workdir = f"runs/{workdir}"
    section.made_by = f"{TRAINED}{recipe} --workdir=runs/{workdir}"


def small_teacher(objective):
    """A teacher for the smoke test."""
    config = base()
    config.title = "teacher"
    config.model = dict(name="wide_resnet", depth=10, width=1)
    config.objective = dict(name=objective)
    if objective == "standard":
        config.attack = None
    else:
        config.attack.update(loss="kl", init="gaussian")
    return smoke(config, (32, 32, 3), 10, {})
