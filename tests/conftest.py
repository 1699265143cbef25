"""Eight fake CPU devices, strict promotion, warnings as errors: for every test from day one."""

import argparse
import atexit
import functools
import gc
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zlib
from pathlib import Path

import filelock
import pytest

# The collector would go through all that is imported and collected again and again, which lives to the end anyway
gc.disable()

# What one test or process has compiled the others load: workers of one run share a folder, two runs never do.
if "IBJAX_TEST_CACHE" not in os.environ:
    os.environ["IBJAX_TEST_CACHE"] = tempfile.mkdtemp(prefix="ibjax-test-cache-")
    atexit.register(shutil.rmtree, os.environ["IBJAX_TEST_CACHE"], ignore_errors=True)
CACHE = os.environ["IBJAX_TEST_CACHE"]

# Tests compile more than they compute: a lighter compiler takes half the time. Where XLA_FLAGS is set, even to nothing,
# it stays. XLA ends a process over a flag that it does not know (fusion emitters from jax 0.11 on): one is asked first.
LIGHT = (
    "--xla_backend_optimization_level=1",  # at 0, some programs of jaxlib 0.10 and 0.11 give wrong numbers or NaN
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
)
if "XLA_FLAGS" not in os.environ and "PYTEST_XDIST_WORKER" not in os.environ:
    ask = [sys.executable, "-c", "import jax; assert jax.default_backend() == 'cpu'"]
    for flags in (" ".join([*LIGHT, "--xla_cpu_use_fusion_emitters=false"]), " ".join(LIGHT)):
        if subprocess.run(ask, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True).returncode == 0:
            os.environ["XLA_FLAGS"] = flags
            break

import jax  # noqa: E402

if jax.config.jax_platforms in (None, "", "cpu"):
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

from ibjax.devices import compiled  # noqa: E402

compiled.verify()

# The suite with products as an accelerator rounds them: IBJAX_TEST_PRODUCTS=tensorfloat32 (a GPU) or bfloat16 (a TPU)
if "IBJAX_TEST_PRODUCTS" in os.environ:
    from rounding import rounded

    as_an_accelerator = rounded(os.environ["IBJAX_TEST_PRODUCTS"])  # kept: what is collected ends
    as_an_accelerator.__enter__()


# Files that take longest, in this order: workers begin with them, so that none is left with one of them at the end
HEAVY = (
    "test_train", "test_autoattack", "test_other_attacks", "test_objectives", "test_placement", "test_convert",
    "test_ib_rar", "test_evaluate", "test_attacks", "test_models", "test_autocast", "test_checks", "test_distillation",
    "test_precision", "test_runner", "test_extending", "test_binarisation", "test_attention", "test_environment",
    "test_checkpoint", "test_apgd",
)  # fmt: skip
QUICK = tomllib.loads(Path(__file__).with_name("slow.toml").read_text(encoding="utf-8"))


CASES = pytest.StashKey[dict[str, set[str]]]()  # of each test that was collected


def pytest_addoption(parser):
    text = "of the tests that are asked for, a K-th of N parts: each test is in one of them"
    parser.addoption("--share", metavar="K/N", type=_share, help=text)


def _share(text):
    part, parts = map(int, text.split("/"))
    if not 0 <= part < parts:
        raise argparse.ArgumentTypeError(f"{text}: give K/N with K from 0 to N - 1")
    return part, parts


def _together(item):
    """Equal for tests that belong in one share: those of one case of a file, as an objective, share its programs."""
    return f"{item.path.stem}[{item.callspec.id}]" if hasattr(item, "callspec") else item.nodeid


