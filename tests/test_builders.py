"""Builders: archives in the official formats become TFDS data sets, without TensorFlow, whole or not at all."""

import gzip
import hashlib
import io
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from ibjax.data import archives, builders, load_splits, prepare, tfds
from ibjax.data.builders import Contents, cifar, cifar10_1, cifar_c, mnist, stl10
from ibjax.errors import DataError

RNG = np.random.default_rng(0)
FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist


def images(n, size=32, channels=3):
    return RNG.integers(0, 256, (n, size, size, channels), dtype=np.uint8)


def write_tar(path, members, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def cifar_records(x, *label_columns):
    """The binary format, byte by byte as its page describes it."""
    rows = []
    for i, image in enumerate(x):
        planes = b"".join(image[:, :, channel].tobytes() for channel in range(3))
        rows.append(bytes(int(column[i]) for column in label_columns) + planes)
    return b"".join(rows)


def make_cifar10(folder, classes=tuple(f"class{i}" for i in range(10))):
    x, y = images(60), np.arange(60) % 10
    members = {"batches.meta.txt": "\n".join(classes).encode() + b"\n\n"}
    for i in range(5):
        members[f"data_batch_{i + 1}.bin"] = cifar_records(x[10 * i : 10 * i + 10], y[10 * i : 10 * i + 10])
    members["test_batch.bin"] = cifar_records(x[50:], y[50:])
    write_tar(folder / "cifar-10-binary.tar.gz", {f"cifar-10-batches-bin/{k}": v for k, v in members.items()})
    return {"train": (x[:50], y[:50]), "test": (x[50:], y[50:])}


def make_cifar100(folder):
    x, fine = images(120), np.arange(120) % 100
    coarse = fine // 5
    members = {
        "coarse_label_names.txt": b"\n".join(b"coarse%d" % i for i in range(20)),
        "fine_label_names.txt": b"\n".join(b"fine%d" % i for i in range(100)),
        "train.bin": cifar_records(x[:100], coarse, fine),
        "test.bin": cifar_records(x[100:], coarse[100:], fine[100:]),
    }
    write_tar(folder / "cifar-100-binary.tar.gz", {f"cifar-100-binary/{k}": v for k, v in members.items()})
    return {"train": (x[:100], fine[:100]), "test": (x[100:], fine[100:])}


def make_mnist(folder):
    splits = {}
    for split, prefix, n in (("train", "train", 40), ("test", "t10k", 20)):
        x, y = images(n, 28, 1), np.arange(n) % 10
        pictures = struct.pack(">IIII", 0x803, n, 28, 28) + x.tobytes()
        labels = struct.pack(">II", 0x801, n) + y.astype(np.uint8).tobytes()
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(pictures))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)  # uncompressed will do
        splits[split] = x, y
    return splits


def make_svhn(folder):
    splits = {}
    for split, n in (("train", 30), ("test", 20)):
        x, y = images(n), np.arange(n) % 10
        mat = {"X": x.transpose(1, 2, 3, 0), "y": np.where(y == 0, 10, y).astype(np.uint8)[:, None]}
        scipy.io.savemat(folder / f"{split}_32x32.mat", mat)
        splits[split] = x, y
    return splits


def jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue(), np.asarray(Image.open(file).convert("RGB"))


def make_tiny_imagenet(folder):
    ids, root = ["n02", "n01", "n03"], "tiny-imagenet-200"  # not sorted, as in the original
    members, train, test = {}, [], []
    for label, wordnet_id in enumerate(sorted(ids)):
        for i in range(12):  # numbers, not text: 10 comes after 9
            image = Image.fromarray(images(1, 64)[0])
            content, pixels = jpeg(image.convert("L") if i == 1 else image)
            members[f"{root}/train/{wordnet_id}/images/{wordnet_id}_{i}.JPEG"] = content
            train.append((pixels, label))
    annotations = []
    for i, wordnet_id in enumerate(["n03", "n01", "n02", "n01"]):
        members[f"{root}/val/images/val_{i}.JPEG"], pixels = jpeg(Image.fromarray(images(1, 64)[0]))
        annotations.append(f"val_{i}.JPEG\t{wordnet_id}\t0\t0\t62\t62")
        test.append((pixels, sorted(ids).index(wordnet_id)))
    members[f"{root}/wnids.txt"] = "\n".join(ids).encode()
    members[f"{root}/words.txt"] = b"n01\tfirst, one\nn02\tsecond\nn03\tthird\nn99\tnone"
    members[f"{root}/val/val_annotations.txt"] = "\n".join(annotations).encode()
    with zipfile.ZipFile(folder / f"{root}.zip", "w") as archive:
        for name, content in sorted(members.items(), key=lambda item: hash(item[0])):
            archive.writestr(name, content)
    return {name: tuple(map(np.array, zip(*part, strict=True))) for name, part in (("train", train), ("test", test))}


