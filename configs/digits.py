"""The quickstart: IBD on the 1,797 handwritten digits of scikit-learn.

    python -m ibjax.main --config=configs/digits.py --workdir=runs/digits

Trains a TRADES teacher, an undefended network for contrast, and an IBD student from the teacher.
"""

from ibjax.config import base, parse_arg, smoke

EPS, STEP = "0.15", "0.0375"


def get_config(arg=None):
    _, small = parse_arg(arg)
    config = recipe("IBD student")
    config.objective = dict(name="ibd", alpha=0.9, beta=0.8)
    config.attack.update(loss="kl", init="gaussian")
    config.teacher.recipe = teacher()
    config.contrast.undefended = undefended()
    if small:
        for part in (config, config.teacher.recipe, config.contrast.undefended):
            smoke(part, (8, 8, 1), 10, dict(widths=((4,), (4,))))
    return config


def teacher():
    config = recipe("TRADES teacher")
    config.objective = dict(name="trades", beta=3.0)
    config.attack.update(loss="kl", init="gaussian")
    return config


def undefended():
    config = recipe("undefended")
    config.objective = dict(name="standard")
    config.attack = None
    config.epochs = 15
    return config


def recipe(title):
    config = base()
    config.title = title
    config.data = dict(name="digits", val_size=0, split_seed=0)
    config.augment = dict(pad=1, padding="zero", flip=False)
    config.model = dict(name="cnn", widths=((32, 32), (64, 64)), hidden=(), padding=1, batch_norm=True, pool="average")
    config.batch_size = 64
    config.epochs = 40
    config.optimizer.update(lr=0.1)
    config.schedule = dict(name="cosine")
    for attack in (config.attack, config.validate.attack):
        attack.update(eps=EPS, step_size=STEP)
    config.validate.update(every=5, batch_size=256)
    config.evaluate.update(eps=EPS, step_size=STEP, ladder=("0.05", "0.1", "0.2"), batch_size=256)
    config.log_every = 19
    return config
