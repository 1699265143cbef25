"""Adversarial training: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018;
as in Rice, Wong & Kolter, "Overfitting in Adversarially Robust Deep Learning", ICML 2020.

    L = CE(f(x'), y),      x' = PGD on CE

| symbol | code          | default |
|--------|---------------|---------|
|        | passes        | "adv"   | training-mode passes, in order: see below
|        | clean_forward | False   | an option of older runs: True adds ",clean" to `passes`

Batch-norm: one training-mode pass over x'. Published code makes more of them, for logging:

    passes            in
    adv,adv,clean     Rice et al., AWP; their attack ends with a pass over x', their step with one over x
    clean,adv         adversarial training in the code of IBD
    adv,clean,clean   Pang et al. (label_smoothing)

Here all passes come before the optimiser's step. In the published code the last pass over x comes after the step, at
the new weights, and the first pass of AWP is made at the unperturbed weights. The attack runs in evaluation mode by
default; with `config.attack_bn = "train"` it runs in training mode, as that of Rice et al. and of Fast-AT. The code of
AWP attacks in training mode too, but from the second epoch on it attacks an epoch's first batch in
evaluation mode, left over from the validation before. Here all batches are treated alike.
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
