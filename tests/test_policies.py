"""Policies of augmentation: operations against Pillow, and what each policy draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from ibjax import config
from ibjax.data import operations, policies
from ibjax.errors import InputError
from ibjax.step import PerImage, _augmented

RNG = np.random.default_rng(0)
GREY_LEVELS = RNG.integers(20, 200, (24, 26, 3)).astype(np.uint8)  # no channel that is stretched already
# operation -> (value, what Pillow makes of an image)
PILLOW = {
    "identity": (0, lambda p: p),
    "autocontrast": (0, ImageOps.autocontrast),
    "equalize": (0, ImageOps.equalize),
    "invert": (0, ImageOps.invert),
    "solarize": (100 / 255, lambda p: ImageOps.solarize(p, 100)),
    "posterize": (3, lambda p: ImageOps.posterize(p, 3)),
    "color": (1.6, lambda p: ImageEnhance.Color(p).enhance(1.6)),
    "contrast": (0.4, lambda p: ImageEnhance.Contrast(p).enhance(0.4)),
    "brightness": (1.3, lambda p: ImageEnhance.Brightness(p).enhance(1.3)),
    "sharpness": (1.9, lambda p: ImageEnhance.Sharpness(p).enhance(1.9)),
    "rotate": (17.0, lambda p: p.rotate(17, Image.Resampling.NEAREST, fillcolor=(128, 128, 128))),
    "shear_x": (0.31, lambda p: moved(p, (1, 0.31, 0, 0, 1, 0))),
    "shear_y": (-0.23, lambda p: moved(p, (1, 0, 0, -0.23, 1, 0))),
    "translate_x": (3.0, lambda p: moved(p, (1, 0, 3, 0, 1, 0))),
    "translate_y": (-2.0, lambda p: moved(p, (1, 0, 0, 0, 1, -2))),
}


def moved(picture, data):
    return picture.transform(
        picture.size, Image.Transform.AFFINE, data, Image.Resampling.NEAREST, fillcolor=(128, 128, 128)
    )


@functools.cache
def applied():
    """All operations by their number, in one program."""
    values = jnp.asarray([value for value, _ in PILLOW.values()], jnp.float32)
    image = jnp.asarray(GREY_LEVELS, jnp.float32) / 255.0
    each = jax.vmap(lambda which, value: operations.apply(image, which, value, 128 / 255))
    return np.asarray(jax.jit(each)(jnp.arange(len(values)), values))


def test_the_table_has_every_operation():
    assert tuple(PILLOW) == operations.NAMES


@pytest.mark.parametrize("name", PILLOW)
def test_an_operation_is_pillows_to_one_grey_level(name):
    """To 1.6 where Pillow also rounds the image that it blends with."""
    expected = np.asarray(PILLOW[name][1](Image.fromarray(GREY_LEVELS)), np.float64)
    found = 255.0 * applied()[operations.NAMES.index(name)]
    assert np.abs(found - expected).max() <= (1.6 if name in ("color", "contrast", "sharpness") else 1.01)
    assert name in ("identity", "posterize") or np.abs(expected - GREY_LEVELS).max() > 5


@pytest.mark.parametrize("make", [
    lambda: policies.random_erasing(erase=1.0, pad=2),
    lambda: policies.randaugment(operations=1, magnitude=14),
    lambda: policies.autoaugment(erase=0.5),
    lambda: policies.idbh(),
    lambda: policies.idbh(variant="svhn"),
], ids=["random_erasing", "randaugment", "autoaugment", "idbh", "idbh-svhn"])  # fmt: skip
def test_a_policy_changes_an_image_by_its_index_alone(make):
    """In [0, 1], the same for the same (key, index) whatever stands beside it, another for another index or key."""
    images = np.float32(RNG.uniform(0.1, 1.0, (6, 12, 11, 3)))
    change = jax.jit(lambda key, x, index: _augmented(make(), key, x, index))
    key, index = jax.random.key(3), np.arange(6, dtype=np.int32) + 40
    first = np.asarray(change(key, images, index))
    assert first.shape == images.shape and np.all((first >= 0) & (first <= 1))
    np.testing.assert_array_equal(np.asarray(change(key, images[::-1], index[::-1]))[::-1], first)
    for other in (change(jax.random.key(4), images, index), change(key, images, index + 100)):
        assert np.any(other != first)


def drawn(count, change, image):
    """An image changed with so many keys, one after the other: a program for all at once takes longer to compile."""
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.jit(lambda keys: jax.lax.map(lambda key: change(key, jnp.asarray(image)), keys))(keys))


def test_erasing_has_its_probability_and_area():
    """Over many draws: rectangles of zeros, whose mean area is that of the uniform share, and as often as asked."""
    made = policies.random_erasing(erase=0.4, area=(0.1, 0.3), ratio=(0.5, 2.0), pad=0, flip=False)
    erased = drawn(2000, made.change, np.ones((20, 20, 1), np.float32))[..., 0] == 0
    hit = erased.any((1, 2))
    assert abs(hit.mean() - 0.4) < 0.04
    areas = erased[hit].mean((1, 2))
    assert abs(areas.mean() - 0.2) < 0.01 and areas.min() > 0.08 and areas.max() < 0.33
    rows, columns = erased[hit].any(2).sum(1), erased[hit].any(1).sum(1)
    np.testing.assert_array_equal(rows * columns, erased[hit].sum((1, 2)))  # rectangles


def test_idbhs_crop_is_a_window_somewhere_in_zeros():
    """Of s = 0 to 4 lines that are cut off in all; the rest is found again, whole, at another place."""
    image = np.arange(1, 73, dtype=np.float32).reshape(8, 9, 1)
    with pytest.raises(InputError, match="cuts off up to 8 lines; nothing would be left"):
        policies._crop_shift(8)(jax.random.key(0), jnp.asarray(image))
    shift = policies._crop_shift(4)
    made = drawn(300, shift, image)
    cuts = set()
    for one in made:
        rows, columns = np.flatnonzero(one[..., 0].any(1)), np.flatnonzero(one[..., 0].any(0))
        window = one[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (window > 0).all() and (one > 0).sum() == window.size
        y, x = divmod(int(window[0, 0, 0]) - 1, 9)
        np.testing.assert_array_equal(window, image[y : y + window.shape[0], x : x + window.shape[1]])
        cuts.add((8 - window.shape[0], 9 - window.shape[1]))
    assert {sum(cut) for cut in cuts} == {0, 1, 2, 3, 4} and len(cuts) == 15


def test_an_operation_has_its_probability(monkeypatch):
    """With the negative in place of every operation: some of them would keep an image."""
    monkeypatch.setattr(operations, "apply", lambda image, which, value, fill: 1 - image)
    images = np.random.default_rng(0).random((400, 8, 8, 3), np.float32)
    keys = jax.random.split(jax.random.key(1), len(images))
    changed = []
    for probability in (0.0, 0.5, 1.0):
        change = policies.randaugment(operations=1, magnitude=20, probability=probability, pad=0, flip=False).change
        changed.append((np.asarray(jax.jit(jax.vmap(change))(keys, images)) != images).any((1, 2, 3)).mean())
    none, half, always = changed
    assert none == 0 and always == 1
    assert abs(half - 0.5) < 4 * (0.25 / len(images)) ** 0.5


def test_a_configuration_names_policies_and_refuses_wrong_options():
    settings = config.base()
    settings.augment = dict(name="randaugment", operations=3, magnitude=5.0, padding="reflect")
    config.check(settings)
    assert isinstance(config.build("augmentations", settings.augment, "augment"), PerImage)
    for augment, text in (
        (dict(name="randaugment", magnitude=31.0), "augment.magnitude=31 is not allowed"),
        (dict(name="randaugment", operation=2), "augment.operation is unknown"),
        (dict(name="idbh", variant="weak"), "augment.variant='weak' is unknown"),
        (dict(name="random_erasing", area=(0.5, 0.1)), "augment.area=.* is not allowed"),
        (dict(name="autoaugment", erase=2.0), "augment.erase=2 is not allowed"),
    ):
        settings.augment = augment
        with pytest.raises(InputError, match=text):
            config.check(settings)
