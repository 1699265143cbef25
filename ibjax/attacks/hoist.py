"""Programs whose closed-over arrays are arguments: a network's weights, as constants, would be compiled into each."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun


def unjitted(f: Callable) -> Callable:
    """What `jax.jit` was given, or f itself: what a jitted function closes over is a constant of its program."""
    return inspect.unwrap(f, stop=lambda f: not isinstance(f, jax.stages.Wrapped))


def hoisted(program: Callable, *arguments: Any) -> tuple[Callable, list[Any], Any]:
    """(a function (constants, *leaves) -> leaves, the constants, the structure of the result) of a program.

    `leaves` are those of the arguments, and of the result; the arguments give shapes and types only.
    """
    closed, shapes = jax.make_jaxpr(program, return_shape=True)(*arguments)

    def call(constants, *leaves):
        return jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, constants))(*leaves)

    return call, closed.consts, jax.tree.structure(shapes)
