"""Decoded images of class folders: kept, and never served where anything that they depend on has changed."""

import logging
import os
import time

import numpy as np
import pytest
from PIL import Image

from ibjax.data import decoded, folder

FILES = [f"{split}/{name}/{i}.png" for split in ("train", "test") for name in ("ant", "cat") for i in range(3)]


def paint(file, seed):
    """A random image of 6×6; PNG does not compress noise, so that all these files have one size."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """(the folder of images, the list of those that are decoded from now on, a function that loads them)."""
    root, seen = tmp_path / "pictures", []
    for seed, name in enumerate(FILES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        paint(root / name, seed)
    image = folder._image

    def counted(file, *options):
        seen.append(file.name)
        return image(file, *options)

    monkeypatch.setattr(folder, "_image", counted)
    monkeypatch.setattr(decoded, "_WORTH", 2)
    monkeypatch.setattr(decoded, "_SETTLED", 0)

    def load(**options):
        return folder.load(path=str(root), **{"cache": str(tmp_path / "kept"), **options})

    return root, seen, load


def same(one, other):
    for name in ("train", "test"):
        np.testing.assert_array_equal(getattr(one, name).images, getattr(other, name).images)
        np.testing.assert_array_equal(getattr(one, name).labels, getattr(other, name).labels)


def rewrite(root):
    """Another image of the same size under the same name, with the old time of modification."""
    file = root / FILES[0]
    before = file.stat()
    paint(file, 99)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)


def rename(root):
    (root / FILES[0]).rename(root / "train/ant/9.png")


def swap(root):
    """Two images of one class under each other's name: neither content nor size nor modification is another."""
    one, other = root / FILES[0], root / FILES[1]
    one.rename(root / "kept")
    other.rename(one)
    (root / "kept").rename(other)


CHANGES = {
    "changed": rewrite,
    "added": lambda root: paint(root / "test/cat/3.png", 99),
    "removed": lambda root: (root / FILES[0]).unlink(),
    "renamed": rename,
    "swapped": swap,
    "of another class": lambda root: (root / FILES[0]).rename(root / "train/cat/0a.png"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_added_removed_or_renamed_file_is_never_served_from_before(what, pictures):
    root, seen, load = pictures
    first, again = load(), load()
    assert len(seen) == len(FILES)  # at the first call, and never since
    same(first, again)
    time.sleep(0.02)  # longer than one tick of the file system's clock
    CHANGES[what](root)
    seen.clear()
    changed = load()
    same(changed, load(cache=""))
    assert len(seen) == 2 * (len(changed.train.labels) + len(changed.test.labels))  # by both
    assert changed.train.images.shape != first.train.images.shape or not np.array_equal(
        np.concatenate([changed.train.images, changed.test.images]),
        np.concatenate([first.train.images, first.test.images]),
    )


def test_each_set_of_options_has_a_file_and_takes_no_other(pictures, tmp_path, monkeypatch):
    _, seen, load = pictures
    options = [{}, {"grey": True}, {"size": 4}, {"size": 4, "fit": "stretch"}]
    for given in options * 2:
        same(load(**given), load(**given, cache=""))
    assert len(seen) == len(FILES) * len(options) * 3  # without the file twice, with it once
    assert len(list((tmp_path / "kept").iterdir())) == len(options)
    monkeypatch.setattr(Image, "__version__", "0.0")
    seen.clear()
    load()
    assert len(seen) == len(FILES)  # another version may decode otherwise


def cut(content, other):
    return content[:-100]


def flip(content, other):
    half = len(content) // 2
    return content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]


DAMAGES = {
    "truncated": cut,
    "flipped": flip,
    "foreign": lambda content, other: b"something else",
    "empty": lambda content, other: b"",
    "of another folder": lambda content, other: other,
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_truncated_or_foreign_file_is_decoded_again(what, pictures, tmp_path, caplog):
    _, seen, load = pictures
    right = load()
    (file,) = (tmp_path / "kept").iterdir()
    load(grey=True)
    (other,) = {*(tmp_path / "kept").iterdir()} - {file}
    file.write_bytes(DAMAGES[what](file.read_bytes(), other.read_bytes()))
    seen.clear()
    caplog.clear()
    same(load(), right)
    told = [record.getMessage() for record in caplog.records if str(file) in record.getMessage()]
    assert len(told) == (what != "of another folder") and not any("\n" in text for text in told)
    assert len(seen) == len(FILES)
    same(load(), right)  # it was written anew
    assert len(seen) == len(FILES)


def test_where_nothing_can_be_written_nothing_is_kept_and_the_images_are_the_same(pictures, tmp_path, caplog):
    _, seen, load = pictures
    right = load(cache="")
    (tmp_path / "file").touch()
    with caplog.at_level(logging.INFO):
        same(load(cache=str(tmp_path / "file" / "below")), right)
    assert "decoded images are not kept" in caplog.text and len(seen) == 2 * len(FILES)
    assert not (tmp_path / "kept").exists()


def test_a_file_that_was_written_just_now_is_not_kept(pictures, tmp_path, monkeypatch):
    _, seen, load = pictures
    monkeypatch.setattr(decoded, "_SETTLED", 3600 * 10**9)  # it could change within the resolution of its time
    same(load(), load())
    assert len(seen) == 2 * len(FILES) and not (tmp_path / "kept").exists()
