"""The training recipes that have led RobustBench, with their numbers, and four bottleneck methods in one of them.

    python -m ibjax.main --config=configs/leaderboard.py:ROW --workdir=runs/leaderboard/ROW

| ROW                    | what                                                    | clean | AutoAttack |
|------------------------|---------------------------------------------------------|-------|------------|
| **Gowal 2020**         | CIFAR-10, TRADES, average of the weights, SiLU          |       |            |
| gowal2020-70_16        | without further images                                  | 85.29 | 57.20      |
| gowal2020-28_10        | 500,000 pseudo-labelled images of 80M Tiny Images       | 89.48 | 62.80      |
| **Rebuffi 2021**       | CutMix                                                  |       |            |
| rebuffi2021-cutmix     | WRN-28-10, without generated images                     | 86.22 | 57.50      |
| rebuffi2021-28_10      | 1 M images by DDPM                                      | 87.33 | 60.75      |
| rebuffi2021-70_16      |                                                         | 88.54 | 64.25      |
| **Gowal 2021**         | 100 M images by DDPM                                    |       |            |
| gowal2021-28_10        |                                                         | 87.50 | 63.44      |
| gowal2021-70_16        |                                                         | 88.74 | 66.11      |
| **SCORE**              | Pang et al. 2022: squared error, 1 M images by DDPM     |       |            |
| score-28_10            |                                                         | 88.61 | 61.04      |
| score-70_16            |                                                         | 89.01 | 63.35      |
| **Wang 2023**          | images by EDM                                           |       |            |
| wang2023-28_10-1m      | 1 M                                                     | 91.12 | 63.35      |
| wang2023-28_10-20m     | 20 M                                                    | 92.44 | 67.31      |
| wang2023-28_10-50m     | 50 M                                                    | 92.27 | 67.17      |
| wang2023-70_16         | 50 M                                                    | 93.25 | 70.69      |
| **DKL**                | Cui et al. 2023: IKL                                    |       |            |
| dkl-34_10              | without further images, AWP                             | 85.31 | 57.09      |
| dkl-28_10-20m          | 20 M images by EDM                                      | 92.16 | 67.73      |
| **Bartoldson 2024**    |                                                         |       |            |
| bartoldson2024-94_16   | 500 M generated images                                  | 93.68 | 73.71      |
| **Singh 2023**         | ImageNet, l_inf 4/255, ConvStem                         |       |            |
| singh2023-convnext_t   |                                                         | 72.72 | 49.46      |
| singh2023-convnext_s   |                                                         | 74.10 | 52.42      |
| singh2023-convnext_b   |                                                         | 75.90 | 56.14      |
| singh2023-convnext_l   |                                                         | 77.00 | 57.70      |
| singh2023-vit_s        |                                                         | 72.56 | 48.08      |
| singh2023-vit_b        |                                                         | 76.30 | 54.66      |
| **ARES**               | Liu et al. 2023: Swin on ImageNet, l_inf 4/255          |       |            |
| liu2023-swin_s         |                                                         | 76.6  | 55.6       |
| liu2023-swin_b         |                                                         | 76.16 | 56.16      |
| liu2023-swin_l         |                                                         | 78.92 | 59.56      |
| **on Wang's recipe**   | with its 1 M images on WRN-28-10; no published numbers  |       |            |
| wang2023-28_10-1m,ibd  | IBD, taught by Wang et al.'s WRN-70-16                  |       |            |
| wang2023-28_10-1m,ib_rar | IB-RAR, on TRADES                                     |       |            |
| wang2023-28_10-1m,shared_information | shared information                        |       |            |
| wang2023-28_10-1m,siriib | SiRIIB, on TRADES                                     |       |            |

The numbers are RobustBench's (commit 78fcc9e) where it lists the network; those of Gowal et al. 2020, Rebuffi et al.,
Wang et al., Pang et al. and Liu et al. agree with the READMEs of deepmind-research, DM-Improves-AT (b390f25), SCORE
(e82f442) and thu-ml/ares (306e35f). Swin-S's numbers are those of 1,000 images, from the last README. The following are
quoted from memory of the papers' tables and were not checked against a public file: the numbers of rebuffi2021-cutmix,
wang2023-28_10-1m and wang2023-28_10-50m, and batch and epochs of Wang et al.'s rows with more than 1 M images.
docs/recipes.md compares every setting with the paper or its code; docs/leaderboard.md has the cost of every row,
computed by `python docs/leaderboard.py`. `,smoke` shrinks any row; generated images are then left out.

Generated images are read from the file of `data.extra.path`, by default the published file's name in the folder
`generated`: `cifar10_ddpm.npz` of Rebuffi et al., `1m.npz`, `20m.npz` and `50m.npz` of Wang et al. (join the parts of
the larger ones first). The generated images of the rows gowal2020-28_10, gowal2021 and bartoldson2024 are not
published.

Deviations of all rows: checkpoints are selected on 1,000 training images that are held out, by PGD-40 on the margin
every 20 epochs and in the last ones. On ImageNet, only CutMix is used, not MixUp, and RandAugment has fixed magnitudes
and the operations of its paper. In Singh et al.'s rows training starts from random weights, whereas the authors start
from networks trained on clean images; the attack is PGD-2, theirs APGD-2. In Liu et al.'s rows the attack takes its
last iterate, whereas theirs keeps that of the largest loss and has shorter steps in the first five epochs.
"""

