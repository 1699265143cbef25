"""Data sets as uint8 arrays: every source is a module with `load(**options) -> Arrays`.

    digits      the 1,797 handwritten digits that scikit-learn ships, with a fixed split
    npz         one file in Keras's layout: x_train, y_train, x_test, y_test
    folder      class folders: train/<class>/*.jpg, test/<class>/*
    tfds        a data set of TensorFlow Datasets by name, without TensorFlow; `ibjax.data.prepare` makes the usual ones
    stream      a data set too large for memory, such as ImageNet, read from TFDS's files during training
    synthetic   random images of a given shape, for smoke tests

`ibjax.data.extra` adds generated images to the training images of any source that fits in memory.

`load_splits` is the entry point: it loads a source, checks it, holds out the validation split, and selects a fraction
of the remaining training images.
"""

import logging
import os
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ibjax import files, lazy
from ibjax.errors import CodeError, DataError, InputError, check_count

if typing.TYPE_CHECKING:
    from ibjax.data import (
        augment,
        corruptions,
        digits,
        extra,
        folder,
        mixing,
        npz,
        operations,
        permutation,
        policies,
        prepare,
        stream,
        synthetic,
        tfds,
    )

__all__ = [
    "Arrays",
    "Split",
    "augment",
    "corruptions",
    "digits",
    "extra",
    "folder",
    "load_splits",
    "mixing",
    "npz",
    "operations",
    "permutation",
    "policies",
    "prepare",
    "stream",
    "synthetic",
    "tfds",
]
__getattr__, __dir__ = lazy.attach(__name__, __all__)

log = logging.getLogger(__name__)

# data.dataset, or data.name -> (shape of an image, number of classes); for ImageNet, the recipe sets the size
IMAGES: dict[str, tuple[tuple[int, int, int] | None, int]] = {
    "digits": ((8, 8, 1), 10),
    "mnist": ((28, 28, 1), 10),
    "fashion_mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "svhn_cropped": ((32, 32, 3), 10),
    "stl10": ((96, 96, 3), 10),
    "tiny_imagenet": ((64, 64, 3), 200),
    "imagenet2012": (None, 1000),
}


class Split(NamedTuple):
    """images (N, H, W, C) uint8, or float32 in [0, 1]; labels (N,) int32.

    The images of `stream` are not an array, but can be indexed like one.
    """

    images: Any
    labels: np.ndarray


class Stamp(NamedTuple):
    """The state of a file or folder at one moment; it changes when the file is rewritten."""

    path: str
    state: tuple[int, ...] | None  # size, mtime and ctime in ns, inode; None if the file does not exist


def stamps(paths: Iterable[Path | str]) -> tuple[Stamp, ...]:
    """The stamps of files and folders. A source takes them before it reads the files, so that no change is missed."""

    def state(path):
        try:
            found = os.stat(path)
        except OSError:
            return None
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino

    return tuple(Stamp(os.path.abspath(path), state(path)) for path in paths)


class Arrays(NamedTuple):
    """What a source returns. `val` is None if the source has no validation split of its own."""

    train: Split
    test: Split
    num_classes: int
    val: Split | None = None
    label: str = ""  # name of the data in results, such as "CIFAR-10 (JPEG)"
    classes: tuple[str, ...] = ()  # names of the classes, in the order of labels; empty if they have none
    warnings: tuple[str, ...] = ()  # doubts about the data; every record of a run on it repeats them
    read: tuple[Stamp, ...] = ()  # stamps of the files and folders it was read from, taken before reading
    extra: Any = None  # generated images, an `ibjax.data.extra.Extra`, of which every batch has a fixed share


def own_data(source: Any, made: Any, options: Any) -> Arrays:
    """The data that a `load` of the user's own has made; CodeError unless they are `Arrays`."""
    whole = isinstance(made, Arrays) and isinstance(made.train, Split) and isinstance(made.test, Split)
    if not whole or not isinstance(made.val, Split | None):
        raise CodeError(
            f"{source} is a {type(made).__name__}; return ibjax.data.Arrays(Split(…), Split(…), num_classes)"
        )
    return made._replace(label=made.label or source.name)


def unchanged(arrays: Arrays) -> bool:
    """Whether the files from which `arrays` was read are unchanged since."""
    return stamps(stamp.path for stamp in arrays.read) == arrays.read


