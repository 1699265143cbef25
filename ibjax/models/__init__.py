"""Networks: one family, one file; each has a class `Model` that returns `(logits, features)`."""

import typing

from ibjax import lazy

if typing.TYPE_CHECKING:
    from ibjax.models import (
        cnn,
        convnext,
        masked,
        preact_resnet,
        resnet,
        siriib,
        stochastic,
        swin,
        vgg,
        vit,
        wide_resnet,
        xcit,
    )

__all__ = [
    "cnn",
    "convnext",
    "masked",
    "preact_resnet",
    "resnet",
    "siriib",
    "stochastic",
    "swin",
    "vgg",
    "vit",
    "wide_resnet",
    "xcit",
]
__getattr__, __dir__ = lazy.attach(__name__, __all__)
