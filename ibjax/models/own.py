"""What a network of the user's own must be: a Linen module that is called as those of this package are."""

import inspect
from typing import Any

import flax.linen as nn

from ibjax.errors import CodeError


def own_model(source: Any, made: Any, options: Any) -> nn.Module:
    """The network that a factory of the user's own has made; CodeError unless it can be called as networks are."""
    if not isinstance(made, nn.Module):
        raise CodeError(f"{source} is a {type(made).__name__}; make a flax.linen.Module")
    takes = inspect.signature(type(made).__call__).parameters
    if "train" not in takes:
        raise CodeError(f"{source} is called with ({', '.join(takes)}); define __call__(self, x, train=False)")
    return made
