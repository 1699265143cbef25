"""MNIST (LeCun et al. 1998) and Fashion-MNIST (Xiao et al. 2017) from their four IDX files, gzipped or not.

IDX: two zero bytes, the type (8: uint8), the number of axes, each axis as a big-endian uint32, the values.
"""

import struct
from pathlib import Path

import numpy as np

from ibjax.data.archives import Archive, opened
from ibjax.data.builders import Contents, Recipe
from ibjax.errors import DataError

_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def read_idx(path: Path, axes: int) -> np.ndarray:
    """The uint8 array of an IDX file with `axes` axes; raises DataError on any other file."""
    with opened(path, content=True) as handle:
        content = handle.read()
    head = 4 + 4 * axes
    if len(content) < head or content[:4] != bytes((0, 0, 8, axes)):
        raise DataError(f"{path} is no IDX file of uint8 with {axes} axes; delete it and download it again")
    shape = struct.unpack(f">{axes}I", content[4:head])
    if len(content) - head != np.prod(shape, dtype=np.int64):
        raise DataError(f"{path} has {len(content) - head} values for shape {shape}; delete it and download it again")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def _contents(paths, classes):
    x_train, y_train, x_test, y_test = (read_idx(path, axes) for path, axes in zip(paths, (3, 1, 3, 1), strict=True))
    splits = {}
    for split, x, y, path in (("train", x_train, y_train, paths[1]), ("test", x_test, y_test, paths[3])):
        if len(x) != len(y):
            raise DataError(f"{path} has {len(y)} labels for {len(x)} images; the files do not belong together")
        splits[split] = zip(x[..., None], y, strict=True)
    return Contents((*x_train.shape[1:], 1), classes, splits)


def _archives(url, digests):
    pairs = zip(_FILES, digests, strict=True)
    return tuple(Archive(f"{name}.gz", f"{url}/{name}.gz", f"md5:{digest}", content=True) for name, digest in pairs)


def _read_digits(paths: list[Path]) -> Contents:
    return _contents(paths, tuple(map(str, range(10))))


def _read_clothes(paths: list[Path]) -> Contents:
    return _contents(paths, _CLOTHES)


# the digests are those of the uncompressed files
MNIST = Recipe(
    "MNIST",
    _archives(
        "https://storage.googleapis.com/cvdf-datasets/mnist",
        (
            "6bbc9ace898e44ae57da46a324031adb",
            "a25bea736e30d166cdddb491f175f624",
            "2646ac647ad5339dbf082846283269ea",
            "27ae3e4e09519cfbb04c329615203637",
        ),
    ),
    _read_digits,
)
FASHION_MNIST = Recipe(
    "Fashion-MNIST",
    _archives(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        (
            "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            "9018921c3c673c538a1fc5bad174d6f9",
            "8181f5470baa50b63fa0f6fddb340f0a",
            "15d484375f8d13e6eb1aabb0c3f46965",
        ),
    ),
    _read_clothes,
)
