"""The information plane: its coordinates by explicit traces, the training that it watches, its file, its command."""

import re
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import clean_recipe, smoke_config
from ml_collections import ConfigDict

from ibjax import config, files
from ibjax.analysis import attacked, plane
from ibjax.devices import cluster
from ibjax.errors import DivergedError, InputError, PreemptedError
from ibjax.net import linen_net, to_float
from ibjax.runs import provenance, run, rundir
from ibjax.training import loop
from ibjax.training.experiment import build, initial_state

OPTIONS = dict(every=3, n=12)


def recipe(**changes):
    """Two epochs of seven steps, up to four at a time, with averaged weights, which are then what is measured."""
    settings = clean_recipe()
    settings.model.widths = ((4,),)
    settings.update(ema_decay=0.5, steps_per_dispatch=4, **changes)
    return settings


def correlation(gram, ridge=1e-5):
    b = len(gram)
    h = np.eye(b) - 1 / b
    gram = h @ gram @ h
    return gram @ np.linalg.inv(gram + ridge * b * np.eye(b))


def gaussian(u, sigma=5.0):
    u = np.asarray(u, np.float64).reshape(len(u), -1)
    return np.exp(-((u[:, None] - u[None]) ** 2).sum(-1) / (2 * sigma**2 * u.shape[1]))


def by_hand(x, labels, layers, classes=10):
    """The two rows of `coordinates` in float64."""
    given = [correlation(gaussian(u)) for u in (x, np.eye(classes)[labels])]
    return np.array([[np.trace(r @ correlation(gaussian(t))) for t in layers] for r in given])


def test_coordinates_are_traces_of_gaussian_operators():
    rng, labels = np.random.default_rng(0), np.arange(40) % 10
    x = rng.uniform(size=(40, 4, 4, 1)).astype(np.float32)
    layers = [rng.normal(size=(40, 6)), np.eye(10)[labels], np.ones((40, 3)), x[:, ::2, ::2] ** 2]
    layers = [t.astype(np.float32) for t in layers]
    found = jax.jit(plane.coordinates, static_argnums=2)(x, labels, 10, layers)
    np.testing.assert_allclose(found, by_hand(x, labels, layers), rtol=5e-3, atol=1e-3)
    assert found[1, 1] > found[1, 0] and np.all(found[:, 2] == 0)  # the label itself; what tells nothing


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(plane, its folder)."""
    folder = tmp_path_factory.mktemp("plane")
    return plane.record(recipe(), folder, **OPTIONS), folder


def measured(model, variables, x, labels, taps):
    """By hand, from the network's own features."""
    features = jax.jit(linen_net(model).predict)(variables, x)[1]
    return by_hand(x, labels, [features[tap] for tap in taps])


def columns(found, i):
    """The two rows of record i."""
    return [[values[axis][i] for values in found["nhsic"].values()] for axis in "xy"]


def test_its_ends_are_the_untrained_and_the_trained_network(made, tmp_path):
    """That of `ibjax.training.loop`, to the bit; every third step between, over the end of an epoch."""
    found, _ = made
    loop.train(build(recipe()), tmp_path)
    trained = run.load(tmp_path, "last")
    assert found["step"] == [0, 3, 6, 9, 12, 14] and found["finished"]
    assert found["weights"] == run.origin(trained, "last")["weights"]
    split = run.test_split(trained, 12)
    assert list(found["nhsic"]) == found["taps"] == ["stage1", "pre_logits"]
    x = to_float(jnp.asarray(split.images))
    first = initial_state(build(recipe())).variables
    for i, variables in ((0, first), (-1, trained.variables)):
        expected = measured(trained.model, variables, x, split.labels, found["taps"])
        np.testing.assert_allclose(columns(found, i), expected, rtol=5e-3, atol=2e-3)
    assert np.abs(np.subtract(columns(found, 0), columns(found, -1))).max() > 0.01
    assert np.all(np.array(columns(found, -1)) >= 0) and np.max(columns(found, -1)) <= 11


