"""Generated images beside the original ones: every batch has a fixed share of them.

    data=dict(name="tfds", dataset="cifar10", extra=dict(path="1m.npz", fraction=0.7), …)

| option     | default |                                                                                             |
|------------|---------|---------------------------------------------------------------------------------------------|
| `path`     |         | an .npz file with `image` (N, H, W, C) uint8 and `label`, as Gowal et al. and Wang et al.   |
|            |         | publish them                                                                                |
| `fraction` | 0.7     | a batch has round(fraction · batch_size) generated images                                   |
| `resident` | None    | True: in device memory; False: read while training; None: in device memory up to 4 GiB      |

Labels are classes (N,), also as floats, or distributions (N, classes), as pseudo-labels are: the losses then fit
distributions. Generated images follow the original ones in a batch's `index`.

Order: original and generated images are permuted independently of each other. A pass over N images is cut into
⌊N / n⌋ batches of n, what is left over is left out, and the next pass has another permutation. As in the papers' code,
an epoch is ⌊N_original / batch_size⌋ steps, so that an original image is seen 1 − fraction times an epoch. Batch k is a
function of (seed, k), whether the file is resident or read, and on any number of hosts; the generated images are spread
over a batch so that each device, microbatch and group of batch-norm has its share, to within one.

A file that is read while training must hold its images without compression, as `numpy.savez` does; a compressed one is
unpacked once, to the cache folder. Each process reads the images of its own devices, some steps ahead.

Source: Gowal et al., "Improving Robustness using Generated Data", NeurIPS 2021, and its code. There the share is
rounded for each of four emulated machines: of 1,024 images 716 are generated with fraction 0.7, here 717.
"""

import concurrent.futures
import io
import math
import os
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import jax
import jax.numpy as jnp
import numpy as np

from ibjax import files
from ibjax.data.permutation import permuted
from ibjax.errors import DataError, InputError, UnreadableError

FRACTION = 0.7  # of a batch, where nothing else is said
RESIDENT = 4 << 30  # bytes of images up to which they are kept in device memory
_THREADS, _AHEAD = 8, 3  # that read a batch; batches that are read ahead
_MEMBERS = ("image", "label")
_HEADER = 1 << 10  # bytes that hold the header of a plain array


class Extra(NamedTuple):
    """Generated images. Those of a file that is read while training are `Stored`, the others an array."""

    images: Any  # (N, H, W, C) uint8
    labels: np.ndarray  # (N,) int32, or distributions (N, classes) float32
    fraction: float
    digest: str  # of the checksums in the file
    file: Path

    @property
    def resident(self) -> bool:
        """Whether the images are kept in device memory."""
        return isinstance(self.images, np.ndarray)

    def take(self, which: np.ndarray) -> np.ndarray:
        """The images of these numbers, (n, H, W, C) uint8."""
        return self.images[which] if self.resident else self.images.take(which)


