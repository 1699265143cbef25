"""SiRIIB's losses against NumPy, and where its gradients and statistics go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import in_programs, once

from ibjax import losses
from ibjax.errors import InputError
from ibjax.models import resnet, siriib
from ibjax.net import linen_net
from ibjax.objectives import siriib as method
from ibjax.objectives.pgd_at import pgd_at
from ibjax.objectives.trades import trades
from ibjax.step import trainable, with_trainable

BACKBONE = dict(name="resnet", blocks=(1, 1), width=4)
MODEL = siriib.Model(4, backbone=BACKBONE, connections=2, scales=(8, 4), widths=(3, 5))
RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.random((6, 8, 8, 3)), jnp.float32)
X_ADV = jnp.asarray(np.clip(IMAGES + 0.05 * RNG.normal(size=IMAGES.shape), 0, 1), jnp.float32)
BATCH = {
    "image": IMAGES,
    "label": jnp.arange(6) % 4,
    "index": jnp.arange(6),
    "epoch": jnp.float32(0),
    "step": jnp.int32(0),
}
NET = in_programs(linen_net(MODEL))
KEY = jax.random.key(3)
KEY_OF_BASE = jax.random.split(KEY)[0]  # with which SiRIIB calls the loss of its base


@once
def initial():
    """Variables of the network."""
    return {"batch_stats": {}, **jax.jit(MODEL.init)(jax.random.key(0), IMAGES)}


def loss_of(objective, key):
    """(loss, (variables, metrics)) as one program, or JAX compiles one for every operation and shape."""
    return jax.jit(lambda variables: objective.loss(NET, variables, BATCH, X_ADV, key))(initial())


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
    got = method.svd_loss(X_ADV, IMAGES, method.DISTANCES[name])
    np.testing.assert_allclose(got, svd_oracle(X_ADV, IMAGES, numpy_distance(name)), rtol=1e-3)
    assert float(method.svd_loss(IMAGES, IMAGES)) == 0


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


@pytest.mark.parametrize("image", [0.0, 0.5, 1.0])
def test_the_singular_loss_is_finite_on_flat_images(image):
    flat = jnp.full((2, 8, 8, 3), image)
    loss = jax.jit(jax.value_and_grad(method.svd_loss))
    for a, b in ((flat, IMAGES[:2]), (IMAGES[:2], flat), (flat, flat)):
        value, gradient = loss(a, b)
        assert bool(jnp.isfinite(value)) and bool(jnp.isfinite(gradient).all())


def test_the_clean_image_is_a_target_without_gradient():
    clean_gradient = jax.jit(jax.grad(lambda x: method.svd_loss(X_ADV, x) - jnp.mean(jnp.square(X_ADV - x))))(IMAGES)
    np.testing.assert_allclose(clean_gradient, 0, atol=1e-6)


def test_the_information_loss_sums_over_connections():
    a = {"info1": jnp.ones((2, 4, 4, 3)), "info2": jnp.zeros((2, 2, 2, 5)), "stem": jnp.ones(7)}
    b = {"info1": jnp.zeros((2, 4, 4, 3)), "info2": jnp.full((2, 2, 2, 5), 3.0), "stem": jnp.zeros(7)}
    assert float(method.info_loss(a, b)) == 1 + 9
    assert float(method.info_loss({}, {})) == 0
    stopped = jax.grad(lambda clean: method.info_loss(a, {**b, "info1": clean}, stop=True))(b["info1"])
    free = jax.grad(lambda clean: method.info_loss(a, {**b, "info1": clean}))(b["info1"])
    assert not stopped.any() and free.any()


def test_without_a_gradient_to_the_clean_features_descent_enlarges_their_difference():
    """f = w h with h(x') < h(x): the reason why the clean features are not a mere target."""
    h_adv, h = jnp.full((1, 2, 2, 1), 0.9), jnp.ones((1, 2, 2, 1))

    def loss(w, stop):
        return method.info_loss({"info1": w * h_adv}, {"info1": w * h}, stop=stop)

    before = loss(1.0, False)
    after = [loss(1.0 - jax.grad(loss)(1.0, stop), False) for stop in (False, True)]
    assert after[0] < before < after[1]


@pytest.mark.parametrize("base", ["pgd_at", "trades"])
def test_the_loss_is_its_formula(base):
    original = {"pgd_at": pgd_at(), "trades": trades(beta=6.0)}[base]
    objective = method.siriib(base=base, lam=3.0, lam_tau=0.5)

    @jax.jit
    def found(variables):
        (adv, clean), _ = zip(*(NET.forward(variables, x, KEY) for x in (X_ADV, IMAGES)), strict=True)
        plain = original.loss(NET, variables, BATCH, X_ADV, KEY_OF_BASE)[0]
        return plain, adv[1], clean[1], objective.loss(NET, variables, BATCH, X_ADV, KEY)

    plain, adv, clean, (loss, (_, metrics)) = found(initial())
    svd = svd_oracle(adv["x_avg"], IMAGES, numpy_distance("mse"))
    info = sum(np.mean(np.square(np.asarray(adv[k], np.float64) - clean[k])) for k in ("info1", "info2"))
    np.testing.assert_allclose([metrics["svd"], metrics["info"]], [svd, info], rtol=1e-3)
    np.testing.assert_allclose(loss, plain + 3.0 * (svd + info) + 0.5 * adv["orthogonality"], rtol=1e-4)


def test_without_its_terms_it_is_the_base_but_for_the_added_parts_statistics():
    """PGD-AT has no pass over x: the one for L_info moves the statistics of the added parts only."""
    plain, (plain_after, _) = loss_of(pgd_at(), KEY_OF_BASE)
    loss, (after, _) = loss_of(method.siriib(lam=0.0, lam_tau=0.0), KEY)
    np.testing.assert_allclose(loss, plain, rtol=1e-6)
    for name, statistics in plain_after["batch_stats"].items():
        same = [
            np.array_equal(a, b)
            for a, b in zip(*map(jax.tree.leaves, (statistics, after["batch_stats"][name])), strict=True)
        ]
        assert not all(same) if name in method.ADDED else all(same), name


@pytest.mark.parametrize("base", list(method.BASES))
def test_a_weight_perturbation_climbs_the_loss_of_the_base(base):
    batch = {**BATCH, "epoch": jnp.float32(120)}  # where TE's term counts
    variables = {**initial(), "memory": jax.random.uniform(KEY, (6, 4))}
    original, whole = method.BASES[base](6.0), method.siriib(base=base, lam=20.0)

    @jax.jit
    def losses_of(variables):
        given = NET, variables, batch, X_ADV
        return original.loss(*given, KEY_OF_BASE)[0], whole.proxy(*given, KEY), whole.loss(*given, KEY)[0]

    plain, proxy, loss = losses_of(variables)
    np.testing.assert_allclose(proxy, plain, rtol=1e-6)
    assert abs(float(loss - plain)) > 0.1  # what it leaves out


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
        ce = float(jnp.mean(losses.cross_entropy(output[0], BATCH["label"])))
        return ce, float(method.svd_loss(output[1]["x_avg"], IMAGES)), float(method.info_loss(output[1], clean))

    images, found = {}, {}
    for name in ("ce", "svd", "info"):
        images[name] = method.adaptive_attack(terms=(name,), **options)(KEY, forward, IMAGES, BATCH["label"])
        assert float(jnp.abs(images[name] - IMAGES).max()) <= 0.1 + 1e-6
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

    others = attacked(IMAGES.at[2:].set(IMAGES[3]))
    np.testing.assert_allclose(attacked(IMAGES)[:2], others[:2], atol=1e-5)


def test_another_network_and_unknown_choices_are_refused():
    model = resnet.Model(4, blocks=(1,), width=4)
    variables = {"batch_stats": {}, **jax.jit(model.init)(KEY, IMAGES)}
    with pytest.raises(InputError, match="needs its network"):
        method.siriib().loss(linen_net(model), variables, BATCH, X_ADV, KEY)
    for options in (dict(base="mart"), dict(distance="l1"), dict(lam=-1.0)):
        with pytest.raises(InputError, match="allowed"):
            method.siriib(**options)
    with pytest.raises(InputError, match="'cee'"):
        method.adaptive_attack(terms=("cee",))
