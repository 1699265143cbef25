"""Square: schedule and bumps by hand, random search that never goes back, draws that are each image's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibjax.attacks import geometry
from ibjax.attacks.square import bump, halvings, iterative_square, side_lengths, square
from ibjax.errors import InputError

RNG = np.random.default_rng(0)
N, CLASSES = 9, 4
X = np.float32(RNG.uniform(size=(N, 10, 10, 3)))
WEIGHTS = np.float32(RNG.normal(size=(300, CLASSES)))
EPS = {"linf": 0.03, "l2": 0.5, "l1": 4.0}


def linear(x):
    return x.reshape(x.shape[0], -1) @ WEIGHTS


Y = linear(X).argmax(1).astype(np.int32)


distance = jax.jit(geometry.distance, static_argnums=2)


def schedule(queries=5000, norm="linf", rescale=False, image=(32, 32)):
    return side_lengths(0.8 / 2 ** halvings(queries, rescale), image, norm)


def test_sides_shrink_as_the_paper_has_them():
    """round(√(0.8·1024 / {1, 2, 4, 8, 16, 32, 64, 128})) = 29, 20, 14, 10, 7, 5, 4, 3 after queries 10, 50, 200 …"""
    sides = schedule()
    wanted = {
        0: 29,
        10: 29,
        11: 20,
        50: 20,
        51: 14,
        200: 14,
        201: 10,
        500: 10,
        501: 7,
        1001: 5,
        2001: 4,
        4001: 3,
        4999: 3,
    }
    assert {i: int(sides[i]) for i in wanted} == wanted
    assert list(schedule(norm="l2")[[0, 11, 51, 201, 501, 1001, 2001, 4001]]) == [29, 21, 15, 11, 7, 5, 5, 3]
    rescaled = schedule(1000, rescale=True)  # query 2 is the 20th of 10,000
    assert [int(rescaled[i]) for i in (1, 2, 5, 6, 999)] == [29, 20, 20, 14, 1]


def test_sides_never_exceed_the_image():
    assert schedule(image=(8, 3)).max() == 3 and schedule(norm="l2", image=(8, 4)).max() == 4


def test_a_bump_is_two_pyramids_of_opposite_sign():
    """Side 3, by hand: one row, and two of the other sign; the rings weigh 1 and 1/4, in l1 1 and 1/16."""
    for norm, middle in (("l2", 5), ("l1", 17)):
        eta = bump(3, norm)
        # a pyramid of 1×3: the middle pixel is in rings 1 and 2, the outer ones in ring 2 only
        np.testing.assert_allclose(eta[0] / eta[0, 0], [1, middle, 1], rtol=1e-5)
        # of 2×3: its middle is (1, 1); ring 2 holds all of it
        np.testing.assert_allclose(eta[1:] / eta[1, 0], [[1, 1, 1], [1, middle, 1]], rtol=1e-5)
    for norm, power in (("l2", 2), ("l1", 1)):
        for side in (3, 5, 7, 29):
            eta, half = bump(side, norm), side // 2
            np.testing.assert_allclose(np.sum(np.abs(eta) ** power), 1, rtol=1e-5)
            np.testing.assert_allclose(np.sum(np.abs(eta[:half]) ** power), 0.5, rtol=1e-5)
            assert np.all(eta[:half] > 0) and np.all(eta[half:] < 0)


def test_in_l1_new_and_old_mass_weigh_the_same():
    """All mass is in one pixel, where the bump's is e: 1 + e of 2, or 1 − e of 2 − 2e, are there afterwards.

    A bump of l2 length 1 would have more mass than the old perturbation, and bury what was found.
    """
    x, y = np.full((200, 9, 9, 1), 0.5, np.float32), np.zeros(200, np.int32)
    attack, in_one = iterative_square("l1", 0.4, p_init=0.12), x.copy()
    in_one[:, 4, 4] += np.float32(0.4)

    @jax.jit
    def second(key):
        start = attack.init(jax.random.split(key, len(x)), 0, x, y)
        state = start._replace(x_best=jnp.asarray(in_one), margin=jnp.full(len(x), 2.0))
        return attack.step(1, liked, x, y, y, state).x_best

    delta = np.abs(np.asarray(second(jax.random.key(0))) - x)[..., 0]
    np.testing.assert_allclose(delta.sum((1, 2)), 0.4, rtol=1e-4)
    beside = 1 - delta[:, 4, 4] / delta.sum((1, 2))
    mixed = (beside > 1e-3) & (beside < 1 - 1e-3)  # elsewhere the first square does not hold the pixel
    shares = [0.5, *(1 - np.unique(np.abs(bump(3, "l1")))) / 2]
    assert 10 < mixed.sum() < 100
    np.testing.assert_allclose(np.min(np.abs(beside[mixed][:, None] - np.array(shares)), axis=1), 0, atol=1e-4)


def started(attack, keys, x, y):
    """The state before the first step."""
    return jax.jit(lambda keys: attack.init(keys, 0, x, y))(keys)


def run(attack, steps, keys=None, x=X, y=Y):
    keys = jax.random.split(jax.random.key(2), len(x)) if keys is None else keys
    state, states = started(attack, keys, x, y), []
    step = jax.jit(lambda i, state: attack.step(i, linear, x, y, y, state))
    for i in range(steps):
        state = step(i, state)
        states.append(state)
    return states


def test_it_starts_from_stripes():
    attack = iterative_square("linf", 0.03)
    x = np.full_like(X, 0.5)
    start = jax.jit(lambda keys: attack.init(keys, 0, x, Y))(jax.random.split(jax.random.key(0), N))
    delta = np.asarray(start.x_best) - x
    np.testing.assert_allclose(np.abs(delta), 0.03, rtol=1e-4)
    np.testing.assert_array_equal(delta, np.broadcast_to(delta[:, :1], delta.shape))  # one sign per column
    assert 0.3 < np.mean(delta > 0) < 0.7 and len(np.unique(np.sign(delta[:, 0]).reshape(N, -1), axis=0)) == N


def liked(x):
    """Logits that put every proposal at a margin of 1."""
    return jnp.tile(jnp.array([[1.0, 0, 0, 0]]), (len(x), 1))


def test_a_query_changes_one_square_to_the_walls_of_the_ball():
    """Of the schedule's side, one sign per channel, never at the last row or column, images each at their own place."""
    x, y = np.full_like(X, 0.5), 0 * Y
    attack = iterative_square("linf", 0.03, p_init=0.2)
    sides = side_lengths(0.2 / 2 ** halvings(5000), (10, 10), "linf")
    assert {4, 3, 2} <= set(sides[:80])
    step = jax.jit(lambda i, s: attack.step(i, liked, x, y, y, s))
    start = started(attack, jax.random.split(jax.random.key(0), N), x, y)
    before, corners = step(0, start), set()
    for i in range(1, 80, 4):
        after = step(i, before._replace(margin=np.full(N, 2, np.float32)))  # so that the proposal is taken
        delta = np.asarray(after.x_best) - x
        changed = np.asarray(after.x_best) != np.asarray(before.x_best)
        np.testing.assert_allclose(np.abs(delta), 0.03, rtol=1e-4)
        for n in np.nonzero(changed.any((1, 2, 3)))[0]:
            rows, columns, channels = np.nonzero(changed[n])
            assert max(np.ptp(rows), np.ptp(columns)) < sides[i - 1] and max(rows.max(), columns.max()) < 9
            for channel in np.unique(channels):
                assert len(np.unique(np.sign(delta[n, :, :, channel][changed[n, :, :, channel]]))) == 1
            corners.add((rows.min(), columns.min()))
        before = after
    assert len(corners) > 20


