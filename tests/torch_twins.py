"""The published networks in PyTorch, small enough to read, with the parameter names of their checkpoints.

Each is written from the structure that its repository's weights have, and records in `taps` what ours calls the same.
`names()` says which module of ours each of theirs is; "{block}" are the blocks in order.
"""

import itertools
import re

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def conv(c_in, c_out, kernel=3, stride=1, bias=False, padding=None):
    return nn.Conv2d(c_in, c_out, kernel, stride, (kernel - 1) // 2 if padding is None else padding, bias=bias)


class Twin(nn.Module):
    """forward(x) -> logits; x (B, C, H, W) in [0, 1]."""

    def record(self, *names_then_value):
        *names, value = names_then_value
        self.taps.update(dict.fromkeys(names, value))
        return value

    def pre_activation(self, x, groups, final):
        """Stem's output, groups of blocks, the final batch-norm and activation -> the pooled feature; all recorded."""
        names, index = ["stem"], 0
        self.record("stem", x)
        for stage, group in enumerate(groups, 1):
            for i, block in enumerate(group):
                seen, x = block(x)
                self.record(*[f"{name}_relu" for name in names], seen)
                index += 1
                names = [f"block{index}"] + [f"stage{stage}"] * (i == len(group) - 1)
                self.record(*names, x)
        if final is not None:
            x = self.record(*[f"{name}_relu" for name in names], final(x))
        return self.record("pre_logits", F.avg_pool2d(x, x.shape[-1]).flatten(1))

    def ours(self):
        """{their module name: our module path} of all layers with weights."""
        modules = [
            n for n, m in self.named_modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.modules.batchnorm._BatchNorm)
        ]
        count, index, found = itertools.count(1), {}, {}
        for name in modules:
            for theirs, path in self.names().items():
                match = re.fullmatch(theirs.replace(".", r"\.").replace("{block}", r"(.+\.\d+)"), name)
                if match and "{block}" in theirs:
                    if match[1] not in index:
                        index[match[1]] = next(count)
                    found[name] = path.format(block=f"block{index[match[1]]}")
                elif match:
                    found[name] = path
        assert set(found) == set(modules), set(modules) - set(found)
        return found


def variables(twin):
    """The twin's weights and running statistics as our variables."""
    params, batch_stats = {}, {}
    for name, path in twin.ours().items():
        module, node = twin.get_submodule(name), path.split("/")
        array = {key: value.detach().numpy().copy() for key, value in module.state_dict().items()}
        if isinstance(module, nn.Conv2d):
            leaf, node = {"kernel": array["weight"].transpose(2, 3, 1, 0)}, [*node, "conv"]
        elif isinstance(module, nn.Linear):
            leaf, node = {"kernel": array["weight"].T}, [*node, "dense"]
        else:
            leaf = {"scale": array["weight"]}
            put(batch_stats, node, {"mean": array["running_mean"], "var": array["running_var"]})
        put(params, node, leaf | ({"bias": array["bias"]} if "bias" in array else {}))
    return {"params": params, "batch_stats": batch_stats}


def put(tree, path, leaf):
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def randomize(twin):
    """Weights, scales, biases and running statistics that hide no mistake."""
    with torch.no_grad():
        for module in twin.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(0.7, 1.3)
                module.bias.normal_(0, 0.3)
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2.0)
            elif isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.normal_(0, 0.3)
    return twin.eval()


def nhwc(value):
    """A tap of ours from one of theirs."""
    value = value.detach().numpy()
    return np.moveaxis(value, 1, -1) if value.ndim == 4 else value


