"""t-SNE of a network's features: what is embedded, its silhouette by hand, the picture, and the command."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import threadpoolctl
from conftest import clean_recipe, untrained_run

from ibjax import files
from ibjax.analysis import embedding
from ibjax.attacks.pgd import pgd
from ibjax.devices import cluster
from ibjax.errors import InputError
from ibjax.evaluation import scoring
from ibjax.net import linen_net, to_float
from ibjax.runs import run


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """t-SNE's threads wait for each other at every step; several tests at a time would slow each other down."""
    import sklearn.manifold  # noqa: F401, only what is loaded is limited

    with threadpoolctl.threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """Two runs of one architecture, of other seeds."""
    folders = []
    for seed in (0, 1):
        settings = clean_recipe()
        settings.update(title=f"seed {seed}", seed=seed, epochs=1)
        settings.data.n_test = 40
        folders.append(untrained_run(tmp_path_factory.mktemp("runs") / "run", settings))
    return folders


def silhouette_by_hand(x, labels):
    x = np.asarray(x, np.float64)
    distances = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1))
    values = []
    for i, own in enumerate(labels):
        others = [distances[i, labels == c].mean() for c in set(labels) - {own}]
        same = np.flatnonzero(labels == own)
        a, b = distances[i, same].sum() / max(len(same) - 1, 1), min(others)
        values.append((b - a) / max(a, b) if len(same) > 1 else 0.0)
    return np.mean(values)


def test_the_silhouette_is_its_formula():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(40, 5)).astype(np.float32), np.array([*rng.integers(0, 3, 39), 3])
    x[labels == 1] += 2
    assert embedding.silhouette(x, labels) == pytest.approx(silhouette_by_hand(x, labels), abs=1e-5)
    assert embedding.silhouette(7 * x, labels) == pytest.approx(embedding.silhouette(x, labels), abs=1e-5)
    assert embedding.silhouette(np.ones((4, 2), np.float32), np.array([0, 0, 1, 1])) == 0  # a network that collapsed
    for labels in (np.zeros(40, int), np.arange(40)):
        with pytest.raises(InputError, match="not defined; give more images"):
            embedding.silhouette(x, labels)


def test_neighbours_stay_neighbours_and_the_seed_decides():
    rng, labels = np.random.default_rng(0), np.arange(60) % 3
    x = (10 * np.eye(8)[labels] + rng.normal(size=(60, 8))).astype(np.float32)
    z = embedding.embedded(x)
    distances = ((z[:, None] - z[None]) ** 2).sum(-1) + np.diag(np.full(60, np.inf))
    assert z.shape == (60, 2) and np.all(labels[distances.argmin(1)] == labels)
    np.testing.assert_array_equal(embedding.embedded(x, seed=33), z)
    assert np.abs(embedding.embedded(x, seed=34) - z).max() > 1


def test_features_are_the_networks_and_spatial_ones_are_averaged(workdirs):
    trained = run.load(workdirs[0])
    images = run.test_split(trained).images
    predict = linen_net(trained.model).predict
    _, expected = trained.model.apply(trained.variables, to_float(jnp.asarray(images)), train=False)
    assert expected["stage1"].ndim == 4 and expected["pre_logits"].ndim == 2
    for tap, axes in (("stage1", (1, 2)), ("pre_logits", ())):
        found = embedding.features(predict, trained.variables, images, 16, tap)  # the last batch is smaller
        np.testing.assert_allclose(found, np.asarray(expected[tap], np.float64).mean(axes), rtol=1e-4, atol=1e-5)


def test_taps_are_those_of_images():
    """Not the class means of CEB, which are as many as there are classes."""
    backbone = dict(name="cnn", widths=((4,),), hidden=(), padding=1, pool="average")
    model = run.build_model(dict(name="stochastic", backbone=backbone, class_means=True, latent=3), 10, "model")
    variables = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    found = embedding.taps(linen_net(model).predict, variables, (8, 8, 1))
    assert {"mu", "z", "stage1"} < set(found) and "class_means" not in found


def test_the_record_is_of_the_attacked_images(workdirs, monkeypatch):
    """Of a network whose predictions change under attack; the attack by hand."""
    trained, rng = run.load(workdirs[0]), np.random.default_rng(0)
    params = jax.tree.map(lambda w: w + rng.standard_normal(w.shape, np.float32), trained.variables["params"])
    trained = trained._replace(variables={**trained.variables, "params": params})
    monkeypatch.setattr(run, "load", lambda *_: trained)
    monkeypatch.setattr(embedding, "embedded", lambda found, seed: found[:, :2])
    result, clean = (embedding.evaluate(workdirs[0], attack=attack) for attack in ("pgd-2", "clean"))

    split = run.test_split(trained)
    x, y = to_float(jnp.asarray(split.images)), split.labels
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.fold_in(jax.random.key(trained.config.seed), scoring._EVALUATION), jnp.arange(len(y))
    )
    predict = linen_net(run.in_float32(trained.model)).predict
    attack = pgd(eps=result.record["eps"], step_size=result.record["step_size"], steps=2)
    x_adv = jax.jit(lambda: attack(keys, lambda x: predict(trained.variables, x)[0], x, y))()
    for found, shown in ((clean, x), (result, x_adv)):
        logits, features = predict(trained.variables, shown)
        np.testing.assert_array_equal(found.predictions, np.asarray(logits).argmax(1))
        np.testing.assert_allclose(found.coordinates, features["pre_logits"][:, :2], rtol=1e-4, atol=1e-4)
        assert found.record["acc"] == scoring.percent(found.predictions == y)
        by_hand = silhouette_by_hand(features["pre_logits"], y)
        assert found.record["silhouette"] == pytest.approx(by_hand, abs=1e-3)
    assert np.any(result.predictions != clean.predictions)
    assert "eps" not in clean.record and result.record["eps"] == trained.config.evaluate.eps


