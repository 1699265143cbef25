"""Evaluation: flags recomputed by brute force, the gate on broken networks, records that are reused or not."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import change_config, clean_recipe, untrained_run
from jax.sharding import AxisType

from ibjax import files, losses, main, net
from ibjax.attacks import autoattack, checks, geometry
from ibjax.attacks.pgd import pgd
from ibjax.data import Split
from ibjax.devices import cluster
from ibjax.errors import InputError, PreemptedError
from ibjax.evaluation import evaluate, results, scoring
from ibjax.evaluation.named import named
from ibjax.evaluation.report import tables
from ibjax.evaluation.settings import scaled_step
from ibjax.models import resnet, stochastic
from ibjax.net import to_float
from ibjax.runs import run

RNG = np.random.default_rng(0)
N, CLASSES = 19, 4  # no multiple of any batch
WEIGHTS = np.float32(RNG.normal(size=(75, CLASSES)))
IMAGES = RNG.integers(0, 256, (N, 5, 5, 3), dtype=np.uint8)
# labels that the linear network gets right for about two images of three, some of them by a hair
LABELS = np.where(RNG.uniform(size=N) < 0.7, np.argmax(IMAGES.reshape(N, -1) / 255 @ WEIGHTS, 1), RNG.integers(0, 4, N))
SPLIT = Split(IMAGES, LABELS.astype(np.int32))
EPS, STEP = 0.02, 0.005


def predict(variables, x, keys=None):
    return x.reshape(x.shape[0], -1) @ variables, {}


def mesh(devices=8):
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


@functools.cache
def scorer(batch_size, devices):
    attack = functools.partial(named("pgd-5").make, norm="linf", unroll=False)
    return scoring.Scorer(predict, attack, mesh(devices), batch_size, "linf")


def score(batch_size=8, devices=8, eps=EPS, seed=3, **options):
    return scorer(batch_size, devices)(WEIGHTS, SPLIT, seed, eps=eps, step_size=STEP, **options)


def test_flags_are_those_of_a_loop_over_single_images():
    """Without padding, batching or sharding: clean, robust, loss and distance of every image."""
    flags, x_adv = score(keep=N)
    key = jax.random.fold_in(jax.random.key(3), scoring._EVALUATION)
    attack = pgd(eps=EPS, step_size=STEP, steps=5, unroll=False)
    logits_of = jax.jit(lambda x: predict(WEIGHTS, x)[0])
    alone_of = jax.jit(lambda i, x, y: attack(jax.random.fold_in(key, i)[None], logits_of, x, y))
    for i in range(N):
        x, y = IMAGES[i : i + 1] / np.float32(255), np.asarray(SPLIT.labels[i : i + 1])
        alone = np.asarray(alone_of(i, x, y))
        np.testing.assert_allclose(x_adv[i : i + 1], alone, atol=1e-6)
        clean, robust = (int(np.argmax(logits_of(images))) == LABELS[i] for images in (x, alone))
        assert flags.clean[i] == clean and flags.robust[i] == (clean and robust)
        assert abs(flags.distance[i] - np.abs(alone - x).max()) < 1e-6
        logits = np.asarray(logits_of(alone), np.float64)[0]
        loss = np.log(np.exp(logits - logits.max()).sum()) - (logits[LABELS[i]] - logits.max())
        np.testing.assert_allclose(flags.loss[i], loss, rtol=1e-4, atol=1e-6)
    assert 0 < flags.robust.sum() < flags.clean.sum() < N  # the case has all kinds of images


def test_an_image_that_is_wrong_as_it_is_never_counts_as_robust():
    """Also where the attack pushes it over to its label, as one that descends the loss does."""

    def descent(eps, step_size):
        def run(key, logits_fn, x, y):
            slope = jax.grad(lambda x: jnp.sum(losses.cross_entropy(logits_fn(x), y)))(x)
            return jnp.clip(x - eps * jnp.sign(slope), 0, 1)

        return run

    scorer = scoring.Scorer(predict, descent, mesh(), 8, "linf")
    flags, x_adv = scorer(WEIGHTS, SPLIT, 3, eps=0.3, step_size=STEP, keep=N)
    attacked = np.argmax(predict(WEIGHTS, x_adv)[0], 1) == LABELS
    assert np.any(~flags.clean & attacked)
    assert not np.any(flags.robust & ~flags.clean)
    np.testing.assert_array_equal(flags.robust, flags.clean & attacked)


@pytest.mark.parametrize("batch_size, devices", [(1, 1), (8, 1), (16, 8), (500, 8)])
def test_batch_size_and_number_of_devices_change_no_flag(batch_size, devices):
    reference, x_reference = score(keep=N)
    flags, x_adv = score(batch_size, devices, keep=N)
    np.testing.assert_allclose(x_adv, x_reference, atol=1e-6)
    np.testing.assert_array_equal(flags.robust, reference.robust)
    np.testing.assert_array_equal(flags.clean, reference.clean)
    assert len(flags.robust) == N


def test_the_images_that_are_kept_may_lie_anywhere():
    """In several batches, and in the last one, whose rest is padding."""
    (_, every), chosen = score(keep=N), np.array([0, 7, 8, N - 1])
    np.testing.assert_array_equal(score(keep=chosen)[1], every[chosen])
    np.testing.assert_array_equal(score(keep=3)[1], every[:3])
    assert score(keep=np.array([], int))[1].shape == score()[1].shape == (0, *IMAGES.shape[1:])


def test_another_seed_draws_other_starts():
    assert np.abs(score(keep=N)[1] - score(keep=N, seed=4)[1]).max() > 1e-3


def test_eps_zero_is_clean_accuracy():
    flags, _ = score(eps=0.0)
    np.testing.assert_array_equal(flags.robust, flags.clean)


def test_every_x_adv_lies_in_the_ball_and_the_box_or_nothing_is_reported():
    """An attack that cheats by a millionth too much, or leaves the box, is found."""

    def cheat(by, low=0.0):
        def make(eps, step_size):
            return lambda key, logits_fn, x, y: jnp.maximum(x + eps + by, low)

        return make

    dark, bright = (Split(np.full_like(IMAGES, level), SPLIT.labels) for level in (2, 255))
    honest, cheating = (scoring.Scorer(predict, cheat(by), mesh(), 8, "linf") for by in (0.0, 3e-6))
    honest(WEIGHTS, dark, 0, eps=0.1, step_size=0.1)
    for scorer, split in ((cheating, dark), (honest, bright)):
        with pytest.raises(RuntimeError, match="outside"):
            scorer(WEIGHTS, split, 0, eps=0.1, step_size=0.1)


def test_rounding_grows_with_the_radius_and_the_number_of_pixels():
    """At 3 a millionth is four of the last bits of float32. On a CPU, noise of random signs on an image of ImageNet's
    size ends up to 5e-6 outside of 1: all terms of its sum are equal."""
    black = Split(np.zeros((8, 4, 4, 1), np.float32), np.zeros(8, np.int32))
    mean = lambda variables, x, keys: (x[:, 0, 0] * jnp.ones((1, 2)), {})  # noqa: E731
    moved = lambda eps, step_size: lambda keys, logits_fn, x, y: x + step_size  # noqa: E731
    scorer = scoring.Scorer(mean, moved, mesh(), 8, "l2")

    def scored(length):
        return scorer(None, black, 0, eps=3.0, step_size=length / 4)[0]

    assert scored(3 + 1.5e-6).distance.min() > 3 + 1e-6
    with pytest.raises(RuntimeError, match="outside"):
        scored(3 + 3e-5)
    assert geometry.tolerance(0.5, (32, 32, 3)) == geometry.tolerance(8 / 255, (224, 224, 3)) == 1e-6
    assert 5e-6 < geometry.tolerance(1.0, (224, 224, 3)) < 2e-5


def test_a_gradient_that_is_no_number_stops_the_evaluation():
    """Instead of counting the images on which the attack fails as broken, or as robust."""

    def zero_by_infinity(variables, x, keys):
        return predict(variables, x, keys)[0] + 0 * jnp.sqrt(jnp.sum(jnp.maximum(x - 2, 0))), {}

    attack = functools.partial(pgd, steps=2, unroll=False)
    scorer = scoring.Scorer(zero_by_infinity, attack, mesh(), 8, "linf")
    with pytest.raises(scoring.GradientError, match=f"gradient is NaN or infinite on {len(SPLIT.labels)} images"):
        scorer(WEIGHTS, SPLIT, 0, eps=0.1, step_size=0.1)


def test_names_stand_for_their_attacks():
    assert named("margin-30").settings == dict(loss="margin", init="uniform", steps=30, restarts=1)
    assert named("pgd-7").settings["loss"] == "ce" and named("pgd-7").step_size(0.5, "2/255") == "2/255"
    assert named("fgsm").settings == dict(loss="ce", init="none", steps=1, restarts=1)
    assert named("fgsm").step_size("8/255", "2/255") == "8/255"
    assert named("pgd-scaled-10").settings == named("pgd-10").settings
    for steps, length in ((10, 0.0069), (100, 0.00069)):  # IB-RAR's, at its eps
        assert named(f"pgd-scaled-{steps}").step_size("0.03", "2/255") == pytest.approx(length)
    assert named("autoattack").settings == dict(version="standard", attacks=None)
    assert named("fab-t").settings == dict(version="standard", attacks=["fab-t"])
    for name in ("pgd", "pgd-0", "pgd-x", "pgd-²", "pgd-scaled", "cw-", "autoatack"):
        with pytest.raises(InputError, match="unknown"):
            named(name)


def test_the_ladder_scales_its_steps_unless_they_are_fixed():
    settings = dict(eps="8/255", step_size="2/255", fixed_step=False)
    assert scaled_step(settings, "8/255") == "2/255"
    assert scaled_step(settings, "16/255") == "4/255"
    np.testing.assert_allclose(scaled_step({**settings, "step_size": "1/255"}, "16/255"), 2 / 255)
    assert scaled_step({**settings, "fixed_step": True}, "16/255") == "2/255"


# ---- programs ----------------------------------------------------------------------------------------------

WIDE = np.float32(RNG.normal(size=(75, 512)))  # 150 kB


def wide(variables, x, keys=None):
    return (x.reshape(x.shape[0], -1) @ variables)[:, :CLASSES], {}


def judged_by_auto_attack(monkeypatch, folder):
    x, right = np.float32(IMAGES / 255), np.ones(N, bool)
    found = autoattack.Result(x, right, right, {}, {}, [], ~right)
    monkeypatch.setattr(autoattack, "autoattack", lambda *arguments, **options: found)
    weights, options = jnp.asarray(WIDE), dict(version="standard")
    network = lambda x, keys: wide(weights, x)[0]  # noqa: E731
    scoring.auto_attack(network, SPLIT, 0, options, norm="linf", eps=EPS, batch_size=8)  # 19 images: 8, 8 and 3


def saved_examples(monkeypatch, folder):
    answer = evaluate._program(wide, jnp.asarray(WIDE))
    evaluate._save_examples(folder / "a.npz", SPLIT, np.float32(IMAGES / 255), answer)


def fingerprint_of_a_surrogate(monkeypatch, folder):
    evaluate.Surrogate(wide, jnp.asarray(WIDE), {}).fingerprint(np.float32(IMAGES / 255))


@pytest.mark.parametrize("compute", [judged_by_auto_attack, saved_examples, fingerprint_of_a_surrogate])
def test_weights_are_no_constants_of_a_program(compute, monkeypatch, tmp_path):
    """As constants they are twice in memory, at 2 GB they are too many, and other weights need another program."""
    jax.config.update("jax_dump_ir_to", str(tmp_path / "programs"))
    try:
        compute(monkeypatch, tmp_path)
    finally:
        jax.config.update("jax_dump_ir_to", "")
    programs = {file.name: file.stat().st_size for file in (tmp_path / "programs").iterdir()}
    assert programs and max(programs.values()) < WIDE.nbytes
    if compute is judged_by_auto_attack:
        assert sum("jit_call_" in name for name in programs) == 1


def test_a_whole_split_becomes_floats_on_the_host_with_the_bits_of_a_device():
    """50,000 images of ImageNet are 30 GB; NumPy rounds half of the quotients otherwise."""
    levels = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
    wanted = to_float(jnp.asarray(levels))
    np.testing.assert_array_equal(net.float_on_host(levels), wanted)
    floats = np.asarray(wanted)
    with jax.transfer_guard_host_to_device("disallow_explicit"):
        assert net.float_on_host(floats) is floats and net.float_on_host(levels).shape == levels.shape
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed"):
            jnp.asarray(levels)


# ---- the gate ----------------------------------------------------------------------------------------------


FLOATS = np.float32(IMAGES / 255)


@jax.jit
def linear(x):
    return predict(WEIGHTS, x)[0]


def test_an_honest_network_passes_the_gate():
    assert checks.network(linear, FLOATS, SPLIT.labels).warnings == []


@pytest.mark.parametrize(
    "network, words",
    [
        (jax.jit(lambda x: jax.nn.softmax(linear(x))), "probabilities"),
        (jax.jit(lambda x: jnp.ones((len(x), CLASSES))), "same logits for every image"),
    ],
)
def test_broken_networks_get_a_warning(network, words):
    assert any(words in warning for warning in checks.network(network, FLOATS, SPLIT.labels).warnings)


def test_a_randomised_network_gets_a_warning():
    drawn = jax.jit(lambda x, seed: linear(x) + jax.random.normal(jax.random.key(seed), (len(x), CLASSES)))
    seeds = iter(range(9))
    asked = checks.network(lambda x: drawn(x, next(seeds)), FLOATS, SPLIT.labels)
    assert any("randomised" in warning for warning in asked.warnings)


@pytest.mark.parametrize(
    "network, labels, words",
    [
        (jax.jit(lambda x: linear(x) - linear(x).mean(0, keepdims=True)), SPLIT.labels, "other images of its batch"),
        (lambda x: linear(x) * jnp.nan, SPLIT.labels, "NaN"),
        (lambda x: linear(x)[:, 0], SPLIT.labels, "shape"),
        (linear, np.append(SPLIT.labels[:-1], 4), "4 classes"),
    ],
)
def test_what_makes_every_number_wrong_is_refused(network, labels, words):
    with pytest.raises(InputError, match=words):
        checks.network(network, FLOATS, labels)


# ---- records -----------------------------------------------------------------------------------------------


def recipe(folder):
    """Of a small network on images of three classes, whose file is written into the folder."""
    settings, rng = clean_recipe(), np.random.default_rng(0)
    np.savez(folder / "a.npz", x_train=rng.integers(0, 256, (48, 8, 8, 1), dtype=np.uint8), y_train=np.arange(48) % 3,
             x_test=rng.integers(0, 256, (18, 8, 8, 1), dtype=np.uint8), y_test=np.arange(18) // 6)  # fmt: skip
    settings.data = dict(name="npz", path=str(folder / "a.npz"), val_size=8, split_seed=0)
    settings.model = dict(name="cnn", widths=((4,),), hidden=())
    settings.evaluate.attacks = ("fgsm",)
    return settings


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run that has taken no step, with a record of its evaluation."""
    folder = tmp_path_factory.mktemp("made")
    evaluate.evaluate(untrained_run(folder / "run", recipe(folder)))
    return folder / "run"