def make_cifar_c(folder, name="CIFAR-10-C", num_classes=10, corruptions=("fog", "frost")):
    labels = np.tile(np.arange(20) % num_classes, 5)
    splits = {corruption: (images(100), labels) for corruption in corruptions}
    arrays = {corruption: x for corruption, (x, _) in splits.items()} | {"labels": labels.astype(np.uint8)}
    members = {}
    for key, array in arrays.items():
        file = io.BytesIO()
        np.save(file, array)
        members[f"{name}/{key}.npy"] = file.getvalue()
    write_tar(folder / f"{name}.tar", members, "w")
    return splits


def make_stl10(folder):
    members, splits = {"class_names.txt": b"airplane\nbird\ncar\n"}, {}
    for split, n in (("train", 6), ("test", 9)):
        x, y = images(n, 96), np.arange(n) % 3
        members[f"{split}_X.bin"] = b"".join(x[i, :, :, c].T.tobytes() for i in range(n) for c in range(3))
        members[f"{split}_y.bin"] = np.uint8(y + 1).tobytes()
        splits[split] = x, y
    members |= {"unlabeled_X.bin": images(1, 96).tobytes(), "fold_indices.txt": b"0 1 2"}
    write_tar(folder / "stl10_binary.tar.gz", {f"stl10_binary/{k}": v for k, v in members.items()})
    return splits


def make_cifar10_1(folder, version="v6"):
    x, y = images(20), np.arange(20) % 10
    np.save(folder / f"cifar10.1_{version}_data.npy", x)
    np.save(folder / f"cifar10.1_{version}_labels.npy", y)
    return x, y


MAKERS = {
    "cifar10": make_cifar10,
    "cifar100": make_cifar100,
    "mnist": make_mnist,
    "fashion_mnist": make_mnist,
    "svhn_cropped": make_svhn,
    "stl10": make_stl10,
    "tiny_imagenet": make_tiny_imagenet,
}


@pytest.mark.parametrize("name", MAKERS)
def test_archives_become_data_sets_pixel_by_pixel_in_their_order(name, tmp_path):
    splits = MAKERS[name](tmp_path)
    folder = prepare.prepare(name, tmp_path / "tfds", tmp_path, unverified=True)
    assert folder.is_dir() and sorted(p.name for p in (tmp_path / "tfds").iterdir()) == [name]
    data = load_splits(tfds.load, val_size=0, dataset=name, data_dir=str(tmp_path / "tfds"))
    assert data.label == f"{prepare.RECIPES[name].label} (unofficial archive)"
    for split, (x, y) in splits.items():
        np.testing.assert_array_equal(getattr(data, split).images, x)
        np.testing.assert_array_equal(getattr(data, split).labels, y)
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert prepare.prepare(name, tmp_path / "tfds", tmp_path / "nowhere") == folder  # again: nothing to do
    assert before == {p: p.stat().st_mtime_ns for p in folder.iterdir()}


@pytest.mark.parametrize("num_classes", [10, 100])
def test_corrupted_cifar_has_one_split_for_each_corruption(num_classes, tmp_path):
    splits = make_cifar_c(tmp_path, f"CIFAR-{num_classes}-C", num_classes)
    prepare.prepare(f"cifar{num_classes}_c", tmp_path, tmp_path, unverified=True)
    stored = tfds.find(f"cifar{num_classes}_c", str(tmp_path))
    assert stored.counts == {"fog": 100, "frost": 100} and stored.num_classes == num_classes
    third = tfds.read(stored, "fog", 40, 60)
    np.testing.assert_array_equal(third.images, splits["fog"][0][40:60])
    np.testing.assert_array_equal(third.labels, splits["fog"][1][40:60])
    with pytest.raises(DataError, match=r"test set only.*ibjax\.analysis\.corruptions"):
        tfds.load(dataset=f"cifar{num_classes}_c", data_dir=str(tmp_path))


