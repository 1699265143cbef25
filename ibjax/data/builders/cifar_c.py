"""CIFAR-10-C and CIFAR-100-C (Hendrycks & Dietterich, ICLR 2019) from their tars of .npy files.

There is one split per corruption; it holds the test set five times, at severities 1 to 5.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ibjax.data.archives import Archive, read_npy, read_tar
from ibjax.data.builders import Contents, Recipe
from ibjax.errors import DataError

SEVERITIES = 5


def _read(path: Path, num_classes: int) -> Contents:
    labels, names = None, []
    for member, content in read_tar(path, lambda name: name.endswith(".npy")):
        if Path(member).name == "labels.npy":
            labels = read_npy(content, f"{path}: '{member}'").reshape(-1)
        else:
            names.append(member)
    if labels is None or not names:
        raise DataError(f"{path} has no labels.npy, or no other .npy; it is not the official archive")
    if len(labels) % SEVERITIES or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{path}: labels.npy has {len(labels)} values of {labels.dtype}; expected integers, 5 × N")
    splits = {Path(name).stem: _images(path, name, labels) for name in sorted(names)}
    return Contents((32, 32, 3), tuple(map(str, range(num_classes))), splits)


def _images(path: Path, member: str, labels: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """The images and labels of one corruption; only one member, 154 MB, is in memory at a time."""
    content = dict(read_tar(path, lambda name: name == member))[member]
    images = read_npy(content, f"{path}: '{member}'")
    if len(images) != len(labels):
        raise DataError(f"{path}: '{member}' has {len(images)} images for {len(labels)} labels")
    yield from zip(images, labels, strict=True)


def _read_10(paths: list[Path]) -> Contents:
    return _read(paths[0], 10)


def _read_100(paths: list[Path]) -> Contents:
    return _read(paths[0], 100)


CIFAR10_C = Recipe(
    "CIFAR-10-C",
    (
        Archive(
            "CIFAR-10-C.tar",
            "https://zenodo.org/records/2535967/files/CIFAR-10-C.tar",
            "sha256:c72763e101c723b7c507b96205f7e938912a5d587376173b825850cf3cb876a7",
        ),
    ),
    _read_10,
)
CIFAR100_C = Recipe(
    "CIFAR-100-C",
    (
        Archive(
            "CIFAR-100-C.tar",
            "https://zenodo.org/records/3555552/files/CIFAR-100-C.tar",
            "md5:11f0ed0f1191edbf9fa23466ae6021d3",
        ),
    ),
    _read_100,
)
