"""Pictures of the analyses, on white, drawn without a display. matplotlib is loaded by the first of them.

A file's name says its kind: .png in 300 dots an inch, or .pdf and .svg, whose lines and letters stay lines and letters.
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

from ibjax import files
from ibjax.analysis import output
from ibjax.errors import InputError
from ibjax.evaluation.results import attack_label
from ibjax.step import to_float

SUFFIXES = (".png", ".pdf", ".svg")
_DPI = 300
_STYLE = {
    "svg.fonttype": "none",  # letters, not their outlines
    "pdf.fonttype": 42,
    "svg.hashsalt": "ibjax",  # the same numbers give the same bytes
}
_METADATA: dict[str, dict[str, None]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --picture, for `check` and then for drawing."""
    parser.add_argument("--picture", type=files.path, help="draw it into FILE.pdf, FILE.svg or FILE.png")


def check(file: Path | None) -> None:
    """Raises InputError unless the name of a picture, if any, says a known kind; before the work, not after it."""
    if file is not None and file.suffix.lower() not in SUFFIXES:
        raise InputError(f"--picture={file} has no known ending; give a name that ends in {', '.join(SUFFIXES)}")


def figure(width: float, height: float, layout: str | None = "constrained") -> Any:
    """An empty matplotlib Figure, in inches."""
    for chatty in ("matplotlib", "fontTools"):  # they report every font and every part of one
        logging.getLogger(chatty).setLevel(logging.WARNING)
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout, facecolor="white")


def save(drawn: Any, file: Path) -> None:
    """Writes a Figure, whole or not at all, and says where; its folder is made."""
    from matplotlib import rc_context

    kind = file.suffix.lower().removeprefix(".")
    with output.writing(file) as temporary, rc_context(_STYLE):
        drawn.savefig(temporary, format=kind, dpi=_DPI, metadata=_METADATA.get(kind))


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


def short(name: str) -> str:
    """A class's name as far as it fits over an image of `grid`."""
    return name if len(name) <= 14 else f"{name[:13]}…"


def title(drawn: Any, text: str) -> None:
    """A line over the panels of `grid`, as small as it must be to fit."""
    size = min(9.0, 72 * 1.8 * drawn.get_figwidth() / len(text))  # a letter is about half as wide as high
    drawn.text(0.5, 1 - 0.18 / drawn.get_figheight(), text, ha="center", va="center", fontsize=size, parse_math=False)


def show(panel: Any, image: np.ndarray) -> None:
    """An (H, W, 1 or 3) image in [0, 1], or uint8, in a panel."""
    image = np.asarray(to_float(jnp.asarray(image)), np.float32)
    panel.imshow(np.broadcast_to(np.clip(image, 0, 1), (*image.shape[:2], 3)), interpolation="nearest")
