"""Max-margin adversarial training: Ding et al., "MMA Training: Direct Input Space Margin Maximization through
Adversarial Training", ICLR 2020.

    L     = (1 − ω) · L_mma + ω · mean_b CE(x, y)
    L_mma = 1/B · ( Σ_{correct, ε* < d_max} CE(x + ε*·u, y) + Σ_{wrong} CE(x, y) )       correct: SLM(x) < 0
    SLM   = logsumexp_{k≠y} z_k − z_y                                                    soft logit margin
    u     = (x_PGD − x) / ε,   x_PGD: PGD on SLM within ε,   ε = max(d_min, the image's ε* of the previous epoch)
    ε*    = the radius r at which SLM(clip(x + r·u)) changes sign, by bisection of [0, 1.05·d_max], first at ε

| symbol       | code         | default  |
|--------------|--------------|----------|
| d_max        | max_eps      | "12/255" |
| d_min        | min_eps      | 0.005    | 0.1 on MNIST
| ω            | clean_weight | 1/3      |
| PGD steps    | steps        | 10       | of length 2.5·ε/steps, from U(−ε, ε); 40 on MNIST
| bisections   | search_steps | 10       |

The method brings its own attack, with a radius for each image: set `attack=None`. The ε* of a misclassified image is
stored as 0. The adversarial image is not clipped to [0, 1], as in the authors' code.

Batch-norm: training-mode passes over x, over the result of PGD, `search_steps` times in the bisection, and over the
mixed minibatch; PGD runs in evaluation mode. The authors' code runs PGD and bisection on the correctly classified
images alone. Here the misclassified ones stay in the bisection's minibatches, unperturbed, and enter their statistics.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from ibjax import losses
from ibjax.attacks import geometry
from ibjax.attacks.pgd import pgd
from ibjax.devices import cores
from ibjax.errors import InputError, check_range
from ibjax.objectives.standard import accuracy
from ibjax.step import Objective


def mma(
    *,
    max_eps: str | float = "12/255",
    min_eps: str | float = 0.005,
    clean_weight: float = 1 / 3,
    steps: int = 10,
    search_steps: int = 10,
) -> Objective:
    """MMA training with the soft logit margin, in l_inf."""
    d_max = geometry.radius(max_eps, "linf", "objective.max_eps")
    d_min = geometry.radius(min_eps, "linf", "objective.min_eps")
    if not 0 < d_min <= d_max <= 0.95:
        raise InputError(f"objective.min_eps={min_eps} and max_eps={max_eps} are not allowed; 0 < min_eps <= max_eps")
    check_range("objective.clean_weight", clean_weight, 0, 1)
    check_range("objective.steps", steps, 1)
    check_range("objective.search_steps", search_steps, 1)

    def attack(net, variables, batch, key):
        x, y = batch["image"], batch["label"]
        key_clean, key_pgd, key_search = jax.random.split(key, 3)
        (clean, _), variables = net.forward(variables, x, key_clean)
        correct = soft_logit_margin(clean, y) < 0
        eps = jnp.clip(variables["memory"][batch["index"]], d_min, 1.05 * d_max)
        ascend = pgd(loss=soft_logit_margin, eps=eps, step_size=2.5 * eps / steps, steps=steps, init="uniform")
        reached = ascend(key_pgd, lambda x: net.predict(variables, x)[0], x, y)
        u = jnp.where(geometry.per_image(correct, x), (reached - x) / geometry.per_image(eps, x), 0.0)

        def margin(eps, variables):
            point = jnp.clip(x + geometry.per_image(eps, x) * u, 0.0, 1.0)
            (logits, _), variables = net.forward(variables, point, key_search)
            return soft_logit_margin(logits, y), variables

        eps, variables = bisect(margin, eps, 1.05 * d_max, search_steps, variables)
        eps = jnp.where(correct, eps, 0.0)
        memory = variables["memory"].at[batch["index"]].set(eps)
        mixed = {"image": x + geometry.per_image(eps, x) * u, "counts": eps < d_max, "eps": eps, "correct": correct}
        return mixed, {**variables, "memory": memory}

    def target(net, variables, batch, key):
        return batch["label"]

    def loss(net, variables, batch, mixed, key):
        y, (key_clean, key_adv) = batch["label"], jax.random.split(key)
        # the attack's own pass over x has moved the running statistics already
        (clean, _), _ = net.forward(variables, batch["image"], key_clean)
        (logits, _), variables = net.forward(variables, mixed["image"], key_adv)
        natural = jnp.mean(losses.cross_entropy(clean, y))
        margin = jnp.mean(jnp.where(mixed["counts"], losses.cross_entropy(logits, y), 0.0))
        value = (1.0 - clean_weight) * margin + clean_weight * natural
        metrics = {"loss": value, "natural": natural, "margin": margin, "clean_acc": accuracy(clean, batch)}
        return value, (variables, {**metrics, "mean_eps": jnp.mean(mixed["eps"])})

    return Objective(
        target,
        loss,
        attack_losses=(),
        attack=attack,
        memory=lambda images, classes: jnp.zeros(images, jnp.float32),
    )


def soft_logit_margin(logits: Array, labels: Array) -> Array:
    """logsumexp_{k≠y} z_k − z_y, shape (B,): negative where the true class has a probability above one half."""
    logits = logits.astype(jnp.float32)
    is_true = jax.nn.one_hot(losses.as_labels(labels), logits.shape[-1], dtype=bool)
    others = jax.nn.logsumexp(jnp.where(is_true, -jnp.inf, logits), axis=-1)
    return others - jnp.sum(jnp.where(is_true, logits, 0.0), axis=-1)


def bisect(margin, eps, max_eps, steps, state):
    """Bisects for the eps in [0, max_eps] at which a margin changes sign; returns (eps (B,), state).

    `margin(eps, state) -> ((B,), state)` rises from negative to positive. The first interval is split at the given eps
    (B,), the following `steps` − 1 at their middle. The middle of the last interval is returned; it lies within
    2^-steps·max_eps of the root, if there is one. As in the authors' code, the margin is also evaluated there, which
    updates the running statistics.
    """

    def halve(_, carry):
        low, high, eps, value, state = carry
        low, high = jnp.where(value < 0, eps, low), jnp.where(value < 0, high, eps)
        middle = (low + high) / 2
        value, state = margin(middle, state)
        return low, high, middle, value, state

    value, state = margin(eps, state)
    carry = (jnp.zeros_like(eps), jnp.full_like(eps, max_eps), eps, value, state)
    _, _, eps, _, state = lax.fori_loop(0, steps, halve, carry, unroll=cores.form().unroll)
    return eps, state
