"""Eight fake CPU devices, strict promotion, warnings as errors: for every test from day one."""

import atexit
import logging
import os
import shutil
import tempfile

import pytest

# What one test or process has compiled the others load: workers of one run share a folder, two runs never do.
if "IBJAX_TEST_CACHE" not in os.environ:
    os.environ["IBJAX_TEST_CACHE"] = tempfile.mkdtemp(prefix="ibjax-test-cache-")
    atexit.register(shutil.rmtree, os.environ["IBJAX_TEST_CACHE"], ignore_errors=True)
CACHE = os.environ["IBJAX_TEST_CACHE"]

import jax  # noqa: E402

if jax.config.jax_platforms in (None, "", "cpu"):
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(autouse=True)
def own_logging():
    """A command line configures logging for its process; a test must not do so for the next."""
    before = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:], logging.root.level = before


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """The workdir of a finished `configs/digits.py:smoke`, with its teacher and contrast below it."""
    from ibjax import main

    workdir = tmp_path_factory.mktemp("runs") / "digits"
    main.execute(smoke_config("digits"), workdir, "train")
    return workdir


def smoke_config(name, arg="smoke"):
    """The configuration of `configs/<name>.py:<arg>`, as the command line would load it."""
    return load_recipe(name).get_config(arg)


def load_recipe(name):
    """The module `configs/<name>.py`."""
    import importlib.util
    from pathlib import Path

    file = Path(__file__).parent.parent / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"configs_{name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
