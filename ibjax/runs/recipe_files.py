"""Configurations from files, changed by `--config.KEY=VALUE`.

| --config=           | the configuration                                                              |
|---------------------|--------------------------------------------------------------------------------|
| NAME[:arg]          | of a recipe that ships with ibjax: `configs/NAME.py`, which an installation has too |
| FILE.py[:arg]       | of any recipe                                                                  |
| FOLDER/config.json  | of a run                                                                       |
"""

import contextlib
import inspect
import runpy
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from ibjax import cli, config, files, places, threat
from ibjax.errors import CodeError, InputError, nearest
from ibjax.runs import own_code


def override(settings: ConfigDict, overrides: list[str]) -> ConfigDict:
    """The configuration with `--config.KEY=VALUE` applied; every option of every section can be set.

    `--config.attack=None` removes an optional section, `--config.perturb.name=awp` adds one.
    """
    overrides = [flag for flag in overrides if not _decides(settings, *_pair(flag))]
    config.complete(settings)
    overrides = [flag for flag in overrides if not _is_none(settings, *_pair(flag))]
    for path, value in map(_pair, overrides):
        _check_key(settings, path)
        if value is None:
            raise InputError(f"--config.{path} has no value; write --config.{path}=VALUE")
    if not overrides:  # config_flags would print the whole configuration first
        settings.lock()
        return settings
    values = flags.FlagValues()
    with _argv(["", *overrides]):  # config_flags looks for overrides there
        config_flags.DEFINE_config_dict("config", settings, lock_config=True, flag_values=values)
        try:
            values(["", *overrides])
        except Exception as error:  # errors of absl, and KeyError, TypeError, ValueError of config_flags
            raise InputError(last_line(error)) from None
    return settings


def _pair(flag):
    path, separator, value = flag.lstrip("-").removeprefix("config.").partition("=")
    return path, value if separator else None


def _decides(settings, path, value):
    """Applies a flag that names or removes a section, and so decides which options exist; returns whether it did."""
    section, _, key = path.rpartition(".")
    nameless = (*config.OPTIONAL, *config.NAMELESS)  # it may have no name so far
    optional = config.local(section) in nameless and config.lookup(settings, section, 0) != 0
    if key == "name" and value and (optional or config.lookup(settings, path, None) is not None):
        config.rename(settings, section, value)
    elif config.local(path) in config.OPTIONAL and value == "None" and config.lookup(settings, path, 0) != 0:
        config.rename(settings, path, None)
    else:
        return False
    return True


def _is_none(settings, path, value):
    """Applies a flag whose value is None, where the key allows None; returns whether it did."""
    section, _, key = path.rpartition(".")
    parent = config.lookup(settings, section, {}) if section else settings
    if value != "None" or key not in parent or not config.may_be_none(settings, path):
        return False
    parent[key] = None
    return True


def _check_key(settings, path):
    """Raises InputError unless `path` names a single value: it may be unknown, or a section."""
    paths = [path for path, _ in config.leaves(settings)]
    below = (p.removeprefix(f"{path}.").partition(".")[0] for p in paths if p.startswith(f"{path}."))
    inside = list(dict.fromkeys(below))
    if inside or config.local(path) in config.OPTIONAL:
        name = "" if inside and "name" not in inside else f"; another one by --config.{path}.name=NAME"
        none = ", none by None" if config.local(path) in config.OPTIONAL else ""
        keys = f"; its keys are {', '.join(inside)}" if inside else ""
        raise InputError(f"config key '{path}' is a section, not a value{name}{none}{keys}")
    if path not in paths:
        section = [p for p in paths if p.rpartition(".")[0] == path.rpartition(".")[0]]
        raise InputError(f"config key '{path}' is unknown; {nearest(path, section or paths)}")


@contextlib.contextmanager
def _argv(argv):
    before, sys.argv = sys.argv, argv
    try:
        yield
    finally:
        sys.argv = before


def load(value: str) -> ConfigDict:
    """The configuration that --config=`value` names; raises InputError when it is missing or fails.

    Files that a recipe names are relative to the recipe's folder.
    """
    file, arg = _parted(value)
    made = _of_run(file, arg) if file.suffix == ".json" else own_code.anchor(_of_recipe(file, arg), file.parent)
    config.check(made)
    return made


