"""FAB: its projections against solvers, its distances against closed-form margins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from ibjax.attacks import geometry
from ibjax.attacks.fab import fab, iterative_fab, step_onto_hyperplane
from ibjax.errors import InputError

RNG = np.random.default_rng(0)
NORMS = ("linf", "l2", "l1")
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}


def solved(x, w, above, norm):
    """The length of the shortest step, by a linear programme (l_inf, l1) or by SLSQP (l2); inf where there is none."""
    n = len(x)
    bounds = [(-value, 1 - value) for value in x]
    if norm == "l2":
        plane = dict(type="eq", fun=lambda d: w @ d + above)
        if np.sum(np.where(w * np.sign(above) > 0, x, 1 - x) * abs(w)) < abs(above):
            return np.inf
        found = optimize.minimize(lambda d: d @ d, -above * w / (w @ w), bounds=bounds, constraints=plane,
                                  method="SLSQP", tol=1e-14, options=dict(maxiter=500))  # fmt: skip
        assert found.success or found.status in (8, 9)  # line search or iterations have reached their precision
        return np.sqrt(found.fun)
    if norm == "linf":  # variables d, t: minimise t with |d_i| <= t
        bound = np.block([[np.eye(n), -np.ones((n, 1))], [-np.eye(n), -np.ones((n, 1))]])
        found = optimize.linprog(np.r_[np.zeros(n), 1], bound, np.zeros(2 * n), np.r_[w, 0][None], [-above],
                                 bounds=[*bounds, (0, None)])  # fmt: skip
    else:  # d = p - q
        found = optimize.linprog(np.ones(2 * n), None, None, np.r_[w, -w][None], [-above],
                                 bounds=[(0, 1 - v) for v in x] + [(0, v) for v in x])  # fmt: skip
    return found.fun if found.status == 0 else np.inf


@pytest.mark.parametrize("norm", NORMS)
def test_steps_onto_the_hyperplane_are_those_of_a_solver(norm):
    """Shortest, on the hyperplane, inside the box; the farthest corner where the hyperplane misses the box."""
    cases, rng = 60, np.random.default_rng(0)
    x = rng.uniform(size=(cases, 8))
    x[::3, :3] = rng.integers(0, 2, (len(x[::3]), 3))  # pixels at their walls
    w = rng.normal(size=(cases, 8)) * 10.0 ** rng.integers(-12, 3, (cases, 1))
    w[::4, 5:] = 0
    above = np.sum(w * (x - rng.uniform(size=x.shape)), 1) * rng.choice([1, 4], cases)
    image = lambda a: np.float32(a).reshape(cases, 2, 2, 2)  # noqa: E731
    step = jax.jit(step_onto_hyperplane, static_argnums=3)
    d = np.asarray(step(image(x), image(w), np.float32(above), norm), np.float64).reshape(cases, 8)
    assert np.all((x + d >= -1e-6) & (x + d <= 1 + 1e-6))
    lengths = np.linalg.norm(d, ORDER[norm], axis=1)
    missed = 0
    for i in range(cases):
        length, scale = solved(x[i], w[i] / abs(w[i]).max(), above[i] / abs(w[i]).max(), norm), abs(w[i]).max()
        if np.isinf(length):
            corner = np.where(w[i] * np.sign(above[i]) > 0, -x[i], 1 - x[i]) * (w[i] != 0)
            np.testing.assert_allclose(d[i], corner, atol=1e-6)
            missed += 1
            continue
        assert abs(w[i] @ d[i] + above[i]) < 1e-5 * scale
        assert lengths[i] == pytest.approx(length, abs=2e-5)
    assert 3 < missed < cases - 10


def test_a_flat_hyperplane_moves_nothing():
    x = np.full((1, 2, 2, 1), 0.5, np.float32)
    steps = jax.jit(lambda x, w: [step_onto_hyperplane(x, w, jnp.ones(1), norm) for norm in NORMS])(x, 0 * x)
    for step in steps:
        np.testing.assert_array_equal(step, 0)


N, CLASSES = 10, 4
WEIGHTS = np.float32(RNG.normal(size=(48, CLASSES)))
X = np.float32(RNG.uniform(0.3, 0.7, size=(N, 4, 4, 3)))  # no wall within reach
OTHERS = np.argsort(-(X.reshape(N, -1) @ WEIGHTS), axis=1)
Y, OTHERS = OTHERS[:, 0].astype(np.int32), OTHERS[:, 1:].astype(np.int32)
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}


def linear(x):
    return jnp.matmul(x.reshape(x.shape[0], -1), WEIGHTS, precision="highest")  # its margins are compared to 1e-4


def margins(norm):
    """min_k (z_y − z_k) / ||w_y − w_k||_q of each image, in float64."""
    w = np.float64(WEIGHTS)
    z = np.float64(X).reshape(N, -1) @ w
    lengths = np.linalg.norm(w[:, Y][:, :, None] - w[:, None, :], DUAL[norm], axis=0)
    return np.min(np.where(np.arange(CLASSES) == Y[:, None], np.inf, (z[np.arange(N), Y][:, None] - z)) /
                  np.maximum(lengths, 1e-12), 1)  # fmt: skip


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targets", [0, 9])
def test_on_a_linear_network_it_finds_the_margin(norm, targets):
    attack = iterative_fab(norm, 7.9 if norm == "l2" else 0.9, 20, targets=targets)

    @jax.jit
    def nearest(x, other):
        state = attack.init(jax.random.split(jax.random.key(0), N), 0, x, Y)
        return jax.lax.fori_loop(0, 20, lambda i, state: attack.step(i, linear, x, Y, other, state), state).nearest

    best = np.min([nearest(X, other) for other in (OTHERS.T if targets else OTHERS.T[:1])], axis=0)
    # overstepping by 1.05 from 0.9 of the way ends at 1.005; l1 has many shortest steps and settles slower
    assert np.all(best >= margins(norm) * 0.9999)
    assert np.all(best <= margins(norm) * (1.07 if norm == "l1" else 1.006))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("options", [dict(targets=2, restarts=2), dict()])
def test_guarantees(norm, options):
    """x_adv lies in ball and box; what is farther than eps, or was wrong, is unchanged; no image sees another."""
    margin = margins(norm)
    eps = float(np.sort(margin)[N // 2] * 1.1)
    y = np.where(np.arange(N) < 2, (Y + 1) % CLASSES, Y)
    attack = jax.jit(fab(norm=norm, eps=eps, steps=20, **options), static_argnums=1)
    keys = jax.random.split(jax.random.key(0), N)
    x_adv = np.asarray(attack(keys, linear, X, y))
    assert np.linalg.norm(np.float64(x_adv - X).reshape(N, -1), ORDER[norm], axis=1).max() <= eps + 1e-6
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    changed = np.any(x_adv != X, axis=(1, 2, 3))
    reachable = np.where(np.arange(N) < 2, np.inf, margin)
    assert np.all(changed[reachable < eps * 0.93]) and not np.any(changed[reachable > eps])
    others = X[::-1].copy()
    others[::2] = 0.5  # half of the batch are other images
    turned = np.asarray(attack(keys[::-1], linear, others, y[::-1]))
    np.testing.assert_allclose(turned[1::2], x_adv[::-1][1::2], atol=1e-5)


def test_a_threshold_replaces_a_sort():
    """The k-th smallest number exactly, with equal ones and zeros among them."""
    x = np.round(np.abs(np.random.default_rng(0).normal(size=(5, 3, 3, 2))), 1).astype(np.float32)
    wanted = np.sort(x.reshape(5, -1), axis=1)

    @jax.jit
    def smallest(k):
        return geometry.largest_threshold(lambda t: jnp.sum(x < t, (1, 2, 3), keepdims=True) <= k, x)[:, 0, 0, 0]

    for k in range(18):
        np.testing.assert_array_equal(smallest(k), wanted[:, k])


def test_bad_arguments_are_named():
    for options, words in ((dict(norm="l3"), "norm 'l3'"), (dict(eps=8), "8/255"), (dict(steps=0), "steps=0")):
        with pytest.raises(InputError, match=words):
            fab(**options)
