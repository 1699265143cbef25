"""Data sets of TensorFlow Datasets by name, read without TensorFlow.

    data=dict(name="tfds", dataset="cifar10", data_dir="~/tensorflow_datasets")
    data=dict(name="tfds", dataset="cifar10", test="cifar10_1")    # trained on CIFAR-10, tested on CIFAR-10.1

Reads data sets made by `python -m ibjax.data.prepare` and unchanged copies of TFDS's own, in ArrayRecord or TFRecord
files, whose features are an image and a label. Images come in the data set's original order; if records have an `id`,
as those of TFDS's CIFAR do, in the order of the ids.

Guarantees (tests of the same names): TensorFlow is never imported; a damaged shard is named with how to make it again,
or its images are intact; a description that declares more or fewer images than the files hold is refused.
"""

import concurrent.futures
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ibjax import files
from ibjax.data import Arrays, Split, builders, listed, require_classes, stamps, tfrecord
from ibjax.errors import DataError

DEFAULT_DIR = "~/tensorflow_datasets"  # TFDS's default, unless TFDS_DATA_DIR is set
_LABELS = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "svhn_cropped": "SVHN",
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "stl10": "STL-10",
}
_BATCH = 4096  # records decoded at a time


class Stored(NamedTuple):
    """A data set on disk."""

    builder: Any  # TFDS's read-only builder
    folder: Path
    label: str
    keys: tuple[str, str]  # keys of image and label in a record
    shape: tuple[int, int, int] | None  # shape of every image; None if shapes differ
    classes: tuple[str, ...]  # names of the classes, in the order of labels
    shards: dict[str, tuple[tuple[Path, int], ...]]  # split -> its files, each with the number of its records
    remake: str  # what to do when a file is damaged

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    @property
    def counts(self) -> dict[str, int]:
        """The number of images in each split."""
        return {split: sum(count for _, count in shards) for split, shards in self.shards.items()}


def load(*, dataset: str, data_dir: str = "", test: str = "", label: str = "") -> Arrays:
    """Reads splits `train` and `test` (and `validation`, if there is one) of a data set into memory.

    If the labelled test images are in a split named `validation`, as in Tiny-ImageNet, that split is the test set.

    Args:
      dataset: name, or name/config, which is also the name of its folder in `data_dir`.
      data_dir: TFDS's folder; empty: $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      test: another data set with the same classes and shape, whose test images replace those of `dataset`.
      label: name of the data in results; empty: the name that `prepare` recorded, or the usual name.

    Raises DataError if the data set is absent (with the command to run), has no images with labels, or is damaged (with
    the file).
    """
    for name in (dataset, test):
        if name.endswith("_c"):
            raise DataError(
                f"'{name}' is a test set only, one for each corruption: train on '{name[:-2]}', then evaluate the "
                f"run with python -m ibjax.analysis.corruptions --workdir=DIR --data_dir={data_dir or DEFAULT_DIR}"
            )
    stored = find(dataset, data_dir)
    tested = _tested(stored, find(test, data_dir)) if test else stored
    if "train" not in stored.counts or not {"test", "validation"} & set(tested.counts):
        raise DataError(
            f"{stored.folder} has splits {', '.join(stored.counts)}; needed: train, and test or validation. A set of "
            f"test images goes with one to train on: data=dict(name='tfds', dataset='cifar10', test='cifar10_1')"
        )
    if stored.shape is None:
        raise DataError(
            f"{stored.folder} has images of different sizes, which do not fit in one array; read them as "
            f"data=dict(name='stream', dataset='{dataset}', size=…)"
        )
    read_from = stamps(
        path for part in {stored.folder: stored, tested.folder: tested}.values() for path in read_files(part)
    )
    train = read(stored, "train")
    require_labels(stored, train.labels)
    shown = "test" if "test" in tested.counts else "validation"
    own = tested is stored
    val = read(stored, "validation") if "validation" in stored.counts and not (own and shown == "validation") else None
    label = label or (stored.label if own else f"{stored.label}, tested on {tested.label}")
    options = dict(label=label, classes=stored.classes, read=read_from)
    return Arrays(train, read(tested, shown), stored.num_classes, val, **options)


