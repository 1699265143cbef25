"""Which class an attack makes of each: the counts by hand, and the command."""

import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibjax.analysis import commands, tendency
from ibjax.attacks.pgd import pgd
from ibjax.devices import cluster
from ibjax.errors import InputError
from ibjax.evaluation import evaluate, scoring
from ibjax.net import linen_net, to_float
from ibjax.runs import run


@pytest.fixture
def workdir(digits_run, tmp_path):
    """A copy of it, which records are written into."""
    return Path(shutil.copytree(digits_run, tmp_path / "run", ignore=shutil.ignore_patterns(".lock")))


def test_counts_and_order():
    labels, predictions = np.array([0, 0, 0, 0, 1, 1, 2, 2]), np.array([1, 2, 1, 0, 0, 0, 2, 2])
    table = tendency.counts(labels, predictions, 3)
    np.testing.assert_array_equal(table, [[1, 2, 1], [2, 0, 0], [0, 0, 2]])
    assert tendency.ranked(table, 2) == [[1, 2], [0], []]  # never the true class, nor one it is never taken for
    assert tendency.ranked(table, 1) == [[1], [0], []]
    assert tendency.ranked(np.ones((3, 3), int), 4) == [[1, 2], [0, 2], [0, 1]]


@pytest.mark.usefixtures("rolled")
def test_the_record_counts_the_attacked_images(workdir, monkeypatch):
    """Of a network whose predictions differ, and differ under attack; the attack by hand."""
    trained, rng = run.load(workdir), np.random.default_rng(0)
    params = jax.tree.map(
        lambda w: np.asarray(w) + rng.standard_normal(w.shape, np.float32), trained.variables["params"]
    )
    trained = trained._replace(variables={**trained.variables, "params": params})
    monkeypatch.setattr(run, "load", lambda *_: trained)
    record = tendency.evaluate(workdir, attack="pgd-2")

    split = run.test_split(trained)
    y, predict = split.labels, linen_net(run.in_float32(trained.model)).predict
    attack = pgd(eps=record["eps"], step_size=record["step_size"], steps=2)

    @jax.jit
    def predictions(images):
        x, network = to_float(images), lambda x: predict(trained.variables, x)[0]
        key = jax.random.fold_in(jax.random.key(trained.config.seed), scoring._EVALUATION)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(y)))
        return [network(seen).argmax(1) for seen in (x, attack(keys, network, x, y))]

    before, after = map(np.asarray, predictions(split.images))
    assert len(set(after)) > 1 and np.any(before != after)
    np.testing.assert_array_equal(record["counts"], tendency.counts(y, after, 10))


def test_it_is_run_from_the_command_line(workdir, capsys, monkeypatch):
    argv = ["tendency", f"--workdir={workdir}", "--attack=pgd-2", "--names=a,b,c,d,e,f,g,h,i,j"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(cluster, "initialize", lambda: None)  # it must come before all of JAX
    with pytest.raises(SystemExit, match="0"):
        tendency.main()
    printed = capsys.readouterr()
    assert f"written: {workdir / 'tendency/best.pgd-2.json'}" in printed.err
    shown = printed.out.splitlines()
    record = json.loads((workdir / "tendency/best.pgd-2.json").read_text())
    table, split = np.array(record["counts"]), run.test_split(run.load(workdir))
    np.testing.assert_array_equal(table.sum(1), np.bincount(split.labels, minlength=10))
    right = np.asarray(run.load(workdir).logits_fn(to_float(jnp.asarray(split.images)))).argmax(1) == split.labels
    judged = evaluate.evaluate(workdir, attacks=("pgd-2",))[0]["robust_acc"] * 0.16  # images
    assert table.trace() >= judged - 0.01 >= table.trace() - (~right).sum() - 0.02
    row = next(line for line in shown if line.startswith("| a |"))
    first = tendency.ranked(table, 4)[0]
    assert row.split(" | ")[1] == str(table[0, 0])
    if first:
        assert row.split(" | ")[2].strip(" |") == f"{'abcdefghij'[first[0]]} {table[0, first[0]]}"


def test_names_are_as_many_as_classes():
    with pytest.raises(InputError, match="3 names; the data has 2 classes"):
        commands.class_names(["a", "b", "c"], {"num_classes": 2})
    facts = {"num_classes": 2, "classes": ["cat", "dog"]}
    assert commands.class_names(None, facts) == ["cat", "dog"]  # as the data has them
    assert commands.class_names(["a", "b"], facts) == ["a", "b"]
    assert commands.class_names(None, {"num_classes": 2}) == ["0", "1"]


@pytest.mark.parametrize("both", [True, False])
def test_a_tendency_both_ways_is_named(both):
    table = [[0, 5, 1], [5, 0, 1], [3, 1, 0]] if both else [[0, 5, 1], [1, 0, 5], [5, 1, 0]]
    record = dict(title="t", dataset="d", n=1, attack="pgd-2", norm="linf", eps="8/255", counts=table)
    assert list(tendency.lines(record))[-1] == ("both ways: 0 – 1" if both else "both ways: none")
