"""TFDS by name: read without TensorFlow, our own data sets and stock ones, damaged ones named."""

import io
import itertools
import json
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
from conftest import smoke_config
from PIL import Image

from ibjax import config, main
from ibjax.data import Split, builders, check, load_splits, part, stream, synthetic, tfds, tfrecord
from ibjax.data.builders import Contents
from ibjax.devices import cluster
from ibjax.errors import DataError, InputError, PreemptedError
from ibjax.runs import run, trees
from ibjax.training import loop
from ibjax.training.experiment import build

RNG = np.random.default_rng(0)
CLASSES = tuple("abcdefghij")


def examples(n, size=32):
    return RNG.integers(0, 256, (n, size, size, 3), dtype=np.uint8), np.arange(n) % 10


def make(data_dir, name="cifar10", n=80):
    """One of our own data sets; returns its splits."""
    splits = {"train": examples(n), "test": examples(20)}
    contents = Contents((32, 32, 3), CLASSES, {split: zip(*part, strict=True) for split, part in splits.items()})
    builders.write(name, contents, data_dir, {"label": "noise"})
    return splits


def png(image, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    file.seek(0)
    return file


def make_stock(data_dir, name, splits, shape=(32, 32, 3), ids=False, kind="PNG"):
    """As TFDS's own builders do: encoded images, records shuffled, perhaps with ids."""
    import tensorflow_datasets as catalogue

    class Stock(catalogue.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = catalogue.core.Version("3.0.2")

        def _info(self):
            features = {
                "image": catalogue.features.Image(shape=shape, encoding_format=kind.lower()),
                "label": catalogue.features.ClassLabel(num_classes=10),
            }
            if ids:
                features["id"] = catalogue.features.Text()
            features = catalogue.features.FeaturesDict(features)
            return catalogue.core.DatasetInfo(builder=self, features=features, supervised_keys=("image", "label"))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            for i, (image, label) in enumerate(zip(*splits[split], strict=True)):
                extra = {"id": f"{split}_{i:05d}"} if ids else {}
                yield str(i), {"image": png(image, kind), "label": int(label), **extra}

    Stock.name = name
    Stock(data_dir=str(data_dir), file_format="array_record").download_and_prepare()
    return data_dir / name / "3.0.2"


def to_tfrecord(folder):
    """Rewrites a data set's shards as TFRecord files, with a CRC-32C of its own, bit by bit."""
    from array_record.python.array_record_module import ArrayRecordReader

    for shard in list(folder.glob("*.array_record-*")):
        reader = ArrayRecordReader(str(shard))
        content = b""
        for record in reader.read_all():
            length = struct.pack("<Q", len(record))
            content += length + struct.pack("<I", slow_masked(length)) + record + struct.pack("<I", slow_masked(record))
        reader.close()
        shard.with_name(shard.name.replace("array_record", "tfrecord")).write_bytes(content)
        shard.unlink()
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))


def slow_crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def slow_masked(data):
    crc = slow_crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# ---- reading ------------------------------------------------------------------------------------------------


def test_a_configuration_loads_a_data_set_by_name(tmp_path):
    splits = make(tmp_path)
    settings = config.base()
    settings.data = dict(name="tfds", dataset="cifar10", data_dir=str(tmp_path), val_size=20, split_seed=0)
    config.check(settings)
    config.complete(settings)
    data = run.load_data(settings)
    assert (len(data.train.labels), len(data.val.labels), data.num_classes, data.label) == (60, 20, 10, "noise")
    np.testing.assert_array_equal(data.test.images, splits["test"][0])
    assert settings.data.fraction == 1.0 and settings.data.label == ""


NO_TENSORFLOW = """
import builtins, importlib, importlib.machinery, sys
asked, find = [], importlib.machinery.PathFinder.find_spec
def absent(name, *args, **options):  # as where it is not installed
    return None if name.split(".")[0] == "tensorflow" else find(name, *args, **options)
importlib.machinery.PathFinder.find_spec = absent
def watched(call):
    def importing(name, *args, **options):
        if name.split(".")[0] == "tensorflow": asked.append(name)
        return call(name, *args, **options)
    return importing
builtins.__import__, importlib.import_module = watched(builtins.__import__), watched(importlib.import_module)

import numpy as np
from pathlib import Path
from ibjax.data import builders, load_splits, tfds
image = np.arange(3072, dtype=np.uint8).reshape(32, 32, 3)
split = [(image, 0), (image, 1)]
contents = builders.Contents((32, 32, 3), ("a", "b"), {"train": split, "test": split})
builders.write("cifar10", contents, Path(sys.argv[1]), {})
load_splits(tfds.load, val_size=0, dataset="cifar10", data_dir=sys.argv[1])
load_splits(tfds.load, val_size=0, dataset="stock", data_dir=sys.argv[2])
load_splits(tfds.load, val_size=0, dataset="records", data_dir=sys.argv[2])
print(asked, [name for name in sys.modules if name.split(".")[0] == "tensorflow"])
"""


