"""IB-RAR: Xu, Perin & Picek, "IB-RAR: Information Bottleneck as Regularizer for Adversarial Robustness", DSN-W 2023.

    L = L_base + Σ_{l∈S} [ α·nHSIC(X, T_l) − β·nHSIC(Y, T_l) ]                      a sum over layers and passes
    nHSIC(U, V) = tr(R_U R_V),   R = K̃ (K̃ + ε B I)⁻¹                              see information/hsic.py

    base       L_base, as the authors' code has it (form "code")   as published (form "original")   T of
    standard   CE(x)                                               the same                         x
    pgd_at     CE(x')                                              the same                         x'
    trades     CE(x') + ½ KL(p(x) || p(x'))                        CE(x) + 6 KL(p(x) || p(x'))      x and x'
    mart       BCE(x') + ½ mean_b (1 − p_y(x)) KL(p(x) || p(x'))   the same with 5                  x and x'

| symbol   | code          | default    |
|----------|---------------|------------|
| α        | alpha         | 0.008      | the paper: β/10
| β        | beta          | 0.08       | the paper: 1 for VGG16, 5e-4 for ResNet-18
| S        | layers        | "all"      | "robust": stage5, fc1, fc2 of VGG16; or names of taps, such as "stage5,fc1"
| σ, ε     | sigma, ridge  | 5, 1e-5    | σ in units of √dimension
|          | estimator     | "nhsic"    | or "hsic", the biased estimator, whose values are orders of magnitude smaller
|          | y_kernel      | "linear"   | or "gaussian": in the authors' code for all but PGD-AT and what has the mask
|          | x_input       | "clean"    | or "adv", X = x'
| base     | base, form    | "pgd_at", "code" |
|          | robust_weight | None       | weight of the KL term; None: the base's own in the table above
| FC       | mask_tap      | None       | tap to mask: "stage5" of VGG, "pre_logits" of ResNet, "stage2" of WRN
|          | mask_rule     | "code"     | or "paper", see below
|          | mask_channels | 10         | masked by each of the code's two rules; the code has 20 for ResNet-18
|          | mask_every    | 10         | steps of an epoch from one mask to the next; set 1 for the paper's rule
|          | until_epoch   | None       | the terms count before this epoch only: 1 for SVHN with MART

The paper's text swaps the values of α and β: its figure and its rule α = β/10 show which is which.

In form "code" the attack maximises cross-entropy from x + U(−ε, ε) for every base; in form "original" that of TRADES
maximises its KL. The authors' code attacks with eps 0.03 and step 0.0069, the paper states 8/255 and 2/255.

Channel mask (FC), two versions:

- The authors' code (mask_rule="code"): in every `mask_every`-th step of an epoch, but not in its first step, the
  training passes zero channels of one tap. The last channel is never masked. Of the others, those with the lowest
  nHSIC(Y, f_c) and those with the highest nHSIC(X, f_c) are masked. X is the pass's input, both kernels are Gaussian,
  and no gradient flows through the choice. Attacks and tests never use the mask. The information terms see the masked
  feature, except at `pre_logits` of a ResNet and at the last block of a WideResNet, which the authors' code records
  before the mask.
- The paper's text: mask the 5 % of channels with the lowest nHSIC(Y, f_c). Its Algorithm 1 does so in every training
  step (mask_rule="paper", mask_every=1; all terms see masked features). After training, `ibjax.analysis.mask` makes
  the mask permanent, in attacks and at test too.

Batch-norm: one training-mode pass for "standard" and "pgd_at"; x, then x', for "trades" and "mart".

Deviations from the authors' code: Y has one column per class of the data set, theirs one per class up to the largest
label in the batch. After each step their code makes one more training-mode pass, for logging, over x' (over x without
an attack); ours does not.
"""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from ibjax import losses
from ibjax.attacks import Attack, geometry
from ibjax.attacks.pgd import pgd
from ibjax.errors import InputError, check_range, nearest
from ibjax.information import hsic
from ibjax.net import Net, Variables
from ibjax.objectives.mart import boosted_cross_entropy, floored_kl
from ibjax.objectives.standard import accuracy
from ibjax.objectives.trades import attack_target
from ibjax.step import Batch, Objective

