"""IB-RAR, Xu, Perin & Picek, DSN-W 2023: the rows of its tables and figures with its own method, and its baselines.

    python -m ibjax.main --config=configs/ib_rar.py:ROW --workdir=runs/ib_rar/ROW
    launch/sweep.sh configs/ib_rar.py runs/ib_rar 'beta-*'          all rows of a kind, one after another

The paper's numbers, means of three runs, last epoch (`python -m ibjax.evaluate --workdir=DIR --checkpoint=last`):

| ROW                    | what                                      | clean | PGD   | CW    | FGSM  | FAB   | NI-FGSM |
|------------------------|-------------------------------------------|-------|-------|-------|-------|-------|---------|
| **Table 1**            | VGG16, CIFAR-10                           |       |       |       |       |       |         |
| vgg16-pgd-base         | PGD                                       | 75.02 | 42.45 | 37.80 | 47.32 | 41.03 | 47.59   |
| vgg16-pgd              | PGD (IB-RAR)                              | 76.22 | 45.09 | 41.83 | 50.53 | 46.22 | 51.93   |
| vgg16-trades-base      | TRADES                                    | 73.44 | 43.92 | 38.28 | 47.94 | 41.64 | 48.41   |
| vgg16-trades           | TRADES (IB-RAR)                           | 80.63 | 44.13 | 41.81 | 51.45 | 43.63 | 51.69   |
| vgg16-mart-base        | MART                                      | 73.52 | 44.64 | 37.58 | 48.73 | 40.56 | 48.95   |
| vgg16-mart             | MART (IB-RAR)                             | 80.54 | 44.34 | 41.45 | 52.19 | 44.72 | 51.93   |
|                        | VGG16, Tiny-ImageNet                      |       |       |       |       |       |         |
| tiny-pgd-base          | PGD                                       | 37.54 | 17.73 | 13.77 | 19.46 | 13.76 | 22.14   |
| tiny-pgd               | PGD (IB-RAR)                              | 40.25 | 18.30 | 14.08 | 20.07 | 14.29 | 22.62   |
| tiny-trades-base       | TRADES                                    | 36.80 | 18.13 | 13.73 | 19.57 | 14.01 | 22.16   |
| tiny-trades            | TRADES (IB-RAR)                           | 39.10 | 18.45 | 14.19 | 20.22 | 14.49 | 22.87   |
| tiny-mart-base         | MART                                      | 34.94 | 17.49 | 13.06 | 18.88 | 13.68 | 21.23   |
| tiny-mart              | MART (IB-RAR)                             | 36.68 | 18.05 | 13.36 | 19.33 | 13.81 | 22.02   |
| **Table 2**            | ResNet-18, CIFAR-10                       |       |       |       |       |       |         |
| resnet18-pgd-base      | PGD                                       | 75.05 | 45.21 | 74.09 | 48.60 | 42.26 | 49.71   |
| resnet18-pgd           | PGD (IB-RAR)                              | 75.10 | 45.55 | 74.10 | 48.83 | 42.74 | 50.03   |
| resnet18-trades-base   | TRADES                                    | 73.04 | 45.91 | 72.16 | 48.51 | 42.59 | 49.92   |
| resnet18-trades        | TRADES (IB-RAR)                           | 73.07 | 46.13 | 72.16 | 48.85 | 42.74 | 50.09   |
| resnet18-mart-base     | MART                                      | 72.96 | 46.17 | 72.00 | 49.19 | 41.62 | 50.34   |
| resnet18-mart          | MART (IB-RAR)                             | 76.85 | 48.92 | 75.78 | 52.52 | 45.01 | 54.72   |
|                        | WRN-28-10, CIFAR-100                      |       |       |       |       |       |         |
| wrn-pgd-base           | PGD                                       | 39.88 |  9.74 | 13.66 | 16.85 | 10.28 | 14.53   |
| wrn-pgd                | PGD (IB-RAR)                              | 37.68 | 16.60 | 15.98 | 19.44 | 14.85 | 19.48   |
| wrn-trades-base        | TRADES                                    | 39.38 | 10.44 | 14.69 | 17.60 | 10.42 | 15.38   |
| wrn-trades             | TRADES (IB-RAR)                           | 36.41 | 19.18 | 16.67 | 20.69 | 16.61 | 21.95   |
| wrn-mart-base          | MART                                      | 39.91 | 12.30 | 14.29 | 17.85 | 11.73 | 16.57   |
| wrn-mart               | MART (IB-RAR)                             | 40.65 | 23.44 | 17.96 | 24.46 | 19.24 | 26.41   |
| **Table 3**            | VGG16, CIFAR-10, no adversarial training  |       |       |       |       |       |         |
| layer-stage1           | the terms of Conv Block 1 only            | 89.32 |  0.04 |       |       |       |         |
| layer-stage2           | Conv Block 2                              | 90.17 |  0.05 |       |       |       |         |
| layer-stage3           | Conv Block 3                              | 90.53 |  0.02 |       |       |       |         |
| layer-stage4           | Conv Block 4                              | 89.66 |  0.01 |       |       |       |         |
| layer-stage5           | Conv Block 5                              | 89.58 |  8.25 |       |       |       |         |
| layer-fc1              | FullyC 1                                  | 91.04 |  9.85 |       |       |       |         |
| layer-fc2              | FullyC 2                                  | 90.97 |  3.27 |       |       |       |         |
| layer-all              | All Layers; Figure 2, IB-RAR(all): 91.97  | 91.96 | 25.61 |       |       |       |         |
| vgg16-l-fc             | Rob. Layers                               | 90.97 | 35.86 |       |       |       |         |
| **Table 4**            | VGG16, no adversarial training            |       |       |       |       |       |         |
| vgg16-ce               | (1) L_CE                                  | 89.99 |  0.10 |       | 11.80 |       |  0.18   |
| vgg16-l                | (2) L                                     | 92.03 | 12.39 |       | 43.49 |       | 13.90   |
| vgg16-x                | (3) L_CE + α Σ I(X, T)                    | 41.69 |  0.16 |       |  9.98 |       |  0.20   |
| vgg16-y                | (4) L_CE − β Σ I(Y, T)                    | 91.50 |  0.06 |       | 31.66 |       |  0.99   |
| vgg16-ce-fc            | (5) L_CE + FC                             | 89.41 |  0.16 |       | 12.89 |       |  0.14   |
| vgg16-l-fc             | (6) L + FC; Figure 2, IB-RAR(rob): 91.33  | 91.50 | 35.86 |       | 55.92 |       | 37.44   |
| resnet18-ce            | (1), ResNet-18                            | 92.19 |  0.00 |       |  5.22 |       |  0.00   |
| resnet18-l             | (2)                                       | 93.32 |  3.85 |       | 40.46 |       |  4.71   |
| resnet18-x             | (3)                                       | 10.00 | 10.00 |       | 10.00 |       | 10.00   |
| resnet18-y             | (4)                                       | 92.75 |  0.00 |       |  8.90 |       |  0.00   |
| resnet18-ce-fc         | (5)                                       | 92.41 |  0.00 |       |  4.26 |       |  0.01   |
| resnet18-l-fc          | (6)                                       | 93.13 |  5.37 |       | 39.34 |       |  6.09   |
| **Figure 2**           | clean accuracy; the attacks are curves    |       |       |       |       |       |         |
| vgg16-hbar             | HBaR; VIB is variational.py:vib-vgg16     | 91.93 |       |       |       |       |         |
| **Section 3.2.1**      | SVHN, single layers                       |       |       |       |       |       |         |
| svhn-ce                | VGG16 "lower than 1%"                     |       |       |       |       |       |         |
| svhn-layer-stage4      |                                           |       |  6.44 |       |       |       |         |
| svhn-layer-stage5      |                                           |       | 16.83 |       |       |       |         |
| svhn-layer-fc1         |                                           |       |  8.97 |       |       |       |         |
| svhn-layer-fc2         |                                           |       |  9.98 |       |       |       |         |
| svhn_resnet18-last     | ResNet-18, "the last layer"               |       |  6.13 |       |       |       |         |
| **Figure 4**           | VGG16, SVHN: does it converge?            |       |       |       |       |       |         |
| svhn-mart-base         | does not converge: stays at 19.587        |       |       |       |       |       |         |
| svhn-mart              | converges; terms in the first epoch only  |       |       |       |       |       |         |
| svhn-pgd-base          | leaves 19.587 after around 30 epochs      |       |       |       |       |       |         |
| svhn-pgd               | leaves 19.587 much earlier                |       |       |       |       |       |         |
| **Figure 6**           | curves only; α = β/10                     |       |       |       |       |       |         |
| beta-vgg16-4.0 … -0.0  | PGD, VGG16                                |       |       |       |       |       |         |
| beta-resnet18-…        | TRADES, ResNet-18                         |       |       |       |       |       |         |
| **Section 3.1.1**      | I(X', T) instead of I(X, T)               |       |       |       |       |       |         |
| vgg16-pgd-adv_input    | more robust to PGD, less to other attacks |       |       |       |       |       |         |

Table 6, adaptive attacks on VGG16 and CIFAR-10, PGD-AD-10 / PGD-AD-100 / PGD-100: plain (IB-RAR) 15.38 / 35.86 /
22.64, AT 45.06 / 42.26 / 44.71, AT (IB-RAR) 45.97 / 45.03 / 45.60. Its first line cannot be right: 35.86 is the PGD-10
accuracy of Table 4, and more attack steps do not increase robust accuracy. To reproduce the table, run
`python -m ibjax.evaluate --workdir=DIR --checkpoint=last
"--attacks=ib_rar-10(count=attacked),ib_rar-100(count=attacked),pgd-scaled-100(count=attacked)"` on the runs of
vgg16-l-fc, vgg16-pgd-base and vgg16-pgd.

Columns: the recipes evaluate FGSM, `pgd-scaled-10` (the code's PGD, in steps of 2.3·eps/10) and NI-FGSM-10 in steps of
2/255. CW and FAB need `"--attacks=cw-l2-200(c=0.1,lr=0.1,count=attacked),fab(steps=10,count=attacked)"`. For the last
checkpoint add `--checkpoint=last`. As in the authors' code, an image counts as robust if it is classified correctly
under attack, even if its clean version is not: `count=attacked`.

All rows above use the settings of the published code, from which the printed numbers presumably come. They differ from
the paper's text, whose settings are in the rows `ROW-paper` (for each row of Tables 1 and 2 without `-base`):

| setting         | published code (ROW)                              | text of the paper (ROW-paper)                 |
|-----------------|---------------------------------------------------|-----------------------------------------------|
| α, β            | 0.008, 0.08                                       | 0.1, 1 for VGG16; 5e-5, 5e-4 for ResNet-18    |
|                 |                                                   | (swapped in print); WRN-28-10: as the code    |
| eps, PGD's step | 0.03 (the ladder adds 8/255), 0.0069 = 2.3·eps/10 | 8/255, 2/255                                  |
| TRADES, MART    | CE-PGD and half of the KL; MART: constant rate    | the original objectives                       |
| channel mask    | on every tenth training batch, never at test      | after training, in attacks and at test too    |

Further settings of the code: SGD without momentum and with a weight decay of 1e-2; without adversarial training
momentum 0.9 and no decay; Gaussian label kernels except for PGD and for the rows with FC. `ROW-paper-base` is the
baseline of `ROW-paper`, without the terms. The mask of `ROW-paper` is made by

    python -m ibjax.analysis.mask --workdir=runs/ib_rar/vgg16-pgd-paper --checkpoint=last --tap=stage5 \
        --out=runs/ib_rar/vgg16-pgd-masked

(with --tap=pre_logits for ResNet-18 and WRN-28-10). The paper's Algorithm 1 also masks every batch in training: this is
the row `vgg16-pgd-algorithm_1`, followed by the same command. `python -m ibjax.analysis.layers` finds robust layers.

Our choices where the paper states nothing: Tables 3 and 4 use the robust layers of VGG16 and all layers of ResNet-18;
Table 3 uses the mask, since its last line is that of Table 4; HBaR is trained with its authors' λ and layers and
IB-RAR's optimiser; the values of β other than 4, 2, 0.02 and 0; svhn-mart has no mask. The CW accuracy of ResNet-18 is
near the natural accuracy because that network ends in a log-softmax, on which the C&W of torchattacks has no gradient.
After each step the authors' code passes x' through the network once more for logging, which updates the running
statistics; we leave this pass out.

Cost: 23 (PGD) or 26 forward passes per image, 3 without adversarial training. 60 epochs of PGD on CIFAR-10 are
60·49,000·23 passes of 0.67 GFLOP (VGG16; 45 PFLOP), 1.11 (ResNet-18; 75) or 10.5 (WRN-28-10; 0.71 EFLOP); on
Tiny-ImageNet 60·99,000·23·2.55 GFLOP = 0.35 EFLOP. `,smoke` shrinks any row.
"""

