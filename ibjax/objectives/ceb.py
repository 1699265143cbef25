"""CEB: Fischer, "The Conditional Entropy Bottleneck", Entropy 2020; Fischer & Alemi, "CEB Improves Model Robustness",
Entropy 2020; as a baseline of IBD (Kuang et al., NeurIPS 2023).

    L = mean_b [ CE(f(z), y) + e^{−ρ}·KL(e(z|x) || b(z|y)) ]
    e(z|x) = N(μ(x), σ²),  b(z|y) = N(μ_y, I),      KL = ½ Σ_k ( (μ − μ_y)_k² + σ_k² − 1 − 2 ln σ_k )

With the unit variance of the papers, σ = 1, the KL is ½‖μ(x) − μ_y‖².

| symbol | code        | default |
|--------|-------------|---------|
| ρ      | rho         | 3; a larger ρ compresses less |
|        | adversarial | True: L at x' = PGD on CE; False: at x |

The network (`models/stochastic.py` with sigma="unit", class_means=True) returns z, μ, σ and the table of μ_y, a linear
map of the one-hot label, as features. The attack and the evaluation see z = μ. No paper says how CEB was combined with
adversarial training; this is our reading of the comparison in IBD.

Batch-norm: one training-mode pass over x', or over x with adversarial=False. Fischer estimates the KL from the sampled
z; here it is computed in closed form, which is the expectation of that estimate.
"""

import math

import jax.numpy as jnp

from ibjax import losses
from ibjax.errors import InputError, check_range
from ibjax.information import divergence
from ibjax.objectives.standard import accuracy
from ibjax.objectives.vib import encoding
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
        mu_y = features["class_means"][losses.as_labels(batch["label"])]
        prediction = jnp.mean(losses.cross_entropy(logits, batch["label"]))
        rate = jnp.mean(divergence.gaussian_kl(mu, sigma, mu_y))
        value = prediction + math.exp(-rho) * rate
        metrics = {"loss": value, "prediction": prediction, "rate": rate}
        metrics["adv_acc" if adversarial else "clean_acc"] = accuracy(logits, batch)
        return value, (variables, metrics)

    return Objective(target, loss, attack_losses=("ce", "margin") if adversarial else ())
