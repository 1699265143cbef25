"""Code of the user's own that a configuration names: where it lies, its factory, its digests, and whether it may run.

| name                       | refers to                                                                               |
|----------------------------|-----------------------------------------------------------------------------------------|
| `my_method`                | an entry point of an installed package, in the group `ibjax.objectives`, `.models`, …   |
| `my_pkg.my_method`         | the factory in the module `my_pkg.my_method`, else `my_method` in the module `my_pkg`   |
| `./my_method.py:my_method` | `my_method` in that file; without `:my_method` the factory of the usual name            |

The factory of the usual name is `Model` for a network, `load` for a data set, otherwise the last part of the module's
name. A file is imported by its path into a package of its own: `sys.path` stays as it is, and its neighbours are
imported as `from . import neighbour`. A module is imported once per process, and its digests (`ibjax.sources`) are
those of that moment.

Permission: a name in the user's own recipe, command or Python call may run. One in a run's folder may run only if it
is an entry point, if this process already runs it, or after `--trust=code`; if its code has changed since the run was
made, only after `--trust=changed` (`trusting`).
"""

import contextlib
import contextvars
import functools
import hashlib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import os
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ibjax import files, sources
from ibjax.errors import CodeError, InputError, nearest

TRUSTS = ("code", "changed")
USUAL = {"models": "Model", "data": "load"}  # kind -> the usual name of its factories; otherwise that of the module
_FILE = re.compile(r"(?P<file>.+\.py)(:(?P<attribute>[^\W\d]\w*))?")
_PACKAGE = "ibjax_own_"  # with a digest of the folder: the package into which files of a folder are imported
_trusted: contextvars.ContextVar[str | None] = contextvars.ContextVar("trusted", default=None)
_allowed: dict[str, dict[str, str]] = {}  # name that the user gave or permitted -> the digests of its code
_loaded: "dict[str, _Loaded]" = {}  # key of the module -> module
_told: list[importlib.metadata.EntryPoint] = []  # of which a warning has been given
log = logging.getLogger(__name__)


class Source(NamedTuple):
    """Where the code of a name lies; nothing of it has been imported."""

    kind: str  # "objectives", "models", …
    name: str
    module: str  # dotted; "" for a file
    attribute: str  # of the module: the factory
    file: Path
    root: Path  # the folder whose source files count, as far as they are imported
    version: str = ""  # of the distribution of an entry point, as "my-pkg 1.0"

    @property
    def key(self) -> str:
        """Identifies the module in this process."""
        return self.module or str(self.file.resolve())

    def __str__(self):
        return f"{singular(self.kind)} '{self.name}'"


class _Loaded(NamedTuple):
    module: types.ModuleType
    digests: dict[str, str]


def singular(kind: str) -> str:
    """What a name of this kind names, for messages: "objective" for "objectives"."""
    return kind.removesuffix("s")


# ---- names -------------------------------------------------------------------------------------------------


def is_file(name: str) -> bool:
    """Whether a name refers to a file, as './my_method.py:my_method' does."""
    return bool(_FILE.fullmatch(name))


def is_reference(name: str) -> bool:
    """Whether a name refers to a file or, as 'my_pkg.my_method', to a module."""
    parts = name.split(".")
    return is_file(name) or (len(parts) > 1 and all(part.isidentifier() for part in parts))


def anchored(name: str, folder: str | os.PathLike) -> str:
    """The name with the absolute path of its file, which `folder` precedes if it is relative; other names unchanged."""
    if not (match := _FILE.fullmatch(name)):
        return name
    return os.path.abspath(Path(folder) / files.path(match["file"])) + (match[2] or "")


def unanchored(name: str) -> str:
    """The name without the folder of its file: the same wherever the file lies."""
    return name.rpartition("/")[2] if is_file(name) else name


def found_again(name: str, recorded: Any, *folders: str | os.PathLike) -> str:
    """The name with the path at which its file is found now.

    That is the path of the same code, by the digests that a run `recorded`, if this process runs it; else its own path;
    else the first of the `folders` that has a file of its name.
    """
    match = _FILE.fullmatch(name)
    if not match:
        return name
    before = recorded.get("sha256") if isinstance(recorded, Mapping) else None
    for other, digests in _allowed.items():
        if unanchored(other) == unanchored(name) and digests == before:
            return other
    if not Path(match["file"]).is_file():
        for file in (Path(folder) / Path(match["file"]).name for folder in folders):
            if file.is_file():
                return os.path.abspath(file) + (match[2] or "")
    return name


# ---- finding, without an import ----------------------------------------------------------------------------