@pytest.hookimpl(tryfirst=True)  # before -m chooses by marks
def pytest_collection_modifyitems(config, items):
    """Marks as slow what slow.toml does not name among the quick cases; leaves out all but one part with --share.

    The files of HEAVY come first: `--no-loadscope-reorder` keeps this order.
    """
    cases = config.stash[CASES] = {}
    for item in items:
        name, case = f"{item.path.stem}::{item.originalname}", item.callspec.id if hasattr(item, "callspec") else ""
        cases.setdefault(name, set()).add(case)
        if name in QUICK and case not in QUICK[name]:
            item.add_marker(pytest.mark.slow)
    if share := config.getoption("--share"):
        part, parts = share
        items[:] = [item for item in items if zlib.crc32(_together(item).encode()) % parts == part]
    rank = {name: number for number, name in enumerate(HEAVY)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_collection_finish():
    gc.freeze()
    gc.enable()
    gc.set_threshold(100_000, 20, 50)  # tracing makes many objects and few circles


@pytest.fixture(autouse=True)
def own_process():
    """A command line sets logging, hooks and variables of its process; a test must not do so for the next.

    Where threads of an earlier test still compile, a command that a test ends would end the process with it.
    """
    from ibjax import errors

    unawaited, errors.unawaited = errors.unawaited, []
    before, hooks = (logging.root.handlers[:], logging.root.level), (sys.unraisablehook, sys.excepthook)
    variables = dict(os.environ)
    yield
    logging.root.handlers[:], logging.root.level = before
    sys.unraisablehook, sys.excepthook = hooks
    errors.unawaited = unawaited
    if os.environ != variables:
        os.environ.clear()
        os.environ.update(variables)


class Bomb:
    """Whoever unpickles it makes the folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """The workdir of a finished `digits_recipe()`, with its teacher and contrast below it.

    The first worker makes it; each has its own copy.
    """
    from ibjax import main

    own = tmp_path_factory.mktemp("runs")
    made = tmp_path_factory.getbasetemp().parent / "digits" if "PYTEST_XDIST_WORKER" in os.environ else own / "digits"
    with filelock.FileLock(made.with_name("digits.lock")):
        done = made.with_name("digits.done")
        if not done.is_file():
            main.execute(digits_recipe(), made, "train")
            done.touch()
    return made if made.parent == own else Path(shutil.copytree(made, own / "digits"))


@pytest.fixture
def rolled(monkeypatch):
    """Attacks as loops, as on an accelerator: for a CPU they are unrolled, and a program of ten steps is ten times as
    long to compile."""
    from ibjax.devices import forms

    monkeypatch.setitem(forms.TABLE, "cpu", forms.TABLE["cpu"]._replace(unroll=False))


def once(make):
    """`make()` at the first call, its result at every other: for arrays that collecting the tests should not build.

    What is made inside a program that is being traced is a constant of it.
    """

    @functools.cache
    def made():
        from ibjax.attacks.checks import inside_a_trace

        if not inside_a_trace():  # in the context below, no jitted function is compiled as a whole
            return make()
        with jax.ensure_compile_time_eval():
            return make()

    return made


def keys_of(count):
    """`count` JAX keys, built from NumPy: `jax.random.split` compiles a program for every count."""
    import numpy as np

    return jax.random.wrap_key_data(np.random.default_rng(1).integers(2**32, size=(count, 2), dtype=np.uint32))


def in_programs(net):
    """A `Net` each of whose calls is one program; JAX would compile one for every operation and shape of a layer."""
    import jax

    def program(call):
        compiled = jax.jit(call)
        return lambda *args, edits=None: call(*args, edits) if edits else compiled(*args)

    return type(net)(*(part and program(part) for part in net))


def change_config(workdir, **values):
    """Changes options in a run's config.json, which keeps a digest as a true one has: `objective__beta=0`."""
    from ibjax import files

    content = files.read_json(workdir / "config.json")
    for path, value in values.items():
        *sections, key = path.split("__")
        section = content["config"]
        for name in sections:
            section = section[name]
        section[key] = value
    files.write_json(workdir / "config.json", content)


def small_recipe(shape=(8, 8, 1), attacks=("pgd-2",), epochs=1, **sections):
    """A short configuration on synthetic images of 10 classes; `sections` of it are given."""
    from ibjax import config

    settings = config.base()
    for name, section in sections.items():
        settings[name] = section
    config.smoke(settings, shape, 10, {})
    settings.epochs = epochs
    settings.evaluate.attacks = attacks
    return settings


def untrained_run(folder, settings, validation=None):
    """`folder`, now the workdir of a run that has taken no step: for what needs a network rather than its training.

    No train step and no evaluation are compiled for it. Weights are the initial ones, none of them zero; `validation`
    are the metrics of its checkpoint.
    """
    import jax
    import numpy as np

    from ibjax.runs import run, rundir

    data, rng = run.load_data(settings), np.random.default_rng(0)
    model = run.build_model(settings.model, data.num_classes, "model")
    variables = {"batch_stats": {}, **jax.jit(model.init)(jax.random.key(0), data.test.images[:1] / np.float32(255))}
    params = jax.device_get(variables["params"])
    params = jax.tree.map(lambda w: w + np.asarray(0.1 * rng.normal(size=w.shape), w.dtype), params)
    params = jax.device_put(params)
    rundir.write_network(folder, settings, run.facts(data), {**variables, "params": params}, validation=validation)
    return folder


def smoke_config(name, arg="smoke"):
    """The configuration of `configs/<name>.py:<arg>`, as the command line would load it."""
    return _recipe(name).get_config(arg)


def digits_recipe():
    """`configs/digits.py:smoke`, with six columns in place of 128 in its matching, which are quicker to compile."""
    settings = smoke_config("digits")
    settings.objective.qk_dim = 6
    return settings


def clean_recipe():
    """The short digits recipe of the run on clean images, by itself: under the threat model of what holds it."""
    from ibjax import config

    return config.effective(smoke_config("digits")).contrast.undefended


def config_rows(name):
    """The rows of a recipe; ("",) where it has one only."""
    return getattr(_recipe(name), "ROWS", ("",))


@functools.cache
def _recipe(name):
    import importlib.util

    file = Path(__file__).parent.parent / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"configs_{name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
