"""Common corruptions of 32×32 images at five severities, for use without the files of CIFAR-10-C.

Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019; the
constants are those of the paper's code for CIFAR. This module has eleven of the twelve corruptions that SiRIIB reports;
frost needs the authors' photographs: take it from CIFAR-10-C.

Differences from the authors' code:
- Random draws are seeded for each image, theirs were not. So only the four corruptions without randomness (defocus,
  zoom, pixelate, JPEG) can match the published files image by image, JPEG up to the version of the library.
- Motion blur follows ImageMagick's formula in floating point.
- The affine part of the elastic transform is sampled exactly; older versions of OpenCV use steps of 1/32 pixel.

As in the authors' code, results are rounded down, and glass blur copies pixels, since their swap of two pixels
overwrites one of them.

Guarantees (tests of the same names): an image's corruption depends on index, name, severity and seed alone.
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from ibjax.errors import InputError, nearest

SIZE = 32
SEVERITIES = (1, 2, 3, 4, 5)
# the twelve of SiRIIB's Table 9, by their names in CIFAR-10-C
TWELVE = (
    "shot_noise", "gaussian_noise", "impulse_noise", "motion_blur", "glass_blur", "defocus_blur", "zoom_blur",
    "jpeg_compression", "elastic_transform", "pixelate", "fog", "frost",
)  # fmt: skip
_CHUNK = 1000  # images at a time

Rngs = list[np.random.Generator]  # one for each image


def corrupt(
    images: np.ndarray, name: str, severity: int, seed: int = 0, indices: np.ndarray | None = None
) -> np.ndarray:
    """Corrupts images (N, 32, 32, 3) uint8. `indices` (N,) are those of the images in their data set; None: 0, 1, ….

    Raises InputError on an unknown name or severity, on other images, and on frost.
    """
    if name == "frost":
        raise InputError("frost needs the authors' photographs; make cifar10_c with python -m ibjax.data.prepare")
    if name not in CORRUPTIONS:
        raise InputError(f"corruption '{name}' is unknown; {nearest(name, CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise InputError(f"severity={severity} is not allowed; give 1, 2, 3, 4 or 5")
    if images.dtype != np.uint8 or images.shape[1:] != (SIZE, SIZE, 3):
        raise InputError(f"corruptions take uint8 images (N, 32, 32, 3); got {images.dtype} {images.shape}")
    function, constants = CORRUPTIONS[name]
    identity = seed, TWELVE.index(name), severity
    indices = np.arange(len(images)) if indices is None else indices
    parts = [np.empty((0, SIZE, SIZE, 3), np.uint8)]
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK]
        rngs = [np.random.default_rng((*identity, int(i))) for i in indices[start : start + _CHUNK]]
        parts.append(function(chunk, constants[severity - 1], rngs))
    return np.concatenate(parts)


def _each(rngs: Rngs, draw: Callable[[np.random.Generator], Any]) -> np.ndarray:
    return np.stack([draw(rng) for rng in rngs])


def _bytes(x):
    """Converts [0, 1] to uint8, rounding down as the authors do."""
    return np.uint8(np.clip(x, 0, 1) * 255)


# ---- noise -------------------------------------------------------------------------------------------------


def _gaussian_noise(images, sigma, rngs):
    """x + σ·n,  n ~ N(0, 1)"""
    return _bytes(images / 255 + sigma * _each(rngs, lambda rng: rng.normal(size=images.shape[1:])))


def _shot_noise(images, photons, rngs):
    """Poisson(c·x) / c"""
    pairs = zip(rngs, images / 255, strict=True)
    return _bytes(np.stack([rng.poisson(x * photons) for rng, x in pairs]) / photons)


def _impulse_noise(images, amount, rngs):
    """Replaces each value, with probability `amount`, by 0 or 1 with equal probability."""
    hit, white = (_each(rngs, lambda rng: rng.random(images.shape[1:])) for _ in range(2))
    return np.where(hit < amount, np.where(white < 0.5, 255, 0), images).astype(np.uint8)


# ---- blur --------------------------------------------------------------------------------------------------


def _smooth(x, sigma):
    return ndimage.gaussian_filter(x, (0, sigma, sigma, 0), mode="nearest", truncate=4.0)


def _glass_blur(images, constants, rngs):
    """Smooths, replaces each pixel by a neighbour at most `reach` away, and smooths again."""
    sigma, reach, rounds = constants
    x = _bytes(_smooth(images / 255, sigma))
    shift = _each(rngs, lambda rng: rng.integers(-reach, reach, (rounds, SIZE + 1, SIZE + 1, 2)))
    everyone = np.arange(len(x))
    for i in range(rounds):
        for h in range(SIZE - reach, reach, -1):
            for w in range(SIZE - reach, reach, -1):
                dx, dy = shift[:, i, h, w].T
                x[:, h, w] = x[everyone, h + dy, w + dx]
    return _bytes(_smooth(x / 255, sigma))


def _defocus_blur(images, constants, rngs):
    """Correlation with a disk that is itself smoothed by a 3×3 Gaussian."""
    radius, alias = constants
    reach = int(radius) + 1
    line = np.arange(-reach, reach + 1)
    disk = (line[:, None] ** 2 + line**2 <= radius**2).astype(float)
    taps = np.exp(-(np.arange(-1, 2) ** 2) / (2 * alias**2))
    taps /= taps.sum()
    kernel = ndimage.correlate(disk / disk.sum(), np.outer(taps, taps), mode="constant")
    return _bytes(ndimage.correlate(images / 255, kernel[None, :, :, None], mode="mirror"))


def _motion_blur(images, constants, rngs):
    """Half a Gaussian along a line: Σ_i k_i x(p + o_i), k_i ∝ exp(-i²/2σ²), o_i = round(i·(cos, sin)), 0 <= i <= 2r."""
    radius, sigma = constants
    i = np.arange(2 * radius + 1)
    weights = np.exp(-(i**2) / (2 * sigma**2))
    angle = np.deg2rad(_each(rngs, lambda rng: rng.uniform(-45, 45)))[:, None]
    dx, dy = (np.ceil(i * part - 0.5).astype(int) for part in (np.cos(angle), np.sin(angle)))  # (N, taps)
    everyone, line = np.arange(len(images))[:, None, None], np.arange(SIZE)
    total = np.zeros(images.shape)
    for tap, weight in enumerate(weights / weights.sum()):
        rows = np.clip(line + dy[:, tap, None], 0, SIZE - 1)[:, :, None]
        columns = np.clip(line + dx[:, tap, None], 0, SIZE - 1)[:, None, :]
        total += weight * images[everyone, rows, columns]
    return np.uint8(np.round(total))


def _zoom_blur(images, limit, rngs):
    """The mean of the image and its enlargements by 1, 1.01, …, below `limit`."""
    x = np.float32(images / 255)
    factors = np.arange(1, limit, 0.01)
    return _bytes((x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1))


def _zoomed(x, factor):
    """The centre of the image, enlarged bilinearly with aligned corners and cropped; in float64, as SciPy's `zoom`."""
    size = int(np.ceil(SIZE / factor))
    large = round(size * factor)
    top, trim = (SIZE - size) // 2, (large - SIZE) // 2
    at = top + (trim + np.arange(SIZE)) * ((size - 1) / (large - 1))
    low = np.minimum(at.astype(int), top + size - 2)
    weights = np.zeros((SIZE, SIZE))
    weights[np.arange(SIZE), low] = 1 - (at - low)
    weights[np.arange(SIZE), low + 1] = at - low
    rows = np.tensordot(x.astype(float), weights, (1, 1))  # (N, W, C, H')
    return np.tensordot(rows, weights, (1, 1)).transpose(0, 2, 3, 1).astype(np.float32)  # (N, C, H', W') before


