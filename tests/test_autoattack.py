"""AutoAttack: closed-form margins, invariance to batches, devices and interruption, warnings, and what it refuses."""

import functools
import itertools
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from test_checks import one_step

from ibjax.attacks import autoattack, progress
from ibjax.attacks.apgd import iterative_apgd
from ibjax.attacks.fab import iterative_fab
from ibjax.attacks.iterative import UNTARGETED, as_attack
from ibjax.attacks.runner import Runner
from ibjax.attacks.square import iterative_square
from ibjax.devices import cluster
from ibjax.errors import InputError, PreemptedError

RNG = np.random.default_rng(0)
N, CLASSES = 41, 5
X = np.float32(RNG.uniform(0.25, 0.75, size=(N, 4, 4, 3)))
WEIGHTS = RNG.normal(size=(48, CLASSES))
Y = np.argmax(X.reshape(N, -1) @ WEIGHTS, 1)
Y[:3] = (Y[:3] + 1) % CLASSES  # wrong as they are
HIDDEN = np.float32(RNG.normal(size=(48, 64)))
KEY = jax.random.key(0)


@jax.jit
def linear(x):
    return x.reshape(x.shape[0], -1) @ jnp.float32(WEIGHTS)


@jax.jit
def curved(x):
    """Every sub-attack breaks some images of this one at eps 0.02 only."""
    z = linear(x)
    return z + jnp.sin(3 * z[:, ::-1])


def margins(norm):
    """The distance of each image's nearest boundary, in float64; below 0 where it is wrong as it is.

    (z_y − z_k) / ||w_y − w_k||_q, smallest over k; in l1 the steepest pixels go to their walls first.
    """
    x, rows = X.reshape(N, -1).astype(np.float64), np.arange(N)
    gap = (x @ WEIGHTS)[rows, Y][:, None] - x @ WEIGHTS  # (N, K)
    w = WEIGHTS[:, Y].T[:, None] - WEIGHTS.T[None]  # (N, K, D)
    if norm == "l1":
        steep, room = np.abs(w), np.where(w > 0, x[:, None], 1 - x[:, None])
        order = np.argsort(-steep, axis=2)
        steep, room = (np.take_along_axis(value, order, 2) for value in (steep, room))
        before = np.cumsum(steep * room, 2) - steep * room
        length = np.clip((gap[..., None] - before) / np.maximum(steep, 1e-12), 0, room).sum(2)
        quotients = np.where(gap > 0, length, -1)
    else:
        quotients = gap / np.maximum(np.linalg.norm(w, {"linf": 1, "l2": 2}[norm], axis=2), 1e-12)
    return np.min(np.where(np.arange(CLASSES) == Y[:, None], np.inf, quotients), axis=1)