def locate(kind: str, name: str) -> Source | None:
    """Where the code of a name lies; None for a name of another form that no installed package gives to this kind.

    Raises CodeError where the file or the module is missing.
    """
    if match := _FILE.fullmatch(name):
        file = Path(os.path.abspath(files.path(match["file"])))
        if not file.is_file():
            raise CodeError(f"{singular(kind)} '{name}': there is no file {file}")
        return Source(kind, name, "", match["attribute"] or USUAL.get(kind) or file.stem, file, file.parent)
    if is_reference(name):
        return _of_dotted(kind, name)
    if name in entry_points(kind):
        return _of_entry_point(kind, _the_only(kind, name))
    return _beside_the_built_in(kind, name)


def _of_dotted(kind, name):
    parent, _, last = name.rpartition(".")
    if name.startswith("ibjax."):
        raise CodeError(
            f"{singular(kind)} '{name}' is in ibjax itself; name what is built in by its last part, '{last}'"
        )
    found = _of_module(kind, name, name, USUAL.get(kind) or last) or _of_module(kind, name, parent, last)
    if found is None:
        top = name.split(".")[0]
        missing = parent if _spec(top) else top
        raise CodeError(
            f"{singular(kind)} '{name}': Python finds no module '{missing}'; install its package (pip install -e "
            f"FOLDER), set PYTHONPATH=FOLDER, or name its file, as './my_method.py:my_method'"
        )
    return found


def _of_entry_point(kind, point):
    attribute = point.attr or USUAL.get(kind) or point.module.split(".")[-1]
    owner = f"{point.dist.name} {point.dist.version}" if point.dist else ""
    if (source := _of_module(kind, point.name, point.module, attribute)) is None:
        raise CodeError(
            f"{singular(kind)} '{point.name}': the entry point of {owner or 'a package'} names the module "
            f"'{point.module}', which Python does not find; install the package again"
        )
    return source._replace(version=owner)


def _of_module(kind, name, module, attribute):
    spec = _spec(module)
    if spec is None:
        return None
    if not spec.origin or not os.path.isfile(spec.origin):
        raise CodeError(
            f"{singular(kind)} '{name}': the module '{module}' has no source file, so it cannot be recorded"
        )
    file, parts = Path(os.path.abspath(spec.origin)), module.split(".")
    root = file.parents[len(parts) - (file.stem != "__init__")]
    return Source(kind, name, module, attribute, file, root)


def _beside_the_built_in(kind, name):
    """A module in a folder that someone has appended to the `__path__` of a package of ibjax."""
    package, module = sys.modules.get(f"ibjax.{kind}"), f"ibjax.{kind}.{name}"
    if package is None or not hasattr(package, "__path__") or not name.isidentifier():
        return None
    folders = [folder for folder in package.__path__ if folder != os.path.dirname(str(package.__file__))]
    found = importlib.machinery.PathFinder.find_spec(module, folders)
    if found is None or not found.origin:
        return None
    file = Path(os.path.abspath(found.origin))
    return Source(kind, name, module, USUAL.get(kind) or name, file, file.parent)


