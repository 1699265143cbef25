"""Adversarial training: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018;
as in Rice, Wong & Kolter, "Overfitting in Adversarially Robust Deep Learning", ICML 2020.

    L = CE(f(x'), y),      x' = PGD on CE

| symbol | code          | default |
|--------|---------------|---------|
|        | passes        | "adv"   | training-mode passes, in order: see below
|        | clean_forward | False   | of older runs: True adds ",clean" to `passes`

Batch-norm: one training-mode pass over x'. Published code makes more of them, for its log:

    passes            in
    adv,adv,clean     Rice et al., AWP; the attack ends with a pass over x', the step with one over x
    clean,adv         adversarial training in the code of IBD
    adv,clean,clean   Pang et al. (label_smoothing)

Here all come before the optimiser's step, there the last one over x comes after it, at the new weights; with AWP the
first is at the unperturbed weights there. In the attack, evaluation mode is the default; `config.attack_bn = "train"`
attacks in training mode as Rice et al. and Fast-AT do. AWP's code does so too, but for the first batch of each epoch
after the first, which it attacks in evaluation mode, because validation came before; here no batch is special.
"""

import jax.numpy as jnp

from ibjax import losses
from ibjax.objectives import passes as training_passes
from ibjax.objectives.standard import accuracy
from ibjax.step import Objective


def pgd_at(*, passes: str = "adv", clean_forward: bool = False) -> Objective:
    """PGD adversarial training, also called SAT."""
    passes += ",clean" * clean_forward
    names = training_passes.order(passes, ("clean", "adv") if "clean" in passes else ("adv",))

    def target(net, variables, batch, key):
        return batch["label"]

    def loss(net, variables, batch, x_adv, key):
        images = {"clean": batch["image"], "adv": x_adv}
        outputs, variables = training_passes.forward(net, variables, images, names, key)
        value = jnp.mean(losses.cross_entropy(outputs["adv"][0], batch["label"]))
        metrics = {f"{name}_acc": accuracy(logits, batch) for name, (logits, _) in outputs.items()}
        metrics["loss"] = value
        return value, (variables, metrics)

    return Objective(target, loss)
