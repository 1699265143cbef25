"""Networks on MNIST whose exact robust accuracy is known, as functions of the weights in their PyTorch files.

KW:     conv(1→16, 4×4, stride 2, padding 1) · ReLU · conv(16→32, likewise) · ReLU · 1568→100 · ReLU · 100→10
        (Wong & Kolter, ICML 2018; verified by Tjeng et al., ICLR 2019)
MLP-B:  784→100 · ReLU · 100→100 · ReLU · 100→10 (Salman et al., NeurIPS 2019)
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array, lax

Weights = Mapping[str, Array]  # by their names in PyTorch


def linear(weights: Weights, name: str, x: Array) -> Array:
    """PyTorch's `Linear`: x (B, in), weight (out, in)."""
    return jnp.matmul(x, weights[f"{name}.weight"].T, precision=lax.Precision.HIGHEST) + weights[f"{name}.bias"][None]


def conv(weights: Weights, name: str, x: Array, stride: int = 1, padding: int = 0) -> Array:
    """PyTorch's `Conv2d` on x (B, H, W, C): weight (out, in, height, width)."""
    kernel = weights[f"{name}.weight"].transpose(2, 3, 1, 0)
    dimensions = ("NHWC", "HWIO", "NHWC")
    z = lax.conv_general_dilated(
        x, kernel, (stride, stride), [(padding, padding)] * 2, dimension_numbers=dimensions,
        precision=lax.Precision.HIGHEST,
    )  # fmt: skip
    return z + weights[f"{name}.bias"][None, None, None]


def flat(x: Array) -> Array:
    """(B, H, W, C) -> (B, C·H·W), in the order in which PyTorch flattens (B, C, H, W)."""
    return x.transpose(0, 3, 1, 2).reshape(len(x), -1)


def kw(weights: Weights, x: Array) -> Array:
    """KW: (B, 28, 28, 1) in [0, 1] -> (B, 10)."""
    for name in ("0", "2"):
        x = jax.nn.relu(conv(weights, name, x, stride=2, padding=1))
    return linear(weights, "7", jax.nn.relu(linear(weights, "5", flat(x))))


def mlp_b(weights: Weights, x: Array) -> Array:
    """MLP-B: (B, 28, 28, 1) in [0, 1] -> (B, 10)."""
    x = flat(x)
    for name in ("1", "3"):
        x = jax.nn.relu(linear(weights, name, x))
    return linear(weights, "5", x)


NETWORKS = {"kw": kw, "mlp_b": mlp_b}
