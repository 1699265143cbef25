"""All attacks through one table of guarantees; then what is particular to each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibjax import losses
from ibjax.attacks import geometry
from ibjax.attacks.fgsm import fgsm
from ibjax.attacks.pgd import pgd, stateful_pgd
from ibjax.errors import InputError

RNG = np.random.default_rng(0)
X = jnp.float32(RNG.uniform(size=(6, 5, 4, 3)))
Y = jnp.int32(RNG.integers(0, 4, 6))
WEIGHTS = jnp.float32(RNG.normal(size=(60, 4)) / 4)


def linear(x):
    return x.reshape(x.shape[0], -1) @ WEIGHTS.astype(x.dtype)


def curved(x):
    return jnp.tanh(linear(x)) * 3 + jnp.square(linear(x))[:, ::-1]


def make_pgd(norm, **options):
    eps = {"linf": 0.1, "l2": 0.7}[norm]
    options = {"unroll": False, **options}  # compiles faster; equality with the unrolled loop is a test of its own
    return lambda eps=eps, **more: pgd(norm=norm, eps=eps, step_size=eps / 4, steps=5, **{**options, **more})


ATTACKS = {
    "fgsm-linf": lambda eps=0.1: fgsm(eps=eps),
    "fgsm-l2": lambda eps=0.7: fgsm(norm="l2", eps=eps),
    "fgsm-fast-at": lambda eps=0.1: fgsm(eps=eps, init="uniform", step_size=1.25 * eps),
    "pgd-linf": make_pgd("linf"),
    "pgd-l2": make_pgd("l2"),
    "pgd-margin": make_pgd("linf", loss="margin"),
    "pgd-restarts": make_pgd("linf", restarts=3),
    **{f"pgd-{init}-linf": make_pgd("linf", init=init) for init in geometry.STARTS},
    **{f"pgd-{init}-l2": make_pgd("l2", init=init) for init in geometry.STARTS},
}
NORM = {name: "l2" if name.endswith("l2") else "linf" for name in ATTACKS}
EPS = {"linf": 0.1, "l2": 0.7}


@pytest.fixture(params=list(ATTACKS))
def name(request):
    return request.param


@functools.cache
def program(attack, logits_fn):
    return jax.jit(lambda key, x, y: attack(key, logits_fn, x, y))


def run(attack, x=X, y=Y, key=None, logits_fn=curved):
    return program(attack, logits_fn)(jax.random.key(0) if key is None else key, x, y)


@functools.cache
def attacked(name):
    """The images that an attack makes of X, for several properties."""
    return run(ATTACKS[name]())


def test_x_adv_lies_in_the_eps_ball_and_in_the_box(name):
    x_adv = attacked(name)
    assert x_adv.dtype == X.dtype and x_adv.shape == X.shape
    assert float(geometry.distance(x_adv, X, NORM[name]).max()) <= EPS[NORM[name]] + 1e-6
    assert float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1


def test_eps_zero_returns_x(name):
    np.testing.assert_array_equal(run(ATTACKS[name](eps=0.0)), X)


def test_the_same_key_gives_the_same_result(name):
    np.testing.assert_array_equal(run(ATTACKS[name]()), attacked(name))


def test_the_loss_rises(name):
    x_adv = attacked(name)
    assert losses.cross_entropy(curved(x_adv), Y).mean() > losses.cross_entropy(curved(X), Y).mean()


def test_each_image_is_attacked_by_itself(name):
    """With a key per image, an image's result does not depend on the rest of its batch.

    In float64: the last bits of float32, which do depend on it, now and then turn a sign.
    """
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        x, attack = jnp.asarray(X, jnp.float64), ATTACKS[name]()
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), jnp.arange(6))
        together = run(attack, x, key=keys)
        alone = jnp.concatenate([run(attack, x[i : i + 1], Y[i : i + 1], keys[i : i + 1]) for i in (0, 5)])
    assert together.dtype == x.dtype
    np.testing.assert_allclose(together[np.array([0, 5])], alone, atol=1e-12)


def test_rolled_and_unrolled_agree_and_trace_the_network_once():
    calls = []

    def counted(x):
        calls.append(x.shape)
        return curved(x)

    rolled, unrolled = (run(make_pgd("linf")(unroll=unroll), logits_fn=counted) for unroll in (False, True))
    assert len(calls) == 2
    np.testing.assert_allclose(rolled, unrolled, atol=1e-6)


def test_pgd_on_a_linear_model_hits_the_corner_and_the_sphere():
    """For a margin between two classes the optimum is x + eps·sign(w), or x + eps·w/|w| where the box allows."""
    x = jnp.full((1, 5, 4, 3), 0.5)
    rolled = dict(unroll=False)
    y, other = jnp.array([0]), 1
    w = (WEIGHTS[:, other] - WEIGHTS[:, 0]).reshape(1, 5, 4, 3)

    def two_classes(x):
        return linear(x)[:, :2]

    corner = pgd(loss="margin", eps=0.1, step_size=0.05, steps=10, **rolled)(jax.random.key(0), two_classes, x, y)
    np.testing.assert_allclose(corner, x + 0.1 * jnp.sign(w), atol=1e-6)
    sphere = pgd(loss="margin", norm="l2", eps=0.3, step_size=0.3, steps=40, **rolled)(
        jax.random.key(0), two_classes, x, y
    )
    np.testing.assert_allclose(sphere, x + 0.3 * w / jnp.linalg.norm(w.ravel()), atol=1e-4)


def test_fgsm_is_one_signed_step():
    gradient = jax.grad(lambda x: jnp.sum(losses.cross_entropy(curved(x), Y)))(X)
    np.testing.assert_allclose(run(fgsm(eps="8/255")), jnp.clip(X + 8 / 255 * jnp.sign(gradient), 0, 1), atol=1e-7)


def test_more_steps_and_restarts_do_not_weaken_the_attack():
    def loss(**options):
        return losses.cross_entropy(curved(run(pgd(eps=0.1, step_size=0.02, unroll=False, **options))), Y)

    assert loss(steps=20).mean() >= loss(steps=1).mean()

    right = jnp.argmax(curved(X), 1).astype(jnp.int32)

    def broken(restarts):  # the starts decide: the step is short
        attack = pgd(eps=0.2, step_size=0.01, steps=1, restarts=restarts, unroll=False)
        return int((~losses.correct(curved(run(attack, y=right)), right)).sum())

    assert broken(8) > broken(1)


def test_restarts_prefer_misclassification_over_loss():
    """A start that fools with a small loss wins over one that does not fool with a larger one."""

    # the logits of a one-pixel image: left of 0.5 a large loss without error, right of it an error
    def logits_fn(x):
        v = x.reshape(-1, 1)
        return jnp.where(v > 0.5, jnp.array([[0.0, 0.1, 0.0]]), jnp.array([[0.02, 0.01, 0.0]])) + 0.0 * v

    attack = pgd(eps=0.4, step_size=1e-6, steps=1, restarts=16, unroll=False)
    x_adv = run(attack, jnp.full((1, 1, 1, 1), 0.5), jnp.array([0]), logits_fn=logits_fn)
    assert float(x_adv.squeeze()) > 0.5


def test_kl_to_ones_own_prediction_has_no_gradient_without_a_random_start():
    """Hence TRADES's Gaussian start: at x itself only rounding points anywhere."""
    target = jax.nn.softmax(curved(X))
    slope = jax.grad(lambda x: jnp.sum(losses.kl(curved(x), target)))
    moved = geometry.start(jax.random.key(0), X, "linf", 0.1, "gaussian")
    assert jnp.abs(slope(X)).max() < 1e-5 < 1e-4 < jnp.abs(slope(moved)).max()


