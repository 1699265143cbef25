"""The table of effects: its settings, its terms against the losses themselves, its test, and the whole in miniature."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import comparison
import effects

from ibjax import config
from ibjax.errors import InputError
from ibjax.net import to_float
from ibjax.objectives.ib_rar import dependence, ib_rar, layers_of
from ibjax.runs import run

SMALL = dict(name="cnn", widths=((2,),), hidden=(), padding=1, pool="average")


@pytest.mark.parametrize("data", ["digits", "mnist:mnist.npz", "cifar10:cifar10"])
@pytest.mark.parametrize("name", effects.RUNS)
def test_every_run_has_the_data_and_lengths_that_are_asked_for(name, data, tmp_path):
    given = effects.parse([f"--workdir={tmp_path}", f"--data={data}", "--epochs=7", "--fraction=0.5", "--n=70"])
    made = effects.settings(name, 2, given)
    config.check(made)
    eps = {"digits": "2/16", "mnist": "0.2", "cifar10": "8/255"}[data.partition(":")[0]]
    assert (made.seed, made.evaluate.n, made.title) == (2, 70, name)
    for part in (made, *(recipe for _, recipe in config.recipes(made))):
        longer = effects.RUNS[name].longer if part is not made else 1
        assert (part.epochs, part.data.fraction, part.threat.eps) == (7 * longer, 0.5, eps)
        assert part.validate.every == part.epochs and part.data.get("path", "digits") in data


def test_teachers_are_wider_or_trained_longer_as_their_runs_say(tmp_path):
    given = effects.parse([f"--workdir={tmp_path}", "--epochs=7"])
    same, wider, stronger = (
        effects.settings(name, 0, given) for name in ("IBD", "IBD, wider teacher", "IBD, stronger teacher")
    )
    for made, times, epochs in ((same, 1, 7), (wider, 3, 7), (stronger, 3, 35)):
        assert made.epochs == 7 and made.teacher.recipe.epochs == epochs
        assert np.array_equal(made.teacher.recipe.model.widths, times * np.array(made.model.widths))
    assert len({made.teacher.workdir for made in (same, wider, stronger)}) == 3


def test_every_claim_is_about_two_runs_that_measure_it():
    for effect in effects.EFFECTS:
        for name in (effect.method, effect.base):
            measured = effects.TERMS.get(effects.RUNS[name].terms_of, {})
            assert effect.column in {*measured, "pgd-20"} and effect.column in effects.LABELS
    methods = [effects.RUNS[effect.method] for effect in effects.EFFECTS]
    assert {method.ingredient for method in methods} == {"", *effects.INGREDIENTS}
    assert {method.objective for method in methods if not method.ingredient} == {
        "ib_rar", "shared_information", "siriib", "ibd"
    }  # fmt: skip


def seeds(column, values):
    return {str(seed): {column: value} for seed, value in enumerate(values)}


def test_the_verdict_is_a_paired_one_sided_t_test():
    base, lower = [5.0, 7.0, 9.0], [4.0, 5.5, 8.2]
    p = stats.ttest_rel(lower, base, alternative="less").pvalue
    assert effects.p_value(np.subtract(base, lower).tolist()) == pytest.approx(p) and p < 0.05
    effect = effects.Effect("m", "b", "svd", -1)
    text = effects.sentence(effect, {"m": seeds("svd", lower), "b": seeds("svd", base)})
    assert "lower L_svd: appears (-1.1000 ± 0.3606, 3 of 3 seeds, p = 0.017)" in text
    text = effects.sentence(effect._replace(sign=1), {"m": seeds("svd", lower), "b": seeds("svd", base)})
    assert "higher L_svd: does not appear, the opposite does (-1.1000 ± 0.3606, 0 of 3 seeds" in text
    text = effects.sentence(effect, {"m": seeds("svd", [4.0, 8.5, 8.2]), "b": seeds("svd", base)})
    assert "does not appear (" in text
    assert "not decided; seeds: 1" in effects.sentence(effect, {"m": seeds("svd", [4.0]), "b": seeds("svd", base)})
    assert effects.p_value([1.0, 1.0]) == 0 and effects.p_value([0.0, 0.0]) == 1


def test_unknown_data_is_refused(tmp_path):
    for data in ("mnist", "digits:somewhere", "svhn:x"):
        with pytest.raises(InputError, match="--data="):
            effects.study(effects.parse([f"--workdir={tmp_path}", f"--data={data}"]))
    with pytest.raises(InputError, match="--runs: PGD is unknown; allowed: PGD-AT; TRADES"):
        effects.study(effects.parse([f"--workdir={tmp_path}", "--runs=PGD-AT;PGD"]))


def test_ingredients_are_added_to_the_base_alone_and_held_out_images_are_no_training_images(tmp_path):
    """Held-out images stand in for generated ones: all that --fraction leaves of the training images."""
    given = effects.parse([f"--workdir={tmp_path}", "--runs=ingredients", "--fraction=0.1", "--n=70"])
    assert given.runs == ["PGD-AT", *(f"PGD-AT + {name}" for name in effects.INGREDIENTS)]
    assert not set(effects.parse([f"--workdir={tmp_path}"]).runs) & set(given.runs[1:])
    base, *added = (effects.settings(name, 0, given) for name in given.runs)
    for made, changes in zip(added, effects.INGREDIENTS.values(), strict=True):
        config.check(made)
        for key in changes:
            section, _, name = key.rpartition(".")
            inside, plain = ((config.lookup(part, section) if section else part) for part in (made, base))
            with made.unlocked():
                if name in plain:
                    inside[name] = plain[name]
                else:
                    del inside[name]
        assert {**config.plain(made), "title": ""} == {**config.plain(base), "title": ""}
    held = effects.settings("PGD-AT + held-out images", 0, given)
    effects.hold_out(held, tmp_path / effects.HELD_OUT)
    data = run.load_data(held)
    assert len(data.extra.labels) + len(data.train.labels) == 1797 - len(data.test.labels) - len(data.val.labels)
    known = {image.tobytes() for image in data.train.images}
    assert sum(image.tobytes() in known for image in data.extra.images) <= 2  # but for images that are there twice
    with held.unlocked():
        held.data.fraction = 1.0
    with pytest.raises(InputError, match="give one below 1"):
        effects.hold_out(held, tmp_path / "x.npz")


@pytest.mark.parametrize(
    "names, count", [(["IB-RAR"], 1), pytest.param(["PGD-AT", "IB-RAR"], 2, marks=pytest.mark.slow)]
)
def test_the_whole_study_in_miniature(names, count, tmp_path, monkeypatch):
    """A second call trains nothing; the terms are those of the formula, by hand."""
    monkeypatch.setattr(comparison, "NETWORKS", dict.fromkeys(("pgd_at", "ib_rar"), lambda cnn: SMALL))
    flags = [
        "--epochs=1",
        f"--seeds={count}",
        f"--runs={';'.join(names)}",
        "--fraction=0.1",
        "--n=70",
        f"--out={tmp_path / 'effects'}",
    ]
    given = effects.parse([f"--workdir={tmp_path / 'runs'}", *flags])
    effects.study(given)
    text, results = (tmp_path / "effects.md").read_text(), json.loads((tmp_path / "effects.json").read_text())
    assert text.count("against") == 2 * (count - 1) and text.count("lower nHSIC(X, T): ") == count - 1
    assert list(results["runs"]) == names and not results["failed"]
    assert results["n"] == 70 and results["versions"]["jax"] == jax.__version__ and results["hardware"] in text

    trained = run.load(tmp_path / "runs" / "IB-RAR" / "0", "last")
    for key in ("eps", "step_size"):
        trained.config.evaluate[key] = "1/1000000"  # x' is x but for rounding
    test = run.load_data(trained.config).test
    order = np.random.default_rng(0).permutation(len(test.labels))[:64]
    x, y = to_float(jnp.asarray(test.images[order])), jnp.asarray(test.labels[order])
    taps = layers_of(trained.model.apply(trained.variables, x)[1])
    found = effects.terms(trained, ib_rar(), ("nhsic_x", "nhsic_y"), 70)
    np.testing.assert_allclose([found["nhsic_x"], found["nhsic_y"]], dependence(x, y, 10, taps), rtol=1e-2)

    if count > 1:
        before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("runs/*/*/checkpoints/*")}
        effects.study(given)
        assert before == {file: file.stat().st_mtime_ns for file in tmp_path.glob("runs/*/*/checkpoints/*")}
        assert json.loads((tmp_path / "effects.json").read_text())["runs"] == results["runs"]
