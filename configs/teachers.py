r"""The teachers of the IBD recipes (Kuang et al., NeurIPS 2023), except the TRADES WRN-34-10 (configs/trades_wrn.py).

    python -m ibjax.main --config=configs/teachers.py:ROW --workdir=runs/ROW

| ROW                 | what                                       | in                   | paper's clean | AutoAttack |
|---------------------|--------------------------------------------|----------------------|---------------|------------|
| trades-awp-resnet18 | TRADES + AWP, PreActResNet-18              | Tables 7, 8          | 84.09         | 48.71      |
| trades-awp-resnet34 | TRADES + AWP, PreActResNet-34              | Table 8              | 85.94         | 50.57      |
| trades-wrn-cifar100 | TRADES, WRN-34-10 on CIFAR-100             | Tables 1, 2          | 57.16         | 26.78      |
| natural-resnet18    | undefended PreActResNet-18                 | Table 6, IAD-II      |               |            |
| sat-resnet18        | PGD training, PreActResNet-18              | Table 3's surrogate  |               |            |
| iad-at-resnet18     | PGD training, ResNet-18, with the settings | distillation.py:     |               |            |
|                     | of IAD's code (Zhu et al., ICLR 2022)      | iad-original         |               |            |
| iad-st-resnet18     | the same without attacks                   | iad_2-original       |               |            |

`,smoke` shrinks any row. docs/recipes.md compares every setting with the papers and their code. The paper's CIFAR-100
teacher is trained "with a way of TRADES and AWP" and not published; ours is trained by TRADES with our settings. The
paper's larger teachers come from RobustBench:

| RobustBench                         | architecture            | in      | clean | AutoAttack |
|-------------------------------------|-------------------------|---------|-------|------------|
| Gowal2020Uncovering_34_20           | WRN-34-20               | Table 8 | 85.65 | 56.82      |
| Rebuffi2021Fixing_70_16_cutmix_ddpm | WRN-70-16 ("WRN-76-10") | Table 8 | 88.54 | 64.25      |
| Salman2020Do_R50                    | ResNet-50, ImageNet     | Table 2 | 64.02 | 34.96      |

    python -m ibjax.convert --torch FILE --arch dm_wide_resnet --clean_acc 85.65 --workdir runs/teacher-wrn34_20
    python -m ibjax.convert --torch FILE --arch dm_wide_resnet --clean_acc 88.54 --workdir runs/teacher-wrn70_16
    python -m ibjax.convert --torch FILE --arch imagenet_resnet --clean_acc 64.02 --workdir runs/teacher-resnet50 \
        --config.data.name=stream --config.data.dataset=imagenet2012 --config.data.val_size=10000

docs/teachers.md gives details. The paper names only the last of them; we identified the others by their accuracies.

Cost of 200 epochs: 200·49,000·27·1.11 GFLOP = 0.29 EFLOP for ResNet-18, with AWP (33 passes instead of 27) 0.36; twice
that for ResNet-34, twelve times that for WRN-34-10; 0.03 EFLOP for the undefended network.
"""

from ibjax.config import base, parse_arg, smoke

ROWS = (
    *("trades-awp-resnet18", "trades-awp-resnet34", "trades-wrn-cifar100", "natural-resnet18", "sat-resnet18"),
    *("iad-at-resnet18", "iad-st-resnet18"),
)


def get_config(arg=None):
    row, small = parse_arg(arg, ROWS)
    config = base()
    config.title = row
    config.data.dataset = "cifar100" if "cifar100" in row else "cifar10"
    config.augment.padding = "edge"
    config.model = dict(name="preact_resnet", depth=34 if "resnet34" in row else 18, dtype="bfloat16")
    if "wrn" in row:
        config.model = dict(name="wide_resnet", depth=34, width=10, dtype="bfloat16")
    if "trades" in row:
        config.objective = dict(name="trades", beta=6.0)
        config.attack.update(loss="kl", init="gaussian")
    if "awp" in row:
        config.perturb = dict(name="awp", gamma=0.005, warmup=9)  # from the tenth epoch on
    if row in ("natural-resnet18", "iad-st-resnet18"):
        config.objective = dict(name="standard")
        config.attack = None
    if row == "sat-resnet18":
        config.objective = dict(name="pgd_at", passes="clean,adv")
        config.seed = 1  # a surrogate must not share randomness with the attacked network
    config.validate.update(every=10, dense_from=95)
    config.evaluate.attacks = ("fgsm", "pgd-100", "margin-100")
    if row.startswith("iad"):
        config.model.name = "resnet"
        config.augment.padding = "zero"
        config.optimizer.weight_decay = 2e-4
        config.schedule.boundaries = (99, 149)  # the authors count epochs from 1
        config.validate.update(every=1, dense_from=None)
    if small:
        shrunk = dict(depth=10, width=1) if "wrn" in row else dict(depth=10, width=4)
        smoke(config, (32, 32, 3), 10, dict(dtype="float32", **shrunk))
    return config
