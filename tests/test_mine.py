"""MINE on Gaussians, whose mutual information is known, and its gradient and state against their definitions."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.special import logsumexp

from ibjax.information import mine
from ibjax.information.mine import random_cycle
from ibjax.models.layers import Dense

Mine = partial(mine.Mine, layer=Dense)

B, K = 64, 2


@functools.cache
def given():
    """Such pairs with ρ = 0.8, as arrays."""
    return jax.device_get(jax.jit(pairs)(jax.random.key(0), 0.8))


def pairs(key, rho, batch=B, dimension=K):
    """z and z' of K independent pairs with correlation rho each: I = −K/2 · log(1 − ρ²)."""
    z, noise = jax.random.normal(key, (2, batch, dimension))
    return {"latent": z}, {"latent": rho * z + (1 - rho**2) ** 0.5 * noise}


@partial(jax.jit, static_argnums=0, static_argnames="train")
def apply(module, variables, features, other, key=0, train=True):
    """(estimate, the state after it)."""
    seed = not jnp.issubdtype(jnp.asarray(key).dtype, jax.dtypes.prng_key)
    rngs = {"permutation": jax.random.key(key) if seed else key}
    value, updated = module.apply(variables, features, other, train=train, rngs=rngs, mutable=["batch_stats"])
    return value, {**variables, **updated}


@partial(jax.jit, static_argnums=0)
def start(module, features):
    return module.init(jax.random.key(1), features, None, train=False)


def drawn(module, features):
    """Random weights and biases: to initialise the network would compile a program of its own."""
    shapes = jax.eval_shape(partial(start, module), features)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda w: np.float32(rng.normal(size=w.shape) / np.sqrt(w.shape[0])), shapes["params"])
    return {"params": params, "batch_stats": {"log_average": np.float32(0), "count": np.float32(0)}}


def statistics(variables, z, z_other):
    """T of pairs, in NumPy and float64."""
    t = np.concatenate([z, z_other], 1).astype(np.float64)
    layers = [variables["params"][name]["dense"] for name in ("dense1", "dense2", "out")]
    for i, layer in enumerate(layers):
        t = t @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)
        t = np.maximum(t, 0) if i < 2 else t
    return t[:, 0]


def test_the_estimate_is_donsker_varadhans_bound():
    """Evaluation mode pairs each row with the next."""
    module = Mine("latent", (16, 16))
    features, other = given()
    variables = drawn(module, features)
    z, z_other = np.asarray(features["latent"]), np.asarray(other["latent"])
    marginal = statistics(variables, z, np.roll(z_other, -1, 0))
    expected = statistics(variables, z, z_other).mean() - (logsumexp(marginal) - np.log(B))
    value, after = apply(module, variables, features, other, train=False)
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, after, variables)


