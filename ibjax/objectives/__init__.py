"""Training methods: one paper, one file; each has a factory of its name that returns an `Objective`."""

import typing

from ibjax import lazy

if typing.TYPE_CHECKING:
    from ibjax.objectives import (
        alp,
        ara,
        ard,
        ceb,
        dkl,
        hat,
        hbar,
        iad,
        ib_rar,
        ibd,
        infoat_r,
        label_smoothing,
        mart,
        mma,
        pgd_at,
        rslad,
        score,
        shared_information,
        siriib,
        standard,
        te,
        trades,
        vib,
    )

__all__ = [
    "alp",
    "ara",
    "ard",
    "ceb",
    "dkl",
    "hat",
    "hbar",
    "iad",
    "ib_rar",
    "ibd",
    "infoat_r",
    "label_smoothing",
    "mart",
    "mma",
    "pgd_at",
    "rslad",
    "score",
    "shared_information",
    "siriib",
    "standard",
    "te",
    "trades",
    "vib",
]
__getattr__, __dir__ = lazy.attach(__name__, __all__)
