"""Evaluation of drawn predictions, adaptive attacks by name, transfer from a surrogate."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import smoke_config
from jax.sharding import AxisType

from ibjax import files, main
from ibjax.attacks import autoattack, geometry
from ibjax.attacks.pgd import pgd
from ibjax.attacks.representation import ara, guides
from ibjax.data import Split
from ibjax.errors import CheckpointError, InputError
from ibjax.evaluation import evaluate, results, scoring, settings
from ibjax.evaluation.named import in_groups, named
from ibjax.evaluation.report import provenance, tables
from ibjax.models import cnn, siriib, stochastic
from ibjax.net import linen_net
from ibjax.objectives import ib_rar
from ibjax.runs import run

RNG = np.random.default_rng(1)
N = 11
SPLIT = Split(RNG.integers(0, 256, (N, 8, 8, 3), dtype=np.uint8), (np.arange(N) % 3).astype(np.int32))
X, Y = SPLIT.images / np.float32(255), SPLIT.labels
BACKBONE = dict(name="cnn", widths=((4,),), hidden=(6,), dropout=0.0)
EPS, STEP = 0.1, 0.03


def mesh(devices):
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def gaussian(sigma_bias=0.0, scale=3.0, num_classes=3):
    """A stochastic network whose last layer is not small, and its variables; σ = softplus(bias)."""
    model = stochastic.Model(num_classes, BACKBONE, latent=5)
    initial = jax.jit(model.init)(jax.random.key(0), X)["params"]
    params = jax.tree.map(lambda leaf: np.float32(scale) * np.asarray(leaf), initial)
    dense = params["gaussian"]["dense"]
    dense["kernel"][:, 5:], dense["bias"][5:] = 0, sigma_bias
    return model, {"params": params, "batch_stats": {}}


def score(predict, variables, name, batch_size=8, devices=8, **options):
    attack = named(name)
    scorer = scoring.Scorer(
        predict, functools.partial(attack.make, norm="linf"), mesh(devices), batch_size, "linf",
        features=attack.features is not None, guided=attack.guided, **options,
    )  # fmt: skip
    return scorer(variables, SPLIT, 3, eps=EPS, step_size=STEP, keep=N)


# ---- predictions that are drawn ------------------------------------------------------------------------------


def test_the_prediction_is_the_mean_of_the_samples_softmaxes():
    """Against the integral over the Gaussian, of which one dimension matters to the two classes."""
    model, variables = gaussian(sigma_bias=4.0, num_classes=2)
    head = variables["params"]["head"]["dense"]
    head["kernel"], head["bias"] = np.zeros((5, 2), np.float32), np.float32([2, 0])
    head["kernel"][2, 0] = 0.4
    keys = jax.random.split(jax.random.key(1), N)
    log_p, _ = jax.jit(scoring.sampling(model, 4000))(variables, X, keys)
    np.testing.assert_allclose(np.exp(log_p).sum(1), 1, rtol=1e-5)
    features = jax.jit(model.apply)(variables, X)[1]
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    z = np.asarray(features["mu"])[:, 2, None] + np.asarray(features["sigma"])[:, 2, None] * nodes
    expected = (weights / (1 + np.exp(-2 - 0.4 * z))).sum(1) / weights.sum()
    of_mean_logits = 1 / (1 + np.exp(-2 - 0.4 * np.asarray(features["mu"])[:, 2]))
    assert np.ptp(expected) > 0.005 and np.abs(of_mean_logits - expected).max() > 0.05
    np.testing.assert_allclose(np.exp(log_p)[:, 0], expected, atol=0.02)  # more than 4 standard errors
    one = jax.jit(scoring.sampling(model, 1))(variables, X, keys)[0]
    assert np.abs(np.exp(one)[:, 0] - expected).max() > 0.1


def test_with_hardly_any_noise_sampled_is_deterministic():
    model, variables = gaussian(sigma_bias=-50.0)
    plain = lambda variables, x, keys: linen_net(model).predict(variables, x)  # noqa: E731
    drawn, x_drawn = score(scoring.sampling(model, 3), variables, "pgd-2")
    flags, x_adv = score(plain, variables, "pgd-2")
    np.testing.assert_array_equal(drawn.clean, flags.clean)
    np.testing.assert_array_equal(drawn.robust, flags.robust)
    np.testing.assert_allclose(drawn.loss, flags.loss, rtol=0.02, atol=1e-3)
    assert np.mean(np.abs(x_drawn - x_adv) > 1e-6) < 0.02  # signs of gradients near zero
    noisy, noisy_variables = gaussian(sigma_bias=2.0)
    assert np.abs(score(scoring.sampling(noisy, 3), noisy_variables, "pgd-2")[0].loss - flags.loss).max() > 0.05


@pytest.mark.parametrize("batch_size, devices", [(1, 1), (4, 1), (16, 8)])
def test_draws_depend_on_neither_batch_size_nor_number_of_devices(batch_size, devices):
    model, variables = gaussian()
    predict = scoring.sampling(model, 2)
    reference, x_reference = score(predict, variables, "pgd-2")
    flags, x_adv = score(predict, variables, "pgd-2", batch_size, devices)
    np.testing.assert_allclose(x_adv, x_reference, atol=1e-6)
    np.testing.assert_allclose(flags.loss, reference.loss, rtol=1e-4)


def test_an_attack_does_not_know_the_draws_by_which_it_is_judged():
    """One that answers with x where it sees a mistake and with 0 where it sees none: coins, of which it sees others."""

    def predict(variables, x, keys):
        heads = jax.vmap(lambda key: jax.random.bernoulli(key))(keys)
        return jnp.where(heads[:, None], jax.nn.one_hot(zeros, 3), jax.nn.one_hot((zeros + 1) % 3, 3)), {}

    zeros = jnp.zeros(96, int)

    def make(eps, step_size):
        def attack(keys, logits_fn, x, y):
            wrong = jnp.argmax(logits_fn(x), 1) != y
            return jnp.where(geometry.per_image(wrong, x), x, 0.0)

        return attack

    split = Split(np.full((96, 1, 1, 1), 5, np.uint8), np.zeros(96, np.int32))
    scorer = scoring.Scorer(predict, make, mesh(8), 96, "linf")
    flags, x_adv = scorer({}, split, 0, eps=0.1, step_size=0.1, keep=96)
    seen_right = x_adv[:, 0, 0, 0] == 0
    assert 0.3 < np.mean(flags.clean[seen_right]) < 0.7 and 0.3 < np.mean(flags.clean[~seen_right]) < 0.7


# ---- adaptive attacks ----------------------------------------------------------------------------------------


def test_without_its_terms_ib_rars_attack_is_pgd_on_cross_entropy():
    model = cnn.Model(3, **{k: v for k, v in BACKBONE.items() if k != "name"}, batch_norm=True)
    variables = jax.jit(model.init)(jax.random.key(0), X)
    variables["params"]["head"]["dense"]["kernel"] = jax.random.normal(jax.random.key(1), (6, 3))
    network = lambda x: linen_net(model).predict(variables, x)  # noqa: E731
    x, y = (jnp.tile(a, (19, *[1] * (a.ndim - 1)))[:200] for a in (X, Y))  # two groups
    keys = jax.random.split(jax.random.key(0), 200)
    step_size = named("ib_rar-2").step_size("8/255", None)
    assert step_size == pytest.approx(2.3 / 2 * 8 / 255)
    without = ib_rar.adaptive_attack(alpha=0.0, beta=0.0, eps="8/255", steps=2)
    adaptive = in_groups(without, 100)(keys, network, x, y)
    plain = pgd(eps="8/255", step_size=step_size, steps=2)(keys, network, x, y)
    assert np.mean(np.abs(adaptive - plain) > 1e-6) < 0.01
    terms = named("ib_rar-2", dict(name="ib_rar", alpha=1.0, beta=0.0))
    other = terms.make(norm="linf", eps="8/255", step_size=step_size)(keys, network, x, y)
    assert np.mean(np.abs(other - plain) > 1e-6) > 0.1


def test_adaptive_attacks_take_the_runs_own_weights_where_it_has_some():
    assert named("ib_rar-10").settings["beta"] == 0.08
    assert named("ib_rar-10", dict(name="ib_rar", alpha=0.1, beta=1.0)).settings["alpha"] == 0.1
    assert named("ib_rar-10", dict(name="ib_rar", alpha=0.0, beta=0.0)).settings["alpha"] == 0.008
    assert named("ib_rar-10", dict(name="vib", beta=1.0)).settings["beta"] == 0.08
    assert named("siriib-20").settings["terms"] == ("ce", "svd", "info")
    assert named("siriib-ce-svd-20").settings["terms"] == ("ce", "svd")


def test_a_groups_result_depends_on_its_own_images_only():
    """The attack is the distance to the group's mean."""

    def attack(key, logits_fn, x, y):
        return x - jnp.mean(x, axis=0, keepdims=True) + key.shape[0]

    grouped, key = in_groups(attack, 4), jax.random.key(0)
    x = np.concatenate([X, X[:1]])
    found = grouped(key, None, jnp.asarray(x), jnp.arange(12))
    for first in (0, 4, 8):
        part = x[first : first + 4]
        np.testing.assert_allclose(found[first : first + 4], part - part.mean(0) + 4, rtol=1e-6)
    with pytest.raises(InputError, match="groups of 4"):
        grouped(key, None, X, Y)


