"""Stronger augmentations, inside the jitted step: random erasing, RandAugment, AutoAugment, and IDBH's crop-and-colour.

    augment=dict(name="randaugment", operations=2, magnitude=14)

| name             | in order                                           | source                                       |
|------------------|----------------------------------------------------|----------------------------------------------|
| `random_erasing` | crop, flip, erasing                                | Zhong et al., AAAI 2020                      |
| `randaugment`    | n operations of 14, crop, flip                     | Cubuk et al., NeurIPS 2020                   |
| `autoaugment`    | crop, flip, one of 25 pairs of operations          | Cubuk et al., CVPR 2019: that for CIFAR-10   |
| `idbh`           | flip, crop and shift, one of 8 operations, erasing | Li & Spratling, ICLR 2023                    |

Each works image by image, and what it draws is a function of (seed, step, index of the image). `erase` is the
probability of random erasing as the last step. Operations are those of Pillow (`ibjax.data.operations`).

Random erasing sets a rectangle to 0: its area is a uniform share of the image in `area`, its aspect ratio log-uniform
in `ratio`. Of ten drawn rectangles the first that fits is taken; if none fits, the image stays.

Deviations: Cubuk et al. and the code of IDBH round to whole grey levels after every operation; here images stay real
numbers. RandAugment's magnitude goes from 0 to 30, and its largest values are those of AutoAugment, as in torchvision.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ibjax.data import operations as ops
from ibjax.data.augment import check_padding, crop_and_flip
from ibjax.errors import InputError, check_count, check_range, nearest
from ibjax.step import PerImage

LEVELS = 30.0  # RandAugment's largest magnitude
AREA, RATIO = (0.02, 0.33), (0.3, 3.3)  # of random erasing, as in torchvision
GREY = 128 / 255  # what Cubuk et al. fill moved images with

# the 25 pairs of (operation, probability, magnitude of 0 to 9) that were found for CIFAR-10
CIFAR10_POLICY = (
    (("invert", 0.1, 7), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 8), ("equalize", 0.9, 2)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 5), ("equalize", 0.5, 1)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 7), ("autocontrast", 0.4, 8)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 3)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 8), ("equalize", 0.6, 4)),
    (("color", 0.9, 9), ("equalize", 0.6, 6)),
    (("autocontrast", 0.8, 4), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 3)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 2), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 8), ("invert", 0.1, 3)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 1)),
)
# operation -> (probability, lowest and highest value): "color" for CIFAR-10, "shape" for SVHN
IDBH_OPERATIONS = {
    "color": {
        "color": (0.125, 0.1, 1.9),
        "brightness": (0.125, 0.5, 1.9),
        "contrast": (0.125, 0.5, 1.9),
        "sharpness": (0.125, 0.1, 1.9),
        "autocontrast": (0.125, 0.0, 0.0),
        "equalize": (0.125, 0.0, 0.0),
        "shear": (0.125, 0.05, 0.15),
        "rotate": (0.125, 1, 11),
    },
    "shape": {
        "color": (0.08, 0.1, 1.9),
        "brightness": (0.08, 0.5, 1.9),
        "contrast": (0.04, 0.5, 1.9),
        "sharpness": (0.08, 0.1, 1.9),
        "autocontrast": (0.04, 0.0, 0.0),
        "equalize": (0.08, 0.0, 0.0),
        "shear": (0.3, 0.05, 0.35),
        "rotate": (0.3, 1, 31),
    },
}
# variant -> (operations, largest shift, probability of erasing, its area)
IDBH = {
    "cifar10-weak": ("color", 10, 0.5, AREA),
    "cifar10-strong": ("color", 10, 1.0, AREA),
    "svhn": ("shape", 8, 1.0, (0.02, 0.5)),
}


def random_erasing(
    *,
    erase: float = 0.5,
    area: tuple[float, float] = AREA,
    ratio: tuple[float, float] = RATIO,
    pad: int = 4,
    padding: str = "zero",
    flip: bool = True,
) -> PerImage:
    """Crop, flip and random erasing; see the table above."""
    check_padding(pad, padding)
    check_erasing(erase, area, ratio)
    return _chain(_crop_flip(pad, padding, flip), _erasing(erase, area, ratio))


def randaugment(
    *,
    operations: int = 2,
    magnitude: float = 9.0,
    probability: float = 1.0,
    fill: float = GREY,
    erase: float = 0.0,
    pad: int = 4,
    padding: str = "zero",
    flip: bool = True,
) -> PerImage:
    """`operations` of the 14, each drawn anew and with a random sign, at a magnitude of 0 to 30; then crop and flip.

    Each of them is applied with `probability`. A magnitude m of timm, which goes to 10, is 3·m here.
    """
    check_count("augment.operations", operations)
    check_range("augment.magnitude", magnitude, 0, LEVELS)
    check_range("augment.probability", probability, 0, 1)
    check_range("augment.fill", fill, 0, 1)
    check_padding(pad, padding)
    check_erasing(erase)
    names = [name for name in ops.NAMES if name != "invert"]  # with "identity", the paper's 14
    numbers = np.asarray([ops.NAMES.index(name) for name in names])

    def change(key: Array, image: Array) -> Array:
        for key_op in jax.random.split(key, operations):
            key_which, key_sign = jax.random.split(key_op)
            which = jnp.asarray(numbers)[jax.random.randint(key_which, (), 0, len(names))]
            sign = jax.random.rademacher(key_sign, (), jnp.float32)
            changed = ops.apply(image, which, ops.value(which, magnitude / LEVELS, sign, image.shape), fill)
            if probability < 1:
                changed = jnp.where(jax.random.bernoulli(jax.random.fold_in(key_op, 2), probability), changed, image)
            image = changed
        return image

    return _chain(change, _crop_flip(pad, padding, flip), _erasing(erase))


def autoaugment(
    *,
    fill: float = GREY,
    erase: float = 0.0,
    pad: int = 4,
    padding: str = "zero",
    flip: bool = True,
) -> PerImage:
    """Crop and flip, then one of the 25 pairs of operations that were found for CIFAR-10."""
    check_range("augment.fill", fill, 0, 1)
    check_padding(pad, padding)
    check_erasing(erase)
    which, probability, level = (
        np.asarray([[kind(step[i]) for step in pair] for pair in CIFAR10_POLICY])
        for i, kind in enumerate((ops.NAMES.index, float, lambda magnitude: magnitude / 9))
    )

    def change(key: Array, image: Array) -> Array:
        key_pair, *keys = jax.random.split(key, 3)
        pair = jax.random.randint(key_pair, (), 0, len(CIFAR10_POLICY))
        for step, key_step in enumerate(keys):
            key_use, key_sign = jax.random.split(key_step)
            number, use, magnitude = (jnp.asarray(table)[pair, step] for table in (which, probability, level))
            sign = jax.random.rademacher(key_sign, (), jnp.float32)
            changed = ops.apply(image, number, ops.value(number, magnitude, sign, image.shape), fill)
            image = jnp.where(jax.random.bernoulli(key_use, use), changed, image)
        return image

    return _chain(_crop_flip(pad, padding, flip), change, _erasing(erase))


def idbh(*, variant: str = "cifar10-weak") -> PerImage:
    """Flip, crop and shift, one operation of colour or shape, and random erasing; variants are those of the code.

    The crop takes x rows and s − x columns off the image, s uniform in 0 to 10, and the rest is put anywhere in an
    image of zeros. Shear and rotation are about the centre and fill with zeros.
    """
    if variant not in IDBH:
        raise InputError(f"augment.variant='{variant}' is unknown; {nearest(variant, IDBH)}")
    space, largest, erase, area = IDBH[variant]
    table = IDBH_OPERATIONS[space]
    columns = np.asarray(list(table.values()), np.float32).T  # probability, lowest value, highest value

    def change(key: Array, image: Array) -> Array:
        key_which, key_value, key_sign, key_axis = jax.random.split(key, 4)
        probability, low, high = jnp.asarray(columns)
        which = jax.random.categorical(key_which, jnp.log(probability))
        value = jax.random.uniform(key_value, (), minval=low[which], maxval=high[which])
        sign = jax.random.rademacher(key_sign, (), jnp.float32)
        along_x = jax.random.bernoulli(key_axis)
        branches = [_idbh_operation(name, value, sign, along_x) for name in table]
        return lax.switch(which, branches, image)

    return _chain(_crop_flip(0, "zero", True), _crop_shift(largest), change, _erasing(erase, area))


def _idbh_operation(name, value, sign, along_x):
    if name == "shear":
        slope = sign * jnp.tan(value)
        matrix = ops.shear(jnp.where(along_x, slope, 0.0), jnp.where(along_x, 0.0, slope))
        return lambda image: ops.warp(image, ops.about_centre(matrix, image.shape), 0.0)
    if name == "rotate":
        return lambda image: ops.warp(image, ops.about_centre(ops.rotation(sign * jnp.floor(value)), image.shape), 0.0)
    return lambda image: ops.COLOURS[name](image, value)


# ---- parts -------------------------------------------------------------------------------------------------


def _chain(*changes):
    """The changes, each with its own key, one after the other."""
    steps = [change for change in changes if change is not None]

    def change(key: Array, image: Array) -> Array:
        for i, step in enumerate(steps):
            image = step(jax.random.fold_in(key, i), image)
        return image

    return PerImage(change)


def _crop_flip(pad, padding, flip):
    both = crop_and_flip(pad=pad, padding=padding, flip=flip)
    return None if both is None else lambda key, image: both(key, image[None])[0]


def _crop_shift(largest):
    """IDBH's CropShift: output pixel u shows input pixel u + start − place, where that was not cut off."""

    def change(key: Array, image: Array) -> Array:
        if largest >= min(image.shape[:2]):
            raise InputError(
                f"augment.name='idbh' cuts off up to {largest} lines; nothing would be left of images {image.shape}"
            )
        keys = jax.random.split(key, 6)
        strength = jax.random.randint(keys[0], (), 0, largest + 1)
        columns = jax.random.randint(keys[1], (), 0, strength + 1)
        for axis, (cut, key_start, key_place) in enumerate(
            ((strength - columns, *keys[2:4]), (columns, *keys[4:6])),
        ):
            side = image.shape[axis]
            start = jax.random.randint(key_start, (), 0, cut + 1)
            place = jax.random.randint(key_place, (), 0, cut + 1)
            inside = jnp.arange(side) - place  # in the cut image
            kept = (inside >= 0) & (inside < side - cut)
            moved = jnp.take(image, jnp.clip(inside + start, 0, side - 1), axis=axis)
            image = jnp.where(jnp.expand_dims(kept, tuple({0, 1, 2} - {axis})), moved, 0.0)
        return image

    return change


