"""Sharding within a train step on several devices: of a dependence measure's arrays, and of the state between steps.

**Measures.** Features arrive sharded by image, but a Gram matrix involves all pairs of images. Therefore features are
resharded along their d entries: each device sums its share of the entries for every pair. The features are transferred
once, a D-th of them per device with D devices, and the sum over devices is (B, B). By default the compiler would
replicate all features on all devices, or propagate the sharding of the measure into the network and its attack.

**The state.** Between two steps every device holds all weights, moments and averages (`sharding="replicated"`), or its
share of them (`sharding="fsdp"`, after PyTorch's fully sharded data parallelism; Rajbhandari et al. 2020, ZeRO). With
shares, the weights are gathered once at the start of a step, before the attack's loop; gradients are summed over the
devices into shares, and the optimiser updates shares.

These functions do not change values, and have an effect only within `over` with several devices.
"""

import contextlib
import contextvars
import math
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ibjax.devices import cluster

_SMALL = 4096  # entries; a smaller array stays whole, since its transfer would take longer than it saves


_mesh = contextvars.ContextVar("mesh", default=None)
_fsdp = contextvars.ContextVar("fsdp", default=False)


@contextlib.contextmanager
def over(mesh: Mesh, fsdp: bool = False):
    """A context in which these functions shard traced arrays over the devices of a mesh, with `fsdp` the state too."""
    tokens = _mesh.set(mesh), _fsdp.set(fsdp)
    try:
        yield
    finally:
        _mesh.reset(tokens[0])
        _fsdp.reset(tokens[1])


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
    rows = split(split(x, 0).reshape(len(x), -1), 0)  # as rows before they change hands: all at once, not per axis
    return split(rows, 1)


# ---- the state between two steps ---------------------------------------------------------------------------


def shares(tree: Any, mesh: Mesh) -> Any:
    """The sharding of each array of a tree (or of its shape) that is kept in shares, one per device.

    An array is split along its largest axis whose size is a multiple of the number of devices; an array without such an
    axis, or with fewer than 4,096 entries, stays whole on every device.
    """

    def share(leaf):
        axes = [i for i, size in enumerate(leaf.shape) if size % mesh.size == 0]
        if not axes or math.prod(leaf.shape) < _SMALL:
            return NamedSharding(mesh, cluster.REPLICATED)
        axis = max(axes, key=lambda i: leaf.shape[i])
        return NamedSharding(mesh, PartitionSpec(*(None,) * axis, *cluster.BATCH))

    return jax.tree.map(share, tree)


def gathered(tree: Any) -> Any:
    """A tree of arrays, whole on every device from here on if the state is kept in shares; else the tree itself."""
    if not _in_shares():
        return tree
    return lax.optimization_barrier(jax.tree.map(everywhere, tree))  # the barrier keeps it out of the attack's loop


def shared(tree: Any) -> Any:
    """A tree of arrays, in `shares` from here on if the state is kept so; else the tree itself."""
    if not _in_shares():
        return tree
    return lax.with_sharding_constraint(tree, shares(tree, devices()))


def _in_shares():
    return _fsdp.get() and devices() is not None
