"""Label smoothing: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016; combined
with adversarial training: Pang et al., "Bag of Tricks for Adversarial Training", ICLR 2021.

    L   = CE(f(x̃), y_δ)                             x̃ = x' ("pgd_at") or x ("standard"),  x' = PGD on CE to y
    y_δ = 1 − δ for the true class,  δ / (C − 1) for each other

| symbol | code   | default  |
|--------|--------|----------|
| δ      | delta  | 0.1      |
|        | base   | "pgd_at" |
|        | passes | None     | training-mode passes, in order; None: one over x̃

This is Pang et al.'s form. The form of PyTorch and Optax, (1 − δ)·onehot + δ/C, gives the other classes together
δ·(C − 1)/C instead of δ. The attack sees hard labels. `config.smoothing` smooths the labels of any objective.

Batch-norm: one training-mode pass over x̃. Pang et al.'s code makes a pass over x' and, for logging, one over x before
the optimiser's step and another over x after it. `passes="adv,clean,clean"` reproduces them, all before the step.
"""

import jax.numpy as jnp

from ibjax import losses
from ibjax.errors import InputError, check_range, nearest
from ibjax.objectives import passes as training_passes
from ibjax.objectives.standard import accuracy
from ibjax.step import Objective


def label_smoothing(*, delta: float = 0.1, base: str = "pgd_at", passes: str | None = None) -> Objective:
    """PGD adversarial training, or standard training, on smoothed labels."""
    check_range("objective.delta", delta, 0, 1, below=True)
    if base not in ("pgd_at", "standard"):
        raise InputError(f"objective.base='{base}' is unknown; {nearest(base, ('pgd_at', 'standard'))}")
    adversarial = base == "pgd_at"
    seen = "adv" if adversarial else "clean"  # x̃
    passes = passes or seen
    names = training_passes.order(passes, ("clean", "adv") if adversarial and "clean" in passes else (seen,))

    def target(net, variables, batch, key):
        return batch["label"]

    def loss(net, variables, batch, x_adv, key):
        images = {"clean": batch["image"], "adv": x_adv}
        outputs, variables = training_passes.forward(net, variables, images, names, key)
        logits, _ = outputs[seen]
        value = jnp.mean(losses.cross_entropy(logits, losses.smooth(batch["label"], logits.shape[-1], delta)))
        metrics = {f"{name}_acc": accuracy(logits, batch) for name, (logits, _) in outputs.items()}
        metrics["loss"] = value
        return value, (variables, metrics)

    return Objective(target, loss, attack_losses=("ce", "margin") if adversarial else ())
