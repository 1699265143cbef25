"""Auto-PGD: its schedule by hand, its rules as a loop over one image, DLR by hand, l1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from ibjax import losses
from ibjax.attacks import geometry
from ibjax.attacks.apgd import apgd, checkpoint_windows, iterative_apgd, larger_eps_stages
from ibjax.attacks.iterative import UNTARGETED
from ibjax.errors import InputError

RNG = np.random.default_rng(0)
IMAGES = np.float32(RNG.uniform(size=(12, 4, 4, 3)))
WEIGHTS = np.float32(RNG.normal(size=(48, 5)) / 3)
BIAS = np.float32(RNG.normal(size=(1, 5)))
X = jnp.asarray(IMAGES)
EPS = {"linf": 0.08, "l2": 0.5, "l1": 2.0}


def curved(x):
    hidden = (np if isinstance(x, np.ndarray) else jnp).tanh(x.reshape(x.shape[0], -1) @ WEIGHTS)
    return hidden[:, ::-1] ** 2 * 2 + hidden + BIAS


Y_ = curved(IMAGES).argmax(1).astype(np.int32)
Y = jnp.asarray(Y_)
NONE = np.full(len(IMAGES), UNTARGETED, np.int32)  # as target class of an attack without one


def test_checkpoints_are_where_the_paper_has_them():
    windows = checkpoint_windows(100, "linf")
    assert list(np.nonzero(windows)[0]) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert list(windows[windows > 0]) == [22, 19, 16, 13, 10, 7, 6, 6]
    assert list(np.nonzero(checkpoint_windows(100, "l1"))[0]) == list(range(4, 101, 4))
    assert list(np.nonzero(checkpoint_windows(10, "linf"))[0]) == [2, 3, 4, 5, 6, 7, 8, 9, 10]


def test_larger_eps_uses_all_steps():
    assert larger_eps_stages(12.0, 100) == [(36.0, 30), (24.0, 30), (12.0, 40)]


def test_dlr_equals_its_formula_and_ignores_shift_and_scale():
    logits = np.float32([[3.0, 1.0, 0.5, -2.0, 2.5], [3.0, 1.0, 0.5, -2.0, 2.5]])
    y, other = np.int32([0, 3]), np.int32([4, 1])
    dlr, dlr_targeted = jax.jit(losses.dlr), jax.jit(losses.dlr_targeted)
    np.testing.assert_allclose(dlr(logits, y), [-(3 - 2.5) / (3 - 1), -(-2 - 3) / (3 - 1)], rtol=1e-6)
    denominator = 3 - (1 + 0.5) / 2
    targeted = [-(3 - 2.5) / denominator, -(-2 - 1) / denominator]
    np.testing.assert_allclose(dlr_targeted(logits, y, other), targeted, rtol=1e-6)
    np.testing.assert_allclose(dlr(7 * logits - 4, y), dlr(logits, y), rtol=1e-5)
    np.testing.assert_allclose(dlr_targeted(7 * logits - 4, y, other), targeted, rtol=1e-5)


def by_the_book(x, y, x_start, loss, eps, norm, steps, until):
    """APGD on one image with the whole buffer of losses, index −1 included."""

    def evaluate(x_adv):
        value, gradient, logits = loss(x_adv, y)
        return float(value), np.asarray(gradient), int(np.argmax(logits)) != int(y[0])

    def project(u):
        if norm == "linf":
            return np.clip(np.clip(u, x - eps, x + eps), 0, 1)
        d = u - x
        return np.clip(x + d * min(1, eps / max(np.sqrt((d**2).sum()), 1e-12)), 0, 1)

    x_adv = x_before = x_best = x_start
    value, gradient, wrong = evaluate(x_adv)
    found = x_adv if wrong else None
    best, g_best, checked, halved, eta, buffer = value, gradient, value, True, 2 * eps, np.zeros(steps, np.float32)
    k, since = max(int(0.22 * steps), 1), 0
    for i in range(until):
        direction = np.sign(gradient) if norm == "linf" else gradient / (np.sqrt((gradient**2).sum()) + 1e-12)
        a = 0.75 if i else 1.0
        u = project(x_adv + eta * direction)
        x_adv, x_before = project(x_adv + a * (u - x_adv) + (1 - a) * (x_adv - x_before)), x_adv
        value, gradient, wrong = evaluate(x_adv)
        found = x_adv if wrong else found
        buffer[i] = value
        if value > best:
            best, x_best, g_best = value, x_adv, gradient
        since += 1
        if since == k:
            rises = sum(buffer[i - j] > buffer[i - j - 1] for j in range(k))
            reduce = rises <= 0.75 * k or (not halved and checked >= best)
            halved, checked = reduce, best
            if reduce:
                eta, x_adv, gradient = eta / 2, x_best, g_best
            k, since = max(k - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1)), 0
    return x if found is None else found, eta, best


@pytest.mark.parametrize("norm, loss", [("linf", "ce"), ("linf", "dlr"), ("l2", "ce")])
def test_it_is_the_algorithm_by_the_book(norm, loss):
    """Step size, largest loss and misclassified image after checkpoints; at convergence rounding decides."""
    steps, until, eps = 100, 60 if norm == "linf" else 25, EPS[norm]
    attack = iterative_apgd(loss, norm, eps, steps)
    first = begun(attack, 3)
    state, result = run_all(attack, first, until + 1)
    start = np.asarray(first.x)
    per_example = {"ce": losses.cross_entropy, "dlr": losses.dlr}[loss]

    @jax.jit
    def all_losses(x):
        (_, (values, logits)), gradients = jax.value_and_grad(
            lambda x: (jnp.sum(per_example(curved(x), Y)), (per_example(curved(x), Y), curved(x))), has_aux=True
        )(x)
        return values, gradients, logits

    same = []
    for n in range(len(X)):

        def function(x, y, n=n):  # the other images stand by, so that both round alike
            images = IMAGES.copy()
            images[n] = x[0]
            values, gradients, logits = map(np.asarray, all_losses(images))
            return values[n], gradients[n][None], logits[n]

        at = slice(n, n + 1)
        image, eta, best = by_the_book(IMAGES[at], Y_[at], start[at], function, eps, norm, steps, until)
        same.append(
            float(state.step_size[n]) == pytest.approx(eta)
            and float(state.loss_best[n]) == pytest.approx(best, rel=1e-4, abs=1e-5)
            and np.allclose(result[at], image, atol=1e-3)
        )
    assert np.sum(same) >= 10
    assert 0 < np.sum(state.found) < len(X)


def begun(attack, seed=0):
    """The state of an attack on all images before its first step."""
    return jax.jit(lambda: attack.init(jax.random.split(jax.random.key(seed), len(X)), 0, X, Y))()


def run_all(attack, state, steps):
    """(state after so many steps, the images then)."""
    step = lambda i, state: attack.step(i, curved, X, Y, NONE, state)  # noqa: E731

    @jax.jit
    def run(state):
        state = jax.lax.fori_loop(0, steps, step, state)
        return state, attack.x_adv(X, state)

    return jax.device_get(run(state))


def test_the_loss_before_the_first_step_does_not_count_at_the_first_checkpoint():
    """Cross-entropy rises above the 0 that stands for it; DLR, which is below 0 for a right image, does not."""
    rises = {}
    for loss in ("ce", "dlr"):
        attack = iterative_apgd(loss, "linf", 1e-6, 100)
        state = begun(attack)
        for i in range(2):  # the start, and the first step
            state = attack.step(i, curved, X, Y, NONE, state)
        rises[loss] = state.rises
    np.testing.assert_array_equal(rises["ce"], 1)
    np.testing.assert_array_equal(rises["dlr"], 0)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l1 larger_eps"])
@pytest.mark.parametrize("options", [dict(loss="dlr"), dict(loss="dlr_targeted", targets=2, restarts=2)])
def test_guarantees(norm, options):
    """x_adv lies in ball and box; wrong and unbroken images come back unchanged; no image sees another."""
    y = np.where(np.arange(len(X)) < 3, (Y_ + 1) % 5, Y_)
    norm, _, schedule = norm.partition(" ")
    made = apgd(norm=norm, eps=EPS[norm], steps=12, larger_eps=bool(schedule), **options)

    @jax.jit
    def attacked(numbers, x, y):
        x_adv = made(jax.random.split(jax.random.key(1), len(X))[numbers], curved, x, y)
        return x_adv, geometry.distance(x_adv, x, norm)

    numbers = np.arange(len(X))
    x_adv, distances = map(np.asarray, attacked(numbers, IMAGES, y))
    assert distances.max() <= EPS[norm] + 1e-6
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    np.testing.assert_array_equal(x_adv[:3], IMAGES[:3])
    broken = np.argmax(curved(x_adv), 1) != y
    np.testing.assert_array_equal(np.any(x_adv != IMAGES, axis=(1, 2, 3)), broken & (numbers >= 3))
    assert broken[3:].sum() > 0
    others = IMAGES[::-1].copy()
    others[::2] = 0.5  # half of the batch are other images
    turned, _ = attacked(numbers[::-1], others, y[::-1])
    np.testing.assert_allclose(turned[1::2], x_adv[::-1][1::2], atol=1e-5)


def test_targets_beyond_the_classes_are_left_out():
    """Of five classes four are others: nine targets make the program of four, and not that of three."""

    def program(targets):
        attack = apgd(loss="dlr_targeted", eps=0.08, steps=3, targets=targets)
        return jax.jit(lambda x, y: attack(jax.random.key(0), curved, x, y)).lower(IMAGES, Y_).as_text()

    assert program(9) == program(4) != program(3)


def test_a_gradient_is_the_mean_over_samples_of_a_random_network():
    """With noise on the logits' slope, 400 samples find the direction that one sample misses."""

    def noisy(x, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, (48, 5)))(keys) * 3
        flat = x.reshape(x.shape[0], -1)
        return jnp.einsum("bi,bij->bj", flat, WEIGHTS[None] + noise)

    x = jnp.full((1, 4, 4, 3), 0.5)
    other, y = jnp.array([1]), jnp.array([0])
    agreement = []
    for samples in (1, 400):
        attack = iterative_apgd("margin_targeted", "linf", 0.1, 1, targets=1, eot=samples)
        state = attack.step(0, noisy, x, y, other, attack.init(jax.random.split(jax.random.key(0), 1), 0, x, y))
        wanted = np.asarray(WEIGHTS[:, 1] - WEIGHTS[:, 0]).reshape(4, 4, 3)
        np.testing.assert_allclose(state.gradient_best[0], wanted, atol=1.0 if samples == 400 else 30)
        agreement.append(np.mean(np.sign(state.gradient_best[0]) == np.sign(wanted)))
    assert agreement[0] < 0.75 < 0.8 < agreement[1]


