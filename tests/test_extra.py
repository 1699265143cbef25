"""Generated images: the file, the share of every batch, the order, and that reading is the same as keeping them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import smoke_config
from test_train import stop_after

from ibjax import config
from ibjax.data import extra
from ibjax.data.permutation import permuted
from ibjax.devices import cluster
from ibjax.errors import DataError, InputError, PreemptedError
from ibjax.runs import checkpoint, run, rundir, stored
from ibjax.step import TrainState
from ibjax.training import feed, loop
from ibjax.training.experiment import build, run_key

SHAPE, CLASSES = (8, 8, 1), 10
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (37, *SHAPE)).astype(np.uint8)
LABELS = RNG.integers(0, CLASSES, 37)


def write(folder, name="extra.npz", *, compressed=False, **members):
    members = {"image": IMAGES, "label": LABELS, **members}
    members = {key: value for key, value in members.items() if value is not None}
    (np.savez_compressed if compressed else np.savez)(folder / name, **members)
    return str(folder / name)


def load(path, **options):
    return extra.load(path=path, shape=SHAPE, num_classes=CLASSES, **options)


# ---- the order ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 64, 97, 1000, 5003])
def test_it_is_a_permutation(n):
    for words in ((1, 2, 0), (1, 2, 1)):
        assert sorted(permuted(np.arange(n), n, words, np)) == list(range(n))


def test_host_and_program_agree():
    places, words = np.arange(0, 50_000_000, 1_234_567), (2**32 - 1, 7, 1, 3)
    traced = jax.jit(lambda places, words: permuted(places, 50_000_000, words))
    on_device = traced(jnp.asarray(places), tuple(jnp.uint32(word) for word in words))
    np.testing.assert_array_equal(on_device, permuted(places, 50_000_000, words, np))


def test_neighbours_and_passes_are_unrelated():
    """Differences of neighbours, and the places of the same image in two passes, are as of random permutations."""
    n = 4096
    first, second = (permuted(np.arange(n), n, (11, 5, 0, number), np).astype(float) for number in (0, 1))
    for one, other in ((first[:-1], first[1:]), (first, second), (np.arange(n), first)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(n)
    low = np.mean(first.reshape(64, 64), axis=1)  # means of 64 draws without replacement
    assert 0.7 < low.std() / (n / np.sqrt(12 * 64)) < 1.3
    assert np.sum(first == second) < 8


@pytest.mark.parametrize(("batch", "fraction", "parts"), [(10, 0.7, 1), (64, 0.7, 4), (48, 0.5, 3)])
def test_the_share_is_exact_in_a_thousand_batches(batch, fraction, parts):
    """Each has round(fraction · batch) generated images, in each part of it too; a pass shows no image twice."""
    made = load_shares(batch, fraction, parts)
    index = np.stack([made.index((3, 4), step, np) for step in range(1000)])
    count = round(fraction * batch)
    assert ((index >= 100).sum(1) == count).all() and index.min() >= 0 and index.max() < 100 + 500
    for part in range(parts):
        assert abs((index[0, part::parts] >= 100).sum() - count / parts) < 1
    for device in np.split(index[0] >= 100, 2):
        assert abs(device.sum() - count / 2) <= parts
    for generated, n, size in ((False, 100, batch - count), (True, 500, count)):
        seen = index[(index >= 100) == generated].reshape(1000, size) - 100 * generated
        for begin in range(0, 5 * (n // size), n // size):
            one = seen[begin : begin + n // size].ravel()
            assert len(set(one)) == len(one)
        assert len(np.unique(seen)) == n  # all of them, over the passes


def load_shares(batch, fraction, parts=1):
    labels = np.zeros(500, np.int32)
    return extra.shares(extra.Extra(np.zeros((500, 1, 1, 1), np.uint8), labels, fraction, "", None), 100, batch, parts)


def test_batches_of_a_program_are_those_of_the_host():
    made = load_shares(16, 0.6)
    key = jax.random.key(5)
    index = jax.jit(jax.vmap(lambda step: made.index(extra.key_data(key), step)))(jnp.arange(90))
    words = np.asarray(jax.random.key_data(key))
    np.testing.assert_array_equal(index, [made.index(words, step, np) for step in range(90)])


# ---- the file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_images_are_read_one_by_one_from_the_file(tmp_path, monkeypatch, compressed):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(tmp_path, compressed=compressed)
    kept, read = load(path, resident=True), load(path, resident=False)
    which = np.array([36, 0, 5, 5])
    np.testing.assert_array_equal(kept.images, IMAGES)
    np.testing.assert_array_equal(read.take(which), IMAGES[which])
    assert kept.digest == read.digest and read.labels.dtype == np.int32
    stored = read.images.file
    assert (stored != read.file) == compressed
    (tmp_path / "extra.npz").unlink() if compressed else stored.write_bytes(stored.read_bytes()[:400])
    if compressed:
        np.testing.assert_array_equal(read.take(which), IMAGES[which])  # what was unpacked stays
    else:
        with pytest.raises(DataError, match="has become shorter"):
            read.take(which)
        write(tmp_path, image=255 - IMAGES)  # of the same size
        with pytest.raises(DataError, match="has changed; restore it"):
            read.take(which)
        stored.unlink()
        with pytest.raises(DataError, match="is gone"):
            read.take(which)


def test_batches_read_ahead_are_those_of_the_array(tmp_path):
    """From any step on, for the places that a process holds, in order."""
    read = load(write(tmp_path), resident=False)
    made, rows = extra.shares(read, 100, 10), np.array([0, 1, 2, 7, 9])
    source = extra.batches(read, made, np.array([3, 4], np.uint32), 7, rows)
    for step in range(7, 20):
        index, batch = made.index((3, 4), step, np)[rows], next(source)
        for place, i in enumerate(index):
            expected = IMAGES[i - 100] if i >= 100 else np.zeros(SHAPE, np.uint8)
            np.testing.assert_array_equal(batch["image"][place], expected)
            assert batch["label"][place] == (LABELS[i - 100] if i >= 100 else 0)
    source.close()


DISTRIBUTIONS = RNG.dirichlet(np.ones(CLASSES), 37)
FAULTS = {
    "no image": (dict(image=None), "lacks image; it holds label"),
    "no label": (dict(label=None, labels=LABELS), "lacks label; it holds image, labels"),
    "floats": (dict(image=IMAGES / 255), r"image has type float64 .* give uint8 \(N, 8, 8, 1\)"),
    "another size": (dict(image=np.zeros((37, 32, 32, 3), np.uint8)), r"shape \(37, 32, 32, 3\)"),
    "fewer labels": (dict(label=LABELS[1:]), r"has 37 images and a label of shape \(36,\)"),
    "a class too many": (dict(label=np.r_[LABELS[1:], 10]), r"labels lie in \[0, 10\]; with 10 classes"),
    "half a class": (dict(label=LABELS + 0.5), r"label has values that are no classes, such as \d\.5"),
    "not a number": (dict(label=np.full(37, np.nan)), "label has values that are no classes, such as nan"),
    "no distributions": (dict(label=2 * DISTRIBUTIONS), "label has rows that are no distributions"),
    "too many columns": (dict(label=np.ones((37, 12)) / 12), "label has 12 columns; the data has 10 classes"),
    "one-hot integers": (dict(label=np.eye(10, dtype=int)[LABELS]), r"shape \(37, 10\); give classes \(N,\)"),
    "objects": (dict(label=np.array([None] * 37)), "is no .npz file, or it is damaged"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_file_is_one_clear_line(tmp_path, name):
    members, text = FAULTS[name]
    with pytest.raises(DataError, match=text) as caught:
        load(write(tmp_path, **members))
    assert "\n" not in str(caught.value) and "extra.npz" in str(caught.value)


def test_damage_and_absence_are_named(tmp_path):
    with pytest.raises(DataError, match=r"is no file; give an .npz with image and label"):
        load(str(tmp_path / "none.npz"))
    path, images = tmp_path / "extra.npz", np.tile(IMAGES, (4, 1, 1, 1))  # more than zipfile reads for the header
    write(tmp_path, image=images, label=np.tile(LABELS, 4))
    content = bytearray(path.read_bytes())
    at = content.find(images.tobytes()) + 9000
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"member 'image.npy' is damaged"):
        load(str(path), resident=True)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"is no .npz file, or it is damaged"):
        load(str(path))


def test_labels_may_be_floats_or_distributions(tmp_path):
    np.testing.assert_array_equal(load(write(tmp_path, label=LABELS.astype(np.float32))).labels, LABELS)
    np.testing.assert_array_equal(load(write(tmp_path, label=LABELS[:, None])).labels, LABELS)
    found = load(write(tmp_path, label=DISTRIBUTIONS)).labels
    np.testing.assert_allclose(found, DISTRIBUTIONS, rtol=1e-6)
    assert found.dtype == np.float32


# ---- runs --------------------------------------------------------------------------------------------------


def settings(path, **options):
    made = on_clean_images(smoke_config("digits"))
    made.data.extra = dict(path=path, fraction=0.5, **options)
    return made


def on_clean_images(made):
    """The smoke recipe on clean images, without teacher and contrast: its 64 images, batches of 8, two epochs.

    With all that is drawn or recomputed beside the order: mixed images, an average with statistics of its own.
    """
    made.teacher.recipe = None
    made.contrast = {}
    made.objective = dict(name="standard")
    made.attack = None
    made.mix = dict(name="cutmix")
    made.smoothing = dict(delta=0.1, form="uniform", images="generated")
    made.model.batch_norm = True
    made.ema_decay = 0.9
    made.averaging = dict(warmup=True, start=0.5, statistics="recomputed", batches=3)
    return made


def trained(made, workdir):
    """(digests of the last weights, the weights, what config.json says of the data)."""
    loop.train(build(made), workdir)
    with checkpoint.manager(workdir, read_only=True) as store:
        digests = stored.manifest(store, store.all_steps()[-1])["variables"]
    return digests, run.load(workdir, "last").variables, rundir.read_config(workdir)[1]


def test_read_and_kept_images_make_the_same_batches(tmp_path):
    """Seen through a train step that returns its batch, from a step in the middle on; half of it are the file's."""
    path = write(tmp_path, label=DISTRIBUTIONS)

    def spy(state, batch, key, frozen):
        return state._replace(step=state.step + 1), batch

    seen, start = [], TrainState(np.int32(5), {}, (), None)  # of a network and an optimiser nothing is asked
    for resident in (True, False):
        made = build(settings(path, resident=resident))
        state = jax.tree.map(lambda leaf, mesh=made.mesh: cluster.replicate(leaf, mesh), start)
        feeding = feed.feed(made._replace(train_step=spy, statistics_step=None), run_key(0, 1, made.mesh), 5)
        for _ in range(4):
            state, batch = feeding.dispatch(state, 1)
            seen.append({name: np.asarray(batch[name][0]) for name in ("image", "label", "index")})
    original = len(made.data.train.labels)
    for kept, read in zip(seen[:4], seen[4:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, kept, read)
        generated = kept["index"] >= original
        assert generated.sum() == 4
        np.testing.assert_array_equal(kept["image"][generated], IMAGES[kept["index"][generated] - original])
        np.testing.assert_array_equal(kept["image"][~generated], made.data.train.images[kept["index"][~generated]])
        np.testing.assert_allclose(
            kept["label"][generated], DISTRIBUTIONS[kept["index"][generated] - original], rtol=1e-6
        )
        hard = made.data.train.labels[kept["index"][~generated]]
        np.testing.assert_array_equal(kept["label"][~generated], np.eye(CLASSES)[hard])


@pytest.mark.slow
def test_reading_trains_as_keeping_does_and_continues_to_the_bit(tmp_path, monkeypatch):
    """The same weights to rounding, resident or read; a run that is cut and continued ends with the same bits."""
    path = write(tmp_path, label=DISTRIBUTIONS)
    _, kept, facts = trained(settings(path, resident=True), tmp_path / "kept")
    assert facts["extra"]["n"] == 37
    digests, read, _ = trained(settings(path, resident=False), tmp_path / "read")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), kept, read)
    with monkeypatch.context() as patch:  # in the middle of the second epoch
        stop_after(patch, 9, PreemptedError)
        with pytest.raises(PreemptedError, match="saved step 9 of 14"):
            trained(settings(path, resident=False), tmp_path / "cut")
    assert trained(settings(path, resident=False), tmp_path / "cut")[0] == digests