# ---- weather, digital --------------------------------------------------------------------------------------


def _fog(images, constants, rngs):
    """(x + a·fractal) · max x / (max x + a)"""
    amount, decay = constants
    x = images / 255
    brightest = x.max((1, 2, 3), keepdims=True)
    return _bytes((x + amount * plasma_fractal(rngs, decay)[..., None]) * brightest / (brightest + amount))


def plasma_fractal(rngs: Rngs, decay: float, size: int = SIZE) -> np.ndarray:
    """(N, size, size) in [0, 1]: diamond-square height maps on a torus; `size` is a power of two."""
    height, step, wobble = np.zeros((len(rngs), size, size)), size, 100.0

    def noisy(total):
        return total / 4 + wobble * _each(rngs, lambda rng: rng.uniform(-wobble, wobble, total.shape[1:]))

    while step >= 2:
        half = step // 2
        corner = height[:, ::step, ::step]
        square = corner + np.roll(corner, -1, 1)
        centre = height[:, half::step, half::step] = noisy(square + np.roll(square, -1, 2))
        across = centre + np.roll(centre, 1, 1) + corner + np.roll(corner, -1, 2)
        down = centre + np.roll(centre, 1, 2) + corner + np.roll(corner, -1, 1)
        height[:, ::step, half::step] = noisy(across)
        height[:, half::step, ::step] = noisy(down)
        step, wobble = half, wobble / decay
    height -= height.min((1, 2), keepdims=True)
    return height / height.max((1, 2), keepdims=True)


