"""CEB: Fischer, "The Conditional Entropy Bottleneck", Entropy 2020; Fischer & Alemi, "CEB Improves Model Robustness",
Entropy 2020; as IBD (Kuang et al., NeurIPS 2023) compares with it.

    L = mean_b [ CE(f(z), y) + e^{−ρ}·KL(e(z|x) || b(z|y)) ]
    e(z|x) = N(μ(x), σ²),  b(z|y) = N(μ_y, I),      KL = ½ Σ_k ( (μ − μ_y)_k² + σ_k² − 1 − 2 ln σ_k )

With the unit variance of the papers, σ = 1, the KL is ½‖μ(x) − μ_y‖².

| symbol | code        | default |
|--------|-------------|---------|
| ρ      | rho         | 3; larger is less compression |
|        | adversarial | True: L at x' = PGD on CE; False: at x |

The network has it all (`models/stochastic.py`: sigma="unit", class_means=True): z, μ, σ and the table of μ_y, a linear
map of the one-hot label, are its features. The attack and the evaluation see z = μ. The papers do not say how CEB was
combined with adversarial training; this is the combination of the comparison in IBD as we read it.

Batch-norm: one training-mode pass over x' (x). Fischer estimates the KL from the sample; here it is in closed form,
which is its mean.
"""

import math

import jax.numpy as jnp

from ibjax import losses
from ibjax.errors import InputError, check_range
from ibjax.objectives.standard import accuracy
from ibjax.objectives.vib import encoding, gaussian_kl
from ibjax.step import Objective


def ceb(*, rho: float = 3.0, adversarial: bool = True) -> Objective:
    """The conditional entropy bottleneck, on a model with a stochastic layer and class means."""
    check_range("objective.rho", rho, -20, 100)

    def target(net, variables, batch, key):
        return batch["label"]

    def loss(net, variables, batch, x_adv, key):
        (logits, features), variables = net.forward(variables, x_adv if adversarial else batch["image"], key)
        mu, sigma = encoding(features, "ceb")
        if "class_means" not in features:
            raise InputError("objective 'ceb' needs the table of class means; set model.class_means=True")
        mu_y = features["class_means"][batch["label"]]
        prediction = jnp.mean(losses.cross_entropy(logits, batch["label"]))
        rate = jnp.mean(gaussian_kl(mu, sigma, mu_y))
        value = prediction + math.exp(-rho) * rate
        metrics = {"loss": value, "prediction": prediction, "rate": rate}
        metrics["adv_acc" if adversarial else "clean_acc"] = accuracy(logits, batch)
        return value, (variables, metrics)

    return Objective(target, loss, attack_losses=("ce", "margin") if adversarial else ())