@pytest.fixture
def trained(made, tmp_path):
    """A copy of it, of which a test may change the folder."""
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def prepared_once(monkeypatch):
    """Each evaluation of one network asks it the same and compiles the same attack; here all of a test share them."""

    def only_once(make):
        made = []

        def first(*arguments):
            if not made:
                made.append(make(*arguments))
            return made[0]

        return first

    for name in ("_asked", "_executor"):
        monkeypatch.setattr(evaluate, name, only_once(getattr(evaluate, name)))


@pytest.mark.usefixtures("prepared_once")
def test_records_are_reused_for_the_same_weights_and_images_only(trained):
    file = trained / "eval/best/fgsm.json"
    before = file.stat().st_mtime_ns
    evaluate.evaluate(trained)
    assert file.stat().st_mtime_ns == before
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "weights": "of another network"}))
    assert evaluate.evaluate(trained)[0]["weights"] == record["weights"]
    file.write_text(file.read_text()[:200])
    assert evaluate.evaluate(trained)[0]["robust_acc"] == record["robust_acc"]


@pytest.mark.usefixtures("prepared_once")
def test_a_record_is_of_the_network_the_code_and_the_precision_that_made_it(trained, caplog):
    """The same weights with another activation, or another version's attack, give other numbers."""
    file = trained / "eval/best/fgsm.json"
    record = files.read_json(file)
    rounded = (np.array(record["fingerprint"]) * (1 + 1e-4)).tolist()
    other = (np.array(record["fingerprint"]) * [[[1.0], [-1.0]]]).tolist()  # the same logits, another gradient
    caplog.set_level("INFO", "ibjax.evaluation.evaluate")
    for key, value, reused in (
        ("fingerprint", rounded, True),
        ("fingerprint", other, False),
        ("code", "of another version", False),
        ("precision", "bfloat16", False),
    ):
        file.write_text(json.dumps({**record, key: value, "robust_acc": 0.125}))
        found = evaluate.evaluate(trained)[0]["robust_acc"]
        assert found == (0.125 if reused else record["robust_acc"])
        named = "gradients" if key == "fingerprint" else key
        assert (f"is of other {named}: computed again" in caplog.text) == (not reused)
        caplog.clear()