def test_another_file_is_another_run(tmp_path):
    experiment = build(settings(write(tmp_path)))
    identity = rundir.identity(experiment.config, experiment.facts)
    moved = build(settings(write(tmp_path, "moved.npz")))
    assert rundir.identity(moved.config, moved.facts) == identity  # its path may change
    other = build(settings(write(tmp_path, "other.npz", label=LABELS[::-1].copy())))
    assert rundir.identity(other.config, other.facts) != identity


def test_wrong_options_are_refused(tmp_path):
    path = write(tmp_path)
    for section, text in (
        (dict(path=path, fraction=1.5), "data.extra.fraction=1.5 is not allowed"),
        (dict(path=path, share=0.5), "data.extra.share is unknown"),
        (dict(fraction=0.5), "data.extra.path is missing"),
        ("1m.npz", "data.extra='1m.npz' is no section"),
    ):
        made = on_clean_images(smoke_config("digits"))
        made.data.extra = section
        with pytest.raises(InputError, match=text):
            config.check(made)
    small = settings(path)
    small.data.extra.fraction = 0.01
    with pytest.raises(InputError, match="is 0 generated images; a batch needs at least one of both kinds"):
        build(small)
    alone = settings(path)
    del alone.data.extra
    with pytest.raises(InputError, match=r"smoothing.images='generated' needs generated images"):
        build(alone)
