"""The loop: data order, resuming to the bit, what stops it."""

import collections
import dataclasses
import io
import itertools
import json
import logging
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import clean_recipe, smoke_config
from jax.experimental import multihost_utils

from ibjax import config
from ibjax.devices import cluster
from ibjax.errors import CodeError, DataError, DivergedError, InputError, PreemptedError
from ibjax.evaluation.scoring import Flags, GradientError
from ibjax.runs import checkpoint, metrics, run, rundir, trees, writers
from ibjax.training import experiment, feed, loop, programs
from ibjax.training.experiment import build, initial_state


def settings(**changes):
    recipe = clean_recipe()
    recipe.model.widths = ((4,),)
    recipe.update(objective=dict(name="pgd_at"), epochs=3, log_every=3, checkpoint_every=1)
    recipe.data.n_train = 48  # 40 after validation: 5 steps an epoch
    recipe.attack = dict(name="pgd", eps="0.1", step_size="0.05", steps=1)
    for key, value in changes.items():
        recipe[key] = value
    return recipe


# Training on clean images, with a linear network: the changes of `settings` that are quickest to compile
CLEAN = dict(objective=dict(name="standard"), attack=None, model=dict(name="cnn", widths=(), hidden=()))
PROGRAMS = {}


def programs_of(experiment):
    """The programs of an experiment, compiled once for all that differ in nothing that is compiled."""
    compiled = config.plain(experiment.config)
    compiled["writers"] = compiled["validate"]["select"] = compiled["validate"]["stop_on_overfitting"] = None
    return PROGRAMS.setdefault(json.dumps(compiled), programs.make(experiment))._replace(experiment=experiment)


def train(workdir, recipe=None, **functions):
    """Trains by a recipe, or by `settings()`; returns its programs, some of which `functions` replace."""
    made = programs_of(build(settings() if recipe is None else recipe))._replace(**functions)
    loop.train(made.experiment, workdir, checked=made)
    return made


def trained(workdir, recipe=None):
    """(digest of all state, metrics without timings) after training."""
    made = train(workdir, recipe)
    with checkpoint.manager(workdir) as orbax:
        state = checkpoint.restore_latest(orbax, initial_state(made.experiment, made.initial))
    rows = [
        {k: v for k, v in row.items() if k not in ("images_per_s", "compiles", "seconds_left", "saved")}
        for row in metrics.read(workdir / "metrics.jsonl")
    ]
    return trees.digest(state), rows


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(workdir, digest of all state, metrics without timings) of an uninterrupted run of `settings()`."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, *trained(workdir)


@pytest.fixture(scope="module")
def whole(uninterrupted):
    """(digest of all state, metrics without timings) of it."""
    return uninterrupted[1:]


@pytest.fixture
def finished(uninterrupted, tmp_path):
    """A copy of its workdir."""
    return Path(shutil.copytree(uninterrupted[0], tmp_path / "run", ignore=shutil.ignore_patterns(".lock")))


class Stop(Exception):
    pass


def stop_after(monkeypatch, dispatches, error=Stop):
    """Ends the loop as a crash or a notice would, after so many dispatches."""
    calls = iter(range(10**6))

    def preempted():
        if next(calls) + 1 < dispatches:
            return False
        if error is PreemptedError:
            return True
        raise error

    monkeypatch.setattr(cluster, "preempted", preempted)


def assert_no_gap_no_duplicate(rows, total):
    spans = [(row["step"] - row["steps"], row["step"]) for row in rows if row["kind"] == "train"]
    assert spans[0][0] == 0 and spans[-1][1] == total
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    validated = [row["step"] for row in rows if row["kind"] == "val"]
    assert len(validated) == len(set(validated))


