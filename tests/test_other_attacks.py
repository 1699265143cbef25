"""The attacks beside PGD and AutoAttack: one table of guarantees, then each against an oracle of its own."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from ibjax import losses
from ibjax.attacks import eot as eot_module
from ibjax.attacks.cw import cw
from ibjax.attacks.deepfool import deepfool
from ibjax.attacks.eot import eot, sampled
from ibjax.attacks.mim import mim
from ibjax.attacks.nifgsm import nifgsm
from ibjax.attacks.noise import noise
from ibjax.attacks.pgd import fold_in, pgd
from ibjax.attacks.pgd_adam import pgd_adam
from ibjax.attacks.representation import ara, guides
from ibjax.attacks.spsa import spsa
from ibjax.attacks.targeted import targeted
from ibjax.attacks.transfer import transfer
from ibjax.errors import InputError

RNG = np.random.default_rng(0)
X, WEIGHTS = np.float32(RNG.uniform(size=(6, 5, 4, 3))), np.float32(RNG.normal(size=(60, 4)) / 4)
X[:, 0, 0], X[:, 0, 1] = 0.0, 1.0  # the box's edges too
SURROGATE = WEIGHTS + 0.05 * np.float32(RNG.normal(size=(60, 4)))
KEY = jax.random.key(0)
EPS = {"linf": 0.1, "l2": 0.7}


def linear(x, weights=WEIGHTS):
    return x.reshape(x.shape[0], -1) @ weights


def curved(x):
    tanh = (np if isinstance(x, np.ndarray) else jnp).tanh
    return tanh(linear(x)) * 3 + linear(x)[:, ::-1] ** 2


Y = curved(X).argmax(1).astype(np.int32)  # all are classified correctly


def drawn(key):
    return 0.3 * jax.random.normal(key, WEIGHTS.shape)


def noisy(key, x):
    """A randomised network: other weights at every draw."""
    return curved(x) + linear(x, drawn(key))


def lenient(factory):
    """optax's Adam mixes a float with its integer count, which strict promotion refuses."""

    def make(**options):
        attack = factory(**options)

        def run(*given):
            with jax.numpy_dtype_promotion("standard"):
                return attack(*given)

        return run

    return make


cw, spsa = lenient(cw), lenient(spsa)


def on(fun, attack, target=Y):
    """The attack on `fun` in place of logits, and with its own kind of target for each image."""

    def run(key, logits_fn, x, y):
        rows = jnp.argmin(jnp.sum((x[:, None] - X[None]) ** 2, axis=(2, 3, 4)), axis=1)  # which of X these are
        return attack(key, fun, x, jnp.asarray(target)[rows])

    return run


ROLLED = dict(steps=5, unroll=False)
ATTACKS = {  # name ends with its norm
    "mim-linf": lambda eps=0.1: mim(eps=eps, step_size=eps / 4, **ROLLED),
    "mim-l2": lambda eps=0.7: mim(norm="l2", eps=eps, step_size=eps / 4, init="gaussian", **ROLLED),
    "nifgsm-linf": lambda eps=0.1: nifgsm(eps=eps, step_size=eps / 4, **ROLLED),
    "targeted-random-linf": lambda eps=0.1: targeted(towards="random", eps=eps, step_size=eps / 4, **ROLLED),
    "targeted-l2": lambda eps=0.7: targeted(norm="l2", loss="margin", eps=eps, step_size=eps / 4, restarts=2, **ROLLED),
    "deepfool-linf": lambda eps=0.1: deepfool(eps=eps, steps=9),
    "deepfool-l2": lambda eps=0.7: deepfool(norm="l2", eps=eps, steps=9),
    "pgd_adam-linf": lambda eps=0.1: pgd_adam(loss="ce", eps=eps, step_size=eps, decay=((3, 0.1),), **ROLLED),
    "spsa-linf": lambda eps=0.1: spsa(eps=eps, lr=0.03, steps=5, samples=32),
    "spsa-l2": lambda eps=0.7: spsa(norm="l2", eps=eps, lr=0.05, steps=5, samples=32),
    "cw-l2": lambda eps=0.7: cw(eps=eps, lr=0.05, steps=30),
    "transfer-linf": lambda eps=0.1: transfer(
        attack=pgd(eps=eps, step_size=eps / 4, **ROLLED), surrogate=lambda x: linear(x, SURROGATE)
    ),
    "ara-linf": lambda eps=0.1: on(curved, ara(eps=eps, steps=4), X[guides(Y)]),
    "eot-linf": lambda eps=0.1: on(noisy, eot(attack=pgd, samples=4, eps=eps, step_size=eps / 4, **ROLLED)),
    "noise-uniform-linf": lambda eps=0.1: noise(eps=eps),
    "noise-sign-linf": lambda eps=0.1: noise(kind="sign", eps=eps),
    "noise-uniform-l2": lambda eps=0.7: noise(norm="l2", eps=eps),
    "noise-sign-l2": lambda eps=0.7: noise(kind="sign", norm="l2", eps=eps),
}


