"""Sections of a configuration as function calls: finding a section, its factory, and the options that it may have.

A section with a `name` describes a call: objective=dict(name="trades", beta=6.) imports `ibjax.objectives.trades` and
calls its factory with the other entries. The factory's signature defines which options the section may have. A name
that is not built in may refer to the user's own code: `ibjax.extensions`.
"""

import functools
import importlib
import importlib.machinery
import inspect
import os
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ibjax import extensions
from ibjax.errors import CodeError, InputError, nearest

TEACHERS = ("teacher", "assistant")
THREAT = ("norm", "eps")
# the types of options that are themselves sections, of a model or of an objective
ModelSection = Annotated[Mapping[str, Any], "models"]
ObjectiveSection = Annotated[Mapping[str, Any], "objectives"]
_PACKAGES = ("models", "data", "objectives", "attacks")  # kinds whose factories are in a module of `ibjax.<kind>` each
# kind -> (module, its dict from names to factories)
_TABLES = {
    "optimizers": ("ibjax.optim", "OPTIMIZERS"),
    "schedules": ("ibjax.optim", "SCHEDULES"),
    "perturbations": ("ibjax.perturb", "PERTURBATIONS"),
    "augmentations": ("ibjax.data.policies", "AUGMENTATIONS"),
    "mixes": ("ibjax.data.mixing", "MIXES"),
    "extras": ("ibjax.data.extra", "EXTRAS"),
    "writers": ("ibjax.runs.writers", "WRITERS"),
}
# kind -> (module, its function (name, what a factory of the user's own has made) -> the same, checked)
_CONTRACTS = {
    "models": ("ibjax.models.own", "own_model"),
    "data": ("ibjax.data", "own_data"),
    "objectives": ("ibjax.objectives.own", "own_objective"),
    "attacks": ("ibjax.attacks.entrance", "own_attack"),
    "optimizers": ("ibjax.optim", "own_optimizer"),
    "schedules": ("ibjax.optim", "own_schedule"),
    "perturbations": ("ibjax.perturb", "own_perturbation"),
    "augmentations": ("ibjax.data.augment", "own_augmentation"),
    "mixes": ("ibjax.data.mixing", "own_mix"),
    "writers": ("ibjax.runs.writers", "own_writer"),
}
# kind -> (module, its function that turns what the user's own code defines into a factory)
_ADAPTED = {"models": ("ibjax.models.own", "own_factory")}
# kind -> arguments that a factory of the user's own must take, since the library passes them
_PASSED = {
    "models": ("num_classes",),
    "attacks": THREAT,
    "optimizers": ("lr",),
    "schedules": ("lr", "epochs"),
    "writers": ("run",),
}
CALLS = {
    "data": "data",
    "model": "models",
    "objective": "objectives",
    "attack": "attacks",
    "validate.attack": "attacks",
    "optimizer": "optimizers",
    "schedule": "schedules",
    "perturb": "perturbations",
    "augment": "augmentations",
    "mix": "mixes",
}
# section -> the factory's arguments that the caller supplies, not the section
_SUPPLIED = {
    "model": ("num_classes",),
    "optimizer": ("lr",),
    "schedule": ("lr", "epochs", "stepping", "step_in_epochs"),
}
OPTIONAL = ("attack", "perturb", "mix")  # sections that may be None
NAMELESS = ("augment",)  # sections that may lack a name, which then stands for the built-in factory
SPLITTING = (
    "val_size",
    "split_seed",
    "fraction",
    "extra",
)  # options of the data section that load_splits takes, not the source
ATTACKS = ("attack", "validate.attack", "evaluate")  # sections that use the threat model
_HELD = re.compile(rf"^(({'|'.join(TEACHERS)})\.recipe\.|contrast\.[^.]+\.)+")  # the path of a nested configuration


# ---- finding -----------------------------------------------------------------------------------------------


_REQUIRED = object()


