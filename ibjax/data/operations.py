"""Operations of augmentation policies on one image (H, W, C) in [0, 1], as Pillow has them, traceable by JAX.

| operation                                  | value                                                                   |
|--------------------------------------------|-------------------------------------------------------------------------|
| identity, autocontrast, equalize, invert   | none                                                                    |
| solarize                                   | threshold from which pixels are inverted                                |
| posterize                                  | number of bits that are kept of 8                                       |
| color, contrast, brightness, sharpness     | factor, 1 keeps the image: grey, mean, black or blurred image as 0      |
| rotate                                     | degrees, anticlockwise, about the centre                                |
| shear_x, shear_y                           | slope, about the upper left corner                                      |
| translate_x, translate_y                   | pixels                                                                  |

The last five take the nearest pixel; what comes from outside is filled. Source: ImageOps, ImageEnhance and
Image.transform of Pillow. Results are within one grey level of Pillow's, which rounds them.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

_LUMA = (299 / 1000, 587 / 1000, 114 / 1000)  # ITU-R 601, Pillow's conversion to "L"
_LARGEST = {"rotate": 30.0, "shear": 0.3, "translate": 150 / 331, "factor": 0.9, "bits": 4.0}  # at magnitude 1


def _identity(x, value):
    return x


def _autocontrast(x, value):
    low, high = (f(x, axis=(0, 1), keepdims=True) for f in (jnp.min, jnp.max))
    return jnp.where(high > low, (x - low) / jnp.where(high > low, high - low, 1.0), x)


def _equalize(x, value):
    """Each channel's grey levels are mapped so that their histogram is about flat."""
    levels = jnp.round(255.0 * x).astype(jnp.int32).reshape(-1, x.shape[-1])  # (P, C)
    counts = jnp.sum(levels[:, None, :] == jnp.arange(256)[None, :, None], axis=0)  # (256, C)
    last = jnp.max(jnp.where(counts > 0, jnp.arange(256)[:, None], 0), axis=0)
    in_last = jnp.take_along_axis(counts, last[None], axis=0)  # (1, C)
    step = (len(levels) - in_last) // 255
    below = jnp.cumsum(counts, axis=0) - counts
    table = jnp.clip((below + step // 2) // jnp.maximum(step, 1), 0, 255)
    mapped = jnp.take_along_axis(table, levels, axis=0).reshape(x.shape).astype(jnp.float32) / 255.0
    return jnp.where(step > 0, mapped, x)


def _invert(x, value):
    return 1.0 - x


def _solarize(x, value):
    return jnp.where(x < value, x, 1.0 - x)


def _posterize(x, value):
    size = jnp.exp2(8.0 - jnp.round(value))
    return jnp.floor(jnp.round(255.0 * x) / size) * size / 255.0


def _blend(zero, x, factor):
    return jnp.clip(zero + factor * (x - zero), 0.0, 1.0)


def _grey(x):
    if x.shape[-1] == 1:
        return x
    return jnp.sum(x * jnp.asarray(_LUMA).reshape(1, 1, 3), axis=-1, keepdims=True)


def _color(x, value):
    return _blend(jnp.broadcast_to(_grey(x), x.shape), x, value)


def _contrast(x, value):
    return _blend(jnp.broadcast_to(jnp.mean(_grey(x)), x.shape), x, value)


def _brightness(x, value):
    return _blend(jnp.zeros_like(x), x, value)


def _sharpness(x, value):
    """Against the image blurred by (1 1 1; 1 5 1; 1 1 1) / 13, whose border is the image's own."""
    height, width, _ = x.shape
    if min(height, width) < 3:
        return x
    parts = [x[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3)]
    inner = (sum(parts[1:], parts[0]) + 4.0 * parts[4]) / 13.0
    return _blend(x.at[1:-1, 1:-1].set(inner), x, value)


COLOURS: dict[str, Callable[[Array, Array], Array]] = {
    "identity": _identity,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "invert": _invert,
    "solarize": _solarize,
    "posterize": _posterize,
    "color": _color,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
}


# ---- moves -------------------------------------------------------------------------------------------------
# A matrix (2, 3) maps the place (x, y) of an output pixel to the place in the input that it shows.


def shear(slope_x: Array, slope_y: Array) -> Array:
    """x + slope_x·y, y + slope_y·x."""
    one, zero = jnp.ones_like(slope_x), jnp.zeros_like(slope_x)
    return jnp.stack([jnp.stack([one, slope_x, zero]), jnp.stack([slope_y, one, zero])])


def rotation(degrees: Array) -> Array:
    """The image turned anticlockwise about (0, 0)."""
    angle = -jnp.deg2rad(degrees)
    c, s, zero = jnp.cos(angle), jnp.sin(angle), jnp.zeros_like(angle)
    return jnp.stack([jnp.stack([c, s, zero]), jnp.stack([-s, c, zero])])


def translation(x: Array, y: Array) -> Array:
    """The image that shows at (0, 0) what was at (x, y)."""
    one, zero = jnp.ones_like(x), jnp.zeros_like(x)
    return jnp.stack([jnp.stack([one, zero, x]), jnp.stack([zero, one, y])])


def about_centre(matrix: Array, shape: tuple[int, ...]) -> Array:
    """The same map about the centre of an image of this shape."""
    centre = jnp.asarray([shape[1] / 2, shape[0] / 2], jnp.float32)
    return matrix.at[:, 2].add(centre - jnp.sum(matrix[:, :2] * centre[None], axis=1))


def warp(image: Array, matrix: Array, fill: float) -> Array:
    """The image seen through a map of places: the nearest pixel, `fill` outside."""
    height, width, _ = image.shape
    x, y = jnp.meshgrid(*(jnp.arange(side, dtype=jnp.float32) + 0.5 for side in (width, height)))
    column, row = (jnp.floor(m[0] * x + m[1] * y + m[2]).astype(jnp.int32) for m in matrix)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    seen = image[jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)]
    return jnp.where(inside[..., None], seen, fill)


_MOVES: dict[str, Callable[[Array, tuple[int, ...]], Array]] = {
    "rotate": lambda value, shape: about_centre(rotation(value), shape),
    "shear_x": lambda value, shape: shear(value, jnp.zeros_like(value)),
    "shear_y": lambda value, shape: shear(jnp.zeros_like(value), value),
    "translate_x": lambda value, shape: translation(value, jnp.zeros_like(value)),
    "translate_y": lambda value, shape: translation(jnp.zeros_like(value), value),
}
NAMES = (*COLOURS, *_MOVES)


# ---- an operation by its number ------------------------------------------------------------------------------


def apply(image: Array, which: Array, value: Array, fill: float) -> Array:
    """The operation of number `which` in NAMES, with its value; all moves share one `warp`."""
    colours, moves = list(COLOURS.values()), list(_MOVES.values())
    changed = lax.switch(jnp.minimum(which, len(colours) - 1), colours, image, value)
    matrix = jnp.stack([move(value, image.shape) for move in moves])[jnp.maximum(which - len(colours), 0)]
    return jnp.where(which < len(colours), changed, warp(image, matrix, fill))


def value(which: Array, magnitude: "float | Array", sign: Array, shape: tuple[int, ...]) -> Array:
    """The value of operation `which` at a magnitude of 0 to 1, as in AutoAugment; `sign` gives it its direction."""
    m = jnp.asarray(magnitude, jnp.float32)
    signed = sign * m
    of = {
        "solarize": 1.0 - m,
        "posterize": 8.0 - jnp.round(_LARGEST["bits"] * m),
        "rotate": _LARGEST["rotate"] * signed,
        "shear_x": _LARGEST["shear"] * signed,
        "shear_y": _LARGEST["shear"] * signed,
        "translate_x": jnp.round(_LARGEST["translate"] * shape[1] * signed),
        "translate_y": jnp.round(_LARGEST["translate"] * shape[0] * signed),
    }
    of |= dict.fromkeys(("color", "contrast", "brightness", "sharpness"), 1.0 + _LARGEST["factor"] * signed)
    return jnp.stack([of.get(name, jnp.zeros(())) for name in NAMES])[which]
