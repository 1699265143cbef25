"""Train, evaluate and report from one configuration.

    python -m ibjax.main --config=configs/NAME.py[:arg] --workdir=DIR [--config.a.b=v …] [--mode=train|eval] [--restart]
    python -m ibjax.main --config=OTHER/config.json --workdir=DIR [--config.a.b=v …]        as another run was made

Trains the teacher of the configuration first where it holds the recipe of one and its checkpoint is absent, then the
runs it is contrasted with, then itself; evaluates all of them; writes report.html and prints its table. Run again, it
continues where it stopped. Where the checkpoints of a run were lost, or all of them are damaged, it says so and ends:
--restart then begins that run again at step 0, with what is left of it in restarted-N/. A run that has a good
checkpoint continues from it with --restart too. Exit codes: 0 done, 2 wrong input, 3 diverged or out of memory,
69 another process of the run was lost, 75 preempted and saved, 130 interrupted.
"""

import argparse
import contextlib
import errno
import inspect
import json
import logging
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from ibjax.devices import cluster
from ibjax import config, files, errors, report, threat
from ibjax.evaluation import results
from ibjax.runs import run
from ibjax.training import loop
from ibjax.attacks import names
from ibjax.errors import InputError, nearest
from ibjax.evaluate import check_images, check_network, check_settings, evaluate
from ibjax.training.experiment import build

log = logging.getLogger(__name__)


class Command(NamedTuple):
    """What a command line asks for."""

    settings: ConfigDict
    workdir: Path
    mode: str
    restart: bool = False


def parse(argv: list[str]) -> Command:
    """Reads a command line; raises InputError on anything that it does not understand."""
    values = flags.FlagValues()
    flags.DEFINE_string(
        "config",
        None,
        "the recipe, FILE.py[:arg], or a run's config.json; --config.KEY=VALUE changes it",
        flag_values=values,
    )
    flags.DEFINE_string("workdir", None, "folder of the run; made if absent", flag_values=values)
    flags.DEFINE_enum("mode", "train", ["train", "eval"], "train and evaluate, or only evaluate", flag_values=values)
    text = "begin again at step 0 where checkpoints were lost or all are damaged; they go to restarted-N/"
    flags.DEFINE_bool("restart", False, text, flag_values=values)
    flags.DEFINE_bool("help", False, "show this", short_name="h", flag_values=values)
    overrides = [flag for flag in argv[1:] if flag.lstrip("-").startswith("config.")]
    rest = _parsed(values, [flag for flag in argv if flag not in overrides])
    if values["help"].value:
        print(f"{__doc__}\n{values.main_module_help() or values.get_help()}")
        sys.exit(0)
    if len(rest) > 1:
        raise InputError(
            f"'{rest[1]}' is no flag; flags are --config, --workdir, --mode, --restart and --config.KEY=VALUE"
        )
    for name in ("config", "workdir"):
        if not values[name].value:
            example = "python -m ibjax.main --config=configs/digits.py --workdir=runs/digits"
            raise InputError(f"--{name} is missing; for example: {example}")
    settings = override(load_config(values["config"].value), overrides)
    return Command(settings, files.path(values["workdir"].value), values["mode"].value, values["restart"].value)


def _parsed(values, argv):
    try:
        return values(argv)
    except Exception as error:  # absl's own, and KeyError, TypeError, ValueError of config_flags
        raise InputError(_last_line(error)) from None


def override(settings: ConfigDict, overrides: list[str]) -> ConfigDict:
    """The configuration with `--config.KEY=VALUE` applied; every option of every call can be set.

    `--config.attack=None` takes an optional section away, `--config.perturb.name=awp` brings one.
    """
    overrides = [flag for flag in overrides if not _decides(settings, *_pair(flag))]
    config.complete(settings)
    overrides = [flag for flag in overrides if not _is_none(settings, *_pair(flag))]
    for path, value in map(_pair, overrides):
        _check_key(settings, path)
        if value is None:
            raise InputError(f"--config.{path} has no value; write --config.{path}=VALUE")
    values = flags.FlagValues()
    with _argv(["", *overrides]):  # config_flags looks for overrides there
        config_flags.DEFINE_config_dict("config", settings, lock_config=True, flag_values=values)
        _parsed(values, ["", *overrides])
    return settings


