"""IBD: Kuang et al., "Improving Adversarial Robustness via Information Bottleneck Distillation", NeurIPS 2023.

    L      = (1−α)·D(x, y_t) + α·D(x', y_t) + β·L_feat                   y_t = softmax(teacher(x))
    D(u,t) = mean_b KL(t || p_s(u))
    L_feat = Σ_i mean_b Σ_j Attn_{b,i,j} · mean_{hw} (ê_s^j − ê_t^i)²    i teacher blocks, j student blocks
    x'     = argmax KL(y_t || p_s(x')),   from x + 0.001·N(0, 1), student in evaluation mode

| symbol      | code             | default   |
|-------------|------------------|-----------|
| α           | alpha            | 0.9       |
| β           | beta             | 0.8       |
| d           | qk_dim           | 128       |
| inner goal  | attack_target    | "teacher" | or "student": KL(p_s(x) || p_s(x')), TRADES's, as the paper's text says
| Z_t from    | teacher_features | "adv"     | or "nat", as the authors' code does
|             | teacher_noise    | 0         | the authors' code shows the teacher x + 0.001·N(0, 1)
| layers      | granularity      | "block"   | or "stage" (the authors' earlier code)
| p_t·p_s     | positional       | True      | absent from the paper's formula
| query ReLU  | query_relu       | False     | present in the paper's formula
| e           | energy           | "square"  | mean over channels of z²; "mean" of z, as the paper's text says

Batch-norm: training-mode passes over x (its features are not used), then x'. The teacher is frozen.

Deviations from the authors' code, which does not run as published: KL in place of the paper's cross-entropy (they
differ by the teacher's entropy, a constant; the attack may use either); with `teacher_noise` the noise is not the
very draw that starts the attack. β multiplies squared differences of unit-norm maps *divided by H·W*:
L_feat ≤ Σ_i 2/(H_i·W_i), 0.2 for a WRN-34-10 teacher; other scalings change the method by orders of magnitude.
"""

import math
import re
from collections import defaultdict

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ibjax import losses
from ibjax.errors import InputError, check_range, nearest
from ibjax.models.layers import BatchNorm, Dense, global_average
from ibjax.objectives.standard import accuracy
from ibjax.step import Objective

CHOICES = {
    "attack_target": ("teacher", "student"),
    "teacher_features": ("adv", "nat"),
    "granularity": ("block", "stage"),
    "energy": ("square", "mean"),
}


def ibd(
    *,
    alpha: float = 0.9,
    beta: float = 0.8,
    attack_target: str = "teacher",
    teacher_features: str = "adv",
    teacher_noise: float = 0.0,
    granularity: str = "block",
    qk_dim: int = 128,
    positional: bool = True,
    query_relu: bool = False,
    energy: str = "square",
) -> Objective:
    """Information-bottleneck distillation; its attack is dict(name="pgd", loss="kl", init="gaussian")."""
    given = dict(attack_target=attack_target, teacher_features=teacher_features, granularity=granularity, energy=energy)
    for name, value in given.items():
        if value not in CHOICES[name]:
            raise InputError(f"objective.{name}='{value}' is unknown; {nearest(value, CHOICES[name])}")
    check_range("objective.alpha", alpha, 0, 1)
    check_range("objective.beta", beta, 0)
    check_range("objective.teacher_noise", teacher_noise, 0, 1)
    check_range("objective.qk_dim", qk_dim, 1)
    head = AttentionMatching(qk_dim, granularity, positional, query_relu, energy)

    def teach(net, batch, key):
        x = batch["image"]
        if teacher_noise:
            x = x + teacher_noise * jax.random.normal(key, x.shape, x.dtype)
        logits, features = net.teacher(x)
        return jax.nn.softmax(logits), features

    def target(net, variables, batch, key):
        if attack_target == "student":
            return jax.nn.softmax(net.predict(variables, batch["image"])[0])
        return teach(net, batch, jax.random.split(key, 3)[0])[0]

    def loss(net, variables, batch, x_adv, key):
        key_teacher, key_clean, key_adv = jax.random.split(key, 3)
        y_t, features_t = teach(net, batch, key_teacher)
        (clean, _), variables = net.forward(variables, batch["image"], key_clean)
        (adv, features_s), variables = net.forward(variables, x_adv, key_adv)

        natural = jnp.mean(losses.kl(clean, y_t))
        robust = jnp.mean(losses.kl(adv, y_t))
        value = (1 - alpha) * natural + alpha * robust
        metrics = {"natural": natural, "robust": robust}
        if beta:
            if teacher_features == "adv":
                _, features_t = net.teacher(x_adv)
            (feature, _), updated = head.apply(
                variables["head"], features_s, features_t, train=True, mutable=["batch_stats"]
            )
            variables = {**variables, "head": {**variables["head"], **updated}}
            value = value + beta * feature
            metrics["feature"] = feature
        metrics |= {"loss": value, "clean_acc": accuracy(clean, batch), "adv_acc": accuracy(adv, batch)}
        return value, (variables, metrics)

    return Objective(target, loss, head if beta else None, teachers=("teacher",), attack_losses=("kl", "ce"))


