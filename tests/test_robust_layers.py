"""IB-RAR's permanent mask as a network, and the two commands: the mask of a run, the choice of robust layers."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import clean_recipe
from test_models import random_variables

import ibjax
from ibjax import files
from ibjax.analysis import layers, mask
from ibjax.errors import InputError
from ibjax.evaluation import evaluate
from ibjax.models import masked
from ibjax.net import linen_net
from ibjax.objectives import ib_rar
from ibjax.runs import metrics, recipe_files, run, rundir

X = np.random.default_rng(0).random((4, 32, 32, 3), np.float32)
NETWORKS = [  # a pooled map; one that a shortcut and a convolution see; one before a batch-norm; a vector
    (dict(name="vgg", depth=11, width=2, hidden=(6,)), "stage5"),
    (dict(name="resnet", blocks=(1, 1), width=4), "stage1"),
    (dict(name="wide_resnet", depth=10, width=1), "stage2"),
    (dict(name="resnet", blocks=(1, 1), width=4), "pre_logits"),
    (dict(name="stochastic", backbone=dict(name="resnet", blocks=(1, 1), width=4), latent=6), "stage2"),
]


@pytest.mark.parametrize("section, tap", NETWORKS)
def test_a_masked_network_is_the_network_with_zeros_at_its_tap(section, tap):
    """In evaluation and, with its batch statistics, in training."""
    inner = run.build_model(section, 5, "model")
    variables = random_variables(inner, X.shape)
    outer = masked.Model(5, section, tap, (1, 3))
    nested = {kind: {"backbone": tree} for kind, tree in variables.items()}
    width = jax.eval_shape(inner.apply, variables, X)[1][tap].shape[-1]
    edits = {tap: ib_rar.masked(np.float32(~np.isin(np.arange(width), (1, 3))))}
    expected = jax.jit(lambda variables: inner.apply(variables, X, edits=edits))(variables)
    logits, features = jax.jit(outer.apply)(nested, X)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)  # two programs
    close(logits, expected[0])
    seen = np.asarray(features[tap])
    assert not np.any(seen[..., [1, 3]]) and np.any(seen[..., [0, 2]])
    assert np.abs(logits - jax.jit(inner.apply)(variables, X)[0]).max() > 1e-5
    key = jax.random.key(2)
    if section["name"] != "stochastic":  # a nested module draws from another key
        one = jax.jit(linen_net(outer).forward)(nested, X, key)
        other = jax.jit(lambda variables: linen_net(inner).forward(variables, X, key, edits))(variables)
        close(one[0][0], other[0][0])
        jax.tree.map(close, one[1]["batch_stats"]["backbone"], other[1]["batch_stats"])


def test_a_mask_of_what_is_not_there_is_refused():
    section = dict(name="resnet", depth=10, width=4)
    for tap, channels, words in (("stage9", (1,), "'stage9' is no feature"), ("stage1", (4,), "has 4 channels")):
        with pytest.raises(InputError, match=words):
            jax.eval_shape(masked.Model(5, section, tap, channels).init, jax.random.key(0), X)


@pytest.fixture
def undefended(digits_run, tmp_path):
    return shutil.copytree(digits_run / "undefended", tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))


def test_the_command_masks_the_channels_that_tell_least_of_the_label(undefended, tmp_path):
    trained = ibjax.load(undefended)
    values = mask.information(trained, "stage2")
    chosen = mask.mask(undefended, tmp_path / "masked", "stage2", share=0.5)
    assert set(chosen) == set(np.argsort(values)[: len(values) // 2].tolist())
    assert np.ptp(values) > 0

    result = ibjax.load(tmp_path / "masked")
    x = jax.random.uniform(jax.random.key(0), (3, 8, 8, 1))
    edit = {"stage2": ib_rar.masked(jnp.ones(len(values)).at[jnp.asarray(chosen)].set(0))}
    expected = trained.model.apply(trained.variables, x, edits=edit)[0]
    np.testing.assert_allclose(result.logits_fn(x), expected, rtol=1e-5, atol=1e-6)

    record = evaluate.evaluate(tmp_path / "masked", attacks=("fgsm",))[0]
    assert record["title"] == "undefended, masked" and record["config"]["model"]["channels"] == chosen
    assert mask.mask(undefended, tmp_path / "masked", "stage2", share=0.5) == chosen  # it is there already
    with pytest.raises(InputError, match="holds a run with model"):
        mask.mask(undefended, tmp_path / "masked", "stage2", share=0.25)
    with pytest.raises(InputError, match="less than one"):
        mask.mask(undefended, tmp_path / "other", "stage2", share=0.01)
    with pytest.raises(InputError, match="--tap=stage7 is no feature"):
        mask.mask(undefended, tmp_path / "other", "stage7")
    assert not (tmp_path / "other").exists()


def recipe():
    settings = clean_recipe()
    settings.objective = dict(name="ib_rar", base="standard")
    settings.epochs, settings.model.widths = 1, ((4,),)
    return settings


def test_the_choice_of_layers_trains_each_alone_and_goes_on_where_it_was(tmp_path):
    found, taps = layers.choose(recipe(), tmp_path, gain=0.0), ["stage1", "pre_logits"]
    robust = {name: row["robust"] for name, row in found["accuracy"].items()}
    assert list(robust) == ["none", *taps] and found["attack"] == "pgd-2"
    assert found["layers"] == [tap for tap in taps if robust[tap] >= robust["none"]]
    saved = {name: rundir.read_config(tmp_path / name)[0].objective for name in found["accuracy"]}
    assert (saved["none"].alpha, saved["none"].beta) == (0.0, 0.0)
    assert saved["stage1"].layers == "stage1" and saved["stage1"].beta == 0.08
    assert files.read_json(tmp_path / "layers.json") == found
    assert "validation images" in layers.table(found).splitlines()[0]

    # the last checkpoint was validated too, by an attack of its own: the clean accuracies are of the same images
    rows = [row for row in metrics.read(tmp_path / "stage1" / "metrics.jsonl") if row["kind"] == "val"]
    assert found["selected_on"] == "val" and found["n"] == recipe().data.val_size
    assert found["accuracy"]["stage1"]["clean"] == pytest.approx(rows[-1]["clean_acc"], abs=1e-3)

    logs = {name: (tmp_path / name / "metrics.jsonl").stat().st_mtime_ns for name in saved}
    assert layers.choose(recipe(), tmp_path, gain=1000.0)["layers"] == []
    assert logs == {name: (tmp_path / name / "metrics.jsonl").stat().st_mtime_ns for name in saved}
    with pytest.raises(InputError, match="select_on"):  # runs that chose by other images are not these
        layers.choose(on_test(recipe()), tmp_path)
    flag = layers.table(found | dict(layers=taps)).splitlines()[-1]
    assert flag == "--config.objective.layers=stage1,pre_logits"
    assert recipe_files.override(recipe(), [flag]).objective.layers == "stage1,pre_logits"


@pytest.mark.slow
def test_the_test_set_chooses_layers_only_where_that_is_asked(tmp_path):
    found = layers.choose(on_test(recipe()), tmp_path)
    assert found["selected_on"] == "test" and "test images" in layers.table(found).splitlines()[0]
    assert found["n"] == len(run.load_data(recipe()).test.labels)


def on_test(settings):
    settings.select_on = "test"
    return settings


def test_a_recipe_without_layers_to_choose_is_refused(tmp_path):
    with pytest.raises(InputError, match="'standard' has no layers"):
        layers.choose(clean_recipe(), tmp_path)
