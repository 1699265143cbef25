"""What all command lines of the package share: the parser, the name by which a command was called, its description.

Imports neither JAX nor NumPy, so that `ibjax --help` answers at once.
"""

import argparse
import ast
import importlib
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from ibjax import errors

PROGRAMS = ("ibjax", "python -m ibjax")  # the two forms of the console command


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line on stderr and exit code 2, as for every other invalid input."""

    def error(self, message: str) -> NoReturn:
        """Prints the message in one line and exits."""
        self.exit(errors.EXIT_INPUT, f"error: {message}; {self.prog} --help says what there is\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but an unknown word is reported with the options that exist."""
        given, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0] if unknown[0].startswith("-") else unknown[0]
            options = [option for option in self._option_string_actions if option.startswith("--")]
            self.error(f"'{word}' is no option; {errors.nearest(word, options)}")
        return given


def parser(module: str, description: str | None, *, prog: str | None = None) -> Parser:
    """A parser without arguments for any module; `prog` replaces the usual name of the command in its help."""
    errors.prepare_streams()  # help texts are not ASCII
    prog = prog or name_of(module)
    return Parser(
        prog=prog,
        allow_abbrev=False,
        description=description and description.replace(f"python -m {module} ", f"{prog} "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def name_of(module: str) -> str:
    """How a module's command was called: "ibjax evaluate", or "python -m ibjax.evaluate" by itself.

    The console command stands as the program in sys.argv[0], as `call` leaves it.
    """
    console = any(sys.argv[0].startswith(f"{program} ") for program in PROGRAMS)
    return sys.argv[0] if console else f"python -m {module}"


def call(module: str, word: str) -> None:
    """Runs the command line of `module` with the words after `word`, which becomes a part of the program's name."""
    sys.argv[:2] = [f"{sys.argv[0]} {word}"]
    importlib.import_module(module).main()


def docstring(file: Path) -> tuple[str, bool]:
    """(the docstring of a module, whether the module has a command line), read without importing it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return ast.get_docstring(tree) or "", any(getattr(node, "name", "") == "main" for node in tree.body)


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, in one line."""
    found = re.match(r".*?[.?](?=\s|$)", text, re.DOTALL)
    return " ".join(found[0].split()) if found else ""