def test_siriibs_attack_on_cross_entropy_alone_is_pgd():
    model = siriib.Model(3, dict(name="resnet", blocks=(1, 1), width=4), connections=1, scales=(8, 4), widths=(3,))
    variables = jax.jit(model.init)(jax.random.key(0), X)
    network = lambda x: linen_net(model).predict(variables, x)  # noqa: E731
    keys = jax.random.split(jax.random.key(0), N)
    made = {
        name: named(name).make(norm="linf", eps=EPS, step_size=STEP)(keys, network, X, Y)
        for name in ("siriib-ce-1", "siriib-svd-1", "pgd-1")
    }
    assert np.mean(np.abs(made["siriib-ce-1"] - made["pgd-1"]) > 1e-6) < 0.01
    assert np.mean(np.abs(made["siriib-svd-1"] - made["pgd-1"]) > 1e-6) > 0.1


@pytest.mark.parametrize("batch_size, devices", [(4, 1), (16, 8)])
def test_representation_attacks_are_guided_by_images_of_other_classes(batch_size, devices):
    model, variables = gaussian()
    net = linen_net(model)
    predict = lambda variables, x, keys: net.predict(variables, x)  # noqa: E731
    chosen = guides(SPLIT.labels)
    assert not np.any(SPLIT.labels[chosen] == SPLIT.labels)
    expected = ara(eps=EPS, steps=2)(None, lambda x: net.predict(variables, x)[1]["mu"], X, X[chosen])
    flags, x_adv = score(predict, variables, "ara-2", batch_size, devices)
    near = np.abs(x_adv - expected).max((1, 2, 3)) < 1e-3  # at a ReLU's corner rounding decides where a search goes
    assert near.mean() > 0.8
    assert geometry.distance(expected, X, "linf").max() > EPS / 2
    assert len(flags.robust) == N