def test_rows_say_which_checkpoint_is_on_disk(uninterrupted):
    """Of five steps an epoch, each saved: the one before a row, never the one that is saved after it."""
    rows = [row for row in metrics.read(uninterrupted[0] / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows][-1] == 15
    assert all(row.get("saved", 0) == (row["step"] - 1) // 5 * 5 for row in rows)


def test_notices_are_counted_by_the_loop_alone(tmp_path, monkeypatch):
    """XLA meets the count at which a notice takes effect only where nobody else, as Orbax in a save, sets it."""
    counts = []

    def sync_point(count):
        counts.append(count)
        return False

    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", sync_point)
    train(tmp_path)
    assert len(counts) >= 10 and counts == list(range(counts[0], counts[0] + len(counts)))


@pytest.mark.parametrize("crash_at", [1, 8, 13])
def test_a_crash_anywhere_and_the_same_command_give_the_same_bits(tmp_path, monkeypatch, crash_at, whole):
    expected, expected_rows = whole
    with monkeypatch.context() as patch:
        stop_after(patch, crash_at)
        with pytest.raises(Stop):
            train(tmp_path / "broken")
    got, rows = trained(tmp_path / "broken")
    assert got == expected and rows == expected_rows
    assert_no_gap_no_duplicate(rows, 15)


def test_a_notice_saves_the_very_step_and_continuing_gives_the_same_bits(tmp_path, monkeypatch, whole):
    (expected, _), seen = whole, []

    class Recorder:  # a writer
        def __init__(self, run):
            seen.append(("started", run.step))
            self.first = not run.step

        def write(self, kind, step, values):
            seen.append((kind, step))
            if self.first and kind == "val":
                raise RuntimeError("the tracker is down")

        def close(self):
            seen.append(("closed",))

    monkeypatch.setitem(writers.WRITERS, "recorder", Recorder)
    recipe = settings(writers=("recorder",))
    with monkeypatch.context() as patch:
        stop_after(patch, 7, PreemptedError)
        with pytest.raises(PreemptedError, match="saved step 7 of 15"):
            train(tmp_path / "broken", recipe)
    assert seen == [("started", 0), ("train", 3), ("train", 5), ("val", 5), ("closed",)]  # it failed, the run did not
    del seen[:]
    got, rows = trained(tmp_path / "broken", recipe)
    assert got == expected
    assert_no_gap_no_duplicate(rows, 15)
    after = [(row["kind"], row["step"]) for row in rows if row["step"] > 7]
    assert seen == [("started", 7), *after, ("closed",)]
    assert all(row["seconds_left"] >= 0 for row in metrics.read(tmp_path / "broken/metrics.jsonl") if "loss" in row)


def test_several_steps_per_dispatch_take_the_same_steps(tmp_path, whole):
    """The loop of accelerators, compiled once, whatever the length of a dispatch."""
    _, one = whole
    _, several = trained(tmp_path / "several", settings(steps_per_dispatch=3))
    assert [row["step"] for row in one] == [row["step"] for row in several]
    for a, b in zip(one, several, strict=True):
        for key in ("loss", "robust_acc"):
            if key in a:
                np.testing.assert_allclose(a[key], b[key], rtol=1e-3)
    made = build(settings(steps_per_dispatch=3))
    dispatch, state = feed.make_dispatch(made, 3), initial_state(made)
    arrays = [cluster.replicate(a, made.mesh) for a in (made.data.train.images, made.data.train.labels)]
    for n in (1, 3, 2):
        state, _ = dispatch(state, *arrays, jax.random.key(0), None, np.int32(n))
    assert int(state.step) == 6 and dispatch._cache_size() == 1


def test_the_order_is_a_permutation_of_each_epoch_and_a_function_of_seed_and_epoch():
    """Seen through a train step that returns the indices of its batch."""

    def orders(seed, skip=0):
        made = build(settings(seed=seed))
        seen = []

        def spy(state, batch, key, teacher):
            return state._replace(step=state.step + 1), {"index": batch["index"]}

        dispatch = feed.make_dispatch(made._replace(train_step=spy), 1)
        state = initial_state(made)._replace(step=jax.numpy.int32(skip))
        arrays = [cluster.replicate(a, made.mesh) for a in (made.data.train.images, made.data.train.labels)]
        for _ in range(10 - skip):
            state, values = dispatch(state, *arrays, jax.random.key(seed), None, np.int32(1))
            seen.append(np.asarray(values["index"][0]))
        return seen

    first = orders(0)
    for epoch in (first[:5], first[5:]):
        assert sorted(np.concatenate(epoch)) == list(range(40))
    assert not np.array_equal(np.concatenate(first[:5]), np.concatenate(first[5:]))
    np.testing.assert_array_equal(first[7:], orders(0, skip=7))  # no iterator state: any step can be the first
    assert not np.array_equal(first[0], orders(1)[0])


def test_nothing_is_transferred_from_the_host_inside_an_epoch(tmp_path):
    """The guard is on around every dispatch: an implicit transfer there raises."""
    step, levels = programs_of(build(settings())).step, []

    def spy(*arguments):
        levels.append(jax.config.jax_transfer_guard_host_to_device or jax.config.jax_transfer_guard)
        return step(*arguments)

    train(tmp_path, step=spy)
    assert len(levels) > 1 and set(levels) == {"disallow"}


def test_a_nan_stops_the_run_and_the_last_good_checkpoint_stays(tmp_path):
    made = programs_of(build(settings()))
    numbers, nan = itertools.count(1), cluster.replicate(np.full(1, np.nan, np.float32), made.experiment.mesh)

    def poisoned(*arguments):
        state, values = made.step(*arguments)
        return state, values | {"loss": nan} if next(numbers) == 8 else values

    with pytest.raises(DivergedError) as caught:
        train(tmp_path, step=poisoned)
    assert "step 8" in str(caught.value) and "last good checkpoint is step 5" in str(caught.value)
    with checkpoint.manager(tmp_path, read_only=True) as orbax:
        assert list(orbax.all_steps()) == [5]


def test_weights_that_break_after_the_last_loss_are_told_as_a_loss_that_does(tmp_path, monkeypatch):
    """The loss is of the weights before the step; those behind it are what is validated and saved."""
    made = build(settings())

    def poisoned(state, batch, key, teacher):
        state, values = made.train_step(state, batch, key, teacher)
        params = jax.tree.map(lambda w: jax.numpy.where(state.step == 10, jax.numpy.inf, w), state.variables["params"])
        return state._replace(variables={**state.variables, "params": params}), values

    with pytest.raises(DivergedError, match=r"variables/.* became NaN or Inf in the batch of step 10 \(gradient norms"):
        loop.train(made._replace(train_step=poisoned), tmp_path / "inf")
    reason = metrics.read(tmp_path / "inf/metrics.jsonl")[-1]["reason"]
    assert "last good checkpoint is step 5; lower optimizer.lr" in reason

    def validate(experiment, validator, state):
        raise GradientError("the network's gradient is NaN or infinite on 8 images")

    monkeypatch.setattr(loop, "_validate", validate)  # weights that are finite, and too large for their products
    with pytest.raises(DivergedError, match=r"validation accuracy .* batch of step 5 \(.*gradient is NaN"):
        loop.train(made, tmp_path / "large")


def test_a_validation_is_told_on_a_terminal_as_in_a_pipe(tmp_path, monkeypatch, capsys, caplog):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream in (Terminal(), io.StringIO()):
        handler = logging.StreamHandler(stream)
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(logging.root, "handlers", [handler])
        caplog.set_level(logging.INFO)  # which has loggers forget what they knew of another level
        loop.train(build(settings(epochs=1)), tmp_path / type(stream).__name__)
        text = stream.getvalue()
        assert "epoch 1 of 1, validation clean" in text
        assert ("5/5" in text) == stream.isatty()


def test_a_high_learning_rate_diverges_with_one_line(tmp_path):
    recipe = settings(**CLEAN)
    recipe.optimizer.lr = 999.0
    recipe.optimizer.weight_decay = 1e9
    with pytest.raises(DivergedError, match=r"lower optimizer\.lr|not saved") as caught:
        train(tmp_path, recipe)
    assert "\n" not in str(caught.value)


def test_a_finished_run_is_left_alone(finished, whole):
    before = {f: f.stat().st_mtime_ns for f in (finished / "checkpoints").rglob("*") if f.is_file()}
    assert before
    assert trained(finished) == whole
    assert before == {f: f.stat().st_mtime_ns for f in (finished / "checkpoints").rglob("*") if f.is_file()}


def test_another_configuration_in_the_same_workdir_is_refused(finished):
    with pytest.raises(InputError, match=r"epochs=3, now 4"):
        loop.train(build(settings(epochs=4)), finished)
    train(finished, settings(log_every=1))  # what does not change the result may change


def test_two_runs_in_one_workdir_the_second_is_refused(tmp_path):
    with rundir.lock(tmp_path), pytest.raises(InputError, match="another run"), rundir.lock(tmp_path):
        pass
    with rundir.lock(tmp_path):
        pass


def test_validation_is_sparse_then_dense(tmp_path):
    recipe = settings(epochs=6)
    recipe.validate.update(every=4, dense_from=5)
    _, rows = trained(tmp_path, recipe)
    assert [row["step"] for row in rows if row["kind"] == "val"] == [20, 25, 30]


def test_a_cut_last_line_of_metrics_is_dropped(tmp_path):
    log = metrics.MetricsLog(tmp_path, 0)
    log.write("train", 1, steps=1, loss=0.5)
    log.write("train", 2, steps=1, loss=0.4)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"kind": "train", "st')
    metrics.MetricsLog(tmp_path, 1).close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1]


def test_the_configuration_comes_back_from_disk_as_it_was(finished):
    saved, facts = rundir.read_config(finished)
    assert json.loads(json.dumps(config.effective(settings()).to_dict())) == json.loads(json.dumps(saved.to_dict()))
    assert facts["num_classes"] == 10 and facts["n_train"] == 40
    assert dataclasses.is_dataclass(run.load(finished).model)


# ---- what is selected, on what, and with what --------------------------------------------------------------


def scripted_validation(monkeypatch, scores):
    """Replaces the scores of each validation by (clean, robust) pairs."""
    pairs = iter(scores)

    def validate(experiment, validator, state):
        clean, robust = next(pairs)
        return {"clean_acc": clean, "robust_acc": robust, "selection": robust}

    monkeypatch.setattr(loop, "_validate", validate)


def test_best_is_chosen_by_robust_not_by_clean_accuracy(tmp_path, monkeypatch):
    scripted_validation(monkeypatch, [(90.0, 10.0), (50.0, 40.0), (99.0, 35.0)])
    train(tmp_path)
    with checkpoint.manager(tmp_path, read_only=True) as orbax:
        assert checkpoint.best_step(orbax) == 10
    assert run.load(tmp_path, "best").step == 10 and run.load(tmp_path, "last").step == 15


def scripted_flags(monkeypatch, scores):
    """The same before an accuracy is selected: each validation's images are (clean, robust) percent right."""
    pairs = iter(scores)

    def flags(self, variables, split, *args, **kwargs):
        clean, robust = (np.arange(100) < count for count in next(pairs))
        return Flags(clean, robust, np.zeros(100), np.zeros(100), np.zeros(100, bool)), None

    monkeypatch.setattr(programs.Scorer, "__call__", flags)


@pytest.mark.parametrize(
    "changes, select, best",
    [
        (dict(), "robust", 10),
        (CLEAN, "clean", 15),
        (dict(objective=dict(name="mma"), attack=None), "robust", 10),
        (dict(select="clean"), "clean", 15),
        (dict(select="mean"), "mean", 10),
        (dict(CLEAN, select="robust"), "robust", 10),
    ],
)
def test_best_is_chosen_by_robust_accuracy_where_it_is_trained_for_and_else_by_clean(
    tmp_path, monkeypatch, changes, select, best
):
    recipe = settings(**{key: value for key, value in changes.items() if key != "select"})
    recipe.validate.select = changes.get("select")
    scripted_flags(monkeypatch, [(60, 40), (61, 45), (75, 30)])
    train(tmp_path, recipe)
    with checkpoint.manager(tmp_path, read_only=True) as orbax:
        assert checkpoint.best_step(orbax) == best
        assert checkpoint.metrics(orbax, best)["select"] == select


def test_a_network_that_withstands_nothing_is_its_best_and_not_its_first(tmp_path, monkeypatch, caplog):
    """What clean training loses in robust accuracy is no catastrophe, and no alarm."""
    scripted_flags(monkeypatch, [(43, 30), (95, 0), (95, 0)])
    train(tmp_path, settings(**CLEAN))
    assert run.load(tmp_path, "best").step == 15
    assert "catastrophic" not in caplog.text


def test_the_accuracy_that_selects_is_checked():
    recipe = settings()
    recipe.validate.select = "robut"
    with pytest.raises(InputError, match=r"validate\.select='robut' is unknown; allowed: .*did you mean 'robust'"):
        config.check(recipe)
    recipe = settings(**CLEAN)
    recipe.validate.stop_on_overfitting = True
    with pytest.raises(InputError, match="stop_on_overfitting"):
        build(recipe)


def test_selection_looks_at_the_validation_split_or_where_asked_at_the_test_set(tmp_path, monkeypatch):
    seen = []
    original = programs.Scorer.__call__

    def spy(self, variables, split, *args, **kwargs):
        seen.append(split)
        return original(self, variables, split, *args, **kwargs)

    monkeypatch.setattr(programs.Scorer, "__call__", spy)
    for name in ("val", "test"):
        recipe = settings(epochs=1, select_on=name)
        made = build(recipe)
        loop.train(made, tmp_path / name)
        assert seen.pop() is getattr(made.data, name) and not seen


def test_the_teacher_is_its_best_checkpoint_unless_another_is_asked_for(tmp_path, monkeypatch):
    scripted_validation(monkeypatch, [(90.0, 30.0), (50.0, 10.0), (50.0, 10.0)])
    train(tmp_path / "teacher")
    for which, step in (("best", 5), ("last", 15)):
        recipe = settings(objective=dict(name="ibd", beta=0.0))
        recipe.attack = dict(name="pgd", loss="kl", init="gaussian", eps="0.1", step_size="0.05", steps=1)
        recipe.teacher.update(workdir=str(tmp_path / "teacher"), checkpoint=which)
        made = build(recipe)
        assert made.facts["teacher"]["step"] == step
        assert made.facts["teacher"]["weights"] == trees.digest(run.load(tmp_path / "teacher", which).variables)
        assert trees.digest(made.frozen["teacher"]) == made.facts["teacher"]["weights"]


def test_other_data_or_another_teacher_cannot_continue_a_run(finished):
    made = build(settings())
    for name, other in (("digests", {"train": "0"}), ("teacher", {"step": 3, "weights": "0"})):
        with pytest.raises(InputError, match=f"trained with another {name}"):
            loop.train(made._replace(facts={**made.facts, name: other}), finished)


def test_a_first_attempt_that_fails_does_not_bind_the_workdir(tmp_path):
    """Without a checkpoint there is nothing to protect: the corrected configuration runs there."""
    made = build(settings(epochs=2))

    def failing(state, batch, key, frozen):
        raise RuntimeError("a bug in the first step")

    with pytest.raises(RuntimeError, match="first step"):
        loop.train(made._replace(train_step=failing), tmp_path)
    trained(tmp_path, settings(epochs=1))


def test_a_catastrophic_loss_of_robustness_raises_the_alarm_and_stops_where_asked(tmp_path, monkeypatch, caplog):
    fall = [(80.0, 40.0), (85.0, 19.0), (90.0, 45.0)]
    scripted_validation(monkeypatch, fall)
    _, rows = trained(tmp_path / "goes on")
    assert "catastrophic overfitting" in caplog.text and rows[-1]["step"] == 15
    scripted_validation(monkeypatch, fall)
    recipe = settings()
    recipe.validate.stop_on_overfitting = True
    for _ in range(2):  # the same command again leaves it stopped
        _, rows = trained(tmp_path / "stops", recipe)
        assert rows[-1]["step"] == 10
    assert run.load(tmp_path / "stops", "best").step == 5


def test_a_notice_in_the_step_of_catastrophic_overfitting_is_not_lost(tmp_path, monkeypatch):
    scripted_validation(monkeypatch, [(80.0, 40.0), (85.0, 19.0)])
    recipe = settings()
    recipe.validate.stop_on_overfitting = True
    stop_after(monkeypatch, 10, PreemptedError)
    with pytest.raises(PreemptedError):
        train(tmp_path, recipe)


@pytest.mark.parametrize("error", [DataError("shard 3 is damaged"), CodeError("my_attack leaves the ball")])
def test_what_validation_cannot_read_or_run_is_no_divergence(tmp_path, monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(loop, "_validate", fails)
    with pytest.raises(type(error), match=str(error)):
        train(tmp_path)
    assert "diverged" not in {row["kind"] for row in metrics.read(tmp_path / "metrics.jsonl")}


def test_a_dispatch_takes_some_seconds_at_most_unless_its_length_is_given():
    pace = loop._Pace(settings(), 50)
    pace.measure(batch_size=512, images_per_s=1024.0)  # half a second a step
    assert pace.capacity == 10
    pace.measure(batch_size=512, images_per_s=512.0)  # measured once: all processes wait for it
    assert pace.capacity == 10
    for slow, expected in ((0.0, 1), (1e9, 50)):
        pace = loop._Pace(settings(), 50)
        pace.measure(batch_size=512, images_per_s=slow)
        assert pace.capacity == expected
    pace = loop._Pace(settings(steps_per_dispatch=50), 50)
    pace.measure(batch_size=512, images_per_s=1.0)
    assert pace.capacity == 50


def test_one_dispatch_at_most_is_computed_ahead():
    waited = []

    class Values:
        def __init__(self, number):
            self.number = number

        def block_until_ready(self):
            waited.append(self.number)
            return self

    pace = loop._Pace(settings(), 1)
    for number in range(4):
        pace.wait({"loss": Values(number)})
        assert waited == list(range(number))


def test_running_out_of_memory_names_the_batch_of_a_device(tmp_path):
    def dispatch(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")

    with pytest.raises(MemoryError, match="batch_size=8 is 1 images on each of 8 devices"):
        train(tmp_path, step=dispatch)


@pytest.fixture
def traces(monkeypatch):
    """{function: how often it was traced}, of the functions of `programs.Programs`."""
    counts = collections.Counter()

    def counted(name, function):
        def call(*arguments, **options):
            counts[name] += 1
            return function(*arguments, **options)

        return call

    def counting(make, name):
        return lambda *arguments, **options: counted(name, make(*arguments, **options))

    monkeypatch.setattr(experiment, "make_train_step", counting(experiment.make_train_step, "step"))
    monkeypatch.setattr(experiment, "initializer", counting(experiment.initializer, "initial"))
    scorer = programs.Scorer
    monkeypatch.setattr(
        programs,
        "Scorer",
        lambda network, make, *rest, **options: scorer(network, counting(make, "validator"), *rest, **options),
    )
    return counts


def test_a_run_traces_and_compiles_its_step_once_and_says_so(tmp_path, traces):
    """What a check has traced is not traced again."""
    checked = loop.check(settings())
    once = {"step": 1, "initial": 1, "validator": 1}
    assert traces == once
    loop.train(build(settings()), tmp_path, checked=checked)
    assert traces == once
    compiles = [row["compiles"] for row in metrics.read(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    assert compiles[0] > 0 and compiles[-1] == 0


def test_several_steps_of_a_dispatch_are_traced_as_one(traces):
    checked = programs.make(build(settings(steps_per_dispatch=3)))
    checked.trace()
    assert traces["step"] == 1


def test_what_a_check_has_traced_serves_nothing_but_its_configuration_data_and_networks(monkeypatch):
    checked = programs.make(build(settings(), abstract=True))
    same = checked.of(made := build(settings()))
    assert same.step is checked.step and same.experiment is made
    others = {
        "configuration": build(settings(batch_size=16)),
        "network": made._replace(model=made.model.clone(widths=((5,), (4,)))),
        "data": made._replace(data=made.data._replace()),
        "teacher": made._replace(teachers={"teacher": made.model}),
    }
    for what, other in others.items():
        assert checked.of(other).step is not checked.step, what


def test_a_teacher_that_is_trained_after_the_check_changes_nothing_that_is_traced(digits_run):
    recipe = config.effective(smoke_config("digits"))
    checked = programs.make(build(recipe, {"teacher": digits_run / "nowhere"}, abstract=True))
    made = build(recipe, {"teacher": digits_run / "teacher"})
    assert checked.of(made).step is checked.step
    shapes = [cluster.shapes(frozen, made.mesh) for frozen in (checked.experiment.frozen, made.frozen)]
    assert shapes[0] == shapes[1]
