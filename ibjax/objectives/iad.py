"""IAD: Zhu et al., "Reliable Adversarial Distillation with Unreliable Teachers", ICLR 2022.

The student weights its teacher's prediction by A and its own by 1 − A:

    A_b = p_t(y_b | x'_b)^β    from epoch `begin` on, 1 before
    L   = mean_b [ α·( A·KL(p_t(u) || p_s(x')) + (1−A)·KL(p_s(x) || p_s(x')) )
                   + α_2·KL(p_2(x') || p_s(x')) + (1−α−α_2)·CE(f_s(u), y) ],        x' = PGD on CE

    variant "I"   u = x,  no second teacher;  before `begin` it is ARD with T = 1 and the sum over classes
    variant "II"  u = x', second teacher p_2: a naturally trained network (`config.assistant`);  before `begin` it is
                  AKD² (Chen et al., "Robust Overfitting May Be Mitigated by Properly Learned Smoothening", ICLR 2021)

| symbol | code                | default "I" | default "II" |
|--------|---------------------|-------------|--------------|
| β      | beta                | 0.1         | 0.1          |
| α      | alpha               | 1           | 0.5          |
| α_2    | alpha_2             | 0           | 0.25         |
|        | begin               | 60          | 40           |
|        | weight_teacher_term | True        | True         | False: first term without A, as in the code of "I"
|        | passes              | "once"      | "once"       | or "code", see below

Gradients flow through p_s(x) as well. Teachers are frozen. The authors attack in training mode (`config.attack_bn =
"train"`). Batch-norm, training-mode passes in order:

    passes   variant   before `begin`   from `begin` on
    once     I, II     x', x            x', x
    code     I         x', x', x        x', x', x, x           the authors' code; its loss uses one pass over each
    code     II        x'               x', x
"""

from typing import NamedTuple

import jax.numpy as jnp

from ibjax import losses
from ibjax.errors import InputError, check_range, nearest
from ibjax.objectives import passes as training_passes
from ibjax.objectives.standard import accuracy
from ibjax.step import Objective


class Defaults(NamedTuple):
    """The defaults of a variant: what an argument of None stands for."""

    alpha: float
    alpha_2: float
    begin: int


DEFAULTS = {"I": Defaults(1.0, 0.0, 60), "II": Defaults(0.5, 0.25, 40)}
# passes -> variant -> (passes of every step, passes of the steps from epoch `begin` on)
PASSES = {
    "once": {"I": (("adv", "clean"), ()), "II": (("adv", "clean"), ())},
    "code": {"I": (("adv", "adv", "clean"), ("clean",)), "II": (("adv",), ("clean",))},
}


def iad(
    *,
    variant: str = "I",
    beta: float = 0.1,
    alpha: float | None = None,
    alpha_2: float | None = None,
    begin: int | None = None,
    weight_teacher_term: bool = True,
    passes: str = "once",
) -> Objective:
    """Introspective adversarial distillation; None means the variant's default. Its attack is PGD on cross-entropy."""
    if variant not in DEFAULTS:
        raise InputError(f"objective.variant='{variant}' is unknown; {nearest(variant, DEFAULTS)}")
    defaults = DEFAULTS[variant]
    alpha = defaults.alpha if alpha is None else alpha
    alpha_2 = defaults.alpha_2 if alpha_2 is None else alpha_2
    begin = defaults.begin if begin is None else begin
    if passes not in PASSES:
        raise InputError(f"objective.passes='{passes}' is unknown; {nearest(passes, PASSES)}")
    # `later`: a pass that is always made; before epoch `begin` its statistics are discarded
    always, later = PASSES[passes][variant]
    check_range("objective.beta", beta, 0)
    check_range("objective.alpha", alpha, 0, 1)
    check_range("objective.begin", begin, 0)
    if variant == "I" and alpha_2:
        raise InputError(f"objective.alpha_2={alpha_2:g} needs a second teacher; variant 'I' has none, use 'II'")
    check_range("objective.alpha_2", alpha_2, 0, 1 - alpha + 1e-9)

    def target(net, variables, batch, key):
        return batch["label"]

    def loss(net, variables, batch, x_adv, key):
        y, begun = batch["label"], batch["epoch"] >= begin
        images = {"clean": batch["image"], "adv": x_adv}
        outputs, variables = training_passes.forward(net, variables, images, always, key)
        if later:
            more, updated = training_passes.forward(net, variables, images, later, key)
            outputs, variables = more | outputs, training_passes.where(begun, updated, variables)
        clean, adv = outputs["clean"][0], outputs["adv"][0]
        t_adv, _ = net.teacher(x_adv)
        t_u, s_u = (net.teacher(batch["image"])[0], clean) if variant == "I" else (t_adv, adv)

        A = jnp.exp(-beta * losses.cross_entropy(t_adv, losses.as_labels(y)))  # p_t(y | x')^β
        A = jnp.where(begun, A, 1.0)
        from_teacher = losses.kl_logits(t_u, adv)
        from_itself = losses.kl_logits(clean, adv)
        value = alpha * ((A if weight_teacher_term else 1.0) * from_teacher + (1 - A) * from_itself)
        if alpha_2:
            value = value + alpha_2 * losses.kl_logits(net.assistant(x_adv)[0], adv)
        if alpha + alpha_2 < 1:
            value = value + (1 - alpha - alpha_2) * losses.cross_entropy(s_u, y)
        value = jnp.mean(value)
        metrics = {"loss": value, "from_teacher": jnp.mean(from_teacher), "trust": jnp.mean(A)}
        metrics |= {"clean_acc": accuracy(clean, batch), "adv_acc": accuracy(adv, batch)}
        return value, (variables, metrics)

    teachers = ("teacher", "assistant") if alpha_2 else ("teacher",)
    return Objective(target, loss, teachers=teachers, fits_labels=alpha + alpha_2 < 1)