def short(norm="linf", eps=0.02, steps=10, queries=60):
    """The attacks of "standard" with few steps, the first with so few that it leaves something to the next."""
    return {
        "apgd-ce": iterative_apgd("ce", norm, eps, steps // 10),
        "apgd-t": iterative_apgd("dlr_targeted", norm, eps, steps),
        "fab-t": iterative_fab(norm, eps, steps, targets=9),
        "square": iterative_square(norm, eps, queries),
    }


def attack(network=curved, key=KEY, x=X, y=Y, norm="linf", eps=0.02, **options):
    if "attacks" not in options:
        options["attacks"] = short(norm, eps)
    return autoattack.autoattack(key, network, x, y, norm, eps, **options)


@jax.jit
def partly(x):
    """The curved network, with a gradient only where the first pixel is light."""
    return curved(jnp.where(x[:, :1, :1, :1] > 0.5, x, jnp.round(x * 64) / 64))


def steps():
    """Two attacks that are as small as they can be, with draws, targets and restarts."""
    targeted = one_step(0.06, drawn=True, targets=4)
    return {"once": targeted, "again": targeted._replace(restarts=2, targets=2)}


def some(plan):
    """What to attack and how: `steps` on the network `partly`, or the first 2 or 4 of `short` on the curved one."""
    if plan == "steps":
        return dict(network=partly, eps=0.06, attacks=steps())
    return dict(network=curved, eps=0.02, attacks=dict(itertools.islice(short().items(), plan)))


@functools.cache
def whole(plan):
    """The result of `some` attacks in one batch over all devices."""
    return attack(batch_size=64, **some(plan))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_on_a_linear_network_robust_means_that_the_margin_exceeds_eps(norm):
    margin = margins(norm)
    eps = float(np.median(margin[3:]))
    near = np.abs(margin / eps - 1) < (0.03 if norm == "l1" else 1e-3)
    result = attack(linear, norm=norm, eps=eps, attacks=["apgd-t"], batch_size=64)
    np.testing.assert_array_equal(result.robust[~near], (margin > eps)[~near])
    assert 10 < result.robust.sum() < 31 and near.sum() <= 3
    np.testing.assert_array_equal(result.clean, margin > 0)
    assert result.warnings == []


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_standard_on_a_linear_network_is_its_margin(norm):
    margin = margins(norm)
    eps = float(np.median(margin[3:]))
    near = np.abs(margin / eps - 1) < (0.03 if norm == "l1" else 1e-3)
    result = attack(linear, norm=norm, eps=eps, attacks=None, batch_size=64)
    np.testing.assert_array_equal(result.robust[~near], (margin > eps)[~near])
    assert list(result.robust_after) == ["apgd-ce", "apgd-t", "fab-t", "square"]


@pytest.mark.parametrize("plan", ["steps", 2, 4])
def test_robust_accuracy_only_falls_and_bookkeeping_is_consistent(plan):
    result, options = whole(plan), some(plan)
    counts = [result.clean.sum(), *(flags.sum() for flags in result.robust_after.values())]
    assert list(result.robust_after) == list(result.seconds) == list(options["attacks"])
    assert np.all(np.diff(counts) <= 0) and counts[2] < counts[1] < counts[0]
    for before, after in zip([result.clean, *result.robust_after.values()], result.robust_after.values(), strict=False):
        assert not np.any(after & ~before)
    np.testing.assert_array_equal(result.robust, list(result.robust_after.values())[-1])
    np.testing.assert_array_equal(np.argmax(options["network"](result.x_adv), 1) == Y, result.robust)
    np.testing.assert_array_equal(np.any(result.x_adv != X, axis=(1, 2, 3)), result.clean & ~result.robust)
    assert np.abs(result.x_adv - X).max() <= options["eps"] + 1e-6
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1
    assert (result.warnings == []) == (plan != "steps")  # whose network has no gradient for some images


@pytest.mark.parametrize("devices, batch_size, plan", [(1, 8, "steps"), (8, 8, 2), (8, 8, 4), (1, 1, 4), (1, 256, 4)])
def test_neither_batch_size_nor_number_of_devices_changes_a_flag(monkeypatch, devices, batch_size, plan):
    """Nor an image that the attacks find."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    monkeypatch.setattr(cluster, "mesh", lambda: mesh)
    result, wanted = attack(batch_size=batch_size, **some(plan)), whole(plan)
    for name, flags in result.robust_after.items():
        assert np.sum(flags != wanted.robust_after[name]) == 0, name
    found = ~flags
    assert found.sum() > 5
    np.testing.assert_allclose(result.x_adv, np.where(found[:, None, None, None], wanted.x_adv, X), atol=1e-4)


def test_numbers_of_numpy_are_saved_and_found_again(tmp_path):
    square = iterative_square("linf", 0.02, queries=np.int64(20), p_init=np.float32(0.3))
    plan = {"step": one_step(0.02, steps=square.steps)._replace(settings=square.settings)}
    options = dict(attacks=plan, batch_size=np.int64(8), state=tmp_path / "state.npz")
    first, again = attack(**options), attack(**options)
    np.testing.assert_array_equal(first.x_adv, again.x_adv)


def test_another_key_draws_otherwise():
    first = whole("steps")
    other = attack(key=jax.random.key(1), batch_size=64, **some("steps") | dict(attacks={"once": steps()["once"]}))
    found = ~other.robust & ~first.robust_after["once"] & first.clean  # by both, in the first attack
    assert np.any(other.x_adv[found] != first.x_adv[found])


# ---- interruption --------------------------------------------------------------------------------------------


def test_interrupted_anywhere_and_run_again_it_ends_with_the_same_flags_and_images(monkeypatch, tmp_path):
    monkeypatch.setattr(progress, "SAVE_SECONDS", 0.0)
    run = functools.partial(attack, batch_size=8, **some("steps"))
    straight, file = whole("steps"), tmp_path / "state.npz"
    assert any("gradient is zero" in text for text in straight.warnings)
    save, times = progress.Progress.save, []

    def save_and_stop(self, at_once=True):
        save(self, at_once)
        times.append((len(self.after), self.position))
        if len(times) % 15 == 0:  # once within each attack
            raise KeyboardInterrupt

    monkeypatch.setattr(progress.Progress, "save", save_and_stop)
    for interruptions in range(30):  # noqa: B007
        try:
            result = run(state=file)
            break
        except KeyboardInterrupt:
            continue
    assert interruptions > 1 and len(times) > 9 and len(set(times)) == len(times)  # no work was done twice
    assert result.warnings == straight.warnings
    np.testing.assert_array_equal(result.x_adv, straight.x_adv)
    for name, flags in straight.robust_after.items():
        np.testing.assert_array_equal(result.robust_after[name], flags)
    again = run(state=file)  # finished: only read
    np.testing.assert_array_equal(again.x_adv, straight.x_adv)
    assert len(times) == len(set(times))


def test_a_preemption_notice_saves_and_stops_within_a_batch_too(monkeypatch, tmp_path):
    """The first look is between two steps of the first batch, whose work is lost, the second behind it."""
    few = {"two steps": one_step(0.02, steps=2)}
    for looks, position in ((1, 0), (2, 8)):
        notices = iter([False, True][-looks:])
        monkeypatch.setattr(cluster, "preempted", lambda notices=notices: next(notices))
        with pytest.raises(PreemptedError):
            attack(attacks=few, batch_size=8, state=tmp_path / "state.npz", progress="AutoAttack")
        with np.load(tmp_path / "state.npz") as stored:
            assert stored["position"] == position and next(notices, None) is None


def test_a_state_of_another_evaluation_is_refused(monkeypatch, tmp_path):
    file, few = tmp_path / "state.npz", {"apgd-ce": iterative_apgd("ce", "linf", 0.02, 3)}
    attack(attacks=few, state=file)
    others = [
        (dict(eps=0.03, attacks={"apgd-ce": iterative_apgd("ce", "linf", 0.03, 3)}), "eps"),
        (dict(key=jax.random.key(5)), "key"),
        (dict(x=X[::-1].copy(), y=Y[::-1].copy()), "images, labels"),
        (dict(network=linear), "logits, gradients"),
        (dict(attacks=short()), "attacks"),
        (dict(attacks={"apgd-ce": iterative_apgd("margin", "linf", 0.02, 3)}), "attacks"),
        (dict(attacks={"apgd-ce": iterative_square("linf", 0.02, 3)}), "attacks"),
    ]
    for other, word in others:
        with pytest.raises(InputError, match=rf"another evaluation \(its .*{word}"):
            attack(**{"attacks": few, "state": file, **other})
    with pytest.raises(InputError, match=r"another evaluation \(its attacks"):  # in another order
        two = {"square": iterative_square("linf", 0.02, 3), **few}
        attack(attacks=two, state=tmp_path / "two.npz")
        attack(attacks=dict(reversed(two.items())), state=tmp_path / "two.npz")
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(InputError, match="damaged"):
        attack(attacks=few, state=file)


SCRIPT = """
    import sys, jax, numpy as np
    jax.config.update("jax_num_cpu_devices", 2)
    sys.path.insert(0, {tests!r})
    import test_autoattack as t
    from ibjax.attacks import progress
    progress.SAVE_SECONDS = 0.0
    result = t.attack(batch_size=8, attacks=t.short(steps=40, queries=500), state=sys.argv[1])
    np.savez(sys.argv[2], x_adv=result.x_adv, **result.robust_after)
"""


@pytest.mark.slow
def test_killed_at_random_points_and_run_again_it_ends_with_the_same_bits(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent))))
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}

    def start(name):
        return subprocess.Popen(
            [sys.executable, script, tmp_path / f"{name}.state", tmp_path / f"{name}.npz"], env=environment
        )

    assert start("whole").wait() == 0
    kills, state = 0, tmp_path / "killed.state"
    for _ in range(60):
        process, changes, last = start("killed"), 0, None
        wanted = RNG.integers(1, 4)
        while process.poll() is None:
            stamp = state.stat().st_mtime_ns if state.exists() else None
            changes, last = changes + (stamp != last), stamp
            if changes > wanted:
                process.kill()
                kills += 1
                break
            time.sleep(0.002)
        if process.wait() == 0:
            break
    assert kills >= 3
    with np.load(tmp_path / "whole.npz") as whole, np.load(tmp_path / "killed.npz") as killed:
        for name in whole.files:
            np.testing.assert_array_equal(whole[name], killed[name])


# ---- warnings ------------------------------------------------------------------------------------------------


@jax.jit
def quantised(x):
    """Right as it is, and without any gradient: Square sees through it."""
    return curved(jnp.round(x * 64) / 64)


@jax.jit
def saturated(x):
    return jax.nn.softmax(linear(x) * 300.0)


def constant(x):
    return jnp.zeros((len(x), CLASSES)) + 0 * linear(x)


@jax.jit
def relu(x):
    hidden = jax.nn.relu((x.reshape(len(x), -1) - 0.5) @ HIDDEN)
    return hidden @ HIDDEN.T[:, :CLASSES]


def without_gradient(x):
    """Finite logits, and a gradient of 0 · ∞."""
    return linear(x) + 0 * jnp.sqrt(jnp.sum(jnp.maximum(x - 2, 0)))


@pytest.mark.parametrize("network", [linear, relu])
def test_an_honest_network_gets_no_warning(network):
    y = np.argmax(network(X), 1)
    first = {"apgd-ce": iterative_apgd("ce", "linf", 0.02, 20)}
    assert attack(network, y=y, attacks=first | {"square": short()["square"]}).warnings == []


@pytest.mark.parametrize(
    "network, words",
    [
        (quantised, ["gradient is zero or not finite at the start", "square lowers robust accuracy by"]),
        (saturated, ["probabilities", "gradient is zero or not finite at the start"]),
        (constant, ["same logits for every image"]),
        (without_gradient, ["gradient is zero or not finite at the start", "square lowers robust accuracy by"]),
    ],
)
def test_networks_with_masked_gradients_get_warnings(network, words):
    y = np.argmax(network(X), 1)
    first = {"apgd-ce": iterative_apgd("ce", "linf", 0.02, 3)}
    warnings = attack(network, y=y, attacks=first | {"square": short()["square"]}).warnings
    for word in words:
        assert any(word in text for text in warnings), warnings


def noise(x, count=[0]):  # noqa: B006
    count[0] += 1
    return jax.random.normal(jax.random.key(count[0]), (len(x), CLASSES))


def test_a_random_network_is_refused_unless_allowed():
    with pytest.raises(InputError, match="version='rand'"):
        attack(lambda x: linear(x) + noise(x))
    result = attack(lambda x: linear(x) + noise(x), attacks={"step": one_step(0.02)}, allow_randomized=True)
    assert any("randomised" in text for text in result.warnings)


def test_rand_averages_gradients_over_samples():
    """Of a slope w + 3ξv, v across w, it follows w, as a single sample does not; with noise it finds what it should."""
    w = np.float32(WEIGHTS[:, 0])
    v = np.float32(WEIGHTS[:, 1]) - (WEIGHTS[:, 1] @ w / (w @ w)).astype(np.float32) * w
    v *= np.linalg.norm(w) / np.linalg.norm(v)

    def wavering(x, keys):
        slopes = w[None] + 3 * jax.vmap(jax.random.normal)(keys)[:, None] * v[None]
        return jnp.sum((x.reshape(len(x), -1) - 0.5) * slopes, 1)[:, None] @ jnp.array([[0.0, 1.0]])

    def agreement(attack):
        """Mean cosine of w and each image's first gradient."""
        x, y = jnp.full(X.shape, 0.5), jnp.zeros(N, jnp.int32)
        state = attack.init(jax.random.split(KEY, N), 0, x, y)
        state = jax.jit(lambda state: attack.step(0, wavering, x, y, jnp.full(N, UNTARGETED), state))(state)
        found = np.asarray(state.gradient_best).reshape(N, -1)
        return np.mean(found @ w / np.linalg.norm(found, axis=1) / np.linalg.norm(w))

    plan, _ = autoattack.sub_attacks("rand", "l2", 1e-3, 2)
    assert agreement(plan["apgd-ce"]) > 0.8 > 0.7 > agreement(iterative_apgd("ce", "l2", 1e-3, 1, eot=1))

    def noisy(x, keys):
        return curved(x) + 0.05 * jax.vmap(lambda key: jax.random.normal(key, (CLASSES,)))(keys)

    result = attack(noisy, version="rand", attacks=["apgd-ce"])
    plain = attack(attacks={"apgd-ce": short(steps=100)["apgd-ce"]})
    assert np.mean(result.robust != plain.robust) < 0.2
    with pytest.raises(InputError, match=r"logits_fn\(x, keys\)"):
        attack(curved, version="rand", attacks=None)
    with pytest.raises(InputError, match="no form for random networks"):
        attack(noisy, version="rand", attacks=["square"])


def test_dlr_gives_way_to_the_margin_where_classes_are_too_few():
    plans = {classes: autoattack.sub_attacks("plus", "linf", 0.1, classes) for classes in (2, 3, 4)}
    for classes, (plan, warnings) in plans.items():
        assert list(plan) == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
        reasons = [text for text in warnings if "classes" in text]
        assert len(reasons) == {2: 2, 3: 1, 4: 0}[classes], warnings
    jax.eval_shape(lambda x: as_attack(plans[2][0]["apgd-t"])(KEY, two, x, TWO), X)  # which DLR would not take
    result = attack(two, y=1 - TWO, attacks=["apgd-t"])  # nothing is left to attack
    assert not result.robust.any() and "there are 2" in result.warnings[0]


@jax.jit
def two(x):
    return linear(x - 0.5)[:, :2]


TWO = ((X.reshape(N, -1) - 0.5) @ WEIGHTS[:, :2]).argmax(1)


@pytest.mark.slow
def test_images_of_two_classes_are_attacked_by_the_margin():
    assert 0 < attack(two, y=TWO, eps=0.01, attacks=["apgd-t"]).robust.sum() < N


def test_what_a_jitted_network_closes_over_is_not_compiled_in():
    found = []
    for network in (linear.__wrapped__, linear):
        runner = Runner(KEY, network, X, Y, norm="linf", eps=0.02, batch_size=64)
        (logits,) = runner.logits(X)
        found.append((logits, [constant.shape for constant, _ in runner.compiler.constants.values()]))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] != []