# ---- l1 ------------------------------------------------------------------------------------------------------


def test_the_l1_projection_is_the_nearest_point_of_ball_and_box():
    """Against a quadratic programme's solver, on six pixels."""
    project = jax.jit(lambda z, x, eps: geometry.project(z, x, "l1", eps))
    for trial in range(12):
        rng = np.random.default_rng(trial)
        x, z = rng.uniform(size=6), rng.normal(size=6) * 2
        eps = rng.uniform(0.1, 3)
        found = np.asarray(project(np.float32(z).reshape(1, 1, 6, 1), np.float32(x).reshape(1, 1, 6, 1), eps))
        # u = x + p − q with p, q ≥ 0 and Σ(p + q) ≤ ε
        objective = lambda pq, x=x, z=z: np.sum((x + pq[:6] - pq[6:] - z) ** 2)  # noqa: E731
        box = [(0, max(1 - value, 0)) for value in x] + [(0, value) for value in x]
        ball = dict(type="ineq", fun=lambda pq, eps=eps: eps - pq.sum())
        solved = optimize.minimize(objective, np.zeros(12), bounds=box, constraints=ball, method="SLSQP", tol=1e-12)
        np.testing.assert_allclose(found.reshape(-1), x + solved.x[:6] - solved.x[6:], atol=2e-4)
        assert np.abs(found.reshape(-1) - x).sum() <= eps + 1e-6


