"""SCORE: Pang, Lin, Yang, Zhu & Yan, "Robustness and Accuracy Could Be Reconcilable by (Proper) Definition", ICML 2022.

    base "trades":   L  = mean_b max(0, D(p, y) + β·D(p', p) − c),   x' = argmax D(p', sg p)   p = p(x), p' = p(x')
    base "pgd_at":   L  = mean_b max(0, D(p', y) − c),               x' = argmax D(p', y)
    divergence "lse":  D(q, p) = Σ_k (q_k − p_k)²                 the squared error; with it the method is SCORE
    divergence "kl":   D(q, p) = KL(p || q)                       the baselines of the paper: TRADES and PGD-AT

| symbol | code       | default     |
|--------|------------|-------------|
|        | base       | "trades"    |
| D      | divergence | "lse"       |
| β      | beta       | 4           | 3 in the published checkpoints, 6 without generated images
| c      | clip       | 0           | given as δ: c = D(y_δ, y), y_δ = (1 − δ, δ/(C−1), …)
|        |            |             | without generated images δ = 0.4 ("pgd_at") and 0.3 ("trades")
|        | clipped    | "total"     | or "robust": L = mean_b [ D(p, y) + β·max(0, D(p', p) − c) ]
|        | passes     | None        | training-mode passes, in order; None: "clean,adv" for "trades", "adv" for "pgd_at"

Gradients flow through p in both terms. Where images are mixed (`config.mix`), y is the mixed label, and the attack of
"trades" climbs away from it in place of p. Labels are smoothed by `config.smoothing`.

Batch-norm: training-mode passes over x, then x'. The code for generated images attacks with the batch's own statistics
and leaves the running ones unchanged (`config.attack_bn = "batch"`), starting at U(−ε, ε). The one without passes over
x' first (passes="adv,clean"). Its "trades" attacks in evaluation mode from x + 0.001·N(0, 1), its "pgd_at" in training
mode (`config.attack_bn = "train"`).

The two published codes differ: the one with generated images takes its option `clip_value` for c itself, not for δ, and
clips the robust term alone (default 0: nothing); the one without generated images does as the formula above.
"""

import jax
import jax.numpy as jnp
from jax import Array

from ibjax import losses
from ibjax.errors import InputError, check_range, nearest
from ibjax.objectives import passes as training_passes
from ibjax.objectives.standard import accuracy
from ibjax.objectives.trades import attack_target
from ibjax.step import Objective


def squared_error(logits: Array, target: Array) -> Array:
    """Σ_k (softmax(logits)_k − target_k)², shape (B,), of distributions (B, C)."""
    return jnp.sum(jnp.square(jax.nn.softmax(logits.astype(jnp.float32)) - target), axis=-1)


DIVERGENCES = {"lse": squared_error, "kl": losses.kl}
CHOICES = {"base": ("trades", "pgd_at"), "divergence": tuple(DIVERGENCES), "clipped": ("total", "robust")}


def score(
    *,
    base: str = "trades",
    divergence: str = "lse",
    beta: float = 4.0,
    clip: float = 0.0,
    clipped: str = "total",
    passes: str | None = None,
) -> Objective:
    """SCORE; its attack is dict(name="pgd", loss="objective", …), init as above."""
    for name, value in dict(base=base, divergence=divergence, clipped=clipped).items():
        if value not in CHOICES[name]:
            raise InputError(f"objective.{name}='{value}' is unknown; {nearest(value, CHOICES[name])}")
    check_range("objective.beta", beta, 0)
    check_range("objective.clip", clip, 0, 1, below=True)
    both = base == "trades"
    if clipped == "robust" and not both:
        raise InputError("objective.clipped='robust' needs base='trades', which has a robust term of its own")
    passes = passes or ("clean,adv" if both else "adv")
    names = training_passes.order(passes, ("clean", "adv") if both or "clean" in passes else ("adv",))
    d = DIVERGENCES[divergence]

    def target(net, variables, batch, key):
        return attack_target(net, variables, batch) if both else batch["label"]

    def attack_loss(output, target):
        logits, _ = output
        return d(logits, losses.as_distribution(target, logits.shape[-1]))

    def bound(classes):
        y = jnp.zeros((1, classes)).at[0, 0].set(1.0)
        y_delta = losses.smooth(jnp.zeros(1, jnp.int32), classes, clip)
        return d(jnp.log(jnp.maximum(y_delta, 1e-30)), y)[0] if clip else 0.0

    def above(value, c):
        return jax.nn.relu(value - c) if clip else value

    def loss(net, variables, batch, x_adv, key):
        images = {"clean": batch["image"], "adv": x_adv}
        outputs, variables = training_passes.forward(net, variables, images, names, key)
        metrics = {f"{name}_acc": accuracy(logits, batch) for name, (logits, _) in outputs.items()}
        adv = outputs["adv"][0]
        classes = adv.shape[-1]
        y, c = losses.as_distribution(batch["label"], classes), bound(classes)
        if both:
            clean = outputs["clean"][0]
            natural = d(clean, y)
            robust = losses.kl_logits(clean, adv) if divergence == "kl" else squared_error(adv, jax.nn.softmax(clean))
            metrics |= {"natural": jnp.mean(natural), "robust": jnp.mean(robust)}
            total = clipped == "total"
            each = above(natural + beta * robust, c) if total else natural + beta * above(robust, c)
        else:
            each = above(d(adv, y), c)
        value = jnp.mean(each)
        return value, (variables, {"loss": value, **metrics})

    return Objective(target, loss, attack_losses=("objective",), flat_at_x=both, attack_loss=attack_loss)
