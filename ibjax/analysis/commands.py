"""Shared by the command lines of the analyses: their arguments, and how a command runs its analysis."""

import argparse
import signal
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
from ml_collections import ConfigDict

from ibjax import errors
from ibjax.analysis import pictures
from ibjax.attacks.names import canonical
from ibjax.devices import cluster
from ibjax.errors import InputError
from ibjax.runs import command_line, rundir

Found = TypeVar("Found")


def add_n(
    parser: argparse.ArgumentParser, default: int | None = None, otherwise: str = "that of the run's configuration"
) -> None:
    """Adds --n, the number of test images; `otherwise` describes the value that is used without a default."""
    said = f"; default: {otherwise}" if default is None else ""
    parser.add_argument("--n", type=int, default=default, help=f"number of test images{said}")


def add_attack(parser: argparse.ArgumentParser, default: str, said: str = "") -> None:
    """Adds --attack, the name of one attack; `said` describes the default."""
    parser.add_argument("--attack", type=canonical, default=default, help=f"a name, as of an evaluation{said}")


def add_class_names(parser: argparse.ArgumentParser) -> None:
    """Adds --names, for `class_names`."""
    parser.add_argument(
        "--names",
        type=command_line.comma_list,
        help="of the classes, in order, separated by commas; default: as the data has them",
    )


def class_names(given: list[str] | None, facts: Mapping[str, Any]) -> list[str]:
    """The class names for a run's data: those given by --names, else those of the data, else the class numbers.

    Raises InputError unless every class has a name.
    """
    count = facts["num_classes"]
    names = given or facts.get("classes") or [str(c) for c in range(count)]
    if len(names) != count:
        raise InputError(f"--names has {len(names)} names; the data has {count} classes")
    return names


def conduct(
    given: argparse.Namespace,
    measure: Callable[[], Found],
    lines: Callable[[Found], Iterable[str]],
    draw: Callable[[Found, Path], None] | None = None,
    *,
    recipe: Callable[[], ConfigDict] | None = None,
) -> None:
    """Runs an analysis and ends the process, as described in `errors.exit_with`.

    Invalid arguments and a folder that cannot be written are reported before anything is computed: `given.picture` is
    checked, `given.names` becomes the list of class names, and `given.settings` the configuration that `recipe` reads.

    An analysis without a recipe keeps nothing before it has finished. SIGTERM therefore ends it at once, while one that
    trains gets a notice of preemption.

    Args:
      given: the parsed command line.
      measure: computes the result; every process calls it.
      lines: formats the result as the lines that the first process prints.
      draw: draws the result into the file that --picture names, on the first process.
      recipe: as `command_line.parse_recipe` returns it.
    """

    def command():
        picture = getattr(given, "picture", None)
        pictures.check(picture)
        cluster.initialize()  # before the user's own code, which may use JAX as soon as it is imported
        if recipe is None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        workdir = getattr(given, "workdir", [])
        workdirs = workdir if isinstance(workdir, list) else [workdir]
        if "names" in given:
            given.names = class_names(given.names, rundir.read_config(workdirs[0])[1])
        if recipe is not None:
            given.settings = recipe()
        written = [given.out] if "out" in given else [folder for folder in workdirs if folder.exists()]
        rundir.check_writable(*written, *([] if picture is None else [picture.parent]))
        found = measure()
        if jax.process_index() == 0:
            print("\n".join(lines(found)))
            if draw is not None and picture is not None:
                draw(found, picture)

    errors.exit_with(command)
