"""A run and its data: what its files say of them, old ones included, and what its logits_fn takes."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ibjax import config, main
from ibjax.errors import InputError
from ibjax.evaluation.report import runs
from ibjax.net import linen_net
from ibjax.runs import run

RNG = np.random.default_rng(0)
CLASSES = ("2", "10", "11")  # as text, 2 would be last


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(configuration, workdir) of one epoch on class folders; class 11 has no test image."""
    folder = tmp_path_factory.mktemp("data")
    for split, names, count in (("train", CLASSES, 8), ("test", CLASSES[:2], 4)):
        for label, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = RNG.integers(0, 60, (9, 8), dtype=np.uint8) + 90 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}.png")
    settings = config.base()
    data = dict(name="folder", path=str(folder), grey=True, size=8, val_size=6, split_seed=0)
    model = dict(name="cnn", widths=(), hidden=())
    settings.attack = None
    settings.update(epochs=1, batch_size=8)
    settings.data, settings.model, settings.objective = data, model, dict(name="standard")
    settings.augment.pad = 1
    settings.validate.attack.steps = 2
    settings.evaluate.update(attacks=("fgsm",), batch_size=8)
    workdir = tmp_path_factory.mktemp("run")
    main.execute(settings, workdir)
    return settings, workdir


def test_records_name_the_classes_and_what_casts_doubt_on_the_data(trained):
    _, workdir = trained
    doubt = "1 of 3 classes have no test image: 2 (11)"
    facts = json.loads((workdir / "config.json").read_text())["data"]
    assert facts["classes"] == list(CLASSES) and facts["warnings"] == [doubt]
    record = json.loads((workdir / "eval/best/fgsm.json").read_text())
    assert record["classes"] == list(CLASSES) and doubt in record["warnings"]
    assert record["dataset"].endswith(", centre crops of 8×8")
    assert doubt in (workdir / "report.html").read_text()


# the keys of a configuration before any was added
FIRST = (
    "assistant", "attack", "attack_bn", "augment", "batch_size", "checkpoint_every", "contrast", "data", "ema_decay",
    "epochs", "evaluate", "head_optimizer", "log_every", "microbatches", "model", "objective", "optimizer", "perturb",
    "schedule", "seed", "select_on", "steps_per_dispatch", "teacher", "threat", "title", "validate",
)  # fmt: skip


def test_a_run_of_an_earlier_version_continues_and_is_evaluated(trained, tmp_path):
    """Its config.json neither names classes nor has the options that came later, of whichever section."""
    settings, workdir = trained[0], shutil.copytree(trained[1], tmp_path / "run")
    file = workdir / "config.json"
    content = json.loads(file.read_text())
    old = {name: value for name, value in content["data"].items() if name not in ("classes", "warnings")}
    sections = {name: value for name, value in content["config"].items() if name in FIRST}
    sections["data"] = {name: value for name, value in sections["data"].items() if name != "fit"}
    file.write_text(json.dumps({"config": sections, "data": old}))
    assert "classes" not in run.load(workdir).facts
    records = main.execute(settings, workdir)
    assert records[0]["n"] == 8 and run.load(workdir).facts["classes"] == list(CLASSES)


def test_logits_fn_takes_pixels_in_the_unit_interval_and_nothing_else(trained):
    loaded = run.load(trained[1])
    images = run.test_split(loaded).images
    x = np.float32(images) / 255
    logits = loaded.logits_fn(x)
    expected = linen_net(loaded.model).predict(loaded.variables, jnp.asarray(x))[0]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    for same in (x.astype(np.float64), jnp.asarray(x), jnp.asarray(x) + 5e-7 * (x == 1)):
        np.testing.assert_allclose(loaded.logits_fn(same), logits, rtol=1e-5, atol=1e-5)
    with_nan = x.copy()
    with_nan[0, 0, 0] = np.nan
    for wrong, words in (
        (images, "uint8.*divide by 255"),
        (jnp.asarray(images), "uint8"),
        (np.float32(images), r"reach from \d+\.0 to \d+\.0;"),
        (jnp.float32(images), r"reach from"),
        (x - 0.5, r"reach from -0\.5"),
        (with_nan, "1 of 8 images hold NaN"),
        (x[0], r"shape \(8, 8, 1\)"),
        (x > 0.5, "bool"),
        (x.tolist(), "list"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            loaded.logits_fn(wrong)
        assert "\n" not in str(caught.value)
    np.testing.assert_allclose(jax.jit(loaded.logits_fn)(x), logits, rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda x: loaded.logits_fn(x).sum())(jnp.asarray(x))
    assert gradient.shape == x.shape
    with pytest.raises(InputError, match="uint8"):  # a type is known inside a trace, too
        jax.jit(loaded.logits_fn)(images)


def test_a_damaged_picture_of_examples_is_named_and_the_page_made_without_it(trained, tmp_path):
    """Cut anywhere, or with wrong bits: named, or the same images."""
    folder = tmp_path / "run"
    shutil.copytree(trained[1], folder)
    file = folder / "eval/best/fgsm.examples.npz"
    content, whole = file.read_bytes(), runs.read([folder])[0].examples
    assert whole is not None
    step = len(content) // 60
    cuts = [content[:i] for i in range(0, len(content), step)]
    flips = [content[:i] + bytes([content[i] ^ 255]) + content[i + 1 :] for i in range(0, len(content), step)]
    index = content.rindex(b"PK\x01\x02")
    flips += [content[:i] + bytes([content[i] ^ 255]) + content[i + 1 :] for i in range(index, index + 46)]
    for damaged in cuts + flips:
        file.write_bytes(damaged)
        found = runs.read([folder])[0]
        if found.examples is None:
            assert any("fgsm.examples.npz" in problem and "\n" not in problem for problem in found.problems)
        else:
            for name in ("x", "x_adv", "label", "predicted", "predicted_adv"):
                np.testing.assert_array_equal(found.examples[name], whole[name])