from ibjax.config import base, parse_arg, smoke

# name -> (data set, shape, classes, masked tap, channels that each of the two mask rules zeroes)
NETWORKS = {
    "vgg16": ("cifar10", (32, 32, 3), 10, "stage5", 10),
    "tiny": ("tiny_imagenet", (64, 64, 3), 200, "stage5", 10),
    "resnet18": ("cifar10", (32, 32, 3), 10, "pre_logits", 20),
    "wrn": ("cifar100", (32, 32, 3), 100, "stage2", 10),
    "svhn": ("svhn_cropped", (32, 32, 3), 10, "stage5", 10),
    "svhn_resnet18": ("svhn_cropped", (32, 32, 3), 10, "pre_logits", 20),
}
BASES = ("pgd", "trades", "mart")
FORMS = ("-base", "", "-paper", "-paper-base")
PUBLISHED = {"vgg16": (0.1, 1.0), "tiny": (0.1, 1.0), "resnet18": (5e-5, 5e-4)}  # α and β of the paper's text
ABLATIONS = ("ce", "l", "x", "y", "ce-fc", "l-fc")
LAYERS = (*(f"stage{i}" for i in range(1, 6)), "fc1", "fc2")
BETAS = {
    "vgg16": ("4.0", "2.0", "1.0", "0.5", "0.2", "0.1", "0.02", "0.0"),
    "resnet18": ("0.5", "0.05", "0.005", "0.0005", "0.00005", "0.0"),
}
ROWS = (
    *(f"{n}-{b}{v}" for n in ("vgg16", "tiny", "resnet18", "wrn") for b in BASES for v in FORMS),
    *(f"layer-{layer}" for layer in (*LAYERS, "all")),
    *(f"{n}-{ablation}" for n in ("vgg16", "resnet18") for ablation in ABLATIONS),
    "vgg16-hbar",
    "svhn-ce",
    *(f"svhn-layer-{layer}" for layer in LAYERS[3:]),
    "svhn_resnet18-last",
    *(f"svhn-{b}{v}" for b in ("mart", "pgd") for v in ("-base", "")),
    *(f"beta-{n}-{beta}" for n, betas in BETAS.items() for beta in betas),
    "vgg16-pgd-adv_input",
    "vgg16-pgd-algorithm_1",
)


