"""Configurations: plain data in an ml_collections ConfigDict, checked before anything runs.

`base()` holds every key with its default. A recipe is a file in `configs/` whose `get_config(arg)` starts from it.
Sections with a `name` are calls: objective=dict(name="trades", beta=6.) imports `ibjax.objectives.trades` and calls
its factory with the rest. Printing a configuration and pasting it back gives the same run.
"""

import importlib
import inspect
import logging
import math
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ibjax.attacks import geometry
from ibjax.errors import InputError, nearest

log = logging.getLogger(__name__)
TEACHERS = ("teacher", "assistant")
# the types of options that are sections themselves: of a model, or an objective
ModelSection = Annotated[Mapping[str, Any], "models"]
ObjectiveSection = Annotated[Mapping[str, Any], "objectives"]
_THREAT = ("norm", "eps")
_ATTACKS = ("attack", "validate.attack", "evaluate")  # sections that take the threat model
# kind of module -> the factory's name in it; None: the module's own name
_FACTORIES = {"models": "Model", "data": "load", "objectives": None, "attacks": None}


def base() -> ConfigDict:
    """All keys, with the defaults of the CIFAR experiments (Rice et al.'s settings of PGD training)."""
    config = ConfigDict()
    config.title = ""  # how reports call the run; empty: the folder's name
    config.seed = 0
    # data: a module of ibjax.data and its arguments; val_size images of training are held out (split by split_seed),
    # of the rest a `fraction` is trained on, each class in proportion
    config.data = dict(name="tfds", dataset="cifar10", val_size=1000, split_seed=0, fraction=1.0)
    config.augment = dict(pad=4, padding="zero", flip=True)  # padding: zero, edge or reflect
    config.model = dict(name="preact_resnet", depth=18)
    config.objective = dict(name="pgd_at")
    # threat: what may be done to an image, said once: the training attack, the validation attack and the evaluation
    # take it where their own norm and eps are None. In the recipe of a teacher or contrast None is the holder's.
    config.threat = dict(norm="linf", eps="8/255")
    # attack: the inner maximisation, None for training on clean images. step_size=None: a quarter of eps
    config.attack = dict(name="pgd", loss="ce", **_own_threat(), steps=10, init="uniform")
    config.attack_bn = "eval"  # or "train": batch-norm's mode in the training attack
    config.batch_size = 128  # global, over all devices
    # parts of a batch that are attacked and differentiated in turn, to save memory: see step.make_train_step
    config.microbatches = 1
    config.epochs = 200
    config.optimizer = dict(name="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4)
    config.schedule = dict(name="piecewise", boundaries=(100, 150), factor=0.1)
    # of the method's own weights; lr=None: they share `optimizer`. name: another one than that, with its defaults
    config.head_optimizer = dict(name="", lr=placeholder(float))
    config.ema_decay = placeholder(float)  # of averaged parameters, which are then what is evaluated
    config.perturb = None  # or dict(name="awp", gamma=…, warmup=…): the gradient is taken at perturbed weights
    # teacher: workdir of a trained run, or the recipe that makes one in workdir/teacher; made_by: a hint for messages
    for role in TEACHERS:  # the assistant is a second teacher, of the methods that have two
        config[role] = dict(workdir="", checkpoint="best", recipe=None, made_by="")
    config.contrast = dict()  # name -> configuration of a run to train and report beside this one
    # validate: the attack on the validation split, every so many epochs, from `dense_from` on each. select: the
    # accuracy that `best` is the best in, "robust" (under the attack), "clean" or their "mean"; None: "robust" of what
    # is trained on adversarial images, "clean" of others
    config.validate = dict(
        select=placeholder(str),
        attack=dict(name="pgd", loss="ce", **_own_threat(), steps=10, init="uniform"),
        every=1,
        dense_from=placeholder(int),
        batch_size=500,
        stop_on_overfitting=False,  # end when robust accuracy falls by 20 points, as one-step training's can
    )
    config.select_on = "val"  # or "test", as the papers do; every record then says so
    config.evaluate = dict(
        attacks=("fgsm", "pgd-20", "margin-20"),
        **_own_threat(),
        ladder=(),  # more values of eps for the curve
        fixed_step=False,  # True: the ladder's steps are step_size too; False: they scale with eps
        n=placeholder(int),  # number of test images, each class in proportion; None: all
        samples=placeholder(int),  # of a stochastic network: judge the mean of so many; None: z = μ, deterministic
        batch_size=500,
    )
    config.log_every = 50  # steps between rows of metrics.jsonl
    config.checkpoint_every = 10  # epochs between checkpoints, beside those of validation
    config.steps_per_dispatch = placeholder(int)  # None: 1 on CPU, log_every on accelerators
    return config


def _own_threat():
    """Norm, eps and step size of a section that departs in none of them from `threat`."""
    return {key: placeholder(str) for key in (*_THREAT, "step_size")}


# ---- checks ------------------------------------------------------------------------------------------------

# dotted path -> (type, lowest, highest); None is allowed where base() has a placeholder
_NUMBERS = {
    "seed": (int, 0, 2**32 - 1),
    "data.val_size": (int, 0, math.inf),
    "data.split_seed": (int, 0, 2**32 - 1),
    "augment.pad": (int, 0, 64),
    "batch_size": (int, 1, math.inf),
    "microbatches": (int, 1, math.inf),
    "epochs": (int, 1, math.inf),
    "optimizer.lr": (float, 1e-12, 1e3),
    "head_optimizer.lr": (float, 1e-12, 1e3),
    "ema_decay": (float, 0, 1 - 1e-9),
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
    "attack_bn": ("eval", "train"),
    "select_on": ("val", "test"),
    "validate.select": (None, "robust", "clean", "mean"),
    "augment.flip": (False, True),
    "validate.stop_on_overfitting": (False, True),
    "evaluate.fixed_step": (False, True),
}
_CLOSED = ("augment", "threat", "validate", "evaluate", *TEACHERS, "head_optimizer")  # sections with keys of their own
_SPLITTING = ("val_size", "split_seed", "fraction")  # of the data section, for load_splits, not for the source
_CALLS = {
    "data": "data",
    "model": "models",
    "objective": "objectives",
    "attack": "attacks",
    "validate.attack": "attacks",
    "optimizer": "optim",
    "schedule": "optim",
    "perturb": "perturb",
}
OPTIONAL = ("attack", "perturb")  # sections that may be None
_HELD = re.compile(rf"^(({'|'.join(TEACHERS)})\.recipe\.|contrast\.[^.]+\.)+")  # where a configuration holds another


def check(config: ConfigDict) -> None:
    """Raises InputError where a key is unknown or missing, a value of the wrong type, not finite or out of range."""
    reference = base()
    _check_keys(config, reference, "")
    for section in _CLOSED:
        _check_keys(_section(config, section), reference[section], f"{section}.")
    for section in _CALLS:
        if _given(config, section) and "name" not in _section(config, section):
            raise InputError(f"{section}.name is missing; it says which module to call")
    config = config.copy_and_resolve_references()
    with config.unlocked():
        _say_threat(config)
    for path, value in leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{path}={value} is not a finite number")
    for path, (kind, low, high) in _NUMBERS.items():
        _check_number(config, path, kind, low, high, optional=lookup(reference, path, "") is None)
    for path, allowed in _CHOICES.items():
        if (given := lookup(config, path)) not in allowed:
            raise InputError(f"{path}={given!r} is unknown; {nearest(str(given), map(str, allowed))}")
    for section in _CALLS:
        if _given(config, section):
            _check_call(section, lookup(config, section))
    if config.head_optimizer.name:
        from ibjax import optim

        optim.named("optimizer", config.head_optimizer.name)
        if config.head_optimizer.lr is None:
            raise InputError("head_optimizer.lr is missing; give the learning rate")
    for role in TEACHERS:
        which = str(config[role].checkpoint)
        if which not in ("best", "last") and not which.isdecimal():
            raise InputError(f"{role}.checkpoint='{which}' is unknown; allowed: best, last or a step")
    for name, recipe in recipes(config):
        try:
            _inherit(recipe, config)
            check(recipe)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None


# ---- the threat model --------------------------------------------------------------------------------------


def effective(config: ConfigDict) -> ConfigDict:
    """A copy in which every attack states the norm, the eps and the step size that it runs with; nothing else changes.

    Raises InputError where they are no threat model.
    """
    made = config.copy_and_resolve_references()
    with made.unlocked():
        _say_threats(made)
    return made


def _say_threats(config):
    _say_threat(config)
    for name, recipe in recipes(config):
        try:
            _inherit(recipe, config)
            _say_threats(recipe)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None


def _inherit(recipe, holder):
    """Gives a recipe the threat model of the configuration that holds it, where it says none."""
    for key in _THREAT:
        if lookup(recipe, f"threat.{key}") is None:
            recipe.threat[key] = holder.threat[key]


def _say_threat(config):
    """Writes norm, eps and step size into the sections of a configuration that take them and say none."""
    for key in _THREAT:
        if lookup(config, f"threat.{key}") is None:
            raise InputError(f"threat.{key} is missing; give threat=dict(norm='linf', eps='8/255')")
    check_length(config.threat.eps, config.threat.norm, "threat.eps")
    for path in _ATTACKS:
        section = lookup(config, path)
        if section is None or not (takes := _lengths(path, section)).keys() >= set(_THREAT):
            continue
        norm = section.get("norm")
        if section.get("eps") is None:
            if norm not in (None, config.threat.norm):
                raise InputError(
                    f"{path}.norm={norm} with the eps of threat.norm={config.threat.norm} says nothing; set {path}.eps "
                    f"too, or threat.norm and threat.eps for all"
                )
            section.eps = config.threat.eps
        section.norm = config.threat.norm if norm is None else norm
        check_length(section.eps, section.norm, f"{path}.eps")
        if takes.get("step_size") and section.get("step_size") is None:
            section.step_size = quarter(section.eps)
        if section.get("step_size") is not None:
            check_length(section.step_size, section.norm, f"{path}.step_size")


def _lengths(path, section):
    """norm, eps and step_size as far as a section takes them -> whether None stands for a value that we give."""
    if path == "evaluate":
        return dict.fromkeys((*_THREAT, "step_size"), True)
    parameters, _ = signature(*_callable(path, section["name"]))
    return {key: parameters[key].default is not None for key in (*_THREAT, "step_size") if key in parameters}


def check_length(value: Any, norm: str, name: str) -> None:
    """Raises InputError unless a value is a length above 0 on [0, 1] images, as "8/255" or a number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(f"{name}={value!r} is not allowed; give a length above 0, as '8/255'")
    if not geometry.radius(value, norm, name) > 0:
        raise InputError(f"{name}={value} is not allowed; give a length above 0, as '8/255'")


def quarter(eps: str | float) -> str | float:
    """The step size that goes with a radius where none is given: "2/255" with "8/255"."""
    if not isinstance(eps, str):
        return eps / 4
    numerator, slash, denominator = eps.partition("/")
    return f"{float(numerator) / 4:.12g}{slash}{denominator}"


def trained_threat(config: ConfigDict) -> dict[str, Any] | None:
    """{"norm", "eps"} of the images that a run (`effective`) was trained on; None for clean ones.

    Objectives that make their own adversarial images call their radius `eps` or `max_eps`; it is in l_inf.
    """
    if config.attack is not None:
        return _said(config.attack)
    parameters, _ = signature(factory("objectives", config.objective.name))
    for key in ("eps", "max_eps"):
        if key in parameters:
            return {"norm": "linf", "eps": config.objective.get(key, parameters[key].default)}
    return None


def validated_threat(config: ConfigDict) -> dict[str, Any] | None:
    """{"norm", "eps"} of the attack on validation images; None where it has none."""
    return _said(config.validate.attack)


def _said(section):
    return None if None in (said := {key: section.get(key) for key in _THREAT}).values() else said


def follow_threat(config: ConfigDict) -> ConfigDict:
    """Undoes `effective`: where a section says what `threat` does, it says None, and changes with it."""
    for path in _ATTACKS:
        section = lookup(config, path)
        if section is None or not set(_THREAT) <= set(section) or section.eps is None:
            continue
        if "step_size" in section and same_length(section.step_size, quarter(section.eps)):
            section.step_size = None
        if section.norm == config.threat.norm and same_length(section.eps, config.threat.eps):
            section.update(norm=None, eps=None)
    for _, recipe in recipes(config):
        follow_threat(recipe)
        if recipe.threat == config.threat:
            recipe.threat.update(dict.fromkeys(_THREAT))
    return config


def upgrade(saved: ConfigDict) -> ConfigDict:
    """Gives a saved configuration the keys that were not there when its run was made; the run stays the same.

    All its attacks say their norm, eps and step size; `threat` is that of its evaluation.
    """
    reference = base()
    for section in ("validate", "evaluate"):
        for key, default in reference[section].items():
            if key not in saved[section]:
                saved[section][key] = default
    if "threat" not in saved:
        saved.threat = {key: saved.evaluate[key] for key in _THREAT}
    for _, recipe in recipes(saved):
        upgrade(recipe)
    return saved


def same(path: str, one: Any, other: Any) -> bool:
    """Whether two values of a key are equal; lengths are as numbers, "1/32" and "0.5/16"."""
    return one == other or (path.rpartition(".")[2] in ("eps", "step_size") and same_length(one, other))


def same_length(one: Any, other: Any) -> bool:
    """Whether two lengths are equal as numbers; None is equal to None only."""
    if one is None or other is None:
        return one is other
    return bool(geometry.fraction(one) == geometry.fraction(other))


# ---- parts of the checks -----------------------------------------------------------------------------------


def _given(config, section):
    return section not in OPTIONAL or config[section] is not None


def _check_call(path, section):
    """Checks a section's names and types; builds what costs nothing, which checks its values."""
    options = {key: value for key, value in plain(section).items() if key != "name"}
    for key in _SPLITTING if path == "data" else ():
        options.pop(key, None)
    if path == "data":
        _check_fraction(section.get("fraction", 1.0))
    call, context = _callable(path, section["name"])
    if path == "optimizer" and "lr" not in options:
        raise InputError("optimizer.lr is missing; give the learning rate")
    call_arguments(call, section["name"], {k: v for k, v in options.items() if k not in context}, path, context)
    if path == "attack" and options.get("loss") == "objective":  # it comes with the objective
        options.pop("loss")
    if _CALLS[path] in ("objectives", "attacks", "perturb"):
        call(**options)


def _check_fraction(value):
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
        raise InputError(f"data.fraction={value!r} is not allowed; give a number above 0 and at most 1")


def _callable(path, name):
    """(what a section's name stands for, the arguments that do not come from its options)."""
    if _CALLS[path] == "optim":
        from ibjax import optim  # which checks its own arguments with this module

        if path == "schedule":
            return optim.named("schedule", name), ("lr", "epochs", "stepping")
        return optim.named("optimizer", name), ("lr",)
    if path == "perturb":
        from ibjax import perturb

        return perturb.named(name), ()
    return factory(_CALLS[path], name), {"model": ("num_classes",)}.get(path, ())


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


_REQUIRED = object()


def lookup(config: Any, path: str, default: Any = _REQUIRED) -> Any:
    """The value at a dotted path; without a default, an absent one is an InputError."""
    for key in path.split("."):
        if not isinstance(config, Mapping | ConfigDict) or key not in config:
            if default is _REQUIRED:
                raise InputError(f"config key '{path}' is missing; start from ibjax.config.base()")
            return default
        config = config[key]
    return config


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
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


# ---- calls -------------------------------------------------------------------------------------------------


def factory(kind: str, name: Any) -> Callable:
    """The factory of module `ibjax.<kind>.<name>`; raises InputError with the nearest right name."""
    name = str(name)
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


def build(kind: str, section: Any, where: str, **context: Any) -> Any:
    """Calls the factory that `section["name"]` names with the rest of the section and `context`."""
    return factory(kind, section["name"])(**arguments(kind, section, where, context), **context)


def arguments(
    kind: str, section: Any, where: str, context: Iterable[str] = (), drop: Iterable[str] = ()
) -> dict[str, Any]:
    """The section without its name and what is dropped, checked against the factory: names, and plain types."""
    options = {key: value for key, value in plain(section).items() if key not in ("name", *drop)}
    return call_arguments(factory(kind, section["name"]), section["name"], options, where, context)


def call_arguments(call: Callable, name: str, options: dict, where: str, context: Iterable[str] = ()) -> dict[str, Any]:
    """`options`, if they are what `call` takes beside the `context` that the caller supplies; else InputError."""
    parameters, hints = signature(call, context)
    for key in options:
        if key not in parameters:
            raise InputError(f"{where}.{key} is unknown to '{name}'; {nearest(key, parameters)}")
    for key, parameter in parameters.items():
        if options.get(key) is None and parameter.default is inspect.Parameter.empty:
            raise InputError(f"{where}.{key} is missing; '{name}' needs it")
    for key, value in options.items():
        if hints.get(key) in _NESTED:
            _check_nested(value, f"{where}.{key}", *_NESTED[hints[key]])
        elif not _fits(value, hints.get(key)):
            raise InputError(f"{where}.{key}={value!r} has the wrong type; '{name}' takes {_readable(hints[key])}")
    return options


# the type of an option -> (where its factories are, what the caller supplies, an example)
_NESTED = {
    ModelSection: ("models", ("num_classes",), "a model; give its section, as dict(name='resnet', depth=18)"),
    ObjectiveSection: ("objectives", (), "an objective; give its section, as dict(name='trades', beta=6.0)"),
}


def _check_nested(section, where, kind, context, example):
    if not isinstance(section, Mapping) or "name" not in section:
        raise InputError(f"{where}={section!r} is not {example}")
    arguments(kind, section, where, context)


def signature(call: Callable, context: Iterable[str] = ()) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """(parameters that a section may set, their type hints)."""
    hidden = {"parent", "name", *context}  # what Linen or the caller supplies
    parameters = {key: p for key, p in inspect.signature(call).parameters.items() if key not in hidden}
    return parameters, typing.get_type_hints(call.__init__ if inspect.isclass(call) else call, include_extras=True)


def complete(config: ConfigDict) -> ConfigDict:
    """Writes the defaults of every call into its section, so that all options can be set, and all are saved."""
    for path in _CALLS:
        section = lookup(config, path, None)
        if section is None or "name" not in section:
            continue
        if path == "data" and "fraction" not in section:
            section.fraction = 1.0
        if path in _ATTACKS:  # before the call's own defaults, which are not this threat model's
            for key in _lengths(path, section):
                if section.get(key) is None:
                    section[key] = placeholder(str)
        _complete(section, *_callable(path, section["name"]))
    for _, recipe in recipes(config):
        complete(recipe)
    return config


def _complete(section, call, context):
    parameters, hints = signature(call, context)
    for key, parameter in parameters.items():
        if hints.get(key) in _NESTED and "name" in section.get(key, {}):
            kind, supplied, _ = _NESTED[hints[key]]
            _complete(section[key], factory(kind, section[key]["name"]), supplied)
        elif key not in section and parameter.default is not inspect.Parameter.empty:
            section[key] = _default(parameter.default, hints.get(key))


def rename(config: ConfigDict, path: str, name: str | None) -> None:
    """Gives a section another name: of its options those stay that the new call takes too; what it needs can be set.

    An optional section appears with its name, and disappears with None.
    """
    above, _, last = path.rpartition(".")
    parent = lookup(config, above) if above else config
    if parent[last] is None or name is None:
        parent[last] = None if name is None else ConfigDict()
    if name is None:
        return
    section = parent[last]
    section.name = name
    if (inside := local(path)) in _CALLS:
        call, context = _callable(inside, name)
        parameters, hints = signature(call, context)
        for key in set(section) - {"name", *_SPLITTING, "lr", "stepping", *parameters}:
            del section[key]
        for key, parameter in parameters.items():
            if key not in section and parameter.default is inspect.Parameter.empty:
                section[key] = _default(None, hints.get(key))


def local(path: str) -> str:
    """A key's path within the recipe that it is of: "attack.eps" of "teacher.recipe.attack.eps"."""
    return _HELD.sub("", path)


def may_be_none(config: ConfigDict, path: str) -> bool:
    """Whether None is a value of this key: it is in `base`, or the option's call takes it."""
    inside = local(path)
    reference, section, key = base(), *_parted(inside)
    if inside in OPTIONAL or lookup(reference, inside, "") is None:
        return True
    if section not in _CALLS or (called := lookup(config, path.rpartition(".")[0], None)) is None:
        return False
    parameters, hints = signature(*_callable(section, called.name))
    return key in parameters and (parameters[key].default is None or _fits(None, hints.get(key, int)))


def _parted(path):
    section, _, key = path.rpartition(".")
    return section, key


def loosen(config: ConfigDict) -> ConfigDict:
    """Gives the keys that are None the type that may replace it: what `base` has, and JSON has not."""
    reference = base()
    for path, value in leaves(reference):
        if value is None and not path.endswith("recipe") and path not in OPTIONAL and lookup(config, path, 0) is None:
            section, key = _parted(path)
            inside, typed = ((lookup(part, section) if section else part) for part in (config, reference))
            inside[key] = placeholder(typed.get_type(key))
    for _, recipe in recipes(config):
        loosen(recipe)
    return config


def recipes(config: ConfigDict) -> Iterator[tuple[str, ConfigDict]]:
    """(where, recipe) of the configurations that this one holds: its teacher's and those it is contrasted with."""
    for role in TEACHERS:
        if config[role].recipe is not None:
            yield f"{role}.recipe", config[role].recipe
    for name, recipe in config.contrast.items():
        yield f"contrast.{name}", recipe


def _default(value, hint):
    """A default as a ConfigDict can hold it: None keeps the type that may replace it."""
    if value is not None:
        return plain(value)
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = [option for option in (typing.get_args(hint) if union else (hint,)) if option is not type(None)]
    kind = typing.get_origin(kinds[0]) or kinds[0] if kinds else None
    return placeholder(kind) if kind in (int, float, str, bool, tuple) else None


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
        inner = typing.get_args(hint)
        kinds = inner[:1] * len(value) if isinstance(value, tuple) and inner[1:] == (...,) else inner
        return isinstance(value, tuple) and len(kinds) == len(value) and all(map(_fits, value, kinds))
    return hint is None or not isinstance(hint, type) or isinstance(value, hint)


def _readable(hint):
    return getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)


