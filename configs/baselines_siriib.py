"""The baselines of SiRIIB: training strategies on networks without its module (Figures 5 and 6, Tables 5 to 8).

    python -m ibjax.main --config=configs/baselines_siriib.py:te --workdir=runs/baselines_siriib/te

Arguments: `pgd_at` (default), `trades`, `awp` and `te` on ResNet-18 and CIFAR-10, or with the suffix `-cifar100` on
CIFAR-100; `wrn` (PGD training of a WRN-28-10, Table 5); `tiny` (FGSM training on Tiny-ImageNet, Table 6). `,smoke`
shrinks any of them.

| CIFAR-10 or Tiny-ImageNet    | clean | PGD-20 | PGD-100 | CW-100 | AutoAttack |
|------------------------------|-------|--------|---------|--------|------------|
| pgd_at (Table 8)             | 83.28 | 51.28  | 50.97   | 49.53  | 47.43      |
| pgd_at, l2 eps 0.5 (Table 7) | 83.28 | 62.38  | 61.97   | 60.08  | -          |
| wrn (Table 5)                | 86.78 | 53.68  | 53.48   | 53.22  | 50.92      |
| tiny (Table 6), eps 2/255    | 42.47 | 33.92  | 33.91   | 32.14  | 31.85      |

The other rows are points in figures. For Table 7: `python -m ibjax.evaluate --workdir=runs/baselines_siriib/pgd_at
--norm=l2 --eps=0.5 --step_size=0.1`. Our choices where the paper states nothing: 200 epochs; β 6 for TRADES; γ 0.01 for
AWP on PGD training; TE on PGD training, with an unclipped start of the attack as in the authors' code; for `tiny` an
attack of one step of 1.25·eps from a uniform start. Cost: 23 to 27 forward passes per image; 200 epochs of TE are
200·49,000·24·1.11 GFLOP = 0.26 EFLOP.
"""

from ibjax.config import base, parse_arg, smoke
from ibjax.data import IMAGES

METHODS = ("pgd_at", "trades", "awp", "te")
ROWS = (*METHODS, *(f"{method}-cifar100" for method in METHODS), "wrn", "tiny")


def get_config(arg=None):
    row, small = parse_arg(arg, ROWS)
    method, _, data = row.partition("-")
    data = data or ("tiny_imagenet" if method == "tiny" else "cifar10")
    config = base()
    config.title = row
    config.data.dataset = data
    config.model = dict(name="resnet", depth=18, dtype="bfloat16")
    config.validate.update(every=10, dense_from=95)
    config.evaluate.attacks = ("pgd-20", "pgd-100", "margin-100")
    match method:
        case "trades":
            config.objective = dict(name="trades", beta=6.0)
            config.attack.update(loss="kl", init="gaussian")
        case "awp":
            config.perturb = dict(name="awp", gamma=0.01, warmup=0)
        case "te":
            config.objective = dict(name="te")
            config.attack.update(loss="objective", init="uniform_unclipped")
        case "wrn":
            config.model = dict(name="wide_resnet", depth=28, width=10, dtype="bfloat16")
        case "tiny":
            config.threat.eps = "2/255"
            config.attack.update(step_size="2.5/255", steps=1)
    if small:
        smoke(config, *IMAGES[data], dict(depth=10, width=1 if method == "wrn" else 4, dtype="float32"))
    return config
