"""How a process sets up JAX: `jax.distributed`, the platform, the device mesh, preemption.

`ibjax.devices.compiled` caches compiled programs; `ibjax.devices.peers` coordinates the processes of a run.
"""

import contextlib
import contextvars
import ctypes
import itertools
import logging
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ibjax import errors
from ibjax.devices import compiled, machine, peers
from ibjax.devices.compiled import keep as keep_compiled
from ibjax.devices.peers import agree, several, together, word_of_first
from ibjax.errors import InputError, PeerError

__all__ = ["agree", "keep_compiled", "several", "together", "word_of_first"]  # re-exported

BATCH = PartitionSpec("data")
REPLICATED = PartitionSpec()
# After this silence of a peer, JAX ends a process. A peer speaks every half of it, so its silence may begin long before
# its death; `ibjax.devices.peers` reports it earlier, after 30 to 34 s.
_HEARTBEAT_SECONDS = 100
_START_SECONDS = 300  # how long a process waits for the others of its run to start
_FIXED = {  # settings of JAX that a command keeps whatever the environment says: (value, reason)
    "jax_enable_x64": (False, "networks and attacks compute in float32"),
    "jax_debug_infs": (False, "attacks compare with infinity on purpose"),
    # with others, as rbg, all images of a batch draw from the key of its first one
    "jax_default_prng_impl": ("threefry2x32", "what an image draws must not depend on its batch"),
    "jax_threefry_partitionable": (True, "one seed must draw the same everywhere"),
}

_notices = itertools.count()
log = logging.getLogger(__name__)


def initialize() -> None:
    """Prepares a process, before any other use of JAX, and logs on which devices it computes.

    Sets JAX up as `_FIXED` says, enables the compilation cache, keeps freed memory on CPUs, and starts
    `jax.distributed`, for a single process too: SIGTERM then is a preemption notice and does not end the process. The
    other processes are found in this order:

    1. JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in the environment (launch/local.sh sets them)
    2. the step of a SLURM job that srun has started
    3. another cluster that JAX detects (TPU, a Job of Kubernetes, Open MPI)
    4. none: a single process

    Raises InputError if the environment contradicts itself, or names a platform that is not available, if the processes
    have different platforms, or if this process has used JAX before.
    """
    if jax.distributed.is_initialized():
        return
    for name, (value, reason) in _FIXED.items():
        if (given := getattr(jax.config, name, value)) != value:
            log.warning("%s=%s is set to %s for this command: %s", name.upper(), given, value, reason)
            jax.config.update(name, value)
    keep_compiled()
    try:
        with _without_proxies():
            _start_distributed()
    except RuntimeError as error:
        if "must be called before" in str(error):
            raise InputError("this process used JAX before its command began; give that one of its own") from None
        raise
    found = backend()  # `several` asks for the devices too, with errors of other types
    peers.watch()
    _tell_devices()
    agree("devices", {"platform": found}, "see why JAX does not find them: ibjax doctor")
    if found == "cpu":
        keep_memory()
        if several():
            _connect()
    elif found == "gpu" and several():
        compiled.share()


def _tell_devices():
    """Logs the devices, and a warning where an accelerator is left out: JAX's own are as silent as its other ones."""
    if jax.process_index() == 0:
        log.info("computing on %s", machine.hardware())
    if not jax.config.jax_platforms:  # pyright: ignore[reportAttributeAccessIssue]
        with contextlib.suppress(OSError):
            for kind, _ in machine.unused():
                log.warning("a %s is here, but JAX computes on the CPU; ibjax doctor says how to mend it", kind)


