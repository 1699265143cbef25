"""How a network is called: by pure functions over plain nested dicts of arrays, whatever library it is written in.

    predict    (variables, images) -> logits, features                    evaluation mode
    forward    (variables, images, key) -> (logits, features), variables  training mode: batch statistics move

`variables` has the entries "params" and "batch_stats" of the network; what else it holds belongs to the training method
(`ibjax.step`). The features of a network are its *taps*: the outputs of its layers, by name.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ibjax.attacks import entrance
from ibjax.devices import precision
from ibjax.devices.cores import in_parts
from ibjax.errors import InputError

Variables = dict[str, Any]
Output = tuple[Array, dict[str, Array]]  # logits (B, C) float32, features
Edits = Mapping[str, Callable[[Array], Array]]  # name of a tap -> edit of its feature in the forward pass


class Features(dict[str, Array]):
    """The taps of a network by name; a missing one raises an InputError that lists those that exist."""

    def __missing__(self, name: str) -> Array:
        taps = f"its taps are {', '.join(self)}" if self else "it returns logits alone; return (logits, {name: array})"
        raise InputError(f"the method needs the tap '{name}', which the network does not have: {taps}")


jax.tree_util.register_pytree_with_keys(
    Features,
    lambda taps: ([(jax.tree_util.DictKey(name), taps[name]) for name in sorted(taps)], tuple(sorted(taps))),
    lambda names, arrays: Features(zip(names, arrays, strict=True)),
)


class Predict(Protocol):
    """A forward pass in evaluation mode; it updates no variables."""

    def __call__(self, variables: Variables, x: Array, edits: Edits | None = None) -> Output: ...


class Forward(Protocol):
    """A forward pass in training mode; the returned variables contain the updated batch statistics."""

    def __call__(
        self, variables: Variables, x: Array, key: Array, edits: Edits | None = None
    ) -> tuple[Output, Variables]: ...


class Net(NamedTuple):
    """The network as the train step sees it: the only interface to the neural-network library."""

    predict: Predict
    forward: Forward
    teacher: Callable[[Array], Output] | None = None  # frozen weights, evaluation mode, no gradient
    assistant: Callable[[Array], Output] | None = None  # a second teacher, likewise


def linen_net(
    model: nn.Module,
    teachers: Mapping[str, nn.Module] | None = None,
    frozen: Mapping[str, Variables] | None = None,
) -> Net:
    """Wraps a Linen module and its frozen teachers as pure functions of `variables`.

    `teachers` and `frozen` map "teacher" and "assistant" to their modules and their variables, as far as they exist.
    A network that returns logits alone has no features. Products have the precision of an evaluation, unless the caller
    asks for another one, as the train step does (`ibjax.devices.precision`).
    """

    @precision.evaluated
    def predict(variables, x, edits=None):
        if edits is not None:  # an edit may need the whole batch
            return as_output(model.apply(of_network(variables), x, train=False, **_edited(model, edits)))
        return in_parts(lambda x: as_output(model.apply(of_network(variables), x, train=False)))(x)

    @precision.evaluated
    def forward(variables, x, key, edits=None):
        rngs = dict(zip(("dropout", "sample"), jax.random.split(key), strict=True))
        network, edited = of_network(variables), _edited(model, edits)
        output, updated = model.apply(network, x, train=True, mutable=["batch_stats"], rngs=rngs, **edited)
        return as_output(output), {**variables, **updated}

    def teach(role):
        if not frozen or role not in frozen:
            return None
        module, variables = (teachers or {})[role], frozen[role]
        answer = precision.evaluated(in_parts(lambda x: as_output(module.apply(variables, x, train=False))))
        return lambda x: jax.tree.map(lax.stop_gradient, answer(x))

    return Net(predict, forward, teach("teacher"), teach("assistant"))


def as_output(made: Any) -> Output:
    """(logits, features) from what a network returns: these two, or logits alone. InputError on anything else."""
    match made:
        case (jax.Array() as logits, Mapping() as features):
            return logits, Features(features)
        case jax.Array():
            return made, Features()
    given = f"a tuple of {len(made)}" if isinstance(made, tuple) else f"a {type(made).__name__}"
    raise InputError(f"the network returns {given}; return logits (B, classes), or (logits, {{name of a tap: array}})")


def checked_logits(predict: Callable[[Any, Array], Output], variables: Any) -> Callable[[Array], Array]:
    """A network as a function from images to logits in evaluation mode, which checks its images as the attacks do."""
    program = jax.jit(predict)

    def logits_fn(x: Array) -> Array:
        if isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.floating):
            x = x.astype(np.float32)  # as JAX does
        return program(variables, entrance.images(x))[0]

    return logits_fn


def taps(model: nn.Module, input_shape: Sequence[int]) -> Features:
    """The shapes of a network's features for one image; nothing is computed."""
    x = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    return jax.eval_shape(lambda x: as_output(model.init_with_output(jax.random.key(0), x, train=False)[0])[1], x)


def _edited(model, edits):
    """The argument `edits`, which networks need not take, as long as no method edits their taps."""
    if edits is None:
        return {}
    if "edits" not in inspect.signature(type(model).__call__).parameters:
        raise InputError(
            f"the method edits the tap {', '.join(edits)}, and the network's __call__ has no argument `edits`; apply "
            f"them as ibjax.models.layers.Taps does, or take a network of ibjax.models"
        )
    return {"edits": edits}


def of_network(variables: Variables) -> Variables:
    """The entries of `variables` that are the network's own."""
    return {name: variables[name] for name in ("params", "batch_stats") if name in variables}


def to_float(images: Array) -> Array:
    """uint8 images become float32 in [0, 1]; float images pass unchanged."""
    return images.astype(jnp.float32) / 255.0 if images.dtype == jnp.uint8 else images


def float_on_host(images: np.ndarray) -> np.ndarray:
    """`to_float` of a whole split (N, H, W, C), which a device may have no room for, on the host.

    The values are those of the devices: XLA multiplies by 1/255, and half of NumPy's quotients differ in the last bit.
    """
    return _grey_levels()[images] if images.dtype == np.uint8 else np.asarray(images)


@functools.cache
def _grey_levels():
    return np.asarray(to_float(jnp.arange(256, dtype=jnp.uint8)))