class WideResNet(Twin):
    """TRADES, and most of RobustBench."""

    def names(self):
        return {
            "conv1": "stem",
            "bn1": "bn",
            "fc": "head",
            **{f"{{block}}.{name}": f"{{block}}/{name}" for name in ("bn1", "conv1", "bn2", "conv2")},
            "{block}.convShortcut": "{block}/shortcut",
        }

    def __init__(self, depth=10, width=1, num_classes=10):
        super().__init__()
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = conv(3, 16)
        for stage in (1, 2, 3):
            group = nn.Module()
            group.layer = nn.Sequential(
                *[
                    self.Block(
                        widths[stage - 1] if i == 0 else widths[stage], widths[stage], 1 + (stage > 1 and i == 0)
                    )
                    for i in range((depth - 4) // 6)
                ]
            )
            self.add_module(f"block{stage}", group)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)

    class Block(nn.Module):
        def __init__(self, c_in, c_out, stride):
            super().__init__()
            self.bn1, self.conv1 = nn.BatchNorm2d(c_in), conv(c_in, c_out, 3, stride)
            self.bn2, self.conv2 = nn.BatchNorm2d(c_out), conv(c_out, c_out)
            if c_in != c_out:
                self.convShortcut = conv(c_in, c_out, 1, stride)

        def forward(self, x):
            seen = F.relu(self.bn1(x))
            y = self.conv2(F.relu(self.bn2(self.conv1(seen))))
            return seen, torch.add(self.convShortcut(seen) if hasattr(self, "convShortcut") else x, y)

    def forward(self, x):
        self.taps = {}
        groups = [group.layer for group in (self.block1, self.block2, self.block3)]
        return self.fc(self.pre_activation(self.conv1(x), groups, lambda x: F.relu(self.bn1(x))))


class DMWideResNet(Twin):
    """Gowal et al. and Rebuffi et al., as RobustBench has them: SiLU; strided convolutions pad as TensorFlow's."""

    def names(self):
        return {
            "init_conv": "stem",
            "batchnorm": "bn",
            "logits": "head",
            "{block}.batchnorm_0": "{block}/bn1",
            "{block}.conv_0": "{block}/conv1",
            "{block}.batchnorm_1": "{block}/bn2",
            "{block}.conv_1": "{block}/conv2",
            "{block}.shortcut": "{block}/shortcut",
        }

    MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)

    def __init__(self, depth=10, width=1, num_classes=10):
        super().__init__()
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.init_conv = conv(3, 16)
        groups = []
        for stage in (1, 2, 3):
            group = nn.Module()
            group.block = nn.Sequential(
                *[
                    self.Block(
                        widths[stage - 1] if i == 0 else widths[stage], widths[stage], 1 + (stage > 1 and i == 0)
                    )
                    for i in range((depth - 4) // 6)
                ]
            )
            groups.append(group)
        self.layer = nn.Sequential(*groups)
        self.batchnorm = nn.BatchNorm2d(widths[3])
        self.logits = nn.Linear(widths[3], num_classes)

    class Block(nn.Module):
        def __init__(self, c_in, c_out, stride):
            super().__init__()
            self.pad = (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1)
            self.batchnorm_0, self.conv_0 = nn.BatchNorm2d(c_in), conv(c_in, c_out, 3, stride, padding=0)
            self.batchnorm_1, self.conv_1 = nn.BatchNorm2d(c_out), conv(c_out, c_out)
            if c_in != c_out:
                self.shortcut = conv(c_in, c_out, 1, stride)

        def forward(self, x):
            seen = F.silu(self.batchnorm_0(x))
            y = self.conv_1(F.silu(self.batchnorm_1(self.conv_0(F.pad(seen, self.pad)))))
            return seen, torch.add(self.shortcut(seen) if hasattr(self, "shortcut") else x, y)

    def forward(self, x):
        self.taps = {}
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.MEAN, self.STD))
        groups = [group.block for group in self.layer]
        x = self.init_conv((x - mean) / std)
        return self.logits(self.pre_activation(x, groups, lambda x: F.silu(self.batchnorm(x))))


PREACT_NAMES = {
    "conv1": "stem",
    "linear": "head",
    **{f"{{block}}.{name}": f"{{block}}/{name}" for name in ("bn1", "conv1", "bn2", "conv2")},
    "{block}.shortcut.0": "{block}/shortcut",
}


