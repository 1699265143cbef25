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
X = np.float32(RNG.uniform(size=(6, 5, 4, 3)))
Y = np.int32(RNG.integers(0, 4, 6))
WEIGHTS = np.float32(RNG.normal(size=(60, 4)) / 4)
KEY = jax.random.key(0)


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
def program(name):
    """(key, eps, x, y) -> x_adv, compiled once for every eps."""
    return jax.jit(lambda key, eps, x, y: ATTACKS[name](eps)(key, curved, x, y))


@functools.cache
def attacked(name):
    """The images that an attack makes of X, for several properties."""
    return np.asarray(program(name)(KEY, EPS[NORM[name]], X, Y))


def run(attack, x=X, y=Y, logits_fn=curved):
    return np.asarray(jax.jit(lambda key, x, y: attack(key, logits_fn, x, y))(KEY, x, y))


def distance(x_adv, x, norm):
    """The length of each image's perturbation, in float64."""
    delta = np.float64(x_adv).reshape(len(x), -1) - np.float64(x).reshape(len(x), -1)
    return np.linalg.norm(delta, {"linf": np.inf, "l2": 2}[norm], axis=1)


@jax.jit
def loss(x):
    return losses.cross_entropy(curved(x), Y)


def test_x_adv_lies_in_the_eps_ball_and_in_the_box(name):
    x_adv = attacked(name)
    assert x_adv.dtype == X.dtype and x_adv.shape == X.shape
    assert distance(x_adv, X, NORM[name]).max() <= EPS[NORM[name]] + 1e-6
    assert x_adv.min() >= 0 and x_adv.max() <= 1


def test_eps_zero_returns_x(name):
    np.testing.assert_array_equal(program(name)(KEY, 0.0, X, Y), X)


def test_the_number_zero_as_eps_returns_x(name):
    np.testing.assert_array_equal(run(ATTACKS[name](eps=0.0)), X)


def test_the_same_key_gives_the_same_result(name):
    """Traced and compiled once more: nothing is drawn but from the key."""
    np.testing.assert_array_equal(program.__wrapped__(name)(KEY, EPS[NORM[name]], X, Y), attacked(name))


def test_the_loss_rises(name):
    assert loss(attacked(name)).mean() > loss(X).mean()


def test_each_images_result_is_independent_of_the_others_in_its_batch(name):
    """With a key per image, an image's result does not depend on the rest of its batch.

    In float64: the last bits of float32, which do depend on it, now and then turn a sign.
    """
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        x, eps, keys = np.float64(X), EPS[NORM[name]], jax.random.split(jax.random.key(3), 6)
        together = program(name)(keys, eps, x, Y)
        alone = [program(name)(keys[i : i + 1], eps, x[i : i + 1], Y[i : i + 1])[0] for i in (0, 5)]
    assert together.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(together)[[0, 5]], alone, atol=1e-12)


def test_rolled_and_unrolled_agree_and_trace_the_network_once():
    calls = []

    def counted(x):
        calls.append(x.shape)
        return curved(x)

    attacks = (pgd(eps=0.1, step_size=0.03, steps=2, init="none", unroll=unroll) for unroll in (False, True))
    rolled, unrolled = (run(attack, logits_fn=counted) for attack in attacks)
    assert len(calls) == 2
    np.testing.assert_allclose(rolled, unrolled, atol=1e-6)


def test_pgd_on_a_linear_model_hits_the_corner_and_the_sphere():
    """For a margin between two classes the optimum is x + eps·sign(w), or x + eps·w/|w| where the box allows."""
    x, y, other = np.full((1, 5, 4, 3), 0.5, np.float32), np.array([0]), 1
    w = (WEIGHTS[:, other] - WEIGHTS[:, 0]).reshape(1, 5, 4, 3)

    def two_classes(x):
        return linear(x)[:, :2]

    rolled = dict(loss="margin", unroll=False)
    corner = run(pgd(eps=0.1, step_size=0.05, steps=10, **rolled), x, y, two_classes)
    np.testing.assert_allclose(corner, x + 0.1 * np.sign(w), atol=1e-6)
    sphere = run(pgd(norm="l2", eps=0.3, step_size=0.3, steps=40, **rolled), x, y, two_classes)
    np.testing.assert_allclose(sphere, x + 0.3 * w / np.linalg.norm(w), atol=1e-4)


