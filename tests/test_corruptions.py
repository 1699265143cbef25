"""Corruptions: their definitions by brute force, their statistics, and a run's accuracy under them."""

import io
import json
import math

import numpy as np
import pytest
from conftest import small_recipe, untrained_run
from PIL import Image
from scipy import ndimage

from ibjax import files
from ibjax.analysis import corruptions as analysis
from ibjax.data import Split, builders, corruptions, synthetic
from ibjax.data.builders import Contents
from ibjax.devices import cluster
from ibjax.errors import DataError, InputError

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
PHASE = np.cumsum(RNG.normal(0, 0.15, (6, 32, 32, 3)), 1) + np.arange(32)[:, None] / 6
SMOOTH = np.uint8(255 * (0.5 + 0.5 * np.sin(PHASE)))  # as photographs: smooth, full range
GREY = np.full((40, 32, 32, 3), 128, np.uint8)


def one(image, name, severity, **options):
    return corruptions.corrupt(image[None], name, severity, **options)[0]


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
def test_an_image_s_corruption_depends_on_index_name_severity_and_seed_alone(name, monkeypatch):
    whole = corruptions.corrupt(SMOOTH, name, 3, seed=5)
    assert whole.dtype == np.uint8 and whole.shape == SMOOTH.shape and np.any(whole != SMOOTH)
    np.testing.assert_array_equal(whole[2:4], corruptions.corrupt(SMOOTH[2:4], name, 3, 5, np.array([2, 3])))
    monkeypatch.setattr(corruptions, "_CHUNK", 4)
    np.testing.assert_array_equal(whole, corruptions.corrupt(SMOOTH, name, 3, seed=5))
    random = name not in ("defocus_blur", "zoom_blur", "jpeg_compression", "pixelate")
    assert random == np.any(whole != corruptions.corrupt(SMOOTH, name, 3, seed=6))
    assert random == np.any(whole[1] != one(SMOOTH[1], name, 3, seed=5))  # as image 0


# the constants of CIFAR-10-C at severities 1 to 5, of Hendrycks and Dietterich's make_cifar_c.py
CONSTANTS = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "shot_noise": (500, 250, 100, 75, 50),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": (1.06, 1.11, 1.16, 1.21, 1.26),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "jpeg_compression": (80, 65, 58, 50, 40),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    "elastic_transform": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
}


def test_the_constants_are_those_of_the_papers_code():
    """Twelve in all: eleven can be made."""
    assert {name: constants for name, (_, constants) in corruptions.CORRUPTIONS.items()} == CONSTANTS
    assert set(corruptions.TWELVE) == {*CONSTANTS, "frost"} and len(corruptions.TWELVE) == 12


@pytest.mark.parametrize("severity", [1, 5])
def test_noise_has_the_stated_moments(severity):
    x = 128 / 255
    count = GREY.size
    sigma = corruptions.CORRUPTIONS["gaussian_noise"][1][severity - 1]
    gaussian = corruptions.corrupt(GREY, "gaussian_noise", severity).astype(float) + 0.5
    assert abs(gaussian.std() / 255 - sigma) < 4 * sigma / math.sqrt(2 * count) + 0.0005
    assert abs(gaussian.mean() / 255 - x) < 4 * sigma / math.sqrt(count) + 0.0005
    photons = corruptions.CORRUPTIONS["shot_noise"][1][severity - 1]
    shot = corruptions.corrupt(GREY, "shot_noise", severity).astype(float) + 0.5
    assert abs(shot.var() / 255**2 / (x / photons) - 1) < 0.03  # a Poisson variable's variance is its mean
    amount = corruptions.CORRUPTIONS["impulse_noise"][1][severity - 1]
    impulse = corruptions.corrupt(GREY, "impulse_noise", severity)
    for value in (0, 255):
        assert abs((impulse == value).mean() - amount / 2) < 4 * math.sqrt(amount / 2 / count)
    assert set(np.unique(impulse)) == {0, 128, 255}


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_defocus_is_a_correlation_with_the_smoothed_disk(severity):
    radius, alias = corruptions.CORRUPTIONS["defocus_blur"][1][severity - 1]
    weight = {}
    inside = [(i, j) for i in range(-8, 9) for j in range(-8, 9) if i * i + j * j <= radius**2]
    line = np.array([math.exp(-(d * d) / (2 * alias**2)) for d in (-1, 0, 1)])
    line /= line.sum()
    for i, j in inside:
        for di in (-1, 0, 1):
            for dj in (-1, 0, 1):
                weight[i + di, j + dj] = weight.get((i + di, j + dj), 0) + line[di + 1] * line[dj + 1] / len(inside)
    x = NOISE[0] / 255
    expected = sum(w * np.pad(x, ((4, 4), (4, 4), (0, 0)), "reflect")[4 + i : 36 + i, 4 + j : 36 + j]
                   for (i, j), w in weight.items())  # fmt: skip
    found = one(NOISE[0], "defocus_blur", severity)  # rounded down, which decides where 255 times it is a whole number
    assert np.all((found == np.uint8(expected * 255 + 1e-6)) | (found == np.uint8(expected * 255 - 1e-6)))


