"""Measures of dependence and of distance between distributions, as pure functions with stable derivatives."""
