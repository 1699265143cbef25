"""The 1,797 handwritten digits (8×8, 17 grey levels) that scikit-learn ships: NIST-derived, from the UCI archive.

The split is fixed and stratified: 1,257 training, 180 validation and 360 test images. Grey level g of 0 to 16 becomes
round(255·g/16).
"""

from typing import Any

import numpy as np

from ibjax.data import Arrays, Split, hold_out


def load() -> Arrays:
    """Loads the digits; needs neither a file nor network access."""
    from sklearn.datasets import load_digits

    raw: Any = load_digits()
    images = np.round(raw.images * (255 / 16)).astype(np.uint8)[..., None]
    rest, test = hold_out(Split(images, raw.target), 360, seed=0)
    train, val = hold_out(rest, 180, seed=1)
    assert test is not None
    return Arrays(train, test, 10, val, label="digits")
