"""Dependence measures and divergences between distributions, as pure functions with numerically stable derivatives."""

import typing

from ibjax import lazy

if typing.TYPE_CHECKING:
    from ibjax.information import divergence, fourier, hsic, mige, mine, svd

__all__ = [
    "divergence",
    "fourier",
    "hsic",
    "mige",
    "mine",
    "svd",
]
__getattr__, __dir__ = lazy.attach(__name__, __all__)