@pytest.mark.parametrize("norm", list(EPS))
def test_the_margin_never_rises_and_the_search_ends_at_zero(norm):
    states = run(iterative_square(norm, EPS[norm], 100), 40)
    margins = np.array([np.asarray(state.margin) for state in states])
    assert np.all(np.diff(margins, axis=0) <= 0)
    assert np.any(margins[-1] <= 0) and margins[-1].mean() < margins[0].mean()
    first = np.argmax(margins <= 0, axis=0)
    for n in np.nonzero(margins[-1] <= 0)[0]:
        np.testing.assert_array_equal(np.asarray(states[-1].x_best)[n], np.asarray(states[first[n]].x_best)[n])
    for state in states[::20]:
        logits = linear(np.asarray(state.x_best))
        others = np.where(np.arange(CLASSES) == Y[:, None], -np.inf, logits).max(1)
        np.testing.assert_allclose(logits[np.arange(N), Y] - others, state.margin, atol=1e-5)
        assert distance(state.x_best, X, norm).max() <= EPS[norm] + 1e-6


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_mass_moves_into_the_first_square(norm):
    """Where no wall is near, the whole ball is used, and the second square is emptied."""
    x = np.full_like(X, 0.5)
    attack = iterative_square(norm, EPS[norm], p_init=0.1)
    state = started(attack, jax.random.split(jax.random.key(0), N), x, Y)
    step = jax.jit(lambda i, state: attack.step(i, liked, x, 0 * Y, Y, state))
    np.testing.assert_allclose(distance(state.x_best, x, norm), EPS[norm], rtol=1e-4)
    state = step(0, state)
    after = step(1, state._replace(margin=np.full(N, 2, np.float32)))
    np.testing.assert_allclose(distance(after.x_best, x, norm), EPS[norm], rtol=1e-4)
    before, now = (np.asarray(s.x_best) - x for s in (state, after))
    assert np.all(np.sum((now == 0) & (before != 0), axis=(1, 2, 3)) > 0)  # the second square
    kept = np.abs(now - before) < 1e-6 if norm == "l1" else np.abs(now / np.where(before == 0, 1, before) - 1) < 1e-4
    assert np.mean(kept) > 0.4


