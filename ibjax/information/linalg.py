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
    of the number of devices. By default the compiler would gather the matrices on all devices in every round of an
    iteration, and synchronise the devices to decide when to stop.
    """
    mesh = placement.devices()
    if mesh is not None and len(matrices) % mesh.size == 0:
        share = functools.partial(_each, f, chunk=chunk)
        split = jax.shard_map(share, mesh=mesh, in_specs=cluster.BATCH, out_specs=cluster.BATCH, check_vma=False)
        return split(matrices)
    return _each(f, matrices, chunk)


def _each(f, matrices, chunk):
    if cores.form().serial:
        return lax.map(f, matrices)
    return jax.vmap(f)(matrices) if chunk is None else lax.map(f, matrices, batch_size=chunk)
