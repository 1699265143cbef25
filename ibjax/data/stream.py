"""Data sets too large for memory, such as ImageNet: worker threads read, decode, crop and resize images on demand.

    data=dict(name="stream", dataset="imagenet2012", size=224)    # a stock copy, made with --file_format=array_record

Training images are random resized crops with flips, test and validation images are centre crops; a crop and flip of
`augment` beside it are refused, a policy such as RandAugment comes on top. Labels are read once and cached in
~/.cache/ibjax. Needs the extra `imagenet` (Grain).

Guarantees (tests of the same names): a batch is a function of seed and step, so that reading can start at any step with
the same batches; an epoch shows every image once, except those of a last incomplete batch; processes that read parts of
a batch read together what one process would.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import io
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ibjax import files
from ibjax.data import Arrays, Split, check_labels, stamps, tfds
from ibjax.data.folder import FORMATS
from ibjax.errors import DataError, InputError, UnreadableError, check_range

_WAITS = (0.1, 0.5, 2.0)  # seconds before a record is read again
_RESIZED = 256 / 224  # ratio of a test image's shorter side to the side of its centre crop
_FOREVER = 2**62
_SEAL_BYTES = 16  # length of the digest after the cached labels
log = logging.getLogger(__name__)


def load(*, dataset: str = "imagenet2012", data_dir: str = "", size: int = 224, threads: int = 16) -> Arrays:
    """The splits `train` and `validation`, which is the test set (ImageNet's own test images have no labels).

    Args:
      dataset: name of the data set, which is also that of its folder in `data_dir`.
      data_dir: TFDS's folder; empty: $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      size: side of the images that the network receives.
      threads: number of threads that read and decode, in each process.

    Raises DataError if the data set is absent, damaged, without random access, or small enough for data.name='tfds'.
    """
    check_range("data.size", size, 1)
    check_range("data.threads", threads, 1)
    _allow_open_files()
    stored = tfds.find(dataset, data_dir)
    if stored.shape is not None:
        raise DataError(f"{stored.folder} has images of one size, which fit in one array; read it as data.name='tfds'")
    if not {"train", "validation"} <= set(stored.counts):
        raise DataError(f"{stored.folder} has splits {', '.join(stored.counts)}; needed: train and validation")

    def split(name):
        tfds.check_counts(stored, name)
        pictures = Pictures(stored, name, size, threads)
        return Split(pictures, pictures.labels())

    read = stamps(tfds.read_files(stored))
    splits, label = (split("train"), split("validation")), f"{stored.label}, {size} pixels"
    tfds.require_labels(stored, splits[0].labels)
    return Arrays(*splits, stored.num_classes, label=label, classes=stored.classes, read=read)


def _allow_open_files():
    """Raises this process's limit of open files as far as it may: a data set of 1,024 shards keeps as many open."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # not on Windows

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Pictures:
    """The images of a split, like an array (N, size, size, 3) uint8 of centre crops that is read when indexed."""

    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(
        self,
        stored: tfds.Stored,
        split: str,
        size: int,
        threads: int,
        rows: np.ndarray | None = None,
        source: Any = None,  # of a split of which this is a part
    ):
        self.stored, self.split, self.size, self.threads = stored, split, size, threads
        self.rows = np.arange(stored.counts[split]) if rows is None else rows
        self.shape = (len(self.rows), size, size, 3)
        self.source = _source(stored, split) if source is None else source

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, kept: np.ndarray) -> "Pictures":
        """A subset of the images; nothing is read."""
        return Pictures(self.stored, self.split, self.size, self.threads, self.rows[kept], self.source)

    def __getitem__(self, which: slice | np.ndarray) -> np.ndarray:
        with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
            images = list(pool.map(lambda row: self._image(row, None), self.rows[which]))
        return np.stack(images) if images else np.zeros((0, *self.shape[1:]), np.uint8)

    def crop(self, i: int, rng: np.random.Generator) -> np.ndarray:
        """A random resized crop of image i, flipped with probability ½."""
        return self._image(self.rows[i], rng)

    def _image(self, row, rng):
        record = self._record(row)
        try:
            with Image.open(io.BytesIO(record[self.stored.keys[0]]), formats=FORMATS) as encoded:
                image = encoded.convert("RGB")
        except Exception as error:
            raise tfds.unread(self.stored, self.split, int(row), error) from None
        width, height = image.size
        box = _centre(width, height) if rng is None else _random_box(width, height, rng)
        shape = (self.size, self.size)
        pixels = np.asarray(image.resize(shape, Image.Resampling.BILINEAR, box=box, reducing_gap=3.0))
        return pixels[:, ::-1] if rng is not None and rng.random() < 0.5 else pixels

    def _record(self, row):
        """A record; a read that fails is tried again, since storage that is far away fails at times."""
        for wait in _WAITS:
            try:
                return self.source[int(row)]
            except Exception:  # the reader raises RuntimeError for a failed read as for a damaged file
                time.sleep(wait)
        try:
            return self.source[int(row)]
        except Exception as error:
            raise tfds.unread(self.stored, self.split, int(row), error) from None

    def digest(self) -> str:
        """A digest of the files' names and sizes and of the selected images' indices, not of their 100 GB of content.

        The digest of a split also covers the labels.
        """
        total = hashlib.blake2b(self._files().encode(), digest_size=16)
        total.update(f"{self.size}".encode() + self.rows.astype(np.int64).tobytes())
        return total.hexdigest()

    def _files(self):
        paths = [Path(str(name)) for name in self.stored.builder.info.splits[self.split].filepaths]
        try:
            return ";".join(f"{path.name}:{path.stat().st_size}" for path in paths)
        except OSError as error:
            raise tfds.damaged(self.stored, self.split, error) from None

    def labels(self) -> np.ndarray:
        """The labels (N,) int32, read from the records once and then cached, as this reads every record completely.

        They are read again if a shard was rewritten since, as another data set may have the same names and sizes.
        """
        shards = self.stored.shards[self.split]
        lengths = [length for _, length in shards]
        name = files.digest(repr((self.split, stamps(path for path, _ in shards), lengths)).encode())
        try:
            file = files.cache_folder() / "labels" / f"{name}.labels"
        except RuntimeError:  # no home folder
            return self._read_labels()
        found = _kept_labels(file, len(self.rows), self.stored.num_classes)
        if found is None:
            found = self._read_labels()
            _keep_labels(file, found)
        return found

    def _read_labels(self):
        def label(row):
            return self._record(row)[self.stored.keys[1]]

        with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
            found = tqdm(pool.map(label, self.rows), f"labels of {self.split}", len(self.rows), disable=None)
            labels = np.fromiter(found, np.int32, len(self.rows))
        check_labels(labels, self.split, self.stored.num_classes)
        return labels


