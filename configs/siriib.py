"""SiRIIB: Li et al., "Singular Regularization with Information Bottleneck Improves Model's Adversarial Robustness".

    python -m ibjax.main --config=configs/siriib.py:ROW --workdir=runs/siriib/ROW
    launch/sweep.sh configs/siriib.py runs/siriib 'lam-*'                      all rows of a kind, one after another

The paper's numbers:

| ROW            | what                                         | clean | PGD-20 | PGD-100 | CW-100 | AutoAttack |
|----------------|----------------------------------------------|-------|--------|---------|--------|------------|
| pgd_at         | ResNet-18-SR, PGD-AT, CIFAR-10               | 83.27 | 52.53  |         |        | 48.41      |
| **Table 1**    | number of p_i at λ₁ = 1                      |       |        |         |        |            |
| connections-1  |                                              | 82.53 |        |         |        | 48.03      |
| connections-2  |                                              | 83.31 |        |         |        | 47.80      |
| lam-1          | 3                                            | 83.07 |        |         |        | 48.05      |
| connections-4, connections-5 | "will not converge"            |       |        |         |        |            |
| **Table 2**    | λ₁ with three p_i                            |       |        |         |        |            |
| lam-1          |                                              | 83.07 |        |         |        | 48.05      |
| lam-1.5        |                                              | 82.84 |        |         |        | 48.16      |
| lam-3          |                                              | 82.84 |        |         |        | 48.21      |
| lam-5          |                                              | 83.00 |        |         |        | 48.36      |
| pgd_at         | 20                                           | 83.27 |        |         |        | 48.41      |
| lam-30         |                                              | 82.99 |        |         |        | 48.35      |
| lam-0          | without L_svd and L_info (section 4.2): "will not converge to stable conditions" | | | | |    |
| **Figure 5**   | `pgd_at`, `trades`, `awp`, `te` on CIFAR-10  |       |        |         |        |            |
| **Figure 6**   | the same on CIFAR-100: suffix `-cifar100`    |       |        |         |        |            |
| **Table 5**    | PGD-AT                                       |       |        |         |        |            |
| wrn            | WRN-28-10-SR                                 | 86.74 | 54.30  | 53.90   | 52.99  | 50.94      |
| wrn-l          | WRN-28-10-SR-L                               | 86.66 | 54.26  | 53.93   | 53.40  | 51.22      |
| wrn-xl         | WRN-28-10-SR-XL                              | 86.91 | 54.55  | 54.25   | 53.90  | 51.53      |
| **Table 6**    | Tiny-ImageNet, FGSM-AT, eps 2/255            |       |        |         |        |            |
| tiny           | ResNet-18-SR                                 | 43.52 | 34.96  | 34.97   | 33.25  | 32.85      |
| **Table 7**    | l2, eps 0.5                                  |       |        |         |        |            |
| pgd_at         | ResNet-18-SR                                 | 83.27 | 62.88  | 62.44   | 60.65  |            |
| **Table 8**    | SR trained beside a plain ResNet-18          |       |        |         |        |            |
| isolated       | x or x' classified                           | 83.28 | 51.28  | 50.97   | 49.53  | 47.43      |
|                | x_avg of the same x or x'                    | 80.95 | 52.80  | 52.76   | 61.44  | 54.65      |

After `python -m ibjax.main`, on its workdir:

- Table 4: `python -m ibjax.evaluate --workdir=runs/siriib/pgd_at --attacks=pgd-20,siriib-svd-20,siriib-info-20,
  siriib-ce-svd-20,siriib-ce-info-20,siriib-20`: 52.53, 82.64, 83.11, 52.56, 52.51 and 52.61.
- Table 7: `python -m ibjax.evaluate --workdir=runs/siriib/pgd_at --norm=l2 --eps=0.5 --step_size=0.1
  --attacks=pgd-20,pgd-100,margin-100`.
- Table 8: `python -m ibjax.analysis.calibration --workdir=runs/siriib/isolated`. The paper's attacks do not know of the
  SR modules; the command also attacks through them.
- Table 9: `python -m ibjax.analysis.corruptions --workdir=runs/siriib/isolated --data_dir=DIR`, and with
  `--calibrated`. The paper's means over the twelve corruptions, without and with SR: 69.51 and 70.93.
- Table 3: `python -m ibjax.analysis.complexity --config=configs/siriib.py:ROW`.

Where the paper's text is ambiguous, the alternatives are options: `--config.model.fourier=amp_phase` or `reim`,
`--config.model.fuse=concat`, `--config.model.penalty=full`, `--config.objective.distance=l2_per_image` or `fro_batch`.
In all rows the gradient of L_info flows to the clean f_i. `--config.objective.info_stop=True` makes them a fixed
target; training may then diverge (see ibjax/objectives/siriib.py).

Our choices where the paper states nothing: λ₁ = 1 for `isolated`; 200 epochs; β 6 for TRADES; γ 0.01 for AWP on PGD
training; TE on PGD training, with an unclipped start of the attack as in the authors' code; for `tiny` an attack of one
step of 1.25·eps from a uniform start. Of the values of λ₁ in Table 2, the text names 1 and 20; the others are those of
Figure 4, and 30.

Cost: 1.3 times the operations of configs/baselines_siriib.py. A forward pass of ResNet-18-SR takes 1.47 GFLOP, so that
200 epochs of PGD-AT are 200·49,000·23·1.47 GFLOP = 0.33 EFLOP; `wrn` takes 2.5, `wrn-l` 3.0 and `wrn-xl` 3.4 EFLOP. The
singular value decompositions of 6 matrices of 32×32 per image come on top (`benchmarks/information.py`).
"""