def _pair(flag):
    path, separator, value = flag.lstrip("-").removeprefix("config.").partition("=")
    return path, value if separator else None


def _decides(settings, path, value):
    """Applies a flag that decides which options there are, a section's name or its absence; says whether it did."""
    section, _, key = path.rpartition(".")
    optional = config.local(section) in config.OPTIONAL and config.lookup(settings, section, 0) != 0
    if key == "name" and value and (optional or config.lookup(settings, path, None) is not None):
        config.rename(settings, section, value)
    elif config.local(path) in config.OPTIONAL and value == "None" and config.lookup(settings, path, 0) != 0:
        config.rename(settings, path, None)
    else:
        return False
    return True


def _is_none(settings, path, value):
    """Applies a flag whose value is None, where the key may be; says whether it did."""
    section, _, key = path.rpartition(".")
    parent = config.lookup(settings, section, {}) if section else settings
    if value != "None" or key not in parent or not config.may_be_none(settings, path):
        return False
    parent[key] = None
    return True


def _check_key(settings, path):
    """Raises InputError unless a path is that of one value."""
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


def load_config(value: str) -> ConfigDict:
    """The configuration of FILE.py[:arg], or of a run's config.json; raises InputError when it is missing or fails."""
    name, _, arg = value.partition(":")
    file = files.path(name)
    if not file.is_file():
        raise InputError(f"--config={file} is no file; {_instead(file)}")
    made = _of_run(file, arg) if file.suffix == ".json" else _of_recipe(file, arg)
    config.check(made)
    return made


def _instead(file):
    """What to give in place of a file that is not there."""
    folder = file if file.is_dir() else file.parent
    if not folder.is_dir():
        return f"there is no folder {folder}"
    there = sorted(p.name for pattern in ("*.py", "config.json") for p in folder.glob(pattern))
    return (
        f"in {folder}: {nearest(file.name, there)}" if there else f"{folder} holds no recipe (*.py) and no config.json"
    )


def _of_recipe(file, arg):
    try:
        make = runpy.run_path(str(file))["get_config"]
    except KeyError as error:
        if error.args != ("get_config",):
            raise InputError(f"{file} fails with KeyError: {_last_line(error)}") from None
        raise InputError(f"{file} has no get_config(arg); define it, returning ibjax.config.base(), changed") from None
    except Exception as error:  # a configuration is the user's Python
        raise InputError(f"{file} fails with {type(error).__name__}: {_last_line(error)}") from None
    if arg and not inspect.signature(make).parameters:
        raise InputError(f"{file} takes no argument, its get_config() has no parameter; leave ':{arg}' out")
    try:
        made = make(*([arg] if arg else []))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{file} fails with {type(error).__name__}: {_last_line(error)}") from None
    if isinstance(made, FrozenConfigDict):
        made = made.as_configdict()
    if not isinstance(made, ConfigDict):
        raise InputError(f"get_config of {file} returns a {type(made).__name__}; return ibjax.config.base(), changed")
    return made


def _of_run(file, arg):
    """The configuration that a run was made with, for the same run or a changed one."""
    if arg:
        raise InputError(f"--config={file} is a run's configuration and takes no argument; leave ':{arg}' out")
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))["config"]
        return config.loosen(threat.follow(config.upgrade(ConfigDict(config.plain(saved)))))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"--config={file} is not the config.json of a run ({_last_line(error)}); give that, or FILE.py"
        ) from None


def _last_line(error):
    """The line of an error that says what is wrong: flags wrap tracebacks into their messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def recipe_command_line(module: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of a module that reads a recipe and runs nothing of it: --config, for it to add to."""
    parser = run.bare_command_line(module, description)
    help_text = "the recipe, FILE.py[:arg] or a run's config.json; --config.KEY=VALUE changes it"
    parser.add_argument("--config", required=True, help=help_text)
    return parser


