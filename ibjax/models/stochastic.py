"""A Gaussian bottleneck before the last layer of any network: for shared information, VIB and CEB.

    h = backbone(x)        (μ, s) = W h + b ∈ R^{2K}        z = μ + σ(s) ⊙ ξ,  ξ ~ N(0, I)        logits = V z + c

In training mode z is one sample; in evaluation mode, for attacks and tests, z = μ. A network that samples at test time
appears more robust than it is, as attacks that assume a deterministic network fail for lack of a useful gradient.

| option         | default    |                                                                                        |
|----------------|------------|----------------------------------------------------------------------------------------|
| latent         | 256        | K; None, with sigma="unit": μ is h itself (CEB on pooled features)                     |
| sigma          | "softplus" | σ = softplus(s) + 1e-7; "shifted": softplus(s − 5) (VIB); "unit": 1, no s (CEB).       |
|                |            | σ is clipped to [1e-4, 1e2]                                                            |
| sample_at_test | False      | True: the caller gives `apply` rngs={"sample": key} in evaluation mode too             |
| class_means    | False      | CEB's b(z|y) = N(m_y, I): a trainable table, in training the feature "class_means"    |
| linear_init    | "torch"    | initialisation of W and V; or "xavier" (VIB): see `layers.LINEAR_INITS`                |

The features are those of the backbone (`pre_logits` is h) and `mu`, `sigma`, `z` (B, K), all float32.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ibjax import config
from ibjax.errors import InputError, nearest
from ibjax.models import layers

SIGMAS = {
    "softplus": lambda s: jax.nn.softplus(s) + 1e-7,
    "shifted": lambda s: jax.nn.softplus(s - 5.0),
    "unit": jnp.ones_like,
}


class Model(nn.Module):
    """(B, H, W, C) in [0, 1] -> (logits (B, num_classes), features).

    backbone: the section of a network, as dict(name="resnet", depth=18), which is used without its final layer.
    """

    num_classes: int
    backbone: config.ModelSection
    latent: int | None = 256
    sigma: str = "softplus"
    sample_at_test: bool = False
    class_means: bool = False
    linear_init: str = "torch"

    @nn.compact
    def __call__(
        self, x: Array, train: bool = False, edits: layers.Edits | layers.Taps | None = None
    ) -> tuple[Array, dict[str, Array]]:
        if self.sigma not in SIGMAS:
            raise InputError(f"model.sigma '{self.sigma}' is unknown; {nearest(self.sigma, SIGMAS)}")
        if self.sigma != "unit" if self.latent is None else self.latent < 1:
            raise InputError(f"model.latent={self.latent}: give 1 or more, or None together with sigma='unit'")
        tap, linear = layers.Taps(edits), layers.linear_init(self.linear_init)
        network = config.build("models", self.backbone, "model.backbone", num_classes=None, name="backbone")
        mu, _ = network(x, train, edits=tap)
        if self.latent is not None:
            mu = layers.Dense(self.latent * (1 if self.sigma == "unit" else 2), **linear, name="gaussian")(mu)
        mu, s = (mu, mu) if self.sigma == "unit" else jnp.split(mu, 2, -1)
        mu = tap("mu", mu)
        sigma = tap("sigma", jnp.clip(SIGMAS[self.sigma](s), 1e-4, 1e2))
        z = tap("z", mu + sigma * self.noise(mu) if self.samples(train) else mu)
        if self.class_means:
            shape = (self.num_classes, mu.shape[-1])
            means = self.param("class_means", layers.torch_uniform, shape)  # a linear map of one-hot labels
            if train:  # nothing else reads it, and it has no batch axis
                tap("class_means", means)
        return layers.classifier(z, self.num_classes, **linear), tap.finish()

    def samples(self, train: bool) -> bool:
        """Whether z is sampled; in evaluation mode, never while parameters are initialised, as there is no key then."""
        return train or (self.sample_at_test and not self.is_initializing())

    def noise(self, mu: Array) -> Array:
        """ξ ~ N(0, I) from the random stream "sample"; raises InputError if the caller supplies none."""
        if not self.has_rng("sample"):
            raise InputError("this network samples: call apply(…, rngs={'sample': key}), or set sample_at_test=False")
        return jax.random.normal(self.make_rng("sample"), mu.shape, mu.dtype)
