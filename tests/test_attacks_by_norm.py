"""Every attack in every norm that it offers: as strong as an independent implementation with as many steps or queries,
and on a linear network as strong as its margin says.

The oracles' figures are in results/attacks-by-norm.json, which benchmarks/attacks_by_norm.py makes; it needs
fra31/auto-attack and torchattacks, which these tests do not.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import attacks_by_norm as by_norm  # noqa: E402

from ibjax.attacks import geometry  # noqa: E402
from ibjax.attacks.apgd import apgd  # noqa: E402
from ibjax.attacks.cw import cw  # noqa: E402
from ibjax.attacks.deepfool import deepfool  # noqa: E402
from ibjax.attacks.eot import eot  # noqa: E402
from ibjax.attacks.fab import fab  # noqa: E402
from ibjax.attacks.fgsm import fgsm  # noqa: E402
from ibjax.attacks.mim import mim  # noqa: E402
from ibjax.attacks.nifgsm import nifgsm  # noqa: E402
from ibjax.attacks.noise import noise  # noqa: E402
from ibjax.attacks.pgd import pgd  # noqa: E402
from ibjax.attacks.sparse_rs import sparse_rs  # noqa: E402
from ibjax.attacks.spsa import spsa  # noqa: E402
from ibjax.attacks.square import square  # noqa: E402
from ibjax.attacks.targeted import targeted  # noqa: E402
from ibjax.errors import InputError  # noqa: E402

ROWS = {row.name: row for row in by_norm.rows()}
RECORDS = json.loads(by_norm.RESULTS.read_text())["records"]
THEIRS = {record["name"]: float(np.mean(record["theirs"])) for record in RECORDS}


@pytest.mark.parametrize("name", ROWS)
def test_robust_accuracy_is_within_two_points_of_the_oracles(name):
    row = ROWS[name]
    runs = min(row.runs, 1 if row.attack == "square" else 5)  # 150 queries take long, and its runs differ by 0.5 points
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes a float with its integer count
        ours = np.mean(by_norm.run_ours(row._replace(runs=runs)))
    assert 5 < THEIRS[name] < 97  # elsewhere strength would not show
    assert ours == pytest.approx(THEIRS[name], abs=2.0)


def test_every_attack_in_every_norm_that_it_offers_is_in_the_table():
    covered = {(row.attack, row.norm) for row in ROWS.values()}
    for attack in (fgsm, pgd, targeted, mim, nifgsm, spsa, apgd, fab, deepfool, square, sparse_rs, noise):
        for norm in geometry.ALL_NORMS:
            try:
                attack(norm=norm, eps=5 if norm == "l0" else 0.1)
            except InputError:
                continue
            assert (attack.__name__, norm) in covered
    assert {(name, "linf") for name in ("ara", "bim", "eot(pgd)", "transfer(pgd)", "apgd-t", "fab-t")} < covered
    assert ("cw", "l2") in covered


def test_the_page_has_the_table_of_the_results():
    assert by_norm.table(RECORDS, runs=True) in (ROOT / "results" / "attacks-by-norm.md").read_text(encoding="utf-8")
    assert "\n<!-- rows: results/attacks-by-norm.md -->\n" in (ROOT / "docs" / "attacks.md").read_text(encoding="utf-8")


# ---- a linear network of two classes: exact margins ------------------------------------------------------------

N, SHAPE = 200, (5, 4, 3)
RNG = np.random.default_rng(1)
X = np.float32(RNG.uniform(0.2, 0.8, size=(N, *SHAPE)))
W = np.float32(RNG.normal(size=(60, 2)))


def linear(x):
    return (x - 0.5).reshape(len(x), -1) @ W


Y = linear(X).argmax(1).astype(np.int32)


def noisy(key, x):
    return linear(x) + x.reshape(len(x), -1) @ (0.3 * jax.random.normal(key, W.shape))


def margins(norm):
    """The length of the shortest step inside the box onto the decision boundary, (N,) in float64.

    Each pixel moves by min(λ · rate, room): rate 1 in l_inf and |w| in l2, with the λ that bisection finds; in l1 the
    steepest pixels go to their walls first. In l0 it is a number of pixels.
    """
    x, rows = X.reshape(N, -1).astype(np.float64), np.arange(N)
    w = (W[:, Y] - W[:, 1 - Y]).T.astype(np.float64)
    gap = np.sum(w * (x - 0.5), axis=1)
    steep, room = np.abs(w), np.where(w > 0, x, 1 - x)
    if norm == "l0":  # the pixels that lower the logit most, all of their channels at their walls
        gains = -np.sort(-(steep * room).reshape(N, -1, SHAPE[-1]).sum(2), axis=1)
        return 1.0 + np.sum(np.cumsum(gains, 1) < gap[:, None], axis=1)
    if norm == "l1":
        order = np.argsort(-steep, axis=1)
        steep, room = (np.take_along_axis(value, order, 1) for value in (steep, room))
        before = np.cumsum(steep * room, 1) - steep * room
        return np.clip((gap[:, None] - before) / steep, 0, room).sum(1)
    rate = steep if norm == "l2" else np.ones_like(steep)
    low, high = np.zeros((N, 1)), np.full((N, 1), 1e3)
    for _ in range(80):
        middle = (low + high) / 2
        short = np.sum(steep * np.minimum(middle * rate, room), 1, keepdims=True) < gap[rows, None]
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    length = np.minimum(high * rate, room)
    return length.max(1) if norm == "linf" else np.sqrt(np.sum(length**2, axis=1))


def exact(norm):
    """name -> attack, for those that reach the margin on a linear network."""
    eps = float(np.median(margins(norm)))
    ball, step = dict(norm=norm, eps=eps), dict(step_size=eps / 5, steps=25, unroll=False)
    found = {
        "apgd-ce": apgd(steps=60, **ball),
        "apgd-margin": apgd(loss="margin", steps=60, **ball),
        "apgd-t": apgd(loss="margin_targeted", steps=60, **ball),
        "fab": fab(steps=15, **ball),
        "fab-t": fab(steps=15, targets=1, **ball),
    }
    if norm != "l1":
        found |= {
            "fgsm": fgsm(**ball),
            "pgd-ce": pgd(**ball, **step),
            "pgd-kl": pgd(loss="kl", **ball, **step),
            "pgd-margin": pgd(loss="margin", restarts=2, **ball, **step),
            "mim": mim(**ball, **step),
            "targeted": targeted(**ball, **step),  # there is one other class
        }
    if norm == "linf":
        found["nifgsm"] = nifgsm(**ball, **step)
    if norm == "l2":
        found["cw"] = cw(steps=600, lr=0.003, eps=eps)
    return found


def robust(attack, network=linear):
    with jax.numpy_dtype_promotion("standard"):
        x_adv = jax.jit(lambda key, x, y: attack(key, network, x, y))(jax.random.key(0), X, Y)
    return linear(np.asarray(x_adv)).argmax(1) == Y


@pytest.mark.parametrize("norm, name", [(norm, name) for norm in geometry.NORMS for name in exact(norm)])
def test_on_a_linear_network_robust_means_that_the_margin_exceeds_eps(norm, name):
    margin, flags = margins(norm), robust(exact(norm)[name])
    eps = np.median(margin)
    assert not np.any(~flags & (margin > eps * 1.001))  # nothing is broken that cannot be
    assert 100 * np.mean(flags & (margin < eps * 0.999)) <= 2


def test_on_a_linear_network_sparse_rs_breaks_nothing_that_cannot_be_and_most_of_the_rest():
    margin, eps = margins("l0"), 1
    flags = robust(sparse_rs(eps=eps, queries=300))
    assert not np.any(~flags & (margin > eps)) and np.any(margin > eps)
    assert np.mean(~flags[margin <= eps]) > 0.8


def blind(norm):
    """(eps, name -> (attack, its network, the share of images that it breaks at least))."""
    eps = float(np.quantile(margins(norm), 0.8))
    ball = dict(norm=norm, eps=eps)
    found = {"square": (square(queries=300, **ball), linear, 0.2)}
    if norm != "l1":
        random = eot(attack=pgd, samples=32, step_size=eps / 5, steps=10, unroll=False, **ball)
        found |= {
            "spsa": (spsa(steps=10, samples=64, lr=eps / 4, **ball), linear, 0.6),
            "uniform": (noise(**ball), linear, 0.0),
            "sign": (noise(kind="sign", **ball), linear, 0.0),
            "eot": (random, noisy, 0.7),
        }
    return eps, found


@pytest.mark.parametrize("norm, name", [(norm, name) for norm in geometry.NORMS for name in blind(norm)[1]])
def test_on_a_linear_network_blind_attacks_break_nothing_that_cannot_be(norm, name):
    """They break part of the others: random squares and noise do not have the direction of w."""
    eps, attacks = blind(norm)
    attack, network, least = attacks[name]
    flags = robust(attack, network)
    assert not np.any(~flags & (margins(norm) > eps * 1.001))
    assert np.mean(~flags) > least
