"""Configurations: plain data in an ml_collections ConfigDict, checked before anything runs.

`base()` holds every key with its default. A recipe is a file in `configs/` whose `get_config(arg)` starts from
`base()`. A section with a `name` describes a function call (`ibjax.calls`); `ibjax.threat` holds the threat model that
all attacks share. A configuration that is printed and pasted back gives the same run.
"""

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ibjax.calls import (  # noqa: F401 - some of them for those who take them from here
    CALLS,
    NAMELESS,
    OPTIONAL,
    SPLITTING,
    TEACHERS,
    THREAT,
    ModelSection,
    ObjectiveSection,
    arguments,
    build,
    call_arguments,
    called,
    complete,
    factory,
    fits,
    leaves,
    local,
    lookup,
    own_source,
    plain,
    recipes,
    rename,
    signature,
)
from ibjax.devices import precision
from ibjax.errors import InputError, nearest
from ibjax.threat import effective, held, in_each_recipe, own, same_length, say  # noqa: F401

LARGEST_SEED = 2**32 - 1  # NumPy's random numbers take no larger one


def base() -> ConfigDict:
    """All keys with their defaults: PGD training with the schedule, network and attack of IBD's Table 1."""
    config = ConfigDict()
    config.title = ""  # the run's name in reports; empty: the folder's name
    config.seed = 0
    # data: a module of ibjax.data and its arguments. val_size training images are held out for validation (selected by
    # split_seed); the network is trained on a stratified `fraction` of the rest. extra=dict(path="1m.npz",
    # fraction=0.7): that share of every batch are generated images of a file (ibjax.data.extra)
    config.data = dict(name="tfds", dataset="cifar10", val_size=1000, split_seed=0, fraction=1.0)
    # augment: random crop and flip (padding: zero, edge or reflect), or the name of an augmentation of one's own
    config.augment = dict(pad=4, padding="zero", flip=True)
    config.mix = None  # or dict(name="cutmix") or dict(name="mixup"): images and labels mixed in pairs
    # smoothing: the loss's labels take delta from the true class; form: it goes to the "others", or to all
    # classes, "uniform"; images: "all", or the "generated" ones of data.extra. The attack sees hard labels
    config.smoothing = dict(delta=0.0, form="others", images="all")
    config.model = dict(name="preact_resnet", depth=18)
    config.objective = dict(name="pgd_at")
    # threat: the threat model. The training attack, the validation attack and the evaluation use it where their own
    # norm and eps are None. In the recipe of a teacher or a contrast, None means: as in the enclosing configuration.
    config.threat = dict(norm="linf", eps="8/255")
    # attack: the inner maximisation; None for training on clean images. step_size=None: a quarter of eps
    config.attack = dict(name="pgd", loss="ce", **own(), steps=10, init="uniform")
    # attack_bn: batch-norm in the training attack: "eval"; "train", whose statistics move with every attack step; or
    # "batch", which sees the statistics of its batch too, and moves none
    config.attack_bn = "eval"
    config.bn_statistics = "all"  # or "adv": passes over clean images move no running statistics
    config.batch_size = 128  # global, over all devices
    # number of parts of a batch that are attacked and differentiated in turn, to save memory: see step.make_train_step
    config.microbatches = 1
    config.epochs = 200
    # precision of float32 products: "default", "high" or "highest" (ibjax.devices.precision), in training steps and
    # validation; that of an evaluation is evaluate.precision
    config.precision = precision.TRAINING
    config.optimizer = dict(name="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4)
    config.schedule = dict(name="piecewise", boundaries=(100, 150), factor=0.1)
    # the optimiser of the head (the method's own weights). lr=None: the head shares `optimizer`. name: another
    # optimiser, with its default options
    config.head_optimizer = dict(name="", lr=placeholder(float))
    config.ema_decay = placeholder(float)  # decay of the parameter average (EMA), which is then evaluated; None: no EMA
    # averaging: how the average is made, where there is one. warmup: its decay is min(ema_decay, (1 + t)/(10 + t)), t
    # steps after the epoch `start`, before which it is the network itself. statistics: the running statistics that the
    # averaged network is evaluated with: "raw", those of the network itself; "averaged" like the weights; "recomputed"
    # before each checkpoint and validation, by training-mode passes of the averaged network over the last
    # `batches` batches
    config.averaging = dict(warmup=False, start=0.0, statistics="raw", batches=100)
    config.perturb = None  # or dict(name="awp", gamma=…, warmup=…): the gradient is taken at perturbed weights
    # teacher: workdir of a trained run, or a recipe that is trained in workdir/teacher; made_by: a hint for messages
    for role in TEACHERS:  # the assistant is a second teacher, for the methods that have two
        config[role] = dict(workdir="", checkpoint="best", recipe=None, made_by="")
    config.contrast = dict()  # name -> configuration of a run to train and report beside this one
    # validate: the attack on the validation split, run every `every` epochs and, from epoch `dense_from` on, every
    # epoch. select: the accuracy by which the checkpoint `best` is chosen: "robust" (under the attack), "clean" or
    # their "mean"; None: "robust" if the network is trained on adversarial images, else "clean"
    config.validate = dict(
        select=placeholder(str),
        attack=dict(name="pgd", loss="ce", **own(), steps=10, init="uniform"),
        every=1,
        dense_from=placeholder(int),
        batch_size=500,
        stop_on_overfitting=False,  # stop when robust accuracy falls by 20 points (catastrophic overfitting)
    )
    config.select_on = "val"  # or "test", as the papers do; every record then says so
    config.evaluate = dict(
        attacks=("fgsm", "pgd-20", "margin-20"),
        **own(),
        ladder=(),  # further values of eps, for the curve of accuracy over eps
        fixed_step=False,  # True: attacks at these values of eps use step_size too; False: their step scales with eps
        n=placeholder(int),  # number of test images, stratified by class; None: all
        samples=placeholder(int),  # stochastic network: evaluate the mean of this many samples; None: z = μ
        batch_size=500,
        precision=precision.EVALUATION,  # of attacks; what they find is judged at "highest"
    )
    config.log_every = 50  # steps between rows of metrics.jsonl
    # where they go too: names of ibjax.runs.writers. None: TensorBoard if tensorboardX is installed; in the recipe
    # of a teacher or a contrast: as in the enclosing configuration
    config.writers = placeholder(tuple)
    config.checkpoint_every = 10  # epochs between checkpoints, beside those of validation
    config.steps_per_dispatch = placeholder(int)  # None: 1 on CPU, log_every on accelerators
    # how several devices keep weights, moments and averages between two steps: each all ("replicated") or a share
    config.sharding = "replicated"  # or "fsdp": see ibjax.devices.placement
    return config


# ---- checks ------------------------------------------------------------------------------------------------

# sections and keys that change neither a training nor its result
WITHOUT_EFFECT = (
    *("title", "evaluate", "contrast", "log_every", "writers", "checkpoint_every", "steps_per_dispatch"),
    "sharding",
)

# dotted path -> (type, lowest, highest); None is allowed where base() has a placeholder
_NUMBERS = {
    "seed": (int, 0, LARGEST_SEED),
    "data.val_size": (int, 0, math.inf),
    "data.split_seed": (int, 0, LARGEST_SEED),
    "augment.pad": (int, 0, 64),
    "smoothing.delta": (float, 0, 0.5),
    "batch_size": (int, 1, math.inf),
    "microbatches": (int, 1, math.inf),
    "epochs": (int, 1, math.inf),
    "optimizer.lr": (float, 1e-12, 1e3),
    "head_optimizer.lr": (float, 1e-12, 1e3),
    "ema_decay": (float, 0, 1 - 1e-9),
    "averaging.start": (float, 0, math.inf),
    "averaging.batches": (int, 1, math.inf),
    "validate.every": (int, 1, math.inf),
    "validate.dense_from": (int, 0, math.inf),
    "validate.batch_size": (int, 1, math.inf),
    "evaluate.n": (int, 1, math.inf),
    "evaluate.samples": (int, 1, math.inf),
    "evaluate.batch_size": (int, 1, math.inf),
    "log_every": (int, 1, math.inf),
    "checkpoint_every": (int, 1, math.inf),
    "steps_per_dispatch": (int, 1, math.inf),
}
_CHOICES = {
    "attack_bn": ("eval", "train", "batch"),
    "precision": precision.NAMES,
    "evaluate.precision": precision.NAMES,
    "sharding": ("replicated", "fsdp"),
    "bn_statistics": ("all", "adv"),
    "averaging.warmup": (False, True),
    "averaging.statistics": ("raw", "averaged", "recomputed"),
    "select_on": ("val", "test"),
    "validate.select": (None, "robust", "clean", "mean"),
    "augment.flip": (False, True),
    "smoothing.form": ("others", "uniform"),
    "smoothing.images": ("all", "generated"),
    "validate.stop_on_overfitting": (False, True),
    "evaluate.fixed_step": (False, True),
}
_CLOSED = (
    "threat",
    "smoothing",
    "averaging",
    "validate",
    "evaluate",
    *TEACHERS,
    "head_optimizer",
)  # sections with fixed keys


def check(config: ConfigDict) -> None:
    """Raises InputError on an unknown or missing key and on a value of the wrong type, not finite or out of range."""
    reference = base()
    _check_keys(config, reference, "")
    for section in (*_CLOSED, *(name for name in NAMELESS if "name" not in _section(config, name))):
        _check_keys(_section(config, section), reference[section], f"{section}.")
    for section in CALLS:
        if section not in NAMELESS and _given(config, section) and "name" not in _section(config, section):
            raise InputError(f"{section}.name is missing; it says which module to call")
    config = config.copy_and_resolve_references()
    with config.unlocked():
        say(config)
    for path, value in leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{path}={value} is not a finite number")
    named = tuple(f"{name}." for name in NAMELESS if "name" in config[name])  # their options are checked as in a call
    for path, (kind, low, high) in _NUMBERS.items():
        if not path.startswith(named):
            _check_number(config, path, kind, low, high, optional=lookup(reference, path, "") is None)
    writers = config.writers
    if writers is not None and not (
        isinstance(writers, list | tuple) and all(isinstance(name, str) for name in writers)
    ):
        raise InputError(f"writers={writers!r} is not allowed; give names, as ('tensorboard', 'wandb')")
    for path, allowed in _CHOICES.items():
        if not path.startswith(named) and (given := lookup(config, path)) not in allowed:
            raise InputError(f"{path}={given!r} is unknown; {nearest(str(given), map(str, allowed))}")
    for section in CALLS:
        if _given(config, section) and "name" in lookup(config, section):
            _check_call(section, lookup(config, section))
    if config.head_optimizer.name:
        factory("optimizers", config.head_optimizer.name)
        if config.head_optimizer.lr is None:
            raise InputError("head_optimizer.lr is missing; give the learning rate")
    for role in TEACHERS:
        which = str(config[role].checkpoint)
        if which not in ("best", "last") and not which.isdecimal():
            raise InputError(f"{role}.checkpoint='{which}' is unknown; allowed: best, last or a step")
    in_each_recipe(config, check)


def _given(config, section):
    return section not in OPTIONAL or config[section] is not None


def _check_call(path, section):
    """Checks a section's option names and types; also calls the factories that are cheap, as they check the values."""
    options = {key: value for key, value in plain(section).items() if key != "name"}
    for key in SPLITTING if path == "data" else ():
        options.pop(key, None)
    if path == "data":
        _check_fraction(section.get("fraction", 1.0))
        _check_extra(section.get("extra"))
    call, context = called(path, section["name"])
    if path == "optimizer" and "lr" not in options:
        raise InputError("optimizer.lr is missing; give the learning rate")
    call_arguments(call, section["name"], {k: v for k, v in options.items() if k not in context}, path, context)
    if path == "attack" and options.get("loss") == "objective":  # the loss function comes with the objective
        options.pop("loss")
    if CALLS[path] in ("objectives", "attacks", "perturbations", "augmentations", "mixes"):
        call(**options)


def _check_fraction(value, name="data.fraction"):
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
        raise InputError(f"{name}={value!r} is not allowed; give a number above 0 and at most 1")


def _check_extra(section):
    if section is None:
        return
    if not isinstance(section, Mapping | ConfigDict):
        raise InputError(f"data.extra={section!r} is no section; give dict(path='1m.npz', fraction=0.7)")
    call_arguments(factory("extras", "npz"), "data.extra", plain(section), "data.extra", ("shape", "num_classes"))
    _check_fraction(section.get("fraction", 0.7), "data.extra.fraction")


def _check_keys(config, reference, where):
    for key in config:
        if key not in reference:
            raise InputError(f"config key '{where}{key}' is unknown; {nearest(key, reference)}")
    for key in reference:
        if key not in config:
            raise InputError(f"config key '{where}{key}' is missing; start from ibjax.config.base()")


def _section(config, path):
    section = lookup(config, path)
    if not isinstance(section, Mapping | ConfigDict):
        raise InputError(f"{path}={section!r} is no section; give a dict, as in ibjax.config.base()")
    return section


def _check_number(config, path, kind, low, high, optional):
    value = lookup(config, path, None)
    if value is None and (optional or path not in dict(leaves(config))):
        if optional:
            return
        raise InputError(f"{path} is missing; start from ibjax.config.base()")
    right = isinstance(value, int | float) if kind is float else isinstance(value, int)
    if not right or isinstance(value, bool) or not low <= value <= high:
        number = "a whole number" if kind is int else "a number"
        upper = "" if high == math.inf else f" and at most {high:.10g}"
        raise InputError(f"{path}={value!r} is not allowed; give {number} of at least {low:g}{upper}")


# ---- saved configurations ----------------------------------------------------------------------------------


_LATER = (
    "writers",
    "mix",
    "smoothing",
    "averaging",
    "bn_statistics",
    "sharding",
    "precision",
)  # keys that were added later; their defaults change nothing
_EARLIER = {
    "evaluate.precision": precision.TRAINING
}  # what a key of today would have been, where its default is another


def upgrade(saved: ConfigDict) -> ConfigDict:
    """Adds to a saved configuration the keys that did not exist when its run was made; the run stays the same.

    A saved configuration states norm, eps and step size of every attack; a missing `threat` becomes the evaluation's.
    """
    reference = base()
    for key in _LATER:
        if key not in saved:
            saved[key] = reference[key]
    for section in ("validate", "evaluate"):
        for key, default in reference[section].items():
            if key not in saved[section]:
                saved[section][key] = _EARLIER.get(f"{section}.{key}", default)
    if saved.mix is not None and "groups" in saved.mix:
        del saved.mix["groups"]  # batches were mixed in parts
    if "threat" not in saved:
        saved.threat = {key: saved.evaluate[key] for key in THREAT}
    for _, recipe in recipes(saved):
        upgrade(recipe)
    return saved


def loosen(config: ConfigDict) -> ConfigDict:
    """Restores the placeholder type of each key that is None, which JSON does not keep, from `base`."""
    reference = base()
    for path, value in leaves(reference):
        if value is None and not path.endswith("recipe") and path not in OPTIONAL and lookup(config, path, 0) is None:
            section, key = _parted(path)
            inside, typed = ((lookup(part, section) if section else part) for part in (config, reference))
            inside[key] = placeholder(typed.get_type(key))
    for _, recipe in recipes(config):
        loosen(recipe)
    return config


def may_be_none(config: ConfigDict, path: str) -> bool:
    """Whether this key may be None: `base` allows it, or the factory of its section does."""
    inside = local(path)
    reference, section, key = base(), *_parted(inside)
    if inside in OPTIONAL or lookup(reference, inside, "") is None:
        return True
    if section not in CALLS or "name" not in (given := lookup(config, path.rpartition(".")[0], None) or {}):
        return False
    parameters, hints = signature(*called(section, given["name"]))
    return key in parameters and (parameters[key].default is None or fits(None, hints.get(key, int)))


def _parted(path):
    section, _, key = path.rpartition(".")
    return section, key


def same(path: str, one: Any, other: Any) -> bool:
    """Whether two values of a key are equal; lengths are compared as numbers, so "1/32" equals "0.5/16"."""
    return one == other or (path.rpartition(".")[2] in ("eps", "step_size") and same_length(one, other))


# ---- recipes -----------------------------------------------------------------------------------------------


def parse_arg(arg: str | None, rows: tuple[str, ...] = ()) -> tuple[str, bool]:
    """(row, smoke) from a recipe's argument: "", "smoke", "ROW" or "ROW,smoke"; the first of `rows` is the default.

    A row may itself be of several words, as "ROW,VARIANT".
    """
    words = [word.strip() for word in (arg or "").split(",") if word.strip()]
    chosen = [word for word in words if word != "smoke"]
    if ",".join(chosen) in rows:
        return ",".join(chosen), "smoke" in words
    takes = f"it takes {'a row, smoke, or ROW,smoke' if rows else 'smoke alone'}"
    for word in chosen:
        if word not in rows:
            raise InputError(f"the recipe's argument '{word}' is unknown; {takes}; {nearest(word, ('smoke', *rows))}")
    if len(chosen) > 1:
        raise InputError(f"the recipe's arguments {', '.join(chosen)} exclude each other; {takes}")
    return (chosen[0] if chosen else rows[0] if rows else ""), "smoke" in words


def smoke(config: ConfigDict, shape: tuple[int, int, int], num_classes: int, model: Mapping[str, Any]) -> ConfigDict:
    """Shrinks a recipe to seconds on a CPU: synthetic images of `shape`, and a network with the options `model`."""
    config.data = dict(name="synthetic", shape=shape, num_classes=num_classes, val_size=8, split_seed=0)
    config.model.update(model)
    config.update(batch_size=8, epochs=2, log_every=2, checkpoint_every=1)
    for attack in (config.attack, config.validate.attack):
        if attack is not None and "steps" in attack:
            attack.steps = 2
    config.validate.update(every=1, batch_size=8)
    config.evaluate.update(attacks=("fgsm", "pgd-2", "margin-2"), ladder=(), batch_size=8)
    return config
