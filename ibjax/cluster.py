"""The one place where a process meets JAX: `jax.distributed`, the cache of compiled programs, the mesh, preemption."""

import ctypes
import hashlib
import itertools
import logging
import os
import platform
import socket
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ibjax.errors import InputError

BATCH = PartitionSpec("data")
REPLICATED = PartitionSpec()
_HEARTBEAT_SECONDS = 30  # a dead process is noticed by the others within this time

_notices = itertools.count()
log = logging.getLogger(__name__)


def initialize() -> None:
    """Prepares a process: what is compiled is kept, and on CPUs memory; `jax.distributed` is started.

    `jax.distributed` also for one process: then SIGTERM is a notice and no end.

    Where the processes come from, in this order: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in the
    environment (launch/local.sh sets them); a cluster that JAX knows (SLURM, TPU, Kubernetes, Open MPI); else alone.
    """
    if jax.distributed.is_initialized():
        return
    keep_compiled()
    _start_distributed()
    if jax.default_backend() == "cpu":
        keep_memory()


def _start_distributed():
    common = dict(heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    variables = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [name for name in variables if os.environ.get(name)]
    if len(given) == len(variables):
        address, count, index = (os.environ[name] for name in variables)
        if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
            raise InputError(f"JAX_NUM_PROCESSES={count}, JAX_PROCESS_ID={index}: need 0 <= id < number of processes")
        jax.distributed.initialize(address, int(count), int(index), **common)
        return
    if given:
        raise InputError(f"{', '.join(given)} set without {', '.join(v for v in variables if v not in given)}")
    try:
        jax.distributed.initialize(**common)
    except (ValueError, RuntimeError) as error:
        if "should be defined" not in str(error) and "must be defined" not in str(error):
            raise
        address = f"localhost:{_free_port()}"
        jax.distributed.initialize(address, 1, 0, coordinator_bind_address=address, **common)


def keep_compiled() -> None:
    """Compiled programs are kept in ~/.cache/ibjax, in a folder that only its user can read.

    JAX_COMPILATION_CACHE_DIR in the environment names another folder, or, empty, none. Programs for a CPU are kept by
    its instruction set: a home may be shared by machines of several kinds.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    root = cache_folder()
    folder = root / hashlib.sha256(_instruction_set().encode()).hexdigest()[:16]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        root.chmod(0o700)
    except OSError as error:
        log.info("nothing compiled is kept: %s cannot be written (%s)", folder, error.strerror)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def keep_memory() -> None:
    """Memory that a program has freed stays with the process, where its allocator is glibc's.

    By default glibc returns blocks of more than 32 MB at once, and the kernel then zeroes the work space of every call
    of a compiled program anew: on a CPU a fifth of APGD's time on a small network.
    """
    trim_threshold, mmap_max = -1, -4  # glibc's names: M_TRIM_THRESHOLD, M_MMAP_MAX
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def cache_folder() -> Path:
    """Where what can be made again is kept: $XDG_CACHE_HOME/ibjax, or ~/.cache/ibjax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ibjax"


def _instruction_set():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.machine() + platform.processor()


def _free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def preempted() -> bool:
    """Whether a preemption notice has reached all processes; every process calls it equally often."""
    return multihost_utils.reached_preemption_sync_point(next(_notices))


def all_agree(here: bool) -> bool:
    """Process 0's word, on all processes."""
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.broadcast_one_to_all(np.int32(here)))


def mesh() -> Mesh:
    """All devices of all processes in one axis, "data"."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree, mesh: Mesh):
    """Host arrays (the same on every process) as arrays on all devices."""
    sharding = NamedSharding(mesh, REPLICATED)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_callback(np.shape(leaf), sharding, np.asarray(leaf).__getitem__), tree
    )


def check_divides(batch_size: int, name: str, devices: int, parts: int = 1) -> None:
    """Raises InputError unless the batch divides among so many devices, in so many parts."""
    count = devices * parts
    if batch_size % count:
        split = f"{devices} devices" if parts == 1 else f"{devices} devices in {parts} parts"
        raise InputError(
            f"{name}={batch_size} does not divide among {split}; "
            f"use {max(batch_size // count, 1) * count} or {(batch_size // count + 1) * count}"
        )
