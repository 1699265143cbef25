"""Temporal ensembling: Dong et al., "Exploring Memorization in Adversarial Training", ICLR 2022.

    e_i <- η·e_i + (1 − η)·p(x_i)    in evaluation mode, before the attack, from epoch `start` on;   t_i = e_i / Σ_c e_i
    w(e) = 0 (e < start),   W·exp(−5·(1 − (e − start) / (end − start))²),   W (e > end)              e = 1, 2, … epochs

    base "pgd_at":   L  = CE(x') + w · mean_{b,c} (p(x') − t)²
                     x' = argmax L,                                          from U(−ε, ε), not clipped to [0, 1]
    base "trades":   L  = CE(x) + β · mean_b KL(p(x) || p(x')) + w · mean_{b,c} (p(x) − t)²
                     x' = argmax β·KL(sg p(x) || p(x')) + w · mean_c (p(x') − t)²,   from x + 0.001·N(0, 1)

| symbol | code       | default  |
|--------|------------|----------|
|        | base       | "pgd_at" |
| W      | weight     | 300      |
| η      | momentum   | 0.9      |
|        | start, end | 90, 150  |
| β      | beta       | 6        | of base "trades"

Every training image has one e, which all its augmented versions update; it starts at zero.

Batch-norm: training-mode passes over x' ("pgd_at"), or over x, then x' ("trades"). The attack and p(x_i) use evaluation
mode. Both are as in the authors' code.
"""

import jax
import jax.numpy as jnp

from ibjax import losses
from ibjax.errors import InputError, check_range, nearest
from ibjax.objectives.standard import accuracy
from ibjax.objectives.trades import attack_target
from ibjax.step import Objective


def te(
    *,
    base: str = "pgd_at",
    weight: float = 300.0,
    momentum: float = 0.9,
    start: int = 90,
    end: int = 150,
    beta: float = 6.0,
) -> Objective:
    """Temporal ensembling; its attack is dict(name="pgd", loss="objective", …), init as above."""
    if base not in ("pgd_at", "trades"):
        raise InputError(f"objective.base='{base}' is unknown; {nearest(base, ('pgd_at', 'trades'))}")
    check_range("objective.weight", weight, 0)
    check_range("objective.momentum", momentum, 0, 1, below=True)
    check_range("objective.beta", beta, 0)
    check_range("objective.start", start, 1)
    check_range("objective.end", end, start + 1)

    def epoch(batch):  # counted from 1
        return jnp.floor(batch["epoch"]) + 1

    def ramp(batch):
        done = jnp.clip((epoch(batch) - start) / (end - start), 0.0, 1.0)
        return jnp.where(epoch(batch) < start, 0.0, weight * jnp.exp(-5.0 * jnp.square(1.0 - done)))

    def remember(net, variables, batch, key):
        e = variables["memory"][batch["index"]]
        p = jax.nn.softmax(net.predict(variables, batch["image"])[0])
        e = jnp.where(epoch(batch) < start, e, momentum * e + (1.0 - momentum) * p)
        return {**variables, "memory": variables["memory"].at[batch["index"]].set(e)}

    def ensemble(variables, batch):
        e = variables["memory"][batch["index"]]
        return e / jnp.maximum(jnp.sum(e, axis=-1, keepdims=True), 1e-12)  # e is zero before `start`, and so is w

    def target(net, variables, batch, key):
        known = {"t": ensemble(variables, batch), "w": ramp(batch)}
        if base == "trades":
            return {**known, "p": attack_target(net, variables, batch)}
        return {**known, "y": batch["label"]}

    def attack_loss(output, target):
        logits, _ = output
        fit = beta * losses.kl(logits, target["p"]) if "p" in target else losses.cross_entropy(logits, target["y"])
        return fit + target["w"] * distance(logits, target["t"])

    def loss(net, variables, batch, x_adv, key):
        t, w = ensemble(variables, batch), ramp(batch)
        key_clean, key_adv = jax.random.split(key)
        if base == "trades":
            (clean, _), variables = net.forward(variables, batch["image"], key_clean)
            (adv, _), variables = net.forward(variables, x_adv, key_adv)
            fit = jnp.mean(losses.cross_entropy(clean, batch["label"]) + beta * losses.kl_logits(clean, adv))
            memorised = jnp.mean(distance(clean, t))
        else:
            (adv, _), variables = net.forward(variables, x_adv, key_adv)
            fit = jnp.mean(losses.cross_entropy(adv, batch["label"]))
            memorised = jnp.mean(distance(adv, t))
        value = fit + w * memorised
        metrics = {"loss": value, "fit": fit, "ensemble": memorised, "weight": w, "adv_acc": accuracy(adv, batch)}
        return value, (variables, metrics)

    return Objective(
        target,
        loss,
        attack_losses=("objective",),
        flat_at_x=base == "trades",
        attack_loss=attack_loss,
        memory=lambda images, classes: jnp.zeros((images, classes), jnp.float32),
        remember=remember,
    )


def distance(logits, t):
    """mean_c (softmax(logits) − t)², shape (B,)."""
    return jnp.mean(jnp.square(jax.nn.softmax(logits) - t), axis=-1)
