"""What the calibration makes of attacks: the numbers in float64, the calibration alone, the picture, the command."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_recipe, untrained_run
from PIL import Image

from ibjax import files
from ibjax.analysis import attacked, modulation
from ibjax.devices import cluster
from ibjax.errors import InputError
from ibjax.models import resnet, siriib
from ibjax.net import linen_net, to_float
from ibjax.runs import run

BACKBONE = dict(name="resnet", blocks=(1,), width=2)
SIZES = dict(backbone=BACKBONE, scales=(8, 4), widths=(2,))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of SiRIIB's network on synthetic grey-scale images."""
    sections = dict(model=dict(name="siriib", connections=2, **SIZES), objective=dict(name="standard"), attack=None)
    return untrained_run(tmp_path_factory.mktemp("runs") / "grey", small_recipe(**sections))


def images(seed, channels=3, n=5):
    return np.random.default_rng(seed).random((n, 6, 6, channels)).astype(np.float32)


def seen(x, x_avg):
    """What `look` returns for these, by NumPy in float64."""
    sigmas = [np.linalg.svd(np.moveaxis(a.astype(np.float64), -1, 1), compute_uv=False) for a in (x, x_avg)]
    return modulation.Seen(x, x_avg, *sigmas)


def test_changes_are_means_of_norms():
    x, x_adv, a, b = (images(seed) for seed in range(4))
    x_adv[3] = x[3]
    before, after = seen(x, a), seen(x_adv, b)
    found = modulation.change(before, after)
    ratios = [np.linalg.norm(b[i] - a[i]) / np.linalg.norm(x_adv[i] - x[i]) for i in (0, 1, 2, 4)]
    assert found["moved"] == 4 and found["passed"] == pytest.approx(np.mean(ratios), rel=1e-6)
    for key, pair in (("sigma", (x, x_adv)), ("sigma_avg", (a, b))):
        each = [
            np.linalg.norm(np.subtract(*(np.linalg.svd(y[i, ..., c].astype(float), compute_uv=False) for y in pair)))
            for i in range(5)
            for c in range(3)
        ]
        assert found[key] == pytest.approx(np.mean(each), rel=1e-6)
        by_matrix = np.linalg.norm(pair[0].astype(float) - pair[1], axis=(1, 2)).mean()
        assert 0 < found[key] <= by_matrix  # Mirsky: singular values move less than their matrix
    assert modulation.change(before, before) == dict(moved=0, passed=None, sigma=0, sigma_avg=0)


@pytest.mark.parametrize("batch_size", [2, 5])
def test_lower_contrast_passes_its_share_of_everything(batch_size):
    see = modulation.look(lambda variables, x: (None, {"x_avg": variables * x + 0.2}), batch_size)
    before, after = (see(jnp.float32(0.4), images(seed)) for seed in (0, 1))
    expected = seen(images(0), 0.4 * images(0) + 0.2)
    for name, value in before._asdict().items():
        np.testing.assert_allclose(value, getattr(expected, name), rtol=1e-5, atol=1e-5)
    assert before.sigma.shape == (5, 3, 6)
    assert modulation.change(before, after)["passed"] == pytest.approx(0.4, rel=1e-5)


def test_other_networks_and_attacks_without_a_loss_are_refused():
    with pytest.raises(InputError, match="has no x_avg"):
        modulation.check(resnet.Model(10), None)
    apart, joined = (siriib.Model(10, connections=count, **SIZES) for count in (0, 1))
    assert modulation.check(apart, None) == ("pgd-20", "margin-20", "siriib-svd-20")
    assert modulation.check(joined, None) == modulation.ATTACKS
    assert modulation.check(joined, ["siriib-info-3"]) == ("siriib-info-3",)
    with pytest.raises(InputError, match="'siriib-info-3' climbs L_info"):
        modulation.check(apart, ["pgd-2", "siriib-info-3"])
    with pytest.raises(InputError, match="'pdg-2' is unknown"):
        modulation.check(apart, ["pdg-2"])


def test_a_run_of_another_network_is_refused(workdir, tmp_path):
    saved = files.read_json(workdir / "config.json")
    saved["config"]["model"] = BACKBONE
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(InputError, match=r"model\.name='siriib'"):
        modulation.evaluate(tmp_path, attacks=("pgd-2",))