@pytest.fixture(params=list(ATTACKS))
def name(request):
    return request.param


@functools.cache
def program(attack, logits_fn):
    return jax.jit(lambda key, x, y: attack(key, logits_fn, x, y))


def run(attack, x=X, y=Y, key=KEY, logits_fn=curved):
    return np.asarray(program(attack, logits_fn)(key, x, y))


@functools.cache
def key_per_image():
    return jax.random.split(jax.random.key(3), 6)


@functools.cache
def within(name):
    """(eps and a key of each image, x, y) -> the images that an attack makes of x; one program for all radii."""
    return jax.jit(lambda eps, keys, x, y: ATTACKS[name](eps=eps)(keys, curved, x, y))


def of_all(name, eps, program=within):
    """The images that an attack makes of X, in balls of these radii."""
    return np.asarray(program(name)(eps, key_per_image(), X, Y))


@functools.cache
def attacked(name):
    """The images that an attack makes of X, for several properties."""
    return of_all(name, np.full(6, EPS[norm_of(name)], np.float32))


def norm_of(name):
    return name.split("-")[-1]


def distance(x_adv, x, norm):
    """Of each image, in float64."""
    difference = np.abs(np.float64(x_adv) - x).reshape(len(x), -1)
    return difference.max(1) if norm == "linf" else np.sqrt((difference**2).sum(1))


def margin(logits, y):
    """The largest other logit less that of the class, above 0 where it is another class."""
    rows = np.arange(len(y))
    others = np.where(np.arange(logits.shape[1]) == np.asarray(y)[:, None], -np.inf, logits)
    return others.max(1) - np.asarray(logits)[rows, y]


@jax.jit
def cross_entropy(x):
    """Of each image, of the network `curved`."""
    return losses.cross_entropy(curved(x), Y)


def test_x_adv_lies_in_the_eps_ball_and_in_the_box(name):
    norm, x_adv = norm_of(name), attacked(name)
    assert x_adv.dtype == X.dtype and x_adv.shape == X.shape
    assert distance(x_adv, X, norm).max() <= EPS[norm] + 1e-6
    assert x_adv.min() >= 0 and x_adv.max() <= 1


def test_eps_zero_returns_x(name):
    np.testing.assert_array_equal(of_all(name, np.zeros(6, np.float32)), X)


def test_the_number_zero_as_eps_returns_x(name):
    """It does not pass for None, which stands for no bound in DeepFool and C&W."""
    np.testing.assert_array_equal(run(ATTACKS[name](eps=0.0)), X)


def test_the_same_key_gives_the_same_result_and_the_eps_may_be_one_per_image(name):
    norm = norm_of(name)
    eps = np.linspace(0.0, 1.0, 6, dtype=np.float32) * np.float32(EPS[norm])
    first = of_all(name, eps)
    np.testing.assert_array_equal(first, of_all(name, eps, within.__wrapped__))  # traced again
    size = distance(first, X, norm)
    assert np.all(size <= eps + 1e-6) and size[5] > 0


def test_each_images_result_is_independent_of_the_others_in_its_batch(name):
    """With a key per image, an image's result does not depend on the rest of its batch."""
    rows, eps = np.array([0, 5]), np.full(2, EPS[norm_of(name)], np.float32)
    pair = within(name)(eps, key_per_image()[rows], X[rows], Y[rows])
    np.testing.assert_allclose(attacked(name)[rows], pair, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in ATTACKS if not name.startswith(("noise", "ara"))], indirect=True)
def test_the_loss_rises(name):
    """Noise and ARA do not look at it."""
    assert np.mean(cross_entropy(attacked(name))) > np.mean(cross_entropy(X))


