"""MIGE: Wen et al., "Mutual Information Gradient Estimation for Representation Learning", ICLR 2020;
scores by the spectral Stein gradient estimator, SSGE: Shi, Sun & Zhu, ICML 2018.

    I(Z;Z')    = H(Z) + H(Z') − H(Z,Z'),     ∇H(Z) = −E[ s(z) · ∂z/∂θ ],    s = ∇ log q the score
    surrogate  = mean_b [ −ŝ(z)·z − ŝ(z')·z' + ŝ([z,z'])·[z,z'] ]            ŝ held constant

    ŝ(x) = Σ_{j≤J} β_j ψ_j(x),  ψ_j(x) = √M/λ_j Σ_m u_jm k(x, x_m),  β_j = −(1/M) Σ_m ∇ψ_j(x_m)

| symbol | code  | default |
|--------|-------|---------|
| J      | share | 0.99    | the smallest number of leading eigenvalues λ_j of the Gram matrix whose sum reaches this
|        |       |         | share of the sum of all. The authors' code uses one eigenvalue less

The width of the Gaussian kernel is the median distance between two samples; the authors' code includes the distances of
samples to themselves, which are 0.

At the samples themselves the sum simplifies: with the Gram matrix K = U Λ Uᵀ and G_m = Σ_i ∇_{x_i} k(x_i, x_m),
ŝ = −U_J Λ_J⁻¹ U_Jᵀ G, which is what the code computes. No derivative is taken through the eigenvectors.
"""

import jax.numpy as jnp
from jax import Array, lax

from ibjax.information.hsic import at_least_float32, squared_distances


def score(x: Array, share: float = 0.99) -> Array:
    """∇ log q at samples x (M, d) of q, shape (M, d), without gradient; 0 if all samples are equal."""
    x = lax.stop_gradient(at_least_float32(x))
    distances = squared_distances(x)
    width = _squared_width(distances)
    gram = jnp.exp(-distances / (2 * width))
    highest = lax.Precision.HIGHEST
    g = (x * jnp.sum(gram, axis=1, keepdims=True) - jnp.matmul(gram, x, precision=highest)) / width  # (M, d)

    values, vectors = jnp.linalg.eigh(gram)  # ascending
    values, vectors = jnp.maximum(values[::-1], 0.0), vectors[:, ::-1]
    before = jnp.cumsum(values) - values  # for each eigenvalue, the sum of the larger ones
    kept = before < share * jnp.sum(values)
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1.0), 0.0)
    coefficients = inverse[:, None] * jnp.matmul(vectors.T, g, precision=highest)
    return -jnp.matmul(vectors, coefficients, precision=highest)


def information_surrogate(z: Array, z_other: Array, share: float = 0.99) -> Array:
    """A scalar whose gradient with respect to z and z' (B, K) estimates that of I(Z;Z'); its value has no meaning."""
    pair = jnp.concatenate([z, z_other], axis=1)

    def entropy(x):  # only its gradient is that of H
        return -jnp.mean(jnp.sum(score(x, share) * x, axis=1))

    return entropy(z) + entropy(z_other) - entropy(pair)


def _squared_width(distances: Array) -> Array:
    """The median squared distance of two samples; the mean if more than half of them are 0, and 1 if all are."""
    rows, columns = jnp.triu_indices(len(distances), 1)
    pairs = distances[rows, columns]
    width = jnp.median(pairs)
    width = jnp.where(width > 0, width, jnp.mean(pairs))
    return jnp.where(width > 0, width, 1.0)
