"""The parts that command lines share: --workdir and --checkpoint of a run, or the --config of a recipe."""

import argparse
from collections.abc import Callable
from typing import NoReturn

from ml_collections import ConfigDict

from ibjax import errors, extensions, files
from ibjax.attacks.names import split
from ibjax.runs import recipe_files


def of_run(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for a module that reads a run, with --workdir and --checkpoint; the module adds its own arguments."""
    parser = bare(module, description)
    add_trust(parser)
    parser.add_argument("--workdir", type=files.path, required=True)
    parser.add_argument("--checkpoint", default="best", help="best, last or a step")
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Prints one line to stderr, as for every other invalid input."""
        self.exit(errors.EXIT_INPUT, f"error: {message}; {self.prog} --help says what there is\n")


def bare(module: str, description: str | None, *, prog: str | None = None) -> argparse.ArgumentParser:
    """A parser without arguments for any module; `prog` replaces the usual "python -m MODULE" in its help."""
    errors.prepare_streams()  # help texts are not ASCII
    return _Parser(
        prog=prog or f"python -m {module}",
        allow_abbrev=False,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


TRUST = (
    "run modules and files that a run's folder names and that are no part of ibjax: code, if they are what the run was "
    "made with; changed, also if they have changed since"
)


class _Trust(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        """Gives the permission for the whole process."""
        extensions.trust(str(values))
        setattr(namespace, self.dest, values)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Adds --trust, which permits code that a run's folder names to run (`ibjax.extensions`)."""
    parser.add_argument("--trust", choices=extensions.TRUSTS, action=_Trust, help=TRUST)


def add_attacks(parser: argparse.ArgumentParser) -> None:
    """Adds --attacks, which replaces the attacks of the run's `evaluate` section."""
    parser.add_argument(
        "--attacks",
        type=comma_list,
        help='names, separated by commas, as "fgsm, pgd-20(restarts=5)"; default: those of the run\'s configuration',
    )


def comma_list(text: str) -> list[str]:
    """The type of an argument that lists names, separated by commas; a comma within parentheses is part of a name."""
    return split(text)


def of_recipe(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for a module that reads a recipe without training it, with --config; the module adds its arguments."""
    parser = bare(module, description)
    add_trust(parser)
    help_text = "the recipe, FILE.py[:arg] or a run's config.json; --config.KEY=VALUE changes it"
    parser.add_argument("--config", required=True, help=help_text)
    return parser


def of_training(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for a module that trains a recipe, with --config and --workdir; the module adds its own arguments."""
    parser = of_recipe(module, description)
    parser.add_argument("--workdir", type=files.path, required=True, help="folder of the run; made if absent")
    return parser


def parse_recipe(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Callable[[], ConfigDict]]:
    """Parses a command line with --config: (the arguments, a function that returns the configuration).

    The function applies --config.KEY=VALUE to the recipe and raises InputError. Any other unknown argument ends the
    process.
    """
    given, rest = parser.parse_known_args()
    overrides = [flag for flag in rest if flag.startswith("--config.")]
    if unknown := [word for word in rest if word not in overrides]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return given, lambda: recipe_files.override(recipe_files.load(given.config), overrides)
