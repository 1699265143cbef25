"""Exceptions with a meaning to the user, and the one place that turns them into a line and an exit code."""

import _thread
import difflib
import errno
import inspect
import io
import logging
import math
import numbers
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeGuard


class InputError(ValueError):
    """Wrong configuration, data or checkpoint. Its text is one line: what was given, what is allowed, what to do.

    Command lines print it without a traceback and exit with `EXIT_INPUT`.
    """


class DataError(InputError):
    """A data set that is missing, damaged, or not what the configuration says."""


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged, or of another network."""


class UnreadableError(InputError):
    """A file that could not be read, which says nothing of its content: nothing is thrown away for it."""


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is one real number, Python's or NumPy's; truth values are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_range(name: str, value: float, low: float, high: float = math.inf, *, below: bool = False) -> None:
    """Raises InputError unless low <= value <= high (value < high with `below`); NaN and what is no number fail."""
    if not is_number(value) or not (low <= value <= high) or (below and value == high):
        given = f"{value:g}" if is_number(value) else repr(value)
        upper = "" if high == math.inf else f" and {'below' if below else 'at most'} {high:g}"
        raise InputError(f"{name}={given} is not allowed; give a number of at least {low:g}{upper}")


def check_count(name: str, value: int, low: int = 1) -> None:
    """Raises InputError unless `value` is a whole number of at least `low`, as an int."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < low:
        raise InputError(f"{name}={value!r} is not allowed; give a whole number of at least {low}")


class PreemptedError(Exception):
    """SIGTERM has come, to this process or another of the run; what was to be saved is saved."""


class DivergedError(Exception):
    """The loss or the state became NaN or Inf."""


# 1 is Python's own, for bugs
EXIT_INPUT = 2  # bad input: nothing was changed
EXIT_DIVERGED = 3  # or out of memory; the last good checkpoint is kept
EXIT_PEER_LOST = 69  # another process of the run has died or ended; the same command continues (EX_UNAVAILABLE)
EXIT_PREEMPTED = 75  # state saved after SIGTERM; the same command continues (EX_TEMPFAIL)
EXIT_INTERRUPTED = 130  # Ctrl-C; the same command continues from the last checkpoint


def nearest(given: str, allowed: Iterable[str]) -> str:
    """`allowed: a, b, c; did you mean 'b'?` for a name that is not among the allowed ones."""
    allowed = sorted(allowed)
    text = f"allowed: {', '.join(allowed)}" if allowed else "nothing is allowed here"
    close = difflib.get_close_matches(given, allowed, n=1, cutoff=0.5)
    return text + (f"; did you mean '{close[0]}'?" if close else "")


# called with code, message, and the exception where it is a bug, when a command ends with an error: one of several
# processes tells the others
at_failure: list[Callable[[int, str, Exception | None], None]] = []


# asked, before an exception is taken for a bug, whether it comes of something that the user can mend: the InputError
# that says so, or None
explanations: list[Callable[[Exception], InputError | None]] = []


def prepare_streams() -> None:
    """What a terminal or a log cannot show, in its encoding, it gets a replacement for."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def exit_with(command: Callable[[], None]) -> NoReturn:
    """Runs a command line's body; what the user can mend ends in one line on stderr and a code of its own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as of here Ctrl-C is an exception: see ibjax/__init__.py
    prepare_streams()
    _set_hooks()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for name in ("absl", "asyncio"):  # Orbax reports every file that it writes, and errors that it raises too
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("jax").setLevel(logging.ERROR)
    try:
        command()
        code, message = 0, ""
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
    if code not in (0, EXIT_PREEMPTED):  # of a preemption all processes know
        _tell(code, message)
    sys.exit(code)


def _set_hooks():
    """For exceptions that no code can catch.

    Ctrl-C that falls into a callback of the garbage collector, where Python ignores exceptions, comes again. Where one
    of the writes of a checkpoint fails, which is an error of its own, Orbax leaves the others without an event loop.
    """

    def unraisable(found):
        if issubclass(found.exc_type, KeyboardInterrupt):  # once this hook, which would ignore it too, is left
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


def _ending(error):
    """(exit code, line) of an error that the user can mend; (1, "") of a bug."""
    if isinstance(error, InputError):
        return EXIT_INPUT, f"error: {error}"
    if isinstance(error, DivergedError):
        return EXIT_DIVERGED, f"diverged: {error}"
    if isinstance(error, PreemptedError):
        return EXIT_PREEMPTED, f"preempted: {error}; the same command continues"
    if isinstance(error, MemoryError):
        return EXIT_DIVERGED, f"out of memory: {error}"
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(
        error
    ):  # outside the loop, which names the batch
        return EXIT_DIVERGED, f"out of memory: lower the batch size ({' '.join(str(error).split())[:200]})"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EXIT_INPUT, f"error: disk full ({error.filename}); free space, run the same command"
    if isinstance(error, OSError) and error.errno and error.filename:
        return EXIT_INPUT, f"error: {error.filename} cannot be used ({error.strerror}); then run the same command"
    for explain in explanations:
        if (mendable := explain(error)) is not None:
            return _ending(mendable)
    return 1, ""
