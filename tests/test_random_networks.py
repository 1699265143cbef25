"""AutoAttack's version "rand": the number is a mean over fresh draws; that of the authors' code stands beside it."""

import base64
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibjax.attacks import progress
from ibjax.attacks.apgd import iterative_apgd
from ibjax.attacks.autoattack import Drawn, autoattack
from ibjax.data import Split
from ibjax.errors import InputError
from ibjax.evaluation import results, scoring
from ibjax.evaluation.report import self_checks, tables

RNG = np.random.default_rng(0)
N, EPS, SIGMA = 60, 0.05, 1.0
IMAGES = RNG.integers(80, 176, (N, 4, 4, 1), dtype=np.uint8)
X = np.float32(IMAGES) / 255
WEIGHTS = RNG.normal(size=16)
SCORE = (X.reshape(N, -1).astype(np.float64) - 0.5) @ WEIGHTS
Y = (SCORE > 0).astype(np.int64)
FEW = {
    "apgd-ce": iterative_apgd("ce", "linf", EPS, 10, eot=5),
    "again": iterative_apgd("ce", "linf", EPS, 10, eot=5),  # which draws for itself
}


@jax.jit
def noisy(x, keys):
    """Two classes, a linear score with Gaussian noise of size σ in it."""
    score = (x.reshape(len(x), -1) - 0.5) @ jnp.float32(WEIGHTS)
    score = score + SIGMA * jax.vmap(lambda key: jax.random.normal(key))(keys)
    return jnp.stack([-score, score], axis=1)


def expected(distance):
    """mean Φ((|s| − distance)/σ), in percent: where noise is added to a score, how often its sign is right."""
    shares = [0.5 * (1 + math.erf((abs(s) - distance) / SIGMA / math.sqrt(2))) for s in SCORE]
    return 100 * sum(shares) / N


def attack(**options):
    options = dict(version="rand", attacks=FEW, draws=100) | options
    return autoattack(jax.random.key(0), noisy, X, Y, "linf", EPS, **options)


@pytest.fixture(scope="module")
def whole():
    return attack()


def test_the_number_of_rand_is_the_expected_accuracy_at_the_worst_point(whole):
    """In closed form; images that one draw called broken, or wrong as they are, are attacked and counted too."""
    wanted = expected(EPS * np.abs(WEIGHTS).sum())
    assert whole.drawn.robust.shape == whole.drawn.clean.shape == (100, N)
    assert abs(whole.drawn.accuracy - wanted) < 4 * whole.drawn.standard_error < 4
    assert abs(100 * whole.drawn.clean.mean() - expected(0.0)) < 4
    assert expected(0.0) - wanted > 8


def test_the_number_of_the_authors_counts_one_unlucky_draw_as_broken(whole):
    reference = 100 * whole.robust.mean()
    assert reference < whole.drawn.accuracy - 10
    np.testing.assert_array_equal(whole.robust, whole.robust_after["again"])
    assert not np.any(whole.robust & ~whole.robust_after["apgd-ce"])


@pytest.mark.slow
def test_an_attack_alone_has_the_flags_of_the_first_in_a_row_whatever_else_has_been_attacked(whole):
    alone = attack(attacks={"apgd-ce": FEW["apgd-ce"]}, draws=2)
    np.testing.assert_array_equal(alone.robust, whole.robust_after["apgd-ce"])


def test_mean_and_standard_error_are_those_of_the_draws():
    flags = RNG.random((7, 40)) < 0.6
    accuracies = 100 * flags.mean(1)
    drawn = Drawn(flags, flags)
    assert drawn.accuracy == pytest.approx(accuracies.mean())
    assert drawn.standard_error == pytest.approx(accuracies.std(ddof=1) / math.sqrt(7))


def test_draws_do_not_depend_on_the_batch_and_are_not_those_of_the_attack(whole):
    other = attack(batch_size=8)
    assert abs(other.drawn.accuracy - whole.drawn.accuracy) < 0.5
    np.testing.assert_array_equal(other.robust, whole.robust)
    assert np.any(whole.drawn.robust[0] != whole.drawn.robust[1])


def test_interrupted_it_ends_with_the_same_images_and_draws(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "SAVE_SECONDS", 0.0)
    save, count = progress.Progress.save, [0]

    def save_and_stop(self, at_once=True):
        save(self, at_once)
        count[0] += 1
        if count[0] % 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(progress.Progress, "save", save_and_stop)
    for _ in range(9):
        try:
            found = attack(state=tmp_path / "state.npz", batch_size=32)
            break
        except KeyboardInterrupt:
            continue
    assert count[0] > 4
    monkeypatch.setattr(progress.Progress, "save", save)
    straight = attack(batch_size=32)
    np.testing.assert_array_equal(found.x_adv, straight.x_adv)
    jax.tree.map(
        np.testing.assert_array_equal, (found.drawn, found.robust_after), (straight.drawn, straight.robust_after)
    )


def test_fewer_than_two_draws_have_no_standard_error():
    with pytest.raises(InputError, match="draws=1 is not allowed; give at least 2"):
        attack(draws=1)


def test_records_and_tables_have_both_numbers():
    options = dict(version="rand", attacks=["apgd-ce", "apgd-dlr"], draws=3)
    flags, _, more = scoring.auto_attack(noisy, Split(IMAGES, Y), 0, options, norm="linf", eps=EPS, batch_size=64)
    assert more["draws"] == 3 and len(more["robust_acc_of_draws"]) == 3
    assert more["robust_acc"] == pytest.approx(np.mean(more["robust_acc_of_draws"]), abs=1e-3)
    assert scoring.percent(flags.robust) == more["robust_acc_of_draws"][0]
    assert more["reference"]["robust_acc"] == more["robust_after"]["apgd-dlr"] < more["robust_acc"]
    packed = base64.b64encode(np.packbits(flags.robust).tobytes()).decode()
    record = {
        "title": "a run", "attack": "autoattack-rand", "eps": EPS, "norm": "linf", "dataset": "none", "n": N,
        "main": True, "checkpoint": "best", "selected_on": "val", "robust_flags": packed, "max_distance": EPS,
        **more,
    }  # fmt: skip
    results.validate(record)
    text = tables.as_text([record])
    assert f"{more['robust_acc']:.2f} ± {more['standard_error']:.2f}" in text and "mean of 3 draws" in text
    assert "APGD-ce, one draw" in text and f"{more['reference']['robust_acc']:.2f}" in text
    stated = [check for check in self_checks.checks([record]) if check.name.startswith("Percentages")]
    assert [check.status for check in stated] == ["pass"]
