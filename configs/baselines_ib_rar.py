"""The baselines of IB-RAR (Tables 1 and 2) with its published code's settings, which are not the methods' own.

    python -m ibjax.main --config=configs/baselines_ib_rar.py:mart --workdir=runs/baselines_ib_rar/mart

Arguments: `pgd` (default) or `mart` on ResNet-18 and CIFAR-10, `wrn-pgd` or `wrn-mart` on WRN-28-10 and CIFAR-100.
`,smoke` shrinks any.

|          | clean | PGD   | FGSM  |
|----------|-------|-------|-------|
| pgd      | 75.05 | 45.21 | 48.60 |
| mart     | 72.96 | 46.17 | 49.19 |
| wrn-pgd  | 39.88 |  9.74 | 16.85 |
| wrn-mart | 39.91 | 12.30 | 17.85 |

Means of three runs, last epoch (`--checkpoint=last`). eps is 0.03, below 8/255 = 0.0314: also evaluate with
`--config.evaluate.eps=8/255`. The code trains without momentum, with a weight decay of 1e-2; its MART weighs the KL
by 0.5, starts its attack uniformly and never drops its rate. It also runs x' through the network once more after each
step, for logging, which moves the running statistics; that is left out here. Cost: 23 (PGD) or 26 forward passes per
image.
"""

from ibjax.config import base, parse_arg, smoke

ROWS = ("pgd", "mart", "wrn-pgd", "wrn-mart")


def get_config(arg=None):
    row, small = parse_arg(arg, ROWS)
    wide = row.startswith("wrn")
    config = base()
    config.title = row
    config.data.dataset = "cifar100" if wide else "cifar10"
    config.model = dict(name="resnet", depth=18, dtype="bfloat16")
    if wide:
        config.model = dict(name="wide_resnet", depth=28, width=10, dtype="bfloat16")
    for attack in (config.attack, config.validate.attack, config.evaluate):
        attack.update(eps="0.03", step_size="0.0069")  # 2.3·eps/steps
    config.batch_size = 100
    config.epochs = 60
    config.optimizer.update(lr=0.01, momentum=0.0, weight_decay=1e-2)
    config.schedule.update(boundaries=(20, 40), factor=0.2)
    config.validate.every = 10
    config.evaluate.attacks = ("fgsm", "pgd-10")
    if row.endswith("mart"):
        config.objective = dict(name="mart", beta=0.5)
        config.schedule = dict(name="constant")
    if small:
        width = 1 if wide else 4
        smoke(config, (32, 32, 3), 100 if wide else 10, dict(depth=10, width=width, dtype="float32"))
    return config