def _jpeg_compression(images, quality, rngs):
    return np.stack([_through_jpeg(image, quality) for image in images])


def _through_jpeg(image, quality):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def _pixelate(images, factor, rngs):
    small = (int(SIZE * factor), int(SIZE * factor))

    def one(image):
        shrunk = Image.fromarray(image).resize(small, Image.Resampling.BOX)
        return np.asarray(shrunk.resize((SIZE, SIZE), Image.Resampling.BOX))

    return np.stack([one(image) for image in images])


def _elastic_transform(images, constants, rngs):
    """An affine map that moves three points by at most `reach`, then displacements α·(smoothed uniform noise)."""
    alpha, sigma, reach = (SIZE * c for c in constants)
    pairs = zip(images / 255, rngs, strict=True)
    return _bytes(np.stack([_elastic(x, alpha, sigma, reach, rng) for x, rng in pairs]))


def _elastic(x, alpha, sigma, reach, rng):
    points = np.array([[26.0, 26.0], [26.0, 6.0], [6.0, 6.0]])  # (x, y): the centre ± a third of the size
    moved = points + rng.uniform(-reach, reach, points.shape)
    # the map from `moved` to `points`: an output pixel takes the value of the input at its image
    back = np.linalg.solve(np.c_[moved, np.ones(3)], points)  # (3, 2): [x y 1] @ back
    column, row = np.meshgrid(np.arange(SIZE), np.arange(SIZE))
    from_x, from_y = np.moveaxis(np.stack([column, row, np.ones_like(row)], -1) @ back, -1, 0)
    x = _sample(x, from_y, from_x, "mirror")
    noise = rng.uniform(-1, 1, (2, SIZE, SIZE))
    dx, dy = alpha * ndimage.gaussian_filter(noise, (0, sigma, sigma), mode="reflect", truncate=3.0)
    return _sample(x, row + dy, column + dx, "reflect")


def _sample(x, rows, columns, mode):
    """Bilinear samples of an (H, W, C) image."""
    channels = [ndimage.map_coordinates(x[..., c], (rows, columns), order=1, mode=mode) for c in range(x.shape[-1])]
    return np.stack(channels, -1)


# name -> (function, its constant at severities 1 to 5)
CORRUPTIONS: dict[str, tuple[Callable, tuple]] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),  # σ
    "shot_noise": (_shot_noise, (500, 250, 100, 75, 50)),  # photons at white
    "impulse_noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),  # share of values
    # σ, reach, rounds
    "glass_blur": (_glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))),
    # radius, σ of its edge
    "defocus_blur": (_defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "motion_blur": (_motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),  # radius, σ
    "zoom_blur": (_zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),  # factor
    "fog": (_fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),  # amount, decay of the fractal
    "jpeg_compression": (_jpeg_compression, (80, 65, 58, 50, 40)),  # quality
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),  # factor
    # α, σ and reach, as fractions of the image's size
    "elastic_transform": (
        _elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
}
