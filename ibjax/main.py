"""Train, evaluate and report from one configuration.

    python -m ibjax.main --config=configs/NAME.py[:arg] --workdir=DIR [--config.a.b=v …] [--mode=train|eval] [--restart]
        [--trust=code|changed]
    python -m ibjax.main --config=OTHER/config.json --workdir=DIR [--config.a.b=v …]        repeats another run

The command trains, in this order: the teacher, if the configuration holds its recipe and it has no checkpoint yet; the
runs for contrast; the configuration itself. It evaluates all of them, writes report.html and prints its table. The same
command continues where it was stopped.

If all checkpoints of a run are lost or damaged, the command says so and ends. --restart then begins that run again at
step 0 and moves what is left of it to restarted-N/; a run with an undamaged checkpoint continues from it all the same.

Names in a recipe and on the command line may refer to modules and files of your own. Where a run's folder names them
(--config=OTHER/config.json, teacher.workdir), they run with --trust=code; --trust=changed goes on although the code of
a run has changed since it was made.

| exit code | meaning                                |
|-----------|----------------------------------------|
| 0         | done                                   |
| 2         | invalid input                          |
| 3         | diverged, or out of memory             |
| 69        | another process of the run was lost    |
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
from absl import flags
from ml_collections import ConfigDict

from ibjax import config, errors, extensions, files, threat
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


def parse(argv: list[str]) -> Command:
    """Parses a command line; raises InputError on anything unknown."""
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
    flags.DEFINE_enum("trust", None, extensions.TRUSTS, command_line.TRUST, flag_values=values)
    flags.DEFINE_bool("help", False, "show this", short_name="h", flag_values=values)
    overrides = [flag for flag in argv[1:] if flag.lstrip("-").startswith("config.")]
    rest = recipe_files.parse_flags(values, [flag for flag in argv if flag not in overrides])
    if values["help"].value:
        print(f"{__doc__}\n{values.main_module_help() or values.get_help()}")
        sys.exit(0)
    if len(rest) > 1:
        raise InputError(
            f"'{rest[1]}' is no flag; flags are --config, --workdir, --mode, --restart, --trust and --config.KEY=VALUE"
        )
    for name in ("config", "workdir"):
        if not values[name].value:
            example = "python -m ibjax.main --config=configs/digits.py --workdir=runs/digits"
            raise InputError(f"--{name} is missing; for example: {example}")
    trust = values["trust"].value
    with extensions.trusting(trust):
        settings = recipe_files.override(recipe_files.load(values["config"].value), overrides)
    workdir = files.path(values["workdir"].value)
    return Command(settings, workdir, values["mode"].value, values["restart"].value, trust)


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
    for job in todo if mode == "train" else ():  # check all jobs before any is trained: a typo must not cost hours
        loop.check(job.settings, job.teachers)
        data = run.load_data(job.settings)
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
                loop.train(build(job.settings, job.teachers), job.workdir, restart=restart)
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