# ---- recipes -----------------------------------------------------------------------------------------------


def held(recipe: ConfigDict) -> ConfigDict:
    """Leaves the threat model of a teacher's or a contrast's recipe to the configuration that holds it."""
    recipe.threat = {key: placeholder(str) for key in _THREAT}
    return recipe


def parse_arg(arg: str | None, rows: tuple[str, ...] = ()) -> tuple[str, bool]:
    """(row, smoke) of a recipe's argument, as "", "smoke", "ROW" or "ROW,smoke"; the first row is the default."""
    words = [word.strip() for word in (arg or "").split(",") if word.strip()]
    chosen = [word for word in words if word != "smoke"]
    takes = f"it takes {'a row, smoke, or ROW,smoke' if rows else 'smoke alone'}"
    for word in chosen:
        if word not in rows:
            raise InputError(f"the recipe's argument '{word}' is unknown; {takes}; {nearest(word, ('smoke', *rows))}")
    if len(chosen) > 1:
        raise InputError(f"the recipe's arguments {', '.join(chosen)} exclude each other; {takes}")
    if len(rows) > 1 and not chosen:
        log.info("row '%s' of this recipe; its others are %s", rows[0], ", ".join(rows[1:]))
    return (chosen[0] if chosen else rows[0] if rows else ""), "smoke" in words


def smoke(config: ConfigDict, shape: tuple[int, int, int], num_classes: int, model: Mapping[str, Any]) -> ConfigDict:
    """Shrinks a recipe to seconds on a CPU: synthetic images of the right shape, the network changed by `model`."""
    config.data = dict(name="synthetic", shape=shape, num_classes=num_classes, val_size=8, split_seed=0)
    config.model.update(model)
    config.update(batch_size=8, epochs=2, log_every=2, checkpoint_every=1)
    for attack in (config.attack, config.validate.attack):
        if attack is not None and "steps" in attack:
            attack.steps = 2
    config.validate.update(every=1, batch_size=8)
    config.evaluate.update(attacks=("fgsm", "pgd-2", "margin-2"), ladder=(), batch_size=8)
    return config
