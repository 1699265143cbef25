"""What surrounds a command: paths, encodings, platforms, clusters, other people's repositories."""

import ast
import importlib.util
import io
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax._src import clusters
from jax._src.clusters import k8s_cluster
from test_faults import environment

import ibjax
from ibjax import config, convert, doctor, errors, files, main, places
from ibjax.attacks import autoattack
from ibjax.data import folder, npz, tfds
from ibjax.devices import cluster, compiled, machine
from ibjax.errors import InputError
from ibjax.evaluation import evaluate
from ibjax.evaluation.report import runs
from ibjax.runs import command_line, provenance
from ibjax.training import jobs

ROOT = Path(__file__).parent.parent
LINE = "IBD – ε ≥ 8/255"


# ---- paths -------------------------------------------------------------------------------------------------


def test_paths_expand_as_a_shell_would(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RUNS", "/data/runs")
    for given, wanted in (
        ("~/x", tmp_path / "home/x"),
        ("~", tmp_path / "home"),
        ("$RUNS/a", Path("/data/runs/a")),
        ("${RUNS}/a", Path("/data/runs/a")),
        ("~/$RUNS", tmp_path / "home/data/runs"),
        ("a/~/b", Path("a/~/b")),
        (Path("plain"), Path("plain")),
    ):
        assert files.path(given) == wanted
    (tmp_path / "a$RUNS").touch()
    assert files.path("a$RUNS") == Path("a$RUNS")  # it is there, under this very name
    for given, words in (("$NO/x", r"\$NO is not set"), ("~nobody-here/x", "no such home folder")):
        with pytest.raises(InputError, match=words):
            files.path(given)


def test_a_folder_called_tilde_is_refused_before_anyone_removes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~").mkdir()
    with pytest.raises(InputError, match=r"a folder called ~ in .*mv \./~ NAME \(never rm -r ~\)"):
        files.path("~/x")
    assert files.path("x") == Path("x")


@pytest.mark.parametrize("given", ["gs://bucket/run", "s3://bucket/run", Path("gs://bucket/run")])
def test_the_address_of_a_store_is_refused_where_it_would_become_a_local_folder(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        with pytest.raises(InputError, match=r"^(gs|s3):/.*/run is no path on this machine; give .*gcsfuse"):
            files.path(given)
        Path(given).mkdir(parents=True, exist_ok=True)  # made before it was refused
    for path in ("C:/runs", "./gs:/bucket", "runs/a:/b"):
        assert files.path(path) == Path(path)


def test_every_path_of_a_command_is_expanded(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CONFIGS", str(ROOT / "configs"))
    given = main.parse(["main", "--config=$CONFIGS/digits.py:smoke", "--workdir=~/runs/x", "--restart"])
    assert given.workdir == tmp_path / "runs/x" and given.restart
    given.settings.teacher.workdir = "~/teacher"
    assert jobs.jobs(given.settings, given.workdir)[-1].teachers == {"teacher": tmp_path / "teacher"}
    parsed = command_line.of_run("ibjax.x", None).parse_args(["--workdir=~/runs/x"])
    assert parsed.workdir == tmp_path / "runs/x"
    with pytest.raises(SystemExit) as caught:
        command_line.of_run("ibjax.x", None).parse_args(["--workdir=$NO/x"])
    assert caught.value.code == 2 and capsys.readouterr().err.startswith(
        "error: argument --workdir: $NO/x: the variable"
    )


def test_every_option_that_is_a_path_has_the_type_that_expands_it():
    """A plain `Path` takes `~/x` for a folder called `~`."""
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file, node in calls("add_argument")
        for word in node.keywords
        if word.arg == "type" and ast.unparse(word.value) in ("Path", "pathlib.Path")
    ]
    assert not found


def test_paths_in_python_are_expanded_as_on_a_command_line(tmp_path, monkeypatch):
    """Nothing is read from, or written into, a folder called `~`."""
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "RUNS"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    there = str(tmp_path / "home/none")
    for path in ("~/none", "$RUNS/none"):
        calls = [
            lambda path=path: ibjax.load(path),
            lambda path=path: evaluate.evaluate(path),
            lambda path=path: runs.read([path]),
            lambda path=path: npz.load(path=path),
            lambda path=path: folder.load(path=path),
            lambda path=path: tfds.load(dataset="cifar10", data_dir=path),
        ]
        if importlib.util.find_spec("torch"):
            calls += [
                lambda path=path: convert.from_torch(path, "resnet18", "~/made"),
                lambda path=path: convert.to_torch(path, "~/made"),
            ]
        for call in calls:
            with pytest.raises(InputError, match=there):
                call()
        monkeypatch.setenv("XDG_CACHE_HOME", path)
        assert files.cache_folder() == Path(there) / "ibjax"
        monkeypatch.setenv("TFDS_DATA_DIR", path)
        with pytest.raises(InputError, match=there):
            tfds.load(dataset="cifar10")

    class Seen(Exception):
        pass

    def show(*arguments, **options):
        raise Seen(*arguments)

    monkeypatch.setattr(jobs, "jobs", show)
    with pytest.raises(Seen, match=there):
        main.execute(config.base(), "~/none")
    monkeypatch.setattr(autoattack, "Progress", show)
    x, weights = np.linspace(0, 1, 64, dtype=np.float32).reshape(4, 2, 2, 4), np.eye(16, 4, dtype=np.float32)
    logits_fn = jax.jit(lambda x: x.reshape(len(x), 16) @ weights)
    with pytest.raises(Seen, match=there):
        autoattack.autoattack(jax.random.key(0), logits_fn, x, np.arange(4), norm="linf", eps=0.1, state="~/none")
    assert not (tmp_path / "~").exists()


def test_the_environments_cache_of_compiled_programs_is_expanded_and_a_store_is_left_to_jax(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/kept")
    try:
        compiled.keep()  # JAX has read the variable itself
        assert jax.config.jax_compilation_cache_dir == before and not list(tmp_path.iterdir())
        (found,) = doctor._cache()
        assert found.text == "of compiled programs: gs://bucket/kept" and not found.mend
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "~/kept")
        compiled.keep()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "kept")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def calls(*names):
    """(file, call) of all methods of these names in the code."""
    folders = ("ibjax", "benchmarks", "configs", "docs")
    texts = (
        (file, file.read_text(encoding="utf-8")) for part in folders for file in sorted((ROOT / part).rglob("*.py"))
    )
    read = ((file, ast.parse(text)) for file, text in texts if any(f".{name}" in text for name in names))
    nodes = ((file, node) for file, tree in read for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [(file, node) for file, node in nodes if isinstance(node.func, ast.Attribute) and node.func.attr in names]


# ---- encodings ---------------------------------------------------------------------------------------------


def test_files_are_utf_8_whatever_the_locale():
    """No call that reads or writes text leaves the encoding to the locale."""
    found = []
    for file, node in calls("read_text", "write_text", "open"):
        modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        if node.func.attr == "open":
            writes_text = bool(modes) and modes[-1] in ("r", "w", "a", "a+", "x")
        else:
            writes_text = modes != ["utf-8"]
        if writes_text and "encoding" not in {word.arg for word in node.keywords}:
            found.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not found


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_gets_a_replacement_for_what_it_cannot_show(monkeypatch, encoding):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)

    def command():
        print(LINE)
        logging.getLogger("ibjax").info(LINE)
        raise InputError(LINE)

    with pytest.raises(SystemExit) as caught:
        errors.exit_with(command)
    for stream in streams.values():
        stream.flush()
    shown = {name: stream.buffer.getvalue().decode(encoding) for name, stream in streams.items()}
    wanted = LINE.encode(encoding, "replace").decode(encoding)
    assert caught.value.code == 2 and shown == {"stdout": f"{wanted}\n", "stderr": f"{wanted}\nerror: {wanted}\n"}


@pytest.mark.parametrize(
    "locale", [dict(LC_ALL="C", PYTHONUTF8=0, PYTHONCOERCECLOCALE=0), dict(PYTHONIOENCODING="ascii")]
)
def test_a_whole_command_writes_utf_8_and_prints_what_it_can(tmp_path, locale):
    files.write_json(tmp_path / "config.json", {"config": {"title": LINE}, "data": {}})
    command = [sys.executable, "-m", "ibjax.report", str(tmp_path)]
    done = subprocess.run(command, env=environment(**locale), capture_output=True, timeout=120)
    assert done.returncode == 0 and "IBD ? ? ? 8/255" in done.stdout.decode("ascii"), done.stderr
    assert LINE in (tmp_path / "report.html").read_text(encoding="utf-8")


# ---- platforms and settings of JAX -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "platform, command",
    [
        ("cuda", "ibjax.evaluate --workdir={0}"),
        ("cpuu", "ibjax.evaluate --workdir={0}"),
        ("cuda", "ibjax.convert --torch={0}/a.pt --arch=resnet --photographs=32 --workdir={0}/run"),
        ("cuda", "ibjax.analysis.complexity --config={1}/configs/digits.py"),
    ],
)
def test_a_platform_that_is_not_there_is_one_line(tmp_path, platform, command):
    """In commands that begin with JAX, and in those that come to it later."""
    if "a.pt" in command:
        torch = pytest.importorskip("torch")
        torch.save({"conv1.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "a.pt")
    words = [sys.executable, "-m", *command.format(tmp_path, ROOT).split()]
    done = subprocess.run(words, env=environment(JAX_PLATFORMS=platform), capture_output=True, text=True, timeout=120)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith(f"error: JAX_PLATFORMS={platform} cannot be used here")
    assert "there is cpu" in line


def test_a_bug_is_no_platform_that_is_not_there(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for bug in (RuntimeError("x"), AssertionError("x"), ValueError("x"), TypeError("x")):
        assert errors._ending(bug) == (1, "")


def test_settings_of_jax_that_no_command_can_keep_are_set_back_and_told_of():
    """Networks compute in float32; attacks compare with infinity; under rbg, images of a batch share their draws."""
    code = (
        "import jax, logging; logging.basicConfig(level=20)\nfrom ibjax.devices import cluster; cluster.initialize()\n"
        "print(1 / jax.numpy.zeros(()), jax.random.uniform(jax.random.key(1)).item())"
    )
    given = dict(JAX_ENABLE_X64="True", JAX_DEBUG_INFS="True")
    given |= dict(JAX_DEFAULT_PRNG_IMPL="unsafe_rbg", JAX_THREEFRY_PARTITIONABLE="False")
    variables = environment(**given, http_proxy="http://10.255.255.1:1")
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=60)
    with jax.default_prng_impl("threefry2x32"), jax.threefry_partitionable(True):
        draw = jax.random.uniform(jax.random.key(1)).item()
    assert (done.returncode, done.stdout) == (0, f"inf {draw}\n"), done.stderr
    assert all(f"{name}={value} is set to " in done.stderr for name, value in given.items())
    assert "computing on 1 × cpu" in done.stderr


def test_an_accelerator_that_jax_leaves_out_is_told_of_unless_the_user_chose_the_platform(
    tmp_path, monkeypatch, caplog
):
    """JAX's own warning that it falls back on the CPU is among those that commands silence."""
    before = jax.config.jax_platforms
    monkeypatch.setattr(machine, "GPUS", (str(tmp_path / "nvidia[0-9]"),))
    monkeypatch.setattr(machine, "_has_tpu", lambda: False)
    try:
        for chosen, there, told in (("", True, True), ("", False, False), ("cpu", True, False)):
            caplog.clear()
            jax.config.update("jax_platforms", chosen)
            (tmp_path / "nvidia0").touch() if there else (tmp_path / "nvidia0").unlink()
            cluster._tell_devices()
            assert ("a GPU of NVIDIA is here, but JAX computes on the CPU" in caplog.text) == told
    finally:
        jax.config.update("jax_platforms", before)


def test_a_process_that_has_used_jax_begins_no_command(started, monkeypatch):
    def used(*_, **__):
        raise RuntimeError("jax.distributed.initialize() must be called before any JAX calls that might …")

    monkeypatch.setattr(cluster, "keep_compiled", lambda: None)
    monkeypatch.setattr(jax.distributed, "initialize", used)
    with pytest.raises(InputError, match="used JAX before its command began"):
        cluster.initialize()


def test_settings_that_change_a_number_are_in_the_record(monkeypatch):
    assert provenance.jax_settings() == {}
    with jax.default_matmul_precision("bfloat16"):
        assert provenance.jax_settings() == {"jax_settings": {"default_matmul_precision": "bfloat16"}}


# ---- clusters ----------------------------------------------------------------------------------------------

SLURM = dict(SLURM_JOB_ID="77", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_STEP_NODELIST="localhost")


@pytest.fixture
def started(monkeypatch):
    """(variables) -> (arguments, options, environment) with which JAX is started."""
    made = []

    def initialize(*arguments, **options):
        made.append((arguments, options, dict(os.environ)))

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "JAX_CO", "JAX_NUM_P", "JAX_PROCESS_ID")):
            monkeypatch.delenv(name)

    def start(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with cluster._without_proxies():
            cluster._start_distributed()
        return made[-1]

    return start


@pytest.mark.parametrize(
    "variables",
    [
        dict(SLURM_NTASKS="4"),  # in a batch script: nobody starts the other three
        dict(SLURM_NTASKS="4", SLURM_STEP_ID="4294967290", SLURM_STEP_NUM_TASKS="1"),  # in an interactive shell
        dict(SLURM_NTASKS="1", SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="1"),  # one of two commands in a job
    ],
)
def test_a_command_that_slurm_has_started_alone_runs_alone_on_a_port_of_its_own(started, caplog, variables):
    (first, options, _), (second, _, _) = (started(**SLURM, **variables) for _ in range(2))
    assert first[1:] == second[1:] == (1, 0) and first[0] != second[0]
    assert options["cluster_detection_method"] == "deactivate"  # SLURM_LOCALID would hide all devices but one
    assert ("it runs alone" in caplog.text) == (variables["SLURM_NTASKS"] == "4")


def test_two_steps_of_one_slurm_job_meet_at_two_ports(started):
    ports = []
    for step in ("0", "1"):
        os.environ.pop("JAX_COORDINATOR_PORT", None)
        variables = dict(SLURM_NTASKS="2", SLURM_STEP_NUM_TASKS="2", SLURM_STEP_ID=step)
        arguments, options, seen = started(**{**SLURM, **variables, "SLURM_PROCID": "1"})
        assert not arguments and "cluster_detection_method" not in options  # JAX reads SLURM itself
        ports.append(int(seen["JAX_COORDINATOR_PORT"]))
    os.environ.pop("JAX_COORDINATOR_PORT")
    assert ports[0] != ports[1] and all(61440 <= port < 65536 for port in ports)


def test_a_port_that_is_none_is_one_line(started):
    step = dict(SLURM_NTASKS="2", SLURM_STEP_NUM_TASKS="2", SLURM_STEP_ID="0")
    for port in ("abc", "-1", "0", "65536"):
        with pytest.raises(InputError, match=f"JAX_COORDINATOR_PORT={port} is no port; give a number up to 65535"):
            started(**{**SLURM, **step, "JAX_COORDINATOR_PORT": port})
    address = dict(JAX_COORDINATOR_ADDRESS="localhost:99999", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="0")
    with pytest.raises(InputError, match="localhost:99999 has no port"):
        started(**address)


class Refused(Exception):
    """An answer of Kubernetes's server, as its client raises it."""

    status, reason = 403, "Forbidden"


def pod(labels, *owners):
    """What Kubernetes says of a pod; `owners` are (kind, whether it is the controller)."""
    references = [SimpleNamespace(kind=kind, controller=controller) for kind, controller in owners] or None
    return SimpleNamespace(metadata=SimpleNamespace(name="pod", labels=labels, owner_references=references))


@pytest.fixture
def in_a_pod(started, monkeypatch):
    """(pod, variables) -> (number of processes, own) that JAX's detection leads to; Kubernetes is a stand-in."""
    found, made = k8s_cluster.K8sCluster, []

    def refuse(*_, **__):
        raise Refused("403")

    def initialize(*arguments, **_):
        if not arguments:
            clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 1)
        made.append(arguments)

    api = SimpleNamespace(read_namespaced_job=refuse)
    client = SimpleNamespace(CoreV1Api=lambda: api, BatchV1Api=lambda: api)
    client.exceptions = SimpleNamespace(ApiException=Refused)

    def start(which, **variables):
        config = SimpleNamespace(load_incluster_config=refuse if which is None else lambda: None)
        monkeypatch.setitem(sys.modules, "kubernetes", SimpleNamespace(config=config, client=client))
        monkeypatch.setattr(found, "_pod", lambda: which)
        for name in ("_controller", "_job"):
            getattr(found, name).__func__.cache_clear()
        for name, value in {"KUBERNETES_SERVICE_HOST": "10.0.0.1", **variables}.items():
            monkeypatch.setenv(name, value)
        cluster._start_distributed()
        return made[-1][1:]

    monkeypatch.setattr(found, "_namespace", lambda: "default")
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    return start


