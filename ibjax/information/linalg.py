"""Applies functions, such as factorisations, to many small matrices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import Array, lax

from ibjax.devices import cluster, cores, placement


def each_matrix(f: Callable[[Array], Any], matrices: Array, chunk: int | None = None) -> Any:
    """Applies f to each of (N, …) and stacks the results: batched on accelerators (`chunk` at a time), serial on a CPU.

    On a CPU, a LAPACK call for several matrices splits them over XLA's threads and waits for them on one of these
    threads. If as many such calls run at a time as there are threads, all of them wait and none makes progress: two
    batched SVDs in one program deadlocked on two cores (jaxlib 0.10.2). A call for one matrix does not wait.

    Within `placement.over` several devices, each device takes its share of the matrices if their number N is a multiple
    of the number of devices; otherwise every device computes all of them. By default the compiler would spread single
    matrices over the devices, exchange parts of them in every round of an iteration, and synchronise the devices to
    decide when to stop.
    """
    return together(functools.partial(each, f, chunk=chunk), matrices)


def together(f: Callable[[Array], Any], matrices: Array) -> Any:
    """f of all matrices (N, …), shared among devices as in `each_matrix`; its results have N rows too."""
    mesh = placement.devices()
    if mesh is None:
        return f(matrices)
    shared = len(matrices) % mesh.size == 0
    where = cluster.BATCH if shared else cluster.REPLICATED
    return jax.shard_map(f, mesh=mesh, in_specs=where, out_specs=where, check_vma=not shared)(matrices)


def each(f: Callable[[Any], Any], matrices: Any, chunk: int | None = None) -> Any:
    """f of each row of arrays, on one device; see `each_matrix`."""
    if cores.form().serial:
        return lax.map(f, matrices)
    return jax.vmap(f)(matrices) if chunk is None else lax.map(f, matrices, batch_size=chunk)
