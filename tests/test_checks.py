"""What a network is asked before an attack: is an image's answer its own, and is the network still the same one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import keys_of

from ibjax.attacks import checks, entrance, geometry
from ibjax.attacks.apgd import apgd, iterative_apgd
from ibjax.attacks.autoattack import autoattack
from ibjax.attacks.eot import eot
from ibjax.attacks.iterative import Iterative
from ibjax.attacks.pgd import pgd
from ibjax.attacks.square import iterative_square
from ibjax.errors import InputError

RNG = np.random.default_rng(0)
N, CLASSES = 21, 5
X = np.float32(RNG.uniform(size=(N, 6, 6, 2)))
HIDDEN = np.float32(RNG.normal(size=(72, 32)))
OUT = np.float32(RNG.normal(size=(32, CLASSES)))
KEYS = keys_of(N)


def network(x):
    return jax.nn.relu((x.reshape(len(x), -1) - 0.5) @ jnp.asarray(HIDDEN)) @ jnp.asarray(OUT)


Y = (np.maximum((X.reshape(N, -1) - 0.5) @ HIDDEN, 0) @ OUT).argmax(1)


def in_one_program(network):
    """A function, not compiled itself, that runs one program where the network would run one for each operation."""
    compiled = jax.jit(network)
    return lambda x: compiled(x)


one_program = in_one_program(network)


def one_step(eps, drawn=False, **counts):
    """The smallest attack that a plan can have, in linf: a step moves x by eps along the signs of a gradient.

    It is that of the logit of the target class, less that of the label. With `drawn` the way is half as long for images
    whose keys are odd. `counts`: of steps, each of which does the same, of targets and of restarts.
    """

    def start(keys, restart, x, y):
        odd = jax.random.key_data(keys)[:, -1] % 2 if drawn else jnp.zeros(len(x), jnp.uint32)
        return x, jnp.zeros(len(x), bool), eps * jnp.where(odd == 1, 0.5, 1.0)

    def step(i, logits_fn, x, y, other, state, exact=None):
        def lead(x):
            logits = logits_fn(x)
            return jnp.sum((jax.nn.one_hot(other, logits.shape[1]) - jax.nn.one_hot(y, logits.shape[1])) * logits)

        slope, way = jax.grad(lead)(x), state[2]
        moved = jnp.clip(x + geometry.per_image(way, x) * jnp.sign(slope), 0, 1)
        return moved, jnp.all(slope == 0, axis=(1, 2, 3)), way

    found, flat = (lambda x, state: state[0]), (lambda state: state[1])
    return Iterative("step", "linf", eps, start, step, x_adv=found, flat=flat, **{"steps": 1, **counts})


def noise(key, x):
    return jax.random.normal(key, x.shape, x.dtype)


def normalised(x):
    """Batch normalisation in training mode."""
    hidden = (x.reshape(len(x), -1) - 0.5) @ jnp.asarray(HIDDEN)
    return jax.nn.relu((hidden - hidden.mean(0, keepdims=True)) / hidden.std(0, keepdims=True)) @ jnp.asarray(OUT)


def with_gradient(change):
    """The network with another gradient: `change(g)` in place of g."""

    @jax.custom_vjp
    def turn(x):
        return x

    turn.defvjp(lambda x: (x, None), lambda _, g: (change(g),))
    return lambda x: network(turn(x))


PLACE, OTHERS = "depend on its place in the batch", "depend on the other images of its batch"
DEPENDENT = {
    "all but the first are turned": (lambda x: network(x).at[1:].multiply(-1), f"logits {PLACE}"),
    "the last is turned": (lambda x: network(x).at[-1].multiply(-1), f"logits {PLACE}"),
    "noise of one key on the logits": (lambda x: network(x) + noise(jax.random.key(0), network(x)), f"logits {PLACE}"),
    "noise of one key on the images": (lambda x: network(x + 0.1 * noise(jax.random.key(0), x)), f"logits {PLACE}"),
    "batch statistics": (normalised, f"logits {OTHERS}"),
    "less the batch's mean": (lambda x: network(x) - network(x).mean(0, keepdims=True), f"logits {OTHERS}"),
    "the size of the batch": (lambda x: network(x) * (1 + len(x) % 2), f"logits {OTHERS}"),
    "gradients by place": (with_gradient(lambda g: g.at[1:].multiply(-1)), f"gradients {PLACE}"),
    "gradients of the batch": (with_gradient(lambda g: g + 2 * g.mean(0, keepdims=True)), f"gradients {OTHERS}"),
}
DEPENDENT = {case: (in_one_program(dependent), words) for case, (dependent, words) in DEPENDENT.items()}


PGD = pgd(eps=0.1, step_size=0.05, steps=2)
ENTERED = entrance.checked(lambda key, logits_fn, x, y: x)  # what every attack does before its first step


@pytest.mark.parametrize("case", list(DEPENDENT))
def test_a_network_whose_answer_to_an_image_depends_on_its_batch_is_refused(case):
    dependent, words = DEPENDENT[case]
    for attempt in (
        lambda: checks.independent(dependent, X),
        lambda: checks.independent(jax.jit(dependent), jnp.asarray(X)),
        lambda: autoattack(jax.random.key(0), dependent, X, Y, "linf", 0.1),
        lambda: PGD(jax.random.key(0), dependent, X, Y),
    ):
        with pytest.raises(InputError, match=words) as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_noise_by_position_is_told_to_become_noise_by_image():
    with pytest.raises(InputError, match=r"a key per image, and attack with autoattack\(version='rand'\)"):
        checks.independent(DEPENDENT["noise of one key on the images"][0], X)
    by_image = jax.jit(lambda x, keys: network(x + 0.1 * jax.vmap(noise)(keys, x)))
    assert checks.independent(by_image, X, KEYS) == []
    by_place = jax.jit(lambda x, keys: network(x + 0.1 * noise(keys[0], x)))
    with pytest.raises(InputError, match=PLACE):
        checks.independent(by_place, X, KEYS)


INDEPENDENT = {
    "as it is": network,
    "compiled": jax.jit(network),
    "with features": lambda x: (network(x), {"x": x}),
    "in bfloat16": lambda x: network(x.astype(jnp.bfloat16)).astype(jnp.bfloat16),
    "without a gradient": lambda x: network(jnp.round(x * 8) / 8),
    "with a gradient that is NaN": lambda x: network(x) + 0 * jnp.sqrt(jnp.sum(jnp.maximum(x - 2, 0))),
    "pooled, with ties": lambda x: network(jax.lax.reduce_window(jnp.round(x), -jnp.inf, jax.lax.max, (1, 3, 3, 1),
                                                                 (1, 1, 1, 1), "SAME")),
    "not differentiable": lambda x: jax.pure_callback(
        lambda x: np.maximum((np.reshape(x, (len(x), -1)) - np.float32(0.5)) @ HIDDEN, 0) @ OUT,
        jax.ShapeDtypeStruct((len(x), CLASSES), jnp.float32),
        x,
    ),
}  # fmt: skip
INDEPENDENT |= {
    case: in_one_program(network) for case, network in INDEPENDENT.items() if case not in ("as it is", "compiled")
}


@pytest.mark.parametrize("case", list(INDEPENDENT))
@pytest.mark.parametrize("count", [2, 3, N])
def test_a_network_that_sees_each_image_by_itself_passes(case, count):
    with jax.numpy_dtype_promotion("standard"):
        assert checks.independent(INDEPENDENT[case], X[:count]) == []


def test_an_attack_by_itself_asks_each_network_once_and_none_inside_a_trace(monkeypatch):
    asked, ask = [], checks.independent
    monkeypatch.setattr(checks, "independent", lambda *arguments: asked.append(1) or ask(*arguments))
    key, own = jax.random.key(0), lambda x: one_program(x)
    for _ in range(2):
        ENTERED(key, own, X, Y)
    assert len(asked) == 1
    ENTERED(key, lambda x: one_program(x), X[:1], Y[:1])  # nothing to compare with
    jax.jit(lambda x: ENTERED(key, DEPENDENT["batch statistics"][0], x, Y))(X)
    assert len(asked) == 1


def test_a_compiled_network_is_never_run_operation_by_operation():
    traced = []

    @jax.jit
    def noting(x):
        traced.append(isinstance(x, jax.core.Tracer))
        return network(x), {"x": x}

    with pytest.raises(InputError, match="give at least one"):  # after the network has been asked
        autoattack(jax.random.key(0), noting, X, Y, "linf", 0.1, attacks={})
    assert traced and all(traced)


def of_one_size(network, size=N):
    """The network, which takes so many images and no other number."""

    def fixed(x):
        assert len(x) == size
        return network(x)

    return fixed


@pytest.mark.parametrize("case", [case for case in DEPENDENT if case != "the size of the batch"])
def test_a_network_that_takes_one_number_of_images_is_asked_with_as_many(case):
    dependent, words = DEPENDENT[case]
    with pytest.raises(InputError, match=words):
        PGD(jax.random.key(0), of_one_size(dependent), X, Y)


@pytest.mark.parametrize("case", list(INDEPENDENT))
def test_a_network_that_takes_one_number_of_images_and_sees_each_by_itself_passes(case):
    with jax.numpy_dtype_promotion("standard"):
        assert checks.independent(of_one_size(INDEPENDENT[case]), X) == []


def test_a_network_of_more_images_than_are_asked_about_is_asked_about_all_that_it_takes():
    many = np.float32(np.random.default_rng(4).uniform(size=(300, *X.shape[1:])))
    assert checks.independent(of_one_size(one_program, 300), many) == []
    for case in ("the last is turned", "batch statistics", "gradients by place", "gradients of the batch"):
        dependent, words = DEPENDENT[case]
        with pytest.raises(InputError, match=words):
            checks.independent(of_one_size(dependent, 300), many)


def test_what_an_attack_by_itself_cannot_find_out_is_said_once(caplog):
    entrance._say_once.cache_clear()
    drawn = np.random.default_rng(0)
    host = lambda x: one_program(x) + drawn.normal(size=(len(x), CLASSES)).astype(np.float32)  # noqa: E731
    for networks, images, words in (
        ([host], X, "the network is randomised, use EOT attacks, as apgd(eot=20)"),
        ([lambda x: one_program(x), lambda x: 2 * one_program(x)], X[:1], checks.ONE_IMAGE),
    ):
        for each in (*networks, *networks):
            ENTERED(jax.random.key(0), each, images, Y[: len(images)])
        assert [words in text for text in caplog.messages] == [True]
        caplog.clear()
    ENTERED(jax.random.key(0), lambda x: one_program(x), X, Y)
    assert not caplog.messages


def test_a_random_network_attacked_by_itself_is_asked_with_a_key_for_each_image():
    key = jax.random.key(0)
    by_image = lambda x, keys: network(x + 0.1 * jax.vmap(noise)(keys, x))  # noqa: E731
    apgd(steps=2, eps=0.1, eot=2)(key, by_image, X, Y)
    with pytest.raises(InputError, match=OTHERS):
        apgd(steps=2, eps=0.1, eot=2)(key, lambda x, keys: normalised(x), X, Y)
    draws = lambda key, x: network(x + 0.1 * noise(key, x))  # noqa: E731 - by place, as eot's may
    for keys in (key, KEYS):
        eot(attack=pgd, samples=2, eps=0.1, step_size=0.05, steps=2)(keys, draws, X, Y)


def test_of_one_image_it_is_said_that_nothing_could_be_checked():
    warnings = checks.independent(one_program, X[:1])
    assert warnings == [checks.ONE_IMAGE]
    few = {"step": one_step(0.1)}
    assert warnings[0] in autoattack(jax.random.key(0), one_program, X[:1], Y[:1], "linf", 0.1, attacks=few).warnings


def test_of_a_network_that_draws_anew_in_each_call_it_is_said():
    drawn = np.random.default_rng(0)
    drawing = lambda x: one_program(x) + drawn.normal(size=(len(x), CLASSES)).astype(np.float32)  # noqa: E731
    assert ["randomised" in text for text in checks.independent(drawing, X)] == [True]


def test_a_network_without_derivative_can_be_attacked_by_queries():
    attacks = {"square": iterative_square("linf", 0.1, 5)}
    result = autoattack(jax.random.key(0), INDEPENDENT["not differentiable"], X, Y, "linf", 0.1, attacks=attacks)
    assert result.clean.all()


# ---- fingerprints --------------------------------------------------------------------------------------------


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x * 64) / 64


straight_through.defvjp(lambda x: (straight_through(x), None), lambda _, g: (g,))
OTHER = {
    "itself": (network, []),
    "compiled": (jax.jit(network), []),
    "rounded otherwise": (lambda x: network(x) * (1 + 1e-4), []),
    "another scale": (lambda x: 1.1 * network(x), ["logits", "gradients"]),
    "shifted logits": (lambda x: network(x) + 1, ["logits"]),
    "a straight-through gradient": (with_gradient(jnp.zeros_like), ["gradients"]),
    "another activation": (
        lambda x: jax.nn.gelu((x.reshape(len(x), -1) - 0.5) @ HIDDEN) @ OUT,
        ["logits", "gradients"],
    ),
}


@functools.cache
def known():
    """The fingerprint of the network."""
    return checks.fingerprint(one_program, X)


@pytest.mark.parametrize("case", list(OTHER))
def test_a_fingerprint_tells_networks_apart_by_logits_and_gradients(case):
    other, changed = OTHER[case]
    found = checks.fingerprint(in_one_program(other), X)
    assert checks.differences(found, known()) == changed
    assert checks.differences(found.tolist(), found) == []  # as a JSON file has it
    assert found.shape == (8, 2, 5) and np.isfinite(found).all()


def test_what_is_no_fingerprint_differs_in_all():
    wanted = known()
    for other in (None, "words", [[1.0]], wanted[:3], np.full_like(wanted, np.nan)):
        assert checks.differences(other, wanted) == ["logits", "gradients"]


# ---- traces --------------------------------------------------------------------------------------------------


def test_inside_a_trace_autoattack_says_where_it_can_be_called():
    def attack(x=X, scale=1.0):
        few = {"apgd-ce": iterative_apgd("ce", "linf", 0.1, 2)}
        return autoattack(jax.random.key(0), lambda x: scale * one_program(x), x, Y, "linf", 0.1, attacks=few).x_adv

    for call in (
        lambda: jax.jit(attack)(X),
        lambda: jax.jit(lambda scale: attack(scale=scale))(2.0),
        lambda: jax.grad(lambda scale: attack(scale=scale).sum())(2.0),
        lambda: jax.vmap(attack)(X[None]),
        lambda: jax.lax.fori_loop(0, 2, lambda i, x: attack(x), jnp.asarray(X)),
    ):
        with pytest.raises(InputError, match=r"autoattack cannot run inside jax\.jit"):
            call()
