"""Which student layer should look like which teacher layer: IBD's feature term and its hand-crafted alternative.

    L_feat = Σ_i mean_b Σ_j w_{b,i,j} · mean_{hw} (ê_s^j − ê_t^i)²          i of n teacher layers, j of m student layers

    adaptive       w is an attention over the student's layers, learned sample by sample        `AttentionMatching`
    hand-crafted   w is 1 or n / pairs for layers of the same level, else 0                     `hand_matching`

In both cases the weights of a sample sum to n. ê are energy maps of unit norm, see `energy_differences`.
"""

import math
import re
from collections import defaultdict

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ibjax.errors import InputError
from ibjax.models.layers import BatchNorm, Dense, global_average


class AttentionMatching(nn.Module):
    """Which student block should look like which teacher block, sample by sample (attention-based feature
    distillation: Ji, Heo & Park, AAAI 2021).

        q_i = BN(W_i GAP(z_t^i))            k_j = ReLU(BN(W_j GAP(z_s^j)))         k̃_{j,i} = BN(W k_j)_i
        Attn_{b,i,·} = softmax_j( (⟨k̃_{b,j,i}, q_{b,i}⟩ + ⟨p_t^i, p_s^j⟩) / √d )

    It takes the taps of student and teacher and returns (L_feat, Attn (B, n, m)) for n teacher and m student layers.
    """

    qk_dim: int = 128
    granularity: str = "block"
    positional: bool = True
    query_relu: bool = False
    energy: str = "square"
    stem: bool = False

    @nn.compact
    def __call__(self, student: dict[str, Array], teacher: dict[str, Array], train: bool) -> tuple[Array, Array]:
        z_s, z_t = (layers_of(features, self.granularity, self.stem) for features in (student, teacher))
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
            xavier = nn.initializers.variance_scaling(1.0, "fan_avg", "normal")  # Flax's own is truncated
            position_t, position_s = (self.param(f"position_{w}", xavier, (k, d)) for w, k in (("t", n), ("s", m)))
            score = score + (position_t @ position_s.T)[None]
        attention = jax.nn.softmax(score / math.sqrt(d), axis=-1)  # over student layers
        difference = energy_differences(z_s, z_t, self.energy)  # (B, n, m)
        return jnp.sum(jnp.mean(jnp.sum(attention * difference, -1), 0)), attention


def hand_matching(
    student: dict[str, Array], teacher: dict[str, Array], granularity: str, energy: str, stem: bool = False
) -> Array:
    """L_feat for layers of the same level, n · mean_pairs mean_b mean_{hw} (ê_s − ê_t)².

    Where both networks have the same feature maps (equal architectures), layer j is paired with layer j; otherwise the
    last blocks of the stages that both networks have are paired. The paper does not define the pairs. The factor n
    gives β the same meaning as in adaptive matching.
    """
    z_s, z_t = (layers_of(features, granularity, stem) for features in (student, teacher))
    n = len(z_t)
    if [z.shape[1:3] for z in z_s] != [z.shape[1:3] for z in z_t]:
        z_s, z_t = (layers_of(features, "stage", stem) for features in (student, teacher))
    pairs = zip(z_s, z_t, strict=False)  # a ResNet's fourth stage has no partner in a WideResNet
    differences = [jnp.mean(energy_differences([s], [t], energy)) for s, t in pairs]
    return n * jnp.mean(jnp.stack(differences))


def layers_of(features: dict[str, Array], granularity: str, stem: bool = False) -> list[Array]:
    """The post-activation taps of all blocks (or stages) in order; with `stem`, that of the stem comes first.

    Pre-activation networks have a tap `blockN_relu`, the activated input of the next block; in other networks the
    output of a block has already passed a ReLU.
    """
    numbers = {int(match[1]): match[0] for name in features if (match := re.fullmatch(rf"{granularity}(\d+)", name))}
    if not numbers:  # in a plain network, convolutions take the place of blocks
        numbers = {int(match[1]): match[0] for name in features if (match := re.fullmatch(r"conv(\d+)", name))}
    names = [numbers[i] for i in sorted(numbers)]
    if not names:
        raise InputError(
            f"objective.granularity='{granularity}': student and teacher need taps {granularity}1, {granularity}2, …; "
            f"one of them has {', '.join(features) or 'none, as it returns logits alone'}; objective.beta=0 needs none"
        )
    if stem:
        if "stem" not in features:
            raise InputError("objective.stem=True: student and teacher need a 'stem'; plain networks have none")
        names = ["stem", *names]
    return [features.get(f"{name}_relu", features[name]) for name in names]


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
