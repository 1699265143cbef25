"""The stages of a network: their blocks in order, with a tap after each block and each stage.

Stage s of a residual network has `width`·2^(s − 1) channels; from the second stage on, its first block halves the
resolution.
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


def in_turn(x: Any, tap: layers.Taps, counts: Sequence[int], block: Callable[[Any, int, int, int], Any]) -> Any:
    """x after all blocks; taps `blockN` and, after stage S, `stageS`.

    Args:
      counts: the number of blocks of each stage.
      block: (x, number of the stage from 1, place of the block in it from 0, number N of the block from 1) -> x.
    """
    number = 0
    for stage, count in enumerate(counts, 1):
        for i in range(count):
            number += 1
            x = tap(f"block{number}", block(x, stage, i, number))
        x = tap(f"stage{stage}", x)
    return x


def through(
    x: Array | Packed, tap: layers.Taps, counts: Sequence[int], width: int, block: Callable[..., Any]
) -> tuple[Any, Callable[[Any], Any]]:
    """(x after all blocks of a residual network, the `see` function for the layer after them); taps as in `in_turn`.

    Args:
      x: (B, H, W, C), the feature `stem`, or packed maps.
      counts: the number of blocks of each stage.
      width: channels of the first stage.
      block: `(x, see, width=…, stride=…, name=…) -> x`. A pre-activation block calls `see` with its input after BN and
        ReLU and continues with the result; `see` taps it as `NAME_relu`, after the name of the feature x.
    """

    def one(x, stage, i, number):
        names = [f"block{number - 1}"] + [f"stage{stage - 1}"] * (i == 0) if number > 1 else ["stem"]  # of x
        place = dict(width=width * 2 ** (stage - 1), stride=2 if stage > 1 and i == 0 else 1)
        return block(x, partial(_see, tap, names), **place, name=f"block{number}")

    x = in_turn(x, tap, counts, one)
    return x, partial(_see, tap, [f"block{sum(counts)}", f"stage{len(counts)}"])


def _see(tap, names, x):
    """Taps the activated x as `NAME_relu` for each name of the feature before the activation."""
    for name in names:
        x = tap(f"{name}_relu", x)
    return x
