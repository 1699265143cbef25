"""Adversarial training: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018;
with the settings of Rice, Wong & Kolter, "Overfitting in Adversarially Robust Deep Learning", ICML 2020.

    L = CE(f(x'), y),      x' = PGD on CE

| symbol | code                    | default |
|--------|-------------------------|---------|
|        | clean_forward           | False   |

Batch-norm: one training-mode pass over x'. Rice et al. and AWP also run the clean batch through the network in
training mode, for logging, which moves the running statistics towards clean images; `clean_forward=True` does so
before the optimiser's step, theirs comes after it. In the attack, evaluation mode is the default;
`config.attack_bn = "train"` attacks in training mode as Rice et al. and Fast-AT do.
"""

import jax.numpy as jnp

from ibjax import losses
from ibjax.objectives.standard import accuracy
from ibjax.step import Objective


def pgd_at(*, clean_forward: bool = False) -> Objective:
    """PGD adversarial training, also called SAT."""

    def target(net, variables, batch, key):
        return batch["label"]

    def loss(net, variables, batch, x_adv, key):
        (logits, _), variables = net.forward(variables, x_adv, key)
        value = jnp.mean(losses.cross_entropy(logits, batch["label"]))
        metrics = {"loss": value, "adv_acc": accuracy(logits, batch)}
        if clean_forward:
            (clean, _), variables = net.forward(variables, batch["image"], key)
            metrics["clean_acc"] = accuracy(clean, batch)
        return value, (variables, metrics)

    return Objective(target, loss)
