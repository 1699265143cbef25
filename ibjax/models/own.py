"""What a network of the user's own must be: a Linen module that is called as those of this package are.

A class of Flax NNX or Equinox becomes one (`ibjax.wrap.training`).
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from ibjax.errors import CodeError
from ibjax.wrap import training

# module of a library's base class -> (argument of the constructor that the library fills, what makes a Linen module)
_LIBRARIES = {"flax.nnx": ("rngs", training.linen_from_nnx), "equinox": ("key", training.linen_from_equinox)}


def own_factory(call: Callable) -> Callable:
    """The factory itself; for a class of NNX or Equinox, one of Linen modules with the options of its constructor."""
    if not inspect.isclass(call) or (library := _library(call)) is None:
        return call
    filled, convert = _LIBRARIES[library]

    @functools.wraps(call, updated=())
    def made(**options):
        return convert(call, **options)

    given = inspect.signature(call.__init__)
    kept = [parameter for name, parameter in list(given.parameters.items())[1:] if name != filled]  # without self
    made.__signature__ = given.replace(parameters=kept)  # pyright: ignore[reportAttributeAccessIssue]
    return made


def own_model(source: Any, made: Any, options: Any) -> nn.Module:
    """The network that a factory of the user's own has made; CodeError unless it can be called as networks are."""
    if not isinstance(made, nn.Module):
        instead = "make a flax.linen.Module"
        if (library := _library(type(made))) is not None:
            instead = f"name its class, or return ibjax.wrap.{_LIBRARIES[library][1].__name__}(…)"
        raise CodeError(f"{source} is a {type(made).__name__}; {instead}")
    takes = inspect.signature(type(made).__call__).parameters
    if "train" not in takes:
        raise CodeError(f"{source} is called with ({', '.join(takes)}); define __call__(self, x, train=False)")
    return made


def _library(kind):
    """The key in _LIBRARIES of the library whose module a class is; None for any other."""
    modules = {base.__module__ for base in kind.__mro__}
    return next((key for key in _LIBRARIES if any(f"{module}.".startswith(f"{key}.") for module in modules)), None)
