"""MINE: Belghazi et al., "Mutual Information Neural Estimation", ICML 2018.

    I(Z;Z') ≥ E_joint[T] − log E_marginal[e^T]                   Donsker & Varadhan, largest over networks T
    ∇      = E_joint[∇T] − E_marginal[e^T ∇T] / M                M: moving average of E_marginal[e^T]

The gradient of the logarithm of a minibatch mean is biased; with the moving average in the denominator much less.

| symbol   | code       | default    |
|----------|------------|------------|
| T        | widths     | (512, 512) | ReLU layers, then one number
|          | projection | None       | a linear map of the pair (z, z') to so many numbers comes before them
| M        | decay      | 0.99       |
|          | tap        | required   | the feature that is Z

Features become float32, and the products of T are true float32, as those of all estimators of this package.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax


class Mine(nn.Module):
    """The statistics network with its moving average; the head of an objective, which climbs what it returns.

    Called as every head, `(features, other_features, train)`, with taps of two passes over the network that are pairs
    row by row; the second may be None, as where a state is initialised, and then stands for the first. Returns the
    estimate in nats, a scalar, whose gradient with respect to the parameters and to both features is the corrected one.
    One loss, −λ·estimate, so trains both: the network T climbs to the bound, and the features to more information.

    In training mode it needs `rngs={"permutation": key}`: marginal pairs are made within the batch, along one random
    cycle, so that no row meets itself. It then updates "batch_stats": log_average, the logarithm of M, and count, the
    updates so far; the average is the plain mean until its window is full. Evaluation mode pairs each row with the
    next and changes nothing.
    """

    tap: str
    widths: tuple[int, ...] = (512, 512)
    projection: int | None = None
    decay: float = 0.99
    layer: Callable[..., nn.Module] = nn.Dense  # (features, name=…), a linear layer

    @nn.compact
    def __call__(self, features: dict[str, Array], other_features: dict[str, Array] | None, train: bool) -> Array:
        z, z_other = (taps[self.tap].astype(jnp.float32) for taps in (features, other_features or features))
        batch = len(z)
        partner = random_cycle(self.make_rng("permutation"), batch) if train else jnp.roll(jnp.arange(batch), -1)

        t = jnp.concatenate(
            [jnp.concatenate([z, z], 0), jnp.concatenate([z_other, z_other[partner]], 0)], 1
        )  # (2B, 2K)
        linear = functools.partial(self.layer, precision=lax.Precision.HIGHEST)
        if self.projection is not None:
            t = linear(self.projection, name="projection")(t)
        for i, width in enumerate(self.widths, 1):
            t = nn.relu(linear(width, name=f"dense{i}")(t))
        joint, marginal = jnp.split(linear(1, name="out")(t)[:, 0], 2)

        log_mean = jax.nn.logsumexp(marginal) - jnp.log(float(batch))  # log E_marginal[e^T]
        log_average = self.variable("batch_stats", "log_average", jnp.zeros, ())
        count = self.variable("batch_stats", "count", jnp.zeros, ())
        value = jnp.mean(joint) - log_mean
        if not train:
            return value
        keep = jnp.minimum(self.decay, count.value / (count.value + 1))
        average = jnp.logaddexp(jnp.log(keep) + log_average.value, jnp.log1p(-keep) + lax.stop_gradient(log_mean))
        if not self.is_initializing():
            log_average.value, count.value = average, count.value + 1
        surrogate = jnp.mean(joint) - jnp.exp(log_mean - average)  # has the corrected gradient
        return lax.stop_gradient(value - surrogate) + surrogate


def random_cycle(key: Array, n: int) -> Array:
    """A permutation (n,) that is one cycle, each with the same probability: no index stays where it is."""
    order = jax.random.permutation(key, n)
    return jnp.zeros(n, order.dtype).at[order].set(jnp.roll(order, -1))
