"""Shared information: Yu et al., "Improving Adversarial Robustness by Learning Shared Information", Pattern
Recognition 134, 2023 (MERL TR2022-141).

    L     = α CE(f(x'), y) + (1−α) CE(f(x), y) + β(e) D_SKL − λ I(z; z')
    D_SKL = mean_b ½ [ KL(p(z|x) || p(z|x')) + KL(p(z|x') || p(z|x)) ],   p(z|x) = N(μ, σ²), a sum over its K dimensions
    I     = HSIC(z, z')          Gaussian kernels, each as wide as the mean distance to the k nearest neighbours
    β(e)  = β₀ (β/β₀)^clip((⌊e⌋ − warmup)/ramp, 0, 1)           e epochs; superfluous information is removed slowly

| symbol | code        | default                                                                             |
|--------|-------------|-------------------------------------------------------------------------------------|
| α      | alpha       | 0.5                                                                                 |
| β, β₀  | beta, beta_start | 4 (MNIST, CIFAR-10; 6 for CIFAR-100), 1e-3                                     |
|        | warmup, ramp | 10, 90 epochs                                                                      |
|        | stepping    | "epoch"; "step": e in place of ⌊e⌋, for trainings of few epochs                     |
| λ      | lam         | 1e-3; the recipes with "mine" and "mige" have 0.01                                  |
| k      | neighbours  | 10; used by "hsic" and "trace"                                                       |
| I      | information | "hsic", biased; "trace", without its (B − 1)⁻²; "mine"; "mige"; "nhsic", whose      |
|        |             | kernels have the width 5·√K, as in the HSIC bottleneck                              |
|        | mine_widths | (512, 512), the ReLU layers of MINE's network                                       |
|        | mine_projection | None; 256: a linear map of the pair (z, z') to 256 numbers comes before them     |
|        | location    | "latent": p(z|x) of a stochastic layer; "prediction": p(y|x), which needs no such layer |

Use with model=dict(name="stochastic", …). For each of x and x' one z is drawn for the CE terms and I; the attack and
the evaluation see z = μ. The paper reports an AutoAttack accuracy above its PGD accuracy, which suggests that its tests
also drew z: attacks that expect a deterministic network then overestimate robustness.

x' is PGD on CE(f(x'), y), or a representation attack where `ara` wraps this objective.

Batch-norm: training-mode passes over x', then x.

The paper leaves details open. Our reading: gradients flow through both views; the divergence is summed over
dimensions; the kernel is exp(−d²/(2σ²)) (the paper lacks the minus sign); its width carries no gradient and is computed
for z and z' separately. The biased HSIC is of order 0.05 here, so that λ = 1e-3 makes it nearly vanish, whereas the
paper's ablation shows a larger effect of this term. Hence the options "trace", with another scale, and "nhsic", a
different measure with other kernels. The paper describes MINE's network as "256 – 512 – 512 – 1". We read this as K =
256 numbers of each view and two ReLU layers, or with `mine_projection=256` as 256 inputs in all.
"""

import jax
import jax.numpy as jnp
from jax import Array

from ibjax import losses
from ibjax.errors import InputError, check_range, nearest
from ibjax.information import divergence, hsic, mige
from ibjax.information.mine import Mine
from ibjax.models.layers import Dense
from ibjax.objectives.standard import accuracy
from ibjax.step import Objective

CHOICES = {
    "information": ("hsic", "trace", "nhsic", "mine", "mige"),
    "location": ("latent", "prediction"),
    "stepping": ("epoch", "step"),
}
HSIC = {"hsic": hsic.hsic, "trace": hsic.hsic_trace}


