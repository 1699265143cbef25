"""Calibrated images before a plain classifier: each row of the table by hand, and its command."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_recipe, untrained_run

from ibjax import files
from ibjax.analysis import calibration, corruptions
from ibjax.attacks.pgd import pgd
from ibjax.devices import cluster
from ibjax.errors import InputError
from ibjax.evaluation import evaluate, scoring
from ibjax.models import resnet, siriib
from ibjax.net import to_float
from ibjax.runs import run
from ibjax.training.experiment import build

BACKBONE = dict(name="resnet", blocks=(1,), width=2)
SIZES = dict(backbone=BACKBONE, scales=(8, 4), widths=(2,))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run on synthetic images of CIFAR's shape whose calibration stands beside the classifier."""
    sections = dict(model=dict(name="siriib", connections=0, **SIZES), objective=dict(name="siriib", lam=1.0))
    return untrained_run(tmp_path_factory.mktemp("runs") / "isolated", small_recipe((32, 32, 3), **sections))


@pytest.fixture(scope="module")
def parts(workdir):
    """(run, x_avg of images, logits of the classifier), from the two modules themselves."""
    trained = run.load(workdir)

    def of(name):
        return {kind: tree[name] for kind, tree in trained.variables.items()}

    calibrate, classifier = siriib.Calibration(scales=(8, 4)), resnet.Model(10, blocks=(1,), width=2)
    return (
        trained,
        jax.jit(lambda x: calibrate.apply(of("calibration"), x)[0]),
        jax.jit(lambda x: classifier.apply(of("backbone"), x)[0]),
    )


def test_each_row_is_what_it_says(workdir, parts):
    trained, x_avg, logits = parts
    test = run.test_split(trained)
    x, y = to_float(jnp.asarray(test.images)), test.labels
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.fold_in(jax.random.key(trained.config.seed), scoring._EVALUATION), jnp.arange(len(y))
    )
    attack = pgd(eps="8/255", step_size="2/255", steps=2)

    def right(network, images):
        return np.asarray(network(images)).argmax(1) == y

    def through(images):
        return logits(x_avg(images))

    x_adv = attack(keys, logits, x, y)
    found = {
        "image": (right(logits, x), right(logits, x_adv)),
        "calibrated": (right(through, x), right(through, x_adv)),
        "through": (right(through, x), right(through, attack(keys, through, x, y))),
    }
    record = calibration.evaluate(workdir)
    assert record["acc"] == {
        row: {"clean": calibration.percent(clean), "pgd-2": calibration.percent(clean & adv)}
        for row, (clean, adv) in found.items()
    }
    (known,) = evaluate.evaluate(workdir)
    assert record["acc"]["image"] == {"clean": known["clean_acc"], "pgd-2": known["robust_acc"]}


@pytest.mark.parametrize("attack", ["fgsm", pytest.param("apgd-ce", marks=pytest.mark.slow)])
def test_it_is_evaluated_from_the_command_line(attack, workdir, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["calibration", f"--workdir={workdir}", f"--attacks={attack}", "--n=10"])
    monkeypatch.setattr(cluster, "initialize", lambda: None)  # it must come before all of JAX
    with pytest.raises(SystemExit) as caught:
        calibration.main()
    assert caught.value.code == 0
    record = files.read_json(workdir / "calibration" / "best.json")
    assert record["n"] == 10 and list(record["acc"]) == list(calibration.ROWS)
    for row in ("image", "through"):
        assert record["acc"][row][attack] <= record["acc"][row]["clean"]
    assert f"| {record['acc']['through'][attack]:.2f} |" in capsys.readouterr().out


def test_corrupted_images_can_be_calibrated(workdir, parts, monkeypatch):
    monkeypatch.setattr(corruptions.corruptions, "TWELVE", ("fog", "frost"))
    trained, x_avg, logits = parts
    record = corruptions.evaluate(workdir, generate=True, calibrated=True, n=10)
    source = corruptions.generated(run.test_split(trained), "synthetic", n=10)
    for severity, value in zip(corruptions.corruptions.SEVERITIES, record["acc"]["fog"], strict=True):
        split = source.split("fog", severity)
        predicted = logits(x_avg(to_float(jnp.asarray(split.images)))).argmax(1)
        assert value == calibration.percent(np.asarray(predicted) == split.labels)
    assert record == files.read_json(workdir / "corruptions" / "best.calibrated.json")
    assert not (workdir / "corruptions" / "best.json").exists()


def test_only_a_calibration_that_stands_apart_is_taken():
    for model in (siriib.Model(10, **SIZES), resnet.Model(10)):
        with pytest.raises(InputError, match="connections=0"):
            calibration.calibrated(model)


def test_a_modulation_that_would_only_scale_grey_images_is_refused():
    """With one channel the default maps the modulus of one colour, x' = w·x."""
    model = dict(name="siriib", connections=0, **SIZES)
    for shape, changes in (((32, 32, 3), {}), ((8, 8, 1), dict(fourier="amp_phase"))):
        build(small_recipe(shape, model=model | changes, objective=dict(name="siriib")))
    with pytest.raises(InputError, match=r"one channel would only be scaled; set model\.fourier='amp_phase'"):
        build(small_recipe((8, 8, 1), model=model, objective=dict(name="siriib")))
