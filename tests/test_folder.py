"""Class folders: which files count, how they are numbered, fitted and turned, and what is said of the others."""

import json
import logging
import shutil

import numpy as np
import pytest
from PIL import Image

from ibjax import config
from ibjax.data import folder, load_splits
from ibjax.errors import DataError, InputError
from ibjax.runs import run

RNG = np.random.default_rng(0)


def picture(size=(6, 6), mode="RGB"):
    """A random image of (width, height)."""
    pixels = RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def make(root, classes=("ant", "cat"), train=3, test=2, size=(6, 6), suffix="png"):
    """Class folders of random images; returns `root`."""
    for split, count in (("train", train), ("test", test)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture(size).save(root / split / name / f"{i}.{suffix}")
    return root


def load(root, **options):
    return load_splits(folder.load, val_size=0, path=str(root), **options)


def pixels(file):
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


# ---- which class an image has --------------------------------------------------------------------------------


def test_folders_named_by_numbers_are_classes_in_the_order_of_the_numbers(tmp_path):
    make(tmp_path / "a", [str(i) for i in range(12)], train=1, test=1)
    data = load(tmp_path / "a")
    assert data.classes == tuple(str(i) for i in range(12))  # as text 10 would follow 1
    for label in range(12):
        np.testing.assert_array_equal(data.train.images[label], pixels(tmp_path / f"a/train/{label}/0.png"))
    make(tmp_path / "b", ["10", "9", "b"])
    assert load(tmp_path / "b").classes == ("10", "9", "b")  # not all are numbers: as text
    facts = run.facts(data)
    assert json.loads(json.dumps(facts))["classes"] == list(data.classes) and "warnings" not in facts


def test_hidden_files_and_folders_are_no_classes(tmp_path, caplog):
    make(tmp_path)
    whole = load(tmp_path)
    for name in ("train/.ipynb_checkpoints", "test/.git", "train/cat/.ipynb_checkpoints"):
        (tmp_path / name).mkdir()
        picture().save(tmp_path / name / "x.png")
    (tmp_path / "train/cat/._0.png").write_bytes(b"resource fork")
    (tmp_path / "test/Thumbs.db").write_bytes(b"")
    with caplog.at_level(logging.INFO):
        data = load(tmp_path)
    assert data.classes == ("ant", "cat") and not data.warnings
    np.testing.assert_array_equal(data.train.images, whole.train.images)
    assert "train/.ipynb_checkpoints" in caplog.text and "WARNING" not in caplog.text


@pytest.mark.parametrize("suffix", ["png", "bmp", "ppm", "webp", "gif", "tiff", "jpg", "PNG"])
def test_what_pillow_reads_is_read(suffix, tmp_path):
    make(tmp_path, suffix=suffix)
    data = load(tmp_path)
    assert len(data.train.labels) == 6
    np.testing.assert_array_equal(data.train.images[3], pixels(tmp_path / f"train/cat/0.{suffix}"))


def test_files_that_are_no_images_are_named(tmp_path, caplog):
    make(tmp_path)
    (tmp_path / "train/cat/notes.txt").write_text("of the cat")
    (tmp_path / "train/list.csv").write_text("of all")
    picture().save(tmp_path / "test/stray.png")
    data = load(tmp_path)
    assert len(data.train.labels) == 6 and len(data.test.labels) == 4
    assert "3 files are left out" in caplog.text
    assert all(name in caplog.text for name in ("train/cat/notes.txt", "train/list.csv", "test/stray.png"))


def test_a_class_without_images_is_named_and_more_than_half_refused(tmp_path, caplog):
    make(tmp_path, ("ant", "bee", "cat", "dog"))
    (tmp_path / "train/dog").rename(tmp_path / "dog")
    (tmp_path / "train/dog").mkdir()
    (tmp_path / "train/dog/0.heic").write_bytes(b"?")
    shutil.rmtree(tmp_path / "test/bee")
    data = load(tmp_path)
    expected = ("1 of 4 classes have no training image: 3 (dog)", "1 of 4 classes have no test image: 1 (bee)")
    assert data.warnings == expected and data.num_classes == 4
    assert all(text in caplog.text for text in expected) and "train/dog/0.heic" in caplog.text
    assert run.facts(data)["warnings"] == list(expected)
    for name in ("ant", "bee"):
        shutil.rmtree(tmp_path / "train" / name)
        (tmp_path / "train" / name).mkdir()
    with pytest.raises(DataError, match="3 of 4 classes have no training image; fill their folders"):
        load(tmp_path)
    (tmp_path / "test/eel").mkdir()
    with pytest.raises(DataError, match=r"test has classes that train/ lacks: eel; there: ant, bee, cat, dog"):
        load(tmp_path)


def test_images_in_folders_below_a_class_are_its_own(tmp_path):
    make(tmp_path)
    below = tmp_path / "train/cat/images/more"
    below.mkdir(parents=True)
    picture().save(below / "9.png")
    data = load(tmp_path)
    assert list(data.train.labels) == [0, 0, 0, 1, 1, 1, 1]
    np.testing.assert_array_equal(data.train.images[6], pixels(below / "9.png"))


def tiny_imagenet(root):
    """The layout of tiny-imagenet-200: val/ with a table, test/ without labels."""
    for name in ("n02", "n01"):
        (root / "train" / name / "images").mkdir(parents=True)
        (root / "train" / name / f"{name}_boxes.txt").write_text("0 0 5 5")
        for i in range(2):
            picture().save(root / "train" / name / "images" / f"{name}_{i}.png")
    for split in ("val", "test"):
        (root / split / "images").mkdir(parents=True)
        for i in range(3):
            picture().save(root / split / "images" / f"{split}_{i}.png")
    rows = [f"val_{i}.png\t{name}\t0\t0\t5\t5" for i, name in enumerate(("n02", "n01", "n02"))]
    (root / "val/val_annotations.txt").write_text("\n".join(rows) + "\n")
    return root


def test_a_table_of_labels_stands_in_place_of_class_folders(tmp_path):
    data = load(tiny_imagenet(tmp_path))
    assert data.classes == ("n01", "n02") and list(data.train.labels) == [0, 0, 1, 1]
    assert list(data.test.labels) == [0, 1, 1]
    for image, name in zip(data.test.images, ("val_1", "val_0", "val_2"), strict=True):
        np.testing.assert_array_equal(image, pixels(tmp_path / f"val/images/{name}.png"))
    table = tmp_path / "val/val_annotations.txt"
    rows = table.read_text().splitlines()
    for damaged, line in ((rows[:2] + rows[:1], 3), (["val_7.png\tn01"], 1), ([rows[0], "val_1.png"], 2)):
        table.write_text("\n".join(damaged))
        with pytest.raises(DataError, match=rf"val_annotations\.txt, line {line}: .* is not FILE<TAB>CLASS"):
            load(tmp_path)
    table.write_text("\n".join(rows))
    (tmp_path / "val/old").mkdir()
    picture().save(tmp_path / "val/old/val_1.png")
    with pytest.raises(DataError, match=r"more than one file is called val_1\.png; keep one"):
        load(tmp_path)
    table.write_bytes(b"\xff\xfe\n")
    with pytest.raises(DataError, match=r"val_annotations\.txt cannot be read"):
        load(tmp_path)


def test_the_layout_that_is_wanted_is_named(tmp_path):
    for name in ("ant", "cat"):
        (tmp_path / "train" / name).mkdir(parents=True)
        picture().save(tmp_path / "train" / name / "0.png")
    with pytest.raises(DataError, match=r"no folders train/ and test/"):
        load(tmp_path)
    (tmp_path / "val").mkdir()
    picture().save(tmp_path / "val/ILSVRC2012_val_00000001.png")
    with pytest.raises(DataError, match=r"no class folders; give val/<class>/.*val_annotations\.txt.*name='stream'"):
        load(tmp_path)
    for file, dataset in (
        ("data_batch_1.bin", "cifar10"),
        ("train_X.bin", "stl10"),
        ("cifar10.1_v6_data.npy", "cifar10_1"),
    ):
        archive = tmp_path / dataset
        archive.mkdir()
        (archive / file).write_bytes(b"")
        with pytest.raises(DataError, match=rf"prepare --dataset={dataset} "):
            load(archive)


# ---- how an image is read ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_images_are_turned_as_their_exif_orientation_says(suffix, tmp_path):
    """All eight orientations against NumPy's rotations: what a camera stored becomes what it saw."""
    make(tmp_path, ("ant",), train=1, test=1)
    shutil.rmtree(tmp_path / "train/ant")
    seen = np.zeros((16, 16, 3), np.uint8)
    seen[:8, :8], seen[:8, 8:], seen[8:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored = {  # EXIF 2.3, table 6: where row 0 and column 0 of the stored image lie in the scene
        1: seen,
        2: seen[:, ::-1],
        3: np.rot90(seen, 2),
        4: seen[::-1],
        5: seen.swapaxes(0, 1),
        6: np.rot90(seen, 1),
        7: np.rot90(seen, 2).swapaxes(0, 1),
        8: np.rot90(seen, -1),
        9: seen,  # no such orientation
    }
    options = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    for orientation, image in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for split in ("train", "test"):
            (tmp_path / split / str(orientation)).mkdir(parents=True, exist_ok=True)
            file = tmp_path / split / str(orientation) / f"0.{suffix}"
            Image.fromarray(np.ascontiguousarray(image)).save(file, exif=exif, **options)
    shutil.rmtree(tmp_path / "test/ant")
    data = load(tmp_path, size=16)
    for image in data.train.images:
        np.testing.assert_allclose(image.astype(int), seen.astype(int), atol=8)


def test_images_of_different_sizes_are_fitted_and_results_say_how(tmp_path):
    make(tmp_path, size=(12, 6))
    wide = np.zeros((6, 12, 3), np.uint8)
    wide[:, 3:9] = 200
    Image.fromarray(wide).save(tmp_path / "train/ant/0.png")
    picture((9, 20)).save(tmp_path / "train/ant/1.png")
    with pytest.raises(DataError, match=r"1\.png is \(20, 9\), .*0\.png is \(6, 12\); give data\.size=PIXELS"):
        load(tmp_path)
    crop = load(tmp_path, size=6)
    assert crop.train.images.shape[1:] == (6, 6, 3) and crop.label == f"{tmp_path.name}, centre crops of 6×6"
    np.testing.assert_array_equal(crop.train.images[0], 200)  # the middle square, unchanged
    stretched = load(tmp_path, size=6, fit="stretch", label="pets")
    assert stretched.label == "pets, stretched to 6×6"
    row = stretched.train.images[0, 0, :, 0].astype(int)
    assert row[0] < 20 and row[2] > 180 and row[3] > 180 and row[5] < 20  # the dark sides are still there
    grey = load(tmp_path, size=4, grey=True)
    assert grey.train.images.shape[1:] == (4, 4, 1)
    with pytest.raises(InputError, match=r"data\.fit='crops'.*did you mean 'crop'"):
        load(tmp_path, size=6, fit="crops")
    with pytest.raises(InputError, match=r"data\.size=0"):
        load(tmp_path, size=0)


def test_images_of_one_size_are_read_as_before(tmp_path):
    """Neither numbers nor labels of what was well-formed change."""
    make(tmp_path, ("b", "a", "B"), train=2)
    data = load(tmp_path)
    files = [tmp_path / "train" / name / f"{i}.png" for name in ("B", "a", "b") for i in range(2)]
    np.testing.assert_array_equal(data.train.images, np.stack([pixels(file) for file in files]))
    assert list(data.train.labels) == [0, 0, 1, 1, 2, 2] and data.label == tmp_path.name


def test_damage_is_named_in_one_line_or_changes_nothing(tmp_path):
    """A PNG holds checksums: every cut is refused, and every flipped bit is, or it is in no pixel."""
    make(tmp_path, train=1, test=1, size=(8, 8))
    whole, file, refused = load(tmp_path), tmp_path / "train/ant/0.png", 0
    content = file.read_bytes()
    cuts = [content[:i] for i in range(0, len(content) - 12, 7)]
    flips = [content[:i] + bytes([content[i] ^ (1 << i % 8)]) + content[i + 1 :] for i in range(len(content))]
    for damaged in cuts + flips:
        file.write_bytes(damaged)
        try:
            data = load(tmp_path)
        except DataError as error:
            assert "0.png" in str(error) and "\n" not in str(error)
            refused += 1
        else:
            np.testing.assert_array_equal(data.train.images, whole.train.images)
    assert refused > 0.9 * len(cuts + flips)


def test_what_is_no_single_image_of_8_bits_is_refused(tmp_path, monkeypatch):
    make(tmp_path)
    file = tmp_path / "train/ant/0.png"
    Image.fromarray(np.zeros((6, 6), np.uint16)).save(file)
    with pytest.raises(DataError, match=r"0\.png has more than 8 bits a channel"):
        load(tmp_path)
    file.unlink()
    file = file.with_suffix(".gif")
    picture().save(file, save_all=True, append_images=[picture(), picture()])
    with pytest.raises(DataError, match=r"0\.gif has 3 frames; keep one"):
        load(tmp_path)
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n")  # Pillow would run Ghostscript on it
    with pytest.raises(DataError, match=r"0\.gif is not a readable image"):
        load(tmp_path)
    file.unlink()
    for limit in (30, 20):  # at more than once Pillow's limit it warns, at more than twice it raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match=r"(1\.png|0\.png).*(pixels)"):
            load(tmp_path)


# ---- read once, and again where a file has changed --------------------------------------------------------------


def test_changed_folders_are_read_again(tmp_path, monkeypatch):
    make(tmp_path / "a")
    settings = config.base()
    settings.data = dict(name="folder", path=str(tmp_path / "a"), val_size=0, split_seed=0)
    first = run.load_data(settings)
    assert run.load_data(settings) is first
    image = np.array(first.train.images[0])
    image[0, 0] ^= 1
    Image.fromarray(image).save(tmp_path / "a/train/ant/0.png")
    second = run.load_data(settings)
    np.testing.assert_array_equal(second.train.images[0], image)
    picture().save(tmp_path / "a/test/cat/new.png")
    third = run.load_data(settings)
    assert len(third.test.labels) == 5 and run.load_data(settings) is third
    make(tmp_path / "elsewhere/a", train=1)
    settings.data.path = "a"
    monkeypatch.chdir(tmp_path)
    assert len(run.load_data(settings).train.labels) == 6
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(run.load_data(settings).train.labels) == 2