# ---- momentum ----------------------------------------------------------------------------------------------


BASIC = pgd(eps=0.1, step_size=0.02, init="none", **ROLLED)


@pytest.mark.parametrize("attack", [mim, nifgsm])
def test_without_decay_it_is_the_basic_iterative_method(attack):
    found = run(attack(eps=0.1, step_size=0.02, init="none", decay=0.0, **ROLLED))
    np.testing.assert_allclose(found, run(BASIC), atol=1e-6)


@pytest.mark.parametrize("lookahead", [False, True])
def test_momentum_follows_its_formula_in_numpy(lookahead):
    """On a quadratic loss, whose gradient is written by hand, in float64."""
    a, steps, alpha, mu, eps = RNG.normal(size=60), 6, 0.02, 0.7, 0.09
    x = np.float64(X).reshape(6, 60)
    x_adv, g = x, np.zeros_like(x)
    for _ in range(steps):
        at = x_adv + mu * alpha * g * lookahead
        gradient = 2 * (at @ a)[:, None] * a - 2 * at
        g = mu * g + gradient / np.abs(gradient).mean(1, keepdims=True)
        x_adv = np.clip(np.clip(x_adv + alpha * np.sign(g), x - eps, x + eps), 0, 1)

    def loss(x, target):
        flat = x.reshape(x.shape[0], -1)
        return (flat @ jnp.float32(a)) ** 2 - jnp.sum(flat**2, axis=1)

    attack = (nifgsm if lookahead else mim)(loss=loss, eps=eps, step_size=alpha, steps=steps, decay=mu, unroll=False)
    np.testing.assert_allclose(run(attack, logits_fn=lambda x: x).reshape(6, 60), x_adv, atol=1e-5)


def test_nifgsm_is_mim_with_its_lookahead_and_takes_the_same_options():
    options = dict(eps=0.1, step_size=0.02, decay=0.7, **ROLLED)
    found = run(nifgsm(**options))
    assert np.array_equal(found, run(mim(**options, lookahead=True)))
    assert not np.array_equal(found, run(mim(**options)))
    theirs, ours = (inspect.signature(attack).parameters for attack in (nifgsm, mim))
    assert {**theirs, "lookahead": ours["lookahead"]} == dict(ours)  # types and defaults


def test_momentum_carries_on_where_the_gradient_vanishes():
    """A gradient of zero adds nothing; it is not NaN."""
    y = np.zeros(6, np.int32)

    def flat_beyond(x):  # rises until the first pixel reaches 0.55
        return jnp.stack([0 * x[:, 1, 1, 0], jnp.minimum(x[:, 1, 1, 0], 0.55)], axis=1)

    x = np.full_like(X, 0.5)
    x_adv = run(mim(eps=0.4, step_size=0.1, steps=3, unroll=False), x, y, logits_fn=flat_beyond)
    np.testing.assert_allclose(x_adv[:, 1, 1, 0], 0.8, atol=1e-6)
    assert np.array_equal(run(mim(unroll=False), x, y, logits_fn=lambda x: jnp.zeros((6, 4))), x)


# ---- SPSA --------------------------------------------------------------------------------------------------


def test_spsa_recovers_the_sign_of_a_linear_models_gradient():
    """Adam's first step is lr · sign(g); the estimate's deviation is ‖w‖/√q per pixel."""
    x, y, lr = np.full_like(X, 0.5), np.zeros(6, np.int32), 0.01
    w = (WEIGHTS[:, 1] - WEIGHTS[:, 0]).reshape(5, 4, 3)
    attack = spsa(eps=0.1, steps=1, samples=2048, lr=lr)
    x_adv = run(attack, x, y, logits_fn=lambda x: linear(x)[:, :2])
    clear = np.abs(w) > 5 * np.linalg.norm(w) / np.sqrt(2048)
    assert clear.mean() >= 0.4
    expected = np.broadcast_to(lr * np.sign(w), x.shape)
    np.testing.assert_allclose((x_adv - x)[:, clear], expected[:, clear], atol=1e-6)


