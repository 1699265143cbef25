"""The baselines of the shared-information paper (Yu et al., MERL TR2022-141), with the settings of its Tables 2 and 3.

    python -m ibjax.main --config=configs/baselines_shared.py:mart --workdir=runs/baselines_shared/mart

Arguments (`,smoke` shrinks any of them):

- a METHOD, on ResNet-18 and CIFAR-10: `standard` (default; the paper's name for PGD training), `trades`, `mart`, `mma`;
- `mnist-METHOD` (four-layer CNN), `wrn-METHOD` and `wrn100-METHOD` (WRN-34-10 on CIFAR-10 and CIFAR-100, without MMA);
- `trades_beta-VALUE` and `mart_beta-VALUE`: the trade-off of natural and robust accuracy in Figure 3 (β from 0.1 to 30;
  the values in between are ours);
- `ara-standard`, `ara-trades` and `ara-mart`: trained and tested with representation attacks.

| last epoch, natural / PGD-20 / PGD-40 / AA | MNIST                         | ResNet-18                     |
|--------------------------------------------|-------------------------------|-------------------------------|
| Standard                                   | 99.16 / 96.25 / 95.54 / 90.59 | 82.59 / 49.55 / 47.58 / 42.11 |
| TRADES                                     | 99.14 / 97.85 / 96.44 / 92.90 | 81.83 / 53.38 / 52.04 / 49.54 |
| MMA                                        | 99.12 / 97.35 / 95.89 / 91.02 | 82.28 / 51.66 / 49.15 / 42.44 |
| MART                                       | 99.28 / 98.10 / 96.75 / 92.60 | 81.57 / 55.14 / 53.07 / 50.60 |

|          | WRN-34-10, CIFAR-10           | WRN-34-10, CIFAR-100          |
|----------|-------------------------------|-------------------------------|
| Standard | 86.21 / 52.31 / 50.58 / 47.04 | 60.11 / 24.92 / 23.93 / 21.58 |
| TRADES   | 85.73 / 55.15 / 53.55 / 51.20 | 56.97 / 26.87 / 25.93 / 24.50 |
| MART     | 85.99 / 56.66 / 54.35 / 53.20 | 57.72 / 30.27 / 29.29 / 27.10 |

| Table 7: under ARA of 10 and 20 steps with σ | 10, 5 | 10, 10 | 10, 15 | 20, 5 | 20, 10 | 20, 15 |
|----------------------------------------------|-------|--------|--------|-------|--------|--------|
| ara-standard                                 | 73.54 | 65.83  | 53.65  | 73.54 | 64.17  | 49.48  |
| ara-trades                                   | 73.20 | 66.86  | 56.78  | 71.58 | 65.73  | 51.46  |
| ara-mart                                     | 75.24 | 68.20  | 58.35  | 74.96 | 66.00  | 57.13  |

| Table 11, stopped early: natural / PGD-20 / PGD-40 / AA | CIFAR-10                      |
|---------------------------------------------------------|-------------------------------|
| `standard`, its epoch not given                         | 82.12 / 49.77 / 48.25 / 43.71 |
| `trades` with `--config.epochs=76`                      | 81.59 / 53.21 / 52.95 / 50.18 |
| `mma` with `--config.epochs=76`                         | 81.78 / 52.21 / 48.85 / 43.61 |
| `mart` with `--config.epochs=91`                        | 82.23 / 55.32 / 54.15 / 52.31 |

The numbers are means of three runs. Evaluate the last epoch with `--checkpoint=last`. The paper's AA is not the
standard AutoAttack but APGD-CE, untargeted APGD-DLR, FAB and Square. Where its tables and text differ, we follow the
text: ten attack steps on CIFAR-10, twenty on CIFAR-100. Our choices where the paper states nothing: Standard trains
with the settings of TRADES; MMA's last learning rate is 0.03 (the table says 0.003, MMA's own code 0.03 and 0.009).
Cost: 23 to 27 forward passes per image (twenty more on CIFAR-100), 38 with MMA; 120 epochs of MART on ResNet-18 are
120·49,000·26·1.11 GFLOP = 0.17 EFLOP.
"""

from ibjax.config import base, parse_arg, smoke
from ibjax.runs.recipe_files import beside

shared = beside(__file__, "shared_information.py")  # the settings of the paper's own method
CIFAR = ("standard", "trades", "mart")
BETAS = ("0.1", "0.3", "1.0", "2.0", "4.0", "10.0", "20.0", "30.0")  # the main rows use 6 for TRADES and 5 for MART
ROWS = (
    *CIFAR,
    "mma",
    *(f"mnist-{m}" for m in (*CIFAR, "mma")),
    *(f"{d}-{m}" for d in ("wrn", "wrn100") for m in CIFAR),
    *(f"ara-{m}" for m in CIFAR),
    *(f"{m}_beta-{beta}" for m in ("trades", "mart") for beta in BETAS),
)


def get_config(arg=None):
    row, small = parse_arg(arg, ROWS)
    chosen, _, beta = row.partition("_beta-")
    setting, _, method = chosen.rpartition("-")
    config = base()
    config.title = row
    if setting == "mnist":
        shared.mnist_settings(config)
    else:
        shared.cifar_settings(config, setting)
        config.optimizer.weight_decay = 2e-4
        config.schedule.boundaries = (75, 90)
    config.objective = dict(name="pgd_at")
    match method:
        case "trades":
            config.objective = dict(name="trades", beta=1.0 if setting == "mnist" else 6.0)
            config.attack.update(loss="kl", init="gaussian")
        case "mart":
            config.objective = dict(name="mart", beta=6.0 if setting.startswith("wrn") else 5.0)
            config.attack.update(init="gaussian")
            mart(config, setting)
        case "mma":
            mma(config, setting)
    if beta:
        config.objective.beta = float(beta)
    if setting == "ara":
        config.attack = None
        config.objective = dict(name="ara", base=config.objective.to_dict())
        config.evaluate.update(shared.ARA)
    if small:
        smoke(config, *shared.small_form(setting))
    return config


def mart(config, setting):
    if setting == "mnist":
        config.epochs = 50
        config.schedule.boundaries = (20, 40)
    else:
        config.optimizer.weight_decay = 3.5e-4


def mma(config, setting):
    config.attack = None
    if setting == "mnist":
        config.objective = dict(name="mma", max_eps="0.45", min_eps="0.1", steps=40)
        config.optimizer = dict(name="adam", lr=1e-4, weight_decay=5e-4)
        config.epochs = 50
        config.schedule = dict(name="constant")
    else:
        config.objective = dict(name="mma", max_eps="12/255", min_eps="0.005")
        config.optimizer.lr = 0.3
        config.schedule = dict(name="piecewise", boundaries=(75, 90), factor=(0.3, 1 / 3))
