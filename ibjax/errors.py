"""Exceptions that a user can act on, and `exit_with`, which turns them into one line on stderr and an exit code."""

import _thread
import argparse
import atexit
import contextlib
import difflib
import errno
import inspect
import io
import logging
import math
import numbers
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeGuard


class InputError(ValueError, argparse.ArgumentTypeError):
    """Wrong configuration, data or checkpoint. Its text is one line: what was given, what is allowed, what to do.

    Command lines print it without a traceback and exit with `EXIT_INPUT`. argparse shows the text where the type of an
    argument raises it.
    """


class DataError(InputError):
    """A data set is missing, damaged, or not what the configuration says."""


class CheckpointError(InputError):
    """A checkpoint is missing, damaged, or belongs to another network."""


class CodeError(InputError):
    """Code that a configuration names is missing, fails, has changed, or needs the user's permission to run."""


class UnreadableError(InputError):
    """A file could not be read. Its content may be intact, so nothing is deleted because of this error."""


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a real number of Python or NumPy; booleans do not count."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_range(name: str, value: float, low: float, high: float = math.inf, *, below: bool = False) -> None:
    """Raises InputError unless low <= value <= high (value < high with `below`); NaN and non-numbers are refused."""
    if not is_number(value) or not (low <= value <= high) or (below and value == high):
        given = f"{value:g}" if is_number(value) else repr(value)
        upper = "" if high == math.inf else f" and {'below' if below else 'at most'} {high:g}"
        raise InputError(f"{name}={given} is not allowed; give a number of at least {low:g}{upper}")


