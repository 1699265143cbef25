"""MART: Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", ICLR 2020.

    L   = mean_b BCE(p', y) + λ · mean_b KL(p || p')·(1 − p_y)                    p = p(x), p' = p(x')
    BCE = −log p'_y − log(1 − max_{k≠y} p'_k)
    x'  = PGD on CE,   from x + 0.001·N(0, 1)

| symbol | code | default                     |
|--------|------|-----------------------------|
| λ      | beta | 5 (ResNet-18; 6 WRN-34-10)  |

The authors' constants are kept: log(1.0001 − max p'_k + 1e-12), a weight of 1 − p_y + 1e-7, and log(p' + 1e-12) in the
KL. Gradients flow through all of p, p' and the weight. With smoothed or mixed labels, the term −log p'_y becomes the
cross-entropy with them; p_y and max_{k≠y} keep the class that is the likeliest of them.

Batch-norm: training-mode passes over x, then x'; the attack runs in evaluation mode. Both are as in the authors' code.
"""

import jax
import jax.numpy as jnp
from jax import Array

from ibjax import losses
from ibjax.errors import check_range
from ibjax.objectives.standard import accuracy
from ibjax.step import Objective


def mart(*, beta: float = 5.0) -> Objective:
    """MART; its attack is dict(name="pgd", loss="ce", init="gaussian")."""
    check_range("objective.beta", beta, 0)

    def target(net, variables, batch, key):
        return batch["label"]

    def loss(net, variables, batch, x_adv, key):
        key_clean, key_adv = jax.random.split(key)
        (clean, _), variables = net.forward(variables, batch["image"], key_clean)
        (adv, _), variables = net.forward(variables, x_adv, key_adv)
        p_y = jnp.exp(-losses.cross_entropy(clean, losses.as_labels(batch["label"])))

        boosted = jnp.mean(boosted_cross_entropy(adv, batch["label"]))
        robust = jnp.mean(floored_kl(clean, adv) * (1.0 - p_y + 1e-7))
        value = boosted + beta * robust
        metrics = {"loss": value, "boosted": boosted, "robust": robust}
        metrics |= {"clean_acc": accuracy(clean, batch), "adv_acc": accuracy(adv, batch)}
        return value, (variables, metrics)

    return Objective(target, loss)


def boosted_cross_entropy(logits: Array, labels: Array) -> Array:
    """BCE: −log p_y − log(1 − max_{k≠y} p_k), shape (B,), of labels (B,) or distributions (B, C)."""
    p = jax.nn.softmax(logits.astype(jnp.float32))
    others = jnp.where(jax.nn.one_hot(losses.as_labels(labels), p.shape[-1], dtype=bool), 0.0, p)
    return losses.cross_entropy(logits, labels) - jnp.log(1.0001 - jnp.max(others, axis=-1) + 1e-12)


def floored_kl(reference: Array, logits: Array) -> Array:
    """KL(p || q) with log(q + 1e-12), shape (B,); gradients flow through both logits."""
    log_p = jax.nn.log_softmax(reference.astype(jnp.float32))
    log_q = jnp.log(jax.nn.softmax(logits.astype(jnp.float32)) + 1e-12)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
