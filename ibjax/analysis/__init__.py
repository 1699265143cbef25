"""Analyses of trained networks, and of the cost of training them."""

import typing

from ibjax import lazy

if typing.TYPE_CHECKING:
    from ibjax.analysis import (
        attention,
        binarisation,
        calibration,
        complexity,
        corruptions,
        embedding,
        flops,
        layers,
        mask,
        modulation,
        plane,
        score_cam,
        singular,
        tendency,
    )

__all__ = [
    "attention",
    "binarisation",
    "calibration",
    "complexity",
    "corruptions",
    "embedding",
    "flops",
    "layers",
    "mask",
    "modulation",
    "plane",
    "score_cam",
    "singular",
    "tendency",
]
__getattr__, __dir__ = lazy.attach(__name__, __all__)
