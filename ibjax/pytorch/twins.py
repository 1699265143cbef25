"""Builds the PyTorch twin of one of our networks from `ibjax.pytorch.networks`, and its source text for an export."""

import importlib
import inspect
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from ibjax.pytorch import torch_file
from ibjax.pytorch.architectures import ARCHITECTURES, Shape, State
from ibjax.pytorch.state_dicts import Normalization

DEFINITIONS = Path(__file__).parent / "networks"


def options(name: str, model: nn.Module, shape: Shape) -> dict[str, Any]:
    """The arguments of an architecture's PyTorch definition, for one of our models and images of shape (H, W, C)."""
    known = ARCHITECTURES[name]
    given = {**vars(model), "channels": shape[2], "image": tuple(shape[:2]), **known.twin}
    return {option: given[option] for option in inspect.signature(_definition(known)).parameters if option in given}


def make(
    name: str, model: nn.Module, shape: Shape, state: State | None = None, normalization: Normalization | None = None
) -> Any:
    """The PyTorch network in evaluation mode.

    state: its weights; None leaves them random. normalization: (mean, std); None normalises as `model` does.
    """
    torch = torch_file.modules()
    given = options(name, model, shape)
    if normalization:
        given |= dict(zip(("mean", "std"), normalization, strict=True))
    twin = _definition(ARCHITECTURES[name])(**given)
    if state is not None:
        weights = {key: torch.from_numpy(np.array(value)) for key, value in state.items()}
        buffers = {key: value for key, value in twin.state_dict().items() if key in ("mean", "std")}
        twin.load_state_dict({**weights, **buffers})
    return twin.eval()


def source(name: str, model: nn.Module, shape: Shape) -> str:
    """The text of model.py: the network's definition, and `load` with the options of this one."""
    known = ARCHITECTURES[name]
    given = options(name, model, shape).items()
    arguments = "".join(f"\n        {key}={value!r}," for key, value in given if value is not None)
    text = (DEFINITIONS / f"{known.torch}.py").read_text(encoding="utf-8")
    return f"{text.replace(_FIRST, _IMPORTS + _FIRST, 1)}{_LOAD.format(arguments=arguments)}"


def _definition(known):
    return importlib.import_module(f"ibjax.pytorch.networks.{known.torch}").Model


_FIRST = "from torch import nn\n"
_IMPORTS = "from safetensors.torch import load_file\n"
_LOAD = '''

def load(folder):
    """The network with the weights of model.safetensors in `folder`, in evaluation mode."""
    network = Model({arguments}
    )
    network.load_state_dict(load_file(f"{{folder}}/model.safetensors"))
    return network.eval()
'''
