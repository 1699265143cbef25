"""All analyses on one command line.

    python -m ibjax.analysis                  the list of them: what each shows, and how it is called
    python -m ibjax.analysis NAME …           the same as python -m ibjax.analysis.NAME …

The list is read from the docstrings; no analysis is imported for it.
"""

import ast
import importlib
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from ibjax import analysis, errors
from ibjax.errors import InputError, nearest


def analyses() -> dict[str, str]:
    """{name: docstring} of the modules that have a command line, read without importing them."""
    found = {}
    for info in pkgutil.iter_modules(analysis.__path__):
        tree = ast.parse((Path(analysis.__path__[0]) / f"{info.name}.py").read_text(encoding="utf-8"))
        if not info.name.startswith("_") and any(getattr(node, "name", "") == "main" for node in tree.body):
            found[info.name] = ast.get_docstring(tree) or ""
    return found


def lines(found: dict[str, str]) -> Iterator[str]:
    """For each analysis: its name, the first sentence of its docstring, and the command lines in it."""
    yield "python -m ibjax.analysis.NAME --help describes an analysis in full; NAME is one of:"
    for name, text in found.items():
        sentence = re.match(r".*?[.?](?=\s|$)", text, re.DOTALL)
        calls = re.search(r"^ +python -m ibjax\.analysis\..*?(?=\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
        yield f"\n{name}: {' '.join(sentence[0].split()) if sentence else ''}"
        yield calls[0] if calls else f"    python -m ibjax.analysis.{name} --help"


def main() -> None:
    """The command line of this module."""
    found = analyses()
    if len(sys.argv) > 1 and sys.argv[1] in found:
        importlib.import_module(f"ibjax.analysis.{sys.argv.pop(1)}").main()
        return

    def command():
        if len(sys.argv) > 1 and sys.argv[1] not in ("-h", "--help"):
            raise InputError(f"there is no analysis '{sys.argv[1]}'; {nearest(sys.argv[1], found)}")
        print("\n".join(lines(found)))

    errors.exit_with(command)


if __name__ == "__main__":
    main()
