"""Sections of a configuration as calls: what a name stands for, what its options may be, and finding a section.

A section with a `name` is a call: objective=dict(name="trades", beta=6.) imports `ibjax.objectives.trades` and calls
its factory with the rest. What a section may say is read off the factory's signature.
"""

import importlib
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ibjax.errors import InputError, nearest

TEACHERS = ("teacher", "assistant")
# the types of options that are sections themselves: of a model, or an objective
ModelSection = Annotated[Mapping[str, Any], "models"]
ObjectiveSection = Annotated[Mapping[str, Any], "objectives"]
# kind -> the name of the factory in each module of the package `ibjax.<kind>`; None: the module's own name
_PACKAGES = {"models": "Model", "data": "load", "objectives": None, "attacks": None}
# kind -> (module, the dict in it that has the factories by name)
_TABLES = {
    "optimizers": ("ibjax.optim", "OPTIMIZERS"),
    "schedules": ("ibjax.optim", "SCHEDULES"),
    "perturb": ("ibjax.perturb", "PERTURBATIONS"),
}
CALLS = {
    "data": "data",
    "model": "models",
    "objective": "objectives",
    "attack": "attacks",
    "validate.attack": "attacks",
    "optimizer": "optimizers",
    "schedule": "schedules",
    "perturb": "perturb",
}
# section -> the arguments that do not come from its options
_SUPPLIED = {"model": ("num_classes",), "optimizer": ("lr",), "schedule": ("lr", "epochs", "stepping")}
OPTIONAL = ("attack", "perturb")  # sections that may be None
SPLITTING = ("val_size", "split_seed", "fraction")  # of the data section, for load_splits, not for the source
THREAT = ("norm", "eps")
ATTACKS = ("attack", "validate.attack", "evaluate")  # sections that take the threat model
_HELD = re.compile(rf"^(({'|'.join(TEACHERS)})\.recipe\.|contrast\.[^.]+\.)+")  # where a configuration holds another


# ---- finding -----------------------------------------------------------------------------------------------


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


def local(path: str) -> str:
    """A key's path within the recipe that it is of: "attack.eps" of "teacher.recipe.attack.eps"."""
    return _HELD.sub("", path)


def recipes(config: ConfigDict) -> Iterator[tuple[str, ConfigDict]]:
    """(where, recipe) of the configurations that this one holds: its teacher's and those it is contrasted with."""
    for role in TEACHERS:
        if config[role].recipe is not None:
            yield f"{role}.recipe", config[role].recipe
    for name, recipe in config.contrast.items():
        yield f"contrast.{name}", recipe


# ---- calls -------------------------------------------------------------------------------------------------


def factory(kind: str, name: Any) -> Callable:
    """What a name stands for: the factory of a module `ibjax.<kind>.<name>`, or a function of optim.py or perturb.py.

    Imported here by their names, since all of them import this module. Raises InputError with the nearest right name.
    """
    name = str(name)
    if kind in _TABLES:
        module, table = _TABLES[kind]
        known = getattr(importlib.import_module(module), table)
        if name not in known:
            raise InputError(f"{kind.removesuffix('s')}.name {name!r} is unknown; {nearest(name, known)}")
        return known[name]
    attribute = _PACKAGES[kind] or name
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
    names = [n for n in names if hasattr(importlib.import_module(f"ibjax.{kind}.{n}"), _PACKAGES[kind] or n)]
    raise InputError(f"{kind.removesuffix('s')}.name {name!r} is unknown; {nearest(name, names)}")


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
        elif not fits(value, hints.get(key)):
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


def called(path: str, name: Any) -> tuple[Callable, tuple[str, ...]]:
    """(what a section's name stands for, the arguments that do not come from its options)."""
    return factory(CALLS[path], name), _SUPPLIED.get(path, ())


def fits(value, hint):
    """Whether a plain value agrees with the plain types in a hint; hints that say more are not judged."""
    if hint in (int, float, str, bool):
        if hint is float:
            return isinstance(value, int | float) and not isinstance(value, bool)
        return isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in typing.get_args(hint))
    if hint is type(None):
        return value is None
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        kinds = inner[:1] * len(value) if isinstance(value, tuple) and inner[1:] == (...,) else inner
        return isinstance(value, tuple) and len(kinds) == len(value) and all(map(fits, value, kinds))
    return hint is None or not isinstance(hint, type) or isinstance(value, hint)


def _readable(hint):
    return getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)


# ---- defaults ----------------------------------------------------------------------------------------------


def complete(config: ConfigDict) -> ConfigDict:
    """Writes the defaults of every call into its section, so that all options can be set, and all are saved."""
    for path in CALLS:
        section = lookup(config, path, None)
        if section is None or "name" not in section:
            continue
        if path == "data" and "fraction" not in section:
            section.fraction = 1.0
        if path in ATTACKS:  # before the call's own defaults, which are not this threat model's
            for key in lengths(path, section):
                if section.get(key) is None:
                    section[key] = placeholder(str)
        _complete(section, *called(path, section["name"]))
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


def _default(value, hint):
    """A default as a ConfigDict can hold it: None keeps the type that may replace it."""
    if value is not None:
        return plain(value)
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = [option for option in (typing.get_args(hint) if union else (hint,)) if option is not type(None)]
    kind = typing.get_origin(kinds[0]) or kinds[0] if kinds else None
    return placeholder(kind) if kind in (int, float, str, bool, tuple) else None


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
    if (inside := local(path)) in CALLS:
        call, context = called(inside, name)
        parameters, hints = signature(call, context)
        for key in set(section) - {"name", *SPLITTING, "lr", "stepping", *parameters}:
            del section[key]
        for key, parameter in parameters.items():
            if key not in section and parameter.default is inspect.Parameter.empty:
                section[key] = _default(None, hints.get(key))


def lengths(path, section):
    """norm, eps and step_size as far as a section takes them -> whether None stands for a value that we give."""
    if path == "evaluate":
        return dict.fromkeys((*THREAT, "step_size"), True)
    parameters, _ = signature(*called(path, section["name"]))
    return {key: parameters[key].default is not None for key in (*THREAT, "step_size") if key in parameters}
