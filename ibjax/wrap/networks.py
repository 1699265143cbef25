"""Wrapped networks of the libraries that are written in JAX; `ibjax.wrap` describes them."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ibjax.devices import precision
from ibjax.devices.cores import in_parts
from ibjax.errors import InputError, nearest
from ibjax.net import Output, as_output, checked_logits


class Network(NamedTuple):
    """A network in evaluation mode."""

    logits_fn: Callable[[Array], Array]  # (B, H, W, C) in [0, 1] -> (B, classes); checks its images as attacks do
    predict: Callable[[Any, Array], Output]  # (variables, x) -> (logits, features), without checks
    variables: Any  # its arrays, a pytree; () where they are not JAX's
    says: dict[str, Any]  # for records: library, its version, the network's class, number of parameters


def of(
    predict: Callable[[Any, Array], Any], variables: Any, says: Mapping[str, Any], parameters: int | None
) -> Network:
    """A `Network` of `predict`, whose result may be logits alone."""

    @precision.evaluated  # the only way to the products of another library's network
    def answer(variables, x):
        return in_parts(lambda x: as_output(predict(variables, x)))(x)

    says = {**says, **({} if parameters is None else {"parameters": parameters})}
    return Network(checked_logits(answer, variables), answer, variables, says)


# ---- Flax --------------------------------------------------------------------------------------------------------


def nnx(model: Any, **call: Any) -> Network:
    """A Flax NNX module, called as `model(x)` with x (B, H, W, C).

    Args:
      model: `flax.nnx.Module`. Its weights are copied: training it further does not change the wrapped network.
      call: further arguments of its `__call__`.
    """
    from flax import nnx as library

    if not isinstance(model, library.Module):
        raise InputError(f"wrap.nnx was given a {type(model).__name__}; give a flax.nnx.Module")
    arguments = _evaluating(type(model).__call__, call, "wrap.nnx")
    evaluated = library.clone(model)
    evaluated.eval()
    graph, keys, state = library.split(evaluated, library.RngState, ...)  # keys draw nothing in evaluation mode
    count = _size(library.state(model, library.Param))
    return of(lambda state, x: library.merge(graph, keys, state)(x, **arguments), state, _says("flax", model), count)


def linen(model: nn.Module, variables: Mapping[str, Any], **call: Any) -> Network:
    """A Flax Linen module, called as `model.apply(variables, x)` with x (B, H, W, C).

    What it sows into the collection `intermediates` is among the features, under the path of its module and its name.

    Args:
      model, variables: the module and {"params": …, "batch_stats": …} of it.
      call: further arguments of its `__call__`.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"wrap.linen was given a {type(model).__name__}; give a flax.linen.Module")
    arguments = _evaluating(type(model).__call__, call, "wrap.linen")

    def predict(variables, x):
        made, sown = model.apply(variables, x, mutable=["intermediates"], **arguments)
        logits, features = as_output(made)
        return logits, {**features, **_sown(sown.get("intermediates", {}))}

    return of(predict, variables, _says("flax", model), _size(variables.get("params", {})))


