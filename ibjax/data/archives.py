"""Official archives: finding or downloading them, checking digests, and reading members without writing them to disk.

Guarantees (tests of the same names): an archive with another digest is refused; a member that points outside the
archive is refused; links and devices in a tar are refused; .npy with objects is never unpickled.
"""

import contextlib
import errno
import gzip
import hashlib
import io
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ibjax.errors import DataError

_CHUNK = 1 << 20


class Archive(NamedTuple):
    """One official file. With `content`, the digest of a `.gz` is that of its content, as mirrors may recompress it."""

    name: str
    url: str
    digest: str  # "sha256:…" or "md5:…" of the file, or with `content` of the uncompressed content
    content: bool = False


def find(archive: Archive, folder: Path, download: bool = False) -> Path:
    """The archive's path in `folder`; if it is absent, `download` fetches it, else DataError names file and URL."""
    names = [archive.name, archive.name.removesuffix(".gz")] if archive.content else [archive.name]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    if not download:
        raise DataError(f"{folder} has no {archive.name}; download it there from {archive.url}, or add --download")
    return _download(archive, folder)


def _download(archive, folder):
    """Downloads to NAME.part, which is renamed to NAME when it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{archive.name}.part"
    try:
        with urllib.request.urlopen(archive.url, timeout=60) as response, part.open("wb") as out:
            total = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=total or None, desc=archive.name, unit="B", unit_scale=True) as bar:
                while chunk := response.read(_CHUNK):
                    out.write(chunk)
                    bar.update(len(chunk))
                received = bar.n
        if total and received != total:
            raise DataError(f"{archive.url} ended after {received} of {total} bytes; run the same command again")
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise DataError(f"{archive.url} cannot be downloaded ({reason}); fetch it by hand into {folder}") from None
    return part.replace(folder / archive.name)


def verify(archive: Archive, path: Path, unverified: bool = False) -> tuple[str, bool]:
    """(digest of the file, whether it is the official one); another digest raises DataError unless `unverified`."""
    algorithm, _, official = archive.digest.partition(":")
    digest = hashlib.new(algorithm)
    with opened(path, archive.content) as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    found = digest.hexdigest()
    if found != official and not unverified:
        raise DataError(
            f"{path} has {algorithm} {found}, the official file {official}; delete it and download it again from "
            f"{archive.url}, or add --unverified if it is meant to be another one"
        )
    return f"{algorithm}:{found}", found == official


@contextlib.contextmanager
def opened(path: Path, content: bool = False) -> Iterator[Any]:
    """Opens the file for reading bytes; with `content`, a `.gz` is decompressed. Read errors become DataErrors."""
    with damage(path), gzip.open(path) if content and path.suffix == ".gz" else path.open("rb") as handle:
        yield handle


@contextlib.contextmanager
def damage(path: Path) -> Iterator[None]:
    """Turns any error of reading a damaged archive into a DataError of one line."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # EINVAL: a seek to an offset from damaged bytes
            raise DataError(f"{path} cannot be read ({error.strerror}); try again, or download it again") from None
        raise _damaged(path, error) from None
    except Exception as error:
        raise _damaged(path, error) from None


def _damaged(path, error):
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return DataError(f"{path} is truncated or damaged ({reason}); delete it and download it again")


# ---- members -----------------------------------------------------------------------------------------------


def read_tar(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the members whose name satisfies `wanted`, in the order of the archive."""
    with damage(path), tarfile.open(path, "r:*") as tar:
        for member in tar:
            _refuse_unsafe(path, member.name)
            if not (member.isfile() or member.isdir()):
                raise DataError(f"{path} holds a link or device '{member.name}'; it is not the official archive")
            if member.isfile() and wanted(member.name):
                handle = tar.extractfile(member)
                assert handle is not None  # true for regular files
                content = handle.read()
                if len(content) != member.size:
                    raise DataError(f"{path} ends within '{member.name}'; delete it and download it again")
                yield member.name, content
        while tar.fileobj and tar.fileobj.read(_CHUNK):  # reads to the end, where the checksum is
            pass


def read_members(path: Path, names: list[str]) -> list[bytes]:
    """The content of the named members of a tar; raises DataError if one is missing."""
    found = dict(read_tar(path, set(names).__contains__))
    if missing := [name for name in names if name not in found]:
        raise DataError(f"{path} has no member '{missing[0]}'; it is not the official archive")
    return [found[name] for name in names]


@contextlib.contextmanager
def opened_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip archive whose member names have all been checked."""
    with damage(path), zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            _refuse_unsafe(path, name)
        yield archive


def read_npy(content: bytes, where: str) -> Any:
    """The array of a .npy file; refuses objects, which would be unpickled, and a header that leaves bytes unread."""
    try:
        handle = io.BytesIO(content)
        array = np.lib.format.read_array(handle, allow_pickle=False)
        if left := len(handle.read()):  # a wrong header length shifts all values
            raise ValueError(f"{left} bytes are left over")
        return array
    except Exception as error:  # NumPy raises many types on damaged bytes
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{where} is no array of numbers ({reason}); it is damaged or not official") from None


def _refuse_unsafe(path, name):
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in name:
        raise DataError(f"{path} holds the path '{name}', outside of it; it is not the official archive")
