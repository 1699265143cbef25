"""Float32 products as accelerators round them, on a CPU.

XLA's CPU compiler ignores the precision of a product: `jax.default_matmul_precision("bfloat16")` changes no bit there.
Here the operands of every float32 product and convolution are rounded when it is lowered, unless its precision is
HIGHEST: to 8 significant bits, as in the single pass of a TPU, or to 11, the TensorFloat-32 of a GPU. With HIGH a TPU
takes three passes, which keep 16 bits. This comes after differentiation and batching, so that it holds for the products
that these make too.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core.primitives import conv_general_dilated_p, dot_general_p
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir

STORED_BITS = {"bfloat16": 7, "tensorfloat32": 10}  # of the mantissa
WITH_HIGH = {"bfloat16": 15, "tensorfloat32": 10}  # of products that state HIGH
PROJECT = Path(__file__).parent.parent


class Product(NamedTuple):
    """A product or convolution of float32 arrays that was lowered."""

    full: bool  # its precision is HIGHEST
    line: str  # of the project that asked for it, as "ibjax/information/hsic.py:215"


@contextlib.contextmanager
def rounded(precision: str = "bfloat16", *, all_products: bool = False) -> Iterator[list[Product]]:
    """Within it, products are rounded as `precision` says unless they name HIGHEST; yields those that were lowered.

    all_products: those with HIGHEST are rounded too, as if nobody had named it.
    """
    found: list[Product] = []
    rules = mlir._platform_specific_lowerings["cpu"]
    before = {primitive: rules[primitive] for primitive in (dot_general_p, conv_general_dilated_p)}
    try:
        for primitive, entry in before.items():
            rule = _rounding(entry.rule, STORED_BITS[precision], WITH_HIGH[precision], all_products, found)
            mlir.register_lowering(primitive, rule, platform="cpu", cacheable=False)
        jax.clear_caches()
        with jax.default_matmul_precision(precision):
            yield found
    finally:
        rules.update(before)
        jax.clear_caches()


def _rounding(rule, bits, high_bits, all_products, found):
    def lowered(ctx, *operands, precision, **params):
        if any(aval.dtype != jnp.float32 for aval in ctx.avals_in):
            return rule(ctx, *operands, precision=precision, **params)
        full = precision is not None and set(precision) == {lax.Precision.HIGHEST}
        found.append(Product(full, _line()))
        if all_products or not full:
            high = precision is not None and set(precision) == {lax.Precision.HIGH} and not all_products
            kept = high_bits if high else bits
            operands = [stablehlo.reduce_precision(operand, 8, kept) for operand in operands]
        return rule(ctx, *operands, precision=precision, **params)

    return lowered


def _line():
    """Where the product that is being lowered was asked for: the innermost line outside of libraries."""
    frames = re.findall(r'"([^"]+\.py)":(\d+)', str(ir.Location.current))
    own = [(Path(file), line) for file, line in frames if PROJECT in Path(file).parents]
    return f"{own[0][0].relative_to(PROJECT)}:{own[0][1]}" if own else ""