CHOICES = {
    "base": ("standard", "pgd_at", "trades", "mart"),
    "form": ("code", "original"),
    "estimator": ("nhsic", "hsic"),
    "y_kernel": hsic.KERNELS,
    "x_input": ("clean", "adv"),
    "mask_rule": ("code", "paper"),
}
ROBUST_LAYERS = ("stage5", "fc1", "fc2")
ORIGINAL_WEIGHTS = {"trades": 6.0, "mart": 5.0}


def ib_rar(
    *,
    base: str = "pgd_at",
    form: str = "code",
    robust_weight: float | None = None,
    alpha: float = 0.008,
    beta: float = 0.08,
    layers: "str | tuple[str, ...]" = "all",
    sigma: float = hsic.SIGMA,
    ridge: float = hsic.RIDGE,
    estimator: str = "nhsic",
    y_kernel: str = "linear",
    x_input: str = "clean",
    mask_tap: str | None = None,
    mask_rule: str = "code",
    mask_channels: int = 10,
    mask_every: int = 10,
    until_epoch: float | None = None,
) -> Objective:
    """IB-RAR; its attack is PGD on cross-entropy, with the original TRADES PGD on KL: loss="kl", init="gaussian"."""
    given = dict(base=base, form=form, estimator=estimator, y_kernel=y_kernel, x_input=x_input, mask_rule=mask_rule)
    for name, value in given.items():
        if value not in CHOICES[name]:
            raise InputError(f"objective.{name}='{value}' is unknown; {nearest(value, CHOICES[name])}")
    for name, value in (("alpha", alpha), ("beta", beta), ("until_epoch", until_epoch or 0)):
        check_range(f"objective.{name}", value, 0)
    for name, value in (("sigma", sigma), ("ridge", ridge)):
        check_range(f"objective.{name}", value, 1e-12)
    check_range("objective.mask_channels", mask_channels, 1)
    check_range("objective.mask_every", mask_every, 1)
    if x_input == "adv" and base == "standard":
        raise InputError("objective.x_input='adv' needs adversarial images; base='standard' has none")
    if robust_weight is None:
        robust_weight = ORIGINAL_WEIGHTS.get(base, 0.0) if form == "original" else 0.5
    check_range("objective.robust_weight", robust_weight, 0)
    options = dict(sigma=sigma, ridge=ridge, estimator=estimator, y_kernel=y_kernel)
    by_code = mask_rule == "code"
    before_mask = by_code and mask_tap == "pre_logits"  # what the terms see of the masked tap

    def target(net, variables, batch, key):
        if base == "trades" and form == "original":
            return attack_target(net, variables, batch)
        return batch["label"]

    def loss(net, variables, batch, x_adv, key):
        x, y = batch["image"], losses.as_labels(batch["label"])
        classes = jax.eval_shape(net.predict, variables, x)[0].shape[-1]

        def forward(variables, x, key):
            if mask_tap is None:
                return net.forward(variables, x, key)
            active = batch["epoch_step"] % mask_every == 0
            if by_code:
                active &= batch["epoch_step"] > 0
            mask = batch_mask(x, y, classes, active, mask_channels if by_code else None, sigma, ridge)
            unmasked = {}

            def edit(z):
                unmasked[mask_tap] = z
                return mask(z)

            (logits, features), variables = net.forward(variables, x, key, edits={mask_tap: edit})
            return (logits, features | unmasked if before_mask else features), variables

        inputs = {"standard": (x,), "pgd_at": (x_adv,)}.get(base, (x, x_adv))
        outputs = []
        for u, key_u in zip(inputs, jax.random.split(key, len(inputs)), strict=True):
            output, variables = forward(variables, u, key_u)
            outputs.append(output)
        logits = [output[0] for output in outputs]
        value, metrics = base_loss(base, form, logits, batch, robust_weight)
        if alpha == beta == 0:
            return value, (variables, {"loss": value, **metrics})

        taps = [tap for _, features in outputs for tap in layers_of(features, layers)]

        def information(taps):
            return dependence(x if x_input == "clean" else x_adv, y, classes, taps, **options)

        if until_epoch is None:
            with_x, with_y = information(taps)
        else:
            counts = batch["epoch"] < until_epoch
            with_x, with_y = lax.cond(counts, information, lambda taps: jnp.zeros(2), taps)
        value = value + alpha * with_x - beta * with_y
        metrics |= {"loss": value, "nhsic_x": with_x, "nhsic_y": with_y}
        return value, (variables, metrics)

    if base == "trades" and form == "original":
        return Objective(target, loss, attack_losses=("kl",), flat_at_x=True)
    return Objective(target, loss, attack_losses=() if base == "standard" else ("ce", "margin"))


