"""Information-bottleneck defences for adversarial robustness, in JAX."""

import argparse
import importlib
import sys
import textwrap
from pathlib import Path

import ibjax
from ibjax import cli, errors, places
from ibjax.errors import InputError

COMMANDS = {  # each is the same as python -m MODULE
    "train": "ibjax.main",
    "evaluate": "ibjax.evaluate",
    "attack": "ibjax.attack",
    "report": "ibjax.report",
    "convert": "ibjax.convert",
    "aot": "ibjax.aot",
    "prepare": "ibjax.data.prepare",
    "analyse": "ibjax.analysis.__main__",
    "doctor": "ibjax.doctor",
}
ALIASES = {"analyze": "analyse"}
SHELLS = ("bash", "zsh", "tcsh")


def main() -> None:
    """The console command: runs the command that the first word names; without one, prints what there is."""
    sys.argv[0] = cli.PROGRAMS[Path(sys.argv[0]).name == "__main__.py"]
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if (name := ALIASES.get(word, word)) in COMMANDS:
        ibjax._begin_command()
        cli.call(COMMANDS[name], name)
        return
    given = parser().parse_args(sys.argv[1:2] if word and not word.startswith("-") else sys.argv[1:])

    def command():
        if given.command:
            raise InputError(f"there is no command '{given.command}'; {errors.nearest(given.command, COMMANDS)}")
        print(completion(given.completion) if given.completion else parser().format_help(), end="")

    errors.exit_with(command)


def parser() -> cli.Parser:
    """The arguments of the console command; the commands' descriptions are read without importing them."""
    program = sys.argv[0]
    made = cli.parser("ibjax", __doc__, prog=program)
    made.usage = f"{program} COMMAND …"
    made.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    made.add_argument("--version", action="version", version=f"ibjax {places.version()}")
    made.add_argument("--completion", choices=SHELLS, help="print a script that completes commands and options")
    width = max(map(len, COMMANDS)) + 2
    lines = [textwrap.fill(cli.first_sentence(_docstring(module)), 100, initial_indent=f"  {name:{width}}",
                           subsequent_indent=" " * (width + 2)) for name, module in COMMANDS.items()]  # fmt: skip
    made.epilog = "\n".join(
        [
            *("commands, each the same as its python -m:", *lines, ""),
            f"{program} COMMAND --help describes a command; {program} train --list names the recipes.",
            f"recipes: {places.recipes()}",
            f"scripts for clusters: {places.launchers()}",
        ]
    )
    return made


def _docstring(module):
    file = Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return cli.docstring(file)[0]


def completion(shell: str) -> str:
    """A script by which `shell` completes the commands and their options; it takes seconds, as it imports them all.

    Raises InputError where shtab, which writes it, is not installed.
    """
    try:
        import shtab
    except ImportError:
        raise InputError("--completion needs shtab; install it: pip install 'ibjax[completion]'") from None
    from ibjax import files

    whole = cli.parser("ibjax", None, prog="ibjax")
    words = whole.add_subparsers()
    for name, module in COMMANDS.items():
        made = importlib.import_module(module).parser()
        for action in made._actions:
            if action.type is files.path:
                action.complete = shtab.FILE
            if action.dest == "config":
                action.choices = sorted(file.stem for file in places.recipes().glob("*.py"))
        words.add_parser(name, parents=[made], add_help=False, help=cli.first_sentence(_docstring(module)))
    return shtab.complete(whole, shell)


if __name__ == "__main__":
    main()
