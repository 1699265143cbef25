"""SiRIIB's losses against NumPy, and where its gradients and statistics go."""

import functools

import jax
import numpy as np
import pytest
from conftest import in_programs
from test_models import random_variables

from ibjax import losses
from ibjax.errors import InputError
from ibjax.models import resnet, siriib
from ibjax.net import linen_net
from ibjax.objectives import siriib as method
from ibjax.objectives.pgd_at import pgd_at
from ibjax.objectives.te import te
from ibjax.objectives.trades import trades
from ibjax.step import trainable, with_trainable

BACKBONE = dict(name="resnet", blocks=(1,), width=4)
MODEL = siriib.Model(4, backbone=BACKBONE, connections=2, scales=(8,), widths=(3, 5))
RNG = np.random.default_rng(0)
IMAGES = np.float32(RNG.random((6, 8, 8, 3)))
X_ADV = np.float32(np.clip(IMAGES + 0.05 * RNG.normal(size=IMAGES.shape), 0, 1))
BATCH = {
    "image": IMAGES,
    "label": np.arange(6, dtype=np.int32) % 4,
    "index": np.arange(6, dtype=np.int32),
    "epoch": np.float32(120),  # where TE's term counts
    "step": np.int32(0),
}
ORIGINAL = {"pgd_at": pgd_at(), "trades": trades(beta=6.0), "te": te(), "te_trades": te(base="trades", beta=6.0)}
NET = in_programs(linen_net(MODEL))
KEY = jax.random.key(3)


@functools.cache
def initial():
    """Variables of the network."""
    return random_variables(MODEL, IMAGES.shape)


@functools.cache
def computed(base):
    """What an objective and SiRIIB on it compute, with its terms and without, as one program."""
    whole, bare = method.siriib(base=base, lam=3.0, lam_tau=0.05), method.siriib(base=base, lam=0.0, lam_tau=0.0)

    @jax.jit
    def compute(variables):
        given = NET, variables, BATCH, X_ADV
        of_base = jax.random.split(KEY)[0]  # the key with which SiRIIB calls the loss of its base
        return {
            "adv": NET.forward(variables, X_ADV, KEY)[0][1],
            "clean": NET.forward(variables, IMAGES, KEY)[0][1],
            "plain": ORIGINAL[base].loss(*given, of_base),
            "whole": whole.loss(*given, KEY),
            "bare": bare.loss(*given, KEY),
            "proxy": whole.proxy(*given, KEY),
        }

    return compute({**initial(), "memory": np.float32(np.random.default_rng(1).random((6, 4)))})


def svd_oracle(x_avg, x, distance):
    x_avg, x = (np.moveaxis(np.asarray(images, np.float64), -1, 1) for images in (x_avg, x))
    (u, s, vt), (u0, s0, vt0) = (np.linalg.svd(images) for images in (x_avg, x))
    return distance(s, s0) + distance(u @ vt, u0 @ vt0) + distance(x_avg, x)


def numpy_distance(name):
    if name == "mse":
        return lambda a, b: np.mean((a - b) ** 2)
    if name == "fro_batch":
        return lambda a, b: np.linalg.norm(a - b)
    return lambda a, b: np.mean(np.linalg.norm((a - b).reshape(*a.shape[:2], -1), axis=-1))


@pytest.mark.parametrize("name", list(method.DISTANCES))
def test_the_singular_loss_is_its_formula(name):
    got = jax.jit(lambda x_avg: method.svd_loss(x_avg, IMAGES, method.DISTANCES[name]))(X_ADV)
    np.testing.assert_allclose(got, svd_oracle(X_ADV, IMAGES, numpy_distance(name)), rtol=1e-3)


@pytest.mark.parametrize("name", list(method.DISTANCES))
def test_the_singular_loss_and_its_gradient_are_exact_in_float64(name):
    """The value against NumPy; the gradient, through singular values and polar factor, against differences of it."""
    rng = np.random.default_rng(0)
    x, x_avg, direction = rng.uniform(size=(3, 2, 6, 6, 3))
    direction -= 0.5

    def oracle(t):
        return svd_oracle(x_avg + t * direction, x, numpy_distance(name))

    with jax.enable_x64(True):
        d, step = method.DISTANCES[name], 1e-5
        value, gradient = jax.jit(jax.value_and_grad(lambda a: method.svd_loss(a, x, d)))(x_avg)
        np.testing.assert_allclose(value, oracle(0), rtol=1e-10)
        # of fourth order: errors of step⁴ and of rounding over step are far below 1e-5
        slope = (8 * (oracle(step) - oracle(-step)) - (oracle(2 * step) - oracle(-2 * step))) / (12 * step)
        np.testing.assert_allclose(np.sum(np.asarray(gradient) * direction), slope, rtol=1e-6)