def test_attacked_images_are_made_against_the_network_as_it_is(made, tmp_path):
    """The last record, from the images that the trained network is evaluated on; X is attacked too."""
    clean, _ = made
    found = plane.record(recipe(), tmp_path / "plane", every=14, n=12, attack="fgsm", taps=["pre_logits"])
    loop.train(build(recipe()), tmp_path / "run")
    trained, settings, split = attacked.load(tmp_path / "run", "last", attacks=("fgsm",), n=12)
    _, x_adv = attacked.attack("fgsm", linen_net(trained.model).predict, trained, split, settings)
    expected = measured(trained.model, trained.variables, jnp.asarray(x_adv), split.labels, ["pre_logits"])
    np.testing.assert_allclose(columns(found, -1), expected, rtol=5e-3, atol=2e-3)
    assert found["weights"] == clean["weights"] and found["eps"] == "2/16"
    assert abs(found["nhsic"]["pre_logits"]["x"][-1] - clean["nhsic"]["pre_logits"]["x"][-1]) > 1e-3


@pytest.fixture
def unchecked(monkeypatch):
    """Without the check of a configuration that traces its whole training, step and validation."""
    monkeypatch.setattr(loop, "check", lambda *_: None)


@pytest.mark.usefixtures("unchecked")
def test_a_finished_one_is_read_and_never_replaced(made, caplog, monkeypatch):
    found, folder = made
    file = folder / "plane.json"
    before = file.stat().st_mtime_ns
    assert plane.record(recipe(), folder, **OPTIONS) == found == files.read_json(file)
    for changes, options, words in (
        ({}, dict(every=4, n=12), "with every=3, now 4 is asked for"),
        ({}, dict(every=3, n=11), "with n=12, now 11 is asked for"),
        (dict(epochs=3), OPTIONS, "with config.epochs=2, now 3 is asked for; give another --workdir"),
    ):
        with pytest.raises(InputError, match=words):
            plane.record(recipe(**changes), folder, **options)
    with (
        jax.default_matmul_precision("bfloat16"),
        pytest.raises(InputError, match="default_matmul_precision="),
    ):
        plane.record(recipe(), folder, **OPTIONS)
    assert "is of other" not in caplog.text
    monkeypatch.setattr(provenance, "commit", lambda: "another")
    assert plane.record(recipe(), folder, **OPTIONS) == found
    assert "is of other commit than this; another --workdir makes it anew" in caplog.text
    assert file.stat().st_mtime_ns == before


@pytest.mark.usefixtures("unchecked")
def test_one_that_was_stopped_starts_again(made, tmp_path, monkeypatch):
    found, _ = made
    monkeypatch.setattr(plane, "_RECORDS", 2)
    notices = iter([False, True])
    monkeypatch.setattr(cluster, "preempted", lambda: next(notices, False))
    with pytest.raises(PreemptedError, match="stopped at step 3 of 14"):
        plane.record(recipe(), tmp_path, **OPTIONS)
    part = files.read_json(tmp_path / "plane.json")
    assert not part["finished"] and part["step"] == [0, 3]
    again = plane.record(recipe(), tmp_path, **OPTIONS)
    assert again["nhsic"] == found["nhsic"] and again["weights"] == found["weights"]
    (tmp_path / "plane.json").write_text("{}")
    with pytest.raises(InputError, match="is damaged or of another version"):
        plane.record(recipe(), tmp_path, **OPTIONS)


def test_a_value_that_is_not_finite_ends_it(tmp_path, monkeypatch):
    monkeypatch.setattr(plane, "coordinates", lambda x, labels, classes, layers: jnp.full((2, len(layers)), jnp.nan))
    with pytest.raises(DivergedError, match="NaN or Inf by step 0"):
        plane.record(recipe(), tmp_path, **OPTIONS)
    assert not (tmp_path / "plane.json").exists()