def load_splits(
    source: Any,
    *,
    val_size: int,
    split_seed: int = 0,
    fraction: float = 1.0,
    extra: Mapping[str, Any] | None = None,
    **options: Any,
) -> Arrays:
    """Loads `source(**options)`, checks every split, and holds out `val_size` training images, chosen by `split_seed`.

    The validation split is stratified by class. With `val_size=0` there is no validation split, and selection on the
    test set must be requested explicitly. Of the remaining training images a stratified `fraction` is kept, in the
    original order; a smaller fraction is a subset of a larger one, and the validation split is the same for all. A
    batch's `index` refers to this training split. `extra` are options of `ibjax.data.extra.load`. Raises DataError,
    which names the file, the fault and the remedy; mere doubts are logged and kept in `warnings`.
    """
    arrays = _split(source(**options), val_size, split_seed, fraction)
    if extra is not None:
        arrays = _with_extra(arrays, extra)
    arrays = arrays._replace(warnings=(*arrays.warnings, *_classes_without_images(arrays)))
    for warning in arrays.warnings:
        log.warning("%s: %s", arrays.label, warning)
    return arrays


def _with_extra(arrays, options):
    from ibjax.data import extra

    if streamed(arrays.train) or arrays.train.images.dtype != np.uint8:
        raise DataError("data.extra goes with training images that are uint8 and in memory; set data.extra=None")
    read = stamps([files.path(options["path"])])
    found = extra.load(**options, shape=arrays.train.images.shape[1:], num_classes=arrays.num_classes)
    return arrays._replace(extra=found, read=(*arrays.read, *read))


def _split(arrays, val_size, split_seed, fraction):
    """The checked splits, with the validation images removed from the training split."""
    arrays = arrays._replace(
        train=check(arrays.train, "train", arrays.num_classes),
        test=check(arrays.test, "test", arrays.num_classes),
    )
    if arrays.train.images.shape[1:] != arrays.test.images.shape[1:]:
        raise DataError(
            f"train images are {arrays.train.images.shape[1:]}, test images {arrays.test.images.shape[1:]}; "
            f"they must have one size"
        )
    if arrays.num_classes < 2:
        raise DataError(f"the data has {arrays.num_classes} class(es); a classifier needs at least 2")
    if arrays.val is not None:
        if val_size:
            raise DataError(f"data.val_size={val_size}: this source has a validation split of its own; set 0")
        val = check(arrays.val, "val", arrays.num_classes)
        if val.images.shape[1:] != arrays.train.images.shape[1:]:
            raise DataError(
                f"train images are {arrays.train.images.shape[1:]}, val images {val.images.shape[1:]}; they must have "
                f"one size"
            )
        return arrays._replace(train=part(arrays.train, fraction, split_seed), val=val)
    train, val = hold_out(arrays.train, val_size, split_seed)
    return arrays._replace(train=part(train, fraction, split_seed), val=val)


def require_classes(where: Path | str, labels: np.ndarray, num_classes: int, remedy: str) -> None:
    """Raises DataError if over half of the classes lack training images, so that `num_classes` is probably wrong."""
    missing = num_classes - len(np.unique(labels))
    if 2 * missing > num_classes:
        raise DataError(f"{where}: {missing} of {num_classes} classes have no training image; {remedy}")


def _classes_without_images(arrays):
    """Yields a warning for each split in which some classes have no image."""
    for name, split in (("training", arrays.train), ("test", arrays.test)) if arrays.classes else ():
        missing = np.flatnonzero(np.bincount(split.labels, minlength=arrays.num_classes) == 0)
        if missing.size:
            names = listed([_class_name(c, arrays.classes[c]) for c in missing])
            one_based = missing.tolist() == [0] and arrays.classes[0] == "0"
            hint = "; if labels count from 1, subtract 1" if one_based else ""
            yield f"{len(missing)} of {arrays.num_classes} classes have no {name} image: {names}{hint}"


def _class_name(label, name):
    return name if name == str(label) else f"{label} ({name})"


def listed(names: Sequence[str], most: int = 10) -> str:
    """A list of names that fits on one line, such as "a, b, c and 190 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def part(split: Split, fraction: float, seed: int) -> Split:
    """A stratified fraction of a split, in the original order; 1.0 gives the split itself."""
    if fraction == 1.0:
        return split
    return subset(split, stratified(split.labels, max(1, round(fraction * len(split.labels))), seed))


def sample(split: Split, n: int | None, option: str = "n", holds: str = "the test set has") -> Split:
    """`n` images of a split, each class in proportion, always the same; None, or the number of all: the split itself.

    Raises InputError where there are fewer; `option` and `holds` word its message.
    """
    if n is None or n == len(split.labels):
        return split
    check_count(option, n)
    if n > len(split.labels):
        raise InputError(f"{option}={n} is not allowed; {holds} {len(split.labels)} images")
    return subset(split, stratified(split.labels, n, seed=0))


def streamed(split: Split) -> bool:
    """Whether a split's images are read on demand (`ibjax.data.stream`)."""
    return hasattr(split.images, "subset")


