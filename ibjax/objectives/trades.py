"""TRADES: Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019.

    L = CE(f(x), y) + β · mean_b KL(p(x) || p(x'))
    x' = argmax KL(sg p(x) || p(x')),   from x + 0.001·N(0, 1)

| symbol | code     | default     |
|--------|----------|-------------|
| β      | beta     | 6           | 1 on MNIST
|        | passes   | "clean,adv" | training-mode passes, in order
|        | forwards | 2           | an option of older runs: 3 adds ",clean" to `passes`

Gradients flow through p(x) as well; stopping them there would be a different method. Where images are mixed
(`config.mix`), the attack climbs away from their mixed labels in place of p(x), as Rebuffi et al. (2021) do.

Batch-norm: training-mode passes over x, then x', as in the code of IBD. The authors' code makes another pass over x for
the regulariser, which updates the running statistics a third time (`passes="clean,adv,clean"`; values and gradients are
the same). The code of TRADES-AWP starts with x' (`"adv,clean,clean"`). The attack and its p(x) use evaluation mode.
"""

import jax
import jax.numpy as jnp
from jax import Array

from ibjax import losses
from ibjax.errors import InputError, check_range
from ibjax.net import Net, Variables
from ibjax.objectives import passes as training_passes
from ibjax.objectives.standard import accuracy
from ibjax.step import Batch, Objective


def trades(*, beta: float = 6.0, passes: str = "clean,adv", forwards: int = 2) -> Objective:
    """TRADES; its attack is dict(name="pgd", loss="kl", init="gaussian")."""
    check_range("objective.beta", beta, 0)
    if forwards not in (2, 3):
        raise InputError(f"objective.forwards={forwards} is not allowed; 2 (x, x') or 3 (x, x', x again)")
    names = training_passes.order(passes + ",clean" * (forwards - 2), ("clean", "adv"))

    def target(net, variables, batch, key):
        return attack_target(net, variables, batch)

    def loss(net, variables, batch, x_adv, key):
        images = {"clean": batch["image"], "adv": x_adv}
        outputs, variables = training_passes.forward(net, variables, images, names, key)
        clean, adv = outputs["clean"][0], outputs["adv"][0]
        natural = jnp.mean(losses.cross_entropy(clean, batch["label"]))
        robust = jnp.mean(losses.kl_logits(clean, adv))
        value = natural + beta * robust
        metrics = {"loss": value, "natural": natural, "robust": robust}
        metrics |= {"clean_acc": accuracy(clean, batch), "adv_acc": accuracy(adv, batch)}
        return value, (variables, metrics)

    return Objective(target, loss, attack_losses=("kl",), flat_at_x=True)


def attack_target(net: Net, variables: Variables, batch: Batch) -> Array:
    """What the attack on KL climbs away from, (B, C): p(x) in evaluation mode, or the labels of mixed images."""
    if "share" in batch:
        return batch["label"]
    return jax.nn.softmax(net.predict(variables, batch["image"])[0])
