"""Score-CAM: the maps against NumPy in float64, what they must find, and the command."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial
from conftest import clean_recipe, untrained_run
from PIL import Image

from ibjax import files
from ibjax.analysis import score_cam
from ibjax.devices import cluster
from ibjax.models import cnn, siriib, vgg, wide_resnet
from ibjax.net import linen_net, to_float
from ibjax.runs import run

SIDE, SMALL = 12, 3


def linear(weights, channels):
    """A network whose logits are linear in x (N, 12, 12, 2), with a tap of 3×3: means of windows, linear in x too."""

    def predict(variables, x):
        windows = x.reshape(len(x), SMALL, SIDE // SMALL, SMALL, SIDE // SMALL, 2).mean((2, 4))
        tap = windows @ channels["kernel"] + channels["bias"].reshape(1, 1, 1, -1)
        return x.reshape(len(x), -1) @ variables, {"tap": tap, "logits": x}

    return jnp.asarray(weights, jnp.float32), predict


def bilinear(a):
    """(3, 3) -> (12, 12) between pixel centres, by a matrix of weights."""
    place = np.clip((np.arange(SIDE) + 0.5) * SMALL / SIDE - 0.5, 0, SMALL - 1)
    matrix = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(SMALL)))
    return matrix @ a @ matrix.T


def unit(a):
    return (a - a.min()) / (a.max() - a.min())


@pytest.fixture(scope="module")
def case():
    """(variables, predict, x, classes, maps by hand); of five channels the third is the same everywhere."""
    rng = np.random.default_rng(0)
    weights, kernel = rng.normal(size=(SIDE * SIDE * 2, 4)), rng.normal(size=(2, 5))
    bias = -kernel.sum(0) / 2  # so that every channel has both signs, and ReLU something to do
    kernel[:, 2], bias[2] = 0, 100.0
    x, classes = rng.random((3, SIDE, SIDE, 2)).astype(np.float32), np.array([1, 3, 0])
    channels = {name: jnp.asarray(a, jnp.float32) for name, a in (("kernel", kernel), ("bias", bias))}
    variables, predict = linear(weights / 5, channels)

    maps = []
    for image, c in zip(x.astype(np.float64), classes, strict=True):
        total = np.zeros((SIDE, SIDE))
        windows = image.reshape(SMALL, 4, SMALL, 4, 2).mean((1, 3))
        for k in (0, 1, 3, 4):
            up = bilinear(windows @ kernel[:, k] + bias[k])
            logits = (image * unit(up)[..., None]).reshape(-1) @ weights / 5
            scores = np.exp(logits - logits.max())
            total += scores[c] / scores.sum() * up
        maps.append(unit(np.maximum(total, 0)))
    return variables, predict, x, classes, np.stack(maps)


@pytest.mark.parametrize("chunk", [1, 3, 128])
def test_maps_are_those_of_the_formula_in_chunks_of_any_size(case, chunk):
    variables, predict, x, classes, expected = case
    sizes = []

    def noted(variables, x):
        sizes.append(len(x))
        return predict(variables, x)

    maps = score_cam.explainer(noted, "tap", chunk)(variables, x, classes)
    assert np.all(expected.max((1, 2)) == 1) and np.all(np.mean(expected == 0, (1, 2)) > 0.05)
    np.testing.assert_allclose(maps, expected, atol=2e-5)
    assert maps.dtype == np.float32 and max(sizes) == min(chunk, 5)


def test_a_map_shows_where_the_evidence_for_its_class_stands():
    """Four channels, each of one corner of the image; every class is known by one corner alone."""
    corners = np.zeros((4, 8, 8, 1), np.float32)
    for k, (i, j) in enumerate(np.ndindex(2, 2)):
        corners[k, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4] = 1

    def predict(variables, x):
        return x.reshape(len(x), -1) @ variables, {"tap": x * jnp.asarray(corners[:, ..., 0].transpose(1, 2, 0))[None]}

    x = np.random.default_rng(0).uniform(0.5, 1, (4, 8, 8, 1)).astype(np.float32)
    maps = score_cam.explainer(predict, "tap")(jnp.asarray(corners.reshape(4, -1).T), x, np.arange(4))
    for k, found in enumerate(maps):
        inside = corners[k, ..., 0] > 0
        assert found[inside].mean() > 10 * found[~inside].mean()


def test_without_a_channel_that_varies_a_map_is_empty():
    def predict(variables, x):
        return x.reshape(len(x), -1) @ variables, {"tap": jnp.full((len(x), 3, 3, 2), 0.1)}

    maps = score_cam.explainer(predict, "tap")(jnp.ones((16, 2)), np.ones((2, 4, 4, 1), np.float32), np.zeros(2, int))
    np.testing.assert_array_equal(maps, np.zeros((2, 4, 4)))


def test_similarity_is_the_mean_cosine_of_maps_that_are_not_empty():
    rng = np.random.default_rng(0)
    maps, others = rng.random((2, 4, 5, 5))
    others[2] = 0
    cosine = 1 - scipy.spatial.distance.cdist(maps.reshape(4, -1), others.reshape(4, -1)[[0, 1, 3]], "cosine")
    found, cosine = score_cam.similarity(maps, others), cosine[[0, 1, 3]]
    assert found["empty"] == 1 and found["cosine"] == pytest.approx(np.trace(cosine) / 3, abs=1e-4)
    assert found["cosine_between"] == pytest.approx((cosine.sum() - np.trace(cosine)) / 6, abs=1e-4)
    assert score_cam.similarity(maps, 3 * maps)["cosine"] == 1.0
    assert score_cam.similarity(maps, 0 * maps) == {"cosine": None, "cosine_between": None, "empty": 4}
    assert score_cam.similarity(maps[:1], maps[:1])["cosine_between"] is None


@pytest.mark.parametrize(
    "model, size, last",
    [
        (cnn.Model(3, widths=((2,), (2,)), hidden=()), 28, "stage2"),
        (vgg.Model(3, depth=11, width=2, hidden=()), 32, "conv8"),  # after it a single pixel is left
        (wide_resnet.Model(3, depth=10, width=1), 32, "stage3_relu"),
        (siriib.Model(3, dict(name="resnet", blocks=(1, 1), width=2), connections=3, widths=(2,)), 32, "stage2"),
    ],
)
def test_the_last_map_is_found(model, size, last):
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x)
    taps = score_cam.spatial_taps(linen_net(model).predict, variables, x.shape[1:])
    assert taps[-1] == last and "pre_logits" not in taps


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of a small network on the digits."""
    settings = clean_recipe()
    settings.model.widths = ((4,), (4,))
    return untrained_run(tmp_path_factory.mktemp("runs") / "digits", settings)


