"""Where the arrays of a measure lie when a train step runs on several devices.

Features come split by image; a Gram matrix is about all pairs of images. Split by their d entries, each device adds up
its part of every pair: the features change hands once, a D-th of them per device, and what is summed over devices is
(B, B). Left to itself the compiler gives all features to all devices, or spreads a split that suits the measure into
the network and its attack.

All functions change no value, and do nothing but within `over` several devices.
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
    """Within it what is traced is split over the devices of a mesh."""
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def devices() -> Mesh | None:
    """The mesh over which the compiler splits what is traced now; None with one device, or where one's share is."""
    mesh = _mesh.get()
    alone = mesh is None or mesh.size == 1 or not jax.sharding.get_abstract_mesh().empty
    return None if alone else mesh


def split(x: Array, axis: int) -> Array:
    """`x`, split along an axis among all devices where its size divides; all of it everywhere where not."""
    mesh = devices()
    if mesh is None or x.shape[axis] % mesh.size:
        return everywhere(x)
    return lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*(None,) * axis, *cluster.BATCH)))


def everywhere(x: Array) -> Array:
    """`x`, all of it on every device."""
    mesh = devices()
    return x if mesh is None else lax.with_sharding_constraint(x, NamedSharding(mesh, cluster.REPLICATED))


def by_feature(x: Array) -> Array:
    """(B, …) -> (B, d): images, one per row, split by their entries."""
    return split(split(x, 0).reshape(len(x), -1), 1)
