"""SiRIIB: Li et al., "Singular Regularization with Information Bottleneck Improves Model's Adversarial Robustness".

    L      = L_ori + λ₁ (L_svd + L_info) + λ₂ R_τ
    L_svd  = d(Σ_avg, Σ) + d(P_avg, P) + d(x_avg, x)       U Σ Vᵀ the SVD of an image's channel, P = U Vᵀ
    L_info = Σ_i d(f_i(x'), f_i(x))                        f_i: what is added to the classifier's features
    R_τ                                                    keeps the kernels that modulate singular vectors orthogonal

x_avg is the calibrated x' (models/siriib.py); Σ_avg and P_avg belong to it, Σ and P to x. L_ori is the loss of another
objective on the whole network; the attack is also the one of that objective.

| symbol | code       | default  |                                                                                 |
|--------|------------|----------|---------------------------------------------------------------------------------|
| λ₁     | lam        | 20       |                                                                                 |
| λ₂     | lam_tau    | 1e-4     |                                                                                 |
| L_ori  | base       | "pgd_at" | or "trades" (β: `base_beta`, 6), "te", "te_trades"; AWP by config.perturb       |
| d      | distance   | "mse"    | mean over all elements of the square; "l2_per_image": mean_b ‖·‖₂, by colour    |
|        |            |          | channel or feature map; "fro_batch": ‖·‖₂ of the whole batch                     |
|        | info_stop  | False    | True: no gradient to the clean f_i, which are then a fixed target               |

With model.connections=0 the singular regularisation is trained beside a plain classifier (isolated training, Tables 8
and 9): L_info is empty and no gradient of L_svd reaches the classifier. The paper states no λ₁ for it; our recipe uses
1.

A weight perturbation (AWP) maximises L_ori alone.

Batch-norm: the passes of L_ori. If none of them is a training-mode pass over x, one follows that updates the running
statistics of the added parts only; so it is in isolated training, where the paper trains them on x' alone.

There is no public code. The paper writes d as ‖·‖₂ without a reduction. With norms that are not squared, λ₁ = 1 would
already swamp L_ori, which contradicts the paper's Table 2; hence our mean square. Derivatives: information/svd.py.

Why the clean f_i have a gradient: without it, the step does not descend on L_info. Where f_i(x') < f_i(x) the step
enlarges the weights of p_i; both features then grow, and so does their difference. With λ₁ = 20, a constant rate of 0.1
and batches of 64 on small networks (results/siriib-info-stop.md), L_info stayed below 0.04 with the gradient. Without,
it rose above 1 in every run. It rose to infinity in one of three runs on digits, at step 277, and in all three on
MNIST, at steps 28 to 34; the other two came down again and learned.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from ibjax import losses
from ibjax.attacks import Attack
from ibjax.attacks.pgd import pgd
from ibjax.devices import precision
from ibjax.errors import InputError, check_range, nearest
from ibjax.information.svd import singular_values_and_polar
from ibjax.net import Net, Output
from ibjax.objectives.pgd_at import pgd_at
from ibjax.objectives.te import te
from ibjax.objectives.trades import trades
from ibjax.step import Objective

ADDED = ("calibration", "extractor")  # modules of the network that are not the classifier's


def mean_square(a: Array, b: Array) -> Array:
    """The mean of (a − b)² over all elements."""
    return jnp.mean(jnp.square(a - b))


def _mean_square_of_each(a: Array, b: Array) -> Array:
    """The mean of (a − b)² over each image's elements, (B,)."""
    return jnp.mean(jnp.square(a - b), axis=tuple(range(1, a.ndim)))


def l2_per_image(a: Array, b: Array) -> Array:
    """The mean over images and the last axis (colour channels, feature maps) of ‖a − b‖₂."""
    squares = jnp.sum(jnp.square(a - b), axis=tuple(range(1, a.ndim - 1)))
    return jnp.mean(jnp.sqrt(squares + 1e-24))


def fro_batch(a: Array, b: Array) -> Array:
    """‖a − b‖₂ over the whole batch."""
    return jnp.sqrt(jnp.sum(jnp.square(a - b)) + 1e-24)


DISTANCES = {"mse": mean_square, "l2_per_image": l2_per_image, "fro_batch": fro_batch}
BASES = {
    "pgd_at": lambda beta: pgd_at(),
    "trades": lambda beta: trades(beta=beta),
    "te": lambda beta: te(),
    "te_trades": lambda beta: te(base="trades", beta=beta),
}