def test_fgsm_is_one_signed_step():
    gradient = jax.jit(jax.grad(lambda x: loss(x).sum()))(X)
    np.testing.assert_allclose(run(fgsm(eps="8/255")), np.clip(X + 8 / 255 * np.sign(gradient), 0, 1), atol=1e-7)


def test_more_steps_and_restarts_do_not_weaken_the_attack():
    @jax.jit
    def one_step(eps, step_size, y):
        return pgd(eps=eps, step_size=step_size, steps=1, unroll=False)(KEY, curved, X, y)

    assert loss(attacked("pgd-uniform-linf")).mean() >= loss(one_step(0.1, 0.025, Y)).mean()  # five steps

    logits = jax.jit(curved)
    right = np.argmax(logits(X), 1).astype(np.int32)
    eight = run(pgd(eps=0.2, step_size=0.01, steps=1, restarts=8, unroll=False), y=right)
    broken = [np.sum(np.argmax(logits(x_adv), 1) != right) for x_adv in (one_step(0.2, 0.01, right), eight)]
    assert broken[1] > broken[0]  # the starts decide: the step is short


def test_restarts_prefer_misclassification_over_loss():
    """A start that fools with a small loss wins over one that does not fool with a larger one."""

    # the logits of a one-pixel image: left of 0.5 a large loss without error, right of it an error
    def logits_fn(x):
        v = x.reshape(-1, 1)
        return jnp.where(v > 0.5, jnp.array([[0.0, 0.1, 0.0]]), jnp.array([[0.02, 0.01, 0.0]])) + 0.0 * v

    attack = pgd(eps=0.4, step_size=1e-6, steps=1, restarts=16, unroll=False)
    assert run(attack, np.full((1, 1, 1, 1), 0.5, np.float32), np.array([0]), logits_fn).item() > 0.5


def test_kl_to_ones_own_prediction_has_no_gradient_without_a_random_start():
    """Hence TRADES's Gaussian start: at x itself only rounding points anywhere."""

    @jax.jit
    def slopes(x):
        target = jax.nn.softmax(curved(x))
        slope = jax.grad(lambda x: jnp.sum(losses.kl(curved(x), target)))
        moved = geometry.start(KEY, x, "linf", 0.1, "gaussian")
        return jnp.abs(slope(x)).max(), jnp.abs(slope(moved)).max()

    at_x, beside_it = slopes(X)
    assert at_x < 1e-5 < 1e-4 < beside_it


def test_eps_and_step_may_be_arrays_one_per_image():
    eps = np.linspace(0.0, 0.1, 6, dtype=np.float32)
    size = distance(run(pgd(eps=eps, step_size=eps / 4, unroll=False)), X, "linf")
    assert np.all(size <= eps + 1e-6) and size[0] == 0 and size[5] > 0.09


def test_a_stateful_network_moves_once_per_step():
    options = dict(eps=0.1, step_size=0.05, steps=7, unroll=False)
    attack = jax.jit(lambda n: stateful_pgd(**options)(KEY, lambda x, n: (curved(x), n + 1), X, Y, n))
    x_adv, count = attack(np.int32(0))
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
    x = np.full((400, 8, 8, 3), 0.5, np.float32)

    @jax.jit
    def starts(x):
        kinds = (("linf", 0.2, "uniform"), ("l2", 0.5, "uniform"), ("linf", 0.2, "gaussian"))
        return [geometry.start(KEY, x, *kind) for kind in kinds]

    cube, ball, near = map(np.asarray, starts(x))
    assert abs((cube - x).mean()) < 2e-3 and abs((cube - x).std() - 0.2 / np.sqrt(3)) < 2e-3
    lengths = distance(ball, x, "l2")
    assert lengths.max() <= 0.5 and abs(lengths.mean() - 0.25) < 0.03
    assert abs((near - x).std() - 1e-3) < 1e-5