@pytest.mark.parametrize(
    "which",
    [
        pod({"app": "notebook"}, ("StatefulSet", True)),
        pod(None, ("ReplicaSet", True)),
        pod(None),
        pod({"app": "notebook"}, ("Node", False)),
    ],
)
def test_a_pod_of_kubernetes_that_belongs_to_no_job_runs_alone(in_a_pod, caplog, which):
    caplog.set_level(logging.INFO, "ibjax")
    assert in_a_pod(which) == (1, 0) and "belongs to no Job" in caplog.text


@pytest.mark.parametrize(
    ("which", "variables", "reason"),
    [
        (pod({"job-name": "x"}, ("Job", True)), {}, "Kubernetes API Error: 403 - Forbidden"),
        (None, {}, "403"),  # the pod has no token for the server
        (pod({}, ("ReplicaSet", True)), {"JOB_COMPLETION_INDEX": "1"}, "job-name"),
    ],
)
def test_a_pod_whose_peers_kubernetes_does_not_tell_is_one_line(in_a_pod, which, variables, reason):
    with pytest.raises(InputError, match=rf"\(.*{reason}.*\); set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PR"):
        in_a_pod(which, **variables)


def test_no_proxy_is_asked_where_processes_meet(started, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://10.0.0.1:1")
    _, _, seen = started(HTTPS_PROXY="http://10.0.0.1:1", **SLURM)
    assert not [name for name in seen if name.lower().endswith("_proxy")]
    assert os.environ["http_proxy"] and os.environ["HTTPS_PROXY"]


def test_a_port_in_use_is_one_line(started):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        address = dict(JAX_COORDINATOR_ADDRESS=f"localhost:{port}", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="0")
        with pytest.raises(InputError, match=f"port {port} cannot be used .*set JAX_COORDINATOR_ADDRESS to another"):
            started(**address)
    started(**address)
    with pytest.raises(InputError, match="has no port; give HOST:PORT"):
        started(**{**address, "JAX_COORDINATOR_ADDRESS": "localhost"})


# ---- the program and its repository ------------------------------------------------------------------------


def git(folder, *arguments):
    identity = ["-c", "user.name=x", "-c", "user.email=x@y"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_the_commit_is_that_of_ibjax_never_of_a_repository_around_it(tmp_path, monkeypatch):
    own = tmp_path / "project" / "lib" / "ibjax-source"
    (own / "ibjax").mkdir(parents=True)
    (own / "pyproject.toml").write_text('[project]\nname = "ibjax"\nversion = "9.8.7"\n', encoding="utf-8")
    (own / "ibjax" / "a.py").touch()
    monkeypatch.setattr(places, "SOURCE", own.resolve())
    commit_now = provenance.commit.__wrapped__  # a process asks once
    git(tmp_path, "init", "project")
    git(tmp_path / "project", "add", ".")
    git(tmp_path / "project", "commit", "-m", "the user's own")
    assert commit_now() == "version 9.8.7" and provenance.versions()["ibjax"] == "9.8.7"
    git(own, "init", ".")
    assert commit_now() == "version 9.8.7"  # a repository without a commit
    git(own, "add", ".")
    git(own, "commit", "-m", "ibjax's")
    commit = commit_now()
    assert len(commit) >= 7 and not commit.endswith("+")
    (own / "ibjax" / "a.py").write_text("changed", encoding="utf-8")
    assert commit_now() == f"{commit}+"
    monkeypatch.setenv("PATH", "")
    assert commit_now() == "version 9.8.7"  # git is not installed


def test_ctrl_c_while_a_command_imports_is_one_line():
    code = f"import sys; sys.argv = ['-m']; import ibjax, os; os.kill(os.getpid(), {int(signal.SIGINT)}); import jax"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    code = "import signal, ibjax; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True, timeout=60)
