"""HSIC: Gretton, Bousquet, Smola & Schölkopf, "Measuring Statistical Dependence with Hilbert-Schmidt Norms", ALT 2005;
normalised: Fukumizu, Gretton, Sun & Schölkopf, "Kernel Measures of Conditional Dependence", NeurIPS 2007, as in the
HSIC bottleneck (Ma, Lewis & Kleijn, AAAI 2020), HBaR and IB-RAR.

    K_ab       = exp(−||u_a − u_b||² / (2 σ²))                     Gaussian;   K = U Uᵀ linear
    HSIC(U, V) = (B − 1)⁻² tr(K H L H)                             H = I − 11ᵀ/B, biased
    R          = K̃ (K̃ + ε B I)⁻¹,   K̃ = H K H                       the correlation operator of U
    nHSIC(U,V) = tr(R_U R_V)                                       normalised; here σ is in units of √dimension

| symbol | code  | default |
|--------|-------|---------|
| σ      | sigma | 5 (nHSIC) |
| ε      | ridge | 1e-5    |

HSIC and nHSIC are different measures, not scalings of each other: with σ = 5 and a batch of 100 images, nHSIC(X, T) is
in the tens, while HSIC of the same kernels is about 6e-7. nHSIC lies between 0 and the smaller of the two ranks, which
is at most B − 1, and C − 1 for labels of C classes. The ridge is ε·B, so nHSIC also depends on the batch size.

The authors' code centres on one side only, K̃ = K H. tr(R_U R_V) is the same, and the symmetric form used here permits
a Cholesky factorisation.

Precision: all matrix products are true float32 (accelerators would round to TF32 or bfloat16); inputs of lower
precision are converted. Guarantees (tests of the same names): no NaN in values or gradients for identical samples,
constant images, a batch of one class, or fewer samples than classes.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from ibjax.devices import placement
from ibjax.errors import InputError, nearest
from ibjax.information.linalg import each_matrix

SIGMA, RIDGE = 5.0, 1e-5
KERNELS = ("linear", "gaussian")


# ---- kernels -------------------------------------------------------------------------------------------------


def squared_distances(x: Array) -> Array:
    """||x_a − x_b||², shape (B, B), of flattened samples (B, …), without a (B, B, d) array.

    The result is non-negative and zero on the diagonal, and its gradient is finite everywhere. The samples' mean is
    subtracted first, so that rounding errors are relative to the spread of the samples, not to their magnitude.
    """
    x = _samples(x)
    x = x - jnp.mean(x, axis=0, keepdims=True)
    products = placement.everywhere(_product(x, x.T))
    norms = jnp.diagonal(products)  # sums of squares would be summed over all devices once more
    distances = norms[:, None] + norms[None, :] - 2 * products
    return jnp.where(jnp.eye(len(x), dtype=bool), 0.0, jnp.maximum(distances, 0.0))


def gaussian_gram(x: Array, sigma: "float | Array") -> Array:
    """exp(−||x_a − x_b||² / (2 σ²)), shape (B, B), of samples (B, …); σ > 0 in the units of x."""
    if isinstance(sigma, int | float) and not sigma > 0:
        raise InputError(f"sigma={sigma} is not allowed; the width of a Gaussian kernel is a number above 0")
    return jnp.exp(squared_distances(x) / (-2.0 * sigma**2))


def scaled_gram(x: Array, sigma: float = SIGMA) -> Array:
    """K − 1, shape (B, B), for the Gaussian kernel K of nHSIC with width σ·√d, d being the dimension of a sample.

    With σ = 5 the values of K are so close to 1 that float32 would keep few digits of their variation. Centring removes
    the constant 1.
    """
    dimension = x.size / len(x)
    return jnp.expm1(squared_distances(x) / (-2.0 * sigma**2 * dimension))


def linear_gram(x: Array) -> Array:
    """⟨x_a, x_b⟩, shape (B, B), of samples (B, …)."""
    x = _samples(x)
    return _product(x, x.T)


def label_gram(labels: Array, num_classes: int, kernel: str = "linear", sigma: float = SIGMA) -> Array:
    """The Gram matrix (B, B) of one-hot labels with all `num_classes` columns; `kernel` is "linear" or "gaussian".

    The Gaussian width is σ·√C. The authors' code has columns only for the labels that occur in the batch, so its width
    changes from batch to batch.
    """
    if kernel not in KERNELS:
        raise InputError(f"label kernel '{kernel}' is unknown; {nearest(kernel, KERNELS)}")
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return linear_gram(one_hot) if kernel == "linear" else scaled_gram(one_hot, sigma)


def knn_width(z: Array, k: int = 10) -> Array:
    """A kernel width from the data: the mean Euclidean distance of a sample to its k nearest neighbours.

    Args:
      z: samples (B, …), at least two.
      k: number of neighbours, without the sample itself; if there are fewer other samples, all of them.

    Returns:
      A scalar without gradient, above 0 even if all samples are equal.
    """
    if len(z) < 2 or k < 1:
        raise InputError(f"knn_width of {len(z)} samples with k={k}; give at least 2 samples and k of at least 1")
    distances = squared_distances(lax.stop_gradient(z))
    others = jnp.sort(jnp.where(jnp.eye(len(z), dtype=bool), jnp.inf, distances), axis=1)[:, : min(k, len(z) - 1)]
    return jnp.maximum(jnp.mean(jnp.sqrt(others)), 1e-12)


# ---- HSIC ----------------------------------------------------------------------------------------------------


def centered(k: Array) -> Array:
    """H K H of Gram matrices (…, B, B)."""
    k = k - jnp.mean(k, axis=-1, keepdims=True)
    return k - jnp.mean(k, axis=-2, keepdims=True)


def hsic_trace(k: Array, l: Array) -> Array:
    """tr(K H L H) of Gram matrices (…, B, B), shape (…): HSIC before its division by (B − 1)²."""
    return jnp.sum(centered(k) * centered(l), axis=(-2, -1))


def hsic(k: Array, l: Array) -> Array:
    """The biased HSIC, (B − 1)⁻² tr(K H L H), of Gram matrices (…, B, B), shape (…)."""
    if k.shape[-1] < 2:
        raise InputError(f"HSIC of {k.shape[-1]} sample is not defined; give at least 2")
    return hsic_trace(k, l) / (k.shape[-1] - 1) ** 2


# ---- normalised HSIC -----------------------------------------------------------------------------------------


def correlation_operator(k: Array, ridge: float = RIDGE) -> Array:
    """R = K̃ (K̃ + ε B I)⁻¹ of a Gram matrix (B, B): symmetric, with eigenvalues in [0, 1).

    Computed by Cholesky factorisation. The gradient is one more solve with the same factor, as a derivative through the
    factorisation or through eigenvectors is slower and less stable. The entries of the kernel should be at most about
    1: in float32, the rounding error of much larger ones would exceed the ridge.
    """
    k = centered(k)
    regularised = k + ridge * len(k) * jnp.eye(len(k), dtype=k.dtype)
    factor = jnp.linalg.cholesky(lax.stop_gradient(regularised))

    def solve(_, b):
        return jax.scipy.linalg.cho_solve((factor, True), b)

    return lax.custom_linear_solve(lambda b: _product(regularised, b), k, solve, symmetric=True)


def correlation_operators(k: Array, ridge: float = RIDGE) -> Array:
    """`correlation_operator` of each of the Gram matrices (n, B, B), shape (n, B, B), spread over several devices."""
    return each_matrix(lambda k: correlation_operator(k, ridge), k)


def label_operator(
    labels: Array, num_classes: int, kernel: str = "linear", sigma: float = SIGMA, ridge: float = RIDGE
) -> Array:
    """R = `correlation_operator(label_gram(…))`, more accurately: eigenvalues that should be zero are zero.

    Two one-hot rows are equal or √2 apart, so for both kernels K̃ = s·Ỹ Ỹᵀ with Ỹ = H Y, s = 1 or 1 − exp(−1/(σ²C)),
    and R = Ỹ (ỸᵀỸ + ε B/s I)⁻¹ Ỹᵀ needs only a C × C solve.
    """
    if kernel not in KERNELS:
        raise InputError(f"label kernel '{kernel}' is unknown; {nearest(kernel, KERNELS)}")
    s = 1.0 if kernel == "linear" else -math.expm1(-1 / (sigma**2 * num_classes))
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    y = one_hot - jnp.mean(one_hot, axis=0, keepdims=True)  # (B, C)
    regularised = _product(y.T, y) + ridge * len(y) / s * jnp.eye(num_classes)
    return _product(y, jax.scipy.linalg.solve(regularised, y.T, assume_a="pos"))


def operator_product(r: Array, s: Array) -> Array:
    """tr(R S) of symmetric operators (B, B)."""
    return jnp.sum(r * s.T)


def nhsic_cca(x: Array, y: Array, sigma: float = SIGMA, ridge: float = RIDGE) -> Array:
    """nHSIC of samples (B, …) and (B, …) with Gaussian kernels of width σ·√d: tr(R_X R_Y), a scalar."""
    return operator_product(*correlation_operators(jnp.stack([scaled_gram(u, sigma) for u in (x, y)]), ridge))


def nhsic_layers(r: Array, layers: Sequence[Array], sigma: float = SIGMA, ridge: float = RIDGE) -> Array:
    """nHSIC of each of n given variables with each of L layers, shape (n, L).

    Args:
      r: correlation operators (n, B, B) of the given variables, such as the images and the labels.
      layers: features (B, …) of any sizes; each gives a Gram matrix, and one batched solve treats all of them.
    """
    grams = jnp.stack([scaled_gram(z, sigma) for z in layers])  # (L, B, B)
    return _products(r, correlation_operators(grams, ridge))


def nhsic_channels(
    r: Array, features: Array, sigma: float = SIGMA, ridge: float = RIDGE, chunk: int | None = None
) -> Array:
    """nHSIC of each of n given variables with each channel of one layer, shape (n, C).

    Args:
      r: correlation operators (n, B, B).
      features: (B, …, C); a sample of a channel consists of all positions.
      chunk: number of channels that an accelerator treats at a time, with a few (B, B) arrays each; None: all at once.
    """
    channels = jnp.moveaxis(placement.split(features, 0), -1, 0)  # (C, B, …)

    def one(channel):
        operator = correlation_operator(scaled_gram(channel, sigma), ridge)
        return _products(r, operator[None])[:, 0]

    return placement.everywhere(each_matrix(one, channels, chunk).T)


def _products(r: Array, s: Array) -> Array:
    """tr(R_n S_m), shape (n, m), of symmetric operators (n, B, B) and (m, B, B)."""
    return _product(r.reshape(len(r), -1), s.reshape(len(s), -1).T)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _samples(x: Array) -> Array:
    return at_least_float32(placement.by_feature(x))  # (B, d)


def at_least_float32(x: Array) -> Array:
    """x unchanged if it is float64, else converted to float32."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)