def _source(stored, split):
    """What reads a split's records at random."""
    import tensorflow_datasets

    decoders: Any = {stored.keys[0]: tensorflow_datasets.decode.SkipDecoding()}
    try:
        return stored.builder.as_data_source(split=split, decoders=decoders)
    except NotImplementedError:
        kind = stored.builder.info.file_format.value
        raise DataError(
            f"{stored.folder} holds {kind} files, which cannot be read at random; where TensorFlow is installed: "
            f"tfds convert_format --dataset_version_dir={stored.folder} --out_file_format=array_record"
        ) from None


def _kept_labels(file, count, num_classes):
    """The labels in a file of `_keep_labels`; None if the file is absent or damaged."""
    try:
        content = files.read_bytes(file)
    except (OSError, UnreadableError):
        return None  # absent or unreadable: the caller reads the records
    values, seal = content[:-_SEAL_BYTES], content[-_SEAL_BYTES:]
    if bytes.fromhex(files.digest(values)) == seal and len(values) == 4 * count:
        found = np.frombuffer(values, "<i4").astype(np.int32)
        if not count or (found.min() >= 0 and found.max() < num_classes):
            return found
    log.warning("%s is damaged; the labels are read again from the records", file)
    return None


def _keep_labels(file, labels):
    """Writes the labels, followed by a digest; if that fails, they are read from the records again next time."""
    values = labels.astype("<i4").tobytes()
    with contextlib.suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.{os.getpid()}")
        try:
            temporary.write_bytes(values + bytes.fromhex(files.digest(values)))
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)


def batches(
    split: Split, *, batch_size: int, seed: int = 0, step: int = 0, rows: np.ndarray | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Endless {"image": (R, size, size, 3) uint8, "label", "index" in the split, each (R,) int32}, from `step` on.

    Args:
      split: a split from `load`, or a part of one.
      batch_size: number of images in a batch; an epoch's last incomplete batch is left out.
      seed: seed of order and crops, which differ between epochs.
      step: number of the first batch, counted over all epochs.
      rows: which positions of the batch to read, (R,); None: all.

    Raises DataError if the files are damaged, InputError on an impossible batch size.
    """
    try:
        import grain
    except ModuleNotFoundError:
        raise InputError("data.name='stream' needs Grain: pip install 'ibjax[imagenet]'") from None
    pictures, labels = split
    assert isinstance(pictures, Pictures)
    if not 0 < batch_size <= len(pictures):
        raise InputError(f"batch_size={batch_size} of {len(pictures)} images; give 1 to their number")
    places = np.arange(batch_size) if rows is None else rows
    per_epoch = len(pictures) // batch_size

    @functools.lru_cache(maxsize=2)
    def order(epoch):
        return np.random.default_rng((seed, epoch)).permutation(len(pictures))

    def example(n):
        at, place = divmod(n, len(places))
        epoch, batch = divmod(at, per_epoch)
        i = order(epoch)[batch * batch_size + places[place]]
        image = pictures.crop(i, np.random.default_rng((seed, epoch, i)))
        return {"image": image, "label": labels[i], "index": np.int32(i)}

    images = grain.MapDataset.range(step * len(places), _FOREVER).map(example)
    options = grain.ReadOptions(num_threads=pictures.threads, prefetch_buffer_size=2 * len(places))  # two batches
    return iter(images.to_iter_dataset(options).batch(len(places)))


def _centre(width, height):
    """The box of the central square that resizing the shorter side to 256 and cropping 224×224 would show."""
    side = min(width, height) / _RESIZED
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


def _random_box(width, height, rng):
    """A random box of 8 to 100 % of the area, with a log-uniform aspect ratio from 3:4 to 4:3.

    If ten boxes in turn do not fit into the image, the largest central square.
    """
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side
