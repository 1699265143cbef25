"""Linen modules of the constructors of NNX and Equinox, so that they can be trained, saved, loaded and evaluated.

A configuration names the class itself (`ibjax.models.own`), or a factory where the constructor needs more:

    # my_network.py
    def Model(num_classes: int, width: int = 8):
        return wrap.linen_from_equinox(Net, layout="HWC", num_classes=num_classes, width=width)

The module has the collections `params` and `batch_stats`. The constructor runs at every trace, but only for the
structure: the weights that it draws are replaced by the stored ones.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ibjax.errors import InputError, nearest
from ibjax.net import Output, as_output
from ibjax.wrap.networks import LAYOUTS, Network, in_layout, library_of

_COLLECTIONS = ("params", "batch_stats")


def linen_from_nnx(constructor: Callable[..., Any], **options: Any) -> nn.Module:
    """A Linen module of the NNX module `constructor(**options, rngs=…)`, called as `module(x)` with x (B, H, W, C).

    In training it runs after `.train()`, in evaluation after `.eval()`. It may have `nnx.Param` and `nnx.BatchStat`
    variables; other kinds of state are refused, except that of random keys.
    """
    return _OfNNX(functools.partial(constructor, **options))


class _OfNNX(nn.Module):
    make: Callable[..., Any]

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Output:
        from flax import nnx as library

        drawn = {name: self.make_rng(name) for name in ("dropout", "sample") if self.has_rng(name)}
        # without a key for "params" the weights exist, and replace those that the constructor draws
        initial = self.make_rng("params") if self.has_rng("params") else jax.random.key(0)
        make = functools.partial(self.make, rngs=library.Rngs(initial, **drawn))
        inner = library.bridge.ToLinen(make, skip_rng=True, metadata_fn=None, name="nnx")

        def call(module, x):
            module.train() if train else module.eval()
            return module(x)

        output = as_output(inner(x, nnx_method=call))
        if other := set(inner.variables) - {*_COLLECTIONS}:
            raise InputError(
                f"the NNX module has variables of the kind {', '.join(sorted(other))}; training keeps nnx.Param and "
                f"nnx.BatchStat only"
            )
        return output


def linen_from_equinox(
    constructor: Callable[..., Any], *, layout: str = "CHW", axis_name: str = "batch", **options: Any
) -> nn.Module:
    """A Linen module of the Equinox module `constructor(**options, key=…)`, called for one image.

    A model with batch-norm is called as `model(image, state)` and returns (output, state); one with an argument `key`
    gets a key of its image.

    Args:
      constructor: makes the model, with `key`.
      layout: of an image: "CHW" as Equinox's convolutions, or "HWC".
      axis_name: of the batch, as the model's `equinox.nn.BatchNorm` name it.
      options: of the constructor.
    """
    library_of("equinox", "wrap.linen_from_equinox")
    if layout not in LAYOUTS:
        raise InputError(f"layout='{layout}' is unknown; {nearest(layout, LAYOUTS)}")
    return _OfEquinox(functools.partial(constructor, **options), layout, axis_name)


class _OfEquinox(nn.Module):
    make: Callable[..., Any]
    layout: str
    axis_name: str

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Output:
        library = library_of("equinox", "wrap.linen_from_equinox")
        key = self.make_rng("params") if self.is_initializing() else jax.random.key(0)
        model, state = library.nn.make_with_state(self.make)(key=key)
        weights, rest = library.partition(model, library.is_inexact_array)
        weights = _in_linen(weights, lambda name, value: self.param(name, lambda key: value))
        statistics = {}

        def variable(name, value):
            statistics[name] = self.variable("batch_stats", name, lambda: value)
            return statistics[name].value

        state = _in_linen(state, variable)
        whole = library.nn.inference_mode(library.combine(weights, rest), value=not train)
        keyed = "key" in inspect.signature(type(model).__call__).parameters
        drawn = train and keyed and self.has_rng("dropout")
        keys = jax.random.split(self.make_rng("dropout"), len(x)) if drawn else None

        def once(image, key):
            image, more = in_layout(image, self.layout), {"key": key} if keyed else {}
            return whole(image, state, **more) if statistics else (whole(image, **more), state)

        axes = (0, None if keys is None else 0)
        output, after = jax.vmap(once, axes, (0, None), axis_name=self.axis_name)(x, keys)
        if train and self.is_mutable_collection("batch_stats"):
            _in_linen(after, lambda name, value: setattr(statistics[name], "value", value))
        return as_output(output)


def linen_from_network(network: Network) -> nn.Module:
    """A Linen module of a wrapped network, for evaluation: its variables are {"params": `arrays(network)`}."""
    return _OfNetwork(lambda: network)


def arrays(network: Network) -> dict[str, Array]:
    """The arrays of a wrapped network by name, as "layers.0.weight"."""
    found = {}
    _in_linen(network.variables, lambda name, value: found.setdefault(name, jnp.asarray(value)))
    return found


class _OfNetwork(nn.Module):
    network: Callable[[], Network]  # a function, since Linen would copy the containers of an attribute

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Output:
        if train:
            raise InputError("a wrapped network is in evaluation mode; train it by wrap.linen_from_nnx, for example")
        network = self.network()
        variables = _in_linen(network.variables, lambda name, value: self.param(name, lambda key: jnp.asarray(value)))
        return network.predict(variables, x)


def _in_linen(tree, replace):
    """The tree with `replace(name, leaf)` for each of its arrays; a name is a leaf's path, as "layers.0.weight"."""

    def named(path, leaf):
        return replace(jax.tree_util.keystr(path, simple=True, separator="."), leaf)

    return jax.tree_util.tree_map_with_path(named, tree)