class Stored(NamedTuple):
    """Images in a file, one after the other from `offset` on."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    state: tuple[int, ...]  # `_state` of the file when its content was identified

    def take(self, which: np.ndarray) -> np.ndarray:
        """The images of these numbers; DataError if the file is gone or too short, UnreadableError if a read fails."""
        made = np.empty((len(which), *self.shape[1:]), np.uint8)
        size = math.prod(self.shape[1:])

        def read():
            with open(self.file, "rb", buffering=0) as handle:
                if (found := _state(os.fstat(handle.fileno()))) != self.state:
                    how = "become shorter" if found[0] < self.state[0] else "changed"
                    raise DataError(f"{self.file} has {how}; restore it, then run the same command")
                for i, number in enumerate(which):
                    handle.seek(self.offset + int(number) * size)
                    if handle.readinto(made[i].reshape(-1).data) != size:
                        raise DataError(f"{self.file} has become shorter; restore it, then run the same command")

        try:
            files.patiently(read, self.file)
        except FileNotFoundError:
            raise DataError(f"{self.file} is gone; restore it, then run the same command") from None
        return made


def load(
    *, path: str, fraction: float = FRACTION, resident: bool | None = None, shape: tuple[int, ...], num_classes: int
) -> Extra:
    """The generated images of a file; `shape` and `num_classes` are those of the original ones.

    Raises DataError, one line, where the file is absent or damaged, lacks a name, or has other images or labels.
    """
    if not 0 < fraction < 1:
        raise InputError(f"data.extra.fraction={fraction!r} is not allowed; give a number above 0 and below 1")
    file = files.path(path)
    if not file.is_file():
        raise DataError(f"data.extra.path={file} is no file; give an .npz with image and label")
    state = _state(file.stat())  # before its content is read
    members = _headers(file)
    if missing := [name for name in _MEMBERS if name not in members]:
        raise DataError(f"{file} lacks {', '.join(missing)}; it holds {', '.join(members) or 'nothing'}")
    image, label = (members[name] for name in _MEMBERS)
    if image.dtype != np.uint8 or image.shape[1:] != tuple(shape) or not image.shape[0] or image.fortran:
        raise DataError(
            f"{file}: image has type {image.dtype} and shape {image.shape}; give uint8 (N, "
            f"{', '.join(map(str, shape))}), as the original images are"
        )
    if label.shape[:1] != image.shape[:1]:
        raise DataError(f"{file} has {image.shape[0]} images and a label of shape {label.shape}; give one for each")
    digest = files.json_digest([[list(m.shape), str(m.dtype), m.crc] for m in (image, label)])
    keep = math.prod(image.shape) <= RESIDENT if resident is None else resident
    labels = _labels(file, _read(file, label), num_classes)
    images = _read(file, image) if keep else _stored(file, image, digest, state)
    return Extra(images, labels, float(fraction), digest, file)


EXTRAS = {"npz": load}


def count(file: Path) -> int:
    """The number of images of a file, by its header alone; DataError where it is damaged or lacks `image`."""
    members = _headers(file)
    if "image" not in members:
        raise DataError(f"{file} lacks image; it holds {', '.join(members) or 'nothing'}")
    return members["image"].shape[0]


def _labels(file, found, classes):
    """Classes (N,) int32 or distributions (N, C) float32; raises DataError on anything else."""
    if found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if np.issubdtype(found.dtype, np.floating) and found.ndim == 2:
        if found.shape[1] != classes:
            raise DataError(f"{file}: label has {found.shape[1]} columns; the data has {classes} classes")
        sums = found.sum(axis=1, dtype=np.float64)
        if not (np.all(found >= 0) and np.all(np.abs(sums - 1) < 1e-2)):  # NaN fails too
            raise DataError(f"{file}: label has rows that are no distributions; give rows of at least 0 that sum to 1")
        return (found / sums[:, None]).astype(np.float32)
    if found.ndim != 1 or not (np.issubdtype(found.dtype, np.number)):
        raise DataError(
            f"{file}: label has type {found.dtype} and shape {found.shape}; give classes (N,), or distributions (N, "
            f"{classes}) as floats"
        )
    whole = found.astype(np.int32) if np.all(np.isfinite(found)) else np.zeros(len(found), np.int32)
    if not np.array_equal(whole, found):
        raise DataError(f"{file}: label has values that are no classes, such as {found[whole != found][0]}")
    if whole.min() < 0 or whole.max() >= classes:
        raise DataError(
            f"{file}: labels lie in [{whole.min()}, {whole.max()}]; with {classes} classes they must lie in [0, "
            f"{classes - 1}]"
        )
    return whole


# ---- the file ----------------------------------------------------------------------------------------------


class _Member(NamedTuple):
    """An array of the archive, by its header alone."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    offset: int  # of the values in the archive; -1 where they are compressed
    crc: int


def _headers(file):
    """{name: _Member}; DataError unless the file is an .npz archive of plain arrays."""

    def read():
        found = {}
        with zipfile.ZipFile(file) as archive, open(file, "rb") as raw:
            for info in archive.infolist():
                if not info.filename.endswith(".npy"):
                    continue
                with archive.open(info) as stream:
                    head = io.BytesIO(stream.read(_HEADER))
                version = np.lib.format.read_magic(head)
                header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, fortran, dtype = header[version](head)
                raw.seek(info.header_offset + 26)  # the local header's lengths of name and extra field
                lengths = np.frombuffer(raw.read(4), "<u2")
                begin = info.header_offset + 30 + int(lengths.sum()) + head.tell()
                if head.tell() + math.prod(shape) * dtype.itemsize != info.file_size or dtype.hasobject:
                    raise ValueError(f"its member '{info.filename}' is no plain array of the size in its header")
                offset = begin if info.compress_type == zipfile.ZIP_STORED else -1
                found[info.filename.removesuffix(".npy")] = _Member(
                    info.filename, shape, dtype, fortran, offset, info.CRC
                )
        return found

    try:
        return files.patiently(read, file)
    except UnreadableError:
        raise
    except Exception as error:  # zipfile, its decompressors and NumPy raise many kinds on damaged bytes
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise DataError(f"{file} is no .npz file, or it is damaged ({reason}); copy it again") from None


def _read(file, member):
    """A whole array, whose checksum is compared."""
    name = member.name.removesuffix(".npy")
    try:
        return files.read_npz(file, names=(name,))[name]
    except UnreadableError:
        raise
    except InputError as error:
        raise DataError(str(error)) from None


