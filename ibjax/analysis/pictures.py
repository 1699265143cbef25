"""PNG pictures of the analyses, on white, drawn without a display. matplotlib is loaded by the first of them.

Text in which a $ is to be a $, as a run's title, is given with parse_math=False.
"""

import argparse
import logging
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ibjax import disk, run
from ibjax.errors import InputError
from ibjax.results import attack_label
from ibjax.step import to_float

_DPI = 140


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --picture, for `check` and then for drawing."""
    parser.add_argument("--picture", type=disk.path, help="draw it into FILE.png")


def check(file: Path | None) -> None:
    """Raises InputError unless a picture of this name, if any, is a PNG; before the work, not after it."""
    if file is not None and file.suffix.lower() != ".png":
        raise InputError(f"--picture={file} is no PNG file; give a name that ends in .png")


def figure(width: float, height: float, layout: str | None = "constrained") -> Any:
    """An empty matplotlib Figure, in inches."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it reports every font that it finds
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout, facecolor="white")


def save(drawn: Any, file: Path) -> None:
    """Writes a Figure as a PNG, whole or not at all; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with run.replacing(file) as temporary:
        drawn.savefig(temporary, format="png", dpi=_DPI)


# ---- images ------------------------------------------------------------------------------------------------


def grid(labels: Sequence[str], columns: int, above: Sequence[float], right: float = 0.1) -> tuple[Any, np.ndarray]:
    """(Figure, panels (rows, columns)) without axes: a row for each label, which stands at its left and may have $x$.

    above, right: room over each row and at the right edge, in inches.
    """
    size, gap, left, top = 0.85, 0.05, 1.25, 0.3
    width, height = left + columns * (size + gap) + right, top + sum(above) + len(labels) * (size + gap)
    drawn = figure(width, height, layout=None)
    panels = np.empty((len(labels), columns), object)
    bottom = height - top
    for i, text in enumerate(labels):
        bottom -= above[i] + size + gap
        for j in range(columns):
            place = ((left + j * (size + gap)) / width, (bottom + gap) / height, size / width, size / height)
            panels[i, j] = drawn.add_axes(place)
            panels[i, j].set_axis_off()
        x, y = (left - 0.1) / width, (bottom + gap + size / 2) / height
        drawn.text(x, y, text, ha="right", va="center", fontsize=9)
    return drawn, panels


def attack_lines(name: str) -> str:
    """An attack's label in lines that fit the left of `grid`."""
    return "\n".join(textwrap.wrap(attack_label(name), 18))


def title(drawn: Any, text: str) -> None:
    """A line over the panels of `grid`, as small as it must be to fit."""
    size = min(9.0, 72 * 1.8 * drawn.get_figwidth() / len(text))  # a letter is about half as wide as high
    drawn.text(0.5, 1 - 0.18 / drawn.get_figheight(), text, ha="center", va="center", fontsize=size, parse_math=False)


def show(panel: Any, image: np.ndarray) -> None:
    """An (H, W, 1 or 3) image in [0, 1], or uint8, in a panel."""
    image = np.asarray(to_float(jnp.asarray(image)), np.float32)
    panel.imshow(np.broadcast_to(np.clip(image, 0, 1), (*image.shape[:2], 3)), interpolation="nearest")
