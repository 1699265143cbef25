"""Singular values of x in x': the swap against its definition, the record by hand, and the command."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from ibjax import files
from ibjax.analysis import attacked, singular
from ibjax.attacks.pgd import pgd
from ibjax.data import Split
from ibjax.devices import cluster
from ibjax.evaluation import evaluate, scoring
from ibjax.net import linen_net, to_float
from ibjax.runs import run

RNG = np.random.default_rng(0)
X = RNG.uniform(size=(5, 8, 6, 3)).astype(np.float32)
X_ADV = np.clip(X + RNG.uniform(-0.2, 0.2, X.shape), 0, 1).astype(np.float32)


def swap(x, x_adv):
    return singular.swap(x, x_adv, np.random.default_rng(1))


def combined(vectors, values):
    """Σ_i σ_i(values) u_i v_iᵀ(vectors) of each channel, term by term in float64, by another LAPACK driver."""
    images = np.zeros(vectors.shape)
    for n in range(len(vectors)):
        for c in range(vectors.shape[-1]):
            u, _, vt = scipy.linalg.svd(vectors[n, :, :, c].astype(np.float64), lapack_driver="gesvd")
            s = scipy.linalg.svd(values[n, :, :, c].astype(np.float64), compute_uv=False, lapack_driver="gesvd")
            images[n, :, :, c] = sum(s[i] * np.outer(u[:, i], vt[i]) for i in range(len(s)))
    return images


def length(images):
    return np.linalg.norm(images.astype(np.float64).reshape(len(images), -1), axis=1)


def test_the_swap_is_its_definition():
    found, expected = swap(X, X_ADV), combined(X_ADV, X)
    assert np.ptp(expected) > 1 and np.abs(expected - X_ADV).max() > 0.05
    np.testing.assert_allclose(found["unclipped"], expected, atol=1e-6)
    np.testing.assert_allclose(found["swapped"], expected.clip(0, 1), atol=1e-6)
    np.testing.assert_allclose(found["converse"], combined(X, X_ADV).clip(0, 1), atol=1e-6)
    np.testing.assert_allclose(found["clipped"], ((expected < -1e-6) | (expected > 1 + 1e-6)).mean((1, 2, 3)))
    np.testing.assert_allclose(found["left"], length(expected - X) / length(X_ADV - X), rtol=1e-4)


def test_the_swap_moves_by_the_difference_of_the_values_and_never_beyond_the_perturbation():
    found = swap(X, X_ADV)
    s, s_adv = (np.linalg.svd(np.moveaxis(a, -1, 1).astype(np.float64), compute_uv=False) for a in (X, X_ADV))
    change = np.sqrt(((s - s_adv) ** 2).sum((1, 2)))
    np.testing.assert_allclose(found["moved"], change / length(X_ADV - X), rtol=1e-4)
    assert np.all(found["moved"] < 1) and np.all(found["moved"] > 0.1)
    inside = 0.5 + 0.1 * (X - 0.5)  # so that no noise is clipped
    inside_adv = 0.5 + 0.1 * (X_ADV - 0.5)
    noise = swap(inside, inside_adv)["noise"] - inside_adv
    moved = combined(inside_adv, inside) - inside_adv
    np.testing.assert_allclose(length(noise), length(moved), rtol=1e-4)
    assert np.abs(length(noise - moved) / length(moved) - np.sqrt(2)).max() < 0.3  # in a direction of its own


def test_an_attack_on_the_vectors_alone_stays_and_one_on_the_values_alone_goes():
    turned = swap(X, X[:, ::-1])  # an orthogonal matrix from the left
    np.testing.assert_allclose(turned["swapped"], X[:, ::-1], atol=1e-6)
    np.testing.assert_allclose(turned["noise"], X[:, ::-1], atol=1e-6)
    np.testing.assert_allclose(turned["converse"], X, atol=1e-6)
    np.testing.assert_allclose([turned["moved"], turned["left"]], np.array([0, 1])[:, None] + np.zeros(5), atol=1e-6)
    darker = swap(X, X / 2)
    np.testing.assert_allclose(darker["swapped"], X, atol=1e-6)
    np.testing.assert_allclose(darker["converse"], X / 2, atol=1e-6)
    np.testing.assert_allclose([darker["moved"], darker["left"]], np.array([1, 0])[:, None] + np.zeros(5), atol=1e-6)


def test_an_image_that_is_not_attacked_stays_and_has_no_shares():
    """A flat one too, whose singular vectors are not determined."""
    x = np.concatenate([X, np.zeros_like(X[:1]), np.full_like(X[:1], 0.3)])
    found = swap(x, x)
    for row in singular.SEEN:
        np.testing.assert_allclose(found[row], x, atol=1e-6)
    np.testing.assert_allclose(found["unclipped"], found["swapped"], atol=singular.TOLERANCE)
    assert all(np.isnan(found[row]).all() for row in singular.MEASURES)


def test_batches_change_nothing():
    rng, whole = np.random.default_rng(1), swap(X, X_ADV)
    parts = [singular.swap(X[part], X_ADV[part], rng) for part in (slice(0, 2), slice(2, 5))]
    for row, values in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[row] for part in parts]), values)


@pytest.fixture
def workdir(digits_run, tmp_path):
    """A copy of it, which records are written into."""
    return Path(shutil.copytree(digits_run, tmp_path / "run", ignore=shutil.ignore_patterns(".lock")))


@pytest.fixture
def varied(workdir, monkeypatch):
    """(run, split) of a network whose predictions differ; it is right on all images but two."""
    trained, rng = run.load(workdir), np.random.default_rng(0)
    params = jax.tree.map(
        lambda w: np.asarray(w) + rng.standard_normal(w.shape, np.float32), trained.variables["params"]
    )
    trained = trained._replace(variables={**trained.variables, "params": params})
    images = run.test_split(trained).images
    predict = linen_net(run.in_float32(trained.model)).predict
    classes = jax.jit(lambda x: predict(trained.variables, to_float(x))[0].argmax(1))
    labels = np.array(classes(images), np.int32)
    labels[:2] = (labels[:2] + 1) % 10
    split = Split(images, labels)
    monkeypatch.setattr(run, "load", lambda *_: trained)
    monkeypatch.setattr(attacked.run, "test_split", lambda *_: split)
    return trained, split


def test_each_row_is_what_it_says(varied, workdir, monkeypatch):
    (trained, split), drawn = varied, {}
    monkeypatch.setattr(singular, "draw", lambda examples, *_: drawn.update(examples))
    record = singular.evaluate(workdir, attacks=("pgd-2",), picture=workdir / "unused.png")

    predict = linen_net(run.in_float32(trained.model)).predict
    attack = pgd(eps=record["eps"], step_size=record["step_size"], steps=2)
    classes, y = jax.jit(lambda x: predict(trained.variables, x)[0].argmax(1)), split.labels

    @jax.jit
    def by_hand(x):
        x, seed = to_float(x), jax.random.fold_in(jax.random.key(trained.config.seed), scoring._EVALUATION)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(seed, jnp.arange(len(x)))
        return x, attack(keys, lambda x: predict(trained.variables, x)[0], x, jnp.asarray(y))

    x, x_adv = map(np.asarray, by_hand(split.images))

    def taken_for(images):
        return np.asarray(classes(np.float32(images)))

    clean = taken_for(x) == y
    swapped = combined(x_adv, x)
    seen = dict(image=x_adv, swapped=swapped.clip(0, 1), unclipped=swapped, converse=combined(x, x_adv).clip(0, 1))
    for row, images in seen.items():
        right = clean & (taken_for(images) == y)
        assert record["acc"][row] == {"clean": scoring.percent(clean), "pgd-2": scoring.percent(right)}, row
    assert scoring.percent(clean) == 87.5 and len({values["pgd-2"] for values in record["acc"].values()}) > 2
    outside = (swapped < -1e-6) | (swapped > 1 + 1e-6)
    assert record["perturbation"]["clipped"]["pgd-2"] == pytest.approx(100 * outside.mean(), abs=0.1)
    for row, ends in (("moved", (swapped, x_adv)), ("left", (swapped, x))):
        shares = length(ends[0] - ends[1]) / length(x_adv - x)
        assert record["perturbation"][row]["pgd-2"] == pytest.approx(100 * shares.mean(), rel=1e-3)

    example = drawn["pgd-2"]
    errors = np.flatnonzero(clean & (taken_for(x_adv) != y))[: singular.DRAWN]
    assert len(errors) == singular.DRAWN and not {0, 1} & set(errors)
    np.testing.assert_array_equal(example.x, x[errors])
    np.testing.assert_array_equal(example.predicted_adv, taken_for(x_adv)[errors])
    np.testing.assert_array_equal(example.predicted_swapped, taken_for(seen["swapped"])[errors])


def test_it_is_run_from_the_command_line(workdir, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "new" / "figure.png"
    argv = ["singular", f"--workdir={workdir}", "--attacks=fgsm,pgd-2", "--n=11", f"--picture={picture}"]
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.setattr(cluster, "initialize", lambda: None)  # it must come before all of JAX
    with pytest.raises(SystemExit, match="0"):
        singular.main()
    record = files.read_json(workdir / "singular" / "best.json")
    assert record["n"] == 11 and list(record["acc"]) == ["image", *singular.SEEN]
    for known in evaluate.evaluate(workdir, attacks=("fgsm", "pgd-2"), n=11):
        if known["main"]:
            assert record["acc"]["image"][known["attack"]] == known["robust_acc"]
            assert record["acc"]["image"]["clean"] == known["clean_acc"]
    assert f"| moved |  | {record['perturbation']['moved']['fgsm']:.2f} |" in capsys.readouterr().out
    with Image.open(picture) as image:
        assert image.format == "PNG" and min(image.size) > 400 and picture.stat().st_size < 600_000
        pixels = np.asarray(image.convert("RGB"))
    assert np.all(pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 255) and np.any(pixels < 50)  # white, and drawn upon


def test_classes_are_shown_by_name(monkeypatch, tmp_path):
    figures, x = [], np.zeros((2, 8, 8, 1), np.float32)
    monkeypatch.setattr(singular.pictures, "save", lambda figure, file: figures.append(figure))
    example = singular.Example(x, x, x, np.array([0, 1]), np.array([0, 0]), np.array([2, 1]))
    record = dict(title="t", dataset="d", norm="linf", eps="8/255")
    singular.draw({"pgd-2": example}, record, ["cat", "dog", "$cow$" + 20 * "u"], tmp_path / "a.png")
    shown = [panel.get_xlabel() for panel in figures[0].axes if panel.get_xlabel()]
    assert shown == ["cat", "dog", "cat", "cat", "$cow$uuuuuuuu…", "dog"]


def test_an_attack_that_changes_nothing_has_no_shares():
    assert singular._mean(np.array([np.nan, np.nan])) is None and singular._mean(np.array([0.5, np.nan])) == 50
    record = dict(title="t", dataset="d", n=1, norm="linf", eps="8/255")
    record |= dict(acc=dict(image=dict(clean=50.0, autoattack=50.0)), perturbation=dict(moved=dict(autoattack=None)))
    assert list(singular.lines(record))[-2:] == ["| image | 50.00 | 50.00 |", "| moved |  |  |"]


@pytest.mark.parametrize(
    "flag, words",
    [("--picture=figure.gif", "ends in .png, .pdf, .svg"), ("--attacks=pgd", "'pgd' is unknown"), ("--n=0", "n=0")],
)
def test_bad_input_is_one_line(flag, words, workdir, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["singular", f"--workdir={workdir}", flag])
    monkeypatch.setattr(cluster, "initialize", lambda: None)
    with pytest.raises(SystemExit, match="2"):
        singular.main()
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error