def test_spsa_needs_no_gradient():
    """A network of steps has none; the loss rises all the same."""

    def steps(x):
        return jnp.floor(8 * linear(x)) / 8

    x_adv = run(spsa(eps=0.1, delta=0.05, lr=0.03, samples=64), logits_fn=steps)
    reached, before = (margin(np.floor(8 * linear(x)) / 8, Y).mean() for x in (x_adv, X))
    assert reached > before + 0.3
    np.testing.assert_array_equal(run(pgd(init="none", loss="margin", unroll=False), logits_fn=steps), X)


# ---- C&W ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("towards", ["least_likely", "most_likely", "random", "next", 2, "given"])
def test_targeted_pgd_moves_to_its_class_which_is_never_the_true_one(towards):
    """On a linear network: PGD's sign steps up z_t − … end where CE to t is least; t is checked against NumPy."""
    x = 0.5 + 0.1 * (X - 0.5)
    logits, rows = linear(x), np.arange(6)
    y = np.asarray(logits.argmax(1), np.int32)
    masked = np.where(np.eye(4, dtype=bool)[y], np.nan, logits)
    least, most = np.nanargmin(masked, 1), np.nanargmax(masked, 1)
    wanted = {"least_likely": least, "most_likely": most, "next": (y + 1) % 4, 2: np.full(6, 2), "given": least}
    target = (y, least.astype(np.int32)) if towards == "given" else y
    attack = targeted(towards=towards, eps=0.4, step_size=0.1, steps=8, init="none", unroll=False)
    x_adv = run(attack, x, target, logits_fn=linear)
    found = linear(x_adv).argmax(1)
    assert distance(x_adv, x, "linf").max() <= 0.4 + 1e-6
    if towards == "random":
        assert np.all(found != y) and len(set((found - y) % 4)) > 1
    else:
        other = wanted[towards] != y
        np.testing.assert_array_equal(found[other], wanted[towards][other])
        np.testing.assert_array_equal(x_adv[~other], x[~other])
        assert other.sum() >= 4 and (other.all() or towards == 2)
    assert np.all(linear(x_adv)[rows, y] < logits[rows, y] + 1e-6) or towards == 2


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(towards="nearest"), "towards='nearest' is unknown"),
        (dict(towards=True), "towards=True is unknown"),
        (dict(loss="kl"), "the loss 'kl' of a targeted attack is unknown"),
        (dict(towards=4), "towards=4 is no class of the network; give 0 to 3"),
        (dict(towards="given"), "needs the target .labels, target classes"),
    ],
)
def test_a_wrong_target_is_refused_in_one_line(options, words):
    with pytest.raises(InputError, match=words):
        targeted(eps=0.1, **options)(KEY, linear, X, Y)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_deepfool_steps_once_behind_the_boundary_of_a_linear_model(norm):
    """No pixel near the box, four classes: the distance is 1.02 · min_k |z_y − z_k| / ‖w_y − w_k‖_q."""
    x = 0.5 + 0.1 * (X - 0.5)
    logits, weights = np.float64(linear(x)), np.asarray(WEIGHTS, np.float64)
    y = logits.argmax(1).astype(np.int32)
    slopes = weights[:, :, None] - weights[:, None, :]
    lengths = np.abs(slopes).sum(0) if norm == "linf" else np.sqrt(np.square(slopes).sum(0))
    reach = [min(abs(z[k] - z[c]) / lengths[k, c] for c in range(4) if c != k) for z, k in zip(logits, y, strict=True)]
    x_adv = run(deepfool(norm=norm, eps=None), x, y, key=None, logits_fn=linear)
    assert np.all(linear(x_adv).argmax(1) != y)
    np.testing.assert_allclose(distance(x_adv, x, norm), 1.02 * np.array(reach), rtol=1e-4)
    eps = float(np.median(reach)) * 1.02
    bounded = run(deepfool(norm=norm, eps=eps), x, y, key=None, logits_fn=linear)
    far = distance(x_adv, x, norm) > eps
    np.testing.assert_array_equal(bounded, np.where(far[:, None, None, None], x, x_adv))


def test_deepfool_leaves_images_that_are_misclassified_already():
    np.testing.assert_array_equal(run(deepfool(eps=0.1), y=(Y + 1) % 4, key=None), X)


def classified():
    """Images and the classes that the linear model gives them."""
    return X, linear(X).argmax(1).astype(np.int32)