def test_l1_adapts_sparsity_and_step_as_the_paper_says():
    """The share of pixels is that of the best point over 1.5, and a step that does not get sparser shrinks by 1.5."""
    eps, steps = EPS["l1"], 100
    attack = iterative_apgd("ce", "l1", eps, steps)
    state = begun(attack)
    step = jax.jit(lambda i, state: attack.step(i, curved, X, Y, NONE, state))
    for i in range(5):
        before, state = state, step(i, state)
        if i == 0:
            np.testing.assert_allclose(state.top, 0.2)
            np.testing.assert_allclose(state.step_size, eps)
        if 0 < i < 4:
            np.testing.assert_array_equal(state.top, before.top)
    nonzero = np.sum((np.asarray(state.x_best) != IMAGES).reshape(len(X), -1), 1)
    np.testing.assert_allclose(state.top, nonzero / 48 / 1.5, rtol=1e-6)
    sparser = nonzero < 0.95 * 48
    np.testing.assert_allclose(state.step_size, np.where(sparser, eps, eps / 1.5), rtol=1e-6)
    moved = np.sum(np.asarray(_one_sign(state)) != 0, axis=(1, 2, 3))
    np.testing.assert_array_equal(moved, 48 - np.clip((1 - np.asarray(state.top)) * 48, 0, 47).astype(int))