@pytest.mark.parametrize("version", ["v4", "v6"])
def test_a_second_test_set_takes_the_place_of_the_first(version, tmp_path):
    splits, (x, y) = make_cifar10(tmp_path, cifar10_1._CLASSES), make_cifar10_1(tmp_path, version)
    name = {"v4": "cifar10_1_v4", "v6": "cifar10_1"}[version]
    for dataset in ("cifar10", name):
        prepare.prepare(dataset, tmp_path, tmp_path, unverified=True)
    stock = dict(dataset="cifar10", data_dir=str(tmp_path))
    data = load_splits(tfds.load, val_size=10, **stock, test=name)
    np.testing.assert_array_equal(data.test.images, x)
    np.testing.assert_array_equal(data.test.labels, y)
    assert len(data.train.labels) == 40 and data.val is not None
    assert data.label.startswith("CIFAR-10 (unofficial archive), tested on CIFAR-10.1")
    whole = load_splits(tfds.load, val_size=0, **stock)
    np.testing.assert_array_equal(whole.test.images, splits["test"][0])
    with pytest.raises(DataError, match=r"has splits test; needed: train.*test='cifar10_1'"):
        tfds.load(dataset=name, data_dir=str(tmp_path))
    make_mnist(tmp_path)
    prepare.prepare("mnist", tmp_path, tmp_path, unverified=True)
    with pytest.raises(DataError, match=r"mnist\S+ has shape \(28, 28, 1\), \S+cifar10\S+ \(32, 32, 3\)"):
        tfds.load(**stock, test="mnist")
    make_cifar10(tmp_path)  # other classes
    shutil.rmtree(tmp_path / "cifar10")
    prepare.prepare("cifar10", tmp_path, tmp_path, unverified=True)
    with pytest.raises(DataError, match=r"classes airplane, .*, \S+cifar10\S+ class0, class1"):
        tfds.load(**stock, test=name)


def test_arrays_that_do_not_belong_together_are_refused(tmp_path):
    make_cifar10_1(tmp_path)
    data, labels = (tmp_path / f"cifar10.1_v6_{part}.npy" for part in ("data", "labels"))
    np.save(labels, np.arange(19) % 10)
    with pytest.raises(DataError, match=r"data\.npy holds uint8\[20, 32, 32, 3\], \S+labels\.npy int64\[19\]"):
        cifar10_1.CIFAR10_1.read([data, labels])
    content = bytearray(data.read_bytes())
    content[8] -= 4  # a header that is four bytes shorter means other pixels
    data.write_bytes(content)
    with pytest.raises(DataError, match=r"data\.npy is no array of numbers \(4 bytes are left over\)"):
        cifar10_1.CIFAR10_1.read([data, labels])
    members = {"class_names.txt": b"a b", "train_X.bin": b"x" * 27648, "train_y.bin": b"\x03"}
    members |= {"test_X.bin": b"x" * 27648, "test_y.bin": b"\x01"}
    write_tar(tmp_path / "a.tar.gz", {f"stl10_binary/{name}": content for name, content in members.items()})
    with pytest.raises(DataError, match=r"27648 bytes of pixels and 1 labels are not .* of classes 1 to 2"):
        stl10.STL10.read([tmp_path / "a.tar.gz"])


def test_classes_carry_their_names(tmp_path):
    make_cifar100(tmp_path)
    contents = cifar.CIFAR100.read([tmp_path / "cifar-100-binary.tar.gz"])
    assert contents.classes[7] == "fine7" and len(contents.classes) == 100
    make_tiny_imagenet(tmp_path)
    tiny = prepare.RECIPES["tiny_imagenet"].read([tmp_path / "tiny-imagenet-200.zip"])
    assert tiny.classes == ("n01 first", "n02 second", "n03 third")


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian_is_the_official_one(tmp_path):
    for archive in mnist.FASHION_MNIST.archives:
        path = archives.find(archive, FASHION)
        assert archives.verify(archive, path)[1]
    contents = mnist.FASHION_MNIST.read([archives.find(a, FASHION) for a in mnist.FASHION_MNIST.archives])
    labels = np.array([label for _, label in contents.splits["test"]])
    assert contents.shape == (28, 28, 1) and np.bincount(labels).tolist() == [1000] * 10


