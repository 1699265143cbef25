"""Several real processes: they agree, they say for whom they wait, and the lost one is named."""

import inspect
import signal
import socket
import subprocess
import sys
import time

import pytest
from test_faults import environment

from ibjax.devices import peers

BEGIN = """
import sys, time
import jax
from ibjax import errors
from ibjax.devices import cluster, peers
peers.SILENCE, peers._INTERVAL, peers._GRACE = 3, 0.3, 2

def command():
    cluster.initialize()
    me = jax.process_index()
    print("begun", flush=True)
{body}

errors.exit_with(command)
"""


def start(body, count=2):
    """Real processes that run `body`, in which `me` is the process's number."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    code = BEGIN.format(body="\n".join(f"    {line}" for line in body.strip().splitlines()))
    common = dict(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=count)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return [
        subprocess.Popen([sys.executable, "-c", code], env=environment(**common, JAX_PROCESS_ID=i), **pipes)
        for i in range(count)
    ]


def finish(processes, timeout=90):
    try:
        return [(process.communicate(timeout=timeout)[0], process.returncode) for process in processes]
    finally:
        for process in processes:  # one of them may hang
            process.kill()


def test_one_process_has_nobody_to_ask(monkeypatch):
    monkeypatch.setattr(peers, "_client", lambda: None)
    peers.agree("numbers", {"a": 1})
    assert peers.word_of_first("word", "mine") == "mine"
    peers.watch()


def test_processes_agree_or_end_naming_the_difference_and_say_for_whom_they_wait():
    results = finish(
        start(
            """
            cluster.agree("numbers", {"a": (1, 2), "b": None})
            assert cluster.word_of_first("word", f"of {me}") == "of 0"
            time.sleep(3 * me)
            cluster.agree("workdirs", {"steps in checkpoints/": [1, 2][: 2 - me]}, "give another --workdir")
            """.replace(" " * 12, "")
        )
    )
    words = "error: the processes see different workdirs: steps in checkpoints/: [1, 2] in process 0, [1] in process 1"
    for output, code in results:
        assert code == 2 and words in output and "Traceback" not in output, output
    assert "waiting for process 1 of 2" in results[0][0] and "to come to 'workdirs'" in results[0][0]


@pytest.mark.slow
def test_processes_at_different_points_end():
    for output, code in finish(start("cluster.agree(f'topic {me}', {})")):
        assert code == 2 and "processes 0 and 1 are not at the same point: 'topic 0' and 'topic 1'" in output, output


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("how", "code", "code_of_other"),
    [("errors.InputError", 2, 2), ("errors.DivergedError", 3, 3), ("KeyError", 1, 1), ("KeyboardInterrupt", 130, 69)],
)
def test_an_error_in_one_process_ends_the_others_which_name_it(how, code, code_of_other, victim):
    """With its exit code where a repetition would end in it too, so that it does not matter whose is seen first."""
    results = finish(start(f"if me == {victim}: raise {how}('its own trouble')\ntime.sleep(60)"))
    (failed, failed_code), (other, other_code) = results[victim], results[1 - victim]
    said = "interrupted" if how == "KeyboardInterrupt" else "its own trouble"
    assert (failed_code, other_code) == (code, code_of_other) and said in failed, results
    assert ("Traceback" in failed) == (how == "KeyError")
    assert f"error: process {victim} of 2 (" in other and said in other, other
    assert ("the same command continues" in other) == (code_of_other == 69) and "Traceback" not in other


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_dies_or_is_stopped_is_named_by_the_others_which_end(victim, how):
    processes = start("time.sleep(60)")
    for process in processes:
        assert "begun\n" in iter(process.stdout.readline, "")  # behind what Gloo says
    time.sleep(1)
    processes[victim].send_signal(how)
    began = time.monotonic()
    ((output, code),) = finish([processes[1 - victim]])
    assert time.monotonic() - began < 30
    processes[victim].kill()
    ((last, _),) = finish([processes[victim]])
    if (victim, how) == (0, signal.SIGKILL):  # JAX's C++ code aborts at once: the shell beside it has the word
        assert code not in (0, 75) and "lost its connection to process 0" in output, output
    else:
        assert code == 69 and f"error: process {victim}" in output and "it has died or is stopped" in output, output
    assert f"error: process {victim} of 2 (" in last and "has ended without a word" in last


@pytest.mark.slow
def test_processes_that_end_well_only_name_their_devices_and_wait_for_each_other():
    body = "time.sleep(8 * me)\nprint('ended', me)"  # longer than a silence that would count
    for i, (output, code) in enumerate(finish(start(body))):
        lines = [line for line in output.splitlines() if "Gloo" not in line]
        devices = [line for line in lines if line.startswith("computing on 2 × cpu") and "(2 processes)" in line]
        assert (code, lines) == (0, [*devices, "begun", f"ended {i}"]) and len(devices) == (i == 0), output


@pytest.mark.slow
def test_a_process_may_compile_for_longer_than_the_others_wait_for_a_connection():
    body = """
        time.sleep(35 * me)
        replicated = cluster.replicate({"x": np.float32(2)}, cluster.mesh())
        total = jax.jit(lambda x: jax.lax.with_sharding_constraint(x + jnp.zeros(2), each).sum())
        print("sum", float(total(replicated["x"])))
    """
    begin = "import jax.numpy as jnp, numpy as np\neach = jax.NamedSharding(cluster.mesh(), cluster.BATCH)\n"
    for output, code in finish(start(begin + inspect.cleandoc(body))):
        assert code == 0 and "sum 4.0" in output, output


@pytest.mark.slow
def test_a_process_whose_others_never_start_says_so_and_ends():
    body = "pass"
    code = BEGIN.format(body=f"    {body}").replace("def command", "cluster._START_SECONDS = 3\n\ndef command")
    for index, words in ((0, "the other 1 processes at localhost"), (1, "process 0 at localhost")):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        variables = dict(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=2, JAX_PROCESS_ID=index)
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment(**variables), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 69 and words in done.stderr and f"{address} did not start" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_process_whose_cluster_tells_of_others_that_never_start_says_so_and_ends():
    """As one of four of Open MPI, whose variables JAX reads, started without mpirun."""
    code = BEGIN.format(body="    pass").replace("def command", "cluster._START_SECONDS = 3\n\ndef command")
    variables = dict(OMPI_MCA_orte_hnp_uri="1234567.0;tcp://127.0.0.1:1", OMPI_COMM_WORLD_SIZE=4)
    variables |= dict(OMPI_COMM_WORLD_RANK=0, OMPI_COMM_WORLD_LOCAL_RANK=0)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(**variables), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 69 and "the others that its cluster tells of did not start within" in done.stderr


def test_what_a_lost_peer_may_raise_is_told_from_other_errors():
    """A collective's error leaves `jit` as a RuntimeError or, at dispatch, as a ValueError with XLA's code."""
    gloo = "UNKNOWN: Gloo AllGather failed: [pair.cc:547] Connection closed by peer [127.0.0.1]:58497"
    assert peers.may_be_of_a_peer(ValueError(gloo)) and peers.may_be_of_a_peer(RuntimeError("any"))
    assert not peers.may_be_of_a_peer(ValueError("a shape")) and not peers.may_be_of_a_peer(None)