def command(monkeypatch, *flags):
    """The exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["score_cam", *flags])
    monkeypatch.setattr(cluster, "initialize", lambda: None)  # it must come before all of JAX
    with pytest.raises(SystemExit) as caught:
        score_cam.main()
    return caught.value.code


def test_it_is_run_from_the_command_line(workdir, tmp_path, capsys, monkeypatch):
    """On a network whose predictions differ, and differ under attack."""
    trained, rng = run.load(workdir), np.random.default_rng(0)
    shaken = lambda w: np.asarray(w) + rng.normal(0, 0.3, w.shape).astype("f4")  # noqa: E731
    params = jax.tree.map(shaken, trained.variables["params"])
    trained = trained._replace(variables={**trained.variables, "params": params})
    monkeypatch.setattr(run, "load", lambda *_: trained)
    picture, flags = tmp_path / "new" / "maps.png", ("--attack=pgd-10", "--n=16", "--names=a,b,c,d,e,f,g,h,i,$j$")
    assert command(monkeypatch, f"--workdir={workdir}", *flags, f"--picture={picture}") == 0
    record = files.read_json(workdir / "score_cam" / "best.json")
    with np.load(workdir / "score_cam" / "best.npz") as file:
        stored = dict(file)
    assert f"| x and its x' | {record['cosine']:.3f} |" in capsys.readouterr().out

    split, predict = run.test_split(trained, 16), linen_net(trained.model).predict
    x = np.asarray(to_float(jnp.asarray(split.images)))
    distance = np.abs(stored["x_adv"].astype(np.float32) - x).max()
    assert 0.5 * 2 / 16 < distance <= 2 / 16 + 1e-3 and record["eps"] == "2/16"
    np.testing.assert_array_equal(stored["predicted"], np.asarray(predict(trained.variables, x)[0]).argmax(1))
    np.testing.assert_array_equal(stored["label"], split.labels)

    explain = score_cam.explainer(predict, record["tap"])
    maps = [explain(trained.variables, images, stored["predicted"]) for images in (x, stored["x_adv"].astype("f4"))]
    np.testing.assert_allclose(stored["map"], maps[0], atol=1e-3)
    np.testing.assert_allclose(stored["map_adv"], maps[1], atol=2e-2)  # x' is stored in half precision
    changed = stored["predicted"] != stored["predicted_adv"]  # both maps are of the class of x
    of_others = explain(trained.variables, stored["x_adv"].astype("f4"), stored["predicted_adv"])
    assert np.any(changed) and np.abs(of_others - stored["map_adv"])[changed].max() > 0.1
    assert record["cosine"] == pytest.approx(score_cam.similarity(*maps)["cosine"], abs=1e-2)

    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert np.all(pixels[[0, -1]] == 255) and np.all(pixels[:, [0, -1]] == 255)  # white, and nothing is cut off
    assert np.ptp(pixels, -1).max() > 100 and picture.stat().st_size < 400_000


def test_maps_are_drawn_in_a_perceptually_uniform_scale(tmp_path, monkeypatch):
    """Its lightness rises in even steps: no edge is seen where none is, as in a rainbow's."""
    figures = []
    monkeypatch.setattr(score_cam.pictures, "save", lambda figure, file: figures.append(figure))
    images, maps, classes = np.zeros((2, 8, 8, 1), np.uint8), np.zeros((2, 8, 8)), np.array([0, 1])
    arrays = {"label": classes}
    for suffix in ("", "_adv"):
        arrays |= {f"x{suffix}": images, f"map{suffix}": maps, f"predicted{suffix}": classes}
    record = dict(title="t", dataset="d", n=2, attack="pgd-2", norm="linf", eps="8/255", tap="stage1")
    score_cam.draw(record, arrays, tmp_path / "a.png", ["one", "two"])
    scale, *others = (panel.images[-1].get_cmap() for panel in figures[0].axes if len(panel.images) == 2)
    assert all(other == scale for other in others)
    red, green, blue = (
        np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) for c in np.array(scale.colors).T
    )
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    lightness = 116 * np.where(luminance > 0.008856, np.cbrt(luminance), 7.787 * luminance + 16 / 116) - 16  # CIE L*
    steps = np.diff(lightness[::16])
    assert np.all(steps > 0) and steps.max() < 2 * steps.min()


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--tap=stag2", "did you mean 'stage2'"),
        ("--tap=pre_logits", "no map of more than one pixel"),
        ("--picture=a.jpg", "ends in .png, .pdf, .svg"),
        ("--names=a,b", "2 names; the data has 10"),
        ("--n=0", "evaluate.n=0 is not allowed"),
        ("--attack=pgd", "attack 'pgd' is unknown"),
    ],
)
def test_what_cannot_be_is_refused(flag, words, workdir, capsys, monkeypatch):
    assert command(monkeypatch, f"--workdir={workdir}", "--attack=pgd-2", flag) == 2
    assert words in capsys.readouterr().err
