"""The parts that command lines share: --workdir and --checkpoint of a run, or the --config of a recipe."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from ibjax import extensions, files
from ibjax.attacks.names import split
from ibjax.cli import Parser, parser
from ibjax.devices import precision
from ibjax.runs import recipe_files

CONFIG = "the recipe: NAME[:arg] of one that ships with ibjax, FILE.py[:arg], or a run's config.json"
OF_EVALUATION = ("n", "samples", "norm", "eps", "step_size", "batch_size", "precision")


def of_run(module: str, description: str | None) -> Parser:
    """A parser for a module that reads a run, with --workdir and --checkpoint; the module adds its own arguments."""
    made = parser(module, description)
    add_trust(made)
    made.add_argument("--workdir", type=files.path, required=True)
    made.add_argument("--checkpoint", default="best", help="best, last or a step")
    return made


TRUST = (
    "run modules and files that a run's folder names and that are not part of ibjax: code, if they are what the run "
    "was made with; changed, also if they have changed since"
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


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """Adds the other options that replace values of a run's `evaluate` section; OF_EVALUATION has their names."""
    parser.add_argument("--n", type=int, help="number of images; default: the run's evaluate.n, or all; of a file all")
    parser.add_argument("--samples", type=int, help="classify by the mean of this many samples; default: the run's")
    parser.add_argument("--norm", help="linf, l2, l1 or l0; a norm other than the run's needs --eps")
    parser.add_argument("--eps", help='radius, as "8/255"')
    parser.add_argument("--step_size", help='of iterative attacks, as "2/255"; default: the run\'s ratio to eps')
    parser.add_argument("--batch_size", type=int, help="images at a time")
    parser.add_argument(
        "--precision", choices=precision.NAMES, help="of float32 products in attacks; default: the run's, usually high"
    )


def comma_list(text: str) -> list[str]:
    """The type of an argument that lists names, separated by commas; a comma within parentheses is part of a name."""
    return split(text)


def of_recipe(module: str, description: str | None) -> Parser:
    """A parser for a module that reads a recipe without training it, with --config; the module adds its arguments."""
    made = parser(module, description)
    add_trust(made)
    made.add_argument("--config", required=True, help=f"{CONFIG}; --config.KEY=VALUE changes it")
    return made


def of_training(module: str, description: str | None) -> Parser:
    """A parser for a module that trains a recipe, with --config and --workdir; the module adds its own arguments."""
    made = of_recipe(module, description)
    made.add_argument("--workdir", type=files.path, required=True, help="folder of the run; made if absent")
    return made


def parse_recipe(
    parser: argparse.ArgumentParser, words: Sequence[str] | None = None
) -> tuple[argparse.Namespace, Callable[[], ConfigDict]]:
    """Parses a command line with --config: (the arguments, a function that returns the configuration).

    The function applies --config.KEY=VALUE to the recipe and raises InputError. Any other unknown argument ends the
    process. `words`: the command line; None: that of the process.
    """
    rest, overrides = apart(sys.argv[1:] if words is None else words)
    given = parser.parse_args(rest)
    return given, lambda: recipe_files.override(recipe_files.load(given.config), overrides)


def apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the words that are not --config.KEY=VALUE, those that are)."""
    overrides = [word for word in words if re.match(r"--?config\.", word)]
    return [word for word in words if word not in overrides], overrides
