"""launch/: what each script and manifest would do on its cluster, with stand-ins for the cluster's own commands."""

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ibjax import errors
from ibjax.runs import recipe_files

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
ARGUMENTS = ["--config=ibd_wrn", "--workdir=/shared/a run", "--config.note=it's"]
MODULE = ["python", "-m", "ibjax.main"]


@pytest.fixture
def cluster(tmp_path):
    """A function that makes a stand-in for a command, and one that runs a script among them; calls are in `calls`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    log = tmp_path / "calls"

    def stub(name, body):
        file = folder / name
        file.write_text(
            f"#!{sys.executable}\nimport json, pathlib, sys\n"
            f"with open({str(log)!r}, 'a') as log: log.write(json.dumps([{name!r}, *sys.argv[1:]]) + '\\n')\n{body}\n"
        )
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    def run(*command, **variables):
        log.write_text("")
        environment = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(tmp_path), **variables}
        done = subprocess.run(["bash", *map(str, command)], env=environment, capture_output=True, text=True, timeout=60)
        return done, [json.loads(line) for line in log.read_text().splitlines()]

    return stub, run


def with_uv(cluster, home, environment):
    """The `run` of `cluster`, with stand-ins for curl, python and the uv that curl installs in `home`.

    uv makes the environment of that path and prints its arguments.
    """
    stub, run = cluster
    for name in ("curl", "python"):
        stub(name, "")
    uv = home / ".local/bin/uv"
    uv.parent.mkdir(parents=True)
    uv.write_text(f"#!/bin/sh\nmkdir -p {environment}/bin && touch {environment}/bin/activate\necho uv $*")
    uv.chmod(0o755)
    return run


# ---- SLURM -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (75, True), (137, False)])
def test_slurm_puts_a_preempted_run_and_no_other_back_into_the_queue(cluster, code, requeued):
    stub, run = cluster
    stub("srun", f"sys.exit({code})")
    stub("scontrol", "")
    done, calls = run(LAUNCH / "slurm.sbatch", *ARGUMENTS, SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="4")
    assert done.returncode == code, done.stderr
    options = ["--cpus-per-task=4", "--gpu-bind=none", "--kill-on-bad-exit=0", "--wait=120"]
    assert calls[0] == ["srun", *options, *MODULE, *ARGUMENTS]
    assert calls[1:] == ([["scontrol", "requeue", "7"]] if requeued else [])


def test_slurm_reads_every_option_of_the_script():
    """sbatch reads #SBATCH lines up to the first command, and none after it."""
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?", "\n".join(lines[:first]), re.MULTILINE))
    assert sum("#SBATCH" in line for line in lines) == len(options)
    assert options["signal"].startswith("TERM@") and "requeue" in options  # not B: the processes get it, not the script
    # JAX gives each task the GPU of its number on the node, so a task must see all of them
    assert options["gpus-per-node"] == options["ntasks-per-node"] and "gpus-per-task" not in options


# ---- a Cloud TPU -------------------------------------------------------------------------------------------

GCLOUD = """
files = {name: pathlib.Path(FOLDER) / name for name in ("states", "codes")}
def next_of(name):
    first, *rest = files[name].read_text().split(",")
    if rest: files[name].write_text(",".join(rest))
    return first
if "describe" in sys.argv:
    state = next_of("states")
    why = {"none": "NOT_FOUND: Resource 't' was not found", "unreachable": "Max retries exceeded"}
    sys.exit(f"ERROR: {why[state]}") if state in why else print(state)
if "ssh" in sys.argv:
    for code in next_of("codes").split("+"):
        if code: print(f"ibjax.main on this worker ended with exit code {code}")
    sys.exit(1)  # its own exit code is not what decides
if "scp" in sys.argv and REFUSED.exists(): REFUSED.unlink(); sys.exit(255)
"""


def tpu_vm(cluster, tmp_path, states, codes, **variables):
    stub, run = cluster
    (tmp_path / "states").write_text(states)
    (tmp_path / "codes").write_text(codes)
    stub("gcloud", f"FOLDER = {str(tmp_path)!r}\nREFUSED = pathlib.Path(FOLDER) / 'refused'\n{GCLOUD}")
    stub("tar", "")
    done, calls = run(LAUNCH / "tpu_vm.sh", *ARGUMENTS, TPU="t", ZONE="z", POLL="0", **variables)
    verbs = [next(v for v in ("create", "delete", "ssh", "scp", "describe") if v in call) for call in calls[1:]]
    return done, calls[1:], [verb for verb in verbs if verb != "describe"]


def test_a_slice_that_is_reclaimed_is_requested_again_until_the_run_ends(cluster, tmp_path):
    states = "none,WAITING_FOR_RESOURCES,ACTIVE,SUSPENDING,SUSPENDED,none,ACTIVE"
    done, calls, verbs = tpu_vm(cluster, tmp_path, states, "75+69,0+0", TYPE="v5litepod-16", SPOT="1")
    assert done.returncode == 0, done.stderr
    assert verbs == ["create", "scp", "ssh", "delete", "create", "scp", "ssh", "delete"]
    create = next(call for call in calls if "create" in call)
    assert {"t", "--node-id=t", "--zone=z", "--accelerator-type=v5litepod-16", "--spot"} <= set(create)


