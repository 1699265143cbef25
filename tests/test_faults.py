"""Real processes, really killed: the command line as a cluster sees it."""

import itertools
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import CACHE
from test_checkpoint import state

from ibjax.errors import CheckpointError
from ibjax.runs import checkpoint, metrics, rundir, trees
from ibjax.training.experiment import build, initial_state

ROOT = Path(__file__).parent.parent
CONFIG = """
from ibjax.config import base

def get_config(arg=None):
    config = base()
    config.data = dict(name="synthetic", shape=(8, 8, 1), num_classes=4, n_train=136, n_test=16)
    config.data.update(val_size=8, split_seed=0)
    config.augment = dict(pad=1, padding="zero", flip=True)
    config.model = dict(name="cnn", widths=((4,), (4,)), hidden=(), padding=1, batch_norm=True, pool="average")
    config.attack.update(eps="0.1", step_size="0.05", steps=2)
    config.validate.attack.update(eps="0.1", step_size="0.05", steps=2)
    config.validate.update(every=8, batch_size=8)
    config.evaluate.update(attacks=("fgsm",), eps="0.1", step_size="0.05", batch_size=16)
    config.update(batch_size=16, epochs=48, log_every=5, checkpoint_every=1)
    config.optimizer.lr = 0.02
    return config
"""
TOTAL = 384  # seconds of work: a preemption signal is looked for once a second


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(CONFIG)
    return file


