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

from ibjax.devices import precision
from ibjax.errors import InputError
from ibjax.models.layers import BatchNorm, Dense, dense_each, global_average, norm_each


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

        query = self.projected("query", z_t, train)  # (B, n, d)
        key = nn.relu(self.projected("key", z_s, train))  # (B, m, d)
        if self.query_relu:
            query = nn.relu(query)
        key = Dense(d * n, name="bilinear")(key.reshape(batch * m, d))
        key = BatchNorm(name="bilinear_bn")(key, train).reshape(batch, m, n, d)
        stated = precision.stated()
        score = jnp.einsum("bmnd,bnd->bnm", key, query, precision=stated)
        if self.positional:
            xavier = nn.initializers.variance_scaling(1.0, "fan_avg", "normal")  # Flax's own is truncated
            position_t, position_s = (self.param(f"position_{w}", xavier, (k, d)) for w, k in (("t", n), ("s", m)))
            score = score + jnp.matmul(position_t, position_s.T, precision=stated)[None]
        attention = jax.nn.softmax(score / math.sqrt(d), axis=-1)  # over student layers
        difference = energy_differences(z_s, z_t, self.energy)  # (B, n, m)
        return jnp.sum(jnp.mean(jnp.sum(attention * difference, -1), 0)), attention

    def projected(self, kind: str, layers: list[Array], train: bool) -> Array:
        """BN(W_i GAP(z_i)) of k layers, (B, k, d).

        Each layer has its own weights and statistics. One product serves all layers of a width, and one batch-norm all
        k·d columns: with 15 layers, separate ones would be some hundred small kernels.
        """
        linear = [Dense(self.qk_dim, name=f"{kind}{i}") for i in range(1, len(layers) + 1)]
        norms = [BatchNorm(name=f"{kind}_bn{i}") for i in range(1, len(layers) + 1)]
        pooled = [global_average(z) for z in layers]
        if self.is_initializing():
            return jnp.stack([norm(dense(z), train) for norm, dense, z in zip(norms, linear, pooled, strict=True)], 1)
        alike = _grouped([z.shape[-1] for z in pooled])
        made = [dense_each([linear[i] for i in group], [pooled[i] for i in group]) for group in alike]
        return norm_each(norms, jnp.concatenate(made, 1)[:, _inverse(alike)], train)


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

    def of_size(layers):  # {(H, W): energies (B, k, H, W) of the layers of that size}, and where each layer went
        groups = _grouped([z.shape[1:3] for z in layers])
        maps = [jnp.stack([energy_map(layers[i]) for i in group], 1) for group in groups]
        return {e.shape[2:]: e for e in maps}, _inverse(groups)

    (maps_s, order_s), (maps_t, order_t) = of_size(z_s), of_size(z_t)
    rows = []
    for size, e_t in maps_t.items():
        e_s = unit(jnp.concatenate([adaptive_average(e, size) for e in maps_s.values()], 1))  # (B, m, HW)
        rows.append(jnp.mean(jnp.square(e_s[:, None] - unit(e_t)[:, :, None]), -1))  # (B, n', m)
    return jnp.concatenate(rows, 1)[:, order_t][:, :, order_s]


def _grouped(kinds):
    """The positions of equal entries of a list, a list for each kind."""
    groups = defaultdict(list)
    for i, kind in enumerate(kinds):
        groups[kind].append(i)
    return list(groups.values())


def _inverse(groups):
    """Where in the concatenation of the groups each position is."""
    return np.argsort([i for group in groups for i in group])


def adaptive_average(e: Array, size: tuple[int, int]) -> Array:
    """PyTorch's adaptive_avg_pool2d: (…, H, W) -> (…, *size); smaller maps are replicated."""
    (height, width), (h, w) = e.shape[-2:], size
    if height % h == width % w == 0:  # one sum, where products would be two kernels
        return jnp.mean(e.reshape(*e.shape[:-2], h, height // h, w, width // w), (-3, -1))
    if h % height == w % width == 0:
        return jnp.repeat(jnp.repeat(e, h // height, -2), w // width, -1)
    rows, columns = (_pooling_matrix(n, k) for n, k in zip(e.shape[-2:], size, strict=True))
    return jnp.einsum("hH,...HW,wW->...hw", rows, e, columns, precision=jax.lax.Precision.HIGHEST)


def _pooling_matrix(n: int, k: int) -> np.ndarray:
    """(k, n): row i averages the inputs from floor(i·n/k) to ceil((i+1)·n/k)."""
    matrix = np.zeros((k, n), np.float32)
    for i in range(k):
        first, last = (i * n) // k, -((-(i + 1) * n) // k)
        matrix[i, first:last] = 1 / (last - first)
    return matrix
