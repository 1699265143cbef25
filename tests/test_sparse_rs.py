"""Sparse-RS: the schedule by hand, random search that never goes back, draws that are each image's own."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import keys_of

from ibjax import losses
from ibjax.attacks import geometry
from ibjax.attacks.autoattack import autoattack
from ibjax.attacks.sparse_rs import exchanges, iterative_sparse_rs, sparse_rs
from ibjax.errors import InputError

RNG = np.random.default_rng(0)
N, K, CLASSES = 9, 4, 4
X = np.round(RNG.uniform(size=(N, 6, 6, 3)), 1).astype(np.float32)  # some pixels are corners of the cube of colours
WEIGHTS = np.float32(RNG.normal(size=(108, CLASSES)))


def linear(x):
    return (x - 0.5).reshape(x.shape[0], -1) @ WEIGHTS


Y = linear(X).argmax(1).astype(np.int32)
KEYS = keys_of(N)
IN_ORDER = np.arange(N)


@functools.cache
def programs(eps):
    """Of an attack of 40 queries: its start, for images in any order, and its step."""
    attack = iterative_sparse_rs("l0", eps, 40)
    start = jax.jit(lambda order, x, y: attack.init(KEYS[order], 0, x, y))
    return start, jax.jit(lambda i, x, y, state: attack.step(i, linear, x, y, None, state))


def stepped(eps, order=IN_ORDER, images=X):
    """The states of a run on the images in this order, from the start on."""
    (start, step), x, y = programs(eps), images[order], Y[order]
    states = [start(order, x, y)]
    for i in range(40):
        states.append(step(i, x, y, states[-1]))
    return jax.device_get([state._replace(keys=None) for state in states])


def test_the_number_of_exchanged_pixels_shrinks_as_the_paper_has_it():
    """⌊0.3·100 / {1, 2, 4, 5, 6, 8, 10, 12, 15, 20}⌋ after 0, 50, 200 … of 10,000 queries."""
    counts = exchanges(100, 10_000)
    at = [0, 1, 50, 51, 200, 201, 501, 1001, 2001, 4001, 6001, 8001, 9999]
    assert [int(counts[i]) for i in at] == [30, 15, 15, 7, 7, 6, 5, 3, 3, 2, 2, 1, 1]
    assert [int(c) for c in exchanges(100, 1000)[[0, 1, 5, 6, 999]]] == [30, 15, 15, 7, 1]  # query 6 is the 60th
    assert exchanges(2, 50).min() == 1


@pytest.mark.parametrize("eps", [1, 2])
def test_x_adv_differs_from_x_in_at_most_k_pixels_and_the_margin_never_rises(eps):
    states = stepped(eps)
    for before, after in itertools.pairwise(states[1:]):
        assert np.all(np.asarray(after.margin) <= np.asarray(before.margin))
    for state in states:
        moved = np.any(np.asarray(state.x_best != X), axis=-1)
        assert np.all(state.changed.sum((1, 2)) == eps) and not np.any(moved & ~np.asarray(state.changed))
        assert set(np.unique(np.asarray(state.x_best)[moved])) <= {0.0, 1.0}
    margin = jax.jit(lambda x: -losses.margin(linear(x), Y))(states[-1].x_best)
    np.testing.assert_allclose(states[-1].margin, margin, rtol=1e-5)
    first, last = np.asarray(states[1].margin), np.asarray(states[-1].margin)
    assert np.all((last < first) | (first <= 0)) and np.any(first > 0)


def test_each_images_result_is_independent_of_the_others_in_its_batch():
    order = np.array([3, 1, 7, 0, 8, 2, 4, 6, 5])
    images = X.copy()
    images[::2] = 0.5  # the even ones are other images
    one, other, kept = stepped(2)[-1], stepped(2, order, images)[-1], order % 2 == 1
    np.testing.assert_array_equal(one.x_best[order][kept], other.x_best[kept])
    np.testing.assert_array_equal(one.changed[order][kept], other.changed[kept])


def test_autoattack_runs_it_on_its_own_and_nothing_else_in_l0():
    result = autoattack(
        jax.random.key(0), linear, X, Y, norm="l0", eps=K, attacks=["sparse-rs"], options=dict(queries=30)
    )
    assert np.all(geometry.distance(jnp.asarray(result.x_adv), X, "l0") <= K) and result.robust.sum() < N
    with pytest.raises(InputError, match="norm 'l0' is unknown here"):
        autoattack(jax.random.key(0), linear, X, Y, norm="l0", eps=K)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(eps=2.5), "eps=2.5 is no number of pixels"),
        (dict(eps=0), "eps=0 is no number of pixels"),
        (dict(norm="l1", eps=3), "norm 'l1' is unknown here"),
        (dict(eps=3, queries=0), "queries=0"),
        (dict(eps=3, p_init=2), "p_init=2 is not allowed"),
    ],
)
def test_nonsense_is_refused_in_one_line(options, words):
    with pytest.raises(InputError, match=words):
        sparse_rs(**options)


def test_as_many_pixels_as_the_image_has_are_refused():
    with pytest.raises(InputError, match="eps=36 pixels are all of an image of 6×6"):
        jax.jit(lambda x, y: sparse_rs(eps=36)(KEYS, linear, x, y))(X, Y)