def backend() -> str:
    """JAX's platform, as "cpu"; raises InputError if JAX_PLATFORMS names one that is not available.

    Raises PeerError if the other processes do not say in time which devices they have.
    """
    try:
        return jax.default_backend()
    except (RuntimeError, AssertionError, ValueError) as error:
        wanted, reason = os.environ.get("JAX_PLATFORMS", ""), (str(error).strip() or "no such device").splitlines()[0]
        if jax.distributed.is_initialized() and "DEADLINE_EXCEEDED" in str(error):
            raise PeerError(f"another process does not say which devices it has ({reason[:200]})") from None
    if not wanted:
        raise InputError(f"JAX finds no device it can use ({reason})")
    jax.config.update("jax_platforms", "")
    try:
        there = sorted({device.platform for device in jax.devices()} | {"cpu"})
    except (RuntimeError, AssertionError):
        there = ["cpu"]
    raise InputError(
        f"JAX_PLATFORMS={wanted} cannot be used here ({reason[:200]}); there is {', '.join(there)}; set JAX_PLATFORMS "
        f"to it, or unset it"
    )


def _no_platform(error):
    """If JAX_PLATFORMS caused `error`, an InputError that lists the available platforms; else None.

    JAX looks for its devices at its first computation. In a command that does not call `initialize` first, this can
    happen anywhere, and the errors are of several types.
    """
    if os.environ.get("JAX_PLATFORMS") and isinstance(error, RuntimeError | AssertionError | ValueError):
        try:
            backend()
        except InputError as found:
            return found
    return None


errors.explanations.append(_no_platform)


# ---- the processes -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _without_proxies():
    """Removes the *_proxy variables from the environment, as gRPC would send traffic between processes to the proxy."""
    taken = {name: os.environ.pop(name) for name in list(os.environ) if name.lower().endswith("_proxy")}
    try:
        yield
    finally:
        os.environ.update(taken)


_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def _start_distributed():
    given = [name for name in _VARIABLES if os.environ.get(name)]
    if len(given) == len(_VARIABLES):
        address, count, index = (os.environ[name] for name in _VARIABLES)
        if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
            raise InputError(f"JAX_NUM_PROCESSES={count}, JAX_PROCESS_ID={index}: need 0 <= id < number of processes")
        port = _port(address.rpartition(":")[2], f"JAX_COORDINATOR_ADDRESS={address} has no port; give HOST:PORT")
        _join(port, int(count), int(index), "JAX_COORDINATOR_ADDRESS", address, int(count), int(index))
    elif given:
        raise InputError(f"{', '.join(given)} set without {', '.join(v for v in _VARIABLES if v not in given)}")
    elif "SLURM_JOB_ID" in os.environ and "SLURM_PROCID" in os.environ:
        _join_slurm_step()
    else:
        _join_detected()


def _port(text, otherwise):
    """The number of a port; raises InputError with the text `otherwise` where it is none."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**16):
        raise InputError(otherwise)
    return int(text)


def _coordinator_port():
    """The port that JAX_COORDINATOR_PORT names; None where it is not set."""
    given = os.environ.get("JAX_COORDINATOR_PORT")
    return _port(given, f"JAX_COORDINATOR_PORT={given} is no port; give a number up to 65535") if given else None


def _join_detected():
    """Joins the processes of a cluster that JAX detects; without one, starts a single process."""
    _coordinator_port()
    try:
        with _speaking("this process", "the others that its cluster tells of", "start all processes"):
            jax.distributed.initialize(**_common())
    except jax.errors.JaxRuntimeError:  # of connecting, not of detecting
        raise
    except Exception as error:  # Kubernetes's client has errors of its own
        if "should be defined" in str(error) or "must be defined" in str(error):
            _start_alone()
        elif "KUBERNETES_SERVICE_HOST" not in os.environ or "must be called before" in str(error):
            raise
        elif _belongs_to_no_job(error):
            log.info("this pod belongs to no Job of Kubernetes: the process runs alone")
            _start_alone()
        else:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(
                f"JAX cannot find out with which other pods of Kubernetes this one runs ({reason}); set "
                f"{', '.join(_VARIABLES)}, to localhost:8476, 1 and 0 for a process that runs alone"
            ) from None


def _belongs_to_no_job(error):
    """Whether JAX's detection failed because Kubernetes knows this pod, and no Job has made it.

    It may be one of a Deployment, of a notebook server, or one that was started by itself. JAX reads the pod's label
    `job-name` and its controllers without looking whether there are any.
    """
    if "JOB_COMPLETION_INDEX" in os.environ:
        return False
    if isinstance(error, KeyError):
        return error.args == ("job-name",)
    none = "'NoneType' object is not" if isinstance(error, TypeError) else "does not have a controller"
    return none in str(error) or "only supports Job/JobSet" in str(error)


def _common():
    # longer than our own limit, since JAX ends the process in C++, without a Python exception
    return dict(heartbeat_timeout_seconds=_HEARTBEAT_SECONDS, initialization_timeout=_START_SECONDS + 60)


def _start_alone():
    """Starts a single process, on a port that is reserved while the process runs."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as gRPC's own socket
    holder.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{holder.getsockname()[1]}"
    holder.detach()  # it stays open to the end of the process
    jax.distributed.initialize(
        address, 1, 0, coordinator_bind_address=address, cluster_detection_method="deactivate", **_common()
    )


