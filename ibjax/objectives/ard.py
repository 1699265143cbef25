"""ARD: Goldblum, Fowl, Feizi & Goldstein, "Adversarially Robust Distillation", AAAI 2020.

    L  = α·T²·D_T(p_t(x), p_s(x')) + (1−α)·CE(f_s(x), y),      x' = PGD on CE
    D_T(p, q) = KL(p^(T) || q^(T)),  p^(T) = softmax(logits / T)

| symbol    | code        | default                                                            |
|-----------|-------------|--------------------------------------------------------------------|
| α         | alpha       | 1                                                                  |
| T         | temperature | 30                                                                 |
| mean of D | reduction   | "mean" over B·C, as the authors' code; or "sum" over C, mean over B |

The two reductions differ by the factor C. The code of IAD implements ARD with T = 1 and "sum".

Batch-norm: training-mode passes over x', then x; with α = 1 the pass over x only updates the running statistics. The
authors attack in training mode, from a start that may lie outside [0, 1]: `config.attack_bn = "train"`,
`attack.init = "uniform_unclipped"`. The teacher is frozen and sees x.
"""

import jax.numpy as jnp

from ibjax import losses
from ibjax.errors import InputError, check_range, nearest
from ibjax.objectives.standard import accuracy
from ibjax.step import Objective

REDUCTIONS = ("mean", "sum")


def ard(*, alpha: float = 1.0, temperature: float = 30.0, reduction: str = "mean") -> Objective:
    """Adversarially robust distillation; its attack is PGD on cross-entropy."""
    check_range("objective.alpha", alpha, 0, 1)
    check_range("objective.temperature", temperature, 1e-3)
    check_reduction(reduction)

    def target(net, variables, batch, key):
        return batch["label"]

    def loss(net, variables, batch, x_adv, key):
        T = temperature
        teacher, _ = net.teacher(batch["image"])
        (adv, _), variables = net.forward(variables, x_adv, key)
        (clean, _), variables = net.forward(variables, batch["image"], key)

        robust = reduce(losses.kl_logits(teacher / T, adv / T), teacher, reduction)
        natural = jnp.mean(losses.cross_entropy(clean, batch["label"]))
        value = alpha * T**2 * robust + ((1 - alpha) * natural if alpha < 1 else 0.0)
        metrics = {"loss": value, "robust": robust, "natural": natural}
        metrics |= {"clean_acc": accuracy(clean, batch), "adv_acc": accuracy(adv, batch)}
        return value, (variables, metrics)

    return Objective(target, loss, teachers=("teacher",), fits_labels=alpha < 1)


def check_reduction(reduction: str) -> None:
    """Raises InputError unless `reduction` is one of REDUCTIONS."""
    if reduction not in REDUCTIONS:
        raise InputError(f"objective.reduction='{reduction}' is unknown; {nearest(reduction, REDUCTIONS)}")


def reduce(divergence, logits, reduction):
    """The mean over B·C ("mean") or over B ("sum") of divergences (B,) that are sums over the C classes."""
    return jnp.mean(divergence) / (logits.shape[-1] if reduction == "mean" else 1)