singular_loss = jax.jit(jax.value_and_grad(method.svd_loss, argnums=(0, 1)))


@pytest.mark.parametrize("image", [0.0, 0.5, 1.0])
def test_the_singular_loss_is_finite_on_flat_images(image):
    flat = np.full((2, 8, 8, 3), image, np.float32)
    for a, b in ((flat, IMAGES[:2]), (IMAGES[:2], flat), (flat, flat)):
        value, (gradient, _) = singular_loss(a, b)
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_the_singular_loss_of_equal_images_is_zero():
    assert float(singular_loss(IMAGES[:2], IMAGES[:2])[0]) == 0


def test_the_clean_image_is_a_target_without_gradient():
    """But for that of the mean square of their difference."""
    x_avg, x = X_ADV[:2], IMAGES[:2]
    _, (_, clean_gradient) = singular_loss(x_avg, x)
    np.testing.assert_allclose(clean_gradient, 2 * (x - x_avg) / x.size, atol=1e-6)


def test_the_information_loss_sums_over_connections():
    shapes = {"info1": (2, 4, 4, 3), "info2": (2, 2, 2, 5), "stem": (7,)}
    a, b = (
        {name: np.full(shape, value, np.float32) for (name, shape), value in zip(shapes.items(), values, strict=True)}
        for values in ((1, 0, 1), (0, 3, 0))
    )

    @jax.jit
    def found(a, b):
        def gradient(stop):
            return jax.grad(lambda clean: method.info_loss(a, {**b, "info1": clean}, stop=stop))(b["info1"])

        return method.info_loss(a, b), method.info_loss({}, {}), gradient(stop=True), gradient(stop=False)

    total, of_none, stopped, free = found(a, b)
    assert float(total) == 1 + 9
    assert float(of_none) == 0
    assert not np.any(stopped) and np.any(free)


def test_without_a_gradient_to_the_clean_features_descent_enlarges_their_difference():
    """f = w h with h(x') < h(x): the reason why the clean features are not a mere target."""
    h_adv, h = np.full((1, 2, 2, 1), 0.9, np.float32), np.ones((1, 2, 2, 1), np.float32)

    def loss(w, stop):
        return method.info_loss({"info1": w * h_adv}, {"info1": w * h}, stop=stop)

    @jax.jit
    def losses_of_descent(w):
        return loss(w, False), [loss(w - jax.grad(loss)(w, stop), False) for stop in (False, True)]

    before, after = losses_of_descent(1.0)
    assert after[0] < before < after[1]


@pytest.mark.parametrize("base", ["pgd_at", "trades"])
def test_the_loss_is_its_formula(base):
    found = computed(base)
    adv, clean, (plain, _), (loss, (_, metrics)) = (found[name] for name in ("adv", "clean", "plain", "whole"))
    svd = svd_oracle(adv["x_avg"], IMAGES, numpy_distance("mse"))
    info = sum(np.mean(np.square(np.asarray(adv[k], np.float64) - clean[k])) for k in ("info1", "info2"))
    np.testing.assert_allclose([metrics["svd"], metrics["info"]], [svd, info], rtol=1e-3)
    np.testing.assert_allclose(loss, plain + 3.0 * (svd + info) + 0.05 * adv["orthogonality"], rtol=1e-4)


def test_without_its_terms_it_is_the_base_but_for_the_added_parts_statistics():
    """PGD-AT has no pass over x: the one for L_info moves the statistics of the added parts only."""
    found = computed("pgd_at")
    (plain, (plain_after, _)), (loss, (after, _)) = found["plain"], found["bare"]
    np.testing.assert_allclose(loss, plain, rtol=1e-6)
    for name, statistics in plain_after["batch_stats"].items():
        same = [
            np.array_equal(a, b)
            for a, b in zip(*map(jax.tree.leaves, (statistics, after["batch_stats"][name])), strict=True)
        ]
        assert not all(same) if name in method.ADDED else all(same), name