def find(dataset: str, data_dir: str = "") -> Stored:
    """The newest version of a data set in `data_dir`; reads its description only."""
    root = files.path(data_dir or os.environ.get("TFDS_DATA_DIR") or DEFAULT_DIR)
    make = _how_to_make(dataset, root)
    versions = [info.parent for info in (root / dataset).glob("*/dataset_info.json")]
    if not versions:
        raise DataError(f"data.data_dir={root} has no {dataset}; make it: {make}, or give the right data_dir")
    folder = max(versions, key=lambda folder: [int(number) for number in re.findall(r"\d+", folder.name)])
    remake = f"delete {folder} and make it again: {make}"
    import tensorflow_datasets as tfds

    try:
        _refuse_code(folder / "features.json")
        builder = tfds.builder_from_directory(str(folder))
        features: Any = builder.info.features
        keys = tuple(builder.info.supervised_keys or ("image", "label"))[:2]
        image, target = (features[key] for key in keys)
        shards = {name: _shards(split) for name, split in builder.info.splits.items()}
        classes, whole, kind = tuple(map(str, target.names)), tuple(image.shape), np.dtype(image.np_dtype)
        if int(target.num_classes) != len(classes):
            raise ValueError(f"{target.num_classes} classes with {len(classes)} names")
        own = type(image) is tfds.features.Tensor  # TFDS's own builders have an Image
        label = builders.label(builder.info.metadata, classes, own) or _LABELS.get(dataset, dataset)
    except Exception as error:  # TFDS raises many types on a damaged or foreign description
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"{folder} does not describe images with class labels ({type(error).__name__}: {reason}); {remake}"
        ) from None
    if kind != np.uint8 or len(whole) != 3:
        raise DataError(f"{folder} holds images of {kind} {whole}; expected uint8 of (height, width, channels)")
    return Stored(builder, folder, label, keys, None if None in whole else whole, classes, shards, remake)


def _refuse_code(file):
    """Raises ValueError where a description names features that TFDS would import from other packages."""

    def look(section):
        for name in (section.get("pythonClassName"), section.get("python_class_name"), section.get("type")):
            if isinstance(name, str) and not name.startswith("tensorflow_datasets."):
                raise ValueError(f"{file.name} names code outside TensorFlow Datasets: {name}")
        return section

    json.loads(file.read_text(encoding="utf-8"), object_hook=look)


def _shards(split):
    return tuple((Path(str(file)), int(n)) for file, n in zip(split.filepaths, split.shard_lengths, strict=True))


def _how_to_make(dataset, root):
    from ibjax.data.prepare import RECIPES

    if dataset in RECIPES:
        return f"python -m ibjax.data.prepare --dataset={dataset} --data_dir={root} --download"
    return f"pip install 'ibjax[prepare]' && tfds build {dataset} --file_format=array_record --data_dir={root}"


def _tested(stored, other):
    """`other`, if a network trained on `stored` can classify its images; else raises DataError."""
    for what in ("shape", "num_classes", "classes"):
        ours, theirs = getattr(stored, what), getattr(other, what)
        unnamed = what == "classes" and _numbers(len(ours)) in (ours, theirs)  # copies whose classes have no names
        if ours != theirs and not unnamed:
            said = [listed(value) if what == "classes" else str(value) for value in (theirs, ours)]
            raise DataError(f"{other.folder} has {what} {said[0]}, {stored.folder} {said[1]}; give a set of the same")
    return other


def require_labels(stored: Stored, labels: np.ndarray) -> None:
    """Raises DataError if most classes lack training images, as if the description were that of another data set."""
    require_classes(stored.folder, labels, stored.num_classes, f"correct its description, or {stored.remake}")


def _numbers(count):
    return tuple(str(i) for i in range(count))


def read_files(stored: Stored) -> list[Path]:
    """The paths that a data set depends on: its files, and the folders in which a newer version would appear."""
    return [stored.folder.parent, stored.folder, *sorted(stored.folder.iterdir())]


