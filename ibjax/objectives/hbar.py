"""HBaR: Wang, Jian, Masoomi, Ioannidis & Dy, "Revisiting Hilbert-Schmidt Information Bottleneck for Adversarial
Robustness", NeurIPS 2021.

    L = w·L_base + Σ_l [ λ_x·nHSIC(X, T_l) − λ_y·nHSIC(Y, T_l) ]         X and T_l belong to the clean images, or to x'

    base       L_base
    standard   CE(x)
    pgd_at     CE(x')
    trades     CE(x) + 6 KL(p(x) || p(x'))
    mart       BCE(x') + 5 mean_b (1 − p_y(x)) KL(p(x) || p(x'))

| symbol | code          | default |
|--------|---------------|---------|
| λ_x    | lambda_x      | 0.0005  | see below
| λ_y    | lambda_y      | 0.005   | see below
| w      | base_weight   | 1       |
| σ, ε   | sigma, ridge  | 5, 1e-5 | σ in units of √dimension; the label kernel is linear
| l      | layers        | "all"   | or names; the authors use stage1 to stage4, fc1 and fc2 of VGG16
|        | hsic_adv      | False   | True: X = x' and T_l its features; the authors' code offers this with "mart"
|        | robust_weight | None    | weight of the KL term; None: the base's own in the table above

The authors' weights:

| data  | training    | λ_x    | λ_y   |
|-------|-------------|--------|-------|
| CIFAR | adversarial | 0.0005 | 0.005 |
| CIFAR | standard    | 0.006  | 0.05  |
| MNIST | adversarial | 0.003  | 0.001 |
| MNIST | standard    | 1      | 50    |

Batch-norm, training-mode passes in order: x', then x for "pgd_at", where the second pass only provides the features;
x, then x' for "trades" and "mart"; x for "standard". `hsic_adv` does not change them.

Deviation from the authors' code: the label matrix has one column per class of the data set, theirs always has ten.
"""

from ibjax import losses
from ibjax.errors import InputError, check_range, nearest
from ibjax.information import hsic
from ibjax.objectives import passes
from ibjax.objectives.ib_rar import CHOICES, ORIGINAL_WEIGHTS, base_loss, dependence, layers_of
from ibjax.objectives.trades import attack_target
from ibjax.step import Objective


def hbar(
    *,
    base: str = "trades",
    base_weight: float = 1.0,
    robust_weight: float | None = None,
    lambda_x: float = 0.0005,
    lambda_y: float = 0.005,
    layers: "str | tuple[str, ...]" = "all",
    hsic_adv: bool = False,
    sigma: float = hsic.SIGMA,
    ridge: float = hsic.RIDGE,
) -> Objective:
    """HSIC bottleneck as a regulariser; it uses the attack of its base objective."""
    if base not in CHOICES["base"]:
        raise InputError(f"objective.base='{base}' is unknown; {nearest(base, CHOICES['base'])}")
    if hsic_adv and base == "standard":
        raise InputError("objective.hsic_adv=True needs adversarial images; base='standard' has none")
    robust_weight = ORIGINAL_WEIGHTS.get(base, 0.0) if robust_weight is None else robust_weight
    given = dict(base_weight=base_weight, robust_weight=robust_weight, lambda_x=lambda_x, lambda_y=lambda_y)
    for name, value in given.items():
        check_range(f"objective.{name}", value, 0)
    for name, value in (("sigma", sigma), ("ridge", ridge)):
        check_range(f"objective.{name}", value, 1e-12)

    def target(net, variables, batch, key):
        if base == "trades":
            return attack_target(net, variables, batch)
        return batch["label"]

    def loss(net, variables, batch, x_adv, key):
        x = batch["image"]
        order = {"standard": ("clean",), "pgd_at": ("adv", "clean")}.get(base, ("clean", "adv"))
        outputs, variables = passes.forward(net, variables, {"clean": x, "adv": x_adv}, order, key)
        logits = [outputs[name][0] for name in ("clean", "adv") if name in outputs]
        natural, metrics = base_loss(base, "original", logits, batch, robust_weight)
        taps = layers_of(outputs["adv" if hsic_adv else "clean"][1], layers)
        shown, classes = x_adv if hsic_adv else x, logits[0].shape[-1]
        with_x, with_y = dependence(shown, losses.as_labels(batch["label"]), classes, taps, sigma=sigma, ridge=ridge)
        value = base_weight * natural + lambda_x * with_x - lambda_y * with_y
        metrics |= {"loss": value, "nhsic_x": with_x, "nhsic_y": with_y}
        return value, (variables, metrics)

    attack_losses = {"standard": (), "trades": ("kl",)}.get(base, ("ce", "margin"))
    return Objective(target, loss, attack_losses=attack_losses, flat_at_x=base == "trades")
