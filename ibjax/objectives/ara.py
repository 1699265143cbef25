"""Any objective trained on representation attacks: Yu et al. (shared information), Pattern Recognition 2023, table 7.

    the first half of a batch is the guide images, the second half is x with labels y
    x'_i = argmin ‖φ(x') − φ(guide_i)‖²,    |x' − x_i| ≤ σ,  by L-BFGS-B                attacks/representation.py
    L    = the loss of `base` on x, y and x'

| symbol | code  | default  |
|--------|-------|----------|
|        | base  |          | the configuration section of an objective, such as dict(name="trades", beta=6.0)
| σ      | eps   | "10/255" |
| step   | steps | 20       |

φ is the penultimate layer in evaluation mode, or the mean μ where that layer is stochastic. The guides are not
attacked and do not enter the loss; the paper does not say whether they should. A guide may have the same label as the
image that it guides.

Batch-norm: the passes of `base`, over x alone.
"""

import jax.numpy as jnp

from ibjax import config
from ibjax.attacks import representation
from ibjax.errors import InputError
from ibjax.step import Objective


def ara(*, base: config.ObjectiveSection, eps: str = "10/255", steps: int = 20) -> Objective:
    """`base` on images that imitate a guide's representation; needs attack=None and an even batch size."""
    inner = config.build("objectives", base, "objective.base")
    if inner.attack is not None or not inner.attack_losses:
        raise InputError(f"objective.base='{base['name']}' has no adversarial images, or makes its own; give another")
    represent = representation.ara(eps=eps, steps=steps)

    def attack(net, variables, batch, key):
        guide, source = jnp.split(batch["image"], 2)

        def phi(x):
            _, features = net.predict(variables, x)
            return features.get("mu", features["pre_logits"])

        return represent(key, phi, source, guide), variables

    def on_sources(function):
        def call(net, variables, batch, *rest):
            return function(net, variables, {name: second_half(value) for name, value in batch.items()}, *rest)

        return call

    return inner._replace(
        target=on_sources(inner.target),
        loss=on_sources(inner.loss),
        attack_losses=(),
        flat_at_x=False,
        attack_loss=None,
        attack=attack,
        proxy=on_sources(inner.proxy) if inner.proxy else None,
    )


def second_half(value):
    """The second half of an array along its batch axis; a scalar, which all images share, is returned as it is."""
    return jnp.split(value, 2)[1] if jnp.ndim(value) else value