from ibjax.config import base, parse_arg, smoke
from ibjax.data import IMAGES

METHODS = ("pgd_at", "trades", "awp", "te")
LAMS = ("0", "1", "1.5", "3", "5", "30")
CONNECTIONS = ("1", "2", "4", "5")
# the function c of SiRIIB on WRN-28-10: convolutions, or a number of basic blocks
EXTRACTORS = {"wrn": {}, "wrn-l": dict(widths=(160,) * 2), "wrn-xl": dict(widths=(160,) * 4)}
ROWS = (
    *METHODS,
    *(f"{method}-cifar100" for method in METHODS),
    *(f"lam-{value}" for value in LAMS),
    *(f"connections-{value}" for value in CONNECTIONS),
    *EXTRACTORS,
    "tiny",
    "isolated",
)


def get_config(arg=None):
    row, small = parse_arg(arg, ROWS)
    kind, _, value = row.partition("-")
    data = "tiny_imagenet" if row == "tiny" else "cifar100" if value == "cifar100" else "cifar10"
    config = base()
    config.title = f"SiRIIB {row}"
    config.data.dataset = data
    config.model = dict(name="siriib", backbone=dict(name="resnet", depth=18, dtype="bfloat16"))
    config.objective = dict(name="siriib", base=kind if kind in ("trades", "te") else "pgd_at", lam=20.0)
    config.validate.update(every=10, dense_from=95)
    config.evaluate.attacks = ("pgd-20", "pgd-100", "margin-100", "autoattack")
    match kind:
        case "trades":
            config.attack.update(loss="kl", init="gaussian")
        case "te":
            config.attack.update(loss="objective", init="uniform_unclipped")
        case "awp":
            config.perturb = dict(name="awp", gamma=0.01, warmup=0)
        case "lam":
            config.objective.lam = float(value)
        case "connections":
            config.objective.lam = 1.0
            config.model.connections = int(value)
        case "wrn":
            backbone = dict(name="wide_resnet", depth=28, width=10, dtype="bfloat16")
            config.model = dict(name="siriib", backbone=backbone, basic_blocks=bool(value), **EXTRACTORS[row])
        case "tiny":
            config.threat.eps = "2/255"
            config.attack.update(step_size="2.5/255", steps=1)
        case "isolated":
            config.objective.lam = 1.0
            config.model.connections = 0
    if small:
        backbone = dict(depth=10, width=1 if kind == "wrn" else 4, dtype="float32")
        smoke(config, *IMAGES[data], dict(backbone=backbone, scales=(16, 8), widths=(4, 4)))
    return config