@pytest.mark.parametrize(
    ("states", "codes", "code"),
    [("ACTIVE", "75+69", 75), ("ACTIVE", "137+69", 137), ("ACTIVE", "137+134", 137), ("ACTIVE", "2+134", 2),
     ("FAILED", "0", 1)],
)  # fmt: skip
def test_what_another_try_cannot_mend_ends_the_script(cluster, tmp_path, states, codes, code):
    done, _, verbs = tpu_vm(cluster, tmp_path, states, codes, TYPE="v5litepod-16", RESTARTS="1")
    assert done.returncode == code, done.stderr
    assert verbs.count("ssh") == {75: 2, 137: 2, 1: 0}.get(code, 1)  # lost workers are tried again, RESTARTS times


@pytest.mark.parametrize("then", ["ACTIVE", "unreachable"])
def test_a_slice_that_may_still_train_is_neither_deleted_nor_used_again(cluster, tmp_path, then):
    """The connection is lost, and the workers' exit codes with it."""
    done, _, verbs = tpu_vm(cluster, tmp_path, f"ACTIVE,{then}", "", TYPE="v5litepod-16")
    assert done.returncode == 255 and verbs == ["scp", "ssh"] and "is kept" in done.stderr, done.stderr


def test_a_slice_that_is_reclaimed_without_a_word_is_requested_again(cluster, tmp_path):
    states = "ACTIVE,SUSPENDING,SUSPENDED,none,ACTIVE"
    done, _, verbs = tpu_vm(cluster, tmp_path, states, ",0", TYPE="v5litepod-16")
    assert done.returncode == 0 and verbs == ["scp", "ssh", "delete", "create", "scp", "ssh", "delete"], done.stderr


def test_a_slice_is_requested_only_where_gcloud_says_that_there_is_none(cluster, tmp_path):
    done, _, verbs = tpu_vm(cluster, tmp_path, "unreachable,unreachable,ACTIVE", "0", TYPE="v5litepod-16")
    assert done.returncode == 0 and verbs == ["scp", "ssh", "delete"], done.stderr
    assert "Max retries exceeded" in done.stderr


def test_new_machines_that_do_not_answer_yet_are_asked_again(cluster, tmp_path):
    (tmp_path / "refused").touch()
    done, _, verbs = tpu_vm(cluster, tmp_path, "ACTIVE", "0", TYPE="v5litepod-16")
    assert done.returncode == 0 and verbs == ["scp", "scp", "ssh", "delete"], done.stderr


def test_a_slice_that_is_there_is_used_and_kept(cluster, tmp_path):
    done, calls, verbs = tpu_vm(cluster, tmp_path, "none", "75")
    assert done.returncode == 75 and verbs == ["scp", "ssh"]
    command = next(word for word in calls[-1] if word.startswith("--command="))
    last = command.removeprefix("--command=").strip().splitlines()[-1]
    assert shlex.split(last) == [*MODULE, *ARGUMENTS]
    assert shlex.split(command.removeprefix("--command="))[-len(ARGUMENTS) :] == ARGUMENTS


@pytest.mark.parametrize(("setup", "code"), [("touch 'the share'", 0), ("exit 32", 32)])
def test_each_worker_runs_setup_and_installs_before_it_trains(cluster, tmp_path, setup, code):
    """The command as a worker's shell would run it, with stand-ins for what it calls."""
    _, calls, _ = tpu_vm(cluster, tmp_path, "none", "0", SETUP=setup)
    run = with_uv(cluster, tmp_path, ".venv")
    file = tmp_path / "command.sh"
    file.write_text(f"cd {shlex.quote(str(tmp_path))}\n" + calls[-1][-1].removeprefix("--command="))
    done, calls = run(file)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1] == f"ibjax.main on this worker ended with exit code {code}"
    if code == 0:
        assert (tmp_path / "the share").exists() and calls[-1] == [*MODULE, *ARGUMENTS]
        assert "uv venv -q --python 3.12 --allow-existing .venv\nuv pip install -q .[tpu]" in done.stdout
    else:
        assert calls == []


