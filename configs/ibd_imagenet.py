"""FAST-IBD and its baselines, Table 5 of Kuang et al., NeurIPS 2023: ResNet-50 on ImageNet-1k, one-step attacks with
eps 2/255 or 4/255, taught by the ResNet-50 of Salman et al.

    python -m ibjax.main --config=configs/ibd_imagenet.py:ROW --workdir=runs/ibd_imagenet/ROW

| ROW        | eps   | paper's clean | PGD-100 | AutoAttack |
|------------|-------|---------------|---------|------------|
| fast_at-2  | 2/255 | 65.95         | 37.52   | 35.22      |
| rslad-2    | 2/255 | 63.64         | 40.49   | 38.35      |
| fast_ibd-2 | 2/255 | 62.03         | 44.31   | 40.94      |
| fast_at-4  | 4/255 | 60.16         | 27.46   | 24.82      |
| rslad-4    | 4/255 | 60.64         | 30.19   | 26.53      |
| fast_ibd-4 | 4/255 | 59.10         | 31.52   | 27.74      |

FAST-IBD has no published code or settings. Our settings:

- the attack of Fast-AT (Wong, Rice & Kolter, ICLR 2020): one step of 1.25·eps from a uniform start, away from the
  teacher's prediction;
- the outputs of the four stages as features; α 0.9, β 0.8;
- Fast-AT's 15 epochs, learning rates (0, 0.4, 0.04, 0.004 and 0.0004 at epochs 0, 1, 6, 12 and 15) and weight decay
  (1e-4 on everything but batch-norm);
- RSLAD with the sum over classes, since the mean over 1,000 classes would make the loss too small to train.

`fast_at` attacks as its authors do on ImageNet: in batch-norm's training mode, from a start that may lie outside [0, 1]
and is clipped before the network sees it. The rows with a teacher attack in evaluation mode from a clipped start, as
IBD and RSLAD do.

docs/recipes.md compares every setting with the papers. One deviation from Fast-AT: images have one size, `data.size`,
throughout training, whereas Fast-AT grows crops from 128 to 288 pixels in three phases, with batches of 512, 224 and
128. `,smoke` shrinks any row.

Data: `tfds build imagenet2012 --file_format=array_record` (docs/data.md), decoded and cropped while training; evaluate
with `--config.evaluate.n=5000`, as RobustBench does. On a single device with 16 GB use `--config.microbatches=4`.

Teacher: RobustBench's Salman2020Do_R50, imported; the command is in configs/teachers.py.

Cost at 224 pixels: 8 forward passes of the student (Fast-AT 5) and 2 of the teacher per image, 15·1.28e6·10·8.2 GFLOP =
1.6 EFLOP.
"""

from ibjax.config import base, held, parse_arg, smoke

ROWS = ("fast_ibd-2", "fast_ibd-4", "rslad-2", "rslad-4", "fast_at-2", "fast_at-4")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def get_config(arg=None):
    row, small = parse_arg(arg, ROWS)
    method, _, levels = row.partition("-")
    eps, step_size = f"{levels}/255", f"{1.25 * int(levels):g}/255"
    config = base()
    config.title = f"{method} eps {eps}"
    config.data = dict(name="stream", dataset="imagenet2012", size=224, val_size=10_000, split_seed=0)
    config.augment.update(pad=0, flip=False)  # images are cropped at random when they are read
    config.model = dict(name="resnet", depth=50, stem="imagenet", mean=MEAN, std=STD, dtype="bfloat16")
    config.threat.eps = eps
    config.attack = dict(name="fgsm", loss="kl", step_size=step_size, init="uniform")
    match method:
        case "fast_ibd":
            config.objective = dict(name="ibd", alpha=0.9, beta=0.8, granularity="stage")
        case "rslad":
            config.objective = dict(name="rslad", reduction="sum")
        case "fast_at":
            config.objective = dict(name="pgd_at")
            config.attack.update(name="pgd", steps=1, loss="ce", init="uniform_unclipped", clip_input=True)
            config.attack_bn = "train"
    if method != "fast_at":
        config.teacher.workdir = "runs/teacher-resnet50"
        made_by = "python -m ibjax.convert --torch FILE --arch imagenet_resnet --workdir={}"
        config.teacher.made_by = made_by.format(config.teacher.workdir)
    config.batch_size = 512
    config.epochs = 15
    config.optimizer = dict(name="sgd", lr=0.4, momentum=0.9, weight_decay=1e-4, decay_norm=False)
    points = ((0.0, 0.0), (1.0, 1.0), (6.0, 0.1), (12.0, 0.01), (15.0, 0.001))
    config.schedule = dict(name="linear", points=points, stepping="next_step")
    for section in (config.validate.attack, config.evaluate):
        section.step_size = "1/255"
    config.evaluate.attacks = ("pgd-100",)
    if small:
        smoke(config, (32, 32, 3), 10, dict(depth=10, width=4, dtype="float32"))
        if method != "fast_at":
            config.teacher.update(workdir="", recipe=held(small_teacher()))
    return config


def small_teacher():
    """A teacher for the smoke test."""
    config = base()
    config.title = "teacher"
    config.model = dict(name="resnet", stem="imagenet", mean=MEAN, std=STD)
    return smoke(config, (32, 32, 3), 10, dict(depth=10, width=4))
