"""Sharding of the arrays of a dependence measure when a train step runs on several devices.

Features arrive sharded by image, but a Gram matrix involves all pairs of images. Therefore features are resharded along
their d entries: each device sums its share of the entries for every pair. The features are transferred once, a D-th of
them per device with D devices, and the sum over devices is (B, B). By default the compiler would replicate all features
on all devices, or propagate the sharding of the measure into the network and its attack.

These functions do not change values, and have an effect only within `over` with several devices.
"""

import contextlib
import contextvars

import jax
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ibjax.devices import cluster

_mesh = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def over(mesh: Mesh):
    """A context in which these functions shard traced arrays over the devices of a mesh."""
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def devices() -> Mesh | None:
    """The mesh over which arrays are sharded now; None with one device, or where one device's share is traced."""
    mesh = _mesh.get()
    alone = mesh is None or mesh.size == 1 or not jax.sharding.get_abstract_mesh().empty
    return None if alone else mesh


def split(x: Array, axis: int) -> Array:
    """`x`, sharded along an axis over all devices; replicated if the size is not a multiple of their number."""
    mesh = devices()
    if mesh is None or x.shape[axis] % mesh.size:
        return everywhere(x)
    return lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*(None,) * axis, *cluster.BATCH)))


def everywhere(x: Array) -> Array:
    """`x`, replicated on every device."""
    mesh = devices()
    return x if mesh is None else lax.with_sharding_constraint(x, NamedSharding(mesh, cluster.REPLICATED))


def by_feature(x: Array) -> Array:
    """(B, …) -> (B, d): one row per image, sharded along the d entries."""
    return split(split(x, 0).reshape(len(x), -1), 1)