# ---- Kubernetes and SkyPilot -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "resource"), [("gke_jobset.yaml", "google.com/tpu"), ("gke_jobset_gpu.yaml", "nvidia.com/gpu")]
)
def test_a_jobset_agrees_with_itself_and_with_the_exit_codes(file, resource):
    jobset = yaml.safe_load((LAUNCH / file).read_text())
    name, (job,) = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert container["command"] == MODULE and container["args"][0].startswith("--config=")
    assert spec["parallelism"] == spec["completions"] and spec["backoffLimit"] == 0
    assert container["resources"]["requests"] == container["resources"]["limits"]
    count = container["resources"]["limits"][resource]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": list(errors.FINAL)}
    assert jobset["spec"]["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["template"]["spec"]["volumes"]}
    assert mounts.keys() == volumes.keys()
    claim, prepare = yaml.safe_load_all((LAUNCH / "gke_volume.yaml").read_text())
    named = {"claimName": claim["metadata"]["name"]}
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert volumes["runs"]["persistentVolumeClaim"] == named
    made = prepare["spec"]["template"]["spec"]
    assert made["volumes"][0]["persistentVolumeClaim"] == named
    assert made["containers"][0]["volumeMounts"][0]["mountPath"] == mounts["runs"]
    assert f"--data_dir={of_image()['TFDS_DATA_DIR']}" in made["containers"][0]["args"]
    environment = {variable["name"]: variable.get("value") for variable in container.get("env", [])}
    if resource == "google.com/tpu":
        topology = spec["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        a, b = map(int, topology.split("x"))
        assert a * b == count * spec["parallelism"] and not environment  # GKE sets what JAX reads
    else:
        assert environment["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"
        assert environment["JAX_COORDINATOR_ADDRESS"].startswith(f"{name}-{job['name']}-0-0.{name}:")
        assert environment["JAX_NUM_PROCESSES"] == str(spec["parallelism"]) and "JAX_PROCESS_ID" in environment


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_sky_task_starts_the_command_on_every_node(cluster, tmp_path, nodes):
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [errors.EXIT_PEER_LOST, errors.EXIT_PREEMPTED]
    stub, run = cluster
    stub("python", "import os; print({k: os.environ[k] for k in sorted(os.environ) if k.startswith('JAX_')})")
    (tmp_path / "ibjax/bin").mkdir(parents=True)
    (tmp_path / "ibjax/bin/activate").write_text("")
    (tmp_path / "run.sh").write_text(task["run"])
    variables = {**task["envs"], "CONFIG": "ibd_resnet18:paper", "ARGS": "--config.seed=1 --restart", "BUCKET": "b"}
    place = dict(SKYPILOT_NUM_NODES=str(nodes), SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2", SKYPILOT_NODE_RANK="1")
    done, calls = run(tmp_path / "run.sh", **variables, **place)
    assert done.returncode == 0, done.stderr
    arguments = ["--config=ibd_resnet18:paper", "--workdir=/runs/ibd_resnet18-paper", "--config.seed=1", "--restart"]
    assert calls == [["python", *MODULE[1:], *arguments]]
    expected = dict(JAX_COORDINATOR_ADDRESS="10.0.0.1:8476", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1")
    assert done.stdout.strip() == str(expected if nodes == 2 else {})


@pytest.mark.parametrize("dataset", ["cifar10", ""])
def test_a_sky_task_installs_and_prepares_its_data(cluster, tmp_path, dataset):
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    run = with_uv(cluster, tmp_path, "~/ibjax")
    (tmp_path / "setup.sh").write_text(task["setup"])
    done, calls = run(tmp_path / "setup.sh", **{**task["envs"], "DATASET": dataset, "BUCKET": "b"})
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "uv pip install -q .[cuda13]", done.stderr
    prepare = ["--dataset=cifar10", f"--data_dir={tmp_path}/tensorflow_datasets", "--download"]
    assert calls[1:] == ([["python", "-m", "ibjax.data.prepare", *prepare]] if dataset else [])


def test_what_a_manifest_trains_needs_no_run_before_it():
    """No teacher that must have been trained: what is there is meant to run as it is."""
    jobs = [yaml.safe_load((LAUNCH / file).read_text()) for file in ("gke_jobset.yaml", "gke_jobset_gpu.yaml")]
    specs = [job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"] for job in jobs]
    names = {spec["containers"][0]["args"][0].removeprefix("--config=") for spec in specs}
    names.add(yaml.safe_load((LAUNCH / "sky.yaml").read_text())["envs"]["CONFIG"])
    assert all(not recipe_files.load(name).teacher.workdir for name in names)


def of_image():
    """The environment of the image."""
    (line,) = re.findall(r"^ENV (.+)$", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE)
    return dict(pair.split("=", 1) for pair in line.split())


def test_an_image_keeps_everything_on_the_volume_of_the_runs():
    assert all(value.startswith("/runs/") for name, value in of_image().items() if name != "PYTHONUNBUFFERED")


def test_an_image_is_built_of_what_is_sent_to_the_builder():
    copied = re.findall(r"^COPY (.+) \S+$", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE)
    sent = [line[1:] for line in (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(" ".join(copied).split()) == sorted(sent)
    assert all((ROOT / name).exists() for name in sent)


# ---- one machine -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "code"), [("0,0,0", 0), ("75,75,75", 75), ("69,2,69", 2), ("69,69,-9", 137), ("-6,2,69", 2)]
)
def test_the_local_launcher_returns_the_failure_and_not_its_echo(cluster, codes, code):
    """Each process ends with its code, a negative one by that signal; 69 and 134 come of the end of another one."""
    stub, run = cluster
    stub(
        "python",
        "import os, time\n"
        f"code = [{codes}][int(os.environ['JAX_PROCESS_ID'])]\n"
        "time.sleep(0.5 * (code in (69, 75)))\n"
        "os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)",
    )
    done, calls = run(LAUNCH / "local.sh", "3", *ARGUMENTS, PORT="1")
    assert done.returncode == code, done.stderr
    assert calls == [[*MODULE, *ARGUMENTS]] * 3
