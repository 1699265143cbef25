"""SVHN, cropped digits (Netzer et al. 2011), from its two MATLAB files; the `extra` images are not used.

`X` is (32, 32, 3, N) uint8; `y` is (N, 1), with 10 for the digit 0.
"""

from pathlib import Path

import numpy as np
from scipy.io import loadmat

from ibjax.data.archives import Archive
from ibjax.data.builders import Contents, Recipe
from ibjax.errors import DataError

_URL = "http://ufldl.stanford.edu/housenumbers"


def _read_mat(path):
    try:
        mat = loadmat(path, variable_names=("X", "y"))
        images, labels = np.moveaxis(mat["X"], -1, 0), mat["y"].reshape(-1)
    except Exception as error:  # SciPy raises many types on damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} is no MATLAB file with X and y ({reason}); delete it and download it again") from None
    if len(images) != len(labels) or not np.isin(labels, np.arange(1, 11)).all():
        raise DataError(f"{path} has {len(images)} images, {len(labels)} labels, not all of them 1 to 10")
    return zip(images, labels % 10, strict=True)


def _read(paths: list[Path]) -> Contents:
    train, test = map(_read_mat, paths)
    return Contents((32, 32, 3), tuple(map(str, range(10))), {"train": train, "test": test})


SVHN = Recipe(
    "SVHN",
    (
        Archive(
            "train_32x32.mat",
            f"{_URL}/train_32x32.mat",
            "sha256:435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
        ),
        Archive(
            "test_32x32.mat",
            f"{_URL}/test_32x32.mat",
            "sha256:cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
        ),
    ),
    _read,
)