# ---- what is refused ----------------------------------------------------------------------------------------


def test_an_archive_with_another_digest_is_refused(tmp_path):
    make_cifar10(tmp_path)
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz has sha256 .*--unverified") as caught:
        prepare.prepare("cifar10", tmp_path / "tfds", tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "tfds").exists()


def test_the_right_digest_passes_compressed_or_not(tmp_path):
    content = b"the official content"
    digest = f"md5:{hashlib.md5(content).hexdigest()}"
    (tmp_path / "a.gz").write_bytes(gzip.compress(content, mtime=1))
    (tmp_path / "b").write_bytes(content)
    for archive in (
        archives.Archive("a.gz", "", digest, content=True),
        archives.Archive("b.gz", "", digest, content=True),
        archives.Archive("b", "", digest),
    ):
        assert archives.verify(archive, archives.find(archive, tmp_path)) == (digest, True)


def test_a_missing_archive_is_named_with_its_address(tmp_path):
    for name, recipe in prepare.RECIPES.items():
        with pytest.raises(DataError) as caught:
            prepare.prepare(name, tmp_path)
        assert recipe.archives[0].name in str(caught.value) and recipe.archives[0].url in str(caught.value)
    with pytest.raises(DataError, match="did you mean 'cifar10'"):
        prepare.prepare("cifar-10", tmp_path)
    with pytest.raises(DataError, match=r"tfds build imagenet2012"):
        prepare.prepare("imagenet2012", tmp_path)


def test_download_leaves_whole_files_only(tmp_path):
    (tmp_path / "server").mkdir()
    source = tmp_path / "server" / "a.bin"
    source.write_bytes(b"x" * 3000)
    archive = archives.Archive("a.bin", source.as_uri(), "md5:0")
    assert archives.find(archive, tmp_path / "here", download=True).read_bytes() == source.read_bytes()
    gone = archives.Archive("b.bin", (tmp_path / "server" / "b.bin").as_uri(), "md5:0")
    with pytest.raises(DataError, match="cannot be downloaded"):
        archives.find(gone, tmp_path / "here", download=True)
    assert not (tmp_path / "here" / "b.bin").exists()


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "..\\evil", "C:\\evil"])
def test_a_member_that_points_outside_the_archive_is_refused(name, tmp_path):
    write_tar(tmp_path / "a.tar", {name: b"evil"}, "w")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, b"evil")
    with pytest.raises(DataError, match="outside of it"):
        list(archives.read_tar(tmp_path / "a.tar", lambda name: True))
    with pytest.raises(DataError, match="outside of it"), archives.opened_zip(tmp_path / "a.zip"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "a.zip"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(kind, tmp_path):
    info = tarfile.TarInfo("test_batch.bin")
    info.type, info.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(info)
    with pytest.raises(DataError, match="link or device"):
        archives.read_members(tmp_path / "a.tar", ["test_batch.bin"])


def test_npy_with_objects_is_never_unpickled(tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (marker.touch, ())

    evil, labels = io.BytesIO(), io.BytesIO()
    np.save(evil, np.array([Evil()] * 5, dtype=object), allow_pickle=True)
    np.save(labels, np.arange(5))
    write_tar(tmp_path / "a.tar", {"fog.npy": evil.getvalue(), "labels.npy": labels.getvalue()}, "w")
    contents = cifar_c.CIFAR10_C.read([tmp_path / "a.tar"])
    with pytest.raises(DataError, match=r"fog\.npy.*no array of numbers"):
        list(contents.splits["fog"])
    write_tar(tmp_path / "b.tar", {"fog.npy": labels.getvalue(), "labels.npy": evil.getvalue()}, "w")
    with pytest.raises(DataError, match=r"labels\.npy.*no array of numbers"):
        cifar_c.CIFAR10_C.read([tmp_path / "b.tar"])
    assert not marker.exists()


@pytest.mark.parametrize("name", [*MAKERS, "cifar10_c"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "junk"])
def test_damaged_archives_are_named_in_one_line(name, damage, tmp_path):
    MAKERS.get(name, make_cifar_c)(tmp_path)
    path = archives.find(prepare.RECIPES[name].archives[0], tmp_path)
    whole = path.read_bytes()
    half = len(whole) // 2
    path.write_bytes(
        {
            "truncated": whole[:half],
            "flipped": whole[:half] + bytes(255 - b for b in whole[half : half + 2000]) + whole[half + 2000 :],
            "empty": b"",
            "junk": RNG.bytes(5000),
        }[damage]
    )
    try:
        prepare.prepare(name, tmp_path / "tfds", tmp_path, unverified=True)
    except DataError as error:  # whatever else escapes fails the test
        assert path.name in str(error) and "\n" not in str(error)
        assert not builders.folder(name, tmp_path / "tfds").exists()
    else:  # pixels of an uncompressed archive: only the digest can tell
        assert damage == "flipped" and name in ("cifar10_c", "tiny_imagenet", "svhn_cropped")


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(splits={"train": [(images(1)[0], 10)]}), "has label 10 of 10"),
        (dict(splits={"train": [(images(1, 31)[0], 1)]}), r"uint8 \(31, 31, 3\)"),
        (dict(splits={"train": [(images(1)[0] / 255, 1)]}), "float64"),
    ],
)
def test_wrong_contents_leave_nothing_behind(change, words, tmp_path):
    contents = Contents((32, 32, 3), tuple("abcdefghij"), {})._replace(**change)
    with pytest.raises(DataError, match=words):
        builders.write("cifar10", contents, tmp_path, {})
    assert not any((tmp_path / "cifar10").iterdir())