def base_loss(base: str, form: str, logits: list[Array], batch: Batch, weight: float) -> tuple[Array, dict[str, Array]]:
    """(L_base of the table above, its metrics); `logits` has those of x and of x', or of the only one that is used."""
    clean, adv, y = logits[0], logits[-1], batch["label"]
    if base == "standard":
        return jnp.mean(losses.cross_entropy(clean, y)), {"clean_acc": accuracy(clean, batch)}
    if base == "pgd_at":
        return jnp.mean(losses.cross_entropy(adv, y)), {"adv_acc": accuracy(adv, batch)}
    if base == "trades":
        natural = losses.cross_entropy(adv if form == "code" else clean, y)
        robust = losses.kl_logits(clean, adv)
    else:
        natural = boosted_cross_entropy(adv, y)
        robust = floored_kl(clean, adv) * (1.0 - jnp.exp(-losses.cross_entropy(clean, losses.as_labels(y))) + 1e-7)
    natural, robust = jnp.mean(natural), jnp.mean(robust)
    accuracies = {"clean_acc": accuracy(clean, batch), "adv_acc": accuracy(adv, batch)}
    return natural + weight * robust, {"natural": natural, "robust": robust, **accuracies}


# ---- the information terms -----------------------------------------------------------------------------------


def layers_of(features: dict[str, Array], layers: "str | tuple[str, ...]" = "all") -> list[Array]:
    """The features T_l of the chosen taps.

    layers: "all", "robust" (those of VGG16), or names, as a tuple or separated by commas.

    "all" are the paper's layers. In a residual network: the stem, the blocks and the pooled vector. In a plain one:
    each group of convolutions after its pooling, and the hidden linear layers or, without any, the pooled vector.
    """

    def numbered(kind):
        found = (re.fullmatch(rf"{kind}(\d+)", name) for name in features)
        return [match[0] for match in sorted((m for m in found if m), key=lambda m: int(m[1]))]

    if layers == "all":
        blocks = numbered("block")
        names = ["stem", *blocks, "pre_logits"] if blocks else numbered("stage") + (numbered("fc") or ["pre_logits"])
    else:
        names = ROBUST_LAYERS if layers == "robust" else layers.split(",") if isinstance(layers, str) else layers
    for name in names:
        if name not in features:
            there = nearest(name, features) if features else "it returns logits alone"
            raise InputError(f"objective.layers: the model has no layer '{name}'; {there}")
    return [features[name] for name in names]


def dependence(
    x: Array,
    labels: Array,
    classes: int,
    taps: list[Array],
    *,
    sigma: float = hsic.SIGMA,
    ridge: float = hsic.RIDGE,
    estimator: str = "nhsic",
    y_kernel: str = "linear",
) -> Array:
    """(Σ_l I(X, T_l), Σ_l I(Y, T_l)), shape (2,)."""
    if estimator == "hsic":
        grams = jnp.stack([hsic.scaled_gram(x, sigma), hsic.label_gram(labels, classes, y_kernel, sigma)])
        return jnp.sum(hsic.hsic(grams[:, None], jnp.stack([hsic.scaled_gram(t, sigma) for t in taps])[None]), axis=1)
    operators = _operators(x, labels, classes, y_kernel, sigma, ridge)
    return jnp.sum(hsic.nhsic_layers(operators, taps, sigma, ridge), axis=1)


def _operators(x, labels, classes, y_kernel, sigma, ridge):
    """(R_X, R_Y), shape (2, B, B)."""
    (r_x,) = hsic.correlation_operators(hsic.scaled_gram(x, sigma)[None], ridge)
    return jnp.stack([r_x, hsic.label_operator(labels, classes, y_kernel, sigma, ridge)])


# ---- the channel mask ----------------------------------------------------------------------------------------