# ---- what is refused -----------------------------------------------------------------------------------------

GOOD = dict(
    precision="high",
    attacks=("pgd-2",),
    norm="linf",
    eps="8/255",
    step_size="2/255",
    ladder=(),
    n=None,
    samples=None,
    batch_size=8,
)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(samples=4, attacks=("pgd-2", "autoattack")), "give 'autoattack-rand'"),
        (dict(samples=4, attacks=("square",)), "give 'autoattack-rand'"),
        (dict(samples=4, attacks=("ara-2",)), "without samples"),
        (dict(samples=0), "evaluate.samples=0"),
        (dict(samples=True), "evaluate.samples=True"),
        (dict(attacks=("ib_rar-10",), norm="l2"), "norm"),
        (dict(attacks=("siriib-kl-10",)), "unknown"),
    ],
)
def test_contradictory_settings_are_refused_in_one_line(changes, words):
    settings.check_settings(GOOD)
    settings.check_settings({**GOOD, "samples": 4, "attacks": ("fgsm", "cw-l2-3", "autoattack-rand")})
    with pytest.raises(InputError, match=words) as caught:
        settings.check_settings({**GOOD, **changes})
    assert "\n" not in str(caught.value)


def test_a_network_without_what_an_evaluation_needs_is_refused():
    plain, drawing = cnn.Model(3, widths=((4,),), hidden=(6,)), stochastic.Model(3, BACKBONE, latent=5)
    settings.check_network(drawing, (8, 8, 3), {**GOOD, "samples": 4})
    settings.check_network(drawing, (8, 8, 3), {**GOOD, "attacks": ("ara-2", "ib_rar-2")})
    with pytest.raises(InputError, match="draws nothing"):
        settings.check_network(plain, (8, 8, 3), {**GOOD, "samples": 4})
    with pytest.raises(InputError, match="'siriib-20' needs the feature 'x_avg'"):
        settings.check_network(plain, (8, 8, 3), {**GOOD, "attacks": ("siriib-20",)})


# ---- runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def digits(digits_run, tmp_path):
    """A copy that a test may write into."""
    return shutil.copytree(digits_run, tmp_path / "digits", ignore=shutil.ignore_patterns(".lock"))