def siriib(
    *,
    base: str = "pgd_at",
    base_beta: float = 6.0,
    lam: float = 20.0,
    lam_tau: float = 1e-4,
    distance: str = "mse",
    info_stop: bool = False,
) -> Objective:
    """SiRIIB on a base objective, whose attack it shares; use with model=dict(name="siriib", …)."""
    for name, value, allowed in (("base", base, BASES), ("distance", distance, DISTANCES)):
        if value not in allowed:
            raise InputError(f"objective.{name}='{value}' is unknown; {nearest(value, allowed)}")
    check_range("objective.lam", lam, 0)
    check_range("objective.lam_tau", lam_tau, 0)
    original = BASES[base](base_beta)
    d = DISTANCES[distance]

    def loss(net, variables, batch, x_adv, key):
        key_base, key_clean = jax.random.split(key)
        x = batch["image"]
        passes = []
        value, (variables, metrics) = original.loss(_recorded(net, passes), variables, batch, x_adv, key_base)
        adv = next(output[1] for u, output in passes if u is x_adv)
        if "x_avg" not in adv:
            raise InputError("objective 'siriib' needs its network; set model=dict(name='siriib', backbone=…)")
        seen = [output[1] for u, output in passes if u is x]
        if seen:
            clean = seen[0]
        else:
            (_, clean), updated = net.forward(variables, x, key_clean)
            variables = _with_added_statistics(variables, updated)

        svd = svd_loss(adv["x_avg"], x, d)
        info = info_loss(adv, clean, d, stop=info_stop)
        penalty = adv["orthogonality"]
        metrics |= {"base": value, "svd": svd, "info": info, "orthogonality": penalty}
        value = value + lam * (svd + info) + lam_tau * penalty
        return value, (variables, {**metrics, "loss": value})

    def proxy(net, variables, batch, x_adv, key):
        return original.loss(net, variables, batch, x_adv, jax.random.split(key)[0])[0]

    return original._replace(loss=loss, proxy=proxy)


def _recorded(net: Net, passes: list[tuple[Array, Output]]) -> Net:
    """The network, which appends (x, output) of each training-mode pass to `passes`, so that it can be reused."""

    def forward(variables, x, key, edits=None):
        output, variables = net.forward(variables, x, key, edits)
        passes.append((x, output))
        return output, variables

    return net._replace(forward=forward)


def _with_added_statistics(variables, updated):
    """`variables` with the batch statistics of the added parts, but not of the classifier, replaced."""
    statistics = dict(variables["batch_stats"])
    for name, new in updated["batch_stats"].items():
        if name in ADDED:
            statistics[name] = new
    return {**variables, "batch_stats": statistics}


def svd_loss(x_avg: Array, x: Array, d=mean_square) -> Array:
    """L_svd of calibrated images and their clean ones, (B, H, W, C) with H = W; gradients flow to x_avg only."""

    pair = jnp.stack([x_avg, lax.stop_gradient(x)], axis=1)  # one SVD for both: it takes minutes to compile for a TPU
    sigma, polar = singular_values_and_polar(jnp.moveaxis(pair, -1, 2))  # (B, 2, C, H, W): one matrix per channel
    sigma, polar = jnp.moveaxis(sigma, 2, -1), jnp.moveaxis(polar, 2, -1)  # channels last, as in the images
    return d(sigma[:, 0], sigma[:, 1]) + d(polar[:, 0], polar[:, 1]) + d(x_avg, x)


def info_loss(adv: dict[str, Array], clean: dict[str, Array], d=mean_square, *, stop: bool = False) -> Array:
    """L_info of the features of x' and x; 0 where nothing is added to the classifier."""
    names = sorted(name for name in adv if name.startswith("info"))
    total = jnp.zeros(())
    for name in names:
        f_adv, f = adv[name].astype(jnp.float32), clean[name].astype(jnp.float32)
        total = total + d(f_adv, lax.stop_gradient(f) if stop else f)
    return total


# ---- the adaptive attack -------------------------------------------------------------------------------------


def adaptive_attack(
    *,
    terms: Sequence[str] = ("ce", "svd", "info"),
    weights: Sequence[float] | None = None,
    eps: "str | float" = "8/255",
    step_size: "str | float" = "2/255",
    steps: int = 20,
    restarts: int = 1,
) -> Attack:
    """PGD on a sum of CE, L_svd and L_info, from a random start (L_info has no gradient at x): Table 4 of the paper.

    It is called like any attack on labels, except that `logits_fn` returns (logits, features). `weights` are those of
    the terms, 1 by default. L_svd and L_info are computed for each image by itself, so that no image's result depends
    on the rest of the batch.
    """
    for term in terms:
        if term not in ("ce", "svd", "info"):
            raise InputError(f"term '{term}' is unknown; {nearest(term, ('ce', 'svd', 'info'))}")
    weights = (1.0,) * len(terms) if weights is None else tuple(weights)

    @precision.evaluated
    def attack(key, logits_fn, x, target):
        _, clean = jax.tree.map(lax.stop_gradient, logits_fn(x))

        def per_example(output, labels_and_clean):
            logits, adv = output
            labels, x, clean = labels_and_clean
            info = jax.vmap(lambda a, b: info_loss(a, b))
            infos = [{k: v for k, v in features.items() if k.startswith("info")} for features in (adv, clean)]
            values = {
                "ce": lambda: losses.cross_entropy(logits, labels),
                "svd": lambda: svd_loss(adv["x_avg"], x, _mean_square_of_each),
                "info": lambda: info(*infos),
            }
            return sum(weight * values[term]() for term, weight in zip(terms, weights, strict=True))

        climb = pgd(loss=per_example, eps=eps, step_size=step_size, steps=steps, restarts=restarts)
        return climb(key, logits_fn, x, (target, x, clean))

    return attack
