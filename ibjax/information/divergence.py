"""Closed-form divergences, in nats: every function returns one value per example (B,); the caller reduces them.

Gaussians are diagonal, given by mean and standard deviation (B, K). Divergences are sums over the K dimensions; with a
mean, the effective coefficient of such a loss term would be K times smaller.
"""

import jax
import jax.numpy as jnp
from jax import Array


def symmetrised_gaussian_kl(mean: Array, std: Array, other_mean: Array, other_std: Array) -> Array:
    """½ [KL(N || N') + KL(N' || N)] = ¼ Σ_k [ (σ² − σ'²)² / (σσ')² + (μ − μ')² (1/σ² + 1/σ'²) ], shape (B,).

    The logarithms cancel. The first summand equals σ²/σ'² + σ'²/σ² − 2, in a form without cancellation at σ = σ'.
    """
    scale = jnp.square((std - other_std) * (std + other_std) / (std * other_std))
    shift = jnp.square(mean - other_mean) * (1 / jnp.square(std) + 1 / jnp.square(other_std))
    return jnp.sum(scale + shift, axis=-1) / 4


def gaussian_kl(mean: Array, std: Array, prior_mean: Array | float = 0.0) -> Array:
    """KL(N(μ, σ²) || N(m, I)) = ½ Σ_k [ (μ − m)² + σ² − 1 − log σ² ], shape (B,): the rate of VIB (m = 0) and CEB."""
    return jnp.sum(jnp.square(mean - prior_mean) + jnp.square(std) - 1 - 2 * jnp.log(std), axis=-1) / 2


def symmetrised_categorical_kl(logits: Array, other_logits: Array) -> Array:
    """½ [KL(p || p') + KL(p' || p)] = ½ Σ_c (p_c − p'_c)(log p_c − log p'_c) of softmax(logits), shape (B,).

    Gradients flow through both arguments.
    """
    log_p, log_q = (jax.nn.log_softmax(z.astype(jnp.float32)) for z in (logits, other_logits))
    return jnp.sum((jnp.exp(log_p) - jnp.exp(log_q)) * (log_p - log_q), axis=-1) / 2
