"""Decoded images, kept in one file, so that a later run need not decode them again.

Decoding 60,000 small JPEGs takes 15 s of two cores, reading the file half a second. The file holds the key of what was
decoded: names, sizes and times of the images' files, the options, the versions of the decoders. Another key decodes
anew and replaces it, so that a folder has one file for each set of options.

Guarantees (tests of the same names): a changed, added, removed or renamed file is never served from before; a damaged,
truncated or foreign file is decoded again; where nothing can be written, nothing is kept and the images are the same.
"""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ibjax import files
from ibjax.data import Stamp
from ibjax.errors import InputError, UnreadableError

_WORTH = 1000  # fewer images are decoded as soon as a file is read
_SETTLED = 2 * 10**9  # ns: a file that was written so recently could change once more within the resolution of its time
log = logging.getLogger(__name__)


def kept(
    where: str | None,
    name: Any,
    read: Sequence[Stamp],
    key: Any,
    decode: Callable[[], dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """The arrays of `decode()`, from the file of an earlier call where nothing that they depend on has changed since.

    Args:
      where: the folder of such files; None: `files.cache_folder()`/decoded; empty: nothing is kept.
      name: with equal names there is one file, that of the last call.
      read: the stamps of the files that `decode` reads, taken before.
      key: whatever else the arrays depend on. Both `name` and `key` are compared by their repr.
      decode: returns named uint8 arrays.
    """
    newest = max((max(stamp.state[1:3]) for stamp in read if stamp.state), default=0)
    if where == "" or len(read) < _WORTH or newest > time.time_ns() - _SETTLED:
        return decode()
    try:
        folder = files.cache_folder() / "decoded" if where is None else files.path(where)
    except RuntimeError:  # no home folder
        return decode()
    file = folder / f"{files.digest(repr(name).encode())}.npz"
    wanted = files.digest(repr((key, read)).encode())
    found = _read(file, wanted)
    if found is None:
        found = decode()
        _write(file, wanted, found)
    return found


def _read(file: Path, wanted: str) -> dict[str, np.ndarray] | None:
    """The arrays in a file of `_write`; None if they are of another key, or the file is absent, unreadable, damaged."""
    try:
        if files.read_npz(file, ("key",))["key"].tobytes() != wanted.encode():
            return None
        found = files.read_npz(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (InputError, UnreadableError, KeyError, OSError) as error:
        log.warning("%s cannot be used; its images are decoded again (%s)", file, error)
        return None
    return {name: array for name, array in found.items() if name != "key"}


def _write(file, wanted, arrays):
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with files.replacing(file) as temporary, temporary.open("wb") as handle:
            np.savez(handle, key=np.frombuffer(wanted.encode(), np.uint8), **arrays)
    except OSError as error:
        log.info("decoded images are not kept (%s); data.cache names another folder, data.cache='' none", error)
