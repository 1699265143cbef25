"""DKL and IKL: Cui, Tian, Zhong, Qi, Yu & Zhang, "Decoupled Kullback-Leibler Divergence Loss", NeurIPS 2024; GKL: Cui
et al., "Generalized Kullback-Leibler Divergence Loss", TPAMI 2026.

    L   = CE(z, y) + α · mean_b CE(sg p_b, p'_b) + β · mean_b W_b              z = f(x), z' = f(x'), p = softmax(z)
    W_b = 1/4 Σ_{j,k} w_j w_k (Δ_jk − Δ'_jk)²,      Δ_jk = z_j − z_k,  Δ'_jk = z'_j − z'_k
    x'  = argmax CE(p, p') + β_a·W,   from x + 0.001·N(0, 1)

    variant   w                                             in W
    dkl       sg p_b, the image's own prediction            sg Δ': the gradients are those of α·KL(p || p') where α = β
    ikl       the mean of softmax(z / T) over the images    Δ': the gradient of W reaches x' too
              of the class of x in the epoch before; 1/C
              in the first epoch

| symbol | code        | default |
|--------|-------------|---------|
|        | variant     | "ikl"   |
| α      | alpha       | 4       | the names are those of the authors' code, which has 4 or 5
| β      | beta        | 20      |
| T      | temperature | 4       | of the class means
| γ      | power       | 1       | replaces w by w^γ / Σ_k w_k^γ; GKL uses γ = 0.4
| β_a    | attack_beta | 1       | weight of W in the attack: 1 in the code for CIFAR-100, 0 in the one for CIFAR-10
|        | passes      | "adv,clean" | training-mode passes, in order

The memory holds the class means of this epoch and sums of the next. The classes of mixed or smoothed labels enter with
their probabilities.

Batch-norm: training-mode passes over x', then x; the attack runs in evaluation mode. Both are as in the authors' code.

Differences from the authors' code: there ε grows linearly over the epochs and the steps of the attack from 2 to 5,
which `config.attack` does not have; GKL divides W by Σ_b (Σ_k w_k^γ)² over the batch, here by that of each image.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from ibjax import losses
from ibjax.errors import InputError, check_range, nearest
from ibjax.objectives import passes as training_passes
from ibjax.objectives.standard import accuracy
from ibjax.step import Objective

VARIANTS = ("ikl", "dkl")


def dkl(
    *,
    variant: str = "ikl",
    alpha: float = 4.0,
    beta: float = 20.0,
    temperature: float = 4.0,
    power: float = 1.0,
    attack_beta: float = 1.0,
    passes: str = "adv,clean",
) -> Objective:
    """The decoupled or improved KL divergence; its attack is dict(name="pgd", loss="objective", init="gaussian")."""
    if variant not in VARIANTS:
        raise InputError(f"objective.variant='{variant}' is unknown; {nearest(variant, VARIANTS)}")
    for name, value in (("alpha", alpha), ("beta", beta), ("attack_beta", attack_beta), ("power", power)):
        check_range(f"objective.{name}", value, 0)
    check_range("objective.temperature", temperature, 1e-3)
    names = training_passes.order(passes, ("clean", "adv"))
    by_class = variant == "ikl"

    def weights(variables, batch, clean):
        if not by_class:
            w = jax.nn.softmax(lax.stop_gradient(clean))
        else:
            w = _product(losses.as_distribution(batch["label"], clean.shape[-1]), variables["memory"]["means"])
        return w if power == 1.0 else w**power / jnp.sum(w**power, axis=-1, keepdims=True)

    def remember(net, variables, batch, key):
        """At the first step of an epoch, the sums of the one before become its means."""
        memory, epoch = variables["memory"], jnp.floor(batch["epoch"]).astype(jnp.int32)
        count = jnp.sum(memory["sums"], axis=1, keepdims=True)
        means = jnp.where(count > 0, memory["sums"] / jnp.where(count > 0, count, 1.0), memory["means"])
        begun = epoch != memory["epoch"]
        kept = {"means": jnp.where(begun, means, memory["means"]), "epoch": epoch}
        return {**variables, "memory": {**kept, "sums": jnp.where(begun, 0.0, memory["sums"])}}

    def target(net, variables, batch, key):
        clean = net.predict(variables, batch["image"])[0]
        return {"clean": clean, "weights": weights(variables, batch, clean)}

    def attack_loss(output, target):
        logits, _ = output
        p = jax.nn.softmax(target["clean"])
        return losses.cross_entropy(logits, p) + attack_beta * weighted_square(
            target["clean"] - logits, target["weights"]
        )

    def loss(net, variables, batch, x_adv, key):
        images = {"clean": batch["image"], "adv": x_adv}
        outputs, variables = training_passes.forward(net, variables, images, names, key)
        clean, adv = (outputs[name][0].astype(jnp.float32) for name in ("clean", "adv"))
        w = weights(variables, batch, clean)
        natural = jnp.mean(losses.cross_entropy(clean, batch["label"]))
        soft = jnp.mean(losses.cross_entropy(adv, jax.nn.softmax(lax.stop_gradient(clean))))
        square = jnp.mean(weighted_square(clean - (adv if by_class else lax.stop_gradient(adv)), w))
        value = natural + alpha * soft + beta * square
        metrics = {"loss": value, "natural": natural, "soft": soft, "square": square}
        metrics |= {"clean_acc": accuracy(clean, batch), "adv_acc": accuracy(adv, batch)}
        if by_class:
            classes = losses.as_distribution(batch["label"], clean.shape[-1])
            seen = _product(classes.T, jax.nn.softmax(lax.stop_gradient(clean) / temperature))
            memory = {**variables["memory"], "sums": variables["memory"]["sums"] + seen}
            variables = {**variables, "memory": memory}
        return value, (variables, metrics)

    return Objective(
        target,
        loss,
        attack_losses=("objective",),
        flat_at_x=True,
        attack_loss=attack_loss,
        memory=_memory if by_class else None,
        remember=remember if by_class else None,
    )


def weighted_square(difference: Array, w: Array) -> Array:
    """W = 1/4 Σ_{j,k} w_j w_k (d_j − d_k)², shape (B,), of d = z − z' and w, both (B, C)."""
    total, first, second = (jnp.sum(w * d, axis=-1) for d in (jnp.ones_like(w), difference, jnp.square(difference)))
    return 0.5 * (total * second - jnp.square(first))


def _product(a, b):
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _memory(images: int, classes: int) -> dict[str, Array]:
    return {
        "means": jnp.full((classes, classes), 1.0 / classes),
        "sums": jnp.zeros((classes, classes)),
        "epoch": jnp.zeros((), jnp.int32),
    }