def test_a_transfers_record_is_of_the_surrogate_that_made_it_too(trained, caplog):
    """The surrogate's weights may be the same and its gradient another; earlier versions did not write it down."""
    transfer = lambda: evaluate.evaluate(trained, attacks=("fgsm",), surrogate=trained)[0]  # noqa: E731
    record, (file,) = transfer(), (trained / "eval/best").glob("fgsm~*.json")
    right = np.array(record["surrogate_fingerprint"])
    caplog.set_level("INFO", "ibjax.evaluation.evaluate")
    for value, differing in (
        ((right * (1 + 1e-4)).tolist(), ""),
        ((right * [[[1.0], [-1.0]]]).tolist(), "gradients of the surrogate"),
        ((right * [[[-1.0], [1.0]]]).tolist(), "logits of the surrogate"),
        (None, "logits of the surrogate, gradients of the surrogate"),
    ):
        changed = {**record, "surrogate_fingerprint": value, "robust_acc": 0.125}
        file.write_text(json.dumps({k: v for k, v in changed.items() if v is not None}))
        assert transfer()["robust_acc"] == (record["robust_acc"] if differing else 0.125)
        assert (f"is of other {differing}: computed again" in caplog.text) == bool(differing)
        caplog.clear()
    assert "surrogate_fingerprint" not in files.read_json(trained / "eval/best/fgsm.json")