def shared_information(
    *,
    alpha: float = 0.5,
    beta: float = 4.0,
    beta_start: float = 1e-3,
    warmup: float = 10.0,
    ramp: float = 90.0,
    stepping: str = "epoch",
    lam: float = 1e-3,
    neighbours: int = 10,
    information: str = "hsic",
    mine_widths: tuple[int, ...] = (512, 512),
    mine_projection: int | None = None,
    location: str = "latent",
) -> Objective:
    """Shared information; its attack is PGD on cross-entropy."""
    given = dict(information=information, location=location, stepping=stepping)
    for name, value in given.items():
        if value not in CHOICES[name]:
            raise InputError(f"objective.{name}='{value}' is unknown; {nearest(value, CHOICES[name])}")
    check_range("objective.alpha", alpha, 0, 1)
    check_range("objective.beta", beta, 0)
    check_range("objective.beta_start", beta_start, 1e-12)
    check_range("objective.warmup", warmup, 0)
    check_range("objective.ramp", ramp, 1e-6)
    check_range("objective.lam", lam, 0)
    check_range("objective.neighbours", neighbours, 1)
    for width in mine_widths if mine_projection is None else (mine_projection, *mine_widths):
        check_range("objective.mine_widths and mine_projection", width, 1)
    if information == "mine" and location == "prediction":
        raise InputError("objective.information='mine' goes with location='latent'; its network is sized for z")
    mine = Mine("z", mine_widths, mine_projection, layer=Dense) if information == "mine" and lam else None

    def target(net, variables, batch, key):
        return batch["label"]

    def loss(net, variables, batch, x_adv, key):
        x, y = batch["image"], batch["label"]
        key_adv, key_clean, key_pairs = jax.random.split(key, 3)
        adv, variables = net.forward(variables, x_adv, key_adv)
        clean, variables = net.forward(variables, x, key_clean)

        robust = jnp.mean(losses.cross_entropy(adv[0], y))
        natural = jnp.mean(losses.cross_entropy(clean[0], y))
        skl = jnp.mean(divergences(clean, adv, location))
        epoch = jnp.floor(batch["epoch"]) if stepping == "epoch" else batch["epoch"]
        value = alpha * robust + (1 - alpha) * natural + beta_at(epoch, beta, beta_start, warmup, ramp) * skl
        metrics = {"natural": natural, "robust": robust, "skl": skl}
        if lam:
            if mine is not None:
                shared, updated = mine.apply(
                    variables["head"],
                    clean[1],
                    adv[1],
                    train=True,
                    mutable=["batch_stats"],
                    rngs={"permutation": key_pairs},
                )
                variables = {**variables, "head": {**variables["head"], **updated}}
            else:
                shared = measure(view(clean, location), view(adv, location), information, neighbours)
            value = value - lam * shared
            metrics["shared"] = shared
        metrics |= {"loss": value, "clean_acc": accuracy(clean[0], batch), "adv_acc": accuracy(adv[0], batch)}
        return value, (variables, metrics)

    return Objective(target, loss, mine)


def beta_at(epoch: Array, beta: float, start: float, warmup: float, ramp: float) -> Array:
    """β(e): `start` for `warmup` epochs, then exponentially to `beta` over `ramp` epochs."""
    progress = jnp.clip((epoch - warmup) / ramp, 0.0, 1.0)
    return start * (max(beta, 1e-12) / start) ** progress if beta else jnp.zeros(())


def view(output: tuple[Array, dict[str, Array]], location: str) -> Array:
    """What the two views share: the drawn z (B, K), or the prediction (B, C)."""
    logits, features = output
    return _latent(features, "z") if location == "latent" else jax.nn.softmax(logits)


def divergences(clean, adv, location: str) -> Array:
    """The symmetrised KL of each example's two distributions, shape (B,)."""
    if location == "prediction":
        return divergence.symmetrised_categorical_kl(clean[0], adv[0])
    gaussians = [_latent(features, name) for _, features in (clean, adv) for name in ("mu", "sigma")]
    return divergence.symmetrised_gaussian_kl(*gaussians)


def measure(z: Array, z_adv: Array, information: str, neighbours: int) -> Array:
    """I(z; z') in the chosen measure; with "mige" only the gradient of the returned value is meaningful."""
    if information == "mige":
        return mige.information_surrogate(z, z_adv)
    if information == "nhsic":
        return hsic.nhsic_cca(z, z_adv)
    grams = (hsic.gaussian_gram(v, hsic.knn_width(v, neighbours)) for v in (z, z_adv))
    return HSIC[information](*grams)


def _latent(features, name):
    if name not in features:
        raise InputError(
            "objective.location='latent' needs a stochastic layer; set model=dict(name='stochastic', backbone=…), or "
            "location='prediction'"
        )
    return features[name]
