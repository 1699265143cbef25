"""InfoAT-R: a reconstruction, from its abstract alone, of Xu et al., "InfoAT: Improving Adversarial Training Using the
Information Bottleneck Principle", IEEE TNNLS 2022. It is not InfoAT: every formula and constant here is our own.

    r(u) = ½ · Σ_k g_k(u)²                  KL(N(g, I) || N(0, I)) in nats;  g: standardised penultimate features
    L    = mean_b BCE(x') + β · mean_b KL(p(x) || p(x'))·w_b                      BCE and KL as in MART
    w_b  = B · softmax_b( sg r(x'_b) / √(d/2) )                   √(d/2): the standard deviation of r under N(0, I)
    x'   = argmax CE(x') + τ·r(x'),   from U(−ε, ε)

| symbol | code | default |
|--------|------|---------|
| β      | beta | 5       |
| τ      | tau  | 0.01    |
| g      |      | `pre_logits` of width d, standardised by the mean and standard deviation of the clean minibatch |

The abstract says that images whose features carry much information about the input are easier to attack, and that
training should find and use them.

Batch-norm: training-mode passes over x, then x'; the attack runs in evaluation mode.
"""

import jax
import jax.numpy as jnp

from ibjax import losses
from ibjax.errors import check_range
from ibjax.objectives.mart import boosted_cross_entropy, floored_kl
from ibjax.objectives.standard import accuracy
from ibjax.step import Objective


def infoat_r(*, beta: float = 5.0, tau: float = 0.01) -> Objective:
    """A reconstruction of InfoAT; its attack is dict(name="pgd", loss="objective", init="uniform")."""
    check_range("objective.beta", beta, 0)
    check_range("objective.tau", tau, 0)

    def target(net, variables, batch, key):
        _, features = net.predict(variables, batch["image"])
        return {"y": batch["label"], "moments": moments(features)}

    def attack_loss(output, target):
        logits, features = output
        return losses.cross_entropy(logits, target["y"]) + tau * rate(features, target["moments"])

    def loss(net, variables, batch, x_adv, key):
        key_clean, key_adv = jax.random.split(key)
        (clean, features), variables = net.forward(variables, batch["image"], key_clean)
        (adv, features_adv), variables = net.forward(variables, x_adv, key_adv)
        r, d = rate(features_adv, moments(features)), features["pre_logits"].shape[-1]
        w = len(r) * jax.nn.softmax(jax.lax.stop_gradient(r) / (d / 2) ** 0.5)

        boosted = jnp.mean(boosted_cross_entropy(adv, batch["label"]))
        robust = jnp.mean(floored_kl(clean, adv) * w)
        value = boosted + beta * robust
        metrics = {"loss": value, "boosted": boosted, "robust": robust, "rate": jnp.mean(r)}
        metrics |= {"clean_acc": accuracy(clean, batch), "adv_acc": accuracy(adv, batch)}
        return value, (variables, metrics)

    return Objective(target, loss, attack_losses=("objective",), attack_loss=attack_loss)


def moments(features):
    """(mean, variance) of the penultimate features over the minibatch, (1, d) each."""
    z = features["pre_logits"].astype(jnp.float32)
    return jnp.mean(z, axis=0, keepdims=True), jnp.var(z, axis=0, keepdims=True)


def rate(features, moments):
    """r, shape (B,), in nats."""
    mean, variance = moments
    g = (features["pre_logits"].astype(jnp.float32) - mean) * jax.lax.rsqrt(variance + 1e-5)
    return 0.5 * jnp.sum(jnp.square(g), axis=-1)