def test_a_failure_in_the_middle_leaves_nothing_and_can_be_repeated(tmp_path):
    good = [(image, i % 10) for i, image in enumerate(images(20))]

    def failing():
        yield from good
        raise OSError("disk")

    contents = Contents((32, 32, 3), tuple("abcdefghij"), {"train": failing(), "test": good})
    with pytest.raises(OSError, match="disk"):
        builders.write("cifar10", contents, tmp_path, {})
    assert not builders.folder("cifar10", tmp_path).exists()
    builders.write("cifar10", contents._replace(splits={"train": good, "test": good}), tmp_path, {"label": "x"})
    assert tfds.find("cifar10", str(tmp_path)).counts == {"train": 20, "test": 20}


def test_the_command_prints_one_line_and_a_code(tmp_path, monkeypatch, capsys):
    arguments = ["prepare", "--dataset=cifar10", f"--archives={tmp_path}", f"--data_dir={tmp_path / 'tfds'}"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as caught:
        prepare.main()
    message = capsys.readouterr().err.strip()
    assert caught.value.code == 2 and message.startswith("error: ") and "\n" not in message
    make_cifar10(tmp_path)
    monkeypatch.setattr("sys.argv", [*arguments, "--unverified", "--label=CIFAR-10 (noise)"])
    with pytest.raises(SystemExit) as caught:
        prepare.main()
    assert caught.value.code == 0
    assert "CIFAR-10 (noise), 50 train, 10 test" in capsys.readouterr().err
    assert tfds.find("cifar10", str(tmp_path / "tfds")).label == "CIFAR-10 (noise)"


def test_no_wrong_byte_of_an_archive_ends_in_a_traceback(tmp_path):
    """A zip shows the most places where its reader raises something else than it should."""
    make_tiny_imagenet(tmp_path)
    path = tmp_path / "tiny-imagenet-200.zip"
    content = path.read_bytes()
    index = content.rindex(b"PK\x01\x02", 0, len(content) - 3000)  # the entry of a member, then more of them
    places = [*range(index, index + 60), *range(len(content) - 22, len(content), 2)]
    damaged = [content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :] for at in places]
    refused = 0
    for archive in damaged:
        path.write_bytes(archive)
        try:
            contents = prepare.RECIPES["tiny_imagenet"].read([path])
            _ = [list(split) for split in contents.splits.values()]
        except DataError as error:
            assert path.name in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > len(damaged) / 3