def test_a_panel_shows_each_layer(made):
    found, _ = made
    drawn = plane.draw({**found, "title": "a $title"})
    *panels, bar = drawn.axes
    assert [panel.get_title() for panel in panels] == found["taps"] and bar.get_ylabel() == "epoch"
    for panel, values in zip(panels, found["nhsic"].values(), strict=True):
        (points,) = panel.collections
        np.testing.assert_array_equal(points.get_offsets(), np.transpose([values["x"], values["y"]]))
        np.testing.assert_allclose(points.get_array(), np.array(found["step"]) / 7)


def command(tmp_path, monkeypatch, *flags):
    file = tmp_path / "recipe.py"
    settings = config.plain(recipe())
    file.write_text(
        f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({settings!r})\n"
    )
    assert ConfigDict(settings).to_dict() == recipe().to_dict()
    monkeypatch.setattr(sys, "argv", ["plane", f"--config={file}", f"--workdir={tmp_path / 'run'}", *flags])
    monkeypatch.setattr(cluster, "initialize", lambda: None)  # it must come before all of JAX
    with pytest.raises(SystemExit) as caught:
        plane.main()
    return caught.value.code


def test_it_is_recorded_and_drawn_from_the_command_line(tmp_path, capsys, monkeypatch):
    picture = tmp_path / "plane.png"
    flags = ("--every=5", "--n=12", "--taps=stage1,pre_logits", "--config.epochs=1", f"--picture={picture}")
    assert command(tmp_path, monkeypatch, *flags) == 0
    found = files.read_json(tmp_path / "run" / "plane.json")
    assert found["step"] == [0, 5, 7] and found["taps"] == ["stage1", "pre_logits"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    x, y = (found["nhsic"]["stage1"][axis] for axis in "xy")
    assert f"| stage1 | {x[0]:.2f} | {x[-1]:.2f} | {y[0]:.2f} | {y[-1]:.2f} |" in capsys.readouterr().out


BAD = [
    (["--every=0"], "--every=0 is not allowed"),
    (["--n=1"], "--n=1 is not allowed"),
    (["--n=17"], "--n=17 is not allowed; the test set has 16 images"),
    (["--taps=stage9"], "--taps=stage9 is no feature .* did you mean"),
    (["--attack=autoattack", "--n=12"], "--attack=autoattack is too long for every record"),
    (["--attack=pdg-10", "--n=12"], "attack 'pdg-10' is unknown"),
    (["--picture=x.gif"], "--picture=x.gif has no known ending"),
    (["--config.epochs=0"], "epochs=0"),
]


@pytest.mark.parametrize("flags, words", BAD)
def test_bad_input_is_refused_in_a_line(flags, words, tmp_path, capsys, monkeypatch):
    assert command(tmp_path, monkeypatch, *flags) == 2
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "run" / "plane.json").exists()


def test_the_teacher_of_a_recipe_is_trained_first(digits_run, tmp_path, monkeypatch):
    """In DIR/teacher, as `ibjax.main` would; and not before all else is known to be right."""
    trained = []

    def copied(experiment, workdir, checked):
        trained.append((experiment.config.title, workdir))
        shutil.copytree(digits_run / "teacher", workdir, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))

    monkeypatch.setattr(plane.loop, "train", copied)
    with pytest.raises(InputError, match="--taps=stage9 is no feature"):
        plane.record(smoke_config("digits"), tmp_path, taps=["stage9"], **OPTIONS)
    assert not trained
    found = plane.record(smoke_config("digits"), tmp_path, every=7, n=12, taps=["pre_logits"])
    assert trained == [("TRADES teacher", tmp_path / "teacher")] and found["step"] == [0, 7, 14]
    weights = rundir.read_config(digits_run)[1]["teacher"]["weights"]
    assert found["data"]["teacher"]["weights"] == weights
