"""Data: splits, checks of damaged input, augmentation."""

import jax
import numpy as np
import pytest
from PIL import Image

from ibjax import config
from ibjax.data import Split, augment, check, digits, folder, gallery, hold_out, load_splits, npz, synthetic
from ibjax.devices import cores
from ibjax.errors import DataError, InputError
from ibjax.runs import run

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (40, 6, 6, 3), dtype=np.uint8)
LABELS = np.arange(40) % 4


def write_npz(path, **changes):
    arrays = {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES[:8], "y_test": LABELS[:8], **changes}
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return str(path)


def test_digits_have_a_fixed_stratified_split_without_overlap():
    data = digits.load()
    sizes = [len(split.labels) for split in (data.train, data.val, data.test)]
    assert sizes == [1257, 180, 360] and data.num_classes == 10
    assert data.train.images.dtype == np.uint8 and data.train.images.shape[1:] == (8, 8, 1)
    assert data.train.images.max() == 255
    for split in (data.val, data.test):
        counts = np.bincount(split.labels, minlength=10)
        assert counts.max() - counts.min() <= 2
    again = digits.load()
    np.testing.assert_array_equal(data.test.images, again.test.images)
    everything = np.concatenate([s.images.reshape(-1, 64) for s in (data.train, data.val, data.test)])
    assert len(np.unique(everything, axis=0)) == 1797  # no image is in two splits


def test_hold_out_is_stratified_deterministic_and_complete():
    rest, held = hold_out(Split(IMAGES, LABELS), 10, seed=3)
    assert len(rest.labels) == 30 and np.ptp(np.bincount(held.labels)) <= 1
    both = np.concatenate([rest.images, held.images]).reshape(40, -1)
    assert sorted(map(bytes, both)) == sorted(map(bytes, IMAGES.reshape(40, -1)))
    np.testing.assert_array_equal(held.images, hold_out(Split(IMAGES, LABELS), 10, seed=3)[1].images)
    assert not np.array_equal(held.images, hold_out(Split(IMAGES, LABELS), 10, seed=4)[1].images)


def test_npz_round_trip(tmp_path):
    data = load_splits(npz.load, val_size=8, path=write_npz(tmp_path / "a.npz"))
    assert (len(data.train.labels), len(data.val.labels), len(data.test.labels)) == (32, 8, 8)
    np.testing.assert_array_equal(data.test.images, IMAGES[:8])
    grey = load_splits(
        npz.load, val_size=0, path=write_npz(tmp_path / "b.npz", x_train=IMAGES[..., 0], x_test=IMAGES[:8, ..., 0])
    )
    assert grey.train.images.shape == (40, 6, 6, 1) and grey.val is None


def test_npz_accepts_column_labels_and_unit_floats(tmp_path):
    path = write_npz(tmp_path / "a.npz", y_train=LABELS[:, None], x_train=IMAGES / 255.0, x_test=IMAGES[:8] / 255.0)
    data = load_splits(npz.load, val_size=0, path=path)
    assert data.train.labels.shape == (40,) and data.train.images.dtype == np.float32


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(x_train=IMAGES.astype(np.float32)), "[0, 255]"),
        (dict(x_train=IMAGES / 255.0**2), "divided by 255 twice"),
        (dict(x_test=np.float32(IMAGES[:8] / 255.0) / 255), "test images are float32 and reach only 0.0039"),
        (dict(x_train=np.where(IMAGES > 250, np.nan, IMAGES / 255)), "nan"),
        (dict(x_train=IMAGES.transpose(0, 3, 1, 2)), "NCHW"),
        (dict(x_train=IMAGES.astype(np.int64)), "int64"),
        (dict(y_train=LABELS - 1), "[-1, 2]"),
        (dict(y_test=LABELS[:8] + 3), "4 classes"),
        (dict(y_train=LABELS[:39]), "40 images"),
        (dict(y_train=LABELS.astype(float)), "integer"),
        (dict(x_test=IMAGES[:8, :5]), "one size"),
        (dict(y_test=None), "lacks y_test"),
        (dict(y_test=LABELS[:0]), "one integer for each of 8"),
        (dict(y_test=np.int64(3)), "one integer for each of 8"),
    ],
)
def test_wrong_arrays_are_refused_in_one_line(tmp_path, changes, words):
    path = write_npz(tmp_path / "a.npz", **changes)
    with pytest.raises(DataError) as caught:
        load_splits(npz.load, val_size=0, path=path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


NO_CLASS_0 = "1 of 5 classes have no {} image: 0; if labels count from 1, subtract 1"


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(y_train=LABELS + 1, y_test=LABELS[:8] + 1), [NO_CLASS_0.format("training"), NO_CLASS_0.format("test")]),
        (dict(y_train=LABELS + 2 * (LABELS == 3)), ["2 of 6 classes have no training image: 3, 4", "of 6"]),
        (dict(y_test=np.zeros(8, int)), ["3 of 4 classes have no test image: 1, 2, 3"]),
        ({}, []),
    ],
)
def test_classes_without_an_image_are_named(tmp_path, caplog, changes, expected):
    data = load_splits(npz.load, val_size=0, path=write_npz(tmp_path / "a.npz", **changes))
    assert len(data.warnings) == len(expected)
    for text, warning in zip(expected, data.warnings, strict=True):
        assert text in warning and f"a: {warning}" in caplog.text
    assert run.facts(data).get("warnings", []) == list(data.warnings)


