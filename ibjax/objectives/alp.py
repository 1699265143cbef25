"""Adversarial logit pairing: Kannan, Kurakin & Goodfellow, "Adversarial Logit Pairing", arXiv 1803.06373, 2018.

    L  = ω·CE(z, y) + (1 − ω)·CE(z', y) + λ · mean_{b,c} (z − z')²            z = f(x), z' = f(x')
    x' = PGD on CE

| symbol | code         | default |
|--------|--------------|---------|
| λ      | pairing      | 0.5     |
| ω      | clean_weight | 0.5     | 0.5 is the mixed minibatch; 0 trains on adversarial images alone, as Engstrom et al.
|        |              |         | (2018) do

Batch-norm: one training-mode pass over x and x' together, so that both share their batch statistics, as in the
authors' code.

Differences from the authors' ImageNet code: our attack is untargeted, whereas theirs targets the least likely class;
we do not smooth labels, whereas they smooth them by 0.1.
"""

import jax.numpy as jnp

from ibjax import losses
from ibjax.errors import check_range
from ibjax.objectives.standard import accuracy
from ibjax.step import Objective


def alp(*, pairing: float = 0.5, clean_weight: float = 0.5) -> Objective:
    """Adversarial logit pairing on a mixed minibatch; its attack is dict(name="pgd", loss="ce", init="uniform")."""
    check_range("objective.pairing", pairing, 0)
    check_range("objective.clean_weight", clean_weight, 0, 1)

    def target(net, variables, batch, key):
        return batch["label"]

    def loss(net, variables, batch, x_adv, key):
        (logits, _), variables = net.forward(variables, jnp.concatenate([batch["image"], x_adv]), key)
        clean, adv = jnp.split(logits, 2)
        natural = jnp.mean(losses.cross_entropy(clean, batch["label"]))
        robust = jnp.mean(losses.cross_entropy(adv, batch["label"]))
        paired = jnp.mean(jnp.square(clean - adv))
        value = clean_weight * natural + (1.0 - clean_weight) * robust + pairing * paired
        metrics = {"loss": value, "natural": natural, "robust": robust, "paired": paired}
        metrics |= {"clean_acc": accuracy(clean, batch), "adv_acc": accuracy(adv, batch)}
        return value, (variables, metrics)

    return Objective(target, loss)
