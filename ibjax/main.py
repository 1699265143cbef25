"""Train, evaluate and report from one configuration.

    python -m ibjax.main --config=configs/NAME.py[:arg] --workdir=DIR [--config.a.b=v …] [--mode=train|eval]

Trains the teacher of the configuration first where it holds the recipe of one and its checkpoint is absent, then the
runs it is contrasted with, then itself; evaluates all of them; writes report.html and prints its table. Run again, it
continues where it stopped. Exit codes: 0 done, 1 diverged, 2 wrong input, 75 preempted and saved, 130 interrupted.
"""

import logging
import sys
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from ibjax import cluster, config, errors, report, run, train
from ibjax.errors import InputError
from ibjax.evaluate import evaluate

FLAGS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file("config", help_string="the recipe, FILE.py[:arg]", flag_values=FLAGS)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; made if absent", flag_values=FLAGS)
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "train and evaluate, or only evaluate", flag_values=FLAGS)
log = logging.getLogger(__name__)


def parse(argv: list[str]) -> tuple[ConfigDict, Path, str]:
    """(configuration, workdir, mode) of a command line; raises InputError on anything it does not understand."""
    try:
        rest = FLAGS(argv)
        settings, workdir, mode = CONFIG.value, WORKDIR.value, MODE.value
    except InputError:
        raise
    except Exception as error:  # flags, files, Python in a configuration: all are the user's input
        raise InputError(_readable(error)) from None
    if len(rest) > 1:
        raise InputError(f"'{rest[1]}' is no flag; flags are --config, --workdir, --mode and --config.KEY")
    for name, value in (("config", settings), ("workdir", workdir)):
        if value is None:
            raise InputError(f"--{name} is missing; python -m ibjax.main --config=configs/digits.py --workdir=runs/digits")
    return settings, Path(workdir), mode


def _readable(error):
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
    runs = recipes(settings, workdir)
    records = []
    with run.lock(workdir):
        if mode == "train":
            for recipe, folder in runs:
                train.train(train.build(recipe), folder)
        for _, folder in runs:
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
