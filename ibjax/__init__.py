"""Information-bottleneck defences for adversarial robustness, in JAX."""

import os
import signal
import sys
import typing

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
