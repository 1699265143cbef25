"""L-BFGS-B against SciPy's, on problems whose minimum lies on the box's faces."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from ibjax.attacks import lbfgsb

RNG = np.random.default_rng(0)
SQUARE = RNG.normal(size=(30, 30))
HESSIAN, LINEAR = SQUARE @ SQUARE.T / 30 + 0.01 * np.eye(30), RNG.normal(size=30)
INNER, OUTER = RNG.normal(size=(20, 40)) / 5, RNG.normal(size=(10, 20))
START, HIDDEN = RNG.uniform(size=40), RNG.uniform(size=40)


def quadratic(x):
    return 0.5 * x @ HESSIAN.astype(x.dtype) @ x - LINEAR.astype(x.dtype) @ x


def rosenbrock(x):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def representation(x):
    """Distance of features to a guide's, as the representation attack minimises it."""
    inner, outer = INNER.astype(x.dtype), OUTER.astype(x.dtype)
    return jnp.sum((outer @ jnp.tanh(inner @ x) - outer @ jnp.tanh(inner @ HIDDEN.astype(x.dtype))) ** 2)


PROBLEMS = {  # function, start, lower, upper
    "quadratic": (quadratic, np.zeros(30), np.full(30, -0.5), np.full(30, 0.7)),
    "rosenbrock": (rosenbrock, np.full(10, -0.5), np.full(10, -1.0), np.full(10, 0.8)),
    "representation": (representation, START, np.maximum(START - 0.1, 0), np.minimum(START + 0.1, 1)),
}


def ours(problem, dtype, steps):
    fun, x, lower, upper = problem
    return program(fun)(*(np.asarray(a, dtype) for a in (x, lower, upper)), steps)


@functools.cache
def program(fun):
    return jax.jit(lambda x, lower, upper, steps: lbfgsb.minimize(fun, x, lower, upper, steps=steps))


def beside_another(problem, steps):
    """In float32, under `vmap` with a second problem: half the box, from a corner of it."""
    fun, *arrays = problem
    x, lower, upper = (np.float32(a) for a in arrays)
    both = [np.stack(pair) for pair in zip((x, lower, upper), (lower, lower, (lower + upper) / 2), strict=True)]
    return [part[0] for part in vmapped(fun)(*both, steps)]


vmapped = functools.cache(lambda fun: jax.jit(jax.vmap(program(fun), (0, 0, 0, None))))


value_and_gradient = functools.cache(lambda fun: jax.jit(jax.value_and_grad(fun)))


def scipys(problem, dtype, steps):
    fun, x, lower, upper = problem

    def both(x):
        value, gradient = value_and_gradient(fun)(np.asarray(x, dtype))
        return float(value), np.asarray(gradient, np.float64)

    options = dict(maxiter=steps, maxcor=10, ftol=0, gtol=0)
    return scipy.optimize.minimize(
        both, x, jac=True, method="L-BFGS-B", bounds=scipy.optimize.Bounds(lower, upper), options=options
    )


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_the_first_iterations_are_scipys(problem):
    """Cauchy point, subspace step and memory: to rounding, until a line search of SciPy's asks for more than ours."""
    with jax.enable_x64(True):
        for steps in (1, 2, 5):
            x, value = ours(problem, jnp.float64, steps)
            expected = scipys(problem, jnp.float64, steps)
            assert expected.nfev == expected.nit + 1 == steps + 1
            np.testing.assert_allclose(x, expected.x, atol=1e-10)
            np.testing.assert_allclose(value, expected.fun, rtol=1e-10)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_the_minimum_is_scipys_in_float32(problem):
    x, value = beside_another(problem, 100)
    with jax.enable_x64(True):
        expected = scipys(problem, jnp.float64, 1000)
    _, start, lower, upper = problem
    np.testing.assert_allclose(value, expected.fun, rtol=1e-5)
    assert np.all((x >= lower.astype(np.float32)) & (x <= upper.astype(np.float32)))
    at_bound = np.isclose(expected.x, lower) | np.isclose(expected.x, upper)
    assert at_bound.any() and not np.allclose(expected.x, start)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_as_good_as_scipy_after_twenty_iterations(problem):
    expected = scipys(problem, jnp.float32, 20).fun
    assert float(beside_another(problem, 20)[1]) <= expected + 0.01 * abs(expected)


def test_vmapped_problems_do_not_disturb_each_other():
    targets = np.float32(RNG.uniform(-2, 2, size=(5, 8)))
    scales = np.float32([1.0, 100.0, 1e-3, 1.0, 1.0])
    zeros, half, ones = (np.full(8, value, np.float32) for value in (0, 0.5, 1))

    def solve(target, scale):
        def fun(x):
            return scale * jnp.sum((x - target) ** 2 + 0.1 * (x - target) ** 4)

        return lbfgsb.minimize(fun, half, zeros, ones, steps=40)[0]

    np.testing.assert_allclose(jax.jit(jax.vmap(solve))(targets, scales), np.clip(targets, 0, 1), atol=1e-3)


def test_what_cannot_be_improved_stays():
    """At a minimum, in a box without room, and where the function is flat or not a number."""
    x, box = jnp.array([0.2, 0.8]), (jnp.zeros(2), jnp.ones(2))
    for fun in (
        lambda x: jnp.sum((x - jnp.array([0.2, 0.8])) ** 2),
        lambda x: 0 * jnp.sum(x),
        lambda x: jnp.log(-x[0]),
    ):
        np.testing.assert_array_equal(lbfgsb.minimize(fun, x, *box, steps=3)[0], x)
    np.testing.assert_array_equal(lbfgsb.minimize(jnp.sum, x, x, x, steps=3)[0], x)


def test_many_problems_at_once_call_no_lapack():
    """A batched call of it waits on XLA's threads for its own parts: on two cores 512 images hung for good."""
    fun, x, lower, upper = (jnp.asarray(a, jnp.float32) if i else a for i, a in enumerate(PROBLEMS["representation"]))

    def one(x):
        return lbfgsb.minimize(fun, x, lower, upper, steps=2)

    program = jax.jit(jax.vmap(one)).lower(jnp.stack([x, x])).as_text()
    assert "lapack" not in program
