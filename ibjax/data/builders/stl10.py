"""STL-10 (Coates et al., AISTATS 2011) from its binary archive: 10 classes, 96×96, 5,000 training, 8,000 test images.

`*_X.bin` holds uint8 images, channel after channel, each column by column; `*_y.bin` holds a byte per label, 1 to 10.
The 100,000 unlabelled images and the ten folds of the training set are not used.
"""

from pathlib import Path

import numpy as np

from ibjax.data.archives import Archive, read_members
from ibjax.data.builders import Contents, Recipe
from ibjax.errors import DataError

_SIDE = 96


def _read(paths: list[Path]) -> Contents:
    path = paths[0]
    names = ["class_names.txt", "train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin"]
    text, x_train, y_train, x_test, y_test = read_members(path, [f"stl10_binary/{name}" for name in names])
    classes = tuple(text.decode("ascii", "replace").split())
    splits = {"train": (x_train, y_train), "test": (x_test, y_test)}
    pairs = {split: _pairs(path, pixels, labels, len(classes)) for split, (pixels, labels) in splits.items()}
    return Contents((_SIDE, _SIDE, 3), classes, pairs)


def _pairs(path, pixels, labels, num_classes):
    """(image, label) pairs; raises DataError if the two files do not belong together."""
    y = np.frombuffer(labels, np.uint8)
    if not len(y) or len(pixels) != len(y) * 3 * _SIDE * _SIDE or not (y.min() >= 1 and y.max() <= num_classes):
        raise DataError(
            f"{path}: {len(pixels)} bytes of pixels and {len(y)} labels are not 3×{_SIDE}×{_SIDE} images of classes "
            f"1 to {num_classes}; it is not official"
        )
    x = np.frombuffer(pixels, np.uint8).reshape(-1, 3, _SIDE, _SIDE).transpose(0, 3, 2, 1)
    return zip(x, y - 1, strict=True)


STL10 = Recipe(
    "STL-10",
    (
        Archive(
            "stl10_binary.tar.gz",
            "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
            "sha256:f31fd99273a1acb8609c8db427cebb1de3f71de77758cdc0e22956e1289b9866",
        ),
    ),
    _read,
)
