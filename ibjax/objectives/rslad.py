"""RSLAD: Zi, Zhao, Ma & Jiang, "Revisiting Adversarial Robustness Distillation: Robust Soft Labels Make Student
Better", ICCV 2021.

    L  = α·D(p_t(x), p_s(x')) + (1−α)·D(p_t(x), p_s(x))
    D(p, q) = Σ_c p_c (log(p_c + 1e-5) − log q_c)
    x' = argmax KL(p_t(x) || p_s(x')),   from x + 0.001·N(0, 1), student in evaluation mode

| symbol    | code      | default                                                             |
|-----------|-----------|---------------------------------------------------------------------|
| α         | alpha     | 5/6                                                                 |
|           | scale     | 1; the authors' code multiplies L by 10 on CIFAR-100                |
| mean of D | reduction | "mean" over B·C, as the authors' code; or "sum" over C, mean over B  |

The two reductions differ by the factor C, so that at equal learning rates they are different methods. With "sum",
α = 0.9 and the passes exchanged, this is IBD without the feature term, up to the constant that the 1e-5 adds.

Batch-norm: training-mode passes over x', then x. The teacher is frozen and sees x.
"""

import jax
import jax.numpy as jnp

from ibjax import losses
from ibjax.errors import check_range
from ibjax.objectives.ard import check_reduction, reduce
from ibjax.objectives.standard import accuracy
from ibjax.step import Objective


def rslad(*, alpha: float = 5 / 6, scale: float = 1.0, reduction: str = "mean") -> Objective:
    """Robust soft-label distillation; its attack is dict(name="pgd", loss="kl", init="gaussian")."""
    check_range("objective.alpha", alpha, 0, 1)
    check_range("objective.scale", scale, 0)
    check_reduction(reduction)

    def target(net, variables, batch, key):
        return jax.nn.softmax(net.teacher(batch["image"])[0])

    def loss(net, variables, batch, x_adv, key):
        key_adv, key_clean = jax.random.split(key)
        p_t = target(net, variables, batch, key)
        (adv, _), variables = net.forward(variables, x_adv, key_adv)
        (clean, _), variables = net.forward(variables, batch["image"], key_clean)

        def divergence(logits):
            constant = jnp.sum(p_t * jnp.log(p_t + 1e-5), -1)
            return reduce(constant + losses.cross_entropy(logits, p_t), logits, reduction)

        robust, natural = divergence(adv), divergence(clean)
        value = scale * (alpha * robust + (1 - alpha) * natural)
        metrics = {"loss": value, "robust": robust, "natural": natural}
        metrics |= {"clean_acc": accuracy(clean, batch), "adv_acc": accuracy(adv, batch)}
        return value, (variables, metrics)

    return Objective(target, loss, teachers=("teacher",), attack_losses=("kl", "ce"), fits_labels=False)