def test_it_is_run_from_the_command_line(workdir, tmp_path, monkeypatch, capsys):
    """On grey-scale images; the record is that of the calibration by itself."""
    picture, kept = tmp_path / "modulation.png", {}
    evaluate = modulation.evaluate

    def noted(*args, **options):
        kept["record"], kept["shown"] = evaluate(*args, **options)
        return kept["record"], kept["shown"]

    flags = [f"--workdir={workdir}", "--attacks=pgd-2,siriib-svd-2", "--n=6", f"--picture={picture}"]
    monkeypatch.setattr("sys.argv", ["modulation", *flags])
    monkeypatch.setattr(cluster, "initialize", lambda: None)  # it must come before all of JAX
    monkeypatch.setattr(modulation, "evaluate", noted)
    with pytest.raises(SystemExit) as caught:
        modulation.main()
    assert caught.value.code == 0
    record = files.read_json(workdir / "modulation" / "best.json")
    assert record == kept["record"] and list(record["changes"]) == ["pgd-2", "siriib-svd-2", "another image"]

    trained = run.load(workdir)
    variables = {kind: tree["calibration"] for kind, tree in trained.variables.items()}
    x_avg = jax.jit(lambda x: siriib.Calibration(scales=(8, 4)).apply(variables, x)[0])
    x = np.asarray(to_float(jnp.asarray(run.test_split(trained, 6).images)))
    clean, pairs = seen(x, np.asarray(x_avg(x))), {"another image": np.roll(x, 1, axis=0)}
    pairs |= {name: part.x for name, part in kept["shown"].items() if name != "x"}
    of_run = attacked.load(workdir, attacks=("pgd-2", "siriib-svd-2"), n=6)
    for name, other in pairs.items():
        expected = modulation.change(clean, seen(other, np.asarray(x_avg(other))))
        assert record["changes"][name] == pytest.approx(expected, rel=1e-4) and expected["moved"] == 6
        if name != "another image":
            x_adv = attacked.attack(name, linen_net(trained.model).predict, of_run[0], of_run[2], of_run[1])[1]
            np.testing.assert_allclose(other, x_adv, atol=1e-6)
    row = record["changes"]["pgd-2"]
    assert f"| PGD-2 | {row['passed']:.3f} | {row['sigma']:.3f} |" in capsys.readouterr().out
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert np.all(pixels[[0, -1]] == 255) and np.all(pixels[:, [0, -1]] == 255)  # white, and nothing is cut off
    assert picture.stat().st_size < 600_000


@pytest.mark.parametrize("channels", [1, 3])
def test_the_picture_states_the_scale_of_its_differences(channels, monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(modulation.pictures, "save", lambda figure, file: figures.append(figure))
    x, x_adv = images(0, channels), images(1, channels)
    shown = {"x": seen(x, x), "pgd-20": seen(x_adv, x_adv - 0.25), "siriib-info-20": seen(x_adv, x_adv + 0.5)}
    record = dict(title="$a$ of _b", dataset="d", n=5, norm="linf", eps="8/255")
    modulation.draw(record, shown, tmp_path / "a.png")
    (figure,) = figures
    texts = [text.get_text() for text in figure.texts]
    assert sum("−0.50 to 0.50" in text for text in texts) == 2 and "$a$ of _b on d, n = 5, linf eps 8/255" in texts
    drawn = [panel.images[0].get_array() for panel in figure.axes]
    assert len(drawn) == 8 * 5
    for j in range(5):
        np.testing.assert_allclose(drawn[2 * 5 + j], np.broadcast_to(x_adv[j], (6, 6, 3)))  # row x'
        np.testing.assert_allclose(drawn[4 * 5 + j], 0.75, atol=1e-6)  # half of the scale, above mid-grey
        np.testing.assert_allclose(drawn[7 * 5 + j], 0.0, atol=1e-6)
    figure.savefig(tmp_path / "a.png")


def test_a_picture_of_an_unknown_kind_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["modulation", f"--workdir={tmp_path}", "--picture=a.gif"])
    with pytest.raises(SystemExit) as caught:
        modulation.main()
    assert caught.value.code == 2 and "give a name that ends in .png, .pdf, .svg" in capsys.readouterr().err