def _one_sign(state):
    from ibjax.attacks.apgd import _sparse_sign

    return jax.jit(_sparse_sign)(np.float32(RNG.normal(size=X.shape)), state.top)


def test_larger_eps_ends_in_the_ball_asked_for():
    attack = apgd(norm="l1", eps=2.0, steps=30, larger_eps=True)
    x_adv = np.asarray(jax.jit(lambda: attack(jax.random.key(0), curved, X, Y))())
    assert np.abs(x_adv - IMAGES).sum((1, 2, 3), dtype=np.float64).max() <= 2 + 1e-6
    assert np.any(x_adv != IMAGES)


def test_with_and_without_a_target_class_an_image_climbs_its_own_loss():
    """Cross-entropy and targeted DLR are one program; neither value nor gradient of an image has a bit of the other."""
    both = iterative_apgd("dlr_targeted", "linf", 0.1, 2)
    assert both.functions() == iterative_apgd("ce", "linf", 0.1, 2).functions()
    assert both.functions() != iterative_apgd("ce", "linf", 0.2, 2).functions()
    target, odd = (Y_ + 1) % 5, np.arange(len(X)) % 2 == 1
    state = begun(both)
    step = jax.jit(lambda other: both.step(0, curved, X, Y, other, state))
    mixed, plain, towards = (step(other) for other in (np.where(odd, target, NONE), NONE, target))
    for name in ("loss_best", "gradient_best", "x"):
        mixed_, plain_, towards_ = (np.asarray(getattr(each, name)) for each in (mixed, plain, towards))
        np.testing.assert_array_equal(mixed_[~odd], plain_[~odd])
        np.testing.assert_array_equal(mixed_[odd], towards_[odd])
        assert np.any(plain_ != towards_)
    logits = curved(np.asarray(state.x))
    expected = jax.jit(lambda z: (losses.cross_entropy(z, Y), losses.dlr_targeted(z, Y, target)))(logits)
    np.testing.assert_allclose(plain.loss_best, expected[0], rtol=1e-5)
    np.testing.assert_allclose(towards.loss_best, expected[1], rtol=1e-4)


@pytest.mark.parametrize("loss, classes", [("dlr", 2), ("dlr_targeted", 3)])
def test_too_few_classes_are_named_with_what_to_do(loss, classes):
    with pytest.raises(InputError, match=f"there are {classes}; give loss='{loss.replace('dlr', 'margin')}'"):
        jax.eval_shape(lambda x: apgd(loss=loss)(jax.random.key(0), lambda x: curved(x)[:, :classes], x, 0 * Y_), X)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(loss="dlrt"), "did you mean 'dlr'"),
        (dict(norm="l3"), "norm 'l3'"),
        (dict(eps=8), "8/255"),
        (dict(steps=0), "steps=0"),
        (dict(larger_eps=True), "schedule of l1"),
        (dict(larger_eps=True, norm="l1", eps=2.0, steps=1), "at least 2"),
    ],
)
def test_bad_arguments_are_named(options, words):
    with pytest.raises(InputError, match=words):
        apgd(**options)