def test_cw_finds_the_nearest_boundary_of_a_linear_model():
    """Two classes, no pixel near the box: the distance is |margin| / ‖w‖."""
    x = 0.5 + 0.1 * (X - 0.5)

    def two(x):
        return linear(x)[:, :2]

    y = two(x).argmax(1).astype(np.int32)
    x_adv = run(cw(c=5.0, steps=1500, lr=0.003), x, y, logits_fn=two)
    exact = np.abs(two(x)[:, 0] - two(x)[:, 1]) / np.linalg.norm(WEIGHTS[:, 0] - WEIGHTS[:, 1])
    assert np.all(two(x_adv).argmax(1) != y)
    size = distance(x_adv, x, "l2")
    assert np.all(size >= exact - 1e-5)
    np.testing.assert_allclose(size, exact, rtol=0.03, atol=2e-3)


def log_softmax(x):
    return jax.nn.log_softmax(linear(x))


SIXTY = dict(c=1.0, lr=0.05, steps=60)
CW = cw(**SIXTY)


def test_cw_on_log_softmax_works_fixed_and_is_inert_in_torchattacks():
    """All logits negative: masking with 0 leaves no classification term, hence no gradient but that of the distance."""
    x, y = classified()

    def broken(attack):
        return (linear(run(attack, x, y, logits_fn=log_softmax)).argmax(1) != y).sum()

    assert broken(CW) == 6
    assert broken(cw(torchattacks_compat=True, **SIXTY)) == 0


def test_cw_moves_pixels_at_the_edge_of_the_box_and_torchattacks_does_not():
    x, y = np.round(X), linear(np.round(X)).argmax(1).astype(np.int32)
    options = dict(c=10.0, lr=0.5, steps=200)
    fixed, theirs = (run(cw(torchattacks_compat=c, **options), x, y, logits_fn=linear) for c in (False, True))
    assert np.all(linear(fixed).argmax(1) != y) and np.isfinite(fixed).all()
    np.testing.assert_array_equal(theirs, x)


def test_cw_returns_x_where_nothing_nearer_than_eps_is_misclassified():
    x, y = classified()
    free = run(CW, x, y, logits_fn=log_softmax)
    sizes = distance(free, x, "l2")
    eps = float(np.sort(sizes)[2:4].mean())  # a bound that half of them keep
    bounded = run(cw(eps=eps, **SIXTY), x, y, logits_fn=log_softmax)
    expected = np.where((sizes < eps)[:, None, None, None], free, x)
    np.testing.assert_allclose(bounded, expected, atol=1e-6)


def test_cw_in_torchattacks_mode_stops_the_whole_batch_at_once():
    """A learning rate that overshoots makes the summed cost rise; the images of the batch then all stop."""
    x, y = classified()
    calls = []

    def counting(x):
        jax.debug.callback(lambda: calls.append(1))
        return linear(x)

    for compat in (False, True):
        calls.clear()
        run(cw(c=0.0, lr=5.0, steps=100, torchattacks_compat=compat), x, y, logits_fn=counting)
        jax.effects_barrier()
        assert (len(calls) < 100) == compat


# ---- randomised networks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attack", "ball"),  # in l_inf, a mean that is rounded differently may turn the sign of a gradient near 0
    [(pgd, dict(norm="l2", eps=0.7)), (mim, dict(norm="l2", eps=0.7)), (nifgsm, dict(eps=0.1))],
)
def test_a_deterministic_network_gives_the_plain_attacks_result(attack, ball):
    options = dict(loss="margin", step_size=ball["eps"] / 5, init="gaussian", **ball, **ROLLED)
    wrapped = eot(attack=attack, samples=3, **options)
    np.testing.assert_allclose(run(wrapped, logits_fn=lambda key, x: curved(x)), run(attack(**options)), atol=1e-5)


