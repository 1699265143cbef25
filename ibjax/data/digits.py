"""The 1,797 handwritten digits (8×8, 17 grey levels) that scikit-learn ships: NIST-derived, from the UCI archive.

The split is fixed: 1,257 training, 180 validation, 360 test images, each class in proportion. Grey level g of 16
becomes round(255·g/16).
"""

from typing import Any

import numpy as np

from ibjax.data import Arrays, Split, hold_out


def load() -> Arrays:
    """Needs no file and no network."""
    from sklearn.datasets import load_digits

    raw: Any = load_digits()
    images = np.round(raw.images * (255 / 16)).astype(np.uint8)[..., None]
    rest, test = hold_out(Split(images, raw.target), 360, seed=0)
    train, val = hold_out(rest, 180, seed=1)
    assert test is not None
    return Arrays(train, test, 10, val, label="digits")
