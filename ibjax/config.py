"""Configurations: plain data in an ml_collections ConfigDict, checked before anything runs.

`base()` holds every key with its default. A recipe is a file in `configs/` whose `get_config(arg)` starts from it.
Sections with a `name` are calls: objective=dict(name="trades", beta=6.) imports `ibjax.objectives.trades` and calls
its factory with the rest. Printing a configuration and pasting it back gives the same run.
"""

import importlib
import inspect
import math
import pkgutil
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from ibjax.errors import InputError, nearest

# kind of module -> the factory's name in it; None: the module's own name
_FACTORIES = {"models": "Model", "data": "load", "objectives": None, "attacks": None}


def base() -> ConfigDict:
    """All keys, with the defaults of the CIFAR experiments (Rice et al.'s settings of PGD training)."""
    config = ConfigDict()
    config.title = ""  # how reports call the run; empty: the folder's name
    config.seed = 0
    # data: a module of ibjax.data and its arguments; val_size images of training are held out (split by split_seed)
    config.data = dict(name="folder", path="", val_size=1000, split_seed=0)
    config.augment = dict(pad=4, padding="zero", flip=True)  # padding: zero, edge or reflect
    config.model = dict(name="preact_resnet", depth=18)
    config.objective = dict(name="pgd_at")
    # attack: the inner maximisation, None for training on clean images
    config.attack = dict(name="pgd", loss="ce", norm="linf", eps="8/255", step_size="2/255", steps=10, init="uniform")
    config.attack_bn = "eval"  # or "train": batch-norm's mode in the training attack
    config.batch_size = 128  # global, over all devices
    config.epochs = 200
    config.optimizer = dict(name="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4)
    config.schedule = dict(name="piecewise", boundaries=(100, 150), factor=0.1)
    config.head_optimizer = ConfigDict(dict(lr=None))  # lr=None: the method's own weights share `optimizer`
    config.ema_decay = None
    # teacher: workdir of a trained run; recipe: the configuration that makes it when the workdir has no checkpoint
    config.teacher = dict(workdir="", checkpoint="best", recipe=None, made_by="")  # made_by: a command, for messages
    config.contrast = dict()  # name -> configuration of a run to train and report beside this one
    # validate: the attack on the validation split that selects `best`, every so many epochs, from `dense_from` on each
    config.validate = dict(
        attack=dict(name="pgd", loss="ce", norm="linf", eps="8/255", step_size="2/255", steps=10, init="uniform"),
        every=1,
        dense_from=None,
        batch_size=500,
    )
    config.select_on = "val"  # or "test", as the papers do; every record then says so
    config.evaluate = dict(
        attacks=("fgsm", "pgd-20", "cw-20"),
        norm="linf",
        eps="8/255",
        step_size="2/255",
        ladder=(),  # more values of eps for the curve; steps scale with eps
        n=None,  # number of test images; None: all
        batch_size=500,
    )
    config.log_every = 50  # steps between rows of metrics.jsonl
    config.checkpoint_every = 10  # epochs between checkpoints, beside those of validation
    config.steps_per_dispatch = None  # None: 1 on CPU, log_every on accelerators
    return config


def check(config: ConfigDict) -> None:
    """Raises InputError where a key is unknown, a number is not finite, or a value contradicts another."""
    reference = base()
    _check_keys(config, reference, "")
    for section in ("augment", "validate", "evaluate", "teacher", "head_optimizer"):
        allowed_only(config[section], reference[section], section)
    for path, value in leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{path}={value} is not a finite number")
    for name in ("batch_size", "epochs", "log_every", "checkpoint_every", "validate.every", "validate.batch_size"):
        at_least(config, name, 1)
    at_least(config, "evaluate.batch_size", 1)
    at_least(config, "data.val_size", 0)
    one_of(config, "attack_bn", ("eval", "train"))
    one_of(config, "select_on", ("val", "test"))
    if config.ema_decay is not None and not 0 <= config.ema_decay < 1:
        raise InputError(f"ema_decay={config.ema_decay} is outside [0, 1)")
    if config.steps_per_dispatch is not None:
        at_least(config, "steps_per_dispatch", 1)
    if not 0 < config.optimizer.lr < 1e3:
        raise InputError(f"optimizer.lr={config.optimizer.lr} is outside (0, 1000)")
    _check_sections(config)
    for name, recipe in {"teacher.recipe": config.teacher.recipe, **config.contrast}.items():
        if recipe is not None:
            try:
                check(recipe)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None


def _check_sections(config):
    """Builds what costs nothing, and checks the arguments of the rest, so that a typo ends before hours of training."""
    arguments("models", config.model, "model", ("num_classes",))
    build("objectives", config.objective, "objective")
    for name, section in {"attack": config.attack, "validate.attack": config.validate.attack}.items():
        if section is not None:
            build("attacks", section, name)
    hidden = {key: value for key, value in config.data.items() if key not in ("val_size", "split_seed")}
    arguments("data", hidden, "data")


def _check_keys(config, reference, where):
    for key in config:
        if key not in reference:
            raise InputError(f"config key '{where}{key}' is unknown; {nearest(key, reference)}")
    for key in reference:
        if key not in config:
            raise InputError(f"config key '{where}{key}' is missing; start from ibjax.config.base()")


def allowed_only(section: Mapping, reference: Mapping, name: str) -> None:
    """Raises InputError unless the section's keys are those of the reference."""
    _check_keys(section, reference, f"{name}.")


def at_least(config: ConfigDict, path: str, low: int) -> None:
    """Raises InputError unless the value at the dotted path is a whole number >= low."""
    value = lookup(config, path)
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise InputError(f"{path}={value!r} is not allowed; give a whole number of at least {low}")


def one_of(config: ConfigDict, path: str, allowed: tuple[str, ...]) -> None:
    """Raises InputError unless the value at the dotted path is among `allowed`."""
    value = lookup(config, path)
    if value not in allowed:
        raise InputError(f"{path}={value!r} is unknown; {nearest(str(value), allowed)}")


def lookup(config: Mapping, path: str) -> Any:
    """The value at a dotted path."""
    for key in path.split("."):
        config = config[key]
    return config


def leaves(config: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every value that is not itself a section."""
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def plain(value: Any) -> Any:
    """ConfigDicts become dicts and lists tuples, deeply: what factories and JSON take."""
    if isinstance(value, Mapping | ConfigDict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(plain(item) for item in value)
    return value


def factory(kind: str, name: str) -> Callable:
    """The factory of module `ibjax.<kind>.<name>`; raises InputError with the nearest right name."""
    attribute = _FACTORIES[kind] or name
    if name.isidentifier():
        try:
            module = importlib.import_module(f"ibjax.{kind}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"ibjax.{kind}.{name}":
                raise  # the module is there; something that it imports is not
        else:
            if hasattr(module, attribute):
                return getattr(module, attribute)
    package = importlib.import_module(f"ibjax.{kind}")
    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    names = [n for n in names if hasattr(importlib.import_module(f"ibjax.{kind}.{n}"), _FACTORIES[kind] or n)]
    raise InputError(f"{kind.removesuffix('s')}.name '{name}' is unknown; {nearest(name, names)}")


def build(kind: str, section: Mapping, where: str, **context: Any) -> Any:
    """Calls the factory that `section["name"]` names with the rest of the section and `context`."""
    return factory(kind, section["name"])(**arguments(kind, section, where, context), **context)


def arguments(kind: str, section: Mapping, where: str, context: Iterable[str] = ()) -> dict[str, Any]:
    """The section without its name, checked against the factory's signature: names, and plain types."""
    options = {key: value for key, value in plain(section).items() if key != "name"}
    call = factory(kind, section["name"])
    signature = inspect.signature(call)
    hidden = {"parent", "name", *context}  # what the caller or Linen supplies
    allowed = set(signature.parameters) - hidden
    hints = typing.get_type_hints(call.__init__ if inspect.isclass(call) else call)
    for key, value in options.items():
        if key not in allowed:
            raise InputError(f"{where}.{key} is unknown to '{section['name']}'; {nearest(key, allowed)}")
        if not _fits(value, hints.get(key)):
            raise InputError(f"{where}.{key}={value!r} has the wrong type; '{section['name']}' takes {hints[key]}")
    for key in allowed - set(options):
        if signature.parameters[key].default is inspect.Parameter.empty:
            raise InputError(f"{where}.{key} is missing; '{section['name']}' needs it")
    return options


def _fits(value, hint):
    """Whether a plain value agrees with the plain types in a hint; hints that say more are not judged."""
    if hint in (int, float, str, bool):
        if hint is float:
            return isinstance(value, int | float) and not isinstance(value, bool)
        return isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if hint is type(None):
        return value is None
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple)
    return hint is None or not isinstance(hint, type) or isinstance(value, hint)


# ---- recipes -----------------------------------------------------------------------------------------------


def parse_arg(arg: str | None, rows: tuple[str, ...] = ()) -> tuple[str, bool]:
    """(row, smoke) of a recipe's argument, as "", "smoke", "ROW" or "ROW,smoke"; the first row is the default."""
    words = [word for word in (arg or "").split(",") if word]
    smoke = "smoke" in words
    chosen = [word for word in words if word != "smoke"]
    for word in chosen:
        if word not in rows:
            raise InputError(f"config argument '{word}' is unknown; {nearest(word, ('smoke', *rows))}")
    if len(chosen) > 1:
        raise InputError(f"config arguments {', '.join(chosen)} exclude each other; give one")
    return (chosen[0] if chosen else rows[0] if rows else ""), smoke


def smoke(config: ConfigDict, shape: tuple[int, int, int], num_classes: int, model: Mapping[str, Any]) -> ConfigDict:
    """Shrinks a recipe to seconds on a CPU: synthetic images of the right shape, the network changed by `model`."""
    config.data = dict(name="synthetic", shape=shape, num_classes=num_classes, val_size=8, split_seed=0)
    config.model.update(model)
    config.update(batch_size=8, epochs=2, log_every=2, checkpoint_every=1)
    if config.attack is not None:
        config.attack.steps = 2
    config.validate.attack.steps = 2
    config.validate.update(every=1, batch_size=8)
    config.evaluate.update(attacks=("fgsm", "pgd-2", "cw-2"), ladder=(), batch_size=8)
    return config