def _spec(module):
    """The spec of a dotted module, or None. Unlike `importlib.util.find_spec` it imports no package around it."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # a module without a spec, such as __main__
        return None
    path = top
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        path = f"{path}.{part}"
        spec = importlib.machinery.PathFinder.find_spec(path, spec.submodule_search_locations)
    return spec


# ---- entry points ------------------------------------------------------------------------------------------


def entry_points(kind: str) -> dict[str, importlib.metadata.EntryPoint]:
    """{name: entry point} of the installed packages for this kind."""
    return {point.name: point for point in _points(f"ibjax.{kind}", tuple(sys.path))}


def _the_only(kind, name):
    """The entry point of a name; CodeError where two packages have one."""
    first, *others = (point for point in _points(f"ibjax.{kind}", tuple(sys.path)) if point.name == name)
    for point in others:
        if (first.value, first.dist and first.dist.name) != (point.value, point.dist and point.dist.name):
            names = " and ".join(str(one.dist and one.dist.name) for one in (first, point))
            raise CodeError(
                f"{singular(kind)} '{name}' is an entry point of both {names}; uninstall one, or name the module, as "
                f"'{point.value.replace(':', '.')}'"
            )
    return first


@functools.lru_cache(maxsize=32)
def _points(group, path):
    del path  # a part of the key: a change of sys.path may bring other packages
    return tuple(importlib.metadata.entry_points(group=group))


def tell_of_shadowed(kind: str, name: str) -> None:
    """Warns, once, of an installed package with an entry point that has the name of a built-in: it is not used."""
    for point in _points(f"ibjax.{kind}", tuple(sys.path)):
        if point.name == name and point not in _told:
            _told.append(point)
            log.warning(
                "the entry point '%s' of %s in ibjax.%s is not used: ibjax's own %s has that name; rename it",
                name,
                point.dist.name if point.dist else point.value,
                kind,
                singular(kind),
            )


# ---- importing ---------------------------------------------------------------------------------------------


def find(source: Source) -> Callable:
    """The factory, imported. Raises CodeError where the import fails or finds nothing that can be called."""
    module = _load(source).module
    found: Any = module
    for part in source.attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        own = (key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise CodeError(
            f"{source}: {source.file} defines no '{source.attribute}' to call; {nearest(source.attribute, own)}"
        )
    _allowed[anchored(source.name, os.getcwd())] = _loaded[source.key].digests
    return found


def _load(source):
    if source.key not in _loaded:
        digests = sources.digests(source.file, source.root, source.module)
        _loaded[source.key] = _Loaded(_imported(source), digests)
    return _loaded[source.key]


def _imported(source):
    importlib.invalidate_caches()  # files may have been written a moment ago
    try:
        return importlib.import_module(source.module) if source.module else _import_file(source.file)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        hint = ""
        if isinstance(error, ModuleNotFoundError) and (source.root / f"{error.name}.py").is_file():
            hint = f"; a file beside it is imported as `from . import {error.name}`"
        raise CodeError(f"{source}: {failure(error, source.file)}{hint}") from error


def _import_file(file):
    """The module of a file, in a package that stands for its folder."""
    package = _PACKAGE + hashlib.sha256(str(file.parent.resolve()).encode()).hexdigest()[:12]
    if package not in sys.modules:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(file.parent)]
    name = f"{package}.{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def failure(error: BaseException, file: Path | None = None) -> str:
    """What happened in `file`, or in any loaded one, on one line: "my.py, line 3: ValueError: …"."""
    there = [str(file)] if file else [module.__file__ for module, _ in _loaded.values()]
    line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) and error.filename in there else None
    place = f"{error.filename}, line {line}" if line else ""  # pyright: ignore[reportAttributeAccessIssue]
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename in there:
            place = f"{frame.filename}, line {frame.lineno}"
    text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())[:200] or "no message"
    return f"{place}{': ' * bool(place)}{type(error).__name__}: {text}"


# ---- records ------------------------------------------------------------------------------------------------


def record(source: Source) -> dict[str, Any]:
    """What a run states about the code behind a name: the name, its module or file, the version, SHA-256 digests.

    The digests are those of what this process runs, else those of the files as they are.
    """
    version = source.version or (sources.version(source.module.split(".")[0]) if source.module else "")
    return {
        "kind": source.kind,
        "name": source.name,
        **({"module": source.module} if source.module else {"file": str(source.file)}),
        **({"version": version} if version else {}),
        "sha256": _loaded[source.key].digests
        if source.key in _loaded
        else sources.digests(source.file, source.root, source.module),
    }


# ---- permission --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def trusting(word: str | None) -> Iterator[None]:
    """Within it, code that a run's folder names may run: "code" if it is what the run was made with, "changed" also if
    it has changed since. None leaves the permission as it is.
    """
    token = _trusted.set(_trusted.get() if word is None else _checked(word))
    try:
        yield
    finally:
        _trusted.reset(token)


def trust(word: str) -> None:
    """The permission of `trusting`, for the rest of the process: for command lines."""
    _trusted.set(_checked(word))


def _checked(word):
    if word not in TRUSTS:
        raise InputError(f"trust={word!r} is unknown; {nearest(str(word), TRUSTS)}")
    return word


def may_run(name: str) -> bool:
    """Whether code that a run's folder names may run: it has the permission, or this process runs it anyway."""
    return not is_reference(name) or bool(_trusted.get()) or anchored(name, os.getcwd()) in _allowed


def changed(recorded: Any, source: Source) -> list[str]:
    """The source files that are not what a run recorded; [] where nothing changed."""
    now = record(source)["sha256"]
    before = recorded.get("sha256") if isinstance(recorded, Mapping) else None
    before = before if isinstance(before, Mapping) else {}
    return [str(source.root / path) for path in sorted({*now, *before}) if now.get(path) != before.get(path)]


def refuse_changed(recorded: Any, source: Source, where: Any) -> None:
    """Raises CodeError where code has changed since the run in `where` was made, unless that is permitted."""
    if _trusted.get() == "changed" or not (paths := changed(recorded, source)):
        return
    raise CodeError(
        f"{where} was made with other code of {source}: {', '.join(paths)} changed since; put the code back, give "
        f"another --workdir to train with it, or go on all the same with --trust=changed (in Python trust='changed')"
    )
