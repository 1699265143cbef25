"""Standard training: no defence.

    L = CE(f(x), y)

Batch-norm: one training-mode pass over x.
"""

import jax.numpy as jnp

from ibjax import losses
from ibjax.step import Objective


def standard() -> Objective:
    """Cross-entropy on the clean images; set `attack=None`."""

    def target(net, variables, batch, key):
        return batch["label"]

    def loss(net, variables, batch, x_adv, key):
        (logits, _), variables = net.forward(variables, batch["image"], key)
        value = jnp.mean(losses.cross_entropy(logits, batch["label"]))
        metrics = {"loss": value, "clean_acc": accuracy(logits, batch)}
        return value, (variables, metrics)

    return Objective(target, loss, attack_losses=())


def accuracy(logits, batch):
    """Share of the batch classified as labelled, in [0, 1]."""
    return jnp.mean(losses.correct(logits, batch["label"]).astype(jnp.float32))
