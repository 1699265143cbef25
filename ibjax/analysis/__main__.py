"""All analyses on one command line.

    python -m ibjax.analysis                  the list of them: what each shows, and how it is called
    python -m ibjax.analysis NAME …           the same as python -m ibjax.analysis.NAME …

The list is read from the docstrings; no analysis is imported for it.
"""

import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from ibjax import analysis, cli, errors
from ibjax.errors import InputError, nearest


def analyses() -> dict[str, str]:
    """{name: docstring} of the modules that have a command line, read without importing them."""
    found = {}
    for info in pkgutil.iter_modules(analysis.__path__):
        text, runs = cli.docstring(Path(analysis.__path__[0]) / f"{info.name}.py")
        if runs and not info.name.startswith("_"):
            found[info.name] = text
    return found


def lines(found: dict[str, str]) -> Iterator[str]:
    """For each analysis: its name, the first sentence of its docstring, and the command lines in it."""
    program = cli.name_of("ibjax.analysis")
    program += "." if program == "python -m ibjax.analysis" else " "
    yield f"{program}NAME --help describes an analysis in full; NAME is one of:"
    for name, text in found.items():
        calls = re.search(r"^ +python -m ibjax\.analysis\..*?(?=\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
        yield f"\n{name}: {cli.first_sentence(text)}"
        call = calls[0] if calls else f"    python -m ibjax.analysis.{name} --help"
        yield call.replace("python -m ibjax.analysis.", program)


def parser() -> cli.Parser:
    """The name of an analysis; the words after it are parsed by its own module."""
    parser = cli.parser("ibjax.analysis", __doc__)
    parser.add_argument("name", nargs="?", choices=list(analyses()), metavar="NAME", help="the analysis to run")
    return parser


def main() -> None:
    """The command line of this module."""
    found = analyses()
    if len(sys.argv) > 1 and sys.argv[1] in found:
        cli.call(f"ibjax.analysis.{sys.argv[1]}", sys.argv[1])
        return

    def command():
        if len(sys.argv) > 1 and sys.argv[1] not in ("-h", "--help"):
            raise InputError(f"there is no analysis '{sys.argv[1]}'; {nearest(sys.argv[1], found)}")
        print("\n".join(lines(found)))

    errors.exit_with(command)


if __name__ == "__main__":
    main()
