"""Files that are read whole and verified before any of their content is used."""

import errno
import hashlib
import io
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ibjax import disk
from ibjax.errors import InputError

_CHUNK = 1 << 22  # bytes of a member that are read at once
_MAGIC = 6 + 2  # bytes of a .npy file before the length of its header: "\x93NUMPY" and the format's version


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
    return disk.patiently(lambda: _read_npz(Path(path)), path)


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
