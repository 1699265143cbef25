"""MINE: Belghazi et al., "Mutual Information Neural Estimation", ICML 2018.

    I(Z;Z') ≥ E_joint[T] − log E_marginal[e^T]                   Donsker & Varadhan, maximised over networks T
    ∇      = E_joint[∇T] − E_marginal[e^T ∇T] / M                M: moving average of E_marginal[e^T]

The gradient of the logarithm of a minibatch mean is biased; the moving average in the denominator reduces the bias.

| symbol   | code       | default    |
|----------|------------|------------|
| T        | widths     | (512, 512) | ReLU layers of these widths, then a linear layer with one output
|          | projection | None       | if set, a linear map of the pair (z, z') to this dimension precedes them
| M        | decay      | 0.99       |
|          | tap        | required   | the name of the feature Z

Features are converted to float32, and the matrix products of T are true float32, as in all estimators of this package.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax


class Mine(nn.Module):
    """The statistics network T with its moving average, used as the head of an objective that maximises its output.

    It is called as every head, `(features, other_features, train)`, with the taps of two forward passes; equal rows
    form the joint pairs. `other_features` may be None, as when a state is initialised; then `features` is used twice.
    It returns the estimate in nats, a scalar whose gradient with respect to the parameters and to both features is the
    corrected one. The single loss −λ·estimate therefore trains both: T tightens the bound, and the features gain mutual
    information.

    In training mode it needs `rngs={"permutation": key}`: marginal pairs are formed within the batch, along one random
    cycle, so that no row is paired with itself. It then updates "batch_stats": log_average, the logarithm of M, and
    count, the number of updates; until its window is full, M is the plain mean. Evaluation mode pairs each row with the
    next one and updates nothing.
    """

    tap: str
    widths: tuple[int, ...] = (512, 512)
    projection: int | None = None
    decay: float = 0.99
    layer: Callable[..., nn.Module] = nn.Dense  # factory of linear layers, (features, name=…)

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
    """A uniformly random permutation (n,) among those that are one cycle, so that no index maps to itself."""
    order = jax.random.permutation(key, n)
    return jnp.zeros(n, order.dtype).at[order].set(jnp.roll(order, -1))
