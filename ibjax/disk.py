"""Reading and writing what a later run depends on: whole or not at all, with digests, and with patience.

Guarantees (tests of the same names): a file is there whole or not at all; a changed bit of a sealed file is found; a
read that fails is tried again, and its failure is never taken for damage.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ibjax.errors import InputError, UnreadableError

_WAITS = (0.1, 0.5, 2.0)  # seconds before a read that failed is tried again
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # answers of the file system, not failures
_SEAL = "digest"
_T = TypeVar("_T")
log = logging.getLogger(__name__)


# ---- reading -----------------------------------------------------------------------------------------------


def patiently(read: Callable[[], _T], what: Any) -> _T:
    """`read()`, tried again a few times where it fails with OSError or MemoryError.

    Such a failure (EIO, ESTALE, EACCES, EMFILE …) says nothing of what lies on the disk, so nothing may be thrown away
    for it. Raises UnreadableError when it stays; that a file is absent is no failure, and raised at once.
    """
    for wait in (*_WAITS, None):
        try:
            return read()
        except _ABSENT:
            raise
        except (OSError, MemoryError) as error:
            reason = "out of memory" if isinstance(error, MemoryError) else error.strerror or str(error)
            if wait is None:
                raise UnreadableError(
                    f"{what} cannot be read ({reason}; tried {len(_WAITS) + 1} times); nothing was moved or changed; "
                    f"when it can be read again, run the same command"
                ) from None
        log.info("%s: %s; trying again", what, reason)
        time.sleep(wait)
    raise AssertionError("not reached")


def read_bytes(file: Path) -> bytes:
    """The content of a file, `patiently`; raises FileNotFoundError where there is none."""
    try:
        return patiently(file.read_bytes, file)
    except NotADirectoryError as error:  # what should be a folder above it is a file
        raise FileNotFoundError(error.errno, error.strerror, str(file)) from None


def files_below(folder: Path) -> list[str]:
    """The paths of all files below a folder, relative to it, sorted, `patiently`; FileNotFoundError without a folder.

    A folder that cannot be listed is no empty one, for which `glob` and `os.walk` take it.
    """

    def refuse(error):
        raise error

    def walk():
        found = [Path(above, name) for above, _, names in os.walk(folder, onerror=refuse) for name in names]
        return sorted(file.relative_to(folder).as_posix() for file in found)

    return patiently(walk, folder)


def read_json(file: Path, *, sealed: bool = False) -> dict[str, Any]:
    """The object in a file of `write_json`, without its digest.

    A file without a digest is taken as it is, unless it must be `sealed`. Raises ValueError where the file is damaged,
    FileNotFoundError where it is absent, UnreadableError where it cannot be read.
    """
    try:
        content = json.loads(read_bytes(file).decode("utf-8"))
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    if sealed and _SEAL not in content:
        raise ValueError("it has no digest")
    return unseal(content)


# ---- writing -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary path that becomes `file` when the block ends well: `file` is there whole or not at all.

    The path is this process's own: two that write one file, as an entry of a shared cache, do not disturb each other.
    """
    temporary = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with naming(file):
            yield temporary
            temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """An OSError that says on which file, as those of a write or a flush do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(file)
        raise


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes indented JSON with a digest of itself, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(seal(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


# ---- digests -----------------------------------------------------------------------------------------------


def digest(content: bytes) -> str:
    """128 bits of BLAKE2b, in hexadecimal."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def json_digest(content: Any) -> str:
    """The digest of what JSON keeps of `content`: equal before it is written and after it is read."""
    kept = json.loads(json.dumps(content))  # tuples are lists, keys are text
    return digest(json.dumps(kept, sort_keys=True).encode())


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` with the digest of itself as its last entry."""
    plain = {key: value for key, value in content.items() if key != _SEAL}
    return {**plain, _SEAL: json_digest(plain)}


def unseal(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` without its digest; raises ValueError where it is not the one that was sealed."""
    plain = {key: value for key, value in content.items() if key != _SEAL}
    if _SEAL in content and content[_SEAL] != json_digest(plain):
        raise ValueError("its content is not what was written: the digest differs")
    if _SEAL not in content and plain:
        *rest, (name, last) = plain.items()
        if last == json_digest(dict(rest)):
            raise ValueError(f"its content is not what was written: '{name}' is its digest under another name")
    return plain


# ---- paths -------------------------------------------------------------------------------------------------


class _PathError(InputError, argparse.ArgumentTypeError):
    pass


def path(text: str | os.PathLike) -> Path:
    """The path that a command line or a configuration names, with `~` and $VARIABLES expanded as a shell would.

    Shells do not expand `--option=~/x`, and a folder called `~` invites `rm -r ~`. Raises InputError, which argparse
    shows where this is an argument's type, where a variable is not set, there is no such home, or a folder `~` lies in
    the current folder already.
    """
    given = os.fspath(text)
    if given.startswith("~") and os.path.lexists("~"):
        raise _PathError(
            f"{given}: there is a folder called ~ in {os.getcwd()}, made by a command that did not expand it; move "
            f"what it holds with mv ./~ NAME (never rm -r ~), then run the same command"
        )
    if os.path.lexists(given):
        return Path(given)
    expanded = os.path.expanduser(os.path.expandvars(given))
    if unknown := re.search(r"\$(\w+|\{[^}]*\})", expanded):
        raise _PathError(f"{given}: the variable {unknown[0]} is not set; set it, or write the path without it")
    if expanded.startswith("~"):
        raise _PathError(f"{given}: there is no such home folder (is HOME set?); write the path without ~")
    return Path(expanded)
