"""Trees of arrays by path, as checkpoints store them, and digests of their content."""

import math
from typing import Any

import jax
import numpy as np

from ibjax import files


def flatten(tree: Any) -> dict[str, Any]:
    """{"opt_state/1/trace/params/head/dense/bias": leaf, …} in the tree's own order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nest(flat):
    """Plain nested dicts, so that the format on disk does not depend on the classes of optax or of this library."""
    nested: dict[str, Any] = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        node = nested
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return nested


def array_digest(array: Any) -> str:
    """A 128-bit digest of an array's bytes; of an object that brings its own digest instead of values, that digest."""
    if hasattr(array, "digest"):
        return array.digest()
    return files.digest(np.ascontiguousarray(array).tobytes())


def digest(tree: Any) -> str:
    """One digest of all leaves and their names: equal for bit-identical states only."""
    leaves = flatten(jax.device_get(tree)).items()
    return files.digest("".join(f"{path}:{array_digest(leaf)};" for path, leaf in leaves).encode())


def describe(leaf: Any) -> dict[str, Any]:
    """Shape, dtype and digest of an array, as a checkpoint's manifest lists them."""
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "digest": array_digest(leaf)}


def shape_and_type(leaf: Any) -> dict[str, Any] | None:
    """Shape and dtype of an array, as in `describe`; None for None."""
    return None if leaf is None else {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def kind(description: dict[str, Any] | None) -> str:
    """A description in words, as "float32[6, 5]"; "nothing" for None."""
    return "nothing" if description is None else f"{description['dtype']}{description['shape']}"


def finite(leaf: Any) -> bool:
    """Whether a NumPy array holds neither NaN nor Inf; dtypes that NumPy does not count as floating always pass."""
    return not np.issubdtype(leaf.dtype, np.floating) or math.isfinite(float(np.sum(np.abs(leaf), dtype=np.float64)))