def lookup(config: Any, path: str, default: Any = _REQUIRED) -> Any:
    """The value at a dotted path; raises InputError if it is absent and there is no default."""
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
    """Converts ConfigDicts to dicts and lists to tuples, recursively: the form that factories and JSON take."""
    if isinstance(value, Mapping | ConfigDict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(plain(item) for item in value)
    return value


def local(path: str) -> str:
    """A key's path within its own recipe: "attack.eps" for "teacher.recipe.attack.eps"."""
    return _HELD.sub("", path)


def recipes(config: ConfigDict) -> Iterator[tuple[str, ConfigDict]]:
    """(path, recipe) of the configurations inside this one: those of its teachers and of its contrasts."""
    for role in TEACHERS:
        if config[role].recipe is not None:
            yield f"{role}.recipe", config[role].recipe
    for name, recipe in config.contrast.items():
        yield f"contrast.{name}", recipe


# ---- calls -------------------------------------------------------------------------------------------------


def factory(kind: str, name: Any) -> Callable:
    """The factory that a name refers to: one that is built in, else one of the user's own (`ibjax.extensions`).

    Modules are imported on demand, since all of them import this one. Raises InputError with the closest known name,
    and CodeError where the user's own code is missing, fails, or does not have the right signature.
    """
    name = str(name)
    if (found := _built_in(kind, name)) is not None:
        extensions.tell_of_shadowed(kind, name)
        return found
    if (source := extensions.locate(kind, name)) is not None:
        return _own(source, extensions.find(source))
    label = {"perturbations": "perturb", "augmentations": "augment", "mixes": "mix"}.get(kind) or extensions.singular(
        kind
    )
    raise InputError(
        f"{label}.name {name!r} is unknown; {nearest(name, {*_names(kind), *extensions.entry_points(kind)})}; "
        f"name own code as 'my_pkg.my_method' or './my_method.py:my_method'"
    )


def own_source(kind: str, name: str) -> extensions.Source | None:
    """Where the user's own code behind a name lies; None for what is built in, and for unknown names."""
    return None if _built_in(kind, name) is not None else extensions.locate(kind, name)


def _built_in(kind, name):
    """The factory of a built-in, or None."""
    if kind in _TABLES:
        module, table = _TABLES[kind]
        return getattr(importlib.import_module(module), table).get(name)
    package = importlib.import_module(f"ibjax.{kind}")
    folder = os.path.dirname(str(package.__file__))  # not `__path__`, to which someone may have added others
    module = f"{package.__name__}.{name}"
    if not name.isidentifier() or importlib.machinery.PathFinder.find_spec(module, [folder]) is None:
        return None
    return getattr(importlib.import_module(module), extensions.USUAL.get(kind) or name, None)


def _names(kind):
    """The names of the built-ins of a kind."""
    if kind in _TABLES:
        module, table = _TABLES[kind]
        return list(getattr(importlib.import_module(module), table))
    folder = os.path.dirname(str(importlib.import_module(f"ibjax.{kind}").__file__))
    return [info.name for info in pkgutil.iter_modules([folder]) if _built_in(kind, info.name) is not None]


@functools.cache
def _own(source, call):
    """A factory of the user's own, which checks what it makes; raises CodeError on a wrong signature."""
    module, contract = _CONTRACTS[source.kind]
    contract = getattr(importlib.import_module(module), contract)
    try:
        if source.kind in _ADAPTED:
            module, adapt = _ADAPTED[source.kind]
            call = getattr(importlib.import_module(module), adapt)(call)
        parameters = inspect.signature(call).parameters
    except (TypeError, ValueError):
        raise CodeError(f"{source}: Python does not know which arguments it takes; define it as a function") from None
    for key in _PASSED.get(source.kind, ()):
        if key not in parameters:
            raise CodeError(
                f"{source} takes no argument '{key}', which ibjax passes; it takes {', '.join(parameters) or 'none'}"
            )
    for key, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise CodeError(f"{source}: its argument '{key}' has no name to be given by; list each option by its name")

    @functools.wraps(call, updated=())
    def made(*args, **options):
        try:
            return contract(source, call(*args, **options), options)
        except InputError:
            raise
        except Exception as error:
            raise CodeError(f"{source} cannot be made: {extensions.failure(error)}") from error

    return made


def build(kind: str, section: Any, where: str, **context: Any) -> Any:
    """Calls the factory named by `section["name"]` with the other entries of the section and with `context`."""
    return factory(kind, section["name"])(**arguments(kind, section, where, context), **context)


def arguments(
    kind: str, section: Any, where: str, context: Iterable[str] = (), drop: Iterable[str] = ()
) -> dict[str, Any]:
    """The options of a section without `name` and `drop`; their names and types are checked against the factory."""
    options = {key: value for key, value in plain(section).items() if key not in ("name", *drop)}
    return call_arguments(factory(kind, section["name"]), section["name"], options, where, context)


def call_arguments(call: Callable, name: str, options: dict, where: str, context: Iterable[str] = ()) -> dict[str, Any]:
    """Returns `options` if `call` takes them, in addition to the arguments in `context`; else raises InputError."""
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


# type of an option -> (kind of its factories, arguments that the caller supplies, description with an example)
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
    hidden = {"parent", "name", *context}  # supplied by Linen or by the caller
    parameters = {key: p for key, p in inspect.signature(call).parameters.items() if key not in hidden}
    call = inspect.unwrap(call)
    call = call.func if isinstance(call, functools.partial) else call
    try:
        hints = typing.get_type_hints(call.__init__ if inspect.isclass(call) else call, include_extras=True)
    except (NameError, TypeError) as error:
        raise InputError(
            f"the types of the options of {getattr(call, '__name__', call)} cannot be read ({error}); import what they "
            f"name at run time too, not for type checkers alone"
        ) from None
    return parameters, hints


def called(path: str, name: Any) -> tuple[Callable, tuple[str, ...]]:
    """(the factory of a section, the arguments that the caller supplies)."""
    return factory(CALLS[path], name), _SUPPLIED.get(path, ())


def fits(value, hint):
    """Whether a plain value has the type of a hint; hints other than plain types accept every value."""
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


def named_sections(config: Any) -> Iterator[tuple[str, str, str]]:
    """(path, kind, name) of a configuration's sections that name a factory, without those of the recipes inside it."""
    for path, kind in (*CALLS.items(), ("head_optimizer", "optimizers")):
        if (lookup(config, path, None) or {}).get("name"):
            yield from _named(lookup(config, path), path, kind)


def _named(section, path, kind):
    yield path, kind, section["name"]
    for key, hint in signature(factory(kind, section["name"]))[1].items():
        if hint in _NESTED and "name" in (section.get(key) or {}):
            yield from _named(section[key], f"{path}.{key}", _NESTED[hint][0])


# ---- defaults ----------------------------------------------------------------------------------------------


def complete(config: ConfigDict) -> ConfigDict:
    """Writes the defaults of every factory into its section, so that every option can be overridden and is saved."""
    for path in CALLS:
        section = lookup(config, path, None)
        if section is None or "name" not in section:
            continue
        if path == "data" and "fraction" not in section:
            section.fraction = 1.0
        if path == "data" and section.get("extra") is not None:
            _complete(section.extra, factory("extras", "npz"), ("shape", "num_classes"))
        if path in ATTACKS:  # the threat model takes precedence over the factory's defaults
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
    """A default in the form that a ConfigDict can hold: None becomes a placeholder of the option's type."""
    if value is not None:
        return plain(value)
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = [option for option in (typing.get_args(hint) if union else (hint,)) if option is not type(None)]
    kind = typing.get_origin(kinds[0]) or kinds[0] if kinds else None
    return placeholder(kind) if kind in (int, float, str, bool, tuple) else None


def rename(config: ConfigDict, path: str, name: str | None) -> None:
    """Gives a section another name. Options that the new factory also takes are kept; its required ones can be set.

    An optional section that is None is created; `name=None` removes it.
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
    """Maps those of norm, eps and step_size that a section takes to whether the threat model replaces a None there."""
    if path == "evaluate":
        return dict.fromkeys((*THREAT, "step_size"), True)
    parameters, _ = signature(*called(path, section["name"]))
    return {key: parameters[key].default is not None for key in (*THREAT, "step_size") if key in parameters}
