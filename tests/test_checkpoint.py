"""Checkpoints under injected damage."""

import errno
import gc
import os
import pickle
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Bomb
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ibjax import files
from ibjax.errors import CheckpointError
from ibjax.runs import checkpoint, stored, trees
from ibjax.step import TrainState


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """After an error a store watches for a second what a save in the background may still write; here none does."""
    monkeypatch.setattr(checkpoint, "time", types.SimpleNamespace(sleep=lambda seconds: None))


def state(step, width=6, dtype=jnp.float32, ema=False, classes=3):
    """Made in NumPy and put on a device: no program is compiled for it."""
    rng = np.random.default_rng(step)
    kernel, b, mean, w = (np.float32(rng.normal(size=shape)) for shape in ((width, 5), (classes,), (4,), (2,)))
    params = {"a": {"kernel": kernel.astype(dtype)}, "b": b}
    variables = {"params": params, "batch_stats": {"mean": mean}, "head": {"params": {"w": w}, "batch_stats": {}}}
    average = jax.tree.map(lambda leaf: leaf + 1, params) if ema else None
    return jax.device_put(TrainState(np.int32(step), variables, (jax.tree.map(np.zeros_like, params), ()), average))


def saved(folder, steps=(1, 2, 3), **options):
    with checkpoint.manager(folder) as orbax:
        for step in steps:
            scores = {"selection": {1: 10.0, 2: 30.0}.get(step, 20.0), "clean_acc": 90.0 if step == 6 else 80.0}
            checkpoint.save(orbax, state(step, **options), scores)
    return folder / "checkpoints"


def latest(folder, like=None):
    with checkpoint.manager(folder) as orbax:
        return checkpoint.restore_latest(orbax, state(0) if like is None else like)


@pytest.mark.parametrize("ema", [False, True])
def test_what_is_restored_is_what_was_saved(tmp_path, ema):
    saved(tmp_path, ema=ema)
    assert trees.digest(latest(tmp_path, state(0, ema=ema))) == trees.digest(state(3, ema=ema))


def test_the_two_latest_and_the_best_are_kept_of_equals_the_cleaner_then_the_later(tmp_path):
    saved(tmp_path, steps=(1, 2, 3, 4, 5))
    with checkpoint.manager(tmp_path, read_only=True) as orbax:
        assert sorted(orbax.all_steps()) == [2, 4, 5]
        assert checkpoint.find_step(orbax, "best") == 2 and checkpoint.find_step(orbax, "last") == 5
    for name, steps, best in (("ties", (3, 4), 4), ("cleaner", (5, 6, 7), 6)):
        saved(tmp_path / name, steps=steps)
        with checkpoint.manager(tmp_path / name, read_only=True) as orbax:
            assert checkpoint.find_step(orbax, "best") == best


def test_evaluation_restores_the_averaged_parameters_alone(tmp_path):
    saved(tmp_path, steps=(1,), ema=True)
    like = {name: state(0).variables[name] for name in ("params", "batch_stats")}
    with checkpoint.manager(tmp_path, read_only=True) as orbax:
        step, variables, _ = checkpoint.restore_variables(orbax, "last", like)
    assert step == 1
    np.testing.assert_array_equal(variables["params"]["b"], state(1, ema=True).ema_params["b"])


def test_no_flipped_byte_gives_a_wrong_weight(tmp_path, caplog):
    """It gives the step before or, in one of Orbax's unread copies, the same state; never a wrong weight."""
    folder = saved(tmp_path, steps=(2, 3))
    rng = np.random.default_rng(0)
    data = [f for item in checkpoint.ITEMS for f in (folder / "3" / item).rglob("*") if f.is_file() and "/d/" in str(f)]
    assert data
    found = named = 0
    for trial in range(40):
        caplog.clear()
        file = data[trial % len(data)]
        work = tmp_path / f"trial{trial}"
        shutil.copytree(folder, work / "checkpoints")
        target = work / "checkpoints" / file.relative_to(folder)
        content = bytearray(target.read_bytes())
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        target.write_bytes(content)
        restored = latest(work)
        good = {trees.digest(state(step)): step for step in (2, 3)}
        step = good[trees.digest(restored)]  # KeyError: a wrong weight was restored silently
        if step == 2:
            found += 1
            named += bool(re.search(r"checkpoint 3: (variables|training)/\S+ is damaged", caplog.text))
            assert (work / "damaged" / "3").is_dir() and not (work / "checkpoints" / "3").exists()
    assert found >= 4
    assert named == found