def test_tensorflow_is_never_imported(tmp_path):
    """Neither on building nor on reading, of our own, stock and TFRecord data sets."""
    make_stock(tmp_path / "stock", "stock", {"train": examples(10), "test": examples(5)})
    to_tfrecord(make_stock(tmp_path / "stock", "records", {"train": examples(10), "test": examples(5)}))
    command = [sys.executable, "-c", NO_TENSORFLOW, str(tmp_path / "own"), str(tmp_path / "stock")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "[] []"


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("records", ["array_record", "tfrecord"])
def test_a_stock_copy_is_read_as_it_is(ids, records, tmp_path):
    splits = {"train": examples(60), "test": examples(30)}
    folder = make_stock(tmp_path, "cifar10", splits, ids=ids)
    if records == "tfrecord":
        to_tfrecord(folder)
    data = tfds.load(dataset="cifar10", data_dir=str(tmp_path))
    assert data.label == "CIFAR-10" and data.num_classes == 10 and data.val is None
    for split, (x, y) in splits.items():
        read = getattr(data, split)
        if not ids:  # TFDS has shuffled them
            order = [[np.array_equal(image, other) for other in x].index(True) for image in read.images]
            assert sorted(order) == list(range(len(x))) and order != list(range(len(x)))
            x, y = x[order], y[order]
        np.testing.assert_array_equal(read.images, x)
        np.testing.assert_array_equal(read.labels, y)


def test_the_newest_version_and_the_splits_that_there_are(tmp_path, monkeypatch):
    splits = {"train": examples(20), "validation": examples(10)}
    make_stock(tmp_path, "cifar10", splits, ids=True)
    make(tmp_path)  # version 1.0.0, older than 3.0.2
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    data = load_splits(tfds.load, val_size=0, dataset="cifar10")
    np.testing.assert_array_equal(data.test.images, splits["validation"][0])  # no test split: this is it
    assert data.val is None
    make_stock(tmp_path, "three", {**splits, "test": examples(10)}, ids=True)
    three = load_splits(tfds.load, val_size=0, dataset="three")
    np.testing.assert_array_equal(three.val.images, splits["validation"][0])
    make_stock(tmp_path, "one", {"train": examples(10)})
    with pytest.raises(DataError, match="needed: train, and test or validation"):
        tfds.load(dataset="one")


def test_a_missing_data_set_says_what_to_run(tmp_path):
    with pytest.raises(DataError, match=r"has no svhn_cropped; make it: python -m ibjax\.data\.prepare --dataset=svhn"):
        tfds.load(dataset="svhn_cropped", data_dir=str(tmp_path))
    with pytest.raises(DataError, match=r"tfds build imagenet2012"):
        tfds.load(dataset="imagenet2012", data_dir=str(tmp_path))
    with pytest.raises(DataError, match=r"test set only"):
        tfds.load(dataset="cifar10_c", data_dir=str(tmp_path))


# ---- faults -------------------------------------------------------------------------------------------------


def mutations(content):
    middle = len(content) // 2
    yield "truncated", content[:middle]
    yield "emptied", b""
    yield "deleted", None
    for at in (middle, len(content) // 3, 2 * len(content) // 3, 40, len(content) - 20):
        yield f"flipped at {at}", content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]
    yield "tail lost", content[:-3]


@pytest.mark.parametrize("records", ["array_record", "tfrecord"])
def test_a_damaged_shard_is_named_with_how_to_make_it_again_or_unharmed(records, tmp_path):
    make(tmp_path, n=200)
    folder = builders.folder("cifar10", tmp_path)
    if records == "tfrecord":
        to_tfrecord(folder)
    whole = tfds.load(dataset="cifar10", data_dir=str(tmp_path))
    shard = next(folder.glob("cifar10-train*"))
    content, named = shard.read_bytes(), 0
    for what, damaged in mutations(content):
        shard.write_bytes(damaged) if damaged is not None else shard.unlink()
        try:
            data = tfds.load(dataset="cifar10", data_dir=str(tmp_path))
        except DataError as error:
            assert shard.name in str(error) and "\n" not in str(error), what
            assert f"delete {folder} and make it again: python -m ibjax.data.prepare" in str(error)
            named += 1
        else:  # the byte is padding
            assert records == "array_record" and what.startswith("flipped"), what
            np.testing.assert_array_equal(data.train.images, whole.train.images)
            np.testing.assert_array_equal(data.train.labels, whole.train.labels)
        shard.write_bytes(content)
    assert named >= 7


DESCRIPTION = ("dataset_info.json", "features.json", "metadata.json", "label.labels.txt")


@pytest.mark.parametrize("file", DESCRIPTION)
def test_a_damaged_description_is_named(file, tmp_path):
    """Cut or with a wrong bit: refused, or all that it says is what it was."""
    make(tmp_path, n=20)
    path = builders.folder("cifar10", tmp_path) / file
    whole, content = tfds.load(dataset="cifar10", data_dir=str(tmp_path)), path.read_bytes()
    assert whole.label == "noise"
    step = max(1, len(content) // 40)
    cuts = [content[:i] for i in range(0, len(content) - 3, step)]
    flips = [content[:i] + bytes([content[i] ^ 1 << i % 7]) + content[i + 1 :] for i in range(0, len(content), step)]
    refused = 0
    for damaged in (*cuts, *flips, b"{}"):
        path.write_bytes(damaged)
        try:
            data = tfds.load(dataset="cifar10", data_dir=str(tmp_path))
        except DataError as error:
            assert "cifar10/1.0.0" in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert (data.label, data.classes) == (whole.label, whole.classes)
            np.testing.assert_array_equal(data.train.images, whole.train.images)
            np.testing.assert_array_equal(data.train.labels, whole.train.labels)
    assert refused > 0.8 * len(cuts + flips)


def test_a_data_set_of_an_earlier_version_keeps_its_name(tmp_path):
    """Its metadata.json has no digest; without its label it would count as the official data set."""
    make(tmp_path)
    path = builders.folder("cifar10", tmp_path) / "metadata.json"
    path.write_text(json.dumps({"label": "CIFAR-10 (JPEG)", "archives": {}}))
    assert tfds.load(dataset="cifar10", data_dir=str(tmp_path)).label == "CIFAR-10 (JPEG)"
    path.write_text(json.dumps({"labem": "CIFAR-10 (JPEG)", "archives": {}}))
    with pytest.raises(DataError, match=r"metadata\.json or the names of the classes are not as they were written"):
        tfds.load(dataset="cifar10", data_dir=str(tmp_path))
    path.unlink()
    with pytest.raises(DataError, match=r"metadata\.json or the names of the classes are not as they were written"):
        tfds.load(dataset="cifar10", data_dir=str(tmp_path))
    stock = make_stock(tmp_path / "stock", "cifar10", {"train": examples(10), "test": examples(10)}) / "metadata.json"
    for metadata in ({"source": "of a stock builder"}, {}):
        stock.write_text(json.dumps(metadata))
        assert tfds.load(dataset="cifar10", data_dir=str(tmp_path / "stock")).label == "CIFAR-10"


def test_a_description_imports_no_module(tmp_path):
    make(tmp_path, n=20)
    path = builders.folder("cifar10", tmp_path) / "features.json"
    content = path.read_text()
    assert '"tensorflow_datasets.' in content
    path.write_text(content.replace('"tensorflow_datasets.', '"antigravity.'))
    with pytest.raises(DataError, match=r"names code outside TensorFlow Datasets: antigravity\."):
        tfds.load(dataset="cifar10", data_dir=str(tmp_path))
    assert "antigravity" not in sys.modules


def test_other_data_sets_are_refused(tmp_path):
    make_stock(tmp_path, "sizes", {"train": examples(10), "test": examples(10)}, shape=(None, None, 3))
    with pytest.raises(DataError, match=r"different sizes.*stream"):
        tfds.load(dataset="sizes", data_dir=str(tmp_path))


def test_crc32c_against_published_values():
    """RFC 3720, B.4, and the check value of the catalogue of parametrised CRC algorithms."""
    vectors = [(b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (b"", 0)]
    vectors += [(bytes(range(32)), 0x46DD794E), (bytes(range(31, -1, -1)), 0x113FDB5C)]
    for data, crc in vectors:
        assert slow_crc32c(data) == crc and tfrecord.masked_crc(data) == slow_masked(data)


# ---- fractions ----------------------------------------------------------------------------------------------


def test_fractions_are_stratified_nested_and_share_the_validation_split():
    options = dict(val_size=100, shape=(8, 8, 1), num_classes=5, n_train=600)
    whole = load_splits(synthetic.load, **options)
    before = None
    for fraction, count in ((0.4, 200), (0.6, 300), (0.8, 400), (1.0, 500)):
        data = load_splits(synthetic.load, fraction=fraction, **options)
        assert len(data.train.labels) == count and np.ptp(np.bincount(data.train.labels)) <= 1
        np.testing.assert_array_equal(data.val.images, whole.val.images)
        np.testing.assert_array_equal(data.test.images, whole.test.images)
        now = [image.tobytes() for image in data.train.images]
        everything = [image.tobytes() for image in whole.train.images]
        assert [everything.index(image) for image in now] == sorted(map(everything.index, now))  # in order
        assert before is None or set(before) < set(now)
        before = now
    other = part(whole.train, 0.4, seed=1)
    assert not np.array_equal(other.images, part(whole.train, 0.4, seed=0).images)


@pytest.mark.parametrize("value", [0, 0.0, -0.5, 1.5, "0.4", True])
def test_an_impossible_fraction_is_refused(value):
    settings = config.base()
    settings.data = dict(name="digits", val_size=0, split_seed=0, fraction=value)
    with pytest.raises(InputError, match=r"data\.fraction=.* is not allowed; give a number above 0 and at most 1"):
        config.check(settings)


def test_a_fraction_can_be_set_on_every_recipe():
    settings = config.base()
    settings.data = dict(name="digits", val_size=0, split_seed=0)
    assert config.complete(settings).data.fraction == 1.0
    config.rename(settings, "data", "tfds")
    assert settings.data.fraction == 1.0
    settings.data = dict(name="digits", val_size=0, split_seed=0, fraction=0.4)
    assert len(run.load_data(settings).train.labels) == round(0.4 * 1257)


# ---- ImageNet-size sets -------------------------------------------------------------------------------------


def make_pictures(data_dir, labels):
    """40 JPEGs of different sizes, of one colour each, with these labels in training."""
    sizes = np.random.default_rng(0).integers(40, 90, (40, 2)).tolist()
    x = [np.full((*size, 3), 20 * (i % 10) + 30, np.uint8) for i, size in enumerate(sizes)]
    splits = {"train": (x, labels), "validation": (x[:10], np.arange(10))}
    make_stock(data_dir, "imagenet2012", splits, shape=(None, None, 3), kind="JPEG")


@pytest.fixture
def pictures(tmp_path):
    """40 JPEGs whose colour is their label."""
    make_pictures(tmp_path, np.arange(40) % 10)
    return tfds.find("imagenet2012", str(tmp_path))


def take(iterator, n):
    return [batch for batch, _ in zip(iterator, range(n), strict=False)]


@pytest.fixture
def streamed(pictures, tmp_path, monkeypatch):
    """The splits, with a cache of their own."""
    pytest.importorskip("grain")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return stream.load(data_dir=str(tmp_path), size=16, threads=2)


def test_stream_a_batch_is_a_function_of_seed_and_step(streamed):
    options = dict(batch_size=6)
    batches = take(stream.batches(streamed.train, seed=1, **options), 14)
    resumed = take(stream.batches(streamed.train, seed=1, step=5, **options), 9)
    for a, b in zip(batches[5:], resumed, strict=True):
        for key in ("image", "label", "index"):
            np.testing.assert_array_equal(a[key], b[key])
    other = take(stream.batches(streamed.train, seed=2, **options), 1)[0]
    assert not np.array_equal(other["index"], batches[0]["index"])
    for batch in batches:
        assert batch["image"].shape == (6, 16, 16, 3) and batch["image"].dtype == np.uint8
        colours = batch["image"].reshape(6, -1).mean(1)
        np.testing.assert_allclose(colours, 20 * batch["label"] + 30, atol=3)


def test_stream_an_epoch_shows_every_image_once(streamed):
    epochs = take(stream.batches(streamed.train, batch_size=6), 12)
    first, second = (np.concatenate([b["index"] for b in epochs[i : i + 6]]) for i in (0, 6))  # 36 of 40
    for epoch in (first, second):
        assert len(np.unique(epoch)) == 36
    assert not np.array_equal(first, second)


def test_stream_processes_that_read_parts_of_a_batch_read_together_what_one_would(streamed):
    whole = take(stream.batches(streamed.train, batch_size=6, step=3), 5)
    for rows in (np.arange(3), np.array([1, 4])):
        parts = take(stream.batches(streamed.train, batch_size=6, step=3, rows=rows), 5)
        for batch, some in zip(whole, parts, strict=True):
            for key in ("image", "label", "index"):
                np.testing.assert_array_equal(some[key], batch[key][rows])


def test_stream_test_images_are_in_order_and_read_where_they_are_indexed(streamed):
    images, labels = streamed.test
    assert images.shape == (10, 16, 16, 3) and len(images) == 10
    which = np.array([3, 0, 9, 3])
    for index in (slice(2, 7), which, slice(4, 4)):
        np.testing.assert_allclose(images[index].reshape(-1, 768).mean(1), 20 * labels[index] + 30, atol=3)
    np.testing.assert_array_equal(images.subset(which)[1:3], images[which][1:3])


def test_stream_splits_are_taken_without_reading_and_told_apart(streamed, tmp_path):
    data = load_splits(stream.load, val_size=10, fraction=0.4, data_dir=str(tmp_path), size=16)
    assert len(data.train.labels) == 12 and sorted(data.val.labels) == list(range(10))
    for split in (data.train, data.val):
        np.testing.assert_allclose(split.images[:4].reshape(4, -1).mean(1), 20 * split.labels[:4] + 30, atol=3)
    digests = [run.facts(data)["digests"][name] for name in ("train", "val")]
    digests += [run.facts(streamed)["digests"]["train"]]
    assert len(set(digests)) == 3


def test_stream_labels_are_read_once(streamed, tmp_path, monkeypatch):
    monkeypatch.setattr(stream.Pictures, "_read_labels", lambda self: pytest.fail("they were kept"))
    np.testing.assert_array_equal(stream.load(data_dir=str(tmp_path), size=16).train.labels, streamed.train.labels)


def test_stream_labels_of_a_set_that_was_made_again_are_read_again(streamed, pictures, tmp_path):
    """Files of the same names and sizes in the same folder; the run that was made with the first set is another one."""
    before = run.facts(streamed)["digests"]
    names = lambda: {file.name: file.stat().st_size for file in pictures.folder.glob("*array_record*")}  # noqa: E731
    first = names()
    shutil.rmtree(pictures.folder)
    make_pictures(tmp_path, (np.arange(40) + 3) % 10)
    assert names() == first
    found = stream.load(data_dir=str(tmp_path), size=16, threads=2)
    np.testing.assert_array_equal(found.train.labels, (streamed.train.labels + 3) % 10)
    after = run.facts(found)["digests"]
    assert after["train"] != before["train"] and after["test"] == before["test"]


@pytest.mark.parametrize("damage", ["a cut", "a bit of a label", "a bit of the digest", "no file"])
def test_stream_labels_that_were_kept_and_damaged_are_read_again(streamed, tmp_path, caplog, damage):
    kept = max((tmp_path / "cache").rglob("*.labels"), key=lambda file: file.stat().st_size)  # those of training
    whole = bytearray(kept.read_bytes())
    for place in {"a cut": range(50, len(whole)), "a bit of a label": (7,), "a bit of the digest": (-1,)}.get(
        damage, ()
    ):
        whole[place] ^= 4
    if damage == "no file":
        kept.unlink()
    else:
        kept.write_bytes(whole[:50] if damage == "a cut" else whole)
    np.testing.assert_array_equal(stream.load(data_dir=str(tmp_path), size=16).train.labels, streamed.train.labels)
    assert ("is damaged" in caplog.text) == (damage != "no file")
    assert stream._kept_labels(kept, 40, 10) is not None  # written again
    stream._keep_labels(kept, np.full(40, 10, np.int32))
    assert stream._kept_labels(kept, 40, 10) is None  # a class that there is not


def test_stream_training_goes_on_to_the_bit_and_is_evaluated(streamed, tmp_path, monkeypatch):
    settings = smoke_config("baselines_ibd", "sat,smoke")
    settings.data = dict(name="stream", data_dir=str(tmp_path), size=16, val_size=8, split_seed=0, threads=2)
    settings.augment.update(pad=0, flip=False)
    main.execute(settings, tmp_path / "whole")
    stop = itertools.count()
    monkeypatch.setattr(cluster, "preempted", lambda: next(stop) == 2)  # in the first epoch
    with pytest.raises(PreemptedError):
        loop.train(build(settings), tmp_path / "again")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    records = main.execute(settings, tmp_path / "again")
    digests = [trees.digest(run.load(tmp_path / name, "last").variables) for name in ("whole", "again")]
    assert digests[0] == digests[1]
    assert records[0]["n"] == 10 and records[0]["dataset"] == "imagenet2012, 16 pixels"
    settings.steps_per_dispatch = 5
    with pytest.raises(InputError, match="1 step at a time"):
        loop.train(build(settings), tmp_path / "other")


def test_stream_a_read_that_fails_is_tried_again_and_then_named(streamed, monkeypatch):
    """Storage that is far away fails at times; a record that cannot be read is named, with its shard."""
    monkeypatch.setattr(stream, "_WAITS", (0.0, 0.0))
    images, wanted = streamed.train.images, streamed.train.images[np.array([3])]
    source, failures = images.source, []

    class Flaky:
        def __getitem__(self, row):
            if len(failures) < limit:
                failures.append(row)
                raise OSError(5, "Input/output error")
            return source[row]

    images.source, limit = Flaky(), 2
    np.testing.assert_array_equal(images[np.array([3])], wanted)
    failures.clear()
    limit = 3
    with pytest.raises(DataError, match=r"damaged at record \d+ .*Input/output error"):
        images[np.array([3])]


def test_stream_labels_of_no_class_are_refused(streamed, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_kept_labels", lambda *_: None)
    pictures = stream.load(data_dir=str(tmp_path), size=16, threads=2).train.images
    monkeypatch.setattr(type(pictures.stored), "num_classes", 7)
    with pytest.raises(DataError, match=r"train labels lie in \[0, 9\]; with 7 classes"):
        pictures.labels()


def test_stream_crops_lie_in_the_image():
    for width, height in ((50, 400), (400, 50), (1, 1), (224, 224)):
        for _ in range(200):
            left, top, right, bottom = stream._random_box(width, height, RNG)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert stream._centre(320, 256) == (48, 16, 272, 240)


def test_stream_names_damage_and_what_cannot_be_read_at_random(pictures):
    pytest.importorskip("grain")
    images = stream.Pictures(pictures, "train", 16, 2)
    with pytest.raises(InputError, match="batch_size=41 of 40"):
        stream.batches(Split(images, images.rows), batch_size=41)
    shard = next(pictures.folder.glob("*train*"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=shard.name):
        images[:]
    shard.write_bytes(content)
    to_tfrecord(pictures.folder)
    again = tfds.find("imagenet2012", str(pictures.folder.parent.parent))
    with pytest.raises(DataError, match=r"tfds convert_format"):
        stream.Pictures(again, "train", 16, 2)


@pytest.mark.parametrize("records", ["array_record", "tfrecord"])
@pytest.mark.parametrize("promised", [70, 90])
def test_a_description_that_promises_more_or_fewer_images_than_there_are_is_refused(records, promised, tmp_path):
    make(tmp_path)
    folder = builders.folder("cifar10", tmp_path)
    if records == "tfrecord":
        to_tfrecord(folder)
    path = folder / "dataset_info.json"
    info = json.loads(path.read_text())
    info["splits"][0]["shardLengths"] = [str(promised)]
    path.write_text(json.dumps(info))
    with pytest.raises(DataError, match=rf"train\.{records}\S+ (holds|has) 80 records.* {promised}.* make it again"):
        tfds.load(dataset="cifar10", data_dir=str(tmp_path))


def test_checks_apply_to_what_was_read(tmp_path):
    black = [(np.zeros((32, 32, 3), np.uint8), i % 10) for i in range(20)]
    builders.write("cifar10", Contents((32, 32, 3), CLASSES, {"train": black, "test": black}), tmp_path, {})
    with pytest.raises(DataError, match="nearly black"):
        load_splits(tfds.load, val_size=0, dataset="cifar10", data_dir=str(tmp_path))
    with pytest.raises(DataError):
        check(Split(np.zeros((2, 2)), np.zeros(2)), "train", 2)
