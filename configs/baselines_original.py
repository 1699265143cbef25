"""Baselines with the settings of their own papers, where papers that compare with them use other settings.

    python -m ibjax.main --config=configs/baselines_original.py:mart --workdir=runs/baselines_original/mart

| argument                       | method and network                                                                  |
|--------------------------------|-------------------------------------------------------------------------------------|
| sat (default)                  | Rice et al. 2020: PreActResNet-18, attack in training mode                          |
| awp, trades_awp                | Wu et al. 2020: PreActResNet-18, γ 0.01; WRN-34-10, γ 0.005, AutoAttack 56.17       |
| mart, mart_wrn                 | Wang et al. 2020: ResNet-18, λ 5; WRN-34-10, λ 6                                    |
| mma, mma_20, mma_32, mma_mnist | Ding et al. 2020: WRN-28-4, d_max 12, 20 or 32/255; CNN, d_max 0.45                 |
| te, te_trades                  | Dong et al. 2022: ResNet-18                                                         |
| fast_at, fast_at_mnist         | Wong et al. 2020: PreActResNet-18, 15 epochs; CNN, 10 epochs at eps 0.3             |
| label_smoothing                | Pang et al. 2021: PreActResNet-18, δ 0.1                                            |
| hbar, hbar_natural             | Wang et al. 2021: ResNet-18, PGD training 83 epochs; without attacks 300            |
| hbar_mnist, hbar_natural_mnist | the same on the CNN, 100 epochs                                                     |
| alp                            | Kannan et al. 2018, who have no CIFAR-10: the defaults of ibjax.config              |

`,smoke` shrinks any of them. The settings are those of each paper's own code; docs/recipes.md lists them side by side,
with our deviations and their reasons. All these papers select checkpoints on the test set; here the default is 1,000
held-out training images. An incomplete last batch of an epoch is left out. Fast-AT on ImageNet is
`ibd_imagenet.py:fast_at-4`.

Cost in forward passes per image and step: 24 sat, 26 mart, 38 mma, 24 te, 5 fast_at, 26 hbar, 3 hbar_natural. Fast-AT
takes 15·49,000·5·1.11 GFLOP = 4.1 PFLOP, MART on ResNet-18 120·49,000·26·1.11 GFLOP = 0.17 EFLOP.
"""

from functools import partial

from ibjax.config import base, parse_arg, smoke


def get_config(arg=None):
    row, small = parse_arg(arg, ROWS)
    config = base()
    config.title = row
    config.data.dataset = "mnist" if row.endswith("mnist") else "cifar10"
    config.model = dict(name="preact_resnet", depth=18, dtype="bfloat16")
    config.validate.update(every=10, dense_from=95)
    RECIPES[row](config)
    if small:
        narrow = dict(depth=10, width=1 if config.model.name == "wide_resnet" else 4, dtype="float32")
        shape, narrow = ((28, 28, 1), NARROW_CNN) if config.model.name == "cnn" else ((32, 32, 3), narrow)
        smoke(config, shape, 10, narrow)
    return config


CIFAR10 = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616))  # as in Rice, Wong, Wu and Pang et al.
NARROW_CNN = dict(widths=((2,), (4,)), hidden=(8,))


def threat(config, eps, step_size):
    """Sets the threat model, and the same step size in training, selection and evaluation."""
    config.threat.eps = eps
    for section in (config.attack, config.validate.attack, config.evaluate):
        section.step_size = step_size


def wide(config, depth, width):
    config.model = dict(name="wide_resnet", depth=depth, width=width, dtype="bfloat16")


def mnist(config):
    config.augment.update(pad=0, flip=False)
    config.model = dict(name="cnn")
    threat(config, eps="0.3", step_size="0.01")
    config.attack.steps = config.validate.attack.steps = 40
    config.validate.update(every=1, dense_from=None)


def sat(config):
    config.model.update(CIFAR10)
    config.augment.padding = "reflect"
    config.attack_bn = "train"
    config.objective = dict(name="pgd_at", passes="adv,adv,clean")
    config.schedule.stepping = "next_step"
    config.evaluate.attacks = ("pgd-10",)


def awp(config):
    sat(config)
    config.perturb = dict(name="awp", gamma=0.01, warmup=0)
    config.validate.attack.steps = 20
    config.evaluate.attacks = ("pgd-20",)


def trades_awp(config):
    wide(config, 34, 10)
    config.objective = dict(name="trades", beta=6.0, passes="adv,clean,clean")
    config.attack.update(loss="kl", init="gaussian")
    config.schedule.boundaries = (99, 149)  # the authors count epochs from 1
    config.perturb = dict(name="awp", gamma=0.005, warmup=9)  # starts in the tenth epoch


def mart(config):
    config.model = dict(name="resnet", depth=18, dtype="bfloat16")
    threat(config, eps="0.031", step_size="0.007")
    config.objective = dict(name="mart", beta=5.0)
    config.attack.init = "gaussian"
    config.optimizer.update(lr=0.01, weight_decay=3.5e-3)
    config.epochs = 120
    config.schedule.boundaries = (74, 89, 99)  # the authors count epochs from 1
    config.validate.dense_from = 70
    config.validate.attack.update(steps=20, step_size="0.003")
    config.evaluate.update(attacks=("pgd-20",), step_size="0.003")