def test_a_damaged_step_that_is_not_the_newest_is_set_aside_too(tmp_path):
    """It would be the best, and its evaluation would fail again and again."""
    folder = saved(tmp_path, steps=(2, 3, 4))
    for file in (folder / "2" / "variables" / "d").iterdir():
        file.write_bytes(b"")
    assert int(latest(tmp_path).step) == 4
    assert (tmp_path / "damaged" / "2").is_dir()
    with checkpoint.manager(tmp_path, read_only=True) as store:
        assert checkpoint.best_step(store) == 4


def test_a_section_that_the_run_did_not_have_makes_it_another(tmp_path):
    without, other = {"perturb": None, "seed": 0}, {"perturb.name": "awp", "perturb.gamma": 0.005, "seed": 0}
    with checkpoint.manager(tmp_path, run=without) as store:
        checkpoint.save(store, state(1))
    for now in (other, {**without, "data.extra.path": "1m.npz"}):  # earlier versions did not know data.extra
        with (
            checkpoint.manager(tmp_path, read_only=True, run=now) as store,
            pytest.raises(CheckpointError, match=r"no (perturb|data\.extra), now (perturb|data\.extra)\."),
        ):
            checkpoint.metrics(store, 1)
    with checkpoint.manager(tmp_path, read_only=True, run={**without, "mixed": 0}) as store:  # nor an option
        assert checkpoint.metrics(store, 1) == {}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_or_quota_in_a_save_is_one_line(tmp_path, monkeypatch, number):
    with checkpoint.manager(tmp_path) as store:
        checkpoint.save(store, state(1))

        def full(*_, **__):
            raise ValueError(f"UNKNOWN: writing failed [OS error {number}: {os.strerror(number)}]")  # as tensorstore's

        monkeypatch.setattr(store.orbax, "save", full)
        with pytest.raises(CheckpointError, match=r"disk full while saving in .*the last good checkpoint is step 1"):
            checkpoint.save(store, state(2))


def test_a_changed_value_is_refused_by_name(tmp_path, monkeypatch):
    """Where storage returns other bytes without an error of its own, the digest names the leaf."""
    saved(tmp_path, steps=(3,))
    real = trees.array_digest
    monkeypatch.setattr(trees, "array_digest", lambda a: real(a + 1) if a.shape == (6, 5) else real(a))
    like = {name: state(0).variables[name] for name in ("params", "batch_stats")}
    damaged = pytest.raises(CheckpointError, match="variables/params/a/kernel is damaged")
    with checkpoint.manager(tmp_path, read_only=True) as orbax, damaged:
        checkpoint.restore_variables(orbax, "last", like)


@pytest.mark.parametrize("damage", ["truncate", "empty", "delete"])
def test_each_kind_of_file_may_be_damaged(tmp_path, damage):
    """Truncated, emptied, deleted: the step before is used, or the same state is restored; nothing else."""
    folder = saved(tmp_path, steps=(2, 3))
    digests = {trees.digest(state(step)) for step in (2, 3)}
    files = [f for f in (folder / "3").rglob("*") if f.is_file()]
    kinds = {f.name if f.parent.name != "d" else "d": f for f in files}
    for i, file in enumerate(kinds.values()):
        work = tmp_path / f"trial{i}"
        shutil.copytree(folder, work / "checkpoints")
        target = work / "checkpoints" / file.relative_to(folder)
        if damage == "delete":
            target.unlink()
        else:
            os.truncate(target, 0 if damage == "empty" else target.stat().st_size // 2)
        assert trees.digest(latest(work)) in digests, file


def test_nothing_is_unpickled(tmp_path):
    folder, executed = saved(tmp_path, steps=(2, 3)), tmp_path / "executed"
    for file in [f for f in (folder / "3").rglob("*") if f.is_file()]:
        file.write_bytes(pickle.dumps(Bomb(executed)))
    assert int(latest(tmp_path).step) == 2
    assert not executed.exists()


@pytest.mark.parametrize("name", ["manifest.ocdbt", "d"])
def test_a_missing_part_is_named_and_leaves_nothing_behind_that_speaks_later(tmp_path, name, capfd):
    """Reading takes no event loop, whose leftovers would write tracebacks after the line."""
    folder = saved(tmp_path, steps=(2, 3))
    part = folder / "3/variables" / name
    part.unlink() if part.is_file() else shutil.rmtree(part)
    like = {name: state(0).variables[name] for name in ("params", "batch_stats")}
    with checkpoint.manager(tmp_path, read_only=True) as store, pytest.raises(CheckpointError) as caught:
        checkpoint.restore_variables(store, "last", like)
    gc.collect()
    assert "checkpoint 3: variables/" in str(caught.value) and "other checkpoints: [2]" in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_all_damaged_is_an_error_and_nothing_is_moved_until_restart_is_asked_for(tmp_path):
    folder = saved(tmp_path, steps=(2, 3))
    for step in (2, 3):
        shutil.rmtree(folder / str(step) / "variables")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"none of the checkpoints \[2, 3\].* give --restart"):
            latest(tmp_path)
        assert checkpoint.steps_in(folder) == [2, 3] and not (tmp_path / "damaged").exists()
    with checkpoint.manager(tmp_path) as store:
        assert checkpoint.restore_latest(store, state(0), restart=True) is None
        checkpoint.save(store, state(1))
    assert (tmp_path / "restarted-1" / "damaged" / "3" / "training").is_dir() and checkpoint.steps_in(folder) == [1]