def test_examples_of_another_evaluation_do_not_stay_beside_a_record(trained):
    file = trained / "eval/best/fgsm.json"
    assert file.with_suffix(".examples.npz").is_file()
    file.unlink()
    evaluate.evaluate(trained, keep=0)
    assert file.is_file() and not file.with_suffix(".examples.npz").exists()


def test_a_part_of_the_test_set_has_every_class_and_its_own_file(trained):
    """A class folder is sorted by class: the first n images would be of one class only."""
    whole = (trained / "eval/best/fgsm.json").read_text()
    part = evaluate.evaluate(trained, n=6)[0]
    assert part["n"] == 6 and (trained / "eval/best/fgsm.n6.json").is_file()
    assert (trained / "eval/best/fgsm.json").read_text() == whole
    loaded = run.load(trained)
    assert sorted(run.test_split(loaded, 6).labels) == [0, 0, 1, 1, 2, 2]


def test_other_test_images_than_the_run_was_made_with_are_refused(trained, made):
    with np.load(made.parent / "a.npz") as archive:
        arrays = dict(archive)
    arrays["x_test"] = arrays["x_test"][::-1]
    np.savez(trained.parent / "b.npz", **arrays)
    change_config(trained, data__path=str(trained.parent / "b.npz"))
    with pytest.raises(InputError, match="is not the one that"):
        evaluate.evaluate(trained)