def test_versions_are_those_of_the_authors():
    standard, _ = autoattack.sub_attacks("standard", "linf", 0.1, 10)
    assert {name: (a.steps, a.restarts, a.targets) for name, a in standard.items()} == {
        "apgd-ce": (101, 1, 0), "apgd-t": (101, 1, 9), "fab-t": (100, 1, 9), "square": (5001, 1, 0)}  # fmt: skip
    in_l1, _ = autoattack.sub_attacks("standard", "l1", 12.0, 10)
    assert in_l1["apgd-ce"].restarts == 5 and in_l1["apgd-t"].targets == 5 and in_l1["apgd-ce"].steps == 103
    plus, _ = autoattack.sub_attacks("plus", "l2", 0.5, 10)
    assert list(plus) == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
    assert [attack.restarts for attack in plus.values()] == [5, 5, 5, 1, 1, 1]
    assert [attack.targets for attack in plus.values()] == [0, 0, 0, 0, 9, 9]
    rand, _ = autoattack.sub_attacks("rand", "linf", 0.1, 10)
    assert {name: a.eot for name, a in rand.items()} == {"apgd-ce": 20, "apgd-dlr": 20}


# ---- input ---------------------------------------------------------------------------------------------------

NAN_PIXEL = np.where(np.arange(N * 48).reshape(X.shape) == 7, np.float32(np.nan), X)


