"""SmallCNN, the network of TRADES (Zhang et al., ICML 2019) for MNIST, with the parameter names of its files."""

import math
from collections import OrderedDict

import torch
from torch import nn


class Model(nn.Module):
    """(B, channels, *image) in [0, 1] -> logits (B, num_classes).

    `widths`: the channels of the unpadded 3×3 convolutions, stage by stage; each stage ends with 2×2 max-pooling.
    `hidden`: widths of the linear layers before the last.
    """

    def __init__(
        self,
        num_classes,
        widths=((32, 32), (64, 64)),
        hidden=(200, 200),
        dropout=0.5,
        mean=None,
        std=None,
        channels=1,
        image=(28, 28),
    ):
        super().__init__()
        self.register_buffer("mean", None if mean is None else torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", None if std is None else torch.tensor(std).view(-1, 1, 1))
        features, classifier = OrderedDict(), OrderedDict()
        c_in, sides, index = channels, image, 0
        for stage, group in enumerate(widths, 1):
            for c in group:
                index += 1
                features[f"conv{index}"], features[f"relu{index}"] = nn.Conv2d(c_in, c, 3), nn.ReLU()
                c_in, sides = c, [side - 2 for side in sides]
            features[f"maxpool{stage}"], sides = nn.MaxPool2d(2), [side // 2 for side in sides]
        c_in *= math.prod(sides)
        for i, c in enumerate(hidden, 1):
            classifier[f"fc{i}"], classifier[f"relu{i}"], c_in = nn.Linear(c_in, c), nn.ReLU(), c
            if i == 1:
                classifier["drop"] = nn.Dropout(dropout)
        classifier[f"fc{len(hidden) + 1}"] = nn.Linear(c_in, num_classes)
        self.feature_extractor, self.classifier = nn.Sequential(features), nn.Sequential(classifier)

    def forward(self, x):
        if self.mean is not None:
            x = (x - self.mean) / self.std
        return self.classifier(self.feature_extractor(x).flatten(1))
