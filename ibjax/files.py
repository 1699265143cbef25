"""Files that a later run depends on: written whole or not at all, with digests, and read with patience.

Guarantees (tests of the same names): a file is there whole or not at all; a changed bit of a sealed file is found; a
read that fails is tried again, and its failure is never taken for damage.
"""

import argparse
import contextlib
import errno
import hashlib
import io
import json
import logging
import math
import os
import re
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ibjax.errors import InputError, UnreadableError

_WAITS = (0.1, 0.5, 2.0)  # seconds before a read that failed is tried again
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # answers of the file system, not failures
_SEAL = "digest"
_CHUNK = 1 << 22  # bytes of a member that are read at once
_MAGIC = 6 + 2  # bytes of a .npy file before the length of its header: "\x93NUMPY" and the format's version
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


# ---- arrays ------------------------------------------------------------------------------------------------


def read_npz(path: "str | os.PathLike") -> dict[str, np.ndarray]:
    """All arrays of an `.npz` file by name, each verified.

    `numpy.load` trusts the header of a member and stops where that says that the array ends. It then never reaches the
    member's checksum: one wrong bit in the header's length shifts every value, in silence. Here each member is read to
    its end, its CRC-32 is compared, and its header must account for all of its bytes.

    Args:
      path: a file of `numpy.savez` or `numpy.savez_compressed`; members that are no `.npy` are verified and left out.

    Returns:
      Writable arrays in the types of the file.

    Raises:
      InputError: no zip archive, a damaged member, a header that does not fit its member, an array of Python objects
        (these are pickles, which are never loaded), or one name twice. The message names file and member.
      UnreadableError: the file cannot be read, which says nothing about its content; FileNotFoundError: it is absent.
    """
    return patiently(lambda: _read_npz(Path(path)), path)


class _File(io.FileIO):
    """A file that keeps the error of a read: zipfile takes one for the end of the archive."""

    failure: OSError | None = None

    def readinto(self, buffer):
        try:
            return super().readinto(buffer)
        except OSError as error:
            self.failure = error
            raise


def _read_npz(path):
    arrays: dict[str, np.ndarray] = {}
    with _File(path) as raw, io.BufferedReader(raw) as handle:
        member = None
        try:
            with zipfile.ZipFile(handle) as archive:
                for info in archive.infolist():
                    member = info.filename
                    content = _verified(archive, info)
                    if not member.endswith(".npy"):
                        continue
                    name = member.removesuffix(".npy")
                    if name in arrays:
                        raise ValueError("the name stands twice in the archive")
                    arrays[name] = _array(content)
        except MemoryError:
            raise
        except OSError as error:  # no errno, or that of a seek before the start: raised over what the file holds
            if error.errno not in (None, errno.EINVAL):
                raise
            raise InputError(_message(path, member, error)) from None
        except Exception as error:  # zipfile, its decompressors and NumPy raise many kinds on damaged bytes
            if raw.failure is not None:
                raise raw.failure from None
            raise InputError(_message(path, member, error)) from None
    return arrays


def content_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """A 128-bit digest of arrays by name: equal where names, types, shapes and bytes are."""
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        total.update(f"{name}:{array.dtype.str}{array.shape};".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def _verified(archive, info):
    """The bytes of a member; reading to its end makes zipfile compare the CRC."""
    content = bytearray()
    with archive.open(info) as stream:
        while chunk := stream.read(_CHUNK):
            content += chunk
    if len(content) != info.file_size:
        raise ValueError(f"it has {len(content)} bytes, the archive's index says {info.file_size}")
    return content


def _array(content):
    """The array of a `.npy` file, sharing its bytes; raises ValueError unless the header accounts for all of them."""
    start = io.BytesIO(content[:_MAGIC])
    major, minor = np.lib.format.read_magic(start)
    if (major, minor) not in ((1, 0), (2, 0)):
        raise ValueError(f"its format is version {major}.{minor}, known are 1.0 and 2.0")
    size = 2 if major == 1 else 4  # bytes that say how long the header is
    offset = _MAGIC + size + int.from_bytes(content[_MAGIC : _MAGIC + size], "little")
    header = io.BytesIO(content[_MAGIC:offset])
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(header)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which to load would run code of whoever made the file")
    wanted = offset + math.prod(shape) * dtype.itemsize
    if wanted != len(content):
        raise ValueError(f"its header {dtype}{list(shape)} asks for {wanted} bytes, it has {len(content)}")
    return np.ndarray(shape, dtype, buffer=content, offset=offset, order="F" if fortran else "C")


def _message(path, member, error):
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    if member is None:
        return f"{path} is no .npz file, or it is damaged ({reason}); copy it again"
    return f"{path}: its member '{member}' is damaged or no plain array ({reason}); copy it again"


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