def _stored(file, member, digest, state):
    """The images where they lie uncompressed: in the file itself, or unpacked once in the cache folder."""
    if member.offset >= 0:
        return Stored(file, member.offset, member.shape, state)
    size = math.prod(member.shape)
    try:
        unpacked = files.cache_folder() / "extra" / f"{digest}.images"
    except RuntimeError as error:  # no home folder
        raise DataError(
            f"{file} is compressed, and there is no cache folder to unpack it into ({error}); set XDG_CACHE_HOME, or "
            f"store it with numpy.savez"
        ) from None
    unpacked.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with filelock.FileLock(f"{unpacked}.lock"):  # the processes of a machine unpack it once
        if not (unpacked.is_file() and unpacked.stat().st_size == size):
            _unpack(file, member.name, size, unpacked)
    return Stored(unpacked, 0, member.shape, _state(unpacked.stat()))


def _unpack(file, name, size, unpacked):
    with (
        files.replacing(unpacked) as temporary,
        zipfile.ZipFile(file) as archive,
        archive.open(name) as stream,
        open(temporary, "wb") as made,
    ):
        try:
            stream.read(archive.getinfo(name).file_size - size)
            while chunk := stream.read(1 << 22):  # to the end, where the checksum is compared
                made.write(chunk)
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
            raise DataError(f"{file}: its member '{name}' is damaged ({error}); copy it again") from None


def _state(found):
    """What changes where a file is written again: size, time of modification, inode."""
    return found.st_size, found.st_mtime_ns, found.st_ino


# ---- the order ---------------------------------------------------------------------------------------------


class Shares(NamedTuple):
    """Which images a batch has."""

    generated: np.ndarray  # (B,) bool: the places of the generated images
    n_original: int
    n_generated: int

    def index(self, key_data: Any, step: Any, xp: Any = jnp) -> Any:
        """The index (B,) int32 of the images of a batch, with xp=jnp inside a program or xp=np on the host.

        key_data: the words of the run's key of the order; step: the number of the batch.
        """
        made = []
        for source, (mask, n) in enumerate(((~self.generated, self.n_original), (self.generated, self.n_generated))):
            size = int(mask.sum())
            number, batch = xp.divmod(xp.asarray(step, xp.int32), xp.int32(n // size))
            places = batch * xp.int32(size) + xp.arange(size, dtype=xp.int32)
            made.append(permuted(places, n, (*key_data, source, number), xp).astype(xp.int32))
        own, generated = made[0], made[1] + xp.int32(self.n_original)
        back = np.argsort(np.concatenate([np.flatnonzero(mask) for mask in (~self.generated, self.generated)]))
        return xp.concatenate([own, generated])[back]


def shares(extra: Extra, n_original: int, batch_size: int, microbatches: int = 1) -> Shares:
    """The places of the generated images in a batch, as even as possible in each part of it.

    Raises InputError where a batch has more images of a source than there are, or none.
    """
    count, n_generated = round(extra.fraction * batch_size), len(extra.labels)
    if not 0 < count < batch_size:
        raise InputError(
            f"data.extra.fraction={extra.fraction:g} of batch_size={batch_size} is {count} generated images; a batch "
            f"needs at least one of both kinds"
        )
    for name, needed, there in (("original", batch_size - count, n_original), ("generated", count, n_generated)):
        if needed > there:
            raise InputError(
                f"batch_size={batch_size} needs {needed} {name} images, there are {there}; give a smaller one"
            )
    place = np.arange(batch_size)
    run = place % microbatches * (batch_size // microbatches) + place // microbatches  # a part's places in a row
    generated = (run + 1) * count // batch_size > run * count // batch_size
    return Shares(generated, n_original, n_generated)


def batches(
    extra: Extra, shares: Shares, key_data: np.ndarray, step: int, rows: np.ndarray
) -> Iterator[dict[str, np.ndarray]]:
    """Endless {"image" (R, H, W, C) uint8, "label" (R,) or (R, classes)} of the places `rows` (R,), from `step` on.

    Places of original images hold zeros. Batches are read ahead by threads.
    """
    wanted = np.flatnonzero(shares.generated[rows])
    readers = concurrent.futures.ThreadPoolExecutor(_THREADS, "ibjax-extra")

    def begin(step):
        which = shares.index(key_data, step, np)[rows[wanted]] - shares.n_original
        parts = np.array_split(which, _THREADS)
        return which, [readers.submit(extra.take, part) for part in parts]

    def finish(which, parts):
        image = np.zeros((len(rows), *extra.images.shape[1:]), np.uint8)
        label = np.zeros((len(rows), *extra.labels.shape[1:]), extra.labels.dtype)
        image[wanted] = np.concatenate([part.result() for part in parts])
        label[wanted] = extra.labels[which]
        return {"image": image, "label": label}

    ahead = deque(begin(step + i) for i in range(_AHEAD))
    try:
        while True:
            yield finish(*ahead.popleft())
            step += 1
            ahead.append(begin(step + _AHEAD - 1))
    finally:
        readers.shutdown(wait=False, cancel_futures=True)


def key_data(key: jax.Array) -> Any:
    """The words of a key, a tuple of uint32 scalars."""
    return tuple(jax.random.key_data(key))