def test_what_a_checkpoint_was_selected_on_is_recorded(tmp_path):
    main.execute(recipe(tmp_path), tmp_path / "run", "train")
    steps = {which: evaluate.evaluate(tmp_path / "run", which)[0] for which in ("best", "last", "10", "010")}
    assert steps["best"]["selected_on"] == "val" and steps["last"]["selected_on"] == "last"
    assert steps["10"]["selected_on"] == "step" and not (tmp_path / "run/eval/010").exists()


def test_a_bar_names_the_run_the_attack_and_how_many_there_are(trained, monkeypatch):
    seen, original = [], scoring.tqdm

    def spy(**options):
        seen.append(options["desc"])
        return original(**options)

    monkeypatch.setattr(scoring, "tqdm", spy)
    evaluate.evaluate(trained, attacks=("pgd-1", "fgsm", "pgd-2(restarts=2)"))  # there is a record of fgsm
    assert seen == [
        "undefended: PGD-1, eps 2/16, 1 of 3",
        "undefended: PGD-2 (restarts 2), eps 2/16, 3 of 3",
    ]


def test_flags_of_a_record_are_its_accuracy(trained):
    record = evaluate.evaluate(trained)[0]
    assert 100 * results.robust_flags(record).mean() == pytest.approx(record["robust_acc"], abs=1e-3)


