"""TRADES: Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019.

    L = CE(f(x), y) + β · mean_b KL(p(x) || p(x'))
    x' = argmax KL(sg p(x) || p(x')),   from x + 0.001·N(0, 1)

| symbol | code     | default |
|--------|----------|---------|
| β      | beta     | 6 (CIFAR-10; 1 on MNIST) |
|        | forwards | 2       |

Gradients flow through p(x) as well: stopping them there is a different method.

Batch-norm: training-mode passes over x, then x'. The authors' code runs x once more for the regulariser, a third
update of the running statistics with x (`forwards=3`; values and gradients are the same). The attack runs in
evaluation mode, with p(x) from evaluation mode.
"""

import jax
import jax.numpy as jnp

from ibjax import losses
from ibjax.errors import InputError, check_range
from ibjax.objectives.standard import accuracy
from ibjax.step import Objective


def trades(*, beta: float = 6.0, forwards: int = 2) -> Objective:
    """TRADES; its attack is dict(name="pgd", loss="kl", init="gaussian")."""
    check_range("objective.beta", beta, 0)
    if forwards not in (2, 3):
        raise InputError(f"objective.forwards={forwards} is not allowed; 2 (x, x') or 3 (x, x', x again)")

    def target(net, variables, batch, key):
        return jax.nn.softmax(net.predict(variables, batch["image"])[0])

    def loss(net, variables, batch, x_adv, key):
        key_clean, key_adv, key_again = jax.random.split(key, 3)
        (clean, _), variables = net.forward(variables, batch["image"], key_clean)
        (adv, _), variables = net.forward(variables, x_adv, key_adv)
        if forwards == 3:
            (again, _), variables = net.forward(variables, batch["image"], key_again)
        else:
            again = clean
        natural = jnp.mean(losses.cross_entropy(clean, batch["label"]))
        robust = jnp.mean(losses.kl_logits(again, adv))
        value = natural + beta * robust
        metrics = {"loss": value, "natural": natural, "robust": robust}
        metrics |= {"clean_acc": accuracy(clean, batch), "adv_acc": accuracy(adv, batch)}
        return value, (variables, metrics)

    return Objective(target, loss, attack_losses=("kl",), flat_at_x=True)