def nan_for_the_last(x):
    return jnp.where(x[:, 0, 0, :1] == X[N - 1, 0, 0, 0], jnp.nan, linear(x))


def centred(x):
    return linear(x) - linear(x).mean(0, keepdims=True)


def test_features_beside_the_logits_change_nothing():
    """As the networks of ibjax.models return them."""
    alone, beside = (
        autoattack.autoattack(KEY, network, X[:8], Y[:8], "linf", 0.02, attacks=["apgd-ce"], options={"steps": 2})
        for network in (linear, lambda x: (linear(x), {"pixels": x}))
    )
    np.testing.assert_array_equal(alone.x_adv, beside.x_adv)


CE, DLR = (iterative_apgd(loss, "linf", 0.02, 3) for loss in ("ce", "dlr"))
BAD = {
    "images above 1": (dict(x=X * 255), "reach from"),
    "images below 0": (dict(x=X - 0.5), "reach from"),
    "a NaN pixel": (dict(x=NAN_PIXEL), "1 of 41 images hold NaN"),
    "bytes": (dict(x=np.uint8(X * 255)), "divide by 255"),
    "channels first": (dict(x=np.zeros((N, 3, 32, 32), np.float32)), "channels first"),
    "no images": (dict(x=X[:0], y=Y[:0]), "at least one image"),
    "eps in grey levels": (dict(eps=8), "8/255"),
    "eps of zero": (dict(eps=0.0), "above 0"),
    "a label too large": (dict(y=np.full(N, CLASSES)), "5 classes"),
    "a negative label": (dict(y=np.full(N, -1)), "labels reach from"),
    "one-hot labels": (dict(y=np.eye(CLASSES)[Y]), "integers of shape"),
    "labels as floats": (dict(y=np.float32(Y)), "integers of shape"),
    "one logit per image": (dict(network=lambda x: linear(x)[:, 0]), "logits have shape"),
    "a dict": (dict(network=lambda x: {"logits": linear(x)}), "return the logits alone"),
    "NaN logits": (dict(network=lambda x: linear(x) * jnp.nan), "NaN or Inf"),
    "NaN logits of one image": (dict(network=nan_for_the_last), "NaN or Inf for 1 images"),
    "batch statistics": (dict(network=centred), "other images of its batch"),
    "an unknown norm": (dict(norm="l0"), "norm 'l0'"),
    "an unknown version": (dict(version="strong", attacks=None), "version 'strong'"),
    "an unknown attack": (dict(attacks=["apgd"]), "did you mean 'apgd-"),
    "an attack twice": (dict(attacks=["square", "square"]), "each once"),
    "a fraction as key": (dict(key=0.5), "jax.random.key"),
    "several keys": (dict(key=jax.random.split(KEY, N)), "one JAX key"),
    "a batch and a half": (dict(batch_size=2.5), "batch_size=2.5"),
    "a network in NumPy": (dict(network=lambda x: np.asarray(x).reshape(N, -1) @ WEIGHTS), "cannot trace"),
    "no batch": (dict(batch_size=0), "batch_size=0"),
    "no attacks": (dict(attacks={}), "at least one"),
    "an unknown version beside attacks": (dict(version="Rand", attacks=short()), "version 'Rand'"),
    "options of attacks that are given": (dict(options={"queries": 9}, attacks=short()), "attacks given by name"),
    "options of a version": (dict(options={"queries": 9}, attacks=None), "attacks given by name"),
    "too few classes for a later attack": (
        dict(network=lambda x: linear(x)[:, :2], y=np.zeros(N, int), attacks={"c": CE, "d": DLR}),
        "needs 3 classes",
    ),
    "an attack of another norm": (dict(norm="l2", eps=0.5, attacks=short()), "made for linf"),
    "an attack of another eps": (dict(eps=0.01, attacks=short()), r"made for linf and eps=0\.02"),
    "an attack with samples": (dict(attacks={"a": iterative_apgd("ce", "linf", 0.02, 3, eot=2)}), "eot=2"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_clear_line(case):
    options, words = BAD[case]
    with pytest.raises(InputError, match=words) as caught:
        attack(**{"attacks": ["apgd-ce"], **options})
    assert "\n" not in str(caught.value)