def check_count(name: str, value: int, low: int = 1, high: float = math.inf) -> None:
    """Raises InputError unless `value` is an integer, low <= value <= high; booleans and floats are refused."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not low <= value <= high:
        upper = "" if high == math.inf else f" and at most {high}"
        raise InputError(f"{name}={value!r} is not allowed; give a whole number of at least {low}{upper}")


class PreemptedError(Exception):
    """A process of the run received SIGTERM, and the state has been saved."""


class DivergedError(Exception):
    """The loss or the state became NaN or Inf."""


class PeerError(Exception):
    """Another process of the run is lost, or does not come in time; a repetition may succeed."""


# exit codes; 1 is Python's own and stands for a bug
EXIT_INPUT = 2  # bad input: nothing was changed
EXIT_DIVERGED = 3  # or out of memory; the last good checkpoint is kept
EXIT_PEER_LOST = 69  # another process of the run has died or never started; the same command continues (EX_UNAVAILABLE)
EXIT_PREEMPTED = 75  # state saved after SIGTERM; the same command continues (EX_TEMPFAIL)
EXIT_PIPE = 141  # nobody reads the output any more; as a shell reports SIGPIPE
EXIT_INTERRUPTED = 130  # Ctrl-C; the same command continues from the last checkpoint
FINAL = (1, EXIT_INPUT, EXIT_DIVERGED)  # the same command would end so again: no script of launch/ repeats it


def nearest(given: str, allowed: Iterable[str]) -> str:
    """The end of an error message about an unknown name: `allowed: a, b, c; did you mean 'b'?`"""
    allowed = sorted(allowed)
    text = f"allowed: {', '.join(allowed)}" if allowed else "nothing is allowed here"
    close = difflib.get_close_matches(given, allowed, n=1, cutoff=0.5)
    return text + (f"; did you mean '{close[0]}'?" if close else "")


# Callbacks for the end of a command with an error, by which a process informs the others of its run. Each is called
# with the exit code, the message and, if the error is a bug, the exception.
at_failure: list[Callable[[int, str, Exception | None], None]] = []


# Functions that are called before an exception is treated as a bug. If the user can fix its cause, a function returns
# an InputError that says how; otherwise None.
explanations: list[Callable[[Exception], InputError | None]] = []


# Each says whether something still runs in a thread that nothing depends on any more, such as a compiler. Python's own
# exit waits for such threads, or, if they are daemons, may abort the process while one of them is in C++.
unawaited: list[Callable[[], bool]] = []


def prepare_streams() -> None:
    """Makes stdout and stderr replace characters that their encoding cannot represent, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def exit_with(command: Callable[[], None]) -> NoReturn:
    """Runs the body of a command line and exits. An error that the user can fix gives one line and an exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on Ctrl-C raises: see ibjax/__init__.py
    prepare_streams()
    _set_hooks()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for name in ("absl", "asyncio"):  # Orbax logs every file that it writes, and errors that it also raises
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("jax").setLevel(logging.ERROR)
    try:
        command()
        sys.stdout.flush()
        code, message = 0, ""
    except BrokenPipeError:  # whoever read the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the flush at exit
        code, message = EXIT_PIPE, ""
    except Exception as error:
        code, message = _ending(error)
        if not message:
            _tell(1, f"{type(error).__name__}: {error}", error)
            raise
    except KeyboardInterrupt:
        code, message = EXIT_INTERRUPTED, "interrupted; the same command continues from the last checkpoint"
    if message:
        message = " ".join(message.split("\n"))
        print(message, file=sys.stderr)
    if code not in (0, EXIT_PREEMPTED):  # all processes already know of a preemption
        _tell(code, message)
    if any(runs() for runs in unawaited):
        _leave(code)
    sys.exit(code)


def _leave(code) -> NoReturn:
    """Exits without a wait for threads; all else is done that Python does, such as to take leave of other processes."""
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _set_hooks():
    """Installs hooks for exceptions that no caller can catch.

    Python ignores exceptions inside callbacks of the garbage collector; if Ctrl-C arrives there, the hook raises it
    again later. If one write of a checkpoint fails, which is reported elsewhere, Orbax closes the event loop of its
    other writes; the hooks hide the errors that follow from this.
    """

    def unraisable(found):
        if issubclass(found.exc_type, KeyboardInterrupt):  # after this hook has returned: here it would be ignored too
            threading.Timer(0.05, _thread.interrupt_main).start()
        elif not (inspect.iscoroutine(found.object) or _is_of_closed_loop(found.exc_value)):
            unraisable_before(found)

    def uncaught(kind, error, trace):
        if not _is_of_closed_loop(error):
            uncaught_before(kind, error, trace)

    unraisable_before, uncaught_before = sys.unraisablehook, sys.excepthook
    sys.unraisablehook, sys.excepthook = unraisable, uncaught


def _is_of_closed_loop(error):
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


def _tell(code, message, bug=None):
    for tell in at_failure:
        tell(code, message, bug)


def disk_full(error: BaseException) -> bool:
    """Whether an error of any library says that a disk, or the user's quota of it, is full."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in numbers or any(os.strerror(number) in str(error) for number in numbers)


def _ending(error):
    """(exit code, message) for an error that the user can fix; (1, "") for a bug."""
    if isinstance(error, InputError):
        return EXIT_INPUT, f"error: {error}"
    if isinstance(error, DivergedError):
        return EXIT_DIVERGED, f"diverged: {error}"
    if isinstance(error, PreemptedError):
        return EXIT_PREEMPTED, f"preempted: {error}; the same command continues"
    if isinstance(error, PeerError):
        return EXIT_PEER_LOST, f"error: {error}; the same command continues from the last checkpoint"
    if isinstance(error, MemoryError):
        return EXIT_DIVERGED, f"out of memory: {error}"
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(
        error
    ):  # the training loop itself names the batch size
        return EXIT_DIVERGED, f"out of memory: lower the batch size ({' '.join(str(error).split())[:200]})"
    if isinstance(error, OSError) and disk_full(error):
        return EXIT_INPUT, f"error: disk full ({error.filename}); free space, run the same command"
    if isinstance(error, OSError) and error.errno and error.filename:
        return EXIT_INPUT, f"error: {error.filename} cannot be used ({error.strerror}); then run the same command"
    for explain in explanations:
        if (mendable := explain(error)) is not None:
            return _ending(mendable)
    return 1, ""
