"""Dependence measures and divergences between distributions, as pure functions with numerically stable derivatives."""
