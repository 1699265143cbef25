"""The runner: which programs a plan compiles, and that how it runs them changes no image."""

import jax
import jax.numpy as jnp
import numpy as np

from ibjax.attacks.apgd import iterative_apgd
from ibjax.attacks.fab import iterative_fab
from ibjax.attacks.runner import Runner

RNG = np.random.default_rng(0)
N, CLASSES, EPS = 64, 5, 0.02
X = np.float32(RNG.uniform(0.25, 0.75, size=(N, 4, 4, 3)))
WEIGHTS = np.float32(RNG.normal(size=(48, CLASSES)))
OTHERS = np.argsort(-(X.reshape(N, -1) @ WEIGHTS), axis=1)
Y, OTHERS = OTHERS[:, 0], OTHERS[:, 1:]
KEY = jax.random.key(0)


def curved(x):
    z = x.reshape(x.shape[0], -1) @ jnp.asarray(WEIGHTS)
    return z + jnp.sin(3 * z[:, ::-1])


def run(plan, batch_size=64, todo=None):
    """(runner, flags (N,) after each attack, images) of a plan {name: attack}."""
    runner = Runner(KEY, curved, X, Y, norm="linf", eps=EPS, batch_size=batch_size)
    broken, x_adv, after = np.zeros(N, bool), X.copy(), {}
    for name, attack in plan.items():
        left = np.nonzero(~broken)[0] if todo is None else todo
        for _ in runner.run(name, attack, left, OTHERS, broken, x_adv):
            pass
        after[name] = ~broken
    return runner, after, x_adv


def test_attacks_that_differ_in_their_loss_or_name_are_one_program():
    plan = {
        "apgd-ce": iterative_apgd("ce", "linf", EPS, 3),
        "apgd-t": iterative_apgd("dlr_targeted", "linf", EPS, 3),
        "again": iterative_apgd("ce", "linf", EPS, 3),
    }
    runner, _, _ = run(plan, todo=np.arange(N))
    of_apgd = {key for key in runner.programs if key[1] is plan["apgd-ce"].step}
    assert of_apgd == set(runner.programs) and len(runner.programs) <= len(runner.sizes)
    assert len({(key[:-1]) for key in runner.programs}) == 1
    runner, _, _ = run({**plan, "fab": iterative_fab("linf", EPS, 3, targets=2)}, todo=np.arange(N))
    assert len({(key[:-1]) for key in runner.programs}) == 2


def test_a_name_draws_for_itself_although_it_shares_its_program():
    few = iterative_apgd("ce", "linf", EPS, 1)
    images = [run({name: few}, todo=np.arange(N))[2] for name in ("apgd-ce", "apgd-ce", "another")]
    np.testing.assert_array_equal(images[0], images[1])
    assert np.any(images[0] != images[2])
