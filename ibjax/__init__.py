"""Information-bottleneck defences for adversarial robustness, in JAX."""

import os
import sys


def _leave_folder():
    """Removes the current folder from sys.path when `python -m ibjax.…` starts, unless it is needed there.

    Python puts the current folder first. With `cd RUN; python -m ibjax.evaluate --workdir=.`, a json.py or optax.py in
    the run's folder, which may come from elsewhere, would be imported in place of the real module. The folder stays
    where ibjax itself lies in it, and for code of the user's own. Modules that Python imports before ibjax are out of
    reach here; `python -P -m ibjax.…` protects them too.
    """
    own = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    folder = _current_folder()
    if folder not in (None, own) and sys.path[:1] == [folder]:
        del sys.path[0]
        _add_folder()


def _add_folder():
    """Puts the current folder on sys.path where a command needs it, unless it is a run's, which may be from elsewhere.

    It is the first where the command line has code of the user's own run, which may import its neighbours. It is the
    last, after all that is installed, where that may be named by a run (--trust).
    """
    folder = _current_folder()
    if folder is None or folder in sys.path or os.path.exists("config.json"):
        return
    words = sys.argv[1:]
    if _runs_own_code(words):
        sys.path.insert(0, folder)
    elif any(word.partition("=")[0] == "--trust" for word in words):
        sys.path.append(folder)


def _current_folder():
    try:
        return os.getcwd()
    except OSError:  # it no longer exists
        return None


def _runs_own_code(words):
    """Whether a command line names code of the user's own.

    That is a recipe or another file, as mine.py or ./mine.py:my_method, or a dotted name, as in
    --attacks=my_pkg.my_attack-20 or --config.objective.name=my_pkg.my_method.
    """
    option = ""
    for word in words:
        if word.startswith("-"):
            option, _, word = word.partition("=")
        if word.partition(":")[0].endswith(".py"):
            return True
        if option.lstrip("-").rpartition(".")[2] in _OF_NAMES and any(map(_is_dotted, word.split(","))):
            return True
    return False


_OF_NAMES = ("attack", "attacks", "name")  # options that name attacks, methods, networks, …


def _is_dotted(name):
    parts = name.strip(" ()[]'\"").partition("(")[0].partition("-")[0].split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


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
        wrap,
    )
    from ibjax.evaluation.benchmark import benchmark
    from ibjax.pytorch import zoo
    from ibjax.runs.run import Run, load

__all__ = [
    "Run",
    "__version__",
    "analysis",
    "attacks",
    "benchmark",
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
    "wrap",
    "zoo",
]
__version__ = places.version()
__getattr__, __dir__ = lazy.attach(
    __name__,
    __all__,
    {
        "Run": "ibjax.runs.run",
        "load": "ibjax.runs.run",
        "benchmark": "ibjax.evaluation.benchmark",
        "zoo": "ibjax.pytorch",
    },
)


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
    if not sys.flags.safe_path:
        _add_folder()


if sys.argv[:1] == ["-m"]:
    _leave_on_interrupt()
