"""VGG with batch-norm, `features` numbered as torchvision's; IB-RAR's classifier, or torchvision's."""

import torch
import torch.nn.functional as F
from torch import nn

DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class Model(nn.Module):
    """(B, channels, H, W) in [0, 1], H and W at least 32 -> logits (B, num_classes).

    variant "ib_rar": global average, linear layers – BN – ReLU; "torchvision": adaptive average to 7×7, linear layers –
    ReLU – dropout.
    """

    def __init__(
        self,
        num_classes,
        depth=16,
        width=64,
        hidden=(4096, 4096),
        variant="ib_rar",
        mean=None,
        std=None,
        channels=3,
    ):
        super().__init__()
        self.register_buffer("mean", None if mean is None else torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", None if std is None else torch.tensor(std).view(-1, 1, 1))
        self.pooled = 7 if variant == "torchvision" else 1
        features, classifier, c_in = [], [], channels
        for count, factor in zip(DEPTHS[depth], (1, 2, 4, 8, 8), strict=True):
            for _ in range(count):
                c = width * factor
                features += [nn.Conv2d(c_in, c, 3, 1, 1), nn.BatchNorm2d(c), nn.ReLU()]
                c_in = c
            features.append(nn.MaxPool2d(2, 2))
        c_in *= self.pooled**2
        for c in hidden:
            after = [nn.ReLU(), nn.Dropout()] if variant == "torchvision" else [nn.BatchNorm1d(c), nn.ReLU()]
            classifier += [nn.Linear(c_in, c), *after]
            c_in = c
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(*classifier, nn.Linear(c_in, num_classes))

    def forward(self, x):
        if self.mean is not None:
            x = (x - self.mean) / self.std
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), self.pooled).flatten(1))