from ibjax.config import base, held, parse_arg, smoke

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
NORMALISED = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))  # on ImageNet
DDPM, EDM = "generated/cifar10_ddpm.npz", "generated/{}.npz"

# row -> (depth, width, options of the recipe)
DEEPMIND = {
    "gowal2020-70_16": (70, 16, dict(batch=512)),
    "gowal2020-28_10": (28, 10, dict(extra="generated/ti_500K_pseudo_labeled.npz", cosine=True)),
    "rebuffi2021-cutmix": (28, 10, dict(batch=512, cutmix=True)),
    "rebuffi2021-28_10": (28, 10, dict(extra=DDPM, cutmix=True, cosine=True)),
    "rebuffi2021-70_16": (70, 16, dict(extra=DDPM, cutmix=True, cosine=True)),
    "gowal2021-28_10": (28, 10, dict(extra="generated/ddpm_100m.npz", fraction=0.8, epochs=2000, cosine=True)),
    "gowal2021-70_16": (70, 16, dict(extra="generated/ddpm_100m.npz", fraction=0.8, epochs=2000, cosine=True)),
}
WANG = {
    "score-28_10": (28, 10, dict(extra=DDPM, batch=512, lr=0.2, objective=dict(name="score", beta=3.0))),
    "score-70_16": (70, 16, dict(extra=DDPM, batch=512, lr=0.2, objective=dict(name="score", beta=3.0))),
    "wang2023-28_10-1m": (28, 10, dict(extra=EDM.format("1m"), batch=512, epochs=400)),
    "wang2023-28_10-20m": (28, 10, dict(extra=EDM.format("20m"), fraction=0.8, batch=2048, epochs=2400)),
    "wang2023-28_10-50m": (28, 10, dict(extra=EDM.format("50m"), fraction=0.8, batch=2048, epochs=1600)),
    "wang2023-70_16": (70, 16, dict(extra=EDM.format("50m"), fraction=0.8, batch=1024, epochs=2000)),
    "dkl-28_10-20m": (
        *(28, 10),
        dict(
            extra=EDM.format("20m"),
            fraction=0.8,
            batch=2048,
            epochs=2400,
            objective=dict(name="dkl", alpha=3.0, beta=10.0, attack_beta=0.0),
        ),
    ),
    "bartoldson2024-94_16": (
        *(94, 16),
        dict(extra="generated/pfgmpp_edm_500m.npz", fraction=0.875, batch=2048, epochs=10_000, lr=0.1),
    ),
}
VARIANTS = ("ibd", "ib_rar", "shared_information", "siriib")
CARRIER = "wang2023-28_10-1m"
SINGH = {
    "singh2023-convnext_t": (dict(name="convnext", depth=18, width=96), 300),
    "singh2023-convnext_s": (dict(name="convnext", depth=36, width=96), 50),
    "singh2023-convnext_b": (dict(name="convnext", depth=36, width=128), 300),
    "singh2023-convnext_l": (dict(name="convnext", depth=36, width=192), 100),
    "singh2023-vit_s": (dict(name="vit", depth=12, width=384), 300),
    "singh2023-vit_b": (dict(name="vit", depth=12, width=768), 300),
}
ARES = {  # row -> (depth, width, batch): 64 images, for -L 32, on each of eight cards
    "liu2023-swin_s": (24, 96, 512),
    "liu2023-swin_b": (24, 128, 512),
    "liu2023-swin_l": (24, 192, 256),
}
ROWS = (*WANG, *(f"{CARRIER},{variant}" for variant in VARIANTS), *DEEPMIND, "dkl-34_10", *SINGH, *ARES)