def environment(**changes):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    ours = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": CACHE, "PYTHONPATH": str(ROOT)}
    ours["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "")  # the tests' light compiler, or what they were started with
    return {**clean, **ours, **{name: str(value) for name, value in changes.items()}}


def start(config_file, workdir, *arguments, **env):
    command = [sys.executable, "-m", "ibjax.main", f"--config={config_file}", f"--workdir={workdir}", *arguments]
    return subprocess.Popen(
        command, env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process, timeout=180):
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def wait_for_step(workdir, step, process, timeout=120):
    """Waits until metrics.jsonl has a row at or after the step."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        rows = metrics.read(workdir / "metrics.jsonl")
        if rows and rows[-1]["step"] >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError("no progress")


def state_digest(workdir):
    saved, _ = rundir.read_config(workdir)
    made = build(saved)
    with checkpoint.manager(workdir, read_only=True) as orbax:
        state = checkpoint.restore_latest(orbax, initial_state(made))
    assert int(state.step) == TOTAL
    return trees.digest(state)


def assert_every_step_is_in_one_row(workdir):
    rows = [row for row in metrics.read(workdir / "metrics.jsonl") if row["kind"] == "train"]
    assert sum(row["steps"] for row in rows) == rows[-1]["step"] == TOTAL
    assert all(a["step"] + b["steps"] == b["step"] for a, b in itertools.pairwise(rows))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    file = folder / "config.py"
    file.write_text(CONFIG)
    code, output = finish(start(file, folder / "run"))
    assert code == 0, output
    return state_digest(folder / "run")


def test_killed_then_preempted_the_same_command_ends_in_the_same_bits(config_file, tmp_path, uninterrupted):
    """kill -9, SIGTERM twice to the process that continues, and the command once more."""
    workdir = tmp_path / "run"
    process = start(config_file, workdir)
    wait_for_step(workdir, 20, process)
    process.kill()
    process.communicate()
    saved = preempt(config_file, workdir, 60)
    code, output = finish(start(config_file, workdir))
    assert code == 0 and f"continuing from step {saved}" in output, output
    assert state_digest(workdir) == uninterrupted
    assert_every_step_is_in_one_row(workdir)


def preempt(config_file, workdir, step):
    """Ends the command after `step` with SIGTERM as a cluster does; the step that it has saved."""
    process = start(config_file, workdir)
    wait_for_step(workdir, step, process)
    process.send_signal(signal.SIGTERM)
    noticed = time.monotonic()
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)  # a second one, in the save, changes nothing
    code, output = finish(process)
    assert code == 75 and "preempted: saved step" in output and time.monotonic() - noticed < 30, output
    saved = int(output.split("saved step ")[1].split()[0])
    assert (workdir / "checkpoints" / str(saved)).is_dir() and saved >= step
    return saved


@pytest.mark.slow
def test_kill_9_in_training_then_the_same_command_ends_in_the_same_bits(config_file, tmp_path, uninterrupted):
    workdir = tmp_path / "run"
    for step in (20, 60):
        process = start(config_file, workdir)
        wait_for_step(workdir, step, process)
        process.kill()
        process.communicate()
    code, output = finish(start(config_file, workdir))
    assert code == 0 and "continuing from step" in output, output
    assert state_digest(workdir) == uninterrupted
    assert_every_step_is_in_one_row(workdir)


@pytest.mark.slow
def test_sigterm_saves_the_step_and_exits_75_then_continues(config_file, tmp_path, uninterrupted):
    workdir = tmp_path / "run"
    saved = preempt(config_file, workdir, 20)
    code, output = finish(start(config_file, workdir))
    assert code == 0 and f"continuing from step {saved}" in output
    assert state_digest(workdir) == uninterrupted
    assert_every_step_is_in_one_row(workdir)


def two_processes(config_file, workdir, *arguments):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    common = dict(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=2)
    return [start(config_file, workdir, *arguments, **common, JAX_PROCESS_ID=i) for i in (0, 1)]


def test_two_processes_take_the_same_steps_as_one_with_two_devices(config_file, tmp_path):
    processes = two_processes(config_file, tmp_path / "two")
    for code, output in map(finish, processes):
        assert code == 0, output
    code, output = finish(start(config_file, tmp_path / "one", JAX_NUM_CPU_DEVICES=2))
    assert code == 0, output
    one, two = (metrics.read(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [row["step"] for row in one] == [row["step"] for row in two]
    first_epoch = [(a, b) for a, b in zip(one, two, strict=True) if a["step"] <= 8 and a["kind"] == "train"]
    assert first_epoch
    for a, b in first_epoch:
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)


@pytest.mark.slow
def test_a_state_in_shares_is_saved_by_two_processes_and_continued_whole_by_one(config_file, tmp_path):
    workdir, wide = tmp_path / "two", "--config.model.widths=((32,),(64,))"
    processes = two_processes(config_file, workdir, wide, "--config.sharding=fsdp")
    wait_for_step(workdir, 30, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    assert [code for code, _ in map(finish, processes)] == [75, 75]
    for folder, arguments in ((workdir, ()), (tmp_path / "one", ("--config.sharding=replicated",))):
        code, output = finish(start(config_file, folder, wide, *arguments, JAX_NUM_CPU_DEVICES=2))
        assert code == 0, output
    assert_every_step_is_in_one_row(workdir)
    one, two = ({row["step"]: row for row in metrics.read(at / "metrics.jsonl")} for at in (tmp_path / "one", workdir))
    assert state_digest(workdir)
    for step in sorted(set(one) & set(two))[:6]:
        np.testing.assert_allclose(one[step]["grad_norm"], two[step]["grad_norm"], rtol=1e-4)


def test_sigterm_to_one_of_two_processes_saves_the_same_step_in_both(config_file, tmp_path):
    workdir = tmp_path / "run"
    processes = two_processes(config_file, workdir)
    wait_for_step(workdir, 10, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    results = [finish(process) for process in processes]
    assert [code for code, _ in results] == [75, 75], results
    steps = {output.split("saved step ")[1].split()[0] for _, output in results}
    assert len(steps) == 1 and (workdir / "checkpoints" / steps.pop()).is_dir()


@pytest.mark.slow
def test_kill_9_of_one_of_two_processes_ends_the_other_and_a_relaunch_resumes(config_file, tmp_path):
    workdir = tmp_path / "run"
    processes = two_processes(config_file, workdir)
    wait_for_step(workdir, 10, processes[0])
    processes[1].kill()
    processes[1].communicate()
    killed = time.monotonic()
    code, output = finish(processes[0])
    assert code not in (0, 75) and time.monotonic() - killed < 45, output
    processes = two_processes(config_file, workdir)
    for code, output in map(finish, processes):
        assert code == 0, output
    assert_every_step_is_in_one_row(workdir)


def processes_of(workdir):
    """{number of the process in its run: its pid} of the processes that train in `workdir`, as /proc lists them."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"--workdir={workdir}".encode() not in (folder / "cmdline").read_bytes().split(b"\0"):
                continue
            variables = dict(pair.split(b"=", 1) for pair in (folder / "environ").read_bytes().split(b"\0") if pair)
        except OSError:  # it ended while it was looked at
            continue
        if b"JAX_PROCESS_ID" in variables:
            found[int(variables[b"JAX_PROCESS_ID"])] = int(folder.name)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
def test_the_local_launcher_ends_when_one_of_its_processes_is_stopped(config_file, tmp_path):
    workdir = tmp_path / "run"
    launcher = subprocess.Popen(
        [str(ROOT / "launch/local.sh"), "2", f"--config={config_file}", f"--workdir={workdir}"],
        env=environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_step(workdir, 10, launcher)
    os.kill(processes_of(workdir)[1], signal.SIGSTOP)
    stopped = time.monotonic()
    code, output = finish(launcher)
    assert code not in (0, 75) and time.monotonic() - stopped < 90, output
    assert "error: process 1 of 2" in output and "it has died or is stopped" in output, output
    assert "launch/local.sh: process 1 of 2 did not end after another one had: it is killed" in output, output
    assert not processes_of(workdir)


def save_forever(folder, asynchronous, said):
    """Saves one step after another and says each when its save has returned; runs in a process of its own."""
    jax.config.update("jax_platforms", "cpu")
    with checkpoint.manager(folder, asynchronous=asynchronous) as orbax:
        for step in itertools.count(max(orbax.all_steps(), default=0) + 1):
            checkpoint.save(orbax, state(step, width=20000), {"selection": float(step)})
            said.send(step)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_kill_9_at_a_random_moment_of_saving_leaves_a_good_checkpoint(tmp_path, asynchronous):
    """Ten kills of a process that does nothing but save: the newest committed step restores whole each time.

    A save in the background is committed at the latest when the next one returns, hence one step less and two messages.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["test_faults"])  # imports once, so that a trial takes half a second
    rng, like = np.random.default_rng(0), state(0, width=20000)
    for _ in range(10):
        heard, said = processes.Pipe(duplex=False)
        process = processes.Process(target=save_forever, args=(tmp_path, asynchronous, said))
        process.start()
        said.close()
        last = [heard.recv() for _ in range(1 + asynchronous)][-1]
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.join()
        while heard.poll():
            try:
                last = heard.recv()
            except EOFError:
                break
        heard.close()
        with checkpoint.manager(tmp_path) as orbax:
            restored = checkpoint.restore_latest(orbax, like)
        step = int(restored.step)
        assert step >= last - asynchronous
        assert trees.digest(restored) == trees.digest(state(step, width=20000))
        assert not (tmp_path / "damaged").exists()


def test_a_full_disk_ends_in_one_line_and_keeps_the_last_checkpoint(config_file, tmp_path, monkeypatch):
    """Orbax's own error of a full disk, raised in the save."""
    with checkpoint.manager(tmp_path) as store:
        checkpoint.save(store, state(1), {"selection": 1.0})

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(store.orbax, "save", full)
        with pytest.raises(CheckpointError, match=r"disk full while saving in .* last good checkpoint is step 1"):
            checkpoint.save(store, state(2), {"selection": 1.0})
    with checkpoint.manager(tmp_path) as orbax:
        assert int(checkpoint.restore_latest(orbax, state(0)).step) == 1
