"""A network in which some channels of one feature are always zero: the permanent mask of IB-RAR (Xu et al., 2023).

    T_last ← T_last * mask          mask ∈ {0, 1}^C, in training, in attacks and at test time

The mask is applied where the feature is tapped, so all later layers, shortcuts included, receive zeros in these
channels. It is part of the architecture and has no weights; those of the inner network are under "backbone".
`ibjax.analysis.mask` makes such networks. The features are those of the inner network; where the mask is that of a
stage, the feature of the stage's last block is from before it.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ibjax import config
from ibjax.errors import InputError, nearest
from ibjax.models import layers


class Model(nn.Module):
    """(B, H, W, C) in [0, 1] -> (logits (B, num_classes), features).

    backbone: the section of the inner network, as dict(name="resnet", depth=18).
    tap: name of the feature, (B, …, C).
    channels: indices of the channels that are zero, from 0 to C − 1.
    """

    num_classes: int | None
    backbone: config.ModelSection
    tap: str
    channels: tuple[int, ...]

    @nn.compact
    def __call__(
        self, x: Array, train: bool = False, edits: layers.Edits | layers.Taps | None = None
    ) -> tuple[Array, dict[str, Array]]:
        tap = layers.Taps(edits)
        edit = tap.edits.get(self.tap)

        def masked(feature):
            if not all(0 <= channel < feature.shape[-1] for channel in self.channels):
                raise InputError(f"model.channels={self.channels}: '{self.tap}' has {feature.shape[-1]} channels")
            feature = feature.at[..., jnp.asarray(self.channels, int)].set(0)
            return edit(feature) if edit else feature

        tap.edits = {**tap.edits, self.tap: masked}
        options = dict(num_classes=self.num_classes, name="backbone")
        output, features = config.build("models", self.backbone, "model.backbone", **options)(x, train, edits=tap)
        if self.tap not in features:
            raise InputError(f"model.tap='{self.tap}' is no feature of the network; {nearest(self.tap, features)}")
        return output, tap.finish()
