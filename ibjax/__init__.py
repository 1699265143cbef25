"""Information-bottleneck defences for adversarial robustness, in JAX."""

import os
import sys


def _folder_of_neighbours():
    """The current folder, if modules in it may be imported by a command; else None.

    They may where a command executes a recipe, which is the user's own code and may import its neighbours, unless the
    folder is a run's, which may come from elsewhere.
    """
    try:
        folder = os.getcwd()
    except OSError:  # the folder no longer exists
        return None
    recipe = any(word.partition(":")[0].endswith(".py") for word in sys.argv[1:]) and not os.path.exists("config.json")
    return folder if recipe else None


def _leave_folder():
    """Removes the current folder from sys.path when `python -m ibjax.…` starts, unless it may be needed there.

    Python puts the current folder first. With `cd RUN; python -m ibjax.evaluate --workdir=.`, a json.py or optax.py in
    the run's folder, which may come from elsewhere, would be imported in place of the real module. The folder stays
    where ibjax itself lies in it, and for recipes. Modules that Python imports before ibjax are out of reach here;
    `python -P -m ibjax.…` protects them too.
    """
    own = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        folder = os.getcwd()
    except OSError:
        return
    if sys.path[:1] == [folder] and folder not in (own, _folder_of_neighbours()):
        del sys.path[0]


if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:  # before any import from a file
    _leave_folder()

import signal  # noqa: E402
import typing  # noqa: E402

from ibjax import lazy, places  # noqa: E402

if typing.TYPE_CHECKING:
    from ibjax import (
        analysis,
        attacks,
        config,
        convert,
        data,
        evaluate,
        information,
        losses,
        models,
        objectives,
        pytorch,
        report,
    )
    from ibjax.runs.run import Run, load

__all__ = [
    "Run",
    "__version__",
    "analysis",
    "attacks",
    "config",
    "convert",
    "data",
    "evaluate",
    "information",
    "load",
    "losses",
    "models",
    "objectives",
    "pytorch",
    "report",
]
__version__ = places.version()
__getattr__, __dir__ = lazy.attach(__name__, __all__, {"Run": "ibjax.runs.run", "load": "ibjax.runs.run"})


def _leave(number, frame):
    """Handles Ctrl-C while a command is still importing, when nothing needs to be cleaned up."""
    os.write(2, b"interrupted\n")
    os._exit(130)


def _leave_on_interrupt():
    """For a command, until it begins and handles Ctrl-C as an exception (`errors.exit_with`)."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def _begin_command():
    """Makes the console command start as `python -m ibjax.…` does."""
    _leave_on_interrupt()
    folder = _folder_of_neighbours()
    if folder and not sys.flags.safe_path and folder not in sys.path:
        sys.path.insert(0, folder)


if sys.argv[:1] == ["-m"]:
    _leave_on_interrupt()