def test_the_gradient_is_the_mean_of_the_samples_gradients():
    """Each sample's gradient by itself, then their mean: its sign is the step. The mean logits would go elsewhere."""
    step = eot(attack=pgd, samples=5, steps=1, init="none", eps=0.1, step_size=1e-3, unroll=False)
    x_adv = run(step, logits_fn=noisy)

    draws = jax.jit(lambda x: sampled(fold_in(KEY, eot_module._NOISE), lambda key, x: drawn(key), 5)(x)[1])
    weights = np.float64(draws(X))  # of each sample
    x = np.float64(X).reshape(6, 60)
    h = x @ WEIGHTS

    def gradient(w):
        """Of the cross-entropy, for the network with these random weights."""
        logits = 3 * np.tanh(h) + h[:, ::-1] ** 2 + x @ w
        slope = scipy.special.softmax(logits, axis=1) - np.eye(4)[Y]
        return (slope @ w.T + (3 * slope / np.cosh(h) ** 2 + 2 * h * slope[:, ::-1]) @ WEIGHTS.T).reshape(X.shape)

    each, at_mean_logits = np.stack([gradient(w) for w in weights]), gradient(weights.mean(0))
    mean = each.mean(0)
    inside = (X > 0) & (X < 1) & (np.abs(mean) > 1e-5)
    np.testing.assert_array_equal(np.sign(x_adv - X)[inside], np.sign(mean)[inside])
    assert np.mean((np.sign(mean) != np.sign(at_mean_logits))[inside]) > 0.01


@pytest.mark.parametrize("key", [lambda: KEY, key_per_image], ids=["one", "per image"])
def test_noise_is_fresh_at_every_point_and_the_same_at_the_same_point(key):
    forward = jax.jit(lambda key, x: (*sampled(key, noisy, 3)(x), curved(x)))
    moved = X.copy()
    moved[:, 2, 2, 1] += 1e-6  # one bit or two of one pixel
    mean, draws, exact = map(np.asarray, forward(key(), X))
    np.testing.assert_array_equal(forward(key(), X)[1], draws)
    np.testing.assert_allclose(mean, draws.mean(0), atol=1e-6)
    noise_here, (_, draws, exact) = draws - exact, map(np.asarray, forward(key(), moved))
    assert np.abs(noise_here - (draws - exact)).max(axis=(0, 2)).min() > 0.01
    assert np.abs(noise_here[0] - noise_here[1]).min(axis=1).max() > 0.01


def test_expectation_beats_a_single_draw_on_a_noisy_network():
    """The network's weights drown in noise at each draw; the mean of many is what there is to attack."""

    def drowned(key, x):
        return linear(x, WEIGHTS + 3.0 * jax.random.normal(key, WEIGHTS.shape))

    def reached(samples):
        options = dict(loss="margin", eps=0.1, step_size=0.05, steps=3, init="none", unroll=False)
        attack = eot(attack=pgd, samples=samples, **options)
        return margin(linear(run(attack, logits_fn=drowned)), Y).mean()

    assert reached(400) > reached(1) + 0.3


# ---- transfer, noise, representations ----------------------------------------------------------------------


def test_transfer_attacks_the_surrogate():
    on_surrogate = run(transfer(attack=BASIC, surrogate=lambda x: linear(x, SURROGATE)))
    np.testing.assert_array_equal(on_surrogate, run(BASIC, logits_fn=lambda x: linear(x, SURROGATE)))
    white_box, black_box = (np.mean(cross_entropy(x)) for x in (run(BASIC), on_surrogate))
    assert black_box < white_box


def test_sign_noise_is_at_the_corners_and_uniform_noise_fills_the_ball():
    x = np.full((300, 6, 6, 3), 0.5, np.float32)
    made = (noise(kind="sign", eps=0.1), noise(eps=0.1), noise(kind="sign", norm="l2", eps=1.0))
    drawn = jax.jit(lambda: [attack(KEY, None, x, None) for attack in made])()
    signs, inside, corners = (np.asarray(x_adv) - x for x_adv in drawn)
    np.testing.assert_allclose(np.abs(signs), 0.1, atol=1e-6)
    assert abs(np.mean(signs > 0) - 0.5) < 0.01
    assert abs(inside.std() - 0.1 / np.sqrt(3)) < 1e-3
    np.testing.assert_allclose(distance(corners, 0 * x, "l2"), 1, atol=1e-5)


