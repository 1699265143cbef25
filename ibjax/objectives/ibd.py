"""IBD: Kuang et al., "Improving Adversarial Robustness via Information Bottleneck Distillation", NeurIPS 2023.

    L      = (1−α)·D(x, y_t) + α·D(x', y_t) + β·L_feat                   y_t = softmax(teacher(x))
    D(u,t) = mean_b KL(t || p_s(u))
    L_feat = Σ_i mean_b Σ_j Attn_{b,i,j} · mean_{hw} (ê_s^j − ê_t^i)²    i teacher blocks, j student blocks
    x'     = argmax KL(y_t || p_s(x')),   from x + 0.001·N(0, 1), student in evaluation mode

| symbol      | code             | default   |
|-------------|------------------|-----------|
| α           | alpha            | 0.9       |
| β           | beta             | 0.8       | 0: no matching
| d           | qk_dim           | 128       |
| y_t         | labels           | "robust"  | "natural": softmax(assistant(x)), "smooth": 1−δ and δ/(C−1), or "onehot"
| δ           | smoothing        | 0.3       | of labels="smooth"; the paper does not give it
| Attn        | matching         | "adaptive"| or "hand": layers of the same level
|             | adversarial      | True      | False: L = D(x, y_t) + β·L_feat(x), without adversarial training
| attack goal | attack_target    | "teacher" | y_t; or "student": TRADES's KL(p_s(x) || p_s(x')), as the paper's text
| input of z_t | teacher_features | "adv"    | x'; or "nat": x, as in the authors' code
|             | teacher_noise    | 0         | std of noise on the teacher's x; 0.001 in the authors' code
| layers      | granularity      | "block"   | as the authors' last code; or "stage": the last block of each stage
|             | stem             | False     | True: the stem too; with "stage" our reading of the authors' earlier code
| p_t·p_s     | positional       | True      | absent from the paper's formula
| query ReLU  | query_relu       | False     | present in the paper's formula
| e           | energy           | "square"  | mean over channels of z²; "mean" of z, as the paper's text says

Batch-norm: training-mode passes over x (its features are not used), then x'. The teachers are frozen.
A weight perturbation (IBD+AWP) maximises L without L_feat.

The authors' code does not run as published. Deviations from it:

- We use the KL in place of the paper's cross-entropy. They differ by the teacher's entropy, a constant, so the attack
  may use either.
- With `teacher_noise`, the noise is drawn independently of the attack's start; their code uses one draw for both.
- Their last code takes features 1 to 15 of the teacher and 1 to 8 of the student, which are the blocks without the
  stem. Their earlier code takes features 0 to 4 of both. The networks that return them are not published; five features
  fit the stem and four stages of a ResNet (a WideResNet has three stages).

β multiplies squared differences of unit-norm maps that are *divided by H·W*: L_feat ≤ Σ_i 2/(H_i·W_i), which is 0.2
for a WRN-34-10 teacher. Another scaling would change the weight of this term by orders of magnitude.
"""

import jax
import jax.numpy as jnp

from ibjax import losses
from ibjax.errors import InputError, check_range, nearest
from ibjax.objectives.ibd_matching import AttentionMatching, hand_matching
from ibjax.objectives.standard import accuracy
from ibjax.step import Objective

CHOICES = {
    "labels": ("robust", "natural", "smooth", "onehot"),
    "matching": ("adaptive", "hand"),
    "attack_target": ("teacher", "student"),
    "teacher_features": ("adv", "nat"),
    "granularity": ("block", "stage"),
    "energy": ("square", "mean"),
}


