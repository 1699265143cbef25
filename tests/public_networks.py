"""PyTorch networks with the modules and names of public repositories, small, and written for the tests alone.

They share nothing with ibjax: what they compute is what their modules compute. Attributes are called as in the
repositories, because the names of parameters come from them.
"""

import torch
import torch.nn.functional as F
from torch import nn


class BasicBlock(nn.Module):
    """torchvision's and timm's."""

    expansion = 1

    def __init__(self, c_in, c, stride=1, factor=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c, 3, stride, 1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c)
        self.downsample = downsample(c_in, c, stride)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """torchvision's and timm's; `factor` is width_per_group / 64, 2 in wide_resnet50_2."""

    expansion = 4

    def __init__(self, c_in, c, stride=1, factor=1):
        super().__init__()
        inner = c * factor
        self.conv1, self.bn1 = nn.Conv2d(c_in, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, 4 * c, 1, bias=False), nn.BatchNorm2d(4 * c)
        self.downsample = downsample(c_in, 4 * c, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def downsample(c_in, c_out, stride):
    if stride == 1 and c_in == c_out:
        return None
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))


class TorchvisionResNet(nn.Module):
    """`cifar`: conv1 replaced by a 3×3 one and maxpool by nothing, as tutorials do."""

    def __init__(self, block, layers, num_classes, width=4, factor=1, cifar=False):
        super().__init__()
        kernel, stride = (3, 1) if cifar else (7, 2)
        self.conv1, self.bn1 = nn.Conv2d(3, width, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(width)
        self.maxpool = nn.Identity() if cifar else nn.MaxPool2d(3, 2, 1)
        c_in = width
        for number, count in enumerate(layers):
            c, blocks = width * 2**number, []
            for i in range(count):
                blocks.append(block(c_in, c, 2 if number and not i else 1, factor))
                c_in = c * block.expansion
            self.add_module(f"layer{number + 1}", nn.Sequential(*blocks))
        self.count = len(layers)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(c_in, num_classes)

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for number in range(self.count):
            x = getattr(self, f"layer{number + 1}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


class TorchvisionVGG(nn.Module):
    """vgg11_bn."""

    def __init__(self, num_classes, width=2, hidden=8):
        super().__init__()
        layers, c_in = [], 3
        for c in (1, "M", 2, "M", 4, 4, "M", 8, 8, "M", 8, 8, "M"):
            if c == "M":
                layers.append(nn.MaxPool2d(2, 2))
            else:
                layers += [nn.Conv2d(c_in, c * width, 3, padding=1), nn.BatchNorm2d(c * width), nn.ReLU(inplace=True)]
                c_in = c * width
        self.features, self.avgpool = nn.Sequential(*layers), nn.AdaptiveAvgPool2d((7, 7))
        first, second = nn.Linear(c_in * 7 * 7, hidden), nn.Linear(hidden, hidden)
        relus, drops = (nn.ReLU(True), nn.ReLU(True)), (nn.Dropout(), nn.Dropout())
        last = nn.Linear(hidden, num_classes)
        self.classifier = nn.Sequential(first, relus[0], drops[0], second, relus[1], drops[1], last)

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class Normalize(nn.Module):
    """Of a wrapper; `kept` says whether its constants are in the state dict, and `names` what they are called there."""

    def __init__(self, mean, std, kept=True, names=("mean", "std")):
        super().__init__()
        self.names = names
        for name, value in zip(names, (mean, std), strict=True):
            self.register_buffer(name, torch.tensor(value).view(1, -1, 1, 1), persistent=kept)

    def forward(self, x):
        mean, std = (getattr(self, name) for name in self.names)
        return (x - mean) / std


class Named(nn.Module):
    """A wrapper that calls its network `name`, after a normalisation or none."""

    def __init__(self, name, network, normalize=None, normalize_name="normalize"):
        super().__init__()
        self.name, self.normalize_name = name, normalize and normalize_name
        if normalize is not None:
            self.add_module(normalize_name, normalize)
        self.add_module(name, network)

    def forward(self, x):
        if self.normalize_name:
            x = getattr(self, self.normalize_name)(x)
        return getattr(self, self.name)(x)