def test_classes_that_a_part_of_the_images_lacks_are_named(tmp_path):
    """A validation split or a fraction can take a class's last image from training."""
    labels = np.where(np.arange(40) == 7, 4, LABELS)
    path = write_npz(tmp_path / "a.npz", y_train=labels, y_test=np.arange(8) % 5)
    assert not load_splits(npz.load, val_size=0, path=path).warnings
    lost = [load_splits(npz.load, val_size=0, fraction=0.5, split_seed=seed, path=path).warnings for seed in range(8)]
    assert {("1 of 5 classes have no training image: 4",), ()} == set(lost)


@pytest.mark.parametrize("label", [4, 5, 200, 2**62])
def test_one_stray_label_does_not_make_classes(tmp_path, label):
    labels = np.where(np.arange(40) == 7, label, LABELS)
    path = write_npz(tmp_path / "a.npz", y_train=labels)
    with pytest.raises(
        DataError, match=rf"label {label} occurs once in y_train and never in y_test.*num_classes={label + 1}"
    ):
        load_splits(npz.load, val_size=0, path=path)
    if label < 10:
        data = load_splits(npz.load, val_size=0, path=path, num_classes=label + 1)
        assert data.num_classes == label + 1  # it was meant


def test_labels_that_leave_most_classes_empty_are_refused(tmp_path):
    sparse = np.where(LABELS == 3, 255, LABELS)  # as masks mark what has no class
    path = write_npz(tmp_path / "a.npz", y_train=sparse)
    with pytest.raises(DataError, match=r"252 of 256 classes have no training image.*give data\.num_classes=256"):
        load_splits(npz.load, val_size=0, path=path)
    assert len(load_splits(npz.load, val_size=0, path=path, num_classes=256).warnings) == 2


@pytest.mark.parametrize("found", [True, False])
def test_digits_are_the_ones_that_they_were(found, monkeypatch):
    """Digests of an earlier version: the images, their order and their splits. Their file need not be found."""
    if not found:
        monkeypatch.setattr(digits.Path, "is_file", lambda path: False)
    assert run.facts(load_splits(digits.load, val_size=0))["digests"] == {
        "train": "b86f5693b575116e88813dcc4d7010d4",
        "val": "3207a4ed5f69ddd6ab1bad226af00866",
        "test": "a6ee3894cca10d3759676c96504459c8",
    }


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_wrong_bit_of_an_npz_is_named_or_unharmful(tmp_path, save):
    """Among them those of the headers' lengths, which shift all values."""
    path = tmp_path / "a.npz"
    many = {"x_train": np.tile(IMAGES, (5, 1, 1, 1)), "y_train": np.tile(LABELS, 5)}  # more than zipfile reads ahead
    save(path, **many, x_test=IMAGES, y_test=LABELS)
    content, whole = bytearray(path.read_bytes()), npz.load(path=str(path))
    lengths = [i + 8 for i in range(len(content)) if content[i : i + 6] == b"\x93NUMPY"]
    assert len(lengths) == (4 if save is np.savez else 0)
    for place in {*range(0, len(content), 97), *lengths}:
        content[place] ^= 4
        path.write_bytes(content)
        content[place] ^= 4
        try:
            data = npz.load(path=str(path))
        except DataError as error:
            assert "a.npz" in str(error) and "\n" not in str(error)
        else:
            assert place not in lengths
            jax.tree.map(np.testing.assert_array_equal, data[:3], whole[:3])
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a\.npz"):
        npz.load(path=str(path))


