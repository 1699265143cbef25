"""Singular values and the orthogonal polar factor of matrices, with derivatives that stay finite.

    A = U Σ Vᵀ,    P = U Vᵀ = Σ_{σ_i > τ} u_i v_iᵀ                            τ = n · machine epsilon · σ_max

    σ̄ -> Ā = U diag(σ̄) Vᵀ
    P̄ -> Ā = U W Vᵀ,  M = Uᵀ P̄ V,   W_ij = (M − Mᵀ)_ij / (σ_i + σ_j)         σ_i and σ_j above τ
                                     W_ij = M_ij / σ_i                         only σ_i above τ
                                     W_ij = M_ij / σ_j                         only σ_j above τ
                                     W_ij = 0                                  neither above τ

The derivatives of U and of V contain 1/(σ_i² − σ_j²) and are undefined at equal singular values. Those of σ and of P
are defined there, and a function of the image that needs both singular vectors can be expressed in σ and P.

For a rank-deficient matrix, such as a flat image, U Vᵀ is not unique. P is then the partial isometry of the polar
decomposition A = P·(AᵀA)^½, which is unique (0 for a black image), and the derivative considers only changes of A
that keep its rank. Denominators are at least 10⁻⁴·σ_max: natural images have singular values down to 10⁻⁵·σ_max (128
CIFAR-10 images: median 2·10⁻⁵, 10 % below 3·10⁻⁶), and the exact derivative would be as large as their inverse.

Comparison of algorithms on 384 matrices of 32 × 32 (128 CIFAR-10 images), float32, two cores, jax 0.10.2, median of 7
runs; errors of σ relative to σ_max and of P's entries, median over the matrices, against float64:

| | ms | error of σ | error of P |
|---|---|---|---|
| `jnp.linalg.svd` | 12 – 20 | 9e-8 | 1e-5 |
| the same, algorithm QR | 15 | 8e-8 | 1e-5 |
| `eigh` of AᵀA | 10 | 9e-5 | unusable: it divides by σ values that are rounding errors |
| Newton–Schulz, 30 iterations; `eigh` of PᵀA for σ | 31; 48 | 2e-7 | 2e-5 |
| Newton–Schulz, 15 iterations | 16 | – | 4e-1 |

On a CPU this module passes one matrix per call (see linalg.py). The forward pass for two such sets of images and the
gradient of a squared difference of their σ and P with respect to one set then took 65 ms of processor time. On CUDA the
default algorithm is Jacobi's, batched by cuSOLVER up to 32 × 32. On a TPU JAX's own is by polar decomposition, nested
loops of factorisations of which its compiler gives no estimate; there jacobi.py replaces it up to 64 × 64. Neither has
been measured on an accelerator.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from ibjax.devices import cores
from ibjax.errors import InputError
from ibjax.information import jacobi
from ibjax.information.hsic import at_least_float32
from ibjax.information.linalg import each_matrix, together

SMALLEST_SUM = 1e-4  # of σ_i + σ_j in a derivative, relative to σ_max
ROTATED = 64  # rows of the largest matrices that a TPU decomposes by rotations, see jacobi.py


def singular_values_and_polar(a: Array) -> tuple[Array, Array]:
    """Singular values (…, n), descending, and polar factor (…, n, n) of square matrices (…, n, n).

    Computed in at least float32. Only reverse-mode derivatives are available, since a `custom_vjp` has no `jvp`.

    Raises:
      InputError: matrices that are not square.
    """
    if a.ndim < 2 or a.shape[-1] != a.shape[-2]:
        raise InputError(f"an array of shape {a.shape} holds no square matrices; the last two sizes must agree")
    return _decompose(at_least_float32(a))


@jax.custom_vjp
def _decompose(a):
    return _forward(a)[0]


def _forward(a):
    n = a.shape[-1]
    if cores.form().svd == "rotations" and n <= ROTATED:
        u, s, vt = together(jacobi.svd, a.reshape(-1, n, n))
    else:
        u, s, vt = each_matrix(lambda m: jnp.linalg.svd(m, full_matrices=False), a.reshape(-1, n, n))
    u, s, vt = u.reshape(a.shape), s.reshape(a.shape[:-1]), vt.reshape(a.shape)
    kept = s > jnp.finfo(a.dtype).eps * n * s[..., :1]
    return (s, _product(u * kept[..., None, :].astype(a.dtype), vt)), (u, s, vt, kept)


def _backward(residuals, cotangents):
    (u, s, vt, kept), (s_bar, p_bar) = residuals, cotangents
    u_kept = jnp.where(kept[..., None, :], u, 0.0)
    p_bar_v = _product(p_bar, vt.mT)
    m = _product(u_kept.mT, p_bar_v)
    i, j = kept[..., :, None], kept[..., None, :]
    kept_s = jnp.where(kept, s, 0.0)
    floor = jnp.maximum(SMALLEST_SUM * s[..., :1, None], jnp.finfo(s.dtype).tiny)
    w = jnp.where(i & j, m - m.mT, m) / jnp.maximum(kept_s[..., :, None] + kept_s[..., None, :], floor)
    # rows with σ_i below τ, whose u_i is arbitrary or 0: the part of P̄V outside the span of the other u_i
    deficient = j & ~jnp.all(kept, -1)[..., None, None]
    others = jnp.where(deficient, p_bar_v - _product(u_kept, m), 0.0) / jnp.maximum(kept_s[..., None, :], floor)
    return (_product(_product(u_kept, w) + others + u * s_bar[..., None, :], vt),)


_decompose.defvjp(_forward, _backward)


def _product(a, b):
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