def _parted(value):
    """(the file that --config=`value` names, its argument)."""
    name, _, arg = value.partition(":")
    shipped = places.recipes() / f"{name}.py"
    if Path(name).name == name and not Path(name).suffix and shipped.is_file():
        return shipped, arg
    file = files.path(name)
    if not file.is_file():
        raise InputError(f"--config={file} is no file; {_instead(file)}")
    return file, arg


def listing(value: str | None = None) -> Iterator[str]:
    """The lines of --list: each recipe that ships with ibjax and its rows; or the rows of --config=`value`, one a line.

    Raises InputError where that recipe has no rows.
    """
    if value is not None:
        file, _ = _parted(value)
        if not (rows := () if file.suffix == ".json" else _rows(file)):
            raise InputError(f"{file} has no rows (no variable ROWS); give it as --config={value}")
        yield from rows
        return
    for file in sorted(places.recipes().glob("*.py")):
        text, _ = cli.docstring(file)
        yield f"{file.stem}: {cli.first_sentence(text)}"
        if rows := _rows(file):
            yield _wrapped(", ".join(rows))
    yield f"give --config=NAME or NAME:ROW; NAME:smoke and NAME:ROW,smoke take seconds; they lie in {places.recipes()}"


def _wrapped(text):
    indent = "    "
    return textwrap.fill(text, 120, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _rows(file):
    return _definitions(file).get("ROWS", ())


def _definitions(file):
    """What the user's Python file defines; InputError where it fails."""
    try:
        return runpy.run_path(str(file))
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{file} fails with {type(error).__name__}: {last_line(error)}") from None


def beside(recipe: str, name: str) -> SimpleNamespace:
    """The definitions of another recipe in the same folder, for shared settings: `beside(__file__, "NAME.py")`.

    Raises InputError where there is no such file beside `recipe`.
    """
    file = Path(recipe).with_name(name)
    if not file.is_file():
        raise InputError(f"{recipe} shares settings with {name}, which is not beside it; copy both")
    return SimpleNamespace(**runpy.run_path(str(file)))


def _instead(file):
    """Advice for a message about a missing file: the similar names, or what its folder holds."""
    shipped = [p.stem for p in places.recipes().glob("*.py")]
    if file.stem in shipped:
        return f"the recipe of that name which ships with ibjax is --config={file.stem}"
    if file.name == str(file) and not file.suffix:
        return f"nor a recipe that ships with ibjax: {nearest(file.name, shipped)}"
    folder = file if file.is_dir() else file.parent
    if not folder.is_dir():
        return f"there is no folder {folder}"
    there = sorted(p.name for pattern in ("*.py", "config.json") for p in folder.glob(pattern))
    return (
        f"in {folder}: {nearest(file.name, there)}" if there else f"{folder} holds no recipe (*.py) and no config.json"
    )


def _of_recipe(file, arg):
    make = _definitions(file).get("get_config")
    if make is None:
        raise InputError(f"{file} has no get_config(arg); define it, returning ibjax.config.base(), changed")
    if arg and not inspect.signature(make).parameters:
        raise InputError(f"{file} takes no argument, its get_config() has no parameter; leave ':{arg}' out")
    try:
        made = make(*([arg] if arg else []))
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{file} fails with {type(error).__name__}: {last_line(error)}") from None
    if isinstance(made, FrozenConfigDict):
        made = made.as_configdict()
    if not isinstance(made, ConfigDict):
        raise InputError(f"get_config of {file} returns a {type(made).__name__}; return ibjax.config.base(), changed")
    return made


def _of_run(file, arg):
    """The configuration of a run's config.json, to repeat the run or to change it."""
    if arg:
        raise InputError(f"--config={file} is a run's configuration and takes no argument; leave ':{arg}' out")
    try:
        content = files.read_json(file)
        saved = config.upgrade(ConfigDict(config.plain(content["config"])))
        own_code.permit(saved, content.get("own_code"), file)
        own_code.permit_attacks(saved.evaluate.attacks, file)
        own_code.permit_writers(saved, file)
        return config.loosen(threat.follow(saved))
    except CodeError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"--config={file} is not the config.json of a run ({last_line(error)}); give that, or FILE.py"
        ) from None


def last_line(error):
    """The last line of an error's message, which says what is wrong: absl's flags put tracebacks before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