class PreActBlock(nn.Module):
    """`raw`: the projection sees x itself; `late`: biased convolutions, and the stride in the second one."""

    def __init__(self, c_in, c_out, stride, raw=False, late=False):
        super().__init__()
        strides = (1, stride) if late else (stride, 1)
        self.raw = raw
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), conv(c_in, c_out, 3, strides[0], late)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), conv(c_out, c_out, 3, strides[1], late)
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(conv(c_in, c_out, 1, stride, late))

    def forward(self, x):
        seen = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(seen))))
        return seen, y + (self.shortcut(x if self.raw else seen) if hasattr(self, "shortcut") else x)


class PreActResNet(Twin):
    """Rice et al.: a projection of the activated input, and a final batch-norm; others have neither."""

    def names(self):
        return {**PREACT_NAMES, "bn": "bn"}

    def __init__(self, blocks=(1, 1), width=4, num_classes=10, raw=False, final_norm=True):
        super().__init__()
        self.conv1 = conv(3, width)
        c_in = width
        for stage, count in enumerate(blocks, 1):
            c_out, group = width * 2 ** (stage - 1), []
            for i in range(count):
                group.append(PreActBlock(c_in, c_out, 1 + (stage > 1 and i == 0), raw))
                c_in = c_out
            self.add_module(f"layer{stage}", nn.Sequential(*group))
        if final_norm:
            self.bn = nn.BatchNorm2d(c_in)
        self.linear = nn.Linear(c_in, num_classes)
        self.stages = len(blocks)

    def forward(self, x):
        self.taps = {}
        groups = [getattr(self, f"layer{i + 1}") for i in range(self.stages)]
        final = (lambda x: F.relu(self.bn(x))) if hasattr(self, "bn") else None
        return self.linear(self.pre_activation(self.conv1(x), groups, final))