def parse_recipe(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Callable[[], ConfigDict]]:
    """(what was given, what reads the recipe, changed by --config.KEY=VALUE) of a command line with --config.

    Anything else that is unknown ends the process; reading raises InputError.
    """
    given, rest = parser.parse_known_args()
    overrides = [flag for flag in rest if flag.startswith("--config.")]
    if unknown := [word for word in rest if word not in overrides]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return given, lambda: override(load_config(given.config), overrides)


class Job(NamedTuple):
    """One training that a configuration stands for."""

    settings: ConfigDict
    workdir: Path
    teachers: dict[str, Path]  # role -> workdir


def jobs(settings: ConfigDict, workdir: Path) -> list[Job]:
    """Everything that one configuration stands for, in the order of training: teacher, contrasts, itself."""
    settings = config.effective(settings)
    made, teachers = [], {}
    for role in config.TEACHERS:
        section = settings[role]
        if section.workdir or section.recipe is not None:
            teachers[role] = files.path(section.workdir) if section.workdir else workdir / role
        if section.recipe is not None:
            made += jobs(section.recipe, teachers[role])
    for name, recipe in settings.contrast.items():
        if name in (*config.TEACHERS, "checkpoints", "eval", "damaged", "tensorboard"):
            raise InputError(f"contrast.{name}: that name is a folder of the run itself; choose another")
        made += jobs(recipe, workdir / name)
    return [*made, Job(settings, workdir, teachers)]


def execute(settings: ConfigDict, workdir: Path, mode: str = "train", restart: bool = False) -> list[dict]:
    """Trains and evaluates all runs of a configuration, writes the report; returns the records.

    `restart`: see the command line.
    """
    workdir = files.path(workdir)
    config.check(settings)
    settings = config.effective(config.complete(settings))
    check_settings(settings.evaluate)
    names.tell_of_old(settings.evaluate.attacks)
    todo = jobs(settings, workdir)
    for job in todo:
        for text in _departures(job.settings, settings.evaluate):
            log.warning("%s: %s", job.settings.title or job.workdir, text)
    for job in todo if mode == "train" else ():  # all before the first: a typo in the last must not cost the others
        loop.check(job.settings, job.teachers)
        data = run.load_data(job.settings)
        check_images(data.test, data.label, settings.evaluate)
        model = run.build_model(job.settings.model, data.num_classes, "model")
        check_network(model, data.test.images.shape[1:], settings.evaluate)
    for job in todo if mode == "eval" else ():  # what is evaluated is the run that is there
        if not run.has_checkpoint(job.workdir):
            raise InputError(
                f"{job.workdir} holds no trained run; train it with --mode=train, or give another --workdir"
            )
        run.refuse_other_options(job.workdir, run.read_config(job.workdir)[0], job.settings, ("model", "data"))
    with contextlib.ExitStack() as locks:
        for folder in {job.workdir.resolve(): job.workdir for job in todo}.values():
            locks.enter_context(run.lock(folder))
        _check_results(workdir / "report.html", [job.workdir / "eval" for job in todo])
        if mode == "train":
            for job in todo:
                loop.train(build(job.settings, job.teachers), job.workdir, restart=restart)
        records = []
        for job in reversed(todo):  # the run itself first, then what it is contrasted with
            records += evaluate(job.workdir, "best", settings=settings.evaluate)
        if jax.process_index() == 0:
            report.write([job.workdir for job in reversed(todo)], workdir / "report.html")
    return records


def _check_results(page, folders):
    """Raises InputError where what comes of the training could not be written."""
    if page.is_dir():
        raise InputError(
            f"{page} cannot be written ({os.strerror(errno.EISDIR)}); results would be lost; make way for it"
        )
    run.check_writable(page.parent, *(folder for folder in folders if folder.exists()))


def _departures(settings, evaluated):
    """What a report will say of threat models that differ, before the training is paid for."""
    threats = dict(train_threat=threat.trained(settings), validate_threat=threat.validated(settings))
    return results.departures({"norm": evaluated.norm, "eps": evaluated.eps, **threats})


def main() -> None:
    """The command line of this module."""

    def command():
        command = parse(sys.argv)
        cluster.initialize()
        records = execute(*command)
        if jax.process_index() == 0:
            print(report.table(records))
            print(f"report: {command.workdir / 'report.html'}")

    errors.exit_with(command)


if __name__ == "__main__":
    main()
