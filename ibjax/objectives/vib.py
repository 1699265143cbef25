"""VIB: Alemi, Fischer, Dillon & Murphy, "Deep Variational Information Bottleneck", ICLR 2017.

    L = mean_b [ CE(f(z), y) + β·Σ_k KL(N(μ_k, σ_k²) || N(0, 1)) ] / ln 2           in bits
    KL(N(μ, σ²) || N(0, 1)) = ½ (μ² + σ² − 1 − 2 ln σ)
    z = μ + σ·ξ,  ξ ~ N(0, 1)       one sample of each image in training

| symbol | code        | default |
|--------|-------------|---------|
| β      | beta        | 1e-3    |
|        | adversarial | False; True: L at x' = PGD on CE, as in adversarial training |

μ, σ and z are features of the network (`models/stochastic.py`); the attack and the evaluation see z = μ. The authors
average the probabilities of 12 samples at test time; an attack on that prediction must average them as well.

Batch-norm: one training-mode pass over x, or over x' with adversarial=True.
"""

import math

import jax.numpy as jnp

from ibjax import losses
from ibjax.errors import InputError, check_range
from ibjax.information import divergence
from ibjax.objectives.standard import accuracy
from ibjax.step import Objective


def vib(*, beta: float = 1e-3, adversarial: bool = False) -> Objective:
    """The variational information bottleneck, on a model with a stochastic layer."""
    check_range("objective.beta", beta, 0)

    def target(net, variables, batch, key):
        return batch["label"]

    def loss(net, variables, batch, x_adv, key):
        (logits, features), variables = net.forward(variables, x_adv if adversarial else batch["image"], key)
        mu, sigma = encoding(features, "vib")
        prediction = jnp.mean(losses.cross_entropy(logits, batch["label"])) / math.log(2)
        rate = jnp.mean(divergence.gaussian_kl(mu, sigma)) / math.log(2)
        value = prediction + beta * rate
        metrics = {"loss": value, "prediction": prediction, "rate": rate}
        metrics["adv_acc" if adversarial else "clean_acc"] = accuracy(logits, batch)
        return value, (variables, metrics)

    return Objective(target, loss, attack_losses=("ce", "margin") if adversarial else ())


def encoding(features, name):
    """(μ, σ), each (B, K), in float32; raises InputError if the network has no stochastic layer."""
    if not {"mu", "sigma"} <= set(features):
        raise InputError(f"objective '{name}' needs a network with a stochastic layer; set model.name='stochastic'")
    return features["mu"].astype(jnp.float32), features["sigma"].astype(jnp.float32)