def test_ara_comes_as_near_to_the_guide_as_scipy():
    import scipy.optimize

    guide, eps, steps = X[guides(Y)], 0.1, 20
    x_adv = run(ara(eps=eps, steps=steps), y=guide)
    reached, start, wanted = (curved(x) for x in (x_adv, X, guide))
    ours, before = (np.sum((z - wanted) ** 2, axis=1) for z in (reached, start))

    @jax.jit
    def value_and_gradient(flat, wanted):
        return jax.value_and_grad(lambda flat: jnp.sum((curved(flat.reshape(1, 5, 4, 3))[0] - wanted) ** 2))(flat)

    for i in range(6):
        lower, upper = (np.clip(np.float64(X[i]).ravel() + side * eps, 0, 1) for side in (-1, 1))

        def both(flat, i=i):
            value, gradient = value_and_gradient(jnp.float32(flat), wanted[i])
            return float(value), np.asarray(gradient, np.float64)

        best = scipy.optimize.minimize(
            both,
            np.float64(X[i]).ravel(),
            jac=True,
            method="L-BFGS-B",
            bounds=scipy.optimize.Bounds(lower, upper),
            options=dict(maxiter=steps),
        ).fun
        assert ours[i] <= best + 0.02 * before[i]
        assert ours[i] < 0.95 * before[i]


def test_guides_are_of_another_class_and_evenly_drawn():
    labels = RNG.integers(0, 5, 4000)
    chosen = guides(labels, seed=1)
    assert np.all(labels[chosen] != labels)
    np.testing.assert_array_equal(chosen, guides(labels, seed=1))
    assert np.any(chosen != guides(labels, seed=2))
    pairs = np.zeros((5, 5))
    np.add.at(pairs, (labels, labels[chosen]), 1)
    rows = pairs.sum(1, keepdims=True)
    off = ~np.eye(5, dtype=bool)
    assert np.all(np.abs((pairs / rows)[off] - 0.25) < 0.08)
    assert len(np.unique(chosen)) > 0.6 * 4000 * (1 - np.exp(-1))


# ---- PGD on a loss of one's own ----------------------------------------------------------------------------


def with_features(x):
    return curved(x), {"tap": linear(x)}


def test_pgd_takes_a_loss_of_logits_and_features():
    """A loss on a tap alone goes where the tap's gradient points; without a tap it is the plain attack."""
    options = dict(eps=0.1, step_size=0.02, steps=5, unroll=False, init="none")

    def away_from_tap(output, target):
        (_, features), (_, tap) = output, target
        return jnp.sum((features["tap"] - tap) ** 2, axis=1)

    x_adv = run(pgd(loss=away_from_tap, **options), y=(Y, linear(X) - 1), logits_fn=with_features)
    x, w = np.float64(X).reshape(6, 60), np.float64(WEIGHTS)
    expected = x
    for _ in range(5):
        gradient = 2 * (expected @ w - (x @ w - 1.0)) @ w.T
        expected = np.clip(np.clip(expected + 0.02 * np.sign(gradient), x - 0.1, x + 0.1), 0, 1)
    np.testing.assert_allclose(x_adv.reshape(6, 60), expected, atol=1e-5)
    np.testing.assert_array_equal(run(BASIC, y=(Y, X), logits_fn=with_features), run(BASIC))


def batch_coupling(output, target):
    """Not a sum over images: the variance of a tap over the batch, less the mean cross-entropy's share."""
    (logits, features), labels = output, target
    return jnp.mean(losses.cross_entropy(logits, labels)) + jnp.sum(jnp.var(features["tap"], axis=0))


@jax.jit
def coupled(x):
    return batch_coupling(with_features(x), Y)


COUPLED = {  # restarts -> attack
    n: pgd(loss=batch_coupling, eps=0.1, step_size=0.05, steps=2, restarts=n, unroll=False) for n in (1, 4)
}


@pytest.mark.parametrize("restarts", COUPLED)
def test_pgd_takes_a_loss_that_couples_the_batch(restarts):
    x_adv = run(COUPLED[restarts], logits_fn=with_features)
    assert distance(x_adv, X, "linf").max() <= 0.1 + 1e-6
    assert coupled(x_adv) > coupled(X) + np.float32(0.1)


def test_restarts_of_a_coupling_loss_keep_the_misclassified_then_the_larger_margin():
    keys = jax.jit(lambda: [jax.random.fold_in(KEY, i) for i in range(4)])()
    runs = np.stack([run(COUPLED[1], key=key, logits_fn=with_features) for key in keys])
    margins = np.stack([margin(curved(x_adv), Y) for x_adv in runs])
    assert len(set(margins.argmax(0))) > 1
    best = runs[margins.argmax(0), np.arange(6)]
    np.testing.assert_allclose(run(COUPLED[4], logits_fn=with_features), best, atol=1e-6)