def batch_mask(
    x: Array,
    labels: Array,
    classes: int,
    active: Array,
    channels: int | None,
    sigma: float = hsic.SIGMA,
    ridge: float = hsic.RIDGE,
) -> Callable[[Array], Array]:
    """A function that, where `active`, zeroes channels of a feature (B, …, C) for the whole batch.

    `channels` is how many each of the code's two rules chooses; None applies the paper's rule.
    """

    def keep(z):
        information = _channel_information(x, labels, classes, z, sigma, ridge)
        if channels is None:
            return permanent_mask(information[1]).astype(z.dtype)
        with_x, with_y = information[:, :-1]
        worst = jnp.concatenate([jnp.argsort(with_y)[:channels], jnp.argsort(-with_x)[:channels]])
        return jnp.ones(z.shape[-1], z.dtype).at[worst].set(0)

    def edit(z):
        if channels is not None and z.shape[-1] <= 2 * channels:
            raise InputError(
                f"objective.mask_channels={channels} would mask most of {z.shape[-1]} channels; allowed: less than half"
            )
        mask = lax.cond(active, keep, lambda z: jnp.ones(z.shape[-1], z.dtype), lax.stop_gradient(z))
        return masked(mask)(z)

    return edit


def channel_information(
    net: Net,
    variables: Variables,
    x: Array,
    labels: Array,
    tap: str,
    sigma: float = hsic.SIGMA,
    ridge: float = hsic.RIDGE,
) -> Array:
    """(nHSIC(X, f_c), nHSIC(Y, f_c)) of each channel of a tap in evaluation mode, shape (2, C); Gaussian kernels."""
    logits, features = net.predict(variables, x)
    return _channel_information(x, labels, logits.shape[-1], features[tap], sigma, ridge)


def _channel_information(x, labels, classes, z, sigma, ridge):
    operators = _operators(x, labels, classes, "gaussian", sigma, ridge)
    return hsic.nhsic_channels(operators, z, sigma, ridge, chunk=64)


def permanent_mask(with_y: Array, share: float = 0.05) -> Array:
    """The paper's mask (C,), 0 for the `share` of channels with the lowest nHSIC(Y, f_c) (C,), a mean over batches."""
    check_range("share", share, 0, 1, below=True)
    worst = jnp.argsort(with_y)[: int(share * len(with_y))]
    return jnp.ones(len(with_y)).at[worst].set(0)


def masked(mask: Array) -> Callable[[Array], Array]:
    """A function that multiplies the channels of a feature (B, …, C) by a mask (C,)."""
    return lambda z: z * mask.astype(z.dtype).reshape((1,) * (z.ndim - 1) + (-1,))


# ---- the adaptive attack -------------------------------------------------------------------------------------


def adaptive_attack(
    *,
    alpha: float = 0.008,
    beta: float = 0.08,
    layers: "str | tuple[str, ...]" = "all",
    eps: "str | float" = "0.03",
    step_size: "str | float | None" = None,
    steps: int = 10,
    init: str = "uniform",
    **options,
) -> Attack:
    """PGD on mean_b CE + Σ_l [ α·nHSIC(X, T_l) − β·nHSIC(Y, T_l) ], X the clean images: the paper's PGD_AD.

    It is called like any attack on labels, except that `logits_fn` returns (logits, features). The terms couple the
    images of a batch, so the result depends on which images share a batch; the paper uses batches of 100. `step_size`
    is 2.3·eps/steps by default, as in the authors' code. `options` are those of `dependence`; the label kernel is
    Gaussian by default.
    """
    options = {"y_kernel": "gaussian", **options}
    step = 2.3 * geometry.radius(eps, "linf") / steps if step_size is None else step_size

    def attack(key, logits_fn, x, target):
        def per_example(output, labels):
            logits, features = output
            taps = layers_of(features, layers)
            with_x, with_y = dependence(x, labels, logits.shape[-1], taps, **options)
            # pgd maximises the sum over examples, which is thus the mean CE plus the terms
            return (losses.cross_entropy(logits, labels) + alpha * with_x - beta * with_y) / len(labels)

        climb = pgd(loss=per_example, eps=eps, step_size=step, steps=steps, init=init)
        return climb(key, logits_fn, x, target)

    return attack
