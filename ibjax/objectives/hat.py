"""HAT: Rade & Moosavi-Dezfooli, "Reducing Excessive Margin to Achieve a Better Accuracy vs. Robustness Trade-off", ICLR
2022 (helper-based adversarial training).

    base "trades":   L = CE(x, y) + β · mean_b KL(p(x) || p(x')) + γ · CE(x̃, ỹ),     x' = argmax KL(sg p(x) || p(x'))
    base "pgd_at":   L = CE(x, y) + β · CE(x', y)                + γ · CE(x̃, ỹ),     x' = PGD on CE
    helper:          x̃ = x + h·(x' − x),   ỹ = argmax_k of the teacher's logits at x'

| symbol | code  | default  |
|--------|-------|----------|
|        | base  | "trades" |
| β      | beta  | 2.5      | 3.5 with generated images
| γ      | gamma | 0.5      |
| h      | h     | 2        |

The teacher is a network that was trained on clean images, which x' misleads: x̃ lies beyond x' in the same direction and
gets the class that x' looks like to a standard network. It is not clipped to [0, 1]. The teacher is frozen and in
evaluation mode. Smoothed or mixed labels change the terms with y; ỹ stays one class.

Batch-norm: training-mode passes over x, x', then x̃; the attack runs in evaluation mode. Both are as in the code.

Written from the authors' code. The default of h is that of its command line; its functions have 3.5.
"""

import jax
import jax.numpy as jnp

from ibjax import losses
from ibjax.errors import InputError, check_range, nearest
from ibjax.objectives.standard import accuracy
from ibjax.objectives.trades import attack_target
from ibjax.step import Objective

BASES = ("trades", "pgd_at")


def hat(*, base: str = "trades", beta: float = 2.5, gamma: float = 0.5, h: float = 2.0) -> Objective:
    """Helper-based adversarial training; its attack is that of its base, loss="kl" with init="gaussian", or "ce"."""
    if base not in BASES:
        raise InputError(f"objective.base='{base}' is unknown; {nearest(base, BASES)}")
    for name, value in (("beta", beta), ("gamma", gamma), ("h", h)):
        check_range(f"objective.{name}", value, 0)
    by_kl = base == "trades"

    def target(net, variables, batch, key):
        return attack_target(net, variables, batch) if by_kl else batch["label"]

    def loss(net, variables, batch, x_adv, key):
        x, y = batch["image"], batch["label"]
        keys = jax.random.split(key, 3)
        y_help = losses.as_labels(net.teacher(x_adv)[0])
        (clean, _), variables = net.forward(variables, x, keys[0])
        (adv, _), variables = net.forward(variables, x_adv, keys[1])
        (helped, _), variables = net.forward(variables, x + h * (x_adv - x), keys[2])

        natural = jnp.mean(losses.cross_entropy(clean, y))
        robust = jnp.mean(losses.kl_logits(clean, adv) if by_kl else losses.cross_entropy(adv, y))
        helper = jnp.mean(losses.cross_entropy(helped, y_help))
        value = natural + beta * robust + gamma * helper
        metrics = {"loss": value, "natural": natural, "robust": robust, "helper": helper}
        metrics |= {"clean_acc": accuracy(clean, batch), "adv_acc": accuracy(adv, batch)}
        return value, (variables, metrics)

    attack_losses = ("kl",) if by_kl else ("ce", "margin")
    return Objective(target, loss, teachers=("teacher",), attack_losses=attack_losses, flat_at_x=by_kl)
