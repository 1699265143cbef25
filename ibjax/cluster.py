"""The one place where `jax.distributed` starts, the mesh is made, and a preemption notice is noticed."""

import itertools
import os
import socket

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ibjax.errors import InputError

BATCH = PartitionSpec("data")
REPLICATED = PartitionSpec()
_HEARTBEAT_SECONDS = 30  # a dead process is noticed by the others within this time

_notices = itertools.count()


def initialize() -> None:
    """Starts `jax.distributed`, for one process too: then SIGTERM is a notice and no longer an end.

    Where the processes come from, in this order: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in the
    environment (launch/local.sh sets them); a cluster that JAX knows (SLURM, TPU, Kubernetes, Open MPI); else alone.
    """
    if jax.distributed.is_initialized():
        return
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


def check_divides(batch_size: int, name: str, count: int) -> None:
    """Raises InputError unless the batch divides among so many devices."""
    if batch_size % count:
        raise InputError(
            f"{name}={batch_size} does not divide among {count} devices; "
            f"use {max(batch_size // count, 1) * count} or {(batch_size // count + 1) * count}"
        )
