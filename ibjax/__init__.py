"""Information-bottleneck defences for adversarial robustness, in JAX."""

import os
import sys


def _leave_folder():
    """Takes the folder that `python -m ibjax.…` was started in off the path of imports, where it should not be there.

    Python puts it first, so that of `cd RUN; python -m ibjax.evaluate --workdir=.` a json.py or optax.py in a run's
    folder, which may come from elsewhere, would be imported for the real one. It stays for a recipe, which is the
    user's own code and may import its neighbours, unless the folder is a run's, and where ibjax itself lies in it. What
    Python imports before ibjax nobody but Python can keep out: `python -P -m ibjax.…` does.
    """
    try:
        folder = os.getcwd()
    except OSError:  # it is not there any more
        return
    own = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    recipe = any(word.partition(":")[0].endswith(".py") for word in sys.argv[1:]) and not os.path.exists("config.json")
    if sys.path[:1] == [folder] and folder != own and not recipe:
        del sys.path[0]


if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:  # before anything is imported that has a file
    _leave_folder()

import signal  # noqa: E402
import typing  # noqa: E402

if typing.TYPE_CHECKING:
    from ibjax.runs.run import Run, load

__all__ = ["Run", "load"]


def _leave(number, frame):
    """Ctrl-C while a command is still importing: nothing has begun that would have to be ended."""
    os.write(2, b"interrupted\n")
    os._exit(130)


# `python -m ibjax.…`: until the command begins, and takes Ctrl-C as an exception (`errors.exit_with`)
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)


def __getattr__(name):
    """`ibjax.load` and `ibjax.Run`, imported when they are used: JAX and Flax take seconds."""
    if name in __all__:
        from ibjax.runs import run

        return getattr(run, name)
    raise AttributeError(f"module 'ibjax' has no attribute '{name}'")
