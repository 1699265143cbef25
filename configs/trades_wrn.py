"""TRADES, Zhang et al., ICML 2019: WRN-34-10 on CIFAR-10, the teacher of the IBD recipes.

    python -m ibjax.main --config=configs/trades_wrn.py --workdir=runs/trades_wrn

Arguments: `ibd` (default), the settings of IBD's comparison (8/255, 2/255, weight decay 5e-4, 200 epochs), or
`original` (eps 0.031, step 0.007, weight decay 2e-4, 76 epochs, three forward passes; evaluated as in the authors'
code, by PGD-20 in steps of 0.003). `,smoke` shrinks either. docs/recipes.md compares every setting with the authors'.

| checkpoint                      | clean | PGD-100 | AutoAttack |
|---------------------------------|-------|---------|------------|
| authors' (RobustBench)          | 84.92 | 55.33   | 53.08      |

Cost: 27 forward passes per image; 200 epochs are 200·49,000·27·13.3 GFLOP = 3.5 EFLOP.
"""

from ibjax.config import base, parse_arg, smoke

ROWS = ("ibd", "original")


def get_config(arg=None):
    row, small = parse_arg(arg, ROWS)
    config = base()
    config.title = "TRADES WRN-34-10"
    config.model = dict(name="wide_resnet", depth=34, width=10, dtype="bfloat16")
    config.objective = dict(name="trades", beta=6.0)
    config.attack.update(loss="kl", init="gaussian")
    config.validate.update(every=10, dense_from=95)
    config.evaluate.attacks = ("fgsm", "pgd-100", "margin-100")
    if row == "original":
        config.objective.passes = "clean,adv,clean"
        config.threat.eps = "0.031"
        config.attack.step_size = "0.007"
        config.evaluate.update(attacks=("pgd-20",), step_size="0.003")
        config.optimizer.weight_decay = 2e-4
        config.epochs = 76
        config.schedule.boundaries = (74, 89, 99)  # the authors count epochs from 1
        config.validate.dense_from = 70
    if small:
        smoke(config, (32, 32, 3), 10, dict(depth=10, width=1, dtype="float32"))
    return config