@pytest.mark.parametrize("severity", [1, 4])
def test_zoom_blur_is_the_mean_of_enlargements_by_scipy(severity):
    factors = np.arange(1, corruptions.CORRUPTIONS["zoom_blur"][1][severity - 1], 0.01)
    x = np.float32(NOISE[0] / 255)
    total = x.copy()
    for factor in factors:
        size = math.ceil(32 / factor)
        top = (32 - size) // 2
        large = ndimage.zoom(x[top : top + size, top : top + size], (factor, factor, 1), order=1)
        trim = (len(large) - 32) // 2
        total += large[trim : trim + 32, trim : trim + 32]
    expected = np.uint8(np.clip(total / (len(factors) + 1), 0, 1) * 255)
    difference = one(NOISE[0], "zoom_blur", severity).astype(int) - expected
    assert np.abs(difference).max() <= 1 and np.mean(difference != 0) < 0.01


def test_motion_blur_spreads_a_point_along_a_line_to_one_side():
    point = np.zeros((8, 32, 32, 3), np.uint8)
    point[:, 16, 16] = 255
    for severity, (radius, sigma) in zip((1, 5), ((6, 1), (9, 2.5)), strict=True):
        blurred = corruptions.corrupt(point, "motion_blur", severity).astype(float)[..., 0]
        weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
        for image in blurred:
            rows, columns = np.nonzero(image)
            assert columns.max() == 16 and np.all(columns <= 16)  # light comes from the right: cos(angle) > 0
            assert np.all(np.abs(rows - 16) <= (16 - columns) + 1)  # within 45°
            assert abs(image[16, 16] - 255 * weights[0] / weights.sum()) <= 0.5 + 1e-6
    np.testing.assert_array_equal(corruptions.corrupt(GREY, "motion_blur", 5), GREY)


def test_glass_blur_takes_pixels_from_up_and_left():
    ramp = np.repeat(np.arange(0, 256, 8, dtype=np.uint8)[None, :, None], 32, 0).repeat(3, 2)  # brighter to the right
    out = one(ramp, "glass_blur", 1).astype(int)  # σ = 0.05: the smoothing does nothing
    assert np.all(out <= ramp) and np.any(out < ramp)
    np.testing.assert_array_equal(out[:2], ramp[:2])  # the border is left alone
    np.testing.assert_array_equal(out[:, :2], ramp[:, :2])
    assert set(np.unique(ramp.astype(int) - out)) == {0, 8}  # one pixel in one round
    assert np.unique(ramp.astype(int) - one(ramp, "glass_blur", 4).astype(int)).max() > 8


def test_fog_brightens_by_a_fractal_of_the_stated_amount():
    for severity, (amount, decay) in enumerate(corruptions.CORRUPTIONS["fog"][1], 1):
        fog = corruptions.corrupt(GREY, "fog", severity)
        x = 128 / 255
        low, high = x * x / (x + amount), (x + amount) * x / (x + amount)
        for image in fog:
            assert abs(image.min() - 255 * low) <= 1 and abs(image.max() - 255 * high) <= 1
            assert np.ptp(image, axis=2).max() == 0  # grey
        rngs = [np.random.default_rng(i) for i in range(3)]
        height = corruptions.plasma_fractal(rngs, decay)
        assert height.shape == (3, 32, 32) and np.all(height.min((1, 2)) == 0) and np.all(height.max((1, 2)) == 1)
    smooth, rough = (corruptions.plasma_fractal([np.random.default_rng(0)], decay)[0] for decay in (3, 1.2))
    assert np.abs(np.diff(smooth)).mean() < np.abs(np.diff(rough)).mean()


