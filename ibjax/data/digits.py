"""The 1,797 handwritten digits (8×8, 17 grey levels) that scikit-learn ships: NIST-derived, from the UCI archive.

The split is fixed and stratified: 1,257 training, 180 validation and 360 test images. Grey level g of 0 to 16 becomes
round(255·g/16).
"""

import importlib.util
from pathlib import Path

import numpy as np

from ibjax.data import Arrays, Split, hold_out


def load() -> Arrays:
    """Loads the digits; needs neither a file nor network access."""
    levels, labels = _read()
    images = np.round(levels * (255 / 16)).astype(np.uint8)[..., None]
    rest, test = hold_out(Split(images, labels), 360, seed=0)
    train, val = hold_out(rest, 180, seed=1)
    assert test is not None
    return Arrays(train, test, 10, val, label="digits")


def _read() -> tuple[np.ndarray, np.ndarray]:
    """(grey levels (N, 8, 8), classes (N,)) as of scikit-learn's `load_digits`, whose import takes a second."""
    found = importlib.util.find_spec("sklearn")
    folders = (found and found.submodule_search_locations) or [""]
    file = Path(folders[0], "datasets", "data", "digits.csv.gz")
    if not file.is_file():  # another version may keep it elsewhere
        from sklearn.datasets import load_digits

        pixels, classes = load_digits(return_X_y=True)
        return pixels.reshape(-1, 8, 8), classes
    table = np.loadtxt(file, delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(int)