def check_erasing(erase: float, area: tuple[float, float] = AREA, ratio: tuple[float, float] = RATIO) -> None:
    """Raises InputError on a probability, shares of the area or aspect ratios that are out of range."""
    check_range("augment.erase", erase, 0, 1)
    if not 0 < area[0] <= area[1] <= 1:
        raise InputError(f"augment.area={area} is not allowed; give the least and the largest share, as {AREA}")
    if not 0 < ratio[0] <= ratio[1]:
        raise InputError(f"augment.ratio={ratio} is not allowed; give the least and the largest aspect ratio")


def _erasing(probability, area=AREA, ratio=RATIO, tries=10):
    if not probability:
        return None

    def change(key: Array, image: Array) -> Array:
        key_use, key_area, key_ratio, *key_corner = jax.random.split(key, 5)
        height, width, _ = image.shape
        share = jax.random.uniform(key_area, (tries,), minval=area[0], maxval=area[1]) * height * width
        logs = [math.log(value) for value in ratio]
        aspect = jnp.exp(jax.random.uniform(key_ratio, (tries,), minval=logs[0], maxval=logs[1]))
        sides = [jnp.round(jnp.sqrt(share * aspect)), jnp.round(jnp.sqrt(share / aspect))]
        fits = (sides[0] < height) & (sides[1] < width)
        inside = jnp.ones(image.shape[:2], bool)
        for axis, (length, key_axis) in enumerate(zip(sides, key_corner, strict=True)):
            chosen = length[jnp.argmax(fits)].astype(jnp.int32)
            corner = jax.random.randint(key_axis, (), 0, jnp.maximum(image.shape[axis] - chosen, 0) + 1)
            place = jnp.arange(image.shape[axis])
            inside &= jnp.expand_dims((place >= corner) & (place < corner + chosen), 1 - axis)
        use = jnp.any(fits) & jax.random.bernoulli(key_use, probability)
        return jnp.where((inside & use)[..., None], 0.0, image)

    return change


AUGMENTATIONS = {f.__name__: f for f in (crop_and_flip, random_erasing, randaugment, autoaugment, idbh)}