@pytest.mark.parametrize("base", list(method.BASES))
def test_a_weight_perturbation_climbs_the_loss_of_the_base(base):
    found = computed(base)
    (plain, _), (loss, _) = found["plain"], found["whole"]
    np.testing.assert_allclose(found["proxy"], plain, rtol=1e-6)
    assert abs(float(loss) - float(plain)) > 0.1  # what it leaves out


def test_beside_a_plain_classifier_the_two_are_trained_apart():
    """connections=0: the classifier's gradient is PGD-AT's, and the calibration has none of the cross-entropy's."""
    alone = siriib.Model(4, backbone=BACKBONE, connections=0, scales=(8, 4))
    net = linen_net(alone)
    variables = {"batch_stats": {}, **jax.jit(alone.init)(jax.random.key(0), IMAGES)}

    def gradient(objective):
        def loss(params):
            return objective.loss(net, with_trainable(variables, params), BATCH, X_ADV, KEY)[0]

        return jax.jit(jax.grad(loss))(trainable(variables))["params"]

    both, plain = gradient(method.siriib(lam=1.0)), gradient(pgd_at())
    for name, part in both.items():
        compared = [
            np.allclose(a, b, atol=1e-6) for a, b in zip(*map(jax.tree.leaves, (part, plain[name])), strict=True)
        ]
        assert not all(compared) if name == "calibration" else all(compared), name
    assert not any(leaf.any() for leaf in jax.tree.leaves(plain["calibration"]))
    metrics = jax.jit(lambda: method.siriib().loss(net, variables, BATCH, X_ADV, KEY)[1][1])()
    assert float(metrics["info"]) == 0 and float(metrics["svd"]) > 0


def test_the_adaptive_attack_on_cross_entropy_is_pgd_and_its_terms_climb():
    options = dict(eps=0.1, step_size=0.05, steps=2)
    forward = jax.jit(lambda x: NET.predict(initial(), x))

    def terms(x):
        output, clean = forward(x), forward(IMAGES)[1]
        ce = float(np.mean(losses.cross_entropy(output[0], BATCH["label"])))
        return ce, float(method.svd_loss(output[1]["x_avg"], IMAGES)), float(method.info_loss(output[1], clean))

    images, found = {}, {}
    for name in ("ce", "svd", "info"):
        images[name] = method.adaptive_attack(terms=(name,), **options)(KEY, forward, IMAGES, BATCH["label"])
        assert np.abs(images[name] - IMAGES).max() <= 0.1 + 1e-6
        found[name] = terms(images[name])
    for i, name in enumerate(("ce", "svd", "info")):
        assert found[name][i] >= max(other[i] for other in found.values()) - 1e-6
    from ibjax.attacks.pgd import pgd

    plain = pgd(**options)(KEY, lambda x: forward(x)[0], IMAGES, BATCH["label"])
    np.testing.assert_allclose(plain, images["ce"], atol=1e-6)


def test_no_image_of_the_adaptive_attack_depends_on_the_others():
    attack = method.adaptive_attack(eps=0.1, step_size=0.05, steps=2)

    @jax.jit
    def attacked(x):
        return attack(jax.random.split(KEY, 6), lambda x: NET.predict(initial(), x), x, BATCH["label"])

    others = attacked(np.concatenate([IMAGES[:2], np.repeat(IMAGES[3:4], 4, axis=0)]))
    np.testing.assert_allclose(attacked(IMAGES)[:2], others[:2], atol=1e-5)


def test_another_network_and_unknown_choices_are_refused():
    model = resnet.Model(4, blocks=(1,), width=4)
    variables = {"batch_stats": {}, **jax.eval_shape(model.init, KEY, IMAGES)}
    loss = lambda variables: method.siriib().loss(linen_net(model), variables, BATCH, X_ADV, KEY)  # noqa: E731
    with pytest.raises(InputError, match="needs its network"):
        jax.eval_shape(loss, variables)
    for options in (dict(base="mart"), dict(distance="l1"), dict(lam=-1.0)):
        with pytest.raises(InputError, match="allowed"):
            method.siriib(**options)
    with pytest.raises(InputError, match="'cee'"):
        method.adaptive_attack(terms=("cee",))
