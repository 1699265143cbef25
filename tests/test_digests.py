"""What a number depends on carries a digest: a changed bit is found, named, and computed again where it can be."""

import json
import os
import shutil

import jax.numpy as jnp
import pytest
from conftest import small_recipe, untrained_run
from test_checkpoint import state

import ibjax
from ibjax import config, files, main
from ibjax.errors import CheckpointError, InputError, UnreadableError
from ibjax.evaluation import evaluate
from ibjax.evaluation.report import runs
from ibjax.pytorch import exports
from ibjax.runs import checkpoint, metrics, rundir

FACTS = {"num_classes": 4, "input_shape": [8, 8, 1], "digests": {"train": "ab", "test": "cd"}}


MODEL = dict(name="cnn", widths=(), hidden=())


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The workdir of a run that has taken no step, with one record."""
    workdir = untrained_run(tmp_path_factory.mktemp("evaluated") / "run", small_recipe(model=MODEL))
    evaluate.evaluate(workdir)
    return workdir


def saved(workdir, steps=((2, 30.0), (3, 20.0)), settings=None, facts=FACTS):
    identity = rundir.write_config(workdir, settings or config.base(), facts)
    with checkpoint.manager(workdir, run=identity) as store:
        for step, score in steps:
            checkpoint.save(store, state(step), {"selection": score})
    return identity


def change(file, old, new):
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


# ---- JSON --------------------------------------------------------------------------------------------------


def test_a_changed_bit_of_a_sealed_file_is_found(tmp_path):
    """Every bit of it: another content is never returned."""
    file, content = tmp_path / "a.json", {"robust_acc": 43.21, "shape": (3, 4), "of": {"x": None, "é": True}}
    files.write_json(file, content)
    kept = json.loads(json.dumps(content))
    assert files.read_json(file, sealed=True) == kept
    whole = file.read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            found = files.read_json(file)
        except ValueError:
            continue
        assert found == kept, flipped  # white space


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.json"
    files.write_json(file, {"n": 1})
    with pytest.raises(ValueError):
        files.write_json(file, {"n": float("nan")})
    with pytest.raises(OSError), files.replacing(file) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise OSError(28, "No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"] and files.read_json(file) == {"n": 1}


def test_files_of_older_versions_have_no_digest_and_are_read(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"n": 1}', encoding="utf-8")
    assert files.read_json(file) == {"n": 1}
    with pytest.raises(ValueError, match="no digest"):
        files.read_json(file, sealed=True)


# ---- checkpoints -------------------------------------------------------------------------------------------


def test_a_changed_manifest_does_not_make_another_step_the_best_in_silence(tmp_path, caplog):
    identity = saved(tmp_path)
    change(tmp_path / "checkpoints/2/manifest/metadata", '"selection": 30.0', '"selection": 10.0')
    with checkpoint.manager(tmp_path, read_only=True, run=identity) as store:
        with pytest.raises(CheckpointError, match=r"checkpoint 2: manifest is damaged .*which checkpoint is the best"):
            checkpoint.find_step(store, "best")
        assert checkpoint.find_step(store, "last") == 3
    with checkpoint.manager(tmp_path, run=identity) as store:
        assert int(checkpoint.restore_latest(store, state(0)).step) == 3
        assert checkpoint.best_step(store) == 3
    assert "checkpoint 2: manifest is damaged" in caplog.text and (tmp_path / "damaged/2").is_dir()
    assert "steps 2 were damaged" in rundir.doubts(tmp_path)[0]  # every record says so


def test_the_checkpoint_of_another_run_is_refused_though_its_network_is_the_same(tmp_path):
    other = config.base()
    other.seed, other.optimizer.lr = 1, 0.2
    saved(tmp_path / "a"), saved(tmp_path / "b", settings=other)
    saved(tmp_path / "c", facts={**FACTS, "digests": {"train": "other", "test": "cd"}})
    for foreign, words in (("b", r"optimizer.lr=0.2, now 0.1; seed=1, now 0"), ("c", r"its digests.train='other'")):
        shutil.rmtree(tmp_path / "a/checkpoints")
        shutil.copytree(tmp_path / foreign / "checkpoints", tmp_path / "a/checkpoints")
        identity = rundir.write_config(tmp_path / "a", config.base(), FACTS)
        for options in ({}, {"read_only": True}):
            refused = pytest.raises(CheckpointError, match=f"checkpoint 3 in .* is of a run with {words}")
            with checkpoint.manager(tmp_path / "a", run=identity, **options) as store, refused:
                checkpoint.restore_latest(store, state(0))
    assert not (tmp_path / "a/damaged").exists() and checkpoint.steps_in(tmp_path / "a/checkpoints") == [2, 3]


def test_a_step_under_another_name_is_refused(tmp_path):
    identity = saved(tmp_path)
    (tmp_path / "checkpoints/3").rename(tmp_path / "checkpoints/9")
    with checkpoint.manager(tmp_path, read_only=True, run=identity) as store, pytest.raises(CheckpointError) as caught:
        checkpoint.restore_variables(store, "last", {"params": {}, "batch_stats": {}})
    assert "9 holds the checkpoint of step 3" in str(caught.value)


def test_checkpoints_that_do_not_say_of_which_run_they_are_still_load(tmp_path):
    """As those of older versions; but without config.json beside them nothing says it, and they are refused."""
    with checkpoint.manager(tmp_path) as store:
        checkpoint.save(store, state(3), {"selection": 1.0})
    with pytest.raises(CheckpointError, match=r"no config.json beside it, and step 3 does not say of which run"):
        rundir.write_config(tmp_path, config.base(), FACTS)
    (tmp_path / "config.json").write_text(
        json.dumps({"config": config.plain(config.base()), "data": FACTS}), encoding="utf-8"
    )
    identity = rundir.write_config(tmp_path, config.base(), FACTS)
    with checkpoint.manager(tmp_path, run=identity) as store:
        assert int(checkpoint.restore_latest(store, state(0)).step) == 3


# ---- config.json -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["deleted", "damaged"])
def test_without_config_json_another_configuration_is_refused_and_the_same_one_restores_it(tmp_path, damage, caplog):
    saved(tmp_path)
    file, other = tmp_path / "config.json", config.base()
    whole = file.read_bytes()
    if damage == "deleted":
        file.unlink()
    else:
        change(file, '"lr": 0.1', '"lr": 0.3')
    other.optimizer.lr = 0.3
    left = file.read_bytes() if file.exists() else None
    with pytest.raises(InputError, match=r"is of a run with optimizer.lr=0.1, now 0.3"):
        rundir.write_config(tmp_path, other, FACTS)
    assert (file.read_bytes() if file.exists() else None) == left
    with pytest.raises(CheckpointError, match="missing beside checkpoints" if left is None else "the digest differs"):
        rundir.read_config(tmp_path)
    rundir.write_config(tmp_path, config.base(), FACTS)
    assert file.read_bytes() == whole and "written anew" in caplog.text


def test_a_changed_config_json_is_found_before_a_number_depends_on_it(evaluated, tmp_path):
    workdir = shutil.copytree(evaluated, tmp_path / "run")
    change(workdir / "config.json", '"momentum": 0.9', '"momentum": 0.8')
    for call in (ibjax.load, evaluate.evaluate):
        with pytest.raises(CheckpointError, match=r"config.json is damaged .*the digest differs"):
            call(workdir)
    problems = runs.read([workdir])[0].problems
    assert any("config.json" in text and "the digest differs" in text for text in problems)


def test_data_may_move_but_not_change(tmp_path):
    """Where the data lie is no part of a run; what they hold is."""
    settings, moved = config.base(), config.base()
    for made, path in ((settings, "/here.npz"), (moved, "/there.npz")):
        made.data = dict(name="npz", path=path, val_size=8, split_seed=0, fraction=1.0)
    saved(tmp_path, settings=settings)
    rundir.write_config(tmp_path, moved, FACTS)
    assert rundir.read_config(tmp_path)[0].data.path == "/there.npz"
    with pytest.raises(InputError, match="another digests"):
        rundir.write_config(tmp_path, moved, {**FACTS, "digests": {"train": "other", "test": "cd"}})


# ---- records -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key, value", [("clean_acc", 99.0), ("robust_acc", 0.0), ("selected_on", "test")])
def test_a_changed_record_is_named_and_computed_again(evaluated, tmp_path, caplog, key, value):
    workdir = shutil.copytree(evaluated, tmp_path / "run")
    file = workdir / "eval/best/pgd-2.json"
    record = json.loads(file.read_text())
    whole = {name: value for name, value in record.items() if name not in ("digest", "date", "seconds")}
    assert record[key] != value
    record[key] = value
    file.write_text(json.dumps(record))
    problems = runs.read([workdir])[0].problems
    assert any("pgd-2.json cannot be read (its content is not what was written" in text for text in problems)
    again = evaluate.evaluate(workdir, attacks=["pgd-2"])[0]
    assert "pgd-2.json is damaged" in caplog.text
    assert json.loads(json.dumps({name: again[name] for name in whole})) == whole
    assert files.read_json(file, sealed=True)["robust_acc"] == again["robust_acc"]


def test_a_run_below_the_home_folder_is_found_with_its_records(evaluated, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(evaluated.parent))
    monkeypatch.setattr(evaluate.Scorer, "__call__", lambda *arguments, **options: pytest.fail("it was attacked"))
    assert evaluate.evaluate("~/run")[0]["attack"] == "pgd-2" and not (tmp_path / "~").exists()


def test_a_record_without_a_digest_is_read(evaluated, tmp_path):
    workdir = shutil.copytree(evaluated, tmp_path / "run")
    file = workdir / "eval/best/pgd-2.json"
    record = json.loads(file.read_text())
    del record["digest"]
    file.write_text(json.dumps(record))
    before = file.stat().st_mtime_ns
    assert evaluate.evaluate(workdir, attacks=["pgd-2"])[0]["robust_acc"] == record["robust_acc"]
    assert file.stat().st_mtime_ns == before


def test_results_that_cannot_be_listed_or_read_are_told_never_left_out_in_silence(
    evaluated, tmp_path, monkeypatch, caplog
):
    """`glob` and `os.walk` take a folder that cannot be listed for an empty one."""
    workdir, real = shutil.copytree(evaluated, tmp_path / "run"), os.scandir
    monkeypatch.setattr(files, "_WAITS", (0.0,))
    network = ibjax.load(workdir)

    def refusing(folder):
        def scandir(path="."):
            if str(path).startswith(str(folder)):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        return scandir

    for folder in (workdir / "eval", workdir / "eval/best"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", refusing(folder))
            problems = runs.read([workdir])[0].problems
            with pytest.raises(UnreadableError, match="Permission denied"):
                exports.model_info(network, "best")
        assert any("eval cannot be listed" in text for text in problems)
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refusing(workdir))
        with pytest.raises(InputError, match=f"{workdir} cannot be listed"):
            runs.read([tmp_path])
    change(workdir / "eval/best/pgd-2.json", '"robust_acc"', '"robust_acd"')
    exports.model_info(network, "best")
    assert "pgd-2.json is damaged" in caplog.text


def test_a_folder_that_cannot_be_written_is_told_before_the_attack_not_after_it(evaluated, tmp_path, monkeypatch):
    workdir = shutil.copytree(evaluated, tmp_path / "run")
    known = evaluate.evaluate(workdir)
    (workdir / "eval/best").rename(tmp_path / "kept")
    shutil.rmtree(workdir / "eval")
    (workdir / "eval").touch()  # no folder can be made here, as on a disk that is mounted for reading
    monkeypatch.setattr(evaluate.Scorer, "__call__", lambda *arguments, **options: pytest.fail("it was attacked"))
    with pytest.raises(InputError, match=r"eval/best cannot be written .* the result would be lost"):
        evaluate.evaluate(workdir)
    (workdir / "eval").unlink()
    shutil.copytree(tmp_path / "kept", workdir / "eval/best")
    monkeypatch.setattr(rundir, "check_writable", lambda folder: pytest.fail("nothing has to be written"))
    assert evaluate.evaluate(workdir)[0]["robust_acc"] == known[0]["robust_acc"]


# ---- metrics.jsonl -----------------------------------------------------------------------------------------

BAD = {
    "bytes that are no text": b'{"kind": "train", "step": 2, "steps": 1, "loss": \xff}',
    "no object": b"[1, 2]",
    "no step": b'{"kind": "train", "loss": 1.0}',
    "a changed bit": None,
    "brackets": b"[" * 100000,
}


@pytest.mark.parametrize("bad", BAD)
def test_a_line_of_metrics_that_is_damaged_is_left_out_and_told_of_and_stops_nothing(tmp_path, caplog, bad):
    log = metrics.MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write("train", step, steps=1, loss=float(step))
    log.close()
    file = tmp_path / "metrics.jsonl"
    lines = file.read_bytes().splitlines()
    lines[1] = lines[1].replace(b"2.0", b"6.0") if BAD[bad] is None else BAD[bad]
    file.write_bytes(b"\n".join(lines) + b"\n")
    assert [row["step"] for row in metrics.read(file)] == [1, 3]
    log = metrics.MetricsLog(tmp_path, 3)
    log.write("train", 4, steps=1)
    log.close()
    assert "1 damaged lines are left out; no row tells of steps 2 to 2" in caplog.text
    rows, damaged = metrics.read_lines(file)
    assert [row["step"] for row in rows] == [1, 3, 4] and not damaged and "crc" not in rows[0]


def test_a_line_that_a_crash_has_cut_and_rows_without_a_checksum_are_as_before(tmp_path, caplog):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"kind": "train", "step": 1, "steps": 1}\n{"kind": "val", "step": 1}\n{"kind": "tr')
    assert metrics.read_lines(file) == ([{"kind": "train", "step": 1, "steps": 1}, {"kind": "val", "step": 1}], 0)
    metrics.MetricsLog(tmp_path, 1).close()
    assert not caplog.text and len(metrics.read(file)) == 2


# ---- a whole command ---------------------------------------------------------------------------------------


def test_a_record_of_a_run_whose_steps_were_damaged_says_so(evaluated, tmp_path):
    workdir = shutil.copytree(evaluated, tmp_path / "run")
    shutil.rmtree(workdir / "eval")
    (workdir / "damaged/7").mkdir(parents=True)
    assert "steps 7 were damaged" in evaluate.evaluate(workdir)[0]["warnings"][-1]


def test_a_run_whose_best_step_was_damaged_says_so_in_its_records(tmp_path):
    workdir = tmp_path / "run"
    main.execute(small_recipe(model=MODEL, epochs=2, objective=dict(name="standard"), attack=None), workdir)
    with checkpoint.manager(workdir, read_only=True) as store:
        best = checkpoint.best_step(store)
        (other,) = set(store.all_steps()) - {best}
    change(workdir / f"checkpoints/{best}/manifest/metadata", '"selection"', '"selectiom"')
    with pytest.raises(CheckpointError, match="which checkpoint is the best"):
        evaluate.evaluate(workdir)
    settings, _ = rundir.read_config(workdir)
    record = main.execute(settings, workdir)[0]
    text = f"steps {best} were damaged"
    if other > best:
        assert text in record["warnings"][-1] and record["step"] == other
    else:  # the newest was damaged: trained again
        assert record["step"] == best
    assert any(text in problem for problem in runs.read([workdir])[0].problems)


def test_saving_what_the_folder_has_gone_beyond_is_an_error(tmp_path):
    with checkpoint.manager(tmp_path) as store:
        checkpoint.save(store, state(5))
        with pytest.raises(CheckpointError, match="step 4 was not saved"):
            checkpoint.save(store, state(5)._replace(step=jnp.int32(4)))
