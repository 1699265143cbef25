"""The published networks of `ibjax.pytorch.networks` as oracles: random weights that hide no mistake, and features."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ibjax.pytorch import twins


def make(arch, model, shape=(32, 32, 3)):
    """The PyTorch network that a model of ours should be for images (H, W, C), with random weights."""
    return randomize(twins.make(arch, model, shape))


def randomize(twin):
    """Weights, scales, biases and running statistics that hide no mistake."""
    with torch.no_grad():
        for module in twin.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(0.7, 1.3)
                module.bias.normal_(0, 0.3)
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2.0)
            elif isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.7, 1.3)
                module.bias.normal_(0, 0.3)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)  # PyTorch's own start lets the image fade on its way
                if module.bias is not None:
                    module.bias.normal_(0, 0.3)
            for name in ("gamma", "gamma1", "gamma2", "gamma3", "temperature"):
                if isinstance(getattr(module, name, None), nn.Parameter):
                    getattr(module, name).uniform_(0.3, 0.8)
            for name in ("cls_token", "pos_embed", "relative_position_bias_table"):
                if isinstance(getattr(module, name, None), nn.Parameter):
                    getattr(module, name).normal_(0, 0.5)
        head(twin).weight.mul_(0.1)  # logits of the size that trained networks have
    return twin.eval()


def head(twin):
    """The last linear layer."""
    *_, last = (module for module in twin.modules() if isinstance(module, nn.Linear))
    return last


def state(twin):
    """{name: array} of weights and statistics, without counters and the constants of normalisation."""
    values = twin.state_dict().items()
    return {key: value.numpy().copy() for key, value in values if value.ndim and key not in ("mean", "std")}


def nchw(images):
    return torch.from_numpy(np.moveaxis(images, -1, 1).copy())


def logits(twin, images):
    with torch.no_grad():
        return twin(nchw(images)).numpy()


def logits_and_taps(twin, images):
    """(logits, {name of our tap: value as ours has it}), both arrays."""
    taps, handles = {}, []
    ours = type(twin).__module__.endswith(".swin")  # whose maps have their channels last

    def record(*names, act=lambda value: value):
        def hook(module, inputs, output):
            for name in names:
                value = act(output).detach().numpy()
                taps.update({name: value} if ours else _as_ours(name, value))

        return hook

    def record_input(name):
        return lambda module, inputs: record(name)(module, None, inputs[0])

    for module, names, act in _recorded(twin):
        handles.append(module.register_forward_hook(record(*names, act=act)))
    handles.append(head(twin).register_forward_pre_hook(record_input("pre_logits")))
    blocks = [module for module in twin.modules() if type(module).__name__ == "Block"]
    if blocks:
        handles.append(blocks[0].register_forward_pre_hook(record_input("stem")))
    output = logits(twin, images)
    for handle in handles:
        handle.remove()
    return output, taps


def _as_ours(name, value):
    """{tap: value}: maps with channels last; of tokens (B, N, C) their map, and the class token by itself."""
    if value.ndim == 4:
        return {name: np.moveaxis(value, 1, -1)}
    if value.ndim < 3:
        return {name: value}
    side = math.isqrt(value.shape[1])
    first = {} if side**2 == value.shape[1] else {f"{name}_class": value[:, 0]}
    return {name: value[:, len(first) :].reshape(len(value), side, side, -1), **first}


def _recorded(twin):
    """(module, names of its output, what is done to the output first) of all but the first and the last tap."""
    same = lambda value: value  # noqa: E731
    if not any(type(module).__name__ == "Block" for module in twin.modules()):  # VGG and the small CNNs
        counts = {"conv": 0, "stage": 0, "fc": 0}
        for layer in twin.modules():
            kind = "fc" if counts["stage"] and hasattr(twin, "classifier") and layer in [*twin.classifier] else "conv"
            name = {nn.ReLU: kind, nn.MaxPool2d: "stage"}.get(type(layer))
            if name:
                counts[name] += 1
                yield layer, [f"{name}{counts[name]}"], same
        for i in range(1, getattr(twin, "count", 0) + 1):
            yield getattr(twin, f"fc{i}"), [f"fc{i}"], F.relu
        return
    if isinstance(blocks := getattr(twin, "blocks", None), nn.Sequential | nn.ModuleList):  # no stages
        yield from ((block, [f"block{i}"], same) for i, block in enumerate(blocks, 1))
        return
    groups = [m for m in twin.modules() if isinstance(m, nn.Sequential) and len(m) and type(m[0]).__name__ == "Block"]
    act = getattr(twin, "activation", F.relu)
    one = groups[0][0]
    pre_activation = not hasattr(one, "projection") and (hasattr(one, "bn1") or hasattr(one, "batchnorm_0"))
    names, index = ["stem"], 0
    for stage, group in enumerate(groups, 1):
        for i, block in enumerate(group):
            if pre_activation:
                norm = getattr(block, "bn1", None) or block.batchnorm_0
                yield norm, [f"{name}_relu" for name in names], act
            index += 1
            names = [f"block{index}"] + [f"stage{stage}"] * (i == len(group) - 1)
            yield block, names, same
    last = next((m for name in ("bn", "bn1", "batchnorm") if (m := getattr(twin, name, None)) is not None), None)
    if pre_activation and last is not None:
        yield last, [f"{name}_relu" for name in names], act
