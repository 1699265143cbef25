"""Compares the logits of a PyTorch network and of ours on the same real images; conversion requires that they agree."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ibjax.data import Split, stratified
from ibjax.devices import precision
from ibjax.errors import CheckpointError, InputError
from ibjax.net import float_on_host, linen_net, to_float
from ibjax.pytorch import torch_file
from ibjax.pytorch.architectures import Shape
from ibjax.runs import run

TOLERANCE = 1e-4  # maximum difference between two logits
_BATCH = 64  # images at a time


class Images(NamedTuple):
    """The images on which both networks are compared."""

    split: Split  # (N, H, W, C) uint8 and labels (N,)
    facts: dict[str, Any]  # description of the data for config.json
    words: str  # description of the images for messages

    @property
    def shape(self) -> Shape:
        """(H, W, C)."""
        height, width, channels = self.split.images.shape[1:]
        return height, width, channels


def images(settings: ConfigDict, classes: int, channels: int, n: int, side: int | None) -> Images:
    """`n` test images of the configuration's data set, stratified by class; with `side`, crops of photographs."""
    if side is not None:
        facts = {"label": "photographs", "input_shape": [side, side, channels], "num_classes": classes}
        words = f"{n} crops of scikit-learn's two photographs"
        return Images(
            Split(crops(side, n, channels), np.zeros(n, np.int32)), {**facts, "digests": {"test": None}}, words
        )
    data = run.load_data(settings)
    if data.num_classes != classes:
        raise InputError(
            f"the network has {classes} classes, {data.label} has {data.num_classes}; "
            f"give its data set with --config.data.dataset=… or --config.data.name=…"
        )
    if data.test.images.shape[-1] != channels:
        raise InputError(
            f"the network takes images of {channels} channels, those of {data.label} are {data.test.images.shape[1:]}"
        )
    n = min(n, len(data.test.labels))
    chosen = stratified(data.test.labels, n, seed=0)
    split = Split(data.test.images[chosen], data.test.labels[chosen])
    return Images(split, run.facts(data), f"{n} test images of {data.label}")


def crops(side: int, n: int, channels: int = 3) -> np.ndarray:
    """Random crops (n, side, side, channels) uint8 of the photographs that scikit-learn ships, the same in every call.

    With channels=1 a crop is the mean of the three colour channels.
    """
    from sklearn.datasets import load_sample_images

    if channels not in (1, 3):
        raise InputError(f"--photographs have 3 channels or 1, the network takes {channels}; give its data set")
    photographs: Any = load_sample_images()
    height, width, _ = np.minimum(*(image.shape for image in photographs.images))
    if not 8 <= side <= min(height, width):
        raise InputError(f"--photographs={side} is not allowed; give a side of 8 to {min(height, width)} pixels")
    rng, found = np.random.default_rng(0), []
    for i in range(n):
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        found.append(photographs.images[i % 2][top : top + side, left : left + side])
    stacked = np.stack(found)
    return stacked if channels == 3 else stacked.mean(-1, keepdims=True).round().astype(np.uint8)


def of_torch(twin: Any, images: np.ndarray) -> np.ndarray:
    """Logits (N, classes) of a PyTorch network on images (N, H, W, C) uint8."""
    torch = torch_file.modules()
    x = torch.from_numpy(np.array(to_float(jnp.asarray(images)))).permute(0, 3, 1, 2)
    with torch.no_grad():
        return torch.cat([twin(part) for part in x.split(_BATCH)]).numpy()


def of_ours(model: nn.Module, variables: Any, images: np.ndarray) -> np.ndarray:
    """The same of ours, in float32 throughout, whatever the network was trained in."""
    predict = _predict(model.clone(dtype="float32"))
    x = float_on_host(images)
    with precision.at(precision.JUDGEMENT):  # accelerators round inputs of convolutions otherwise
        return np.concatenate([predict(variables, x[i : i + _BATCH])[0] for i in range(0, len(x), _BATCH)])


@functools.lru_cache(maxsize=4)
def _predict(model):
    return jax.jit(linen_net(model).predict)


def compare(ours: np.ndarray, theirs: np.ndarray, images: str, hint: str) -> float:
    """max |Δlogit|; raises CheckpointError where it is too large, or not a number."""
    delta = float(np.abs(ours - theirs).max())
    if not delta <= TOLERANCE:
        raise CheckpointError(
            f"logits of PyTorch's network and ours differ by up to {delta:.3g} on {images}, allowed {TOLERANCE:g}; "
            f"nothing is written ({hint})"
        )
    return delta
