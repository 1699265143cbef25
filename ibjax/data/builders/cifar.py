"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from the binary archives, without pickles.

A record has 1 label byte (CIFAR-100 has 2: coarse, then fine) and 3072 pixel bytes, channel after channel, row after
row. The labels of CIFAR-100 are its 100 fine classes.
"""

from pathlib import Path

import numpy as np

from ibjax.data.archives import Archive, read_members
from ibjax.data.builders import Contents, Recipe
from ibjax.errors import DataError

_PIXELS = 3 * 32 * 32
_TRAIN = [f"data_batch_{i}.bin" for i in range(1, 6)]


def _read(path, folder, names, train, test, label_bytes):
    members = [f"{folder}/{name}" for name in (names, *train, test)]
    text, *batches = read_members(path, members)
    classes = tuple(text.decode("ascii").split())
    parts = [_records(path, member, batch, label_bytes) for member, batch in zip(members[1:], batches, strict=True)]
    images, labels = (np.concatenate([part[i] for part in parts[:-1]]) for i in (0, 1))
    splits = {"train": zip(images, labels, strict=True), "test": zip(*parts[-1], strict=True)}
    return Contents((32, 32, 3), classes, splits)


def _records(path, member, content, label_bytes):
    """(images (N, 32, 32, 3), labels (N,)) of one member."""
    size = label_bytes + _PIXELS
    if not content or len(content) % size:
        raise DataError(f"{path}: '{member}' has {len(content)} bytes, no multiple of {size}; it is not official")
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    images = records[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, records[:, label_bytes - 1]


def _read_10(paths: list[Path]) -> Contents:
    return _read(paths[0], "cifar-10-batches-bin", "batches.meta.txt", _TRAIN, "test_batch.bin", 1)


def _read_100(paths: list[Path]) -> Contents:
    return _read(paths[0], "cifar-100-binary", "fine_label_names.txt", ["train.bin"], "test.bin", 2)


CIFAR10 = Recipe(
    "CIFAR-10",
    (
        Archive(
            "cifar-10-binary.tar.gz",
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            "sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
    ),
    _read_10,
)
CIFAR100 = Recipe(
    "CIFAR-100",
    (
        Archive(
            "cifar-100-binary.tar.gz",
            "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            "sha256:58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        ),
    ),
    _read_100,
)