class IBRARWideResNet(Twin):
    """The WRN of IB-RAR (meliketoy's): biased convolutions, late stride, raw projection, momentum 0.9 at the end."""

    def names(self):
        return {**PREACT_NAMES, "bn1": "bn"}

    def __init__(self, depth=10, width=1, num_classes=10):
        super().__init__()
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = conv(3, 16, bias=True)
        for stage in (1, 2, 3):
            group = [
                PreActBlock(
                    widths[stage - 1] if i == 0 else widths[stage],
                    widths[stage],
                    1 + (stage > 1 and i == 0),
                    True,
                    True,
                )
                for i in range((depth - 4) // 6)
            ]
            self.add_module(f"layer{stage}", nn.Sequential(*group))
        self.bn1 = nn.BatchNorm2d(widths[3], momentum=0.9)
        self.linear = nn.Linear(widths[3], num_classes)

    def forward(self, x):
        self.taps = {}
        groups = [self.layer1, self.layer2, self.layer3]
        return self.linear(self.pre_activation(self.conv1(x), groups, lambda x: F.relu(self.bn1(x))))


class ResNet(Twin):
    """kuangliu's ResNet (`shortcut.0`, `linear`), or with `imagenet` torchvision's (`downsample.0`, `fc`)."""

    def __init__(self, blocks=(1, 1), width=4, num_classes=10, bottleneck=False, imagenet=False):
        super().__init__()
        self.projection, self.last = ("downsample", "fc") if imagenet else ("shortcut", "linear")
        self.conv1 = conv(3, width, 7, 2) if imagenet else conv(3, width)
        self.bn1 = nn.BatchNorm2d(width)
        c_in = width
        for stage, count in enumerate(blocks, 1):
            group = []
            for i in range(count):
                block = self.Block(
                    c_in, width * 2 ** (stage - 1), 1 + (stage > 1 and i == 0), bottleneck, self.projection
                )
                group.append(block)
                c_in = block.c_out
            self.add_module(f"layer{stage}", nn.Sequential(*group))
        self.add_module(self.last, nn.Linear(c_in, num_classes))
        self.imagenet, self.stages = imagenet, len(blocks)

    def names(self):
        layers = [f"{kind}{i}" for kind in ("conv", "bn") for i in (1, 2, 3)]
        return {
            "conv1": "stem",
            "bn1": "bn_stem",
            self.last: "head",
            **{f"{{block}}.{name}": f"{{block}}/{name}" for name in layers},
            f"{{block}}.{self.projection}.0": "{block}/conv_shortcut",
            f"{{block}}.{self.projection}.1": "{block}/bn_shortcut",
        }

    class Block(nn.Module):
        def __init__(self, c_in, c, stride, bottleneck, shortcut):
            super().__init__()
            self.c_out, self.name = 4 * c if bottleneck else c, shortcut
            kernels, strides = ((1, 3, 1), (1, stride, 1)) if bottleneck else ((3, 3), (stride, 1))
            widths = [c_in] + [c] * (len(kernels) - 1) + [self.c_out]
            for i, (kernel, s) in enumerate(zip(kernels, strides, strict=True)):
                self.add_module(f"conv{i + 1}", conv(widths[i], widths[i + 1], kernel, s))
                self.add_module(f"bn{i + 1}", nn.BatchNorm2d(widths[i + 1]))
            self.convs = len(kernels)
            if stride != 1 or c_in != self.c_out:
                project = nn.Sequential(conv(c_in, self.c_out, 1, stride), nn.BatchNorm2d(self.c_out))
                self.add_module(shortcut, project)

        def forward(self, x):
            y = x
            for i in range(1, self.convs + 1):
                y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
                y = F.relu(y) if i < self.convs else y
            y += getattr(self, self.name)(x) if hasattr(self, self.name) else x
            return F.relu(y)

    def forward(self, x):
        self.taps = {}
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.record("stem", F.max_pool2d(x, 3, 2, 1) if self.imagenet else x)
        index = 0
        for stage in range(1, self.stages + 1):
            for block in getattr(self, f"layer{stage}"):
                index += 1
                x = self.record(f"block{index}", block(x))
            self.record(f"stage{stage}", x)
        return getattr(self, self.last)(self.record("pre_logits", F.adaptive_avg_pool2d(x, 1).flatten(1)))


class VGG(Twin):
    """VGG with batch-norm, in torchvision's numbering of `features`; linear layers with batch-norm, as IB-RAR."""

    def __init__(self, groups=(2, 2, 3, 3, 3), width=2, hidden=(8, 8), num_classes=10):
        super().__init__()
        features, classifier, c_in = [], [], 3
        for count, factor in zip(groups, (1, 2, 4, 8, 8), strict=True):
            for _ in range(count):
                features += [conv(c_in, width * factor, bias=True), nn.BatchNorm2d(width * factor), nn.ReLU()]
                c_in = width * factor
            features.append(nn.MaxPool2d(2, 2))
        for c_out in hidden:
            classifier += [nn.Linear(c_in, c_out), nn.BatchNorm1d(c_out), nn.ReLU()]
            c_in = c_out
        self.features, self.classifier = (
            nn.Sequential(*features),
            nn.Sequential(*classifier, nn.Linear(c_in, num_classes)),
        )

    def names(self):
        names, counts = {}, {"conv": 0, "fc": 0}
        for part in ("features", "classifier"):
            layers = list(getattr(self, part))
            for i, layer in enumerate(layers):
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    kind = "conv" if part == "features" else "fc"
                    counts[kind] += 1
                    last = i == len(layers) - 1
                    names[f"{part}.{i}"] = "head" if last else f"{kind}{counts[kind]}"
                    if not last:
                        names[f"{part}.{i + 1}"] = f"{'bn' if kind == 'conv' else 'bn_fc'}{counts[kind]}"
        return names

    def forward(self, x):
        self.taps, index, stage = {}, 0, 0
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                index += 1
                self.record(f"conv{index}", x)
            elif isinstance(layer, nn.MaxPool2d):
                stage += 1
                self.record(f"stage{stage}", x)
        x, index = F.adaptive_avg_pool2d(x, 1).flatten(1), 0
        for layer in self.classifier[:-1]:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                index += 1
                self.record(f"fc{index}", x)
        return self.classifier[-1](self.record("pre_logits", x))
