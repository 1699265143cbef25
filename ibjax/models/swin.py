"""Swin transformer: Liu et al., "Hierarchical Vision Transformer using Shifted Windows", ICCV 2021.

    block:    x + W Attn(LN(x)),  then  x + MLP(LN(x))             Attn: in each window of w×w positions, by heads,
              softmax(q kᵀ / √d + B) v                             B: learnt for each head and relative position
    shift:    every second block of a stage rolls the map by ⌊w/2⌋ rows and columns before attention and back after it;
              −100 is added where two positions of a window are no neighbours in the map
    merging:  LN of each 2×2 positions, 4C channels, then a linear layer to 2C     before each stage but the first
    head:     LN, spatial mean, linear layer

Stages have widths width·(1, 2, 4, 8), and heads of 32 channels. Logits equal timm's.

| size | depth | blocks         | width |
|------|-------|----------------|-------|
| T    | 12    | (2, 2, 6, 2)   | 96    |
| S    | 24    | (2, 2, 18, 2)  | 96    |
| B    | 24    | (2, 2, 18, 2)  | 128   |
| L    | 24    | (2, 2, 18, 2)  | 192   |

A window is at most as large as its map. Where it is the whole map, nothing is shifted: at 224 pixels the last stage has
7×7 positions, one window. The shape of B follows from the windows, so a trained network accepts another image size
only if the windows stay the same in every stage.

| epsilon of LN | in the networks of                                                            |
|---------------|-------------------------------------------------------------------------------|
| 1e-5          | Liu et al. 2021 and timm, and so ARES (Liu et al. 2023) and Mo et al. 2022    |
| 1e-6          | Xu et al. 2024 (MIMIR)                                                        |

Taps: `stem` (what enters stage 1), `blockN`, `stageN`, `pre_logits`.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from ibjax.errors import InputError, check_range
from ibjax.models import layers, patches, stages

DEPTHS = {12: (2, 2, 6, 2), 24: (2, 2, 18, 2)}
HEAD = 32  # channels of a head where the number of heads is not given
_APART = -100.0  # added to the scores of positions that the shift alone has brought into one window

Sides = tuple[int, int]  # rows, columns


class WindowAttention(nn.Module):
    """Attention within the windows of a map (B, H, W, C), whose sides are multiples of those of the windows.

    shift: rows and columns by which the map is rolled before and back after.
    """

    heads: int
    window: Sides
    shift: Sides
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape, bias = x.shape, self._bias()
        if any(self.shift):
            x = jnp.roll(x, [-step for step in self.shift], (1, 2))
            apart = _APART * apart_in_windows((shape[1], shape[2]), self.window, self.shift)
            bias = bias + jnp.asarray(apart, jnp.float32)[:, None]  # (windows, heads, n, n)
        y = patches.attention(to_windows(x, self.window), self.heads, self.dtype, bias)
        y = from_windows(y, shape, self.window)
        return jnp.roll(y, self.shift, (1, 2)) if any(self.shift) else y

    def _bias(self):
        """B (1, heads, n, n), n positions of a window; the table has an entry for each relative position."""
        rows, columns = self.window
        shape = (self.heads, (2 * rows - 1) * (2 * columns - 1))
        table = self.param("relative_position_bias_table", nn.initializers.normal(0.02), shape)
        return table[:, relative_positions(self.window)][None]


class Merging(nn.Module):
    """(B, H, W, C) -> (B, H/2, W/2, 2C): LN of each 2×2 positions, columns first, and a linear layer without bias."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 4, 2, 5).reshape(b, h // 2, w // 2, 4 * c)
        x = patches.LayerNorm(self.epsilon, self.dtype, name="norm")(x)
        options = dict(use_bias=False, kernel_init=patches.INIT["kernel_init"], dtype=self.dtype)
        return layers.Dense(2 * c, name="reduction", **options)(x)


