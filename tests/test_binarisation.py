"""The binarisation test fails attacks on networks with broken gradients, passes them on honest ones, and says which."""

import json
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_recipe, untrained_run
from sklearn.svm import SVC

from ibjax.analysis import binarisation as analysis
from ibjax.attacks import geometry
from ibjax.devices import cluster
from ibjax.errors import InputError

pytestmark = pytest.mark.usefixtures("rolled")
RNG = np.random.default_rng(0)
X = RNG.uniform(0, 1, (16, 6, 6, 1)).astype(np.float32)
W = np.float32(RNG.normal(size=(36, 128)) / 6)
V = np.float32(RNG.normal(size=(128, 128)) / 11)
THREAT = dict(norm="linf", eps="2/16")


def run(features, attacks=(), *, images=X, inner=24, **options):
    """The test on `features`, a function of flat images, with attacks by name or as they are."""
    if not isinstance(attacks, dict):
        attacks = {name: analysis.attack_of(name, **THREAT, step_size="1/32")[0] for name in attacks}
    phi = lambda variables, x: features(x.reshape(len(x), -1))  # noqa: E731
    return analysis.binarisation(phi, None, images, attacks, **{**THREAT, "inner": inner, **options})


def linear(x):
    return x @ W


HONEST = {
    "linear": linear,
    "relu": lambda x: jax.nn.relu(jax.nn.relu(x @ W) @ V),
    "tanh": lambda x: jnp.tanh(jnp.tanh(2 * x @ W) @ V),
}
BROKEN = {
    "quantised": lambda x: linear(jnp.round(x * 16) / 16),  # its gradient is zero everywhere
    "saturated": lambda x: jnp.tanh(1e3 * (x - 0.5) @ W),
    "shattered": lambda x: linear(x + 0.02 * jnp.sin(1e4 * x)),
    "nan": lambda x: linear(x + 0 * jnp.sqrt(jnp.abs(x - x))),
}


@pytest.mark.parametrize("name", HONEST)
def test_pgd_passes_on_honest_networks(name):
    found = run(HONEST[name], ["pgd-10"])
    assert found.used.all() and found.broken["pgd-10"].mean() >= 0.95 and found.random.mean() < 0.1


@pytest.mark.parametrize("name", BROKEN)
def test_pgd_fails_on_networks_with_broken_gradients(name):
    found = run(BROKEN[name], ["pgd-10"])
    assert found.used.mean() > 0.9 and found.broken["pgd-10"].mean() < 0.5


@pytest.mark.parametrize("name", ["relu", "quantised"])
def test_the_boundary_point_is_adversarial_for_its_own_readout(name):
    """Of every network, also where no attack finds it; x itself and points outside the ball do not count."""
    features = {**HONEST, **BROKEN}[name]
    x_b = run(features).boundary
    assert np.allclose(np.abs(x_b - X).max((1, 2, 3)), 2 / 16, atol=1e-6) and x_b.min() >= 0 and x_b.max() <= 1
    outside = np.clip(X + 1.1 * (x_b - X), 0, 1)
    images = dict(x_b=x_b, x=X, outside=outside, nan=np.nan * X)
    shown = {name: partial(lambda there, *_: jnp.asarray(there), value) for name, value in images.items()}
    found = run(features, shown)
    assert found.used.all() and found.broken["x_b"].all()
    assert not any(found.broken[name].any() for name in ("x", "outside", "nan"))


def test_an_image_counts_within_the_radius_up_to_rounding():
    """Which grows with the radius: at 3 a millionth is four of the last bits of float32."""
    x = np.zeros((4, 4, 4, 1), np.float32)
    longer = np.array([0.8, 1 - 1e-6, 1 + 5e-7, 1 + 1e-5])[:, None, None, None]
    x_adv = np.float32(0.75 * longer) + x  # 16 pixels: 3 away
    shown = partial(analysis._broken, lambda *_: jnp.asarray(x_adv), lambda _, x: x, "l2", 3.0)
    flat, keys = x.reshape(4, 16), jax.random.split(jax.random.key(0), 4)
    assert jax.jit(shown)(None, flat + 1, flat, keys, x).tolist() == [True, True, True, False]


def test_batch_size_changes_no_flag():
    """Nor do the other images."""
    attacks = ["pgd-2", "noise-sign"]
    whole = run(HONEST["relu"], attacks, batch_size=64, inner=12)
    assert 0 < whole.broken["pgd-2"].sum() < len(X)
    parts = run(HONEST["relu"], attacks, images=X[:13], batch_size=8, inner=12)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(one[:13], other)


def test_images_that_cannot_be_separated_are_left_out():
    assert not run(lambda x: 1 + 0 * x).used.any()
    found = run(lambda x: jnp.sum(x, 1, keepdims=True), ["noise"])  # one feature: x_b is rarely the largest
    assert not found.used.all() and not (found.broken["noise"] & ~found.used).any()


def test_attacks_of_two_classes_pass_on_a_linear_network():
    names = ("margin-5", "spsa-15", "apgd-t")
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam
        found = run(linear, [*names, "noise"])
    assert {name for name in names if not found.broken[name].all()} == set()
    assert not found.broken["noise"].any() and list(found.broken) == sorted(found.broken)
    for name in ("apgd-dlr", "apgd-t"):
        (warning,) = analysis.attack_of(name, **THREAT, step_size="1/32")[1]
        assert "margin" in warning