def get_config(arg=None):
    row, small = parse_arg(arg, ROWS)
    config = base()
    config.title = row
    name, _, rest = row.partition("-")
    if name == "layer":
        name, rest = "vgg16", row
    elif name == "beta":
        name, _, beta = rest.partition("-")
        rest = "trades" if name == "resnet18" else "pgd"
    network(config, name)
    how, _, variant = rest.partition("-")
    if how in BASES:
        adversarial(config, name, how, variant)
        if row.startswith("beta"):
            config.objective.update(alpha=float(beta) / 10, beta=float(beta))
    elif how == "hbar":
        clean(config)
        layers = ",".join((*LAYERS[:4], "fc1", "fc2"))
        config.objective = dict(name="hbar", base="standard", lambda_x=0.006, lambda_y=0.05, layers=layers)
    else:
        clean(config)
        ablation(config, name, how, variant)
    if small:
        _, shape, classes, _, _ = NETWORKS[name]
        shrunk = {"vgg": dict(depth=11, width=4, hidden=(8, 8)), "wide_resnet": dict(depth=10, width=1)}
        smoke(config, shape, classes, shrunk.get(config.model.name, dict(depth=10, width=8)) | dict(dtype="float32"))
    return config


def network(config, name):
    config.data.dataset = NETWORKS[name][0]
    config.model = dict(name="vgg", depth=16, dtype="bfloat16")
    if name == "wrn":
        config.model = dict(name="wide_resnet", depth=28, width=10, variant="ib_rar", dropout=0.3, dtype="bfloat16")
    elif "resnet18" in name:
        config.model = dict(name="resnet", depth=18, dtype="bfloat16")
    threat(config, "0.03", "0.0069")  # PGD's step in training, 2.3·eps/steps; evaluation uses "pgd-scaled"
    config.batch_size = 100
    config.epochs = 60
    config.optimizer.update(lr=0.01, momentum=0.0, weight_decay=1e-2)
    config.schedule.update(boundaries=(20, 40), factor=0.2)
    config.validate.every = 10
    config.evaluate.update(step_size="2/255", ladder=("8/255",))  # the step of NI-FGSM
    config.evaluate.attacks = counting_attacked("fgsm", "pgd-scaled-10", "nifgsm-10")


