"""AutoAttack's state: it goes on, or it is refused with the difference named; no wrong bit gives another result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checks import one_step

from ibjax.attacks import autoattack, progress
from ibjax.errors import InputError

RNG = np.random.default_rng(0)
N, CLASSES, EPS = 24, 4, 0.05
X = np.float32(RNG.uniform(0.25, 0.75, size=(N, 4, 4, 1)))
WEIGHTS = np.float32(RNG.normal(size=(16, CLASSES)))
FEW = {"first": one_step(EPS), "second": one_step(EPS, targets=2)}


@jax.jit
def linear(x):
    return (x.reshape(len(x), -1) - 0.5) @ jnp.asarray(WEIGHTS)


@jax.custom_vjp
def rounded(x):
    return jnp.round(x * 64) / 64


rounded.defvjp(lambda x: (rounded(x), None), lambda _, g: (g,))
masked = jax.jit(lambda x: linear(jnp.round(x * 64) / 64))
Y = ((np.round(X * 64) / 64).reshape(N, -1) - 0.5).dot(WEIGHTS).argmax(1)


def attack(network, key=0, x=X, eps=EPS, **options):
    options = dict(attacks=FEW, batch_size=8) | options
    return autoattack.autoattack(jax.random.key(key), network, x, Y, "linf", eps, **options)


def test_a_state_does_not_outlive_the_gradient(tmp_path):
    """Whoever follows the warning about masked gradients gets new numbers, or is told that the state is old."""
    file = tmp_path / "state.npz"
    few = dict(attacks={"towards each": one_step(EPS, targets=3)}, state=file)
    before = attack(masked, **few)
    assert any("gradient is zero" in text for text in before.warnings)
    repaired = jax.jit(lambda x: linear(rounded(x)))  # the same logits, with a straight-through gradient
    np.testing.assert_array_equal(repaired(X), masked(X))
    with pytest.raises(InputError, match=r"another evaluation \(its gradients differ\); give restart=True"):
        attack(repaired, **few)
    after = attack(repaired, **few, restart=True)
    assert after.robust.mean() < before.robust.mean() - 0.2 and not any(
        "gradient is zero" in text for text in after.warnings
    )
    np.testing.assert_array_equal(attack(repaired, **few).robust, after.robust)
    np.testing.assert_array_equal(attack(repaired, **few | dict(state=None)).robust, after.robust)


def test_all_that_a_result_depends_on_is_compared(tmp_path, monkeypatch):
    file = tmp_path / "state.npz"
    attack(linear, state=file)
    attack(jax.jit(lambda x: linear(x) * np.float32(1 + 1e-5)), state=file)  # to rounding the same network
    with pytest.raises(InputError, match=r"its key differ\)"):
        attack(linear, state=file, key=1)
    with pytest.raises(InputError, match=r"its images differ\)"):  # by a grey level of one pixel
        attack(linear, state=file, x=X + np.float32(1 / 255) * (np.arange(X.size).reshape(X.shape) == 7))
    with pytest.raises(InputError, match=r"its attacks, eps differ\)"):
        attack(linear, state=file, eps=0.06, attacks={"first": one_step(0.06)})
    with pytest.raises(InputError, match=r"its batch_size differ\)"):
        attack(linear, state=file, batch_size=16)
    with pytest.raises(InputError, match=r"its dtype differ\)"):
        attack(jax.jit(lambda x: linear(x).astype(jnp.bfloat16)), state=file)
    with jax.default_matmul_precision("float32"), pytest.raises(InputError, match=r"its precision differ\)"):
        attack(linear, state=file)
    with pytest.raises(InputError, match=r"its precision differ\)"):
        attack(linear, state=file, precision="default")
    monkeypatch.setattr(autoattack, "code_digest", lambda: "of another version")
    with pytest.raises(InputError, match=r"its code differ\).*restart=True"):
        attack(linear, state=file)


def test_the_digest_of_the_code_is_that_of_every_file_of_the_attacks(monkeypatch):
    before = autoattack.code_digest()
    read = autoattack.Path.read_bytes
    monkeypatch.setattr(autoattack.Path, "read_bytes", lambda p: read(p) + b"#" * (p.name == "square.py"))
    autoattack.code_digest.cache_clear()
    assert autoattack.code_digest() != before
    monkeypatch.undo()
    autoattack.code_digest.cache_clear()
    assert autoattack.code_digest() == before


PRINT = np.float32(RNG.normal(size=(3, 2, 5)))


def made(file, **settings):
    """A state with something of everything in it."""
    return progress.Progress(file, {"version": "rand", **settings}, PRINT, X[:3], np.array([True, True, False]))


def test_no_wrong_bit_gives_another_result(tmp_path):
    file = tmp_path / "state.npz"
    state = made(file)
    state.right = np.array([3, 1, 0])
    state.own[0][0] += np.float32(0.01)
    state.finish_attack(np.arange(3), np.array([1, 1, 0]))
    state.own[0][1] -= np.float32(0.02)
    state.own[1][1], state.position, state.seconds = True, 2, [1.5, 0.25]
    state.save()
    wanted = {name: value for name, value in vars(made(file)).items() if name not in ("saved", "file")}
    assert wanted["right"].tolist() == [1, 1, 0] and wanted["position"] == 2
    content, refused = bytearray(file.read_bytes()), 0
    for place in range(0, len(content), 2):
        content[place] ^= 1 << place % 8
        file.write_bytes(content)
        content[place] ^= 1 << place % 8
        try:
            found = vars(made(file))
        except InputError as error:
            refused += 1
            assert "is no state of AutoAttack, or damaged" in str(error) and "restart=True" in str(error)
            continue
        jax.tree.map(np.testing.assert_array_equal, {name: found[name] for name in wanted}, wanted)
    assert refused > len(content) / 4
    file.write_bytes(content[:700])
    with pytest.raises(InputError, match="damaged"):
        made(file)
    assert progress.Progress(file, {"version": "rand"}, PRINT, X[:3], state.clean, True).right is None