@pytest.mark.slow
def test_the_others_pass_on_a_linear_network():
    names = ("fgsm", "bim-5", "mim-5", "nifgsm-5", "fab-t", "apgd-ce", "apgd-dlr", "fab", "autoattack")
    found = run(linear, [*names, "noise-sign"])
    assert {name for name in names if not found.broken[name].all()} == set() and not found.broken["noise-sign"].any()
    attack, _ = analysis.attack_of("cw-l2-200", norm="l2", eps=0.8, step_size=0.1)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam
        assert run(linear, {"cw": attack}, norm="l2", eps=0.8).broken["cw"].all()


@pytest.mark.slow
def test_autoattack_is_better_where_gradients_are_masked():
    """By Square, not on all images: its squares leave out the last row and column."""
    found = run(BROKEN["quantised"], ["autoattack", "apgd-ce"])
    assert found.broken["autoattack"].mean() > 0.5 > 0.1 > found.broken["apgd-ce"].mean()


# ---- the parts -----------------------------------------------------------------------------------------------


def test_the_readout_has_the_largest_margin():
    """As a support vector machine's without slack."""
    inside = RNG.normal(size=(60, 8)).astype(np.float32)
    anchor = np.full(8, 2, np.float32)
    w = analysis.readout(anchor, inside)
    machine = SVC(kernel="linear", C=1e8, tol=1e-8).fit(np.vstack([inside, anchor]), [0] * 60 + [1])
    np.testing.assert_allclose(w, machine.coef_[0] / 2, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(((anchor - inside) @ w).min(), 1, rtol=1e-6)
    assert analysis.readout(inside.mean(0), inside) is None
    assert analysis.readout(anchor, np.tile(anchor * np.float32(1 + 1e-6), (60, 1))) is None


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 0.8), ("l1", 5.0)])
def test_points_lie_on_the_sphere_and_in_the_ball(norm, eps):
    x = np.float32(RNG.choice([0.0, 0.5, 1.0], (64, 6, 6, 1)))
    centre = np.full((4096, 2, 1, 1), 0.5, np.float32)

    @jax.jit
    def drawn():
        """Points, and their distances."""
        keys, more_keys = (jax.random.split(jax.random.key(i), len(images)) for i, images in enumerate((x, centre)))
        points = analysis.on_sphere(keys, x, norm, eps), analysis.in_ball(keys, x, norm, eps)
        around = geometry.distance(analysis.in_ball(more_keys, centre, norm, 0.4), centre, norm)
        return [(there, geometry.distance(there, x, norm)) for there in points], around

    found, around = jax.device_get(drawn())
    for points, distance in found:
        assert points.min() >= 0 and points.max() <= 1 and distance.max() <= eps * (1 + 1e-6)
    np.testing.assert_allclose(found[0][1], eps, rtol=1e-4)
    # away from the box the volume within a radius grows as its power of the dimensions
    assert abs(np.mean(around < 0.2) - 0.25) < 0.03


def test_verdicts():
    assert [analysis.verdict(*pair) for pair in ((94.9, 0), (95.0, 94.9), (100.0, 95.0))] == [
        "fails",
        "passes",
        "too easy",
    ]


# ---- of a run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    sections = dict(model=dict(name="cnn", widths=((8,),), hidden=()), objective=dict(name="standard"), attack=None)
    return untrained_run(tmp_path_factory.mktemp("runs") / "small", small_recipe(X.shape[1:], **sections))


def test_a_run_is_tested_from_the_command_line(workdir, monkeypatch, capsys):
    command = ["binarisation", f"--workdir={workdir}", "--attacks=pgd-5,apgd-dlr", "--n=10", "--inner=20"]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setattr(cluster, "initialize", lambda: None)  # it must come before all of JAX
    with pytest.raises(SystemExit) as caught:
        analysis.main()
    assert caught.value.code == 0
    record = json.loads((workdir / "binarisation" / "best.json").read_text())
    assert list(record["asr"]) == ["pgd-5", "apgd-dlr"] and record["n"] == 10 >= record["used"] > 0
    assert all(
        analysis.verdict(rate, record["random_asr"]) == record["verdict"][k] for k, rate in record["asr"].items()
    )
    printed = capsys.readouterr().out
    assert f"| apgd-dlr | {record['asr']['apgd-dlr']:.2f} |" in printed and "margin used" in printed


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(attacks=["pgx-20"]), "did you mean 'pgd-20'"),
        (dict(attacks=["ara-10"]), "logits alone"),
        (dict(attacks=["autoattack-rand"]), "give 'autoattack'"),
        (dict(n=100_000), "the test set has"),
        (dict(n=0), "whole number of at least 1"),
        (dict(inner=0), "inner=0"),
    ],
)
def test_what_cannot_be_tested_is_refused(options, words, workdir):
    with pytest.raises(InputError, match=words) as caught:
        analysis.evaluate(workdir, **{"n": 4, "inner": 2, **options})
    assert "\n" not in str(caught.value)


def test_networks_without_usable_features_are_refused(workdir, monkeypatch):
    class Bare(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(10)(x.reshape(len(x), -1)), {}

    trained = analysis.run.load(workdir)
    monkeypatch.setattr(analysis.run, "load", lambda *args: trained._replace(model=Bare()))
    with pytest.raises(InputError, match="no feature 'pre_logits'"):
        analysis.evaluate(workdir, n=4)
    monkeypatch.setattr(analysis.run, "load", lambda *args: trained)
    monkeypatch.setattr(analysis, "features_of", lambda *args: lambda variables, x: 0 * x)
    with pytest.raises(InputError, match="no readout separates"):
        analysis.evaluate(workdir, attacks=["noise"], n=len(X), inner=2)
    with pytest.raises(InputError, match="NaN or infinite"):
        run(lambda x: x / 0)
    with pytest.raises(InputError, match="eps=0 "):
        run(linear, eps=0)