def mart_wrn(config):
    mart(config)
    wide(config, 34, 10)
    config.objective.beta = 6.0
    config.optimizer.update(lr=0.1, weight_decay=7e-4)
    config.epochs = 90
    for section in (config.validate.attack, config.evaluate):
        section.step_size = "0.0031"


def mma(config, max_eps):
    wide(config, 28, 4)
    config.model.standardize = True
    config.augment.padding = "reflect"
    config.attack = None
    config.objective = dict(name="mma", max_eps=max_eps)
    config.data.val_size = 5000
    config.optimizer.update(lr=0.3, weight_decay=2e-4)
    config.epochs = 142  # 50,000 steps, 351 per epoch; the rate drops at 20, 30 and 40 thousand
    config.schedule = dict(name="piecewise", boundaries=(57, 85.5, 114), factor=(0.3, 1 / 3, 0.3), stepping="step")
    config.validate.update(every=5, dense_from=None)
    config.evaluate.attacks = ("pgd-100(restarts=5)", "margin-100(restarts=5)")


def mma_mnist(config):
    mnist(config)
    config.attack = None
    config.objective = dict(name="mma", max_eps="0.45", min_eps="0.1", steps=40)
    config.data.val_size = 5000
    config.batch_size = 50
    config.optimizer = dict(name="adam", lr=1e-4)
    config.epochs = 91  # 100,000 steps
    config.schedule = dict(name="constant")
    config.evaluate.update(attacks=("pgd-100(restarts=5)", "margin-100(restarts=5)"), step_size="0.0075")


def te(config, base="pgd_at"):
    config.model = dict(name="resnet", depth=18, dtype="bfloat16")
    config.objective = dict(name="te", base=base)
    config.attack.update(loss="objective", init="gaussian" if base == "trades" else "uniform_unclipped")
    config.validate.attack.init = "uniform_unclipped"
    config.validate.update(every=1, dense_from=None)
    config.evaluate.attacks = ("pgd-10",)


def fast_at(config):
    config.model.update(projection="raw", **CIFAR10)
    config.attack.update(steps=1, step_size="10/255")
    config.attack_bn = "train"
    config.epochs = 15
    config.optimizer.update(lr=0.2, momentum_at_peak=0.8)
    config.schedule = dict(name="one_cycle", peak=0.5)
    config.validate.update(every=1, dense_from=None, stop_on_overfitting=True)
    config.validate.attack.steps = 5
    config.evaluate.attacks = ("pgd-50(restarts=10)",)


def fast_at_mnist(config):
    mnist(config)
    config.attack.update(steps=1, step_size="0.375", init="uniform_unclipped")
    config.attack_bn = "train"
    config.batch_size = 100
    config.epochs = 10
    config.optimizer = dict(name="adam", lr=5e-3)
    config.schedule = dict(name="one_cycle", peak=0.4, stepping="next_step")
    config.evaluate.attacks = ("pgd-50(restarts=10)",)


def label_smoothing(config):
    config.model.update(CIFAR10)
    config.augment.padding = "reflect"
    config.objective = dict(name="label_smoothing", delta=0.1, passes="adv,clean,clean")
    config.epochs = 110
    config.schedule.update(boundaries=(100, 105), stepping="next_step")
    config.evaluate.attacks = ("pgd-10",)


def hbar(config, lambdas=(0.0005, 0.005), epochs=83):
    config.model = dict(name="resnet", depth=18, dtype="bfloat16")
    lambda_x, lambda_y = lambdas
    config.objective = dict(name="hbar", base="pgd_at", lambda_x=lambda_x, lambda_y=lambda_y)
    config.optimizer = dict(name="adam", lr=0.01)
    config.epochs = epochs
    config.schedule = dict(name="cosine", final=4e-8, stepping="next_step")
    config.validate.update(every=1, dense_from=None)
    config.evaluate.attacks = ("fgsm", "pgd-10", "pgd-20")


def hbar_natural(config):
    hbar(config, (0.006, 0.05), epochs=300)
    config.objective.base = "standard"
    config.attack = None


def hbar_mnist(config, lambdas=(0.003, 0.001)):
    hbar(config, lambdas, epochs=100)
    mnist(config)
    config.batch_size = 256
    config.optimizer.lr = 1e-4
    config.schedule = dict(name="piecewise", boundaries=(65, 90), factor=0.5, stepping="next_step")
    config.evaluate.attacks = ("fgsm", "pgd-40")


def hbar_natural_mnist(config):
    hbar_mnist(config, (1.0, 50.0))
    config.objective.base = "standard"
    config.attack = None


def alp(config):
    config.objective = dict(name="alp", pairing=0.5)


RECIPES = {
    **{f.__name__: f for f in (sat, awp, trades_awp, mart, mart_wrn)},
    **{f"mma{name}": partial(mma, max_eps=eps) for name, eps in (("", "12/255"), ("_20", "20/255"), ("_32", "32/255"))},
    **{f.__name__: f for f in (mma_mnist, te, fast_at, fast_at_mnist, label_smoothing, alp)},
    **{f.__name__: f for f in (hbar, hbar_natural, hbar_mnist, hbar_natural_mnist)},
    "te_trades": partial(te, base="trades"),
}
ROWS = tuple(RECIPES)