def test_a_projection_comes_before_the_layers():
    """A linear map of the pair: the same estimate as with its product in the first layer."""
    module, (features, other) = Mine("latent", (16, 16), projection=3), given()
    variables = drawn(module, features)
    params = variables["params"]
    assert params["projection"]["dense"]["kernel"].shape == (2 * K, 3)
    assert params["dense1"]["dense"]["kernel"].shape == (3, 16)
    first, second = (params[name]["dense"] for name in ("projection", "dense1"))
    merged = {"kernel": first["kernel"] @ second["kernel"], "bias": first["bias"] @ second["kernel"] + second["bias"]}
    plain = {**{name: params[name] for name in ("dense2", "out")}, "dense1": {"dense": merged}}
    expected, _ = apply(Mine("latent", (16, 16)), {**variables, "params": plain}, features, other, train=False)
    got, _ = apply(module, variables, features, other, train=False)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_marginal_pairs_are_one_cycle_and_follow_the_key():
    """No sample is paired with itself, and every sample is a partner once."""
    for n in (1, 2, 7):
        cycle, i, seen = np.asarray(jax.jit(random_cycle, static_argnums=1)(jax.random.key(n), n)), 0, []
        for _ in range(n):
            seen, i = [*seen, i], cycle[i]
        assert sorted(seen) == list(range(n)) and i == 0
    module = Mine("latent", (16,))
    features, other = given()
    variables = start(module, features)
    values = [float(apply(module, variables, features, other, key)[0]) for key in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_the_gradient_divides_by_the_moving_average():
    """The bias of the last layer moves T alike everywhere: its gradient is 1 − E[e^T]/M, 0 without the correction."""
    module = Mine("latent", (16,))
    features, other = given()
    variables = start(module, features)
    variables["batch_stats"] = {"log_average": jnp.float32(0.7), "count": jnp.float32(1000)}

    def value(params):
        return apply(module, {**variables, "params": params}, features, other)

    (value, after), gradient = jax.value_and_grad(value, has_aux=True)(variables["params"])
    z, z_other = np.asarray(features["latent"]), np.asarray(other["latent"])
    hidden = {**variables["params"], "dense2": {"dense": {"kernel": np.eye(16), "bias": np.zeros(16)}}}
    log_mean = statistics({"params": hidden}, z, z_other).mean() - float(value)
    average = 0.99 * np.exp(0.7) + 0.01 * np.exp(log_mean)
    np.testing.assert_allclose(after["batch_stats"]["log_average"], np.log(average), rtol=1e-4)
    bias = gradient["out"]["dense"]["bias"][0]
    np.testing.assert_allclose(bias, 1 - np.exp(log_mean) / average, rtol=1e-4)
    assert abs(bias) > 0.1


def test_the_average_starts_as_the_plain_mean_of_the_batches():
    """And initialising a state counts no batch."""
    module = Mine("latent", (16,))
    features, other = given()
    variables = start(module, features)
    assert variables["batch_stats"] == {"log_average": 0.0, "count": 0.0}
    batches = [apply(module, variables, features, other, key)[1]["batch_stats"] for key in range(3)]
    for key in range(3):
        _, variables = apply(module, variables, features, other, key)
    means = np.exp([stats["log_average"] for stats in batches])
    np.testing.assert_allclose(np.exp(variables["batch_stats"]["log_average"]), means.mean(), rtol=1e-5)
    assert variables["batch_stats"]["count"] == 3


def test_the_estimate_approaches_the_information_of_gaussians():
    """ρ = 0.8 in two dimensions: 1.022 nats; and about none where z and z' are independent."""
    module, optimizer = Mine("latent", (64, 64)), optax.adam(3e-3)

    def trained(rho):
        variables = start(module, pairs(jax.random.key(0), rho)[0])

        def step(carry, key):
            variables, state = carry

            def loss(params):
                value, after = apply(module, {**variables, "params": params}, *pairs(key, rho, 512), key)
                return -value, after

            gradient, after = jax.grad(loss, has_aux=True)(variables["params"])
            updates, state = optimizer.update(gradient, state)
            return ({**after, "params": optax.apply_updates(variables["params"], updates)}, state), ()

        keys = jax.random.split(jax.random.key(2), 300)
        (variables, _), _ = jax.lax.scan(step, (variables, optimizer.init(variables["params"])), keys)
        return apply(module, variables, *pairs(jax.random.key(3), rho, 8192), train=False)[0]

    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes a float with its integer count
        known, independent = jax.jit(jax.vmap(trained))(jnp.asarray([0.8, 0.0]))
    np.testing.assert_allclose(known, -np.log(1 - 0.64), atol=0.1)
    np.testing.assert_allclose(independent, 0.0, atol=0.1)


def test_large_statistics_stay_finite():
    """e^T would overflow; its logarithm does not."""
    module = Mine("latent", (16,))
    features, other = ({"latent": np.float32(1e4) * taps["latent"]} for taps in given())
    variables = start(module, features)

    def value(params):
        return apply(module, {**variables, "params": params}, features, other)

    (value, after), gradient = jax.value_and_grad(value, has_aux=True)(variables["params"])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((value, after, gradient)))