def _sown(intermediates):
    """{"stage1/act": array}: of each name the last array that was sown."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(intermediates, is_leaf=lambda node: isinstance(node, tuple))
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): values for path, values in leaves}
    return {name: values[-1] for name, values in named.items() if isinstance(values, tuple) and values}


# ---- Equinox -----------------------------------------------------------------------------------------------------


def equinox(model: Any, state: Any = None, *, layout: str = "CHW", batched: bool = False, **call: Any) -> Network:
    """An Equinox module, called for one image, as is usual there: `model(image)`, or `model(image, state)`.

    Args:
      model: an `equinox.Module` that returns logits (classes,), or (logits, features).
      state: of `equinox.nn.make_with_state`, for a model with batch-norm; it then returns (output, state).
      layout: of the images that it takes: "CHW" as Equinox's convolutions, or "HWC".
      batched: whether it takes a batch, (B, C, H, W) or (B, H, W, C), instead of one image.
      call: further arguments of its `__call__`. `key=None` is given where it needs a key.
    """
    library = library_of("equinox", "wrap.equinox")
    if not callable(model):
        raise InputError(f"wrap.equinox was given a {type(model).__name__}; give a callable equinox.Module")
    if layout not in LAYOUTS:
        raise InputError(f"layout='{layout}' is unknown; {nearest(layout, LAYOUTS)}")
    stateful = any(isinstance(leaf, library.nn.StateIndex) for leaf in _indices(library, model))
    if stateful and state is None:
        raise InputError("the model keeps a state, as batch-norm does; give it: wrap.equinox(model, state)")
    arguments = _evaluating(type(model).__call__, call, "wrap.equinox", supplied=("state",))
    arrays, static = library.partition(library.nn.inference_mode(model), library.is_array)

    def predict(variables, x):
        arrays, state = variables
        whole = library.combine(arrays, static)

        def once(x):
            x = in_layout(x, layout)
            return whole(x, **arguments) if state is None else whole(x, state, **arguments)[0]

        return once(x) if batched else jax.vmap(once)(x)

    count = _size(library.filter(model, library.is_inexact_array))
    return of(predict, (arrays, state), _says("equinox", model), count)


LAYOUTS = {"CHW": -3, "HWC": -1}  # -> the axis of the channels


def in_layout(x: Array, layout: str) -> Array:
    """Images (…, H, W, C) in a layout of `LAYOUTS`."""
    return jnp.moveaxis(x, -1, LAYOUTS[layout])


def _indices(library, model):
    return jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, library.nn.StateIndex))


# ---- Haiku -------------------------------------------------------------------------------------------------------


def haiku(transformed: Any, params: Any, state: Any = None, **call: Any) -> Network:
    """A function transformed by Haiku, called with x (B, H, W, C) and without a random key.

    Args:
      transformed: of `haiku.transform` or `haiku.transform_with_state`, with or without `haiku.without_apply_rng`.
      params, state: of its `init`; the state of a function with batch-norm.
      call: further arguments of the function, such as `is_training=False`. Haiku does not tell whether the function has
        such an argument, so give it wherever it has.
    """
    library = library_of("haiku", "wrap.haiku", "dm-haiku")
    kinds = (library.Transformed, library.TransformedWithState)
    if not isinstance(transformed, kinds):
        raise InputError(f"wrap.haiku was given a {type(transformed).__name__}; give the result of haiku.transform")
    with_state = isinstance(transformed, library.TransformedWithState)
    if with_state != (state is not None):
        raise InputError(
            f"wrap.haiku was given {'no state' if with_state else 'a state'} for a function of "
            f"{type(transformed).__name__}; {'give that of its init' if with_state else 'leave it out'}"
        )
    key = (None,) if "rng" in inspect.signature(transformed.apply).parameters else ()

    def predict(variables, x):
        params, state = variables
        if with_state:
            return transformed.apply(params, state, *key, x, **call)[0]
        return transformed.apply(params, *key, x, **call)

    says = dict(library="haiku", version=library.__version__)
    return of(predict, (params, state), says, _size(params))


# ---- plain functions -----------------------------------------------------------------------------------------------


def function(f: Callable[[Array], Any]) -> Network:
    """A function from images (B, H, W, C) to logits (B, classes), or to (logits, features), that JAX can trace."""
    if not callable(f):
        raise InputError(f"wrap.function was given a {type(f).__name__}; give a function (B, H, W, C) -> (B, classes)")
    name = getattr(f, "__qualname__", type(f).__qualname__)
    return of(lambda variables, x: f(x), (), dict(library="jax", version=jax.__version__, network=name), None)


# ---- what they share -----------------------------------------------------------------------------------------------

_MODES = dict(
    train=False, training=False, is_training=False, deterministic=True, use_running_average=True, inference=True
)


def _evaluating(call, given, name, supplied=()):
    """The arguments of a network's call beside the images: those given, and those that switch to evaluation."""
    parameters = dict(list(inspect.signature(call).parameters.items())[2:])  # without self and the images
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {key: p for key, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    for key in given:
        if key not in named and not open_ended:
            raise InputError(f"{name}: the network's __call__ takes no '{key}'; {nearest(key, named)}")
    mode = {key: value for key, value in _MODES.items() if key in named}
    if "key" in named and named["key"].default is inspect.Parameter.empty:
        mode["key"] = None
    arguments = {**mode, **given}
    for key, parameter in named.items():
        if parameter.default is inspect.Parameter.empty and key not in arguments and key not in supplied:
            raise InputError(f"{name}: the network's __call__ needs '{key}'; give it as {name}(…, {key}=…)")
    return arguments


def library_of(module: str, name: str, package: str | None = None) -> Any:
    """An optional library; InputError with the line that installs it for `name`."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{name} needs {package or module}: pip install 'ibjax[wrap]'") from None


def _says(module, network):
    kind = type(network)
    version = importlib.import_module(module).__version__
    return dict(library=module, version=version, network=f"{kind.__module__}.{kind.__qualname__}")


def _size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
