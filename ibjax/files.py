"""Files that later runs depend on: atomic writes, digests of their content, and reads that are retried.

Guarantees (tests of the same names): a file is there whole or not at all; a changed bit of a sealed file is found; a
read that fails is tried again, and its failure is never taken for damage.
"""

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
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import platformdirs

from ibjax.errors import InputError, UnreadableError

_WAITS = (0.1, 0.5, 2.0)  # seconds before a read that failed is tried again
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # the file is absent; a retry would not help
_SEAL = "digest"
_CHUNK = 1 << 22  # bytes of an archive member that are read at a time
_MAGIC = 6 + 2  # bytes of a .npy file before the length of its header: "\x93NUMPY" and the format's version
_STORE = re.compile(r"[A-Za-z][\w+.-]+:/")  # two letters at least: C:/ is a drive; pathlib turns gs:// into gs:/
_T = TypeVar("_T")
log = logging.getLogger(__name__)


# ---- reading -----------------------------------------------------------------------------------------------


def patiently(read: Callable[[], _T], what: Any) -> _T:
    """Calls `read()`, and retries a few times if it fails with OSError or MemoryError.

    Such a failure (EIO, ESTALE, EACCES, EMFILE …) does not show that the file is damaged, so callers must not delete
    anything because of it. Raises UnreadableError if every attempt fails. That a file is absent is raised at once.
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
    """The content of a file, read with `patiently`; raises FileNotFoundError if it is absent."""
    try:
        return patiently(file.read_bytes, file)
    except NotADirectoryError as error:  # a part of its path is a file, not a folder
        raise FileNotFoundError(error.errno, error.strerror, str(file)) from None


def files_below(folder: Path) -> list[str]:
    """The sorted paths of all files below a folder, relative to it; raises FileNotFoundError if the folder is absent.

    A folder that cannot be listed is an error (see `patiently`), while `glob` and `os.walk` would treat it as empty.
    """

    def refuse(error):
        raise error

    def walk():
        found = [Path(above, name) for above, _, names in os.walk(folder, onerror=refuse) for name in names]
        return sorted(file.relative_to(folder).as_posix() for file in found)

    return patiently(walk, folder)


def read_json(file: Path, *, sealed: bool = False) -> dict[str, Any]:
    """The object in a file of `write_json`, without its digest.

    A file without a digest is accepted unless `sealed` is set. Raises ValueError if the file is damaged,
    FileNotFoundError if it is absent, UnreadableError if it cannot be read.
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
    """Yields a temporary path, which is renamed to `file` if the block succeeds: an atomic write.

    The path is unique to process and thread, so several can write the same file, for example a shared cache's entry.
    """
    temporary = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with naming(file):
            yield temporary
            with temporary.open("rb") as written:  # else the name may outlive a loss of power, and the content not
                os.fsync(written.fileno())
            temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Adds the file name to an OSError from within the block, since errors of a write or a flush lack it."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(file)
        raise


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes indented JSON with a digest of its content, atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(seal(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


# ---- digests -----------------------------------------------------------------------------------------------


def digest(content: bytes) -> str:
    """The 128-bit BLAKE2b digest, in hexadecimal."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def json_digest(content: Any) -> str:
    """The digest of `content` as JSON represents it, so that it is the same before writing and after reading."""
    kept = json.loads(json.dumps(content))  # JSON turns tuples into lists and keys into strings
    return digest(json.dumps(kept, sort_keys=True).encode())


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` with its digest added as the last entry."""
    plain = {key: value for key, value in content.items() if key != _SEAL}
    return {**plain, _SEAL: json_digest(plain)}


def unseal(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` without its digest; raises ValueError if the digest does not match."""
    plain = {key: value for key, value in content.items() if key != _SEAL}
    if _SEAL in content and content[_SEAL] != json_digest(plain):
        raise ValueError("its content is not what was written: the digest differs")
    if _SEAL not in content and plain:
        *rest, (name, last) = plain.items()
        if last == json_digest(dict(rest)):
            raise ValueError(f"its content is not what was written: '{name}' is its digest under another name")
    return plain


# ---- arrays ------------------------------------------------------------------------------------------------


def read_npz(path: "str | os.PathLike", names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """All arrays of an `.npz` file by name, each verified.

    `numpy.load` trusts the header of a member and stops where the array ends according to it. It then never reaches the
    member's checksum, and one wrong bit in the header's length silently shifts every value. This function reads each
    member to its end, compares its CRC-32, and requires that the header account for all of its bytes.

    Args:
      path: a file of `numpy.savez` or `numpy.savez_compressed`; members other than `.npy` are verified and left out.
      names: the arrays to read; the others are not looked at. None: all.

    Returns:
      Writable arrays with the dtypes of the file.

    Raises:
      InputError: not a zip archive, a damaged member, a header that does not fit its member, an array of Python objects
        (these are pickles, which are never loaded), or a duplicate name. The message names file and member.
      UnreadableError: the file cannot be read; its content may be intact.
      FileNotFoundError: the file is absent.
    """
    return patiently(lambda: _read_npz(Path(path), names), path)


class _File(io.FileIO):
    """A file that records a read error, since zipfile treats one as the end of the archive."""

    failure: OSError | None = None

    def readinto(self, buffer):
        try:
            return super().readinto(buffer)
        except OSError as error:
            self.failure = error
            raise


def _read_npz(path, names):
    arrays: dict[str, np.ndarray] = {}
    with _File(path) as raw, io.BufferedReader(raw) as handle:
        member = None
        try:
            with zipfile.ZipFile(handle) as archive:
                for info in archive.infolist():
                    member = info.filename
                    if names is not None and member.removesuffix(".npy") not in names:
                        continue
                    content = _verified(archive, info)
                    if not member.endswith(".npy"):
                        continue
                    name = member.removesuffix(".npy")
                    if name in arrays:
                        raise ValueError("the name stands twice in the archive")
                    arrays[name] = _array(content)
        except MemoryError:
            raise
        except OSError as error:  # no errno, or EINVAL from a seek before the start: the content is damaged
            if error.errno not in (None, errno.EINVAL):
                raise
            raise InputError(_message(path, member, error)) from None
        except Exception as error:  # zipfile, its decompressors and NumPy raise many kinds on damaged bytes
            if raw.failure is not None:
                raise raw.failure from None
            raise InputError(_message(path, member, error)) from None
    return arrays


def content_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """A 128-bit digest of named arrays, over their names, dtypes, shapes and bytes."""
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        total.update(f"{name}:{array.dtype.str}{array.shape};".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def _verified(archive, info):
    """The bytes of a member, read to the end so that zipfile compares the CRC."""
    content = bytearray()
    with archive.open(info) as stream:
        while chunk := stream.read(_CHUNK):
            content += chunk
    if len(content) != info.file_size:
        raise ValueError(f"it has {len(content)} bytes, the archive's index says {info.file_size}")
    return content


def _array(content):
    """The array of a `.npy` file, without a copy; raises ValueError unless the header accounts for all bytes."""
    start = io.BytesIO(content[:_MAGIC])
    major, minor = np.lib.format.read_magic(start)
    if (major, minor) not in ((1, 0), (2, 0)):
        raise ValueError(f"its format is version {major}.{minor}, known are 1.0 and 2.0")
    size = 2 if major == 1 else 4  # bytes of the field that holds the header's length
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


def path(text: str | os.PathLike) -> Path:
    """The path that a command line or a configuration names, with `~` and $VARIABLES expanded as a shell would.

    Shells do not expand `--option=~/x`, and a folder called `~` invites `rm -r ~`. Raises InputError if a variable is
    not set, if there is no such home folder, if the current folder already contains a folder `~`, or if the text is no
    path but the address of a store, as gs://bucket/run. argparse shows the message if this function is the type of an
    argument.
    """
    given = os.fspath(text)
    if not given:
        raise InputError("a path is empty (a variable that is not set?); write . for the current folder")
    if in_store(given):
        raise InputError(
            f"{given} is no path on this machine; give one, as that of a downloaded file, or of a folder that gcsfuse "
            f"or NFS mounts (docs/pods.md)"
        )
    if given.startswith("~") and os.path.lexists("~"):
        raise InputError(
            f"{given}: there is a folder called ~ in {os.getcwd()}, made by a command that did not expand it; move "
            f"what it holds with mv ./~ NAME (never rm -r ~), then run the same command"
        )
    if os.path.lexists(given):
        return Path(given)
    expanded = os.path.expanduser(os.path.expandvars(given))
    if unknown := re.search(r"\$(\w+|\{[^}]*\})", expanded):
        raise InputError(f"{given}: the variable {unknown[0]} is not set; set it, or write the path without it")
    if expanded.startswith("~"):
        raise InputError(f"{given}: there is no such home folder (is HOME set?); write the path without ~")
    return Path(expanded)


def in_store(text: str) -> bool:
    """Whether a text is the address of a store, as gs://bucket/folder, and no path of the file system."""
    return _STORE.match(text) is not None


def cache_folder() -> Path:
    """The folder for files that can be recomputed: $XDG_CACHE_HOME/ibjax, else the system's usual one.

    That is ~/.cache/ibjax on Linux, ~/Library/Caches/ibjax on macOS, %LOCALAPPDATA%\\ibjax\\Cache on Windows. Raises
    RuntimeError if there is no home folder.
    """
    if named := os.environ.get("XDG_CACHE_HOME"):
        return path(named) / "ibjax"
    usual = Path(platformdirs.user_cache_dir("ibjax", appauthor=False))
    if not usual.is_absolute():
        raise RuntimeError("there is no home folder")
    return usual