def test_a_rewritten_file_is_read_again(tmp_path):
    """In the same process, too: of the same size, within a second."""
    settings = config.base()
    path = write_npz(tmp_path / "a.npz")
    settings.data = dict(name="npz", path=path, val_size=0, split_seed=0)
    first = run.load_data(settings)
    assert run.load_data(settings) is first
    write_npz(tmp_path / "a.npz", x_train=IMAGES[::-1])
    np.testing.assert_array_equal(run.load_data(settings).train.images, IMAGES[::-1])
    for i in range(4):  # two are kept
        settings.data.path = write_npz(tmp_path / f"{i}.npz")
        run.load_data(settings)
    assert len(run._loaded) == 2


def test_damaged_and_malicious_npz_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    write_npz(path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a zip", whole[:3000] + b"\xff" * 40 + whole[3040:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.npz"):
            load_splits(npz.load, val_size=0, path=str(path))
    with pytest.raises(DataError, match="is no file"):
        npz.load(path=str(tmp_path / "none.npz"))
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (marker.touch, ())

    np.savez(path, x_train=np.array([Evil()], dtype=object), y_train=LABELS, x_test=IMAGES, y_test=LABELS)
    with pytest.raises(DataError, match=r"a\.npz.*holds Python objects"):
        npz.load(path=str(path))
    assert not marker.exists()


def test_class_folders(tmp_path):
    for split, count in (("train", 3), ("test", 1)):
        for name in ("cat", "ant"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(IMAGES[i]).save(tmp_path / split / name / f"{i}.png")
    data = load_splits(folder.load, val_size=0, path=str(tmp_path))
    assert data.num_classes == 2 and list(data.train.labels) == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(data.train.images[4], IMAGES[1])
    broken = tmp_path / "train" / "ant" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(DataError, match=r"1\.png"):
        folder.load(path=str(tmp_path))
    with pytest.raises(DataError, match="train/ and test/"):
        folder.load(path=str(tmp_path / "train"))


@pytest.mark.parametrize("padding, platform", [("zero", "cpu"), ("edge", "tpu"), ("reflect", "cuda"), ("zero", "tpu")])
def test_crops_are_windows_of_the_padded_image(padding, platform):
    x = RNG.random((64, 6, 5, 3), np.float32)
    with cores.elsewhere(platform):
        cropped = jax.jit(augment.crop_and_flip(pad=2, padding=padding, flip=False))(jax.random.key(1), x)
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), {"zero": "constant"}.get(padding, padding))
    corners = set()
    for image, whole in zip(np.asarray(cropped), padded, strict=True):
        found = [(i, j) for i in range(5) for j in range(5) if np.array_equal(whole[i : i + 6, j : j + 5], image)]
        assert found
        corners.update(found)
    assert len(corners) > 15  # of 25 places: the draw covers them


def test_flips_are_half_and_augmentation_is_a_function_of_the_key():
    x = RNG.random((400, 3, 4, 1), np.float32)
    flip = jax.jit(augment.crop_and_flip(pad=0, flip=True))
    y = np.asarray(flip(jax.random.key(1), x))
    flipped = np.all(y == x[:, :, ::-1], (1, 2, 3))
    assert 0.4 < flipped.mean() < 0.6 and np.all(flipped | np.all(y == x, (1, 2, 3)))
    np.testing.assert_array_equal(y, flip(jax.random.key(1), x))
    assert augment.crop_and_flip(pad=0, flip=False) is None
    with pytest.raises(InputError, match="'edge'"):
        augment.crop_and_flip(padding="edges")


def test_check_names_the_split():
    data = synthetic.load(shape=(8, 8, 1), num_classes=3)
    with pytest.raises(DataError, match="val labels lie in"):
        check(data.train, "val", 2)


def test_a_picture_has_a_column_for_each_class_and_counts_are_a_row():
    data = synthetic.load(shape=(8, 6, 1), num_classes=3, n_train=10)
    whole = gallery.picture(data.train, rows=2, augmented=1, pad=1)
    assert whole.shape == (3 * 10, 3 * 8, 3) and whole.dtype == np.uint8
    second = data.train.images[np.flatnonzero(data.train.labels == 2)[1]]
    np.testing.assert_array_equal(whole[11:19, 17:23, 0], second[..., 0])
    assert gallery.counts(data) == "| synthetic | 10 | 0 | 16 | 8×6×1 | 3 | 3 – 4 | 5 – 6 |"
