"""PyTorch's files: the weights and statistics of a network, out of whatever its checkpoint wraps them in.

Nothing is ever unpickled: a file that holds more than tensors and plain containers is refused.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ibjax.errors import CheckpointError, InputError

# where checkpoints keep the weights among other things, and what wrappers put before every name
_KEYS = ("state_dict", "model_state_dict", "net", "model", "network", "module", "weights", "last")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "1.")
_MEANS, _STDS = ("mean", "mu", "new_mean"), ("std", "sigma", "new_std")


def modules() -> Any:
    """PyTorch, which only conversion needs; raises InputError where it or safetensors is not installed."""
    try:
        import safetensors  # noqa: F401
        import torch
    except ModuleNotFoundError as error:
        raise InputError(f"ibjax.convert needs {error.name}: pip install 'ibjax[torch]'") from None
    return torch


def read(file: Path) -> tuple[dict[str, np.ndarray], tuple[tuple[float, ...], tuple[float, ...]] | None]:
    """(weights and statistics by their names in PyTorch, (mean, std) where the network keeps them) of a file."""
    torch = modules()
    if not file.is_file():
        raise InputError(f"--torch={file} is no file; give a .pt, .pth, .t7 or .safetensors file")
    content = _load_safetensors(file) if file.suffix == ".safetensors" else _load(torch, file)
    tensors = _find_tensors(torch, content)
    if not tensors:
        there = ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(f"{file} holds no state dict; it has {there}; save network.state_dict() alone")
    arrays = {key: value.to(torch.float32).numpy() for key, value in tensors.items() if value.is_floating_point()}
    return _split_off_normalization(str(file), _without_prefixes(arrays))


def _load(torch, file):
    """The content of a file of torch.save: tensors and plain containers, nothing that would run code."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if not found:
            raise CheckpointError(f"{file} is damaged, or no file of torch.save; download it again") from None
        raise CheckpointError(
            f"{file} holds more than tensors ({found[1]}), which to load would run code of whoever made it: refused. "
            f"Where it is trusted, save the weights alone: torch.save(network.state_dict(), FILE)"
        ) from None
    except Exception as error:  # a damaged file makes zip, pickle and torch raise what they like
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(f"{file} is damaged, or no file of torch.save ({reason}); download it again") from None


def _load_safetensors(file):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged, or no safetensors file ({error}); download it again") from None


def _find_tensors(torch, content):
    """The state dict in whatever a checkpoint wraps it in: a mapping with names of layers, whose values are tensors."""
    if not isinstance(content, Mapping):
        return {}
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and torch.is_tensor(value)}
    if any("." in key for key in tensors):
        return tensors
    found = (_find_tensors(torch, content[key]) for key in _KEYS if key in content)
    return next(filter(None, found), {})


def _without_prefixes(state):
    """What DataParallel, compilation and wrappers put before every name is taken away."""
    while True:
        names = [key for key in state if not _is_normalization(key, state)]
        prefix = next((p for p in _PREFIXES if names and all(key.startswith(p) for key in names)), None)
        if prefix is None:
            return state
        state = {key.removeprefix(prefix): value for key, value in state.items()}


def _is_normalization(key, state):
    *above, last = key.split(".")
    return last in (*_MEANS, *_STDS) and len(above) <= 3 and state[key].size in (1, 3)


def _split_off_normalization(where, state):
    """The robustness library saves a network and its normaliser twice, the second time below `attacker`."""
    for key in [key for key in state if key.startswith("attacker.")]:
        twin = key.removeprefix("attacker.")
        if twin in state and np.array_equal(state[key], state[twin]):
            del state[key]
    state = _without_prefixes(state)
    found = {}
    for kind, names in (("mean", _MEANS), ("std", _STDS)):
        keys = [key for key in state if _is_normalization(key, state) and key.split(".")[-1] in names]
        found[kind] = {tuple(float(str(v)) for v in np.broadcast_to(state.pop(key).reshape(-1), 3)) for key in keys}
    if not found["mean"] and not found["std"]:
        return state, None
    if len(found["mean"]) != 1 or len(found["std"]) != 1:
        raise CheckpointError(f"{where} keeps several means or standard deviations of its pixels: {found}")
    return state, (found["mean"].pop(), found["std"].pop())
