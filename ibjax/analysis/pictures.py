"""Pictures of the analyses, on a white background, drawn without a display. matplotlib is imported on first use.

The suffix of the file determines the format: .png with 300 dots per inch, or the vector formats .pdf and .svg, which
keep text as text. Pass parse_math=False for text in which a $ is literal, such as a run's title.
"""

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ibjax import files
from ibjax.analysis import output
from ibjax.errors import InputError
from ibjax.evaluation import picture_files
from ibjax.evaluation.picture_files import SUFFIXES
from ibjax.evaluation.results import attack_label
from ibjax.net import to_float


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --picture, the file to draw into; `check` verifies it."""
    parser.add_argument("--picture", type=files.path, help="draw it into FILE.pdf, FILE.svg or FILE.png")


def check(file: Path | None) -> None:
    """Raises InputError if `file` is given and has an unknown suffix; call it before the computation."""
    if file is not None and file.suffix.lower() not in SUFFIXES:
        raise InputError(f"--picture={file} has no known ending; give a name that ends in {', '.join(SUFFIXES)}")


def figure(width: float, height: float, layout: str | None = "constrained") -> Any:
    """An empty matplotlib Figure, in inches."""
    picture_files.quiet_fonts()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout, facecolor="white")


def save(drawn: Any, file: Path) -> None:
    """Writes a Figure, whole or not at all, and reports the path; creates the folder."""
    with output.writing(file) as temporary:
        picture_files.save(drawn, temporary, file.suffix)


# ---- images ------------------------------------------------------------------------------------------------


def grid(labels: Sequence[str], columns: int, above: Sequence[float], right: float = 0.1) -> tuple[Any, np.ndarray]:
    """(Figure, panels (rows, columns)) without axes: one row per label, printed to its left; labels may contain $x$.

    above, right: space above each row and at the right edge, in inches.
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
    """An attack's label, broken into lines that fit left of `grid`."""
    return "\n".join(textwrap.wrap(attack_label(name), 18))


def short(name: str) -> str:
    """A class name, shortened to fit above an image of `grid`."""
    return name if len(name) <= 14 else f"{name[:13]}…"


def title(drawn: Any, text: str) -> None:
    """Writes a title above the panels of `grid`, in a font size that fits."""
    size = min(9.0, 72 * 1.8 * drawn.get_figwidth() / len(text))  # a letter is about half as wide as high
    drawn.text(0.5, 1 - 0.18 / drawn.get_figheight(), text, ha="center", va="center", fontsize=size, parse_math=False)


def show(panel: Any, image: np.ndarray) -> None:
    """Shows an image (H, W, 1 or 3), in [0, 1] or uint8, in a panel."""
    image = np.asarray(to_float(jnp.asarray(image)), np.float32)
    panel.imshow(np.broadcast_to(np.clip(image, 0, 1), (*image.shape[:2], 3)), interpolation="nearest")