def get_config(arg=None):
    row, small = parse_arg(arg, ROWS)
    config = base()
    config.title = row
    config.evaluate.attacks = ("autoattack",)
    config.validate.attack.update(loss="margin", steps=40)
    name, _, variant = row.partition(",")
    tiny = dict(depth=10, width=1, dtype="float32")
    if name in SINGH:
        tiny = singh(config, *SINGH[name])
    elif name in ARES:
        tiny = ares(config, *ARES[name])
    elif name in DEEPMIND:
        deepmind(config, *DEEPMIND[name])
    elif name in WANG:
        wang(config, *WANG[name])
    else:
        awp(config)
    config.validate.update(every=20, dense_from=config.epochs - 3)
    if variant:
        tiny = bottleneck(config, variant, tiny)
    if small:
        smoke(config, (32, 32, 3), 10, tiny)
        config.smoothing.images = "all"  # there are no generated ones
        config.evaluate.n = None
        if variant == "ibd":
            config.teacher.update(workdir="", recipe=held(small_teacher()))
    return config


def wide(depth, width, **options):
    """The WideResNet of Gowal et al., which all of these but Cui et al.'s without further images have."""
    options = dict(variant="deepmind", activation="silu", mean=MEAN, std=STD) | options
    return dict(name="wide_resnet", depth=depth, width=width, dtype="bfloat16", **options)


def generated(config, extra, fraction):
    if extra:
        config.data.extra = dict(path=extra, fraction=fraction)


def deepmind(config, depth, width, given):
    """Gowal et al. 2020 and 2021, Rebuffi et al. 2021: TRADES, attacked by Adam, on four emulated machines."""
    batch, epochs = given.get("batch", 1024), given.get("epochs", 400)
    config.model = wide(depth, width, bn_groups=4)
    generated(config, given.get("extra"), given.get("fraction", 0.7))
    config.objective = dict(name="trades", beta=6.0)
    config.attack = dict(name="pgd_adam", loss="kl", step_size=0.1, decay=((5, 0.1),), steps=10, init="uniform")
    config.attack_bn, config.bn_statistics = "batch", "adv"
    if given.get("cutmix"):
        config.mix = dict(name="cutmix")
    if given.get("extra"):
        config.smoothing = dict(delta=0.1, form="uniform", images="generated")
    config.batch_size, config.epochs = batch, epochs
    lr = 0.1 * batch / 256
    config.optimizer = dict(name="sgd", lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True, decay_norm=False)
    fall = 10.0 + round(epochs * 2 / 3, 2)  # the authors count the two thirds from the end of the warm-up on
    points = ((0.0, 0.0), (10.0, 1.0), (fall - 0.01, 1.0), (fall, 0.1))
    config.schedule = dict(name="cosine", warmup=10.0) if given.get("cosine") else dict(name="linear", points=points)
    config.ema_decay = 0.995
    config.averaging.warmup = True


def wang(config, depth, width, given):
    """Wang et al. 2023; and what Pang et al., Cui et al. and Bartoldson et al. train as they do."""
    config.model = wide(depth, width)
    generated(config, given["extra"], given.get("fraction", 0.7))
    config.objective = given.get("objective") or dict(name="trades", beta=5.0)
    method = config.objective.name
    config.attack.update(loss="kl" if method == "trades" else "objective", init="uniform")
    config.attack_bn = "batch"
    if method == "dkl":
        config.attack.init, config.attack_bn = "gaussian", "eval"
    config.smoothing = dict(delta=0.0 if method == "score" else 0.1, form="uniform", images="all")
    config.batch_size, config.epochs = given["batch"], given.get("epochs", 400)
    config.optimizer = dict(name="sgd", lr=given.get("lr", 0.2), weight_decay=5e-4, nesterov=True, decay_norm=False)
    config.optimizer.update(momentum=0.95, momentum_at_peak=0.85)  # OneCycleLR's, which replaces the code's 0.9
    config.schedule = dict(name="torch_one_cycle", pct_start=0.025, stepping="epoch")
    config.ema_decay = 0.995
    config.averaging.update(warmup=True, start=0.025 * config.epochs)