def subset(split: Split, kept: np.ndarray) -> Split:
    """A subset of a split's images; a streamed split reads nothing for this."""
    images = split.images.subset(kept) if streamed(split) else split.images[kept]
    return Split(images, split.labels[kept])


def check(split: Split, name: str, num_classes: int) -> Split:
    """The split as (N, H, W, C) uint8 or float32 in [0, 1] and int32 labels; (N, H, W) gets a channel axis.

    Raises DataError on any other content.
    """
    if streamed(split):  # its images come from a decoder and are valid
        return split
    images, labels = np.asarray(split.images), np.asarray(split.labels)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[0] == 0:
        raise DataError(f"{name} images have shape {images.shape}; expected (N, H, W, C) or (N, H, W), N > 0")
    if images.shape[-1] not in (1, 3):
        hint = "; they look like NCHW: transpose them to NHWC" if images.shape[1] in (1, 3) else ""
        raise DataError(f"{name} images have shape {images.shape}; the last axis must be 1 or 3 channels{hint}")
    if images.dtype != np.uint8:
        images = _as_float_images(images, name)
    elif images.max() <= 1:
        raise DataError(f"{name} images are uint8 with maximum {images.max()}: nearly black; store 0 to 255")
    labels = np.atleast_1d(labels)
    labels = labels.reshape(len(labels), -1) if labels.size else labels
    if labels.shape != (len(images), 1) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{name} labels have shape {split.labels.shape} and type {split.labels.dtype}; "
            f"expected one integer for each of {len(images)} images"
        )
    labels = labels[:, 0]
    check_labels(labels, name, num_classes)
    return Split(np.ascontiguousarray(images), labels.astype(np.int32))


def check_labels(labels: np.ndarray, name: str, num_classes: int) -> None:
    """Raises DataError unless all labels (N,) of a split are those of a class."""
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(
            f"{name} labels lie in [{labels.min()}, {labels.max()}]; with {num_classes} classes they must lie "
            f"in [0, {num_classes - 1}]"
        )


_NEARLY_BLACK = 2 / 255  # float images below this were probably divided by 255 twice


def _as_float_images(images, name):
    if not np.issubdtype(images.dtype, np.floating):
        raise DataError(f"{name} images have type {images.dtype}; expected uint8, or float in [0, 1]")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0.0 and high <= 1.0):  # NaN fails too
        raise DataError(
            f"{name} images are {images.dtype} in [{low:g}, {high:g}], shape {images.shape}; float images must lie "
            f"in [0, 1]: divide by 255, or store uint8; the model normalises"
        )
    if high < _NEARLY_BLACK:
        raise DataError(
            f"{name} images are {images.dtype} and reach only {high:g}: nearly black, as if divided by 255 twice; "
            f"divide once, or store uint8"
        )
    return images.astype(np.float32)


def hold_out(split: Split, size: int, seed: int) -> tuple[Split, Split | None]:
    """Holds out `size` images, stratified by class: (the rest, the held-out split). Both keep the original order."""
    if size == 0:
        return split, None
    if not 0 < size < len(split.labels):
        raise DataError(f"data.val_size={size} of {len(split.labels)} training images; allowed: 0 to all but one")
    held = stratified(split.labels, size, seed)
    rest = np.setdiff1d(np.arange(len(split.labels)), held)
    return subset(split, rest), subset(split, held)


def first_of_each(labels: np.ndarray, size: int) -> np.ndarray:
    """Sorted indices of `size` examples that cover the classes evenly: the first example of each, then the second, ….

    If there are more classes than `size`, the classes whose first example comes earliest are covered.
    """
    rank = np.empty(len(labels), int)  # position of each example within its class
    for c in np.unique(labels):
        rank[labels == c] = np.arange(np.sum(labels == c))
    return np.sort(np.argsort(rank, kind="stable")[:size])


def stratified(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Sorted indices of `size` examples, stratified: each class has its share to within one example."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    rank = np.empty(len(labels))  # position of each example within its class, as a fraction
    for c in np.unique(labels):
        members = order[labels[order] == c]
        rank[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.sort(np.argsort(rank, kind="stable")[:size])