def test_a_network_inside_a_network_is_evaluated_in_float32_too():
    backbone = dict(name="resnet", depth=10, width=4, dtype="bfloat16")
    outer = stochastic.Model(10, backbone=backbone)
    assert run.in_float32(outer).backbone == {**backbone, "dtype": "float32"}
    assert run.in_float32(resnet.Model(10, dtype="bfloat16")).dtype == "float32"


def test_autoattack_goes_on_where_it_was_ended_and_states_robust_accuracy_after_each_attack(trained, monkeypatch):
    monkeypatch.setitem(autoattack._VERSIONS, "standard", ("apgd-ce", "apgd-t"))
    notices = iter([True])
    monkeypatch.setattr(cluster, "preempted", lambda: next(notices, False))
    folder = trained / "eval/best"
    with pytest.raises(PreemptedError):
        evaluate.evaluate(trained, attacks=("autoattack",))
    assert len(list(folder.glob(".autoattack-*.npz"))) == 1 and not (folder / "autoattack.json").exists()
    resumed = evaluate.evaluate(trained, attacks=("autoattack",))[0]
    assert not list(folder.glob(".autoattack-*.npz"))
    assert list(resumed["robust_after"]) == ["apgd-ce", "apgd-t"] == list(resumed["seconds_of"])
    assert resumed["robust_after"]["apgd-t"] == resumed["robust_acc"] <= resumed["clean_acc"]
    assert any("DLR needs 4 classes" in text for text in resumed["warnings"])
    assert resumed["max_distance"] <= 2 / 16 + 1e-6

    (folder / "autoattack.json").unlink()
    whole = evaluate.evaluate(trained, attacks=("autoattack",))[0]
    assert whole["robust_flags"] == resumed["robust_flags"] and whole["robust_after"] == resumed["robust_after"]
    assert "robust after" in tables.as_text([whole]) and "APGD-t" in tables.as_text([whole])
    with np.load(folder / "autoattack.examples.npz") as examples:
        assert len(examples["x_adv"]) == 10
