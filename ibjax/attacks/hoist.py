"""Makes the arrays that a function closes over its arguments, so that weights are not compiled in as constants."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun


def unjitted(f: Callable) -> Callable:
    """The function that `jax.jit` wraps, or f itself: a jitted function keeps what it closes over as constants."""
    return inspect.unwrap(f, stop=lambda f: not isinstance(f, jax.stages.Wrapped))


def hoisted(program: Callable, *arguments: Any) -> tuple[Callable, list[Any], Any]:
    """Traces `program` and returns (function, constants, tree structure of the result).

    The function maps (constants, *leaves of the arguments) to the leaves of the result. Of `arguments` only shapes and
    dtypes are used.
    """
    closed, shapes = jax.make_jaxpr(program, return_shape=True)(*arguments)

    def call(constants, *leaves):
        return jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, constants))(*leaves)

    return call, closed.consts, jax.tree.structure(shapes)
