"""Infers our model's options (depth, width, classes) from the names and shapes of a PyTorch network."""

import math
import re
from typing import Any

import flax.linen as nn

from ibjax.models import convnext, swin, vgg
from ibjax.pytorch.architectures import ARCHITECTURES, Shape, State, anchors


def sizes(name: str, state: State) -> dict[str, Any]:
    """Our options as inferred from names and shapes, including `num_classes`.

    For a file of another architecture the result is a guess, which `fit.check` then rejects.
    """
    known = ARCHITECTURES[name]
    if known.model == "vgg":
        return _vgg_sizes(state)
    if known.model == "cnn":
        return _cnn_sizes(name, state)
    shapes = {key: value.shape for key, value in state.items()}
    if known.model in ("convnext", "swin", "vit", "xcit"):
        return _patch_sizes(name, shapes)
    stem, head = (shapes.get(f"{known.names[layer]}.weight") or None for layer in ("stem", "head"))
    found: dict[str, Any] = {"num_classes": head[0] if head else 10}
    matches = [re.match(known.block_pattern + r"\.(\w+)", key) for key in state]
    blocks = {(int(match[1]), int(match[2])) for match in matches if match}
    stages = sorted({stage for stage, _ in blocks})
    counts = tuple(sum(stage == other for other, _ in blocks) for stage in stages)
    first = known.block.format(stage=0, stage1=1, index=0)
    width = _channels(shapes, f"{first}.{known.names.get('conv1', 'conv1')}.weight")
    if known.model == "wide_resnet":
        return found | {"depth": 6 * max(counts, default=4) + 4, "width": max((width or 160) // 16, 1)}
    if stem:
        found["width"] = stem[0]
    if known.model == "preact_resnet":
        found["final_norm"] = f"{known.names.get('bn', 'bn')}.weight" in state
    depths = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
    if any(match[3] == "conv3" for match in matches if match):
        depths = {50: (3, 4, 6, 3)}
        found["inner_width"] = max(4 * (width or 0) // (_channels(shapes, f"{first}.conv3.weight") or 4), 1)
    depth = next((depth for depth, usual in depths.items() if usual == counts), None)
    return found | ({"depth": depth} if depth else {"depth": next(iter(depths)), "blocks": counts or None})


def _patch_sizes(name, shapes):
    """Of ConvNeXt, Swin, ViT and XCiT; the width is that of the first block."""
    known = ARCHITECTURES[name]
    family, head = known.model, f"{known.names.get('head', 'head')}.weight"
    found: dict[str, Any] = {"num_classes": _channels(shapes, head) or 10}
    if family in ("convnext", "swin"):
        depths = convnext.DEPTHS if family == "convnext" else swin.DEPTHS
        pattern = known.block_pattern + r"\."
        places = {(int(m[1]), int(m[2])) for key in shapes if (m := re.match(pattern, key))}
        counts = tuple(sum(stage == other for other, _ in places) for stage in sorted({stage for stage, _ in places}))
        depth = next((depth for depth, usual in depths.items() if usual == counts), None)
        found |= {"depth": depth} if depth else {"blocks": counts or None}
        if family == "swin":
            return found | _swin_sizes(shapes)
        return found | {"width": _channels(shapes, "stages.0.blocks.0.gamma") or 96}
    places = {int(m[1]) for key in shapes if (m := re.match(r"blocks\.(\d+)\.", key))}
    found |= {"depth": max(len(places), 1), "width": (shapes.get("cls_token") or (384,))[-1]}
    if family == "xcit":
        classes = {int(m[1]) for key in shapes if (m := re.match(r"cls_attn_blocks\.(\d+)\.", key))}
        return found | {"heads": _channels(shapes, "blocks.0.attn.temperature") or 8, "class_depth": len(classes)}
    stem = shapes.get(anchors(name)[0]) or ()
    if len(stem) == 4 and name == "vit":
        found["patch"] = stem[-1]
    elif len(stem) == 4:
        found["stem_width"] = stem[0]
    return found


def _swin_sizes(shapes):
    stem, table = shapes.get("patch_embed.proj.weight", ()), shapes.get(_TABLE.format(0), ())
    found = {"width": stem[0], "patch": stem[-1]} if len(stem) == 4 else {}
    return found | ({"window": _window(table), "heads": table[1]} if len(table) == 2 else {})


_TABLE = "layers.{}.blocks.0.attn.relative_position_bias_table"


def _window(table):
    """The side of the windows that a table of relative positions ((2·side − 1)², heads) belongs to."""
    return (math.isqrt(table[0]) + 1) // 2


def _channels(shapes, name):
    return shapes[name][0] if shapes.get(name) else None


def _vgg_sizes(state):
    convolutions = [value for name, value in _numbered(state) if name.startswith("features.") and value.ndim == 4]
    linear = [value for name, value in _numbered(state) if name.startswith("classifier.") and value.ndim == 2]
    found: dict[str, Any] = {"num_classes": linear[-1].shape[0] if linear else 10}
    depth = len(convolutions) + 3
    if depth in vgg.DEPTHS:
        found |= {"depth": depth, "width": convolutions[0].shape[0]}
    return found | {"hidden": tuple(value.shape[0] for value in linear[:-1])}


def _cnn_sizes(name, state):
    """In `cnn` the names show where the poolings are; SmallCNN has one after every second convolution."""
    small = name == "small_cnn"
    pattern = r"feature_extractor\.()conv(\d+)\.weight" if small else r"stage(\d+)\.conv(\d+)\.weight"
    stages: dict[int, dict[int, int]] = {}
    for key, value in state.items():
        if (match := re.fullmatch(pattern, key)) and value.ndim == 4:
            index = int(match[2])
            stages.setdefault(int(match[1] or (index + 1) // 2), {})[index] = value.shape[0]
    widths = tuple(tuple(width for _, width in sorted(stage.items())) for _, stage in sorted(stages.items()))
    linear = [value for _, value in _numbered(state) if value.ndim == 2]
    found: dict[str, Any] = {"num_classes": linear[-1].shape[0] if linear else 10, "widths": widths or ((32,),)}
    found["hidden"] = tuple(value.shape[0] for value in linear[:-1])
    if not small:
        found["batch_norm"] = "stage1.bn1.weight" in state
        average = linear and linear[0].shape[1] == found["widths"][-1][-1]
        found["pool"] = "average" if average else "flatten"
    return found


def _numbered(state):
    """(name, value) pairs sorted by the numbers in the names; a file may have them in any order."""
    return sorted(state.items(), key=lambda item: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", item[0])])


def input_shape(name: str, model: nn.Module, state: State) -> Shape:
    """The (height, width, channels) that a network takes; for a network that takes any size, one that is large enough.

    A linear layer on a flattened map fixes the size of that map; the result is the smallest square image that yields
    it; the positions of a ViT fix the number of its patches. The windows of a Swin transformer are at most as large as
    their maps; the result has one window in the last stage.
    """
    if ARCHITECTURES[name].model == "swin":
        stages = sum(_TABLE.format(stage) in state for stage in range(len(state)))
        last = state[_TABLE.format(stages - 1)].shape if stages else (169,)
        side = model.patch * 2 ** max(stages - 1, 0) * _window(last)
        return side, side, channels(name, state)
    if ARCHITECTURES[name].model == "vit":
        side = model.patch * math.isqrt(max(state["pos_embed"].shape[1] - 1, 1)) if "pos_embed" in state else 224
        return side, side, channels(name, state)
    if ARCHITECTURES[name].model != "cnn":
        return 32, 32, channels(name, state)
    linear = [value for _, value in _numbered(state) if value.ndim == 2]
    area = linear[0].shape[1] // model.widths[-1][-1] if linear and model.pool == "flatten" else 1
    side = max(math.isqrt(area), 1)
    for stage in reversed(model.widths):
        side = 2 * side + len(stage) * (2 - 2 * model.padding)
    return side, side, channels(name, state)


def channels(name: str, state: State) -> int:
    """The number of input channels, from the first layer's weight."""
    stem = state.get(anchors(name)[0])
    return stem.shape[1] if stem is not None and stem.ndim == 4 else 3
