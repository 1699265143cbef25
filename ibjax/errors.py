"""Exceptions with a meaning to the user, and the one place that turns them into a line and an exit code."""

import difflib
import errno
import logging
import math
import numbers
import sys
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
EXIT_PREEMPTED = 75  # state saved after SIGTERM; the same command continues (EX_TEMPFAIL)
EXIT_INTERRUPTED = 130  # Ctrl-C; the same command continues from the last checkpoint


def nearest(given: str, allowed: Iterable[str]) -> str:
    """`allowed: a, b, c; did you mean 'b'?` for a name that is not among the allowed ones."""
    allowed = sorted(allowed)
    text = f"allowed: {', '.join(allowed)}" if allowed else "nothing is allowed here"
    close = difflib.get_close_matches(given, allowed, n=1, cutoff=0.5)
    return text + (f"; did you mean '{close[0]}'?" if close else "")


def exit_with(command: Callable[[], None]) -> NoReturn:
    """Runs a command line's body; what the user can mend ends in one line on stderr and a code of its own."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every file it writes
    logging.getLogger("jax").setLevel(logging.ERROR)
    code, message = 0, ""
    try:
        command()
    except InputError as error:
        code, message = EXIT_INPUT, f"error: {error}"
    except DivergedError as error:
        code, message = EXIT_DIVERGED, f"diverged: {error}"
    except PreemptedError as error:
        code, message = EXIT_PREEMPTED, f"preempted: {error}; the same command continues"
    except KeyboardInterrupt:
        code, message = EXIT_INTERRUPTED, "interrupted; the same command continues from the last checkpoint"
    except MemoryError as error:
        code, message = EXIT_DIVERGED, f"out of memory: {error}"
    except RuntimeError as error:  # outside the train loop, which names the batch
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        code, message = EXIT_DIVERGED, f"out of memory: lower the batch size ({' '.join(str(error).split())[:200]})"
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        code, message = EXIT_INPUT, f"error: disk full ({error.filename}); free space, run the same command"
    if message:
        print(" ".join(message.split("\n")), file=sys.stderr)
    sys.exit(code)
