"""Per-example losses: every function maps logits (B, C) to values (B,), in float32; the caller reduces them.

A `target` is either integer labels (B,) or a distribution over classes (B, C).
"""

import jax
import jax.numpy as jnp
from jax import Array, lax


def is_labels(target: Array) -> bool:
    """Whether `target` holds integer labels (B,) rather than distributions (B, C)."""
    return jnp.issubdtype(target.dtype, jnp.integer)


def as_distribution(target: Array, num_classes: int) -> Array:
    """Labels (B,) become one-hot rows (B, C) in float32; distributions pass unchanged."""
    return jax.nn.one_hot(target, num_classes, dtype=jnp.float32) if is_labels(target) else target


def as_labels(target: Array) -> Array:
    """Distributions (B, C) become their most likely class (B,); labels pass unchanged."""
    return target if is_labels(target) else jnp.argmax(target, axis=-1)


def smooth(target: Array, num_classes: int, delta: float, form: str = "others") -> Array:
    """Smoothed labels (B, C) of labels (B,) or distributions (B, C): δ of the probability goes to all classes alike.

    form       true class           each other class
    others     1 − δ                δ/(C − 1)             Pang et al. 2021
    uniform    1 − δ + δ/C          δ/C                   Szegedy et al. 2016, PyTorch; Gowal et al. 2021
    """
    floor = delta / (num_classes - 1 if form == "others" else num_classes)
    if is_labels(target):
        top = 1.0 - delta if form == "others" else 1.0 - delta + floor
        return jnp.where(jax.nn.one_hot(target, num_classes, dtype=bool), top, floor)
    return (1.0 - num_classes * floor) * target + floor


def cross_entropy(logits: Array, target: Array) -> Array:
    """-Σ_c target_c log softmax(logits)_c, shape (B,)."""
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32))
    if is_labels(target):
        return -jnp.take_along_axis(log_q, target[:, None], axis=-1)[:, 0]
    return -jnp.sum(target * log_q, axis=-1)


def kl(logits: Array, target: Array) -> Array:
    """KL(target || softmax(logits)), shape (B,): cross-entropy minus the target's entropy."""
    p = as_distribution(target, logits.shape[-1])
    return cross_entropy(logits, p) + jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1)


def kl_logits(reference: Array, logits: Array) -> Array:
    """KL(softmax(reference) || softmax(logits)), shape (B,); gradients flow through both arguments."""
    log_p = jax.nn.log_softmax(reference.astype(jnp.float32))
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def margin(logits: Array, target: Array) -> Array:
    """max_{k≠y} z_k − z_y, shape (B,): positive where the example is misclassified (Carlini & Wagner)."""
    logits = logits.astype(jnp.float32)
    is_true = jax.nn.one_hot(as_labels(target), logits.shape[-1], dtype=bool)
    best_other = jnp.max(jnp.where(is_true, -jnp.inf, logits), axis=-1)
    return best_other - jnp.sum(jnp.where(is_true, logits, 0.0), axis=-1)


def margin_targeted(logits: Array, target: Array, other: Array) -> Array:
    """z_t − z_y, shape (B,), for the class t = `other` (B,)."""
    z_y, z_t = (jnp.take_along_axis(logits.astype(jnp.float32), k[:, None], 1)[:, 0] for k in (target, other))
    return z_t - z_y


def dlr(logits: Array, target: Array) -> Array:
    """Difference of logits ratio (Croce & Hein 2020), shape (B,); at least 3 classes.

        −(z_y − max_{k≠y} z_k) / (z_(1) − z_(3) + 1e-12)          z_(1) ≥ z_(2) ≥ …

    It is invariant to shifts and to positive scaling of the logits.
    """
    z = lax.top_k(logits.astype(jnp.float32), 3)[0]
    return margin(logits, target) / (z[:, 0] - z[:, 2] + 1e-12)


def dlr_targeted(logits: Array, target: Array, other: Array) -> Array:
    """DLR towards the class t = `other` (B,), shape (B,); at least 4 classes.

    −(z_y − z_t) / (z_(1) − ½(z_(3) + z_(4)) + 1e-12)
    """
    z = lax.top_k(logits.astype(jnp.float32), 4)[0]
    return margin_targeted(logits, target, other) / (z[:, 0] - 0.5 * (z[:, 2] + z[:, 3]) + 1e-12)


def predicted(logits: Array) -> Array:
    """The predicted class, shape (B,), int32; −1 if a logit is NaN or the largest logit is infinite.

    `argmax` alone returns 0 for a row of NaN, so an image of class 0 would count as classified correctly.
    """
    largest, number = jnp.max(logits, axis=-1), jnp.argmax(logits, axis=-1)
    exists = jnp.isfinite(largest) & ~jnp.any(jnp.isnan(logits), axis=-1)
    return jnp.where(exists, number, -1)


def correct(logits: Array, target: Array) -> Array:
    """Whether the predicted class is that of the target, shape (B,), bool; False where `predicted` is −1."""
    return predicted(logits) == as_labels(target)