@pytest.mark.parametrize("norm", list(EPS))
def test_guarantees(norm):
    """x_adv lies in ball and box; wrong and unbroken images come back unchanged; no image sees another."""
    y = np.where(np.arange(N) < 2, (Y + 1) % CLASSES, Y)
    attack = jax.jit(square(norm=norm, eps=EPS[norm], queries=40, restarts=2), static_argnums=1)
    keys = jax.random.split(jax.random.key(0), N)
    x_adv = np.asarray(attack(keys, linear, X, y))
    assert distance(x_adv, X, norm).max() <= EPS[norm] + 1e-6
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    broken = (linear(x_adv).argmax(1) != y) & (np.arange(N) >= 2)
    np.testing.assert_array_equal(np.any(x_adv != X, axis=(1, 2, 3)), broken)
    assert 0 < broken.sum() < N - 2
    others = X[::-1].copy()
    others[::2] = 0.5  # half of the batch are other images
    turned = np.asarray(attack(keys[::-1], linear, others, y[::-1]))
    np.testing.assert_allclose(turned[1::2], x_adv[::-1][1::2], atol=1e-5)


SIZES = [("linf", (1, 1, 1)), ("linf", (2, 3, 1)), ("l2", (3, 4, 1)), ("l1", (28, 21, 1))]


@pytest.mark.parametrize("norm, shape", SIZES)
def test_images_of_any_size(norm, shape):
    x = np.full((2, *shape), 0.5, np.float32)
    attack = jax.jit(square(norm=norm, eps=0.3, queries=20), static_argnums=1)
    x_adv = np.asarray(attack(jax.random.key(0), halving, x, np.ones(2, np.int32)))
    assert x_adv.shape == x.shape and x_adv.min() >= 0 and x_adv.max() <= 1
    assert distance(x_adv, x, norm).max() <= 0.3 + 1e-6
    dark = x_adv.reshape(2, -1)[:, 0] <= 0.5001  # of class 1
    assert np.all(np.any(x_adv != x, axis=(1, 2, 3)) == ~dark)  # broken, or as it was
    assert np.any(x_adv != x) or norm == "l1"  # there, 20 queries do not come upon the one pixel that matters


def halving(x):
    """Class 1 where the first pixel is dark enough."""
    first = x.reshape(len(x), -1)[:, 0]
    return jnp.stack([first, jnp.full_like(first, 0.5001)], axis=1)


def test_bad_arguments_are_named():
    for options, words in ((dict(norm="l3"), "norm 'l3'"), (dict(eps=8), "8/255"), (dict(queries=0), "queries=0"),
                           (dict(p_init=1.5), "p_init")):  # fmt: skip
        with pytest.raises(InputError, match=words):
            square(**options)