def counting_attacked(*names):
    """Attack names with count=attacked: like the published code, they ignore whether the clean image is correct."""
    return tuple(f"{name}(count=attacked)" for name in names)


def threat(config, eps, step_size):
    config.threat.eps = eps
    for attack in (config.attack, config.validate.attack):
        attack.step_size = step_size


def mask(name):
    """The options of the objective for the published code's channel mask."""
    _, _, _, tap, channels = NETWORKS[name]
    return dict(mask_tap=tap, mask_channels=channels)


def adversarial(config, name, how, variant):
    method = {"pgd": "pgd_at"}.get(how, how)
    config.objective = dict(name="ib_rar", base=method)
    if variant in ("paper", "paper-base", "algorithm_1"):
        threat(config, "8/255", "2/255")
        config.evaluate.update(attacks=counting_attacked("fgsm", "pgd-10", "nifgsm-10"), ladder=())
        alpha, beta = PUBLISHED.get(name, (0.008, 0.08))
        config.objective.update(form="original", alpha=alpha, beta=beta)
        if variant == "paper-base":
            config.objective.update(alpha=0.0, beta=0.0)
        if how == "trades":
            config.attack.update(loss="kl", init="gaussian")
        if how == "mart":
            config.attack.init = "gaussian"
            config.objective.robust_weight = 6.0 if name == "wrn" else 5.0
        if variant == "algorithm_1":
            config.objective.update(mask_tap=NETWORKS[name][3], mask_rule="paper", mask_every=1)
        return
    if how == "mart":
        config.schedule = dict(name="constant")
    if variant == "base":
        config.objective.update(alpha=0.0, beta=0.0)
    else:
        config.objective.y_kernel = "linear" if how == "pgd" else "gaussian"
        config.objective.update(dict(until_epoch=1.0) if (name, how) == ("svhn", "mart") else mask(name))
    if variant == "adv_input":
        config.objective.x_input = "adv"


def clean(config):
    """Training without adversarial images, as the published code does it."""
    config.attack = None
    config.optimizer.update(momentum=0.9, weight_decay=0.0)


def ablation(config, name, how, variant):
    """Rows of Tables 3 and 4 and of section 3.2.1: `how` selects the terms, `variant` is a layer or "fc" (mask)."""
    config.objective = dict(name="ib_rar", base="standard", layers="all" if "resnet18" in name else "robust")
    if how in ("ce", "y"):
        config.objective.alpha = 0.0
    if how in ("ce", "x"):
        config.objective.beta = 0.0
    if how == "layer":
        config.objective.layers = variant
    elif how == "last":
        config.objective.layers = "pre_logits"
    if how in ("layer", "last") or variant == "fc":
        config.objective.update(mask(name))
    else:
        config.objective.y_kernel = "gaussian"