def ibd(
    *,
    alpha: float = 0.9,
    beta: float = 0.8,
    labels: str = "robust",
    smoothing: float = 0.3,
    matching: str = "adaptive",
    adversarial: bool = True,
    attack_target: str = "teacher",
    teacher_features: str = "adv",
    teacher_noise: float = 0.0,
    granularity: str = "block",
    stem: bool = False,
    qk_dim: int = 128,
    positional: bool = True,
    query_relu: bool = False,
    energy: str = "square",
) -> Objective:
    """Information-bottleneck distillation; its attack is dict(name="pgd", loss="kl", init="gaussian")."""
    given = dict(labels=labels, matching=matching, attack_target=attack_target)
    given |= dict(teacher_features=teacher_features, granularity=granularity, energy=energy)
    for name, value in given.items():
        if value not in CHOICES[name]:
            raise InputError(f"objective.{name}='{value}' is unknown; {nearest(value, CHOICES[name])}")
    check_range("objective.alpha", alpha, 0, 1)
    check_range("objective.beta", beta, 0)
    check_range("objective.smoothing", smoothing, 0, 1)
    check_range("objective.teacher_noise", teacher_noise, 0, 1)
    check_range("objective.qk_dim", qk_dim, 1)
    head = None
    if beta and matching == "adaptive":
        head = AttentionMatching(qk_dim, granularity, positional, query_relu, energy, stem)
    needed = {"teacher": labels == "robust" or bool(beta), "assistant": labels == "natural"}
    teachers = tuple(role for role, is_needed in needed.items() if is_needed)

    def teach(net, variables, batch, key):
        """(y_t (B, C), the teacher's features of x or None)."""
        x = batch["image"]
        if teacher_noise:
            x = x + teacher_noise * jax.random.normal(key, x.shape, x.dtype)
        logits, features = net.teacher(x) if "teacher" in teachers else (None, None)
        if labels == "robust":
            return jax.nn.softmax(logits), features
        if labels == "natural":
            return jax.nn.softmax(net.assistant(x)[0]), features
        classes = jax.eval_shape(net.predict, variables, x)[0].shape[-1]
        return losses.smooth(batch["label"], classes, smoothing if labels == "smooth" else 0.0), features

    def target(net, variables, batch, key):
        if attack_target == "student":
            return jax.nn.softmax(net.predict(variables, batch["image"])[0])
        return teach(net, variables, batch, jax.random.split(key, 3)[0])[0]

    def soft_label(net, variables, batch, x_adv, key):
        """The loss without its feature term, and the features of student and teacher that this term compares."""
        key_teacher, key_clean, key_adv = jax.random.split(key, 3)
        y_t, features_t = teach(net, variables, batch, key_teacher)
        (clean, features_s), variables = net.forward(variables, batch["image"], key_clean)
        natural = jnp.mean(losses.kl(clean, y_t))
        metrics = {"natural": natural, "clean_acc": accuracy(clean, batch)}
        if not adversarial:
            return natural, (variables, metrics, features_s, features_t)
        (adv, features_s), variables = net.forward(variables, x_adv, key_adv)
        robust = jnp.mean(losses.kl(adv, y_t))
        metrics |= {"robust": robust, "adv_acc": accuracy(adv, batch)}
        return (1 - alpha) * natural + alpha * robust, (variables, metrics, features_s, features_t)

    def loss(net, variables, batch, x_adv, key):
        value, (variables, metrics, features_s, features_t) = soft_label(net, variables, batch, x_adv, key)
        if beta:
            if adversarial and teacher_features == "adv":
                _, features_t = net.teacher(x_adv)
            feature, variables = match(variables, features_s, features_t)
            value = value + beta * feature
            metrics["feature"] = feature
        return value, (variables, {"loss": value, **metrics})

    def match(variables, features_s, features_t):
        """(L_feat, variables)."""
        if head is None:
            return hand_matching(features_s, features_t, granularity, energy, stem), variables
        (feature, _), updated = head.apply(
            variables["head"], features_s, features_t, train=True, mutable=["batch_stats"]
        )
        return feature, {**variables, "head": {**variables["head"], **updated}}

    return Objective(
        target,
        loss,
        head,
        teachers,
        attack_losses=("kl", "ce") if adversarial else (),
        flat_at_x=attack_target == "student",
        fits_labels=labels in ("smooth", "onehot"),
        proxy=lambda *arguments: soft_label(*arguments)[0],
    )