def awp(config):
    """Cui et al. 2023 without further images: IKL with a weight perturbation, on the WideResNet of TRADES."""
    config.model = dict(name="wide_resnet", depth=34, width=10, dtype="bfloat16")
    config.objective = dict(name="dkl", alpha=4.0, beta=20.0, attack_beta=0.0)
    config.attack.update(loss="objective", init="gaussian")
    config.perturb = dict(name="awp", gamma=0.005, warmup=9)  # from the tenth epoch on
    config.optimizer.lr = 0.2
    config.schedule = dict(name="cosine", stepping="epoch")
    config.ema_decay = 0.9996
    config.averaging.update(start=150.0, statistics="averaged")


def imagenet(config):
    """What Singh et al. and Liu et al. have in common: AdamW, strong augmentation, eps 4/255."""
    config.data = dict(name="stream", dataset="imagenet2012", size=224, val_size=10_000, split_seed=0)
    # timm's m9 of 10; each operation with probability one half
    config.augment = dict(name="randaugment", operations=2, magnitude=27, probability=0.5)
    config.augment.update(pad=0, flip=False, erase=0.25)
    config.mix = dict(name="cutmix")
    config.smoothing = dict(delta=0.1, form="uniform", images="all")
    config.threat.eps = "4/255"
    config.optimizer = dict(name="adamw", lr=1e-3, weight_decay=0.05)
    config.evaluate.n = 5000


def singh(config, model, epochs):
    """Singh et al. 2023: PGD-2; returns the network of the short form."""
    imagenet(config)
    config.model = dict(**model, stem="convstem", dtype="bfloat16")
    if model["name"] == "vit" and model["width"] == 384:
        config.model.update(NORMALISED)  # of the DeiT that it starts from
    config.attack.update(steps=2, step_size="8/255", init="none")
    config.batch_size, config.epochs = 1024, epochs
    config.optimizer.update(b1=0.9, b2=0.95)
    config.optimizer.update({"decay_bias" if model["name"] == "convnext" else "decay_norm_and_bias": False})
    config.schedule = dict(name="cosine", warmup=20.0 if epochs > 100 else 10.0)
    config.ema_decay = 0.9999
    return dict(blocks=(1, 1), width=8) if model["name"] == "convnext" else dict(depth=1, width=64, stem_width=4)


def ares(config, depth, width, batch):
    """Liu et al. 2023: PGD-3 with steps of 8/255/3; returns the network of the short form."""
    imagenet(config)
    config.model = dict(name="swin", depth=depth, width=width, dtype="bfloat16", **NORMALISED)
    config.attack.update(steps=3, step_size="8/765", init="uniform")
    config.batch_size, config.epochs = batch, 300
    config.optimizer.update(lr=5e-4 * batch / 512, decay_norm_and_bias=False)
    config.schedule = dict(name="cosine", warmup=5.0, final=1e-5)
    config.ema_decay = 0.9998
    return dict(blocks=(2, 1), width=8, heads=2, window=4, dtype="float32")


def bottleneck(config, variant, tiny):
    """One of the four methods in place of TRADES, all else as in the recipe; returns the network of the short form."""
    network = config.model.to_dict()
    match variant:
        case "ibd":
            config.objective = dict(name="ibd", alpha=0.9, beta=0.8)
            config.teacher.workdir = "runs/teacher-wang70_16"
            made_by = "python -m ibjax.convert --torch FILE --robustbench Wang2023Better_WRN-70-16 --workdir {}"
            config.teacher.made_by = made_by.format(config.teacher.workdir)
            config.smoothing.delta = 0.0  # the teacher's labels are smooth
        case "ib_rar":
            config.objective = dict(name="ib_rar", base="trades")
            config.attack.loss = "ce"  # which IB-RAR's form of TRADES takes
        case "shared_information":
            config.model = dict(name="stochastic", backbone=network, latent=320)
            config.objective = dict(name="shared_information")
            config.attack.loss = "ce"
        case "siriib":
            config.model = dict(name="siriib", backbone=network)
            config.objective = dict(name="siriib", base="trades")
    config.attack_bn = "eval"  # as these methods have it
    if variant in ("shared_information", "siriib"):
        more = dict(latent=8) if variant == "shared_information" else dict(scales=(16, 8), widths=(4, 4))
        return dict(backbone=tiny, **more)
    return tiny


def small_teacher():
    """A teacher for the smoke test."""
    config = base()
    config.title = "teacher"
    config.model = wide(10, 1)
    return smoke(config, (32, 32, 3), 10, dict(depth=10, width=1, dtype="float32"))
