"""The stages of the residual networks: their blocks in order, with a tap after each block and each stage.

Stage s has `width`·2^(s − 1) channels; from the second stage on, the first block of a stage halves the resolution.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from jax import Array

from ibjax.errors import InputError
from ibjax.models import layers
from ibjax.models.packed import Packed

BASIC = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}  # depth -> blocks of each stage


def block_counts(
    name: str, depth: int, blocks: tuple[int, ...] | None, depths: dict[int, tuple[int, ...]]
) -> tuple[int, ...]:
    """The number of blocks of each stage; raises InputError on an unknown depth or an invalid list."""
    if blocks is None and depth in depths:
        return depths[depth]
    if blocks and min(blocks) >= 1:
        return blocks
    given = f"depth {depth}" if blocks is None else f"blocks {blocks}"
    raise InputError(f"{name} has no {given}; allowed: depth {sorted(depths)}, or blocks as (2, 2, 2, 2)")


def through(
    x: Array | Packed, tap: layers.Taps, counts: Sequence[int], width: int, block: Callable[..., Any]
) -> tuple[Any, Callable[[Any], Any]]:
    """(x after all blocks, the `see` function for the layer after them); taps `blockN` and, after stage S, `stageS`.

    Args:
      x: (B, H, W, C), the feature `stem`, or packed maps.
      counts: the number of blocks of each stage.
      width: channels of the first stage.
      block: `(x, see, width=…, stride=…, name=…) -> x`. A pre-activation block calls `see` with its input after BN and
        ReLU and continues with the result; `see` taps it as `NAME_relu`, after the name of the feature x.
    """
    names, number = ["stem"], 0  # names of the feature x; number of the last block
    for stage, count in enumerate(counts, 1):
        for i in range(count):
            number += 1
            place = dict(width=width * 2 ** (stage - 1), stride=2 if stage > 1 and i == 0 else 1)
            x = block(x, partial(_see, tap, names), **place, name=f"block{number}")
            names = [f"block{number}"] + [f"stage{stage}"] * (i == count - 1)
            for name in names:
                x = tap(name, x)
    return x, partial(_see, tap, names)


def _see(tap, names, x):
    """Taps the activated x as `NAME_relu` for each name of the feature before the activation."""
    for name in names:
        x = tap(f"{name}_relu", x)
    return x
