"""The quickstart: IBD on the 1,797 handwritten digits (8×8, 16 grey levels) that scikit-learn ships.

    python -m ibjax.main --config=configs/digits.py --workdir=runs/digits

Trains a TRADES teacher, an undefended network for contrast, and an IBD student of the same architecture, which learns
from the teacher. Attacks all three at eps 2/16, which is two grey levels of the digits. Takes two to four minutes on
two CPU cores.
"""

from ibjax.config import base, held, parse_arg, smoke

LADDER = ("1/16", "3/16", "4/16", "6/16")


def get_config(arg=None):
    _, small = parse_arg(arg)
    config = recipe("IBD student")
    config.objective = dict(name="ibd", alpha=0.9, beta=0.8)
    config.attack.update(loss="kl", init="gaussian")
    config.teacher.recipe = held(teacher())
    config.contrast.undefended = held(undefended())
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
    """The settings that the three runs share."""
    config = base()
    config.title = title
    config.data = dict(name="digits", val_size=0, split_seed=0)  # the digits bring their own validation split
    config.augment = dict(pad=1, padding="zero", flip=False)
    config.model = dict(name="cnn", widths=((32, 32), (64, 64)), hidden=(), padding=1, batch_norm=True, pool="average")
    config.batch_size = 64
    config.epochs = 40
    config.schedule = dict(name="cosine")
    config.threat.eps = "2/16"
    config.validate.update(every=5, batch_size=256)
    config.evaluate.update(ladder=LADDER, batch_size=256)
    config.log_every = 19  # the steps of an epoch
    return config