def read(stored: Stored, split: str, start: int = 0, stop: int | None = None) -> Split:
    """Images (N, H, W, C) uint8 and labels (N,) of the records `start` to `stop` of a split, in its order."""
    check_counts(stored, split)
    stop = stored.counts[split] if stop is None else stop
    assert stored.shape is not None
    images = np.empty((stop - start, *stored.shape), np.uint8)
    labels = np.empty(stop - start, np.int64)
    identities, (image, label) = [], stored.keys
    for i, record in enumerate(records(stored, split, range(start, stop))):
        try:
            if record[image].shape != stored.shape:
                raise ValueError(f"record {start + i} is {record[image].shape}")
            images[i], labels[i] = record[image], record[label]
        except Exception as error:  # a record whose features differ from the description
            raise damaged(stored, split, error) from None
        if "id" in record:
            identities.append(record["id"])
    if len(identities) == len(images) and start == 0:
        order = np.argsort(np.array(identities), kind="stable")
        images, labels = images[order], labels[order]
    return Split(images, labels)


def check_counts(stored: Stored, split: str) -> None:
    """Raises DataError unless each shard has as many records as the description says, as others would not be read."""
    if stored.builder.info.file_format.value != "array_record":  # TFRecord files are counted as they are read
        return
    from array_record.python.array_record_module import ArrayRecordReader

    def count(shard):
        reader = ArrayRecordReader(str(shard[0]))
        try:
            return reader.num_records()
        finally:
            reader.close()

    try:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            found = list(pool.map(count, stored.shards[split]))
    except Exception as error:
        raise damaged(stored, split, error) from None
    for (shard, promised), records in zip(stored.shards[split], found, strict=True):
        if records != promised:
            raise DataError(f"{shard} holds {records} records, its description says {promised}; {stored.remake}")


def records(stored: Stored, split: str, indices: range) -> Iterable[dict[str, Any]]:
    """The decoded records, `_BATCH` at a time in memory; raises DataError naming the shard that is damaged."""
    features = stored.builder.info.features
    if stored.builder.info.file_format.value == "tfrecord":
        found = [raw for shard, length in stored.shards[split] for raw in _shard(stored, shard, length)]
        yield from (_decoded(stored, features, split, found[i]) for i in indices)
        return
    source = _opened(stored, split)
    for first in range(indices.start, indices.stop, _BATCH):
        chosen = list(range(first, min(first + _BATCH, indices.stop)))
        try:
            batch = source.__getitems__(chosen)
        except Exception as error:  # the C++ reader's RuntimeError, or any error of decoding damaged bytes
            raise damaged(stored, split, error) from None
        yield from batch


def _opened(stored, split):
    try:
        return stored.builder.as_data_source(split=split)
    except NotImplementedError:
        kind = stored.builder.info.file_format.value
        raise DataError(f"{stored.folder} holds {kind} files; readable are array_record and tfrecord") from None
    except Exception as error:
        raise damaged(stored, split, error) from None


def _shard(stored, shard, length):
    try:
        found = tfrecord.read(shard)
    except OSError as error:
        raise DataError(f"{shard} cannot be read ({error.strerror}); {stored.remake}") from None
    except DataError as error:
        raise DataError(f"{error}; {stored.remake}") from None
    if len(found) != length:
        raise DataError(f"{shard} has {len(found)} records, not {length}: it is truncated; {stored.remake}")
    return found


def _decoded(stored, features, split, raw):
    try:
        return features.deserialize_example_np(raw)
    except Exception as error:
        raise damaged(stored, split, error) from None


def unread(stored, split, row, error):
    """The DataError that names a record of a split that could not be read or decoded, and its shard."""
    ends = np.cumsum([length for _, length in stored.shards[split]])
    number = int(np.searchsorted(ends, row, "right"))
    shard, length = stored.shards[split][number]
    at = row - int(ends[number]) + length
    return DataError(f"{shard} is missing, truncated or damaged at record {at} ({_reason(error)}); {stored.remake}")


def _reason(error):
    return " ".join(str(error).split())[:120] or type(error).__name__


def damaged(stored, split, error):
    """The DataError that names the first shard of the split that cannot be read completely."""
    from array_record.python.array_record_module import ArrayRecordReader

    reason = _reason(error)
    shards = stored.shards[split] if stored.builder.info.file_format.value == "array_record" else ()
    for shard, _ in shards:
        try:
            reader = ArrayRecordReader(str(shard))
            reader.read_all()
            reader.close()
        except Exception:
            return DataError(f"{shard} is missing, truncated or damaged ({reason}); {stored.remake}")
    return DataError(f"{stored.folder}: {split} cannot be read ({reason}); {stored.remake}")