def test_jpeg_and_pixelate_are_pillow_s():
    for severity, quality in zip((1, 5), (80, 40), strict=True):
        file = io.BytesIO()
        Image.fromarray(SMOOTH[0]).save(file, "JPEG", quality=quality)
        np.testing.assert_array_equal(one(SMOOTH[0], "jpeg_compression", severity), np.asarray(Image.open(file)))
    half = np.kron(RNG.integers(0, 256, (16, 16, 3)), np.ones((2, 2, 1))).astype(np.uint8)
    assert np.any(one(half, "pixelate", 1) != half)
    for severity, side in zip((1, 2, 3, 4, 5), (30, 28, 27, 24, 20), strict=True):
        shrunk = Image.fromarray(SMOOTH[0]).resize((side, side), Image.Resampling.BOX)
        expected = np.asarray(shrunk.resize((32, 32), Image.Resampling.BOX))
        np.testing.assert_array_equal(one(SMOOTH[0], "pixelate", severity), expected)


def test_elastic_without_displacement_is_the_identity_and_an_affine_map_moves_a_ramp_affinely():
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(corruptions._elastic(SMOOTH[0] / 255, 0, 0, 0, rng), SMOOTH[0] / 255, atol=1e-12)
    column, row = np.meshgrid(np.arange(32.0), np.arange(32.0))
    ramps = np.stack([column, row, column + row], -1)
    moved = corruptions._elastic(ramps, 0, 0, 1.5, rng)[6:-6, 6:-6]  # away from the mirrored border
    second = np.diff(moved, 2, axis=0), np.diff(moved, 2, axis=1)
    assert max(np.abs(part).max() for part in second) < 1e-9 and np.abs(moved - ramps[6:-6, 6:-6]).max() > 0.1
    # the points themselves: what lay at the first lies at its image
    points = np.array([[26.0, 26.0], [26.0, 6.0], [6.0, 6.0]])
    shift = np.random.default_rng(1).uniform(-1.5, 1.5, points.shape)
    moved = corruptions._elastic(ramps, 0, 0, 1.5, np.random.default_rng(1))
    for (x, y), (dx, dy) in zip(points, shift, strict=True):
        sampled = [ndimage.map_coordinates(moved[..., c], [[y + dy], [x + dx]], order=1)[0] for c in (0, 1)]
        np.testing.assert_allclose(sampled, (x, y), atol=1e-6)


def test_damage_grows_with_severity():
    """Elastic's does not in the paper's constants: its affine part shrinks."""
    for name in corruptions.CORRUPTIONS:
        if name != "elastic_transform":
            error = [np.abs(corruptions.corrupt(SMOOTH, name, s).astype(float) - SMOOTH).mean() for s in (1, 5)]
            assert error[1] > error[0], name


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((NOISE, "frost", 1), "photographs"),
        ((NOISE, "fogg", 1), "did you mean 'fog'"),
        ((NOISE, "fog", 0), "1, 2, 3, 4 or 5"),
        ((NOISE / 255, "fog", 1), "float64"),
        ((NOISE[:, :28], "fog", 1), r"\(6, 28, 32, 3\)"),
    ],
)
def test_what_cannot_be_corrupted_is_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        corruptions.corrupt(*arguments)


# ---- accuracy -----------------------------------------------------------------------------------------------


