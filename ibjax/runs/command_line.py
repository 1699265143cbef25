"""What the command lines have in common: --workdir and --checkpoint of a run, or the --config of a recipe."""

import argparse
from collections.abc import Callable
from typing import NoReturn

from ml_collections import ConfigDict

from ibjax import errors, files
from ibjax.attacks.names import split
from ibjax.runs import recipe_files


def of_run(module: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of a module that reads a run: --workdir and --checkpoint, for it to add to."""
    parser = bare(module, description)
    parser.add_argument("--workdir", type=files.path, required=True)
    parser.add_argument("--checkpoint", default="best", help="best, last or a step")
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line on stderr, as for every other wrong input."""
        self.exit(errors.EXIT_INPUT, f"error: {message}; {self.prog} --help says what there is\n")


def bare(module: str, description: str | None, *, prog: str | None = None) -> argparse.ArgumentParser:
    """The command line of any module, without arguments yet; `prog` is how it is called, where that is otherwise."""
    errors.prepare_streams()  # help texts are not ASCII
    return _Parser(
        prog=prog or f"python -m {module}",
        allow_abbrev=False,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_attacks(parser: argparse.ArgumentParser) -> None:
    """Adds --attacks, in place of those of the run's `evaluate` section."""
    parser.add_argument(
        "--attacks",
        type=comma_list,
        help='names, separated by commas, as "fgsm, pgd-20(restarts=5)"; default: those of the run\'s configuration',
    )


def comma_list(text: str) -> list[str]:
    """The type of an argument that lists names, separated by commas; those within parentheses belong to a name."""
    return split(text)


def of_recipe(module: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of a module that reads a recipe and runs nothing of it: --config, for it to add to."""
    parser = bare(module, description)
    help_text = "the recipe, FILE.py[:arg] or a run's config.json; --config.KEY=VALUE changes it"
    parser.add_argument("--config", required=True, help=help_text)
    return parser


def of_training(module: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of a module that trains a recipe: --config and --workdir, for it to add to."""
    parser = of_recipe(module, description)
    parser.add_argument("--workdir", type=files.path, required=True, help="folder of the run; made if absent")
    return parser


def parse_recipe(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Callable[[], ConfigDict]]:
    """(what was given, what reads the recipe, changed by --config.KEY=VALUE) of a command line with --config.

    Anything else that is unknown ends the process; reading raises InputError.
    """
    given, rest = parser.parse_known_args()
    overrides = [flag for flag in rest if flag.startswith("--config.")]
    if unknown := [word for word in rest if word not in overrides]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return given, lambda: recipe_files.override(recipe_files.load(given.config), overrides)
