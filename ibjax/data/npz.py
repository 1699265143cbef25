"""One `.npz` file in Keras's layout: x_train, y_train, x_test, y_test. Pickled objects in it are never loaded."""

import os

import numpy as np

from ibjax import files
from ibjax.data import Arrays, Split, require_classes, stamps
from ibjax.errors import DataError, InputError, UnreadableError
from ibjax.files import read_npz

KEYS = ("x_train", "y_train", "x_test", "y_test")


def load(*, path: str, label: str = "", num_classes: int | None = None) -> Arrays:
    """Reads `path`; without `num_classes`, the number of classes is the largest training label plus 1.

    Raises DataError if the file is absent or damaged, lacks an array, or has a single stray label that adds classes.
    """
    file = files.path(path)
    if not file.is_file():
        raise DataError(f"data.path={file} is no file; give an .npz with {', '.join(KEYS)}")
    read = stamps([file])
    archive = _archive(file)
    if missing := [key for key in KEYS if key not in archive]:
        raise DataError(f"{file} lacks {', '.join(missing)}; it holds {', '.join(archive) or 'nothing'}")
    x_train, y_train, x_test, y_test = (archive[key] for key in KEYS)
    if not np.issubdtype(y_train.dtype, np.integer) or y_train.size == 0:
        raise DataError(f"{file}: y_train has type {y_train.dtype} and {y_train.size} values; expected integer labels")
    classes = _count(file, y_train, y_test) if num_classes is None else num_classes
    names = tuple(str(c) for c in range(classes))
    splits = Split(x_train, y_train), Split(x_test, y_test)
    return Arrays(*splits, classes, label=label or file.stem, classes=names, read=read)


def images(path: str | os.PathLike) -> Split:
    """Images (N, H, W, C) and labels (N,) of a file with `x` and `y`, or else `x_test` and `y_test`.

    Grey images may lack the channel, (N, H, W), and labels may be a column, (N, 1), as Keras stores CIFAR's. Their
    values are not checked. Raises DataError if the file is absent or damaged, or lacks them, or a label for each image.
    """
    file = files.path(path)
    if not file.is_file():
        raise DataError(f"{file} is no file; give an .npz with x and y")
    archive = _archive(file)
    for x, y in (("x", "y"), KEYS[2:]):
        if x in archive and y in archive:
            pixels, labels = archive[x], archive[y]
            if labels.shape not in (pixels.shape[:1], (*pixels.shape[:1], 1)):
                raise DataError(
                    f"{file}: {y} has shape {labels.shape}, {x} {pixels.shape}; give one integer for each image"
                )
            return Split(pixels[..., None] if pixels.ndim == 3 else pixels, labels.reshape(-1))
    raise DataError(f"{file} lacks x and y (or x_test and y_test); it holds {', '.join(archive) or 'nothing'}")


def _archive(file):
    try:
        return read_npz(file)
    except UnreadableError:
        raise
    except InputError as error:
        raise DataError(str(error)) from None


def _count(path, y_train, y_test):
    """The largest training label plus 1; raises DataError if that label looks like a mistake."""
    found, counts = np.unique(y_train, return_counts=True)
    largest = int(found[-1])
    if counts[-1] == 1 and np.median(counts) > 1 and not np.any(y_test == largest):
        raise DataError(
            f"{path}: label {largest} occurs once in y_train and never in y_test, and would make {largest + 1} "
            f"classes; correct it, or where it is a class, give data.num_classes={largest + 1}"
        )
    remedy = f"correct the labels, or give data.num_classes={largest + 1} if there are so many"
    require_classes(path, y_train, largest + 1, remedy)
    return largest + 1