def test_margin_pgd_breaks_of_a_linear_model_what_the_closed_form_says():
    """Where no pixel meets the box, an image is robust iff its margin exceeds eps · ‖w_y − w_k‖₁."""
    x = np.float32(0.5 + 0.25 * RNG.uniform(-1, 1, (200, 5, 4, 3)))

    def two(x):
        return linear(x)[:, :2]

    y = two(x).argmax(1).astype(np.int32)
    exact = np.abs(two(x)[:, 1] - two(x)[:, 0]) > 0.03 * np.sum(np.abs(WEIGHTS[:, 1] - WEIGHTS[:, 0]))
    attack = pgd(loss="margin", eps=0.03, step_size=0.01, steps=8, init="none", unroll=False)
    np.testing.assert_array_equal(two(run(attack, x, y, logits_fn=two)).argmax(1) == y, exact)
    assert 20 < exact.sum() < 180


# ---- errors ------------------------------------------------------------------------------------------------


def output_is_a_dict():
    return run(pgd(unroll=False), logits_fn=lambda x: {"logits": curved(x)})


def guide_of_another_shape():
    return ara()(KEY, curved, X, X[:3])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: mim(decay=-1.0), "decay"),
        (lambda: mim(steps=0), "steps=0"),
        (lambda: mim(eps=8), "8/255"),
        (lambda: mim(norm="l1", eps=12.0, step_size=1.0), "norm 'l1'"),
        (lambda: noise(norm="l1", eps=12.0), "norm 'l1'"),
        (lambda: spsa(norm="l1", eps=12.0), "norm 'l1'"),
        (lambda: nifgsm(norm="l2", eps=0.5), "mim"),
        (lambda: mim(norm="l2", eps=0.5, lookahead=True), "linf"),
        (lambda: spsa(delta=0.0), "delta"),
        (lambda: spsa(samples=0), "samples"),
        (lambda: spsa(loss="cee"), "'ce'"),
        (lambda: run(spsa(loss=batch_coupling), logits_fn=with_features), "pgd"),
        (lambda: cw(c=-1.0), "c=-1"),
        (lambda: cw(steps=0), "steps=0"),
        (lambda: cw(eps=128), "l2"),
        (lambda: noise(kind="sing"), "'sign'"),
        (lambda: ara(eps=10), "8/255"),
        (guide_of_another_shape, "guide"),
        (lambda: guides(np.zeros(5, int)), "another class"),
        (lambda: run(eot(attack=pgd, samples=0), logits_fn=noisy), "samples"),
        (output_is_a_dict, "tuple"),
        (lambda: run(pgd(loss=lambda z, y: z, unroll=False)), "(6, 4)"),
    ],
)
def test_nonsense_is_refused_in_one_line(call, words):
    with pytest.raises(InputError) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_projected_adam_is_its_formula_step_by_step():
    """In NumPy, on the KL of a linear network: Adam's moments, the decaying rate, ball and box."""
    weights = np.asarray(SURROGATE, np.float64)
    x, eps, target = np.asarray(X, np.float64), 0.1, np.full((len(X), weights.shape[-1]), 1 / weights.shape[-1])
    target[:, 0] += 0.3
    target /= target.sum(1, keepdims=True)
    options = dict(loss="kl", eps=eps, step_size=0.07, decay=((2, 0.1), (4, 0.5)), steps=6, init="none", unroll=False)
    found = jax.jit(lambda x, t: pgd_adam(**options)(KEY, lambda x: linear(x, SURROGATE), x, t))(X, jnp.float32(target))
    made, m, v = x.copy(), np.zeros_like(x), np.zeros_like(x)
    for t in range(6):
        logits = made.reshape(len(x), -1) @ weights.reshape(-1, weights.shape[-1])
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        gradient = ((p - target) @ weights.reshape(-1, weights.shape[-1]).T).reshape(x.shape)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        rate = 0.07 * (0.1 if t >= 2 else 1) * (0.5 if t >= 4 else 1)
        made = made + rate * (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-9)
        made = np.clip(np.clip(made, x - eps, x + eps), 0, 1)
    np.testing.assert_allclose(found, made, atol=2e-5)
    with pytest.raises(InputError, match=r"attack.decay=.* is not allowed"):
        pgd_adam(decay=((5, 0.0),))
    with pytest.raises(InputError, match="norm 'l2' is unknown here"):
        pgd_adam(norm="l2")