def test_accuracies_are_those_counted_one_by_one():
    splits = {severity: Split(RNG.integers(0, 256, (23, 32, 32, 3), dtype=np.uint8), RNG.integers(0, 3, 23))
              for severity in corruptions.SEVERITIES}  # fmt: skip

    def logits_fn(x):
        return np.asarray(x).reshape(len(x), -1)[:, :3]

    source = analysis.Source("noise", ("fog",), lambda name, severity: splits[severity])
    table = analysis.accuracies(logits_fn, source, batch_size=10)
    for severity, value in zip(corruptions.SEVERITIES, table["fog"], strict=True):
        x, y = splits[severity]
        right = sum(int(np.argmax(image[0, 0])) == label for image, label in zip(x, y, strict=True))
        assert value == round(100 * right / 23, 4)
    assert table == analysis.accuracies(logits_fn, source, batch_size=23)
    with pytest.raises(InputError, match="n=24 is not allowed; a corruption of one severity has 23 images"):
        analysis.accuracies(logits_fn, source, n=24)
    with pytest.raises(InputError, match="n=24 is not allowed; the test set has 23 images"):
        analysis.generated(splits[1], "noise", n=24)


def test_the_published_images_are_found_by_the_number_of_classes(tmp_path):
    labels = np.tile(np.arange(10), 5)
    splits = {name: RNG.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8) for name in corruptions.TWELVE}
    contents = Contents((32, 32, 3), tuple("0123456789"), {k: zip(v, labels, strict=True) for k, v in splits.items()})
    builders.write("cifar10_c", contents, tmp_path, {"label": "CIFAR-10-C"})
    source = analysis.stored(10, str(tmp_path))
    assert source.names == corruptions.TWELVE and source.label == "CIFAR-10-C"
    np.testing.assert_array_equal(source.split("frost", 5).images, splits["frost"][40:])
    np.testing.assert_array_equal(source.split("fog", 1).labels, np.arange(10))
    with pytest.raises(DataError, match=r"has no cifar100_c; make it: python -m ibjax\.data\.prepare"):
        analysis.stored(100, str(tmp_path))
    with pytest.raises(InputError, match="--generate"):
        analysis.stored(7, str(tmp_path))


@pytest.fixture(scope="module")
def cifar_run(tmp_path_factory):
    """A run on synthetic images of CIFAR's shape."""
    sections = dict(model=dict(name="cnn", widths=((4,),), hidden=()), objective=dict(name="standard"), attack=None)
    return untrained_run(tmp_path_factory.mktemp("runs") / "cifar", small_recipe((32, 32, 3), **sections))


def test_a_run_is_evaluated_from_the_command_line(cifar_run, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["corruptions", f"--workdir={cifar_run}", "--generate", "--n=10"])
    monkeypatch.setattr(cluster, "initialize", lambda: None)  # it must come before all of JAX
    with pytest.raises(SystemExit) as caught:
        analysis.main()
    assert caught.value.code == 0
    record = files.read_json(cifar_run / "corruptions" / "best.json")
    assert list(record["acc"]) == list(corruptions.TWELVE[:-1]) and record["missing"] == ["frost"]
    assert record["dataset"] == "synthetic, corruptions generated with seed 0" and record["n"] == 10
    assert record["mean_acc"] == round(float(np.mean([np.mean(row) for row in record["acc"].values()])), 4)
    assert f"| {record['mean_acc']:.2f} |" in capsys.readouterr().out


def test_runs_on_other_images_are_refused(cifar_run, tmp_path, monkeypatch):
    digits = files.read_json(cifar_run / "config.json")
    digits["data"]["input_shape"] = [8, 8, 1]
    (tmp_path / "config.json").write_text(json.dumps(digits))
    with pytest.raises(InputError, match=r"takes images of 8×8×1, .* made for 32×32×3: .* give a run on such images"):
        analysis.evaluate(tmp_path, generate=True)  # before any checkpoint is looked for
    trained = analysis.run.load(cifar_run)
    monkeypatch.setattr(analysis.run, "load", lambda *args: trained._replace(facts=facts))
    facts = {**trained.facts, "digests": {**trained.facts["digests"], "test": "other"}}
    with pytest.raises(InputError, match="test set of synthetic is not the one"):
        analysis.evaluate(cifar_run, generate=True)


def test_generated_images_are_the_runs_own(cifar_run):
    test = synthetic.load(shape=(32, 32, 3), num_classes=10).test
    whole = corruptions.corrupt(test.images, "fog", 2)
    np.testing.assert_array_equal(analysis.generated(test, "synthetic").split("fog", 2).images, whole)
    part = analysis.generated(test, "synthetic", n=10).split("fog", 2)
    assert len(part.labels) == 10
    assert {image.tobytes() for image in part.images} < {image.tobytes() for image in whole}