def test_runs_are_drawn_beside_each_other_from_the_command_line(workdirs, tmp_path, capsys, monkeypatch):
    picture = tmp_path / "both.png"
    flags = [*(f"--workdir={workdir}" for workdir in workdirs), "--attack=pgd-2", "--tap=stage2", "--n=35"]
    monkeypatch.setattr(sys, "argv", ["embedding", *flags, "--names=a,b,c,d,e,f,g,h,i,j", f"--picture={picture}"])
    monkeypatch.setattr(cluster, "initialize", lambda: None)  # it must come before all of JAX
    with pytest.raises(SystemExit, match="0"):
        embedding.main()
    shown = capsys.readouterr().out
    for seed, workdir in enumerate(workdirs):
        record = files.read_json(workdir / "embedding/best.pgd-2.stage2.json")
        arrays = np.load(workdir / "embedding/best.pgd-2.stage2.npz")
        assert record["n"] == 35 and record["tsne_seed"] == 33 and "scikit-learn" in record["versions"]
        assert arrays["coordinates"].shape == (35, 2) and arrays["labels"].shape == arrays["predictions"].shape == (35,)
        assert record["acc"] == scoring.percent(arrays["labels"] == arrays["predictions"])
        assert f"| seed {seed} | PGD-2, linf eps 2/16 | 4 | {record['acc']:.2f} | {record['silhouette']:.3f} |" in shown
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) < 600_000


def made_up(classes, reach, n=60):
    rng = np.random.default_rng(classes)
    record = dict(title="a $title", attack="clean", acc=50.0, silhouette=-0.1, num_classes=classes)
    labels = np.arange(n) % classes
    return embedding.Embedding(record, reach * rng.uniform(-1, 1, (n, 2)).astype(np.float32), labels, labels)


def test_panels_have_one_range_that_holds_all_points():
    results = [made_up(10, reach) for reach in (1, 30, 5, 2, 7)]
    panels = [panel for panel in embedding.draw(results, [str(c) for c in range(10)]).axes if panel.get_visible()]
    assert [panel.get_title() for panel in panels] == ["a $title"] * 5
    assert len({(panel.get_xlim(), panel.get_ylim()) for panel in panels}) == 1
    (left, right), (low, high) = panels[0].get_xlim(), panels[0].get_ylim()
    assert right - left == pytest.approx(high - low)
    for panel, result in zip(panels, results, strict=True):
        drawn = np.concatenate([points.get_offsets() for points in panel.collections])
        assert {tuple(p) for p in drawn.tolist()} == {tuple(p) for p in result.coordinates.tolist()}
        assert np.all((drawn > [left, low]) & (drawn < [right, high]))


@pytest.mark.parametrize("classes", [3, 10, 20, 21])
def test_classes_have_a_look_each_up_to_twenty(classes):
    drawn = embedding.draw([made_up(classes, 1)], [f"class {c}" for c in range(classes)])
    if classes > 20:
        assert not drawn.legends and [axes.get_ylabel() for axes in drawn.axes][1:] == ["class"]
        return
    (legend,) = drawn.legends
    looks = [(line.get_color(), line.get_marker()) for line in legend.get_lines()]
    assert len(set(looks)) == classes
    assert [text.get_text() for text in legend.get_texts()] == [f"class {c}" for c in range(classes)]
    assert not drawn.axes[0].texts  # the legend is the one kind of label


def test_axes_have_no_numbers():
    """t-SNE keeps who is near whom, and has no unit."""
    panel = embedding.draw([made_up(3, 1)], ["a", "b", "c"]).axes[0]
    assert not len(panel.get_xticks()) and not len(panel.get_yticks())


BAD = [
    (["--n=30"], "n=30 is not allowed; t-SNE of perplexity 30 takes at least 31"),
    (["--tap=stage9"], "--tap=stage9 is no feature .* did you mean"),
    (["--seed=-1"], "--seed=-1 is not allowed"),
    (["--attack=pdg-10"], "attack 'pdg-10' is unknown"),
    (["--names=a,b"], "--names has 2 names; the data has 10 classes"),
    (["--picture=x.gif"], "--picture=x.gif has no known ending"),
]


@pytest.mark.parametrize("flags, words", BAD)
def test_bad_input_is_refused_in_a_line(flags, words, workdirs, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["embedding", f"--workdir={workdirs[0]}", *flags])
    monkeypatch.setattr(cluster, "initialize", lambda: None)
    with pytest.raises(SystemExit, match="2"):
        embedding.main()
    assert re.search(words, capsys.readouterr().err)


def test_runs_of_other_test_images_are_refused(workdirs, tmp_path):
    content = files.read_json(workdirs[0] / "config.json")
    content["data"]["digests"]["test"] = "another"
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="differ in their test images"):
        embedding.compare([workdirs[0], tmp_path], n=35)
