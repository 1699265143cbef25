"""Dependence measures and divergences between distributions, as pure functions with numerically stable derivatives."""

from ibjax import lazy

__all__ = [
    "divergence",
    "fourier",
    "hsic",
    "mige",
    "mine",
    "svd",
]
__getattr__, __dir__ = lazy.attach(__name__, __all__)