@pytest.mark.parametrize(
    "like, words",
    [
        (lambda: state(0, width=7), "params/a/kernel: saved float32[6, 5], wanted float32[7, 5]"),
        (lambda: state(0, width=7, classes=4), "params/b: saved float32[3], wanted float32[4]"),
        (lambda: state(0, dtype=jnp.bfloat16), "wanted bfloat16[6, 5]"),
        (lambda: state(0)._replace(opt_state=()), "wanted nothing"),
    ],
)
def test_another_network_or_type_is_refused_and_the_first_leaves_listed(tmp_path, like, words):
    folder = saved(tmp_path, steps=(3,))
    with pytest.raises(CheckpointError) as caught:
        latest(tmp_path, like())
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert (folder / "3").is_dir()  # not damaged: not set aside


def test_a_save_that_is_killed_leaves_the_previous_step_restorable(tmp_path):
    folder = saved(tmp_path, steps=(2,))
    leftover = folder / "7.orbax-checkpoint-tmp"
    shutil.copytree(folder / "2", leftover)
    assert int(latest(tmp_path).step) == 2
    assert not leftover.exists()


def test_restoring_places_the_state_on_any_number_of_devices(tmp_path):
    saved(tmp_path, steps=(3,))
    for count in (1, 2, 8):
        mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
        sharding = NamedSharding(mesh, PartitionSpec())
        like = jax.tree.map(lambda a, s=sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state(0))
        restored = latest(tmp_path, like)
        assert trees.digest(restored) == trees.digest(state(3))
        assert len(restored.variables["params"]["b"].sharding.device_set) == count


def test_a_state_with_nan_is_never_saved(tmp_path):
    bad = state(3)
    bad.variables["params"]["b"] = jax.device_put(np.float32([1, np.nan, 2]))
    with checkpoint.manager(tmp_path) as orbax:
        with pytest.raises(CheckpointError, match="variables/params/b"):
            checkpoint.save(orbax, bad)
        assert not orbax.all_steps()


@pytest.mark.parametrize("when", ["before the manifest", "before the arrays", "among the files"])
def test_a_step_that_training_supersedes_while_it_is_read_gives_way_to_the_present_one(tmp_path, monkeypatch, when):
    folder = saved(tmp_path, steps=(1, 2))
    shutil.copytree(folder, tmp_path / "newer/checkpoints")
    with checkpoint.manager(tmp_path / "newer") as store:
        checkpoint.save(store, state(5))
    module, called = {
        "before the manifest": (stored, "manifest"),
        "before the arrays": (stored, "_read_item"),
        "among the files": (files, "files_below"),
    }[when]
    real, pending = getattr(module, called), [None]

    def training_goes_on(*arguments):
        found = real(*arguments) if when == "among the files" else None
        if pending:
            pending.pop()
            shutil.rmtree(folder / "2")
            shutil.move(tmp_path / "newer/checkpoints/5", folder / "5")
        return found or real(*arguments)

    monkeypatch.setattr(module, called, training_goes_on)
    like = {name: state(0).variables[name] for name in ("params", "batch_stats")}
    with checkpoint.manager(tmp_path, read_only=True) as store:
        step, variables, _ = checkpoint.restore_variables(store, "last", like)
        assert step == 5 and checkpoint.metrics(store, step) == {}
        np.testing.assert_array_equal(variables["params"]["b"], state(5).variables["params"]["b"])
        shutil.rmtree(folder / "5")
        with pytest.raises(CheckpointError, match="no longer in"):
            checkpoint.metrics(store, 5)


def test_unknown_checkpoints_name_the_known(tmp_path):
    saved(tmp_path)
    with checkpoint.manager(tmp_path, read_only=True) as orbax:
        for which in ("bst", "7"):
            with pytest.raises(
                CheckpointError, match=r"allowed: best, last, \[2, 3\]|allowed: best, last, \[1, 2, 3\]"
            ):
                checkpoint.find_step(orbax, which)
    with pytest.raises(CheckpointError, match="train first"), checkpoint.manager(tmp_path / "no", read_only=True):
        pass