class Model(nn.Module):
    """(B, H, W, C) in [0, 1] -> (logits (B, num_classes), features); num_classes None: (pre_logits, features).

    depth: 12 or 24. blocks: number of blocks in each stage, in place of the depth's default. heads: of the first stage,
    twice as many in each further one; None: one for each 32 channels. patch: side of the patches in pixels. window:
    side of the windows in positions. epsilon: of all layer norms. drop_path: rate of stochastic depth in the last
    block; it rises linearly from 0. remat: saves memory, see `layers.remat`.
    """

    num_classes: int | None
    depth: int = 12
    width: int = 96
    blocks: tuple[int, ...] | None = None
    heads: int | None = None
    patch: int = 4
    window: int = 7
    epsilon: float = 1e-5
    drop_path: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    dtype: str = "float32"
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: Array, train: bool = False, edits: layers.Edits | layers.Taps | None = None
    ) -> tuple[Array, dict[str, Array]]:
        counts = stages.block_counts("swin", self.depth, self.blocks, DEPTHS)
        heads = self._check(x, len(counts))
        dtype, tap = layers.compute_dtype(self.dtype), layers.Taps(edits)
        options = dict(padding=0, use_bias=True, dtype=dtype, pixels=True)
        x = layers.Conv(self.width, self.patch, self.patch, name="stem", **options)(
            layers.normalize(x, self.mean, self.std)
        )
        x = tap("stem", patches.LayerNorm(self.epsilon, dtype, name="norm_stem")(x))
        rates = patches.rates(self.drop_path, sum(counts))

        def block(x, stage, i, number):
            if stage > 1 and i == 0:
                x = Merging(self.epsilon, dtype, name=f"downsample{stage}")(x)
            window, shift = windows((x.shape[1], x.shape[2]), self.window)
            place = (heads * 2 ** (stage - 1), window, shift if i % 2 else (0, 0))
            attention = functools.partial(WindowAttention, *place, dtype, name="attn")
            options = dict(epsilon=self.epsilon, name=f"block{number}")
            return patches.Block(attention, rates[number - 1], dtype, self.remat, **options)(x, train)

        x = stages.in_turn(x, tap, counts, block)
        x = layers.GlobalAverage()(patches.LayerNorm(self.epsilon, name="norm")(x))
        return layers.classifier(tap("pre_logits", x), self.num_classes, **patches.INIT), tap.finish()

    def _check(self, x, count):
        """The number of heads in the first stage, of a network of `count` stages."""
        check_range("model.drop_path", self.drop_path, 0, 1, below=True)
        if self.window < 1:
            raise InputError(f"model.window={self.window} is not allowed; give a whole number of at least 1")
        patches.check_sides("swin", x, self.patch * 2 ** (count - 1))
        for side in {length // (self.patch * 2**stage) for length in x.shape[1:3] for stage in range(count)}:
            if side % min(side, self.window):
                raise InputError(
                    f"swin: images of {x.shape[1:3]} pixels have maps with {side} rows or columns, which do not divide "
                    f"into windows of {self.window}×{self.window}; give another model.window or model.patch"
                )
        return patches.heads_for(self.width, self.heads, HEAD)


def windows(sides: Sides, window: int) -> tuple[Sides, Sides]:
    """(sides of the windows, shift) of the maps of a stage; where a window is as long as the map, the shift is 0."""
    rows, columns = (min(side, window) for side in sides)
    shift = (0 if rows == sides[0] else rows // 2, 0 if columns == sides[1] else columns // 2)
    return (rows, columns), shift


def to_windows(x: Array, window: Sides) -> Array:
    """(B, H, W, C) -> (B·windows, positions, C), windows and positions by rows."""
    (b, h, w, c), (rows, columns) = x.shape, window
    x = x.reshape(b, h // rows, rows, w // columns, columns, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, rows * columns, c)


def from_windows(x: Array, shape: tuple[int, ...], window: Sides) -> Array:
    """The inverse of `to_windows`, to maps of this shape."""
    (b, h, w, c), (rows, columns) = shape, window
    return x.reshape(b, h // rows, w // columns, rows, columns, c).transpose(0, 1, 3, 2, 4, 5).reshape(shape)


def relative_positions(window: Sides) -> np.ndarray:
    """(n, n) int: for each two positions of a window of n, the number of their relative position, by rows."""
    row, column = np.divmod(np.arange(window[0] * window[1]), window[1])
    rows, columns = (place[:, None] - place[None] + side - 1 for place, side in zip((row, column), window, strict=True))
    return rows * (2 * window[1] - 1) + columns


def apart_in_windows(sides: Sides, window: Sides, shift: Sides) -> np.ndarray:
    """(windows, n, n) bool: whether two positions of a window of the rolled map come from opposite ends of the map."""
    ends = [np.arange(side) >= side - step for side, step in zip(sides, shift, strict=True)]  # rolled to the other end
    parts = 2 * ends[0][:, None] + ends[1][None]
    (h, w), (rows, columns) = sides, window
    parts = parts.reshape(h // rows, rows, w // columns, columns).transpose(0, 2, 1, 3).reshape(-1, rows * columns)
    return parts[:, :, None] != parts[:, None]