def _join_slurm_step():
    """Joins the tasks of a step that srun has started; without srun, or with one task, starts a single process.

    In a batch script or an interactive shell, SLURM_NTASKS is that of the job, although its tasks were not started.
    """
    step, tasks = os.environ.get("SLURM_STEP_ID", "0"), os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if not tasks.isdigit() or int(tasks) == 1:
        if os.environ.get("SLURM_NTASKS", "1") != "1":
            log.warning(
                "SLURM_NTASKS=%s, but this process was not started as one of so many: it runs alone; srun starts all",
                os.environ["SLURM_NTASKS"],
            )
        _start_alone()
        return
    if not (port := _coordinator_port()):  # JAX would choose the same port for all steps of a job
        number = 31 * int(os.environ["SLURM_JOB_ID"]) + (int(step) if step.isdigit() else 0)
        port = 61440 + number % 4096
        os.environ["JAX_COORDINATOR_PORT"] = str(port)
    _join(port, int(tasks), int(os.environ["SLURM_PROCID"]), "JAX_COORDINATOR_PORT")


def _join(port, count, index, variable, *address):
    """Calls `jax.distributed.initialize(*address)`, with log lines while it waits and a time limit."""
    if index == 0:
        _check_free(port, variable)
    others = "process 0" if index else f"the other {count - 1} processes"
    where = f"at port {port}" if not address else f"at {address[0]}"
    told = _speaking(f"process {index} of {count}", f"{others} {where}", f"start all {count} processes")
    with told if count > 1 else contextlib.nullcontext():
        jax.distributed.initialize(*address, **_common())


def _connect():
    """Connects the CPU devices of all processes to each other, by a sum over them.

    The first sum makes the connections, and each process waits 30 s for the others to come to it. Without this one, a
    process that finds its compiled program in the cache would give up while another still compiles.
    """
    each = NamedSharding(mesh(), BATCH)
    ones = jax.make_array_from_callback((len(each.device_set),), each, lambda index: np.ones(1, np.float32))
    jax.block_until_ready(jax.jit(jax.numpy.sum, out_shardings=NamedSharding(each.mesh, REPLICATED))(ones))


@contextlib.contextmanager
def _speaking(who, whom, advice):
    """Logs from time to time which processes this one waits for, and ends it if they do not start in time."""
    joined = threading.Event()

    def speak():
        started, pause = time.monotonic(), 5
        while not joined.wait(pause):
            waited, pause = time.monotonic() - started, 20
            if waited > _START_SECONDS:
                text = f"error: {who}: {whom} did not start within {_START_SECONDS} s; {advice}"
                print(text, file=sys.stderr, flush=True)
                os._exit(errors.EXIT_PEER_LOST)  # scripts try again: a lost machine takes longer to replace
            log.info("%s waits for %s; %.0f s", who, whom, waited)

    threading.Thread(target=speak, daemon=True).start()
    try:
        yield
    finally:
        joined.set()