def test_eps_and_step_may_be_arrays_one_per_image():
    eps = jnp.linspace(0.0, 0.1, 6)
    x_adv = run(pgd(eps=eps, step_size=eps / 4, unroll=False))
    size = geometry.distance(x_adv, X, "linf")
    assert np.all(size <= eps + 1e-6) and size[0] == 0 and size[5] > 0.09


def test_a_stateful_network_moves_once_per_step():
    options = dict(eps=0.1, step_size=0.05, steps=7, unroll=False)
    attack = jax.jit(lambda n: stateful_pgd(**options)(jax.random.key(0), lambda x, n: (curved(x), n + 1), X, Y, n))
    x_adv, count = attack(jnp.zeros((), jnp.int32))
    assert int(count) == 7
    same = run(pgd(**options))
    np.testing.assert_allclose(x_adv, same, atol=1e-7)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(eps=8), "8/255"),
        (dict(eps=float("nan")), "nan"),
        (dict(eps=-0.1), "-0.1"),
        (dict(eps="8/0"), "8/0"),
        (dict(eps="8/255", norm="l3"), "linf"),
        (dict(norm="l2", eps=128), "l2"),
        (dict(loss="cee"), "'ce'"),
        (dict(init="unifrom"), "'uniform'"),
        (dict(steps=0), "steps=0"),
        (dict(restarts=0), "restarts=0"),
    ],
)
def test_nonsense_is_refused_in_one_line(options, words):
    with pytest.raises(InputError) as caught:
        pgd(**options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_start_distributions():
    """uniform fills the cube, the l2 start fills radii up to eps, gaussian has deviation 0.001."""
    x = jnp.full((400, 8, 8, 3), 0.5)
    delta = np.asarray(geometry.start(jax.random.key(0), x, "linf", 0.2, "uniform") - x)
    assert abs(delta.mean()) < 2e-3 and abs(delta.std() - 0.2 / np.sqrt(3)) < 2e-3
    lengths = np.asarray(geometry.distance(geometry.start(jax.random.key(0), x, "l2", 0.5, "uniform"), x, "l2"))
    assert lengths.max() <= 0.5 and abs(lengths.mean() - 0.25) < 0.03
    delta = np.asarray(geometry.start(jax.random.key(0), x, "linf", 0.2, "gaussian") - x)
    assert abs(delta.std() - 1e-3) < 1e-5
