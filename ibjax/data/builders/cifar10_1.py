"""CIFAR-10.1 (Recht et al., ICML 2019), a second test set for CIFAR-10's classes, from two .npy files.

Version v6 has 2,000 class-balanced images and is the one that its authors recommend; v4 has 2,021 images and is used in
the paper's main tables. The only split is `test`.
"""

from pathlib import Path

import numpy as np

from ibjax.data.archives import Archive, read_npy
from ibjax.data.builders import Contents, Recipe
from ibjax.errors import DataError

# the names in CIFAR-10's batches.meta.txt
_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_URL = "https://raw.githubusercontent.com/modestyachts/CIFAR-10.1/master/datasets"


def _read(paths: list[Path]) -> Contents:
    x, y = (read_npy(path.read_bytes(), str(path)) for path in paths)
    if x.shape != (len(y), 32, 32, 3) or x.dtype != np.uint8 or y.shape != (len(x),) or y.dtype.kind not in "iu":
        raise DataError(
            f"{paths[0]} holds {x.dtype}{list(x.shape)}, {paths[1]} {y.dtype}{list(y.shape)}; they are no images of "
            f"32×32×3 with labels: delete them and download them again"
        )
    return Contents((32, 32, 3), _CLASSES, {"test": zip(x, y, strict=True)})


def _recipe(version, label, digests):
    names = [f"cifar10.1_{version}_{part}.npy" for part in ("data", "labels")]
    pairs = zip(names, digests, strict=True)
    return Recipe(label, tuple(Archive(name, f"{_URL}/{name}", f"sha256:{digest}") for name, digest in pairs), _read)


CIFAR10_1 = _recipe(
    "v6",
    "CIFAR-10.1",
    (
        "2997188e5816f5bd545dc77771b6227828c28146049fcecf3fa10775474cacc6",
        "ae40beda001693674edc94d925ee8268cfe68905f8f9aff800c8dcdfcd6c9448",
    ),
)
CIFAR10_1_V4 = _recipe(
    "v4",
    "CIFAR-10.1 v4",
    (
        "5aaedc268df8f4cffca2ac0cf9e608ae1897a8cddb630c7a850a2ea8f6558e75",
        "1f9544300ded199539b6662364ce7fe6c2e1ea9f87408f06db4b1a6184cffb18",
    ),
)
