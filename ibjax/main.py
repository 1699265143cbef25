"""Train, evaluate and report from one configuration.

    python -m ibjax.main --config=NAME[:arg] --workdir=DIR [--config.a.b=v …] [--mode=train|eval] [--restart]
                         [--trust=code|changed]
    python -m ibjax.main --config=FILE.py[:arg] --workdir=DIR [--config.a.b=v …]            your own recipe
    python -m ibjax.main --config=OTHER/config.json --workdir=DIR [--config.a.b=v …]        repeats another run
    python -m ibjax.main --list [--config=NAME]                                             names of recipes, of rows

The command trains, in this order: the teacher, if the configuration holds its recipe and it has no checkpoint yet; the
runs for contrast; the configuration itself. It evaluates all of them, writes report.html and prints its table. The same
command continues where it was stopped.

If all checkpoints of a run are lost or damaged, the command says so and ends. --restart then begins that run again at
step 0 and moves what is left of it to restarted-N/; a run with an undamaged checkpoint continues from it all the same.

Names in a recipe and on the command line may refer to modules and files of your own. If a run's folder names them
(--config=OTHER/config.json, teacher.workdir), they run only with --trust=code. With --trust=changed they run even if
the code has changed since the run was made.

| exit code | meaning                                |
|-----------|----------------------------------------|
| 0         | done                                   |
| 2         | invalid input                          |
| 3         | diverged, or out of memory             |
| 69        | another process was lost or missing     |
| 75        | preempted; the state is saved          |
| 130       | interrupted                            |
"""

import contextlib
import errno
import logging
import os
import sys
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from ibjax import cli, config, errors, extensions, files, threat
from ibjax.attacks import names
from ibjax.devices import cluster
from ibjax.errors import InputError
from ibjax.evaluation import report, results
from ibjax.evaluation.evaluate import evaluate
from ibjax.evaluation.settings import check_images, check_network, check_settings
from ibjax.runs import command_line, recipe_files, run, rundir
from ibjax.training import jobs, loop
from ibjax.training.experiment import build

log = logging.getLogger(__name__)


class Command(NamedTuple):
    """A parsed command line."""

    settings: ConfigDict
    workdir: Path
    mode: str
    restart: bool = False
    trust: str | None = None


def parser() -> cli.Parser:
    """The arguments of this module; --config.KEY=VALUE is read apart from them."""
    parser = cli.parser("ibjax.main", __doc__)
    parser.add_argument("--config", help=f"{command_line.CONFIG}; --config.KEY=VALUE changes it")
    parser.add_argument("--workdir", type=files.path, help="folder of the run; made if absent")
    parser.add_argument(
        "--mode", choices=("train", "eval"), default="train", help="train and evaluate (default), or only evaluate"
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="begin again at step 0 where checkpoints were lost or all are damaged; they go to restarted-N/",
    )
    parser.add_argument("--trust", choices=extensions.TRUSTS, help=command_line.TRUST)
    parser.add_argument(
        "--list", action="store_true", help="list the recipes that ship with ibjax, or the rows of --config, and exit"
    )
    return parser


def parse(argv: list[str]) -> Command:
    """Parses a command line; raises InputError on a bad configuration, and ends the process on an unknown option."""
    words, overrides = command_line.apart(argv[1:])
    given = parser().parse_args(words)
    _check_given(given)
    return _command(given, overrides)


def _check_given(given):
    for name in ("config", "workdir"):
        if not getattr(given, name):
            example = f"{cli.name_of('ibjax.main')} --config=digits --workdir=runs/digits"
            raise InputError(f"--{name} is missing; for example: {example}")


def _command(given, overrides):
    with extensions.trusting(given.trust):
        settings = recipe_files.override(recipe_files.load(given.config), overrides)
    return Command(settings, given.workdir, given.mode, given.restart, given.trust)


def execute(
    settings: ConfigDict, workdir: Path, mode: str = "train", restart: bool = False, trust: str | None = None
) -> list[dict]:
    """Trains and evaluates all runs of a configuration, writes the report; returns the records.

    `restart`, `trust`: see the command line.
    """
    with extensions.trusting(trust):
        return _execute(settings, files.path(workdir), mode, restart)


def _execute(settings, workdir, mode, restart):
    config.check(settings)
    settings = config.effective(config.complete(settings))
    check_settings(settings.evaluate)
    names.tell_of_old(settings.evaluate.attacks)
    todo = jobs.jobs(settings, workdir)
    for job in todo:
        for text in _departures(job.settings, settings.evaluate):
            log.warning("%s: %s", job.settings.title or job.workdir, text)
    checked = []
    for job in todo if mode == "train" else ():  # check all jobs before any is trained: a typo must not cost hours
        checked.append(loop.check(job.settings, job.teachers))
        data = checked[-1].experiment.data
        check_images(data.test, data.label, settings.evaluate)
        model = run.build_model(job.settings.model, data.num_classes, "model")
        check_network(model, data.test.images.shape[1:], settings.evaluate)
    for job in todo if mode == "eval" else ():  # evaluate only runs that match the configuration
        if not rundir.has_checkpoint(job.workdir):
            raise InputError(
                f"{job.workdir} holds no trained run; train it with --mode=train, or give another --workdir"
            )
        rundir.refuse_other_options(
            job.workdir, rundir.read_config(job.workdir, job.settings)[0], job.settings, ("model", "data")
        )
    with contextlib.ExitStack() as locks:
        for folder in {job.workdir.resolve(): job.workdir for job in todo}.values():
            locks.enter_context(rundir.lock(folder))
        _check_results(workdir / "report.html", [job.workdir / "eval" for job in todo])
        if mode == "train":
            for job in todo:
                experiment = build(job.settings, job.teachers)
                part = job is not todo[-1]
                loop.train(experiment, job.workdir, restart=restart, checked=checked.pop(0), part=part)
        records = []
        for job in reversed(todo):  # the run itself first, then the runs for contrast
            records += evaluate(job.workdir, "best", settings=settings.evaluate)
        if jax.process_index() == 0:
            report.write([job.workdir for job in reversed(todo)], workdir / "report.html")
    return records


def _check_results(page, folders):
    """Raises InputError, before training, if the results could not be written."""
    if page.is_dir():
        raise InputError(
            f"{page} cannot be written ({os.strerror(errno.EISDIR)}); results would be lost; make way for it"
        )
    rundir.check_writable(page.parent, *(folder for folder in folders if folder.exists()))


def _departures(settings, evaluated):
    """The report's sentences on differing threat models, so that they can be shown before the training."""
    threats = dict(train_threat=threat.trained(settings), validate_threat=threat.validated(settings))
    return results.departures({"norm": evaluated.norm, "eps": evaluated.eps, **threats})


def main() -> None:
    """The command line of this module."""
    words, overrides = command_line.apart(sys.argv[1:])
    given = parser().parse_args(words)

    def command():
        if given.list:
            print("\n".join(recipe_files.listing(given.config)))
            return
        _check_given(given)
        cluster.initialize()  # before the user's own code, which may use JAX as soon as it is imported
        command = _command(given, overrides)
        records = execute(*command)
        if jax.process_index() == 0:
            print(report.table(records))
            print(f"report: {command.workdir / 'report.html'}")

    errors.exit_with(command)


if __name__ == "__main__":
    main()
