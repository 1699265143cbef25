"""Train, evaluate and report from one configuration.

    python -m ibjax.main --config=configs/NAME.py[:arg] --workdir=DIR [--config.a.b=v …] [--mode=train|eval]

Trains the teacher of the configuration first where it holds the recipe of one and its checkpoint is absent, then the
runs it is contrasted with, then itself; evaluates all of them; writes report.html and prints its table. Run again, it
continues where it stopped. Exit codes: 0 done, 1 diverged, 2 wrong input, 75 preempted and saved, 130 interrupted.
"""

import logging
import runpy
import sys
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from ibjax import cluster, config, errors, report, run, train
from ibjax.errors import InputError, nearest
from ibjax.evaluate import check_settings, evaluate

FLAGS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file("config", help_string="the recipe, FILE.py[:arg]", flag_values=FLAGS)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; made if absent", flag_values=FLAGS)
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "train and evaluate, or only evaluate", flag_values=FLAGS)
log = logging.getLogger(__name__)


def parse(argv: list[str]) -> tuple[ConfigDict, Path, str]:
    """(configuration, workdir, mode) of a command line; raises InputError on anything it does not understand."""
    _check_config_flags(argv)
    try:
        rest = FLAGS(argv)
    except Exception as error:  # absl and config_flags raise their own, KeyError, TypeError, ValueError
        raise InputError(_last_line(error)) from None
    if len(rest) > 1:
        raise InputError(f"'{rest[1]}' is no flag; flags are --config, --workdir, --mode and --config.KEY")
    for name, value in (("config", CONFIG.value), ("workdir", WORKDIR.value)):
        if value is None:
            example = "python -m ibjax.main --config=configs/digits.py --workdir=runs/digits"
            raise InputError(f"--{name} is missing; for example: {example}")
    return CONFIG.value, Path(WORKDIR.value), MODE.value


def _check_config_flags(argv):
    """Says in one line what config_flags says in a traceback: a missing file, an error in it, an unknown key."""
    settings = None
    for flag, following in zip(argv[1:], [*argv[2:], ""], strict=True):
        name, _, value = flag.lstrip("-").partition("=")
        if not flag.startswith("-") or not name.startswith("config"):
            continue
        if name == "config":
            settings = load_config(value or following)
        elif settings is not None:
            paths = [path for path, _ in config.leaves(settings)]
            path = name.removeprefix("config.")
            if path not in paths:
                raise InputError(f"config key '{path}' is unknown; {nearest_key(path, paths)}")


def nearest_key(path: str, paths: list[str]) -> str:
    """As `nearest`, but among the keys beside the wrong one rather than all of them."""
    section = path.rpartition(".")[0]
    return nearest(path, [p for p in paths if p.rpartition(".")[0] == section] or paths)


def load_config(value: str) -> ConfigDict:
    """The configuration of FILE.py[:arg]; raises InputError when the file is missing or fails."""
    name, _, arg = value.partition(":")
    file = Path(name)
    if not file.is_file():
        there = sorted(p.name for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
        raise InputError(f"--config={file} is no file; in {file.parent}: {nearest(file.name, there)}")
    try:
        namespace = runpy.run_path(str(file))
        return namespace["get_config"](arg) if arg else namespace["get_config"]()
    except InputError:
        raise
    except Exception as error:  # a configuration is the user's Python
        raise InputError(f"{file} fails with {type(error).__name__}: {_last_line(error)}") from None


def _last_line(error):
    """The line of an error that says what is wrong: flags wrap tracebacks into their messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def recipes(settings: ConfigDict, workdir: Path) -> list[tuple[ConfigDict, Path]]:
    """(configuration, workdir) of everything one configuration stands for, in the order of training."""
    runs = []
    if settings.teacher.recipe is not None:
        if not settings.teacher.workdir:
            settings.teacher.workdir = str(workdir / "teacher")
        runs += recipes(settings.teacher.recipe, Path(settings.teacher.workdir))
    for name, recipe in settings.contrast.items():
        runs += recipes(recipe, workdir / name)
    return [*runs, (settings, workdir)]


def execute(settings: ConfigDict, workdir: Path, mode: str) -> list[dict]:
    """Trains and evaluates all runs of a configuration, writes the report; returns the records."""
    config.check(settings)
    check_settings(settings.evaluate)
    runs = recipes(settings, workdir)
    if mode == "train":
        for recipe, _ in runs:  # all of them before the first: a typo in the last must not cost the others
            train.check(recipe)
    records = []
    with run.lock(workdir):
        if mode == "train":
            for recipe, folder in runs:
                train.train(train.build(recipe), folder)
        for _, folder in reversed(runs):  # the run itself first, then what it is contrasted with
            records += evaluate(folder, "best", settings=settings.evaluate)
        if jax.process_index() == 0:
            report.write([folder for _, folder in reversed(runs)], workdir / "report.html")
    return records


def main() -> None:
    """The command line of this module."""

    def command():
        settings, workdir, mode = parse(sys.argv)
        cluster.initialize()
        records = execute(settings, workdir, mode)
        if jax.process_index() == 0:
            print(report.table(records))
            print(f"report: {workdir / 'report.html'}")

    errors.exit_with(command)


if __name__ == "__main__":
    main()