def _check_free(port, variable):
    """Raises InputError if another process listens on the port: JAX would crash, or connect to that process."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise InputError(
                f"port {port} cannot be used for the processes of this run to meet ({error.strerror}); set {variable} "
                f"to another one"
            ) from None


def keep_memory() -> None:
    """Makes glibc's allocator keep freed memory in the process; other allocators are not changed.

    By default glibc returns freed blocks of more than 32 MB to the system at once, so the kernel zeroes the work space
    of a compiled program again at every call: on a CPU this takes a fifth of APGD's time on a small network.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX in glibc
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def preempted() -> bool:
    """Whether a preemption notice has reached all processes; every process must call this equally often."""
    return multihost_utils.reached_preemption_sync_point(next(_notices))


_alone = contextvars.ContextVar("alone", default=False)


@contextlib.contextmanager
def on_one_device() -> Iterator[None]:
    """A context in which `mesh` has one device.

    Programs that call back into Python need it: where XLA divides one over several CPU devices, a second callback waits
    for ever.
    """
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def mesh() -> Mesh:
    """A mesh of all devices of all processes, with the single axis "data"; of one within `on_one_device`."""
    devices = jax.devices()[:1] if _alone.get() else jax.devices()
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicate(tree, mesh: Mesh):
    """Replicates host arrays, which are the same on every process, on all devices."""
    sharding = NamedSharding(mesh, REPLICATED)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_callback(np.shape(leaf), sharding, np.asarray(leaf).__getitem__), tree
    )


def shapes(tree, mesh: Mesh, spec: PartitionSpec = REPLICATED):
    """The shapes and types of arrays, as of arrays that the devices of `mesh` hold as `spec` says."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def on_every_device(tree, mesh: Mesh):
    """Arrays that the devices keep in shares become whole on every device; whole arrays are returned as they are."""
    return jax.device_put(tree, NamedSharding(mesh, REPLICATED))


def on_host(tree):
    """Arrays that the devices keep in shares become NumPy arrays; others are returned as they are.

    All processes must call it.
    """

    def whole(leaf):
        return leaf if leaf.is_fully_replicated else np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(whole, tree)


def parts_of_batch(mesh: Mesh, size: int) -> tuple[np.ndarray, Callable[[np.ndarray], jax.Array]]:
    """What this process reads of a batch of `size` examples that is sharded over all devices.

    Returns:
      The positions (R,) of the examples that lie on this process's devices, ascending, and a function from their values
      (R, …) to the array (size, …) on all devices, which all processes call.
    """
    sharding = NamedSharding(mesh, BATCH)
    held = sharding.addressable_devices_indices_map((size,)).values()
    rows = np.unique(np.concatenate([np.arange(size)[index] for index in held]))

    def placed(values):
        def share(index):
            first, stop, _ = index[0].indices(size)
            begin = np.searchsorted(rows, first)
            return values[begin : begin + stop - first]

        return jax.make_array_from_callback((size, *values.shape[1:]), sharding, share)

    return rows, placed


def rounded_up(count: int, divisor: int) -> int:
    """The smallest multiple of `divisor` that is at least `count`."""
    return -(-count // divisor) * divisor


def check_divides(batch_size: int, name: str, devices: int, parts: int = 1) -> None:
    """Raises InputError unless `batch_size` is a multiple of `devices` times `parts`."""
    count = devices * parts
    if batch_size % count:
        split = f"{devices} devices" if parts == 1 else f"{devices} devices in {parts} parts"
        raise InputError(
            f"{name}={batch_size} does not divide among {split}; "
            f"use {max(batch_size // count, 1) * count} or {(batch_size // count + 1) * count}"
        )