def test_a_surrogate_that_is_the_run_itself_is_the_white_box(digits):
    names = ("fgsm", "pgd-2")
    white, transferred = (evaluate.evaluate(digits, attacks=names, surrogate=source) for source in (None, digits))
    for one, other in zip(white, transferred[: len(names)], strict=False):
        if one["main"]:
            assert (
                other["robust_flags"] == one["robust_flags"] and other["attack"] == f"{one['attack']} from IBD student"
            )
            assert other["attack_settings"]["surrogate"]["weights"] == one["weights"]
    transfers = sorted((digits / "eval/best").glob("*~*.json"))
    before = [file.stat().st_mtime_ns for file in transfers]
    evaluate.evaluate(digits, attacks=names, surrogate=digits)  # reads what is there
    assert len(transfers) == 2 and [file.stat().st_mtime_ns for file in transfers] == before
    assert files.read_json(digits / "eval/best/pgd-2.json")["attack"] == "pgd-2"

    other = evaluate.evaluate(digits, attacks=("pgd-2",), surrogate=digits / "undefended")[0]
    assert other["robust_acc"] >= white[1]["robust_acc"]
    grid = tables.cells(tables.tables([*white, *transferred, other])[0])
    assert "PGD-2" in grid[0] and "PGD-2, transfer from undefended" in grid[0] and len(grid) == 2
    assert "network of undefended" in provenance._describe(other)


def test_examples_are_of_different_classes_where_the_images_are_sorted_by_class(digits, monkeypatch):
    """As class folders are; of PGD and of AutoAttack, whose images come back in other ways."""
    split = run.test_split(run.load(digits))
    by_class = Split(*(part[np.argsort(split.labels, kind="stable")] for part in split))
    monkeypatch.setattr(run, "test_split", lambda *_: by_class)
    records = evaluate.evaluate(digits, attacks=("pgd-2", "apgd-ce"))
    for name in ("pgd-2", "apgd-ce"):
        with np.load(digits / f"eval/best/{name}.examples.npz") as kept:
            assert kept["label"].tolist() == list(range(10)), name
            assert np.abs(kept["x_adv"] - kept["x"]).max() <= 2 / 16 + 1e-6  # x' stands beside its own x
    assert {record["chance_acc"] for record in records} == {12.5}  # two of sixteen


def test_parts_of_autoattack_transfer_too(digits):
    """From the run itself: what withstands there comes back as it is, so the flags are those of the white box."""
    white, transferred = (
        evaluate.evaluate(digits, attacks=("apgd-ce",), surrogate=source)[0] for source in (None, digits)
    )
    assert transferred["robust_acc"] == white["robust_acc"]
    assert "robust_after" in white and "robust_after" not in transferred
    other = evaluate.evaluate(digits, attacks=("apgd-ce",), surrogate=digits / "undefended")[0]
    assert other["robust_acc"] >= white["robust_acc"] and other["clean_acc"] == white["clean_acc"]


def test_a_run_that_is_older_than_an_option_of_evaluation_can_be_evaluated(digits):
    content = files.read_json(digits / "config.json")
    del content["config"]["evaluate"]["samples"]
    (digits / "config.json").write_text(json.dumps(content))
    assert run.load(digits).config.evaluate.samples is None
    content["config"]["evaluate"] = "all"
    (digits / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="damaged"):
        run.load(digits)


def test_records_of_drawn_predictions_say_so(tmp_path, monkeypatch):
    monkeypatch.setitem(autoattack._VERSIONS, "rand", ("apgd-ce",))
    monkeypatch.setattr(autoattack, "SAMPLES", 2)
    recipe = smoke_config("variational", "vib-mnist,smoke")
    recipe.epochs = 1
    recipe.evaluate.update(attacks=("pgd-2",), n=8)
    main.execute(recipe, tmp_path / "run")
    plain = evaluate.evaluate(tmp_path / "run")[0]
    drawn = evaluate.evaluate(tmp_path / "run", attacks=("pgd-2", "autoattack-rand"), samples=3)
    assert [record["samples"] for record in (plain, *drawn)] == [None, 3, 3]
    assert sorted(file.name for file in (tmp_path / "run/eval/best").glob("*.json")) == [
        "autoattack-rand.sampled3.n8.json",
        "pgd-2.n8.json",
        "pgd-2.sampled3.n8.json",
    ]
    grid = tables.cells(tables.tables([plain, *drawn])[0])
    assert [line[0] for line in grid[1:]] == ["VIB-MNIST", "VIB-MNIST (sampled, 3)"]
    assert not any("randomised" in text for text in drawn[0]["warnings"])
    assert "mean of 3 drawn predictions" in provenance._describe(drawn[0])


@pytest.mark.parametrize("name", ["noise", "mim-3", "spsa-2", "cw-l2-4", "ara-2", "ib_rar-10", "siriib-svd-20", "fgsm"])
def test_every_attack_has_a_label_and_a_description(name):
    record = dict(attack=name, attack_settings=named(name).settings, step_size=0.1)
    assert results.attack_label(name) in provenance._describe(record)
    assert results.strength(f"{name} from x") > results.strength("siriib-20")
