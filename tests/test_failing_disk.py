"""A disk that fails for a moment, or for good: `open` and `read` fail below Python, nothing is thrown away for it."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_checkpoint import state
from test_faults import CONFIG, environment, finish, start

from ibjax import config, errors, files
from ibjax.errors import InputError, UnreadableError
from ibjax.evaluation import report
from ibjax.runs import checkpoint, metrics, rundir

HERE = Path(__file__).parent
ERRORS = {"EIO": 5, "ENOMEM": 12, "EACCES": 13, "EMFILE": 24, "ESTALE": 116}
FACTS = {"num_classes": 4, "input_shape": [8, 8, 1]}


def begin(workdir):
    """What training does before its first step: the restored step."""
    identity = rundir.write_config(workdir, config.base(), FACTS)
    with checkpoint.manager(workdir, run=identity) as store:
        found = checkpoint.restore_latest(store, state(0))
    step = 0 if found is None else int(found.step)
    metrics.MetricsLog(workdir, step).close()
    return step


def content(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def inject(workdir, times):
    """Begins `times` times on a failing disk, for a moment and for good in turn; {outcome: how often}."""
    files._WAITS = (0.001, 0.001, 0.001)
    fault, libc = ctypes.CDLL(os.environ["LD_PRELOAD"]), ctypes.CDLL(None)

    def say(**settings):
        for name, value in settings.items():
            libc.setenv(f"FAIL_{name}".encode(), str(value).encode(), 1)
        fault.fail_reset()

    before, outcomes, trial = content(workdir), {}, 0
    while sum(outcomes.values()) < times:
        error = list(ERRORS)[trial % len(ERRORS)]
        say(CALLS=("open", "read")[trial // 5 % 2], PATH=workdir, ERRNO=ERRORS[error],
            COUNT=(1, 10**6)[trial // 10 % 2], FIRST=3 * trial % 14)  # fmt: skip
        try:
            outcome = f"step {begin(workdir)}"
        except UnreadableError as error:
            assert "\n" not in str(error) and "nothing was moved" in str(error)
            outcome = "ended in one line"
        except OSError as error:  # a file that could not be written: exit_with makes a line of it
            assert error.filename
            outcome = "ended in one line"
        hits = fault.fail_hits()
        say(CALLS="")
        after = content(workdir)
        changed = {name for name in {**before, **after} if before.get(name) != after.get(name)} - {"env.json"}
        assert not changed, (error, outcome, changed)
        outcomes[outcome] = outcomes.get(outcome, 0) + bool(hits)
        trial += 1
    return outcomes


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if not (sys.platform == "linux" and shutil.which("gcc")):
        pytest.skip("needs Linux and gcc")
    made = tmp_path_factory.mktemp("library") / "failing_disk.so"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", made, HERE / "failing_disk.c", "-ldl"], check=True)
    return made


@pytest.mark.parametrize("times", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_after_failed_opens_and_reads_nothing_is_moved_and_nothing_restarted(tmp_path, library, times):
    workdir = tmp_path / "run"
    identity = rundir.write_config(workdir, config.base(), FACTS)
    with checkpoint.manager(workdir, run=identity) as store:
        for step in (2, 3):
            checkpoint.save(store, state(step), {"selection": 1.0})
    log = metrics.MetricsLog(workdir, 3)
    log.write("val", 3, clean_acc=50.0)
    log.close()
    call = f"t.inject(pathlib.Path('{workdir}'), {times})"
    code = f"import conftest, json, pathlib, test_failing_disk as t; print(json.dumps({call}))"
    variables = environment(LD_PRELOAD=library, PYTHONPATH=f"{HERE.parent}:{HERE}")
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert set(outcomes) == {"step 3", "ended in one line"} and min(outcomes.values()) > times / 5, outcomes
    assert begin(workdir) == 3


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 3, 12, 25])
def test_a_full_disk_ends_in_one_line_and_leaves_nothing_half_written(tmp_path, library, first):
    """Of all writes into the checkpoints those from the `first` on fail, in the first save or in the second."""
    workdir, config_file = tmp_path / "run", tmp_path / "config.py"
    config_file.write_text(CONFIG, encoding="utf-8")
    full = dict(LD_PRELOAD=library, FAIL_CALLS="write", FAIL_ERRNO=28, FAIL_PATH=workdir / "checkpoints")
    code, output = finish(start(config_file, workdir, "--config.epochs=3", **full, FAIL_FIRST=first, FAIL_COUNT=10**6))
    assert code == 2 and output.splitlines()[-1].startswith("error: disk full while saving in"), output
    assert "Traceback" not in output and not list(workdir.rglob("*tmp*")), output
    code, output = finish(start(config_file, workdir, "--config.epochs=3"))
    assert code == 0, output


def test_a_page_that_a_full_disk_does_not_take_is_told_as_such(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ibjax.evaluation.report.read", lambda workdirs: [])
    monkeypatch.setattr("ibjax.evaluation.report.page.page", lambda *arguments: "text")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError) as caught:
        report.write([], tmp_path / "report.html")
    assert errors._ending(caught.value) == (
        2, f"error: {tmp_path / 'report.html'} cannot be written (No space left on device); give another --out"
    )  # fmt: skip


def test_a_read_that_fails_is_tried_again_and_its_failure_is_never_taken_for_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_WAITS", (0.0, 0.0))
    failures = [OSError(116, "Stale file handle"), MemoryError()]

    def read():
        if failures:
            raise failures.pop(0)
        return b"content"

    assert files.patiently(read, "it") == b"content"
    failures[:] = [OSError(5, "Input/output error")] * 3
    with pytest.raises(UnreadableError, match=r"it cannot be read \(Input/output error; tried 3 times\)"):
        files.patiently(read, "it")
    with pytest.raises(FileNotFoundError):
        files.read_bytes(tmp_path / "absent")


def test_lost_checkpoints_are_told_and_only_restart_begins_at_step_0(tmp_path):
    identity = rundir.write_config(tmp_path, config.base(), FACTS)
    with checkpoint.manager(tmp_path, run=identity) as store:
        checkpoint.save(store, state(3), {"selection": 1.0})
    log = metrics.MetricsLog(tmp_path, 0)
    log.write("train", 1, steps=1)
    log.close()
    shutil.rmtree(tmp_path / "checkpoints")
    assert begin(tmp_path) == 0  # ended before its first checkpoint: nothing was lost
    log = metrics.MetricsLog(tmp_path, 3)
    log.write("val", 3, clean_acc=50.0)
    log.close()
    assert begin(tmp_path) == 0  # ended in its first save, which comes after the validation
    log = metrics.MetricsLog(tmp_path, 6)
    log.write("val", 3, clean_acc=50.0)
    log.write("val", 6, clean_acc=50.0)
    log.close()
    other = config.base()
    other.seed = 1
    for settings in (config.base(), other):
        with pytest.raises(InputError, match=r"no checkpoint any more, but metrics.jsonl tells of step 3; .*--restart"):
            rundir.write_config(tmp_path, settings, FACTS)
    assert [row["step"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [3, 6]
    rundir.write_config(tmp_path, config.base(), FACTS, restart=True)
    assert metrics.read(tmp_path / "restarted-1" / "metrics.jsonl") and not (tmp_path / "metrics.jsonl").exists()
    assert begin(tmp_path) == 0  # and it stays so, whatever ends the new run
    log = metrics.MetricsLog(tmp_path, 9)  # validated later than it was saved
    log.write("train", 9, steps=3, saved=6)
    log.close()
    with pytest.raises(InputError, match=r"metrics\.jsonl tells of step 6"):
        rundir.write_config(tmp_path, config.base(), FACTS)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "damaged" / "3").mkdir(parents=True)
    with pytest.raises(InputError, match=r"damaged/ holds steps 3; .*--restart"):
        rundir.write_config(tmp_path, config.base(), FACTS)
