"""Random images with a faint class signal, of any shape: what `:smoke` configurations train on."""

import numpy as np

from ibjax.data import Arrays, Split


def load(
    *, shape: tuple[int, int, int], num_classes: int, n_train: int = 64, n_test: int = 16, seed: int = 0
) -> Arrays:
    """Noise plus a fixed random pattern for each class; the same arguments give the same images."""
    rng = np.random.default_rng(seed)
    patterns = rng.normal(size=(num_classes, *shape))

    def split(n):
        labels = np.arange(n) % num_classes
        images = 128 + 40 * patterns[labels] + 20 * rng.normal(size=(n, *shape))
        return Split(np.clip(images, 0, 255).astype(np.uint8), labels)

    return Arrays(split(n_train), split(n_test), num_classes, label="synthetic")
