"""The provenance of a number: versions, commit and hardware, as records and env.json state them."""

import contextlib
import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from ibjax import places
from ibjax.devices.machine import hardware


def versions() -> dict[str, str]:
    """{name: version} of everything that can change a number."""
    return {"python": platform.python_version(), "ibjax": places.version(), **_installed()}


@functools.cache  # what this process has imported, whatever is installed or committed while it runs
def _installed():
    found = {}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def jax_settings() -> dict[str, Any]:
    """{"jax_settings": the non-default settings of JAX that can change a number}; {} where there are none."""
    usual = dict(default_matmul_precision=None, default_prng_impl="threefry2x32", threefry_partitionable=True)
    found = {name: getattr(jax.config, f"jax_{name}") for name in (*usual, "enable_x64", "disable_jit")}
    changed = {name: value for name, value in found.items() if value != usual.get(name, False)}
    return {"jax_settings": changed} if changed else {}


def xla_flags() -> dict[str, str]:
    """{"xla_flags": XLA_FLAGS, which can change a number}; {} where it is not set."""
    flags = " ".join(os.environ.get("XLA_FLAGS", "").split())
    return {"xla_flags": flags} if flags else {}


@functools.cache  # as _installed
def commit() -> str:
    """The commit of ibjax's own repository, with "+" where it has changes; else its version, as "version 0.1.0".

    A repository that merely encloses the package does not count, such as that of a project with a virtual environment
    inside it.
    """
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if Path(_git("rev-parse", "--show-toplevel")).resolve() == places.SOURCE:
            return _git("rev-parse", "--short", "HEAD") + "+" * bool(_git("status", "--porcelain", "ibjax"))
    return f"version {places.version()}"


def _git(*arguments):
    """The output of a git command in the repository that holds ibjax; raises SubprocessError where there is none."""
    command = ["git", "-C", str(places.SOURCE), *arguments]
    done = subprocess.run(command, capture_output=True, check=True, encoding="utf-8", errors="replace", timeout=10)
    return done.stdout.strip()


def environment() -> dict[str, Any]:
    """The content of env.json."""
    where = {"hardware": hardware(), "platform": platform.platform(), **jax_settings(), **xla_flags()}
    return {"command": sys.argv, "versions": versions(), "commit": commit(), **where}
