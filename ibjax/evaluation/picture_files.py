"""Files of pictures: PNG, PDF and SVG, by the ending of the name; the same numbers give the same bytes."""

import logging
from pathlib import Path
from typing import Any

from ibjax import files

SUFFIXES = (".png", ".pdf", ".svg")
_DPI = 300
_STYLE = {
    "svg.fonttype": "none",  # text stays text instead of outlines
    "pdf.fonttype": 42,
    "svg.hashsalt": "ibjax",
}
_METADATA: dict[str, dict[str, None]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}


def quiet_fonts() -> None:
    """Keeps matplotlib and fontTools from logging every font that they find; call it before they are imported."""
    for chatty in ("matplotlib", "fontTools"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def save(drawn: Any, target: Path, suffix: str) -> None:
    """Writes a matplotlib Figure to `target` as what `suffix` says: .png with 300 dots per inch, .pdf or .svg."""
    from matplotlib import rc_context

    kind = suffix.lower().removeprefix(".")
    with rc_context(_STYLE):
        drawn.savefig(target, format=kind, dpi=_DPI, metadata=_METADATA.get(kind))


def write(drawn: Any, file: Path) -> None:
    """Writes a Figure, whole or not at all, as what the file's ending says."""
    with files.replacing(file) as temporary:
        save(drawn, temporary, file.suffix)