class AttentionMatching(nn.Module):
    """Which student block should look like which teacher block, sample by sample (attention-based feature
    distillation: Ji, Heo & Park, AAAI 2021).

        q_i = BN(W_i GAP(z_t^i))            k_j = ReLU(BN(W_j GAP(z_s^j)))         k̃_{j,i} = BN(W k_j)_i
        Attn_{b,i,·} = softmax_j( (⟨k̃_{b,j,i}, q_{b,i}⟩ + ⟨p_t^i, p_s^j⟩) / √d )

    Called with the taps of student and teacher; returns (L_feat, Attn (B, n, m)), n teacher and m student layers.
    """

    qk_dim: int = 128
    granularity: str = "block"
    positional: bool = True
    query_relu: bool = False
    energy: str = "square"

    @nn.compact
    def __call__(self, student: dict[str, Array], teacher: dict[str, Array], train: bool) -> tuple[Array, Array]:
        z_s, z_t = layers_of(student, self.granularity), layers_of(teacher, self.granularity)
        n, m, d, batch = len(z_t), len(z_s), self.qk_dim, z_s[0].shape[0]

        query = [
            BatchNorm(name=f"query_bn{i}")(Dense(d, name=f"query{i}")(global_average(z)), train)
            for i, z in enumerate(z_t, 1)
        ]
        key = [
            nn.relu(BatchNorm(name=f"key_bn{j}")(Dense(d, name=f"key{j}")(global_average(z)), train))
            for j, z in enumerate(z_s, 1)
        ]
        query, key = jnp.stack(query, 1), jnp.stack(key, 1)  # (B, n, d), (B, m, d)
        if self.query_relu:
            query = nn.relu(query)
        key = Dense(d * n, name="bilinear")(key.reshape(batch * m, d))
        key = BatchNorm(name="bilinear_bn")(key, train).reshape(batch, m, n, d)
        score = jnp.einsum("bmnd,bnd->bnm", key, query)
        if self.positional:
            xavier = nn.initializers.xavier_normal()
            position_t, position_s = (self.param(f"position_{w}", xavier, (k, d)) for w, k in (("t", n), ("s", m)))
            score = score + (position_t @ position_s.T)[None]
        attention = jax.nn.softmax(score / math.sqrt(d), axis=-1)  # over student layers
        difference = energy_differences(z_s, z_t, self.energy)  # (B, n, m)
        return jnp.sum(jnp.mean(jnp.sum(attention * difference, -1), 0)), attention


def layers_of(features: dict[str, Array], granularity: str) -> list[Array]:
    """The post-activation taps of all blocks (or stages) in order, without the stem.

    Pre-activation networks offer `blockN_relu`, what the next block sees; others are after a ReLU as they are.
    """
    names = {int(match[1]): match[0] for name in features if (match := re.fullmatch(rf"{granularity}(\d+)", name))}
    if not names:  # a plain network has convolutions for blocks
        names = {int(match[1]): match[0] for name in features if (match := re.fullmatch(r"conv(\d+)", name))}
    return [features.get(f"{names[i]}_relu", features[names[i]]) for i in sorted(names)]


def energy_differences(z_s: list[Array], z_t: list[Array], energy: str) -> Array:
    """mean_{hw} (ê_s^j − ê_t^i)², shape (B, n, m): energies over channels, pooled to the teacher's size, unit norm."""

    def energy_map(z):
        z = z.astype(jnp.float32)
        return jnp.mean(z * z if energy == "square" else z, axis=-1)

    def unit(e):  # (B, k, H, W) -> (B, k, H·W) of norm 1; a zero map stays zero, with zero gradient
        e = e.reshape(*e.shape[:2], -1)
        return e * jax.lax.rsqrt(jnp.maximum(jnp.sum(e * e, -1, keepdims=True), 1e-24))

    by_size = defaultdict(list)  # the teacher's layers, grouped by spatial size
    for i, z in enumerate(z_t):
        by_size[z.shape[1:3]].append(i)
    maps_s = [energy_map(z) for z in z_s]
    columns = {}
    for size, indices in by_size.items():
        e_s = unit(jnp.stack([adaptive_average(e, size) for e in maps_s], 1))  # (B, m, HW)
        e_t = unit(jnp.stack([energy_map(z_t[i]) for i in indices], 1))  # (B, n', HW)
        columns[size] = jnp.mean(jnp.square(e_s[:, None] - e_t[:, :, None]), -1)  # (B, n', m)
    order = np.argsort([i for indices in by_size.values() for i in indices])
    return jnp.concatenate(list(columns.values()), 1)[:, order]


def adaptive_average(e: Array, size: tuple[int, int]) -> Array:
    """PyTorch's adaptive_avg_pool2d: (B, H, W) -> (B, *size); smaller maps are replicated."""
    if e.shape[1:] == size:
        return e
    rows, columns = (_pooling_matrix(n, k) for n, k in zip(e.shape[1:], size, strict=True))
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum("hH,bHW,wW->bhw", rows, e, columns, precision=precision)


def _pooling_matrix(n: int, k: int) -> np.ndarray:
    """(k, n): row i averages the inputs from floor(i·n/k) to ceil((i+1)·n/k)."""
    matrix = np.zeros((k, n), np.float32)
    for i in range(k):
        first, last = (i * n) // k, -((-(i + 1) * n) // k)
        matrix[i, first:last] = 1 / (last - first)
    return matrix
