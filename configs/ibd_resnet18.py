"""IBD, Table 1 of Kuang et al., NeurIPS 2023: PreActResNet-18 on CIFAR-10 or CIFAR-100, taught by a TRADES WRN-34-10.

    python -m ibjax.main --config=configs/ibd_resnet18.py:ROW --workdir=runs/ibd_resnet18-ROW

Rows: `paper` (default) and `cifar100` use the paper's settings; `code` and `cifar100-code` use those of the authors'
code where they differ (α 0.8, features of the teacher on the clean image, 150 epochs). `,smoke` shrinks any of them.

| paper's numbers |      | clean | FGSM  | PGD-100 | CW-100 | AutoAttack |
|-----------------|------|-------|-------|---------|--------|------------|
| CIFAR-10        | best | 83.17 | 60.75 | 55.13   | 53.62  | 52.11      |
|                 | last | 82.95 | 60.94 | 55.04   | 53.49  | 52.05      |
| CIFAR-100       | best | 58.10 | 36.37 | 33.59   | 31.16  | 29.21      |
|                 | last | 58.32 | 36.17 | 33.40   | 30.87  | 28.74      |

AutoAttack and the last checkpoint: `python -m ibjax.evaluate --workdir=DIR [--checkpoint=last] --attacks=autoattack`.
The paper selects checkpoints on the test set; here the default is 1,000 held-out training images. Cost: 26 forward
passes of the student and 2 of the teacher per image; 200 epochs are 200·49,000·(26·1.11 + 2·13.3) GFLOP = 0.54 EFLOP.
"""

from ibjax.config import base, held, parse_arg, smoke

ROWS = ("paper", "code", "cifar100", "cifar100-code")


def get_config(arg=None):
    row, small = parse_arg(arg, ROWS)
    config = base()
    config.title = "IBD PreActResNet-18"
    config.data.dataset = "cifar100" if "cifar100" in row else "cifar10"
    config.augment.padding = "edge"
    config.model = dict(name="preact_resnet", depth=18, dtype="bfloat16")
    config.objective = dict(name="ibd", alpha=0.9, beta=0.8)
    config.attack.update(loss="kl", init="gaussian")
    config.teacher.workdir = "runs/trades_wrn"
    config.teacher.made_by = "python -m ibjax.main --config=trades_wrn --workdir=runs/trades_wrn"
    if "cifar100" in row:
        config.teacher.workdir = "runs/trades-wrn-cifar100"
        made_by = "python -m ibjax.main --config=teachers:{0} --workdir=runs/{0}"
        config.teacher.made_by = made_by.format("trades-wrn-cifar100")
    config.validate.update(every=10, dense_from=95)
    config.evaluate.attacks = ("fgsm", "pgd-100", "margin-100")
    if "code" in row:
        config.objective.update(alpha=0.8, teacher_features="nat", teacher_noise=0.001)
        config.epochs = 150
        config.schedule.boundaries = (100, 125)
    if small:
        smoke(config, (32, 32, 3), 10, dict(depth=10, width=4, dtype="float32"))
        config.teacher.update(workdir="", recipe=held(teacher()))
    return config


def teacher():
    """A teacher for the smoke test: a WideResNet, like the real one."""
    config = base()
    config.title = "teacher"
    config.model = dict(name="wide_resnet", depth=10, width=1)
    config.objective = dict(name="trades")
    config.attack.update(loss="kl", init="gaussian")
    return smoke(config, (32, 32, 3), 10, {})
