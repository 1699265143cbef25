"""Analyses of trained networks, and of the cost of training them."""
