"""What is promised in float32 (docs/precision.md) does not depend on how an accelerator rounds products by default."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import once
from jax.sharding import AxisType, Mesh
from rounding import STORED_BITS, rounded
from test_models import random_variables
from test_objectives import experiment

from ibjax import losses
from ibjax.attacks import checks, geometry, lbfgsb
from ibjax.attacks.apgd import apgd, iterative_apgd
from ibjax.attacks.autoattack import autoattack
from ibjax.attacks.cw import cw
from ibjax.attacks.deepfool import deepfool
from ibjax.attacks.eot import eot
from ibjax.attacks.fab import fab, iterative_fab, step_onto_hyperplane
from ibjax.attacks.fgsm import fgsm
from ibjax.attacks.mim import mim
from ibjax.attacks.nifgsm import nifgsm
from ibjax.attacks.noise import noise
from ibjax.attacks.pgd import pgd
from ibjax.attacks.representation import ara
from ibjax.attacks.sparse_rs import sparse_rs
from ibjax.attacks.spsa import spsa
from ibjax.attacks.square import iterative_square, square
from ibjax.attacks.targeted import targeted
from ibjax.data import Split
from ibjax.devices import cores, forms
from ibjax.errors import InputError
from ibjax.evaluation.scoring import Scorer
from ibjax.information import divergence, fourier, hsic, mige, mine, svd
from ibjax.models import cnn, layers, siriib
from ibjax.objectives import ibd_matching
from ibjax.pytorch import gate
from ibjax.training.experiment import initializer

RNG = np.random.default_rng(0)
N, CLASSES = 12, 5
KEY = jax.random.key(0)


def normal(*shape):
    return np.float32(RNG.normal(size=shape))


X = np.float32(RNG.uniform(0.1, 0.9, size=(N, 8, 8, 3)))
Y = np.int32(RNG.integers(0, CLASSES, N))


def shaken(variables):
    """Weights among which none is zero."""
    return jax.tree.map(lambda a: np.asarray(a) + np.float32(0.1) * normal(*a.shape), variables)


# ---- the stand-in ----------------------------------------------------------------------------------------------


def nearest(x, precision):
    """x with the mantissa that `precision` keeps, rounded to even, by the integers that floats are stored as."""
    last = 2 ** (23 - STORED_BITS[precision])
    bits = np.asarray(x).view(np.uint32).astype(np.int64)
    return ((bits + last // 2 - 1 + bits // last % 2) // last * last).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("precision", STORED_BITS)
def test_operands_are_rounded_in_values_and_derivatives_unless_the_product_names_highest(precision):
    a, b, weights = normal(2, 6, 7), normal(2, 7, 5), normal(2, 6, 5)
    kernel = normal(3, 3, 3, 4)

    @functools.partial(jax.jit, static_argnums=2)
    def looped(a, b, precision=None):
        one = jax.vmap(lambda a, b: jnp.matmul(a, b, precision=precision))
        return jax.lax.fori_loop(0, 3, lambda i, last: one(a, b), weights)

    @jax.jit
    def convolved(x):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    pulled = jax.jit(jax.grad(lambda a: jnp.sum(jnp.matmul(a, b) * weights)))
    exact = np.asarray(convolved(nearest(X, precision)))
    with rounded(precision) as found:
        value, full, gradient = jax.jit(looped)(a, b), looped(a, b, "highest"), pulled(a)
        images = convolved(X)
    near = [nearest(array, precision) for array in (a, b, weights)]
    np.testing.assert_allclose(value, near[0] @ near[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, near[2] @ near[1].swapaxes(1, 2), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(full, a @ b, rtol=1e-5, atol=1e-5)
    assert not np.allclose(value, full, rtol=1e-5, atol=1e-5) and not np.allclose(images, exact, rtol=1e-5, atol=1e-5)
    assert {product.full for product in found} == {True, False}
    assert all(product.line.startswith("tests/test_precision.py:") for product in found)
    np.testing.assert_array_equal(looped(a, b), full)  # outside of it nothing is left


# ---- what has products of its own ------------------------------------------------------------------------------


def with_gradient(f, x):
    """f(x), and the derivative of a random combination of its values."""
    weights = jax.tree.map(lambda a: normal(*a.shape), jax.eval_shape(f, x))

    def combined(x):
        value = f(x)
        return sum(jnp.sum(w * v) for w, v in zip(*map(jax.tree.leaves, (weights, value)), strict=True)), value

    return jax.jit(jax.grad(combined, has_aux=True)), x


def minimised():
    """A quadratic, written without a product, on a box."""
    scale, middle = normal(20) ** 2 + 0.1, normal(20)
    coupled = lambda x: jnp.sum(scale * (x - middle) ** 2) + jnp.sum(x) ** 2  # noqa: E731
    box = np.ones(20, np.float32)
    return jax.jit(lambda x: lbfgsb.minimize(coupled, x, -box, box, steps=4)), 0 * box


def mutual_information():
    module, features = mine.Mine("z", (16, 16), projection=6), {"z": jnp.asarray(normal(N, 4))}
    variables = shaken(jax.jit(lambda: module.init(KEY, features, None, train=False))())
    return with_gradient(lambda z: module.apply(variables, {"z": z}, features, train=False), normal(N, 4))


def orthogonality():
    module = siriib.SingularRegularization("amplitude", "add", "full", 1)
    variables = shaken(jax.jit(lambda: module.init(KEY, X, train=False))())

    def penalty(kernel):
        params = {**variables["params"], "vectors": {"conv": {"kernel": kernel}}}
        return module.apply({**variables, "params": params}, X, train=False)[1]

    return with_gradient(penalty, variables["params"]["vectors"]["conv"]["kernel"])


def imported():
    model = cnn.Model(num_classes=CLASSES, widths=((8,),), hidden=(), padding=1)
    variables = shaken(jax.jit(model.init)(KEY, X))
    return lambda images: gate.of_ours(model, variables, images), np.uint8(X * 255)


LABELS = np.arange(N, dtype=np.int32) % 3
MATRICES = normal(3, 6, 6)
# what is promised -> (function, its argument)
PROMISED = {
    "HSIC": lambda: with_gradient(lambda x: hsic.hsic(hsic.gaussian_gram(x, 5.0), hsic.linear_gram(X)), normal(N, 9)),
    "nHSIC": lambda: with_gradient(lambda x: hsic.nhsic_cca(x, X), normal(N, 9)),
    "nHSIC of channels and labels": lambda: with_gradient(
        lambda x: hsic.nhsic_channels(hsic.label_operator(LABELS, 3)[None], x), normal(N, 3, 2)
    ),
    "kernel width": lambda: (jax.jit(lambda x: hsic.knn_width(x, k=1)), normal(N, 2)),
    "distances of samples": lambda: (jax.jit(hsic.squared_distances), normal(N, 9)),
    "MIGE": lambda: (jax.jit(mige.score), normal(N, 4)),
    "MINE": mutual_information,
    "singular values and polar factor": lambda: with_gradient(svd.singular_values_and_polar, MATRICES),
    "orthogonality of W_o": orthogonality,
    "L-BFGS-B": minimised,
    "pooling of energies": lambda: with_gradient(lambda x: ibd_matching.adaptive_average(x, (3, 5)), normal(2, 8, 8)),
    "resizing": lambda: with_gradient(lambda x: layers.resize(x, (5, 12)), X),
    "logits of import and export": imported,
}


def answers(name):
    """[(the values of what is promised, the products in it)]: not rounded, rounded by default, and all rounded."""
    function, x = PROMISED[name]()
    found = []
    for rounding in (contextlib.nullcontext([]), rounded("bfloat16"), rounded("bfloat16", all_products=True)):
        with rounding as products:
            found.append((jax.tree.map(np.asarray, function(x)), products))
    return found


def difference(one, other):
    """The largest, as a share of the largest value."""
    pairs = zip(*map(jax.tree.leaves, (one, other)), strict=True)
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)


@pytest.mark.parametrize("name", [name for name in PROMISED if name != "logits of import and export"])
def test_no_product_of_a_promise_is_left_to_the_default(name):
    """The reason why none depends on it; what is promised of import and export is compiled where it is called."""
    function, x = PROMISED[name]()
    with rounded("bfloat16") as products:
        jax.jit(function).lower(x)
    assert products and {product.line for product in products if not product.full} == set()


@pytest.mark.parametrize("name", PROMISED)
def test_no_promise_depends_on_the_default(name):
    """The same values as without rounding; and with HIGHEST ignored others, or the comparison would say nothing."""
    (exact, _), (default, products), (all_rounded, _) = answers(name)
    assert products and {product.line for product in products if not product.full} == set()
    assert difference(default, exact) < 1e-6
    assert difference(all_rounded, exact) > 1e-4


# ---- what has none ---------------------------------------------------------------------------------------------

PLANES = normal(CLASSES, 8, 8, 3)


@jax.jit
def network(x):
    """Logits without a product: what is found beside them is the attack's own."""
    return jnp.sum(jnp.square(x)[:, None] * PLANES[None], axis=(2, 3, 4))


def stochastic(key, x):
    return network(x) + jax.random.normal(key, (1, CLASSES))


def in_each(factory, norms=geometry.NORMS, **options):
    return {f"{factory.__name__} {norm} {options}": factory(norm=norm, eps=0.1, **options) for norm in norms}


TWO = ("linf", "l2")
ATTACKS = {
    **in_each(fgsm, TWO),
    **in_each(pgd, TWO, steps=2, restarts=2, loss="margin"),
    **in_each(mim, TWO, steps=2),
    **in_each(targeted, TWO, steps=1, restarts=2),
    **in_each(deepfool, TWO, steps=2),
    **in_each(spsa, TWO, steps=1, samples=4),
    **in_each(noise, TWO),
    **in_each(fab, steps=2),
    **in_each(square, queries=2),
    **{
        key: value for loss in ("ce", "dlr", "dlr_targeted") for key, value in in_each(apgd, loss=loss, steps=2).items()
    },
    "nifgsm": nifgsm(eps=0.1, steps=2),
    "cw": cw(steps=2),
    "sparse-rs": sparse_rs(eps=3, queries=2),
    "eot": eot(attack=pgd, samples=2, eps=0.1, steps=1),
    "ara": ara(eps=0.1, steps=1),
}
PLANE = normal(N, 8, 8, 3)
LOGITS = normal(N, CLASSES)
MAPS = normal(N, 5, 12, 3)
ELEMENTWISE = {
    **{f"projection {norm}": lambda norm=norm: geometry.project(X + PLANE, X, norm, 0.1) for norm in geometry.NORMS},
    **{f"distance {norm}": lambda norm=norm: geometry.distance(X + PLANE, X, norm) for norm in geometry.NORMS},
    **{f"hyperplane {norm}": lambda norm=norm: step_onto_hyperplane(X, PLANE, X[:, 0, 0, 0], norm) for norm in TWO},
    "losses": lambda: (
        losses.cross_entropy(LOGITS, Y), losses.kl(LOGITS, LOGITS[::-1]), losses.dlr(LOGITS, Y),
        losses.dlr_targeted(LOGITS, Y, (Y + 1) % CLASSES), losses.margin(LOGITS, Y), losses.correct(LOGITS, Y),
    ),
    "divergences": lambda: (
        divergence.symmetrised_gaussian_kl(LOGITS, LOGITS**2, LOGITS + 1, LOGITS**2 + 1),
        divergence.symmetrised_categorical_kl(LOGITS, LOGITS[::-1]),
    ),
    "Fourier transforms": lambda: fourier.amplitude(X, lambda a: 2 * a),
    "resizing on an accelerator": cores.elsewhere()(lambda: jax.vjp(lambda x: layers.resize(x, (5, 12)), X)[1](MAPS)),
}  # fmt: skip


@jax.numpy_dtype_promotion("standard")  # optax's Adam mixes a float with its integer count
def test_attacks_losses_and_projections_have_no_product_that_is_rounded():
    with rounded("bfloat16") as found, jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes types
        for name, attack in ATTACKS.items():
            before = len(found)
            asked, target = (stochastic, Y) if name == "eot" else (network, X[::-1] if name == "ara" else Y)
            jax.jit(lambda key, x, t, attack=attack, asked=asked: attack(key, asked, x, t)).lower(KEY, X, target)
            assert len(found) == before or name == "ara", (name, found[before:])
        assert found and all(product.full for product in found)  # L-BFGS-B of the last one
        del found[:]
        for name, compute in ELEMENTWISE.items():
            jax.jit(compute).lower()
            assert not found, name


@pytest.mark.parametrize("names", [["apgd-ce"], ["apgd-ce", "fab-t", "square"]], ids=["apgd-ce", "all"])
def test_autoattack_and_its_checks_have_no_product_that_is_rounded(names):
    """Its programs on the host's side too: starts, the choice between attacks, the last judgement."""
    made = {
        "apgd-ce": iterative_apgd("ce", "linf", 0.05, steps=2),
        "fab-t": iterative_fab("linf", 0.05, steps=2, targets=2),
        "square": iterative_square("linf", 0.05, queries=2),
    }
    plan = {name: made[name] for name in names}
    with rounded("bfloat16") as found:
        result = autoattack(KEY, network, X, np.asarray(network(X)).argmax(1), eps=0.05, attacks=plan, batch_size=8)
    assert not found
    assert set(result.robust_after) == set(plan)


# ---- networks, at the default ----------------------------------------------------------------------------------

MODEL = cnn.Model(num_classes=CLASSES, widths=((8,),), hidden=(), padding=1)


@once
def weights():
    """Variables of MODEL."""
    return random_variables(MODEL, X.shape)


def of_another_order(precision):
    """A network whose operands differ by part of a rounding between sizes of a batch, as where sums have an order."""
    step = 2.0 ** -(STORED_BITS[precision] + 2)
    return jax.jit(lambda x: MODEL.apply(weights(), x * (1 + step * (len(x) % 5)))[0])


@pytest.mark.parametrize("precision", STORED_BITS)
def test_rounded_networks_pass_the_checks_that_compare_their_answers(precision, monkeypatch):
    """Whether images depend on each other, and whether a network is still the same one."""
    network = of_another_order(precision)
    exact = checks.fingerprint(network, X)
    with rounded(precision) as found:
        assert checks.independent(network, X) == []
        again = checks.fingerprint(network, X)
        monkeypatch.setattr(checks, "_LOGITS", 0.0)
        with pytest.raises(InputError, match="logits depend on"):
            checks.independent(network, X)
    assert found and not any(product.full for product in found)
    tolerance = checks.FINGERPRINT_TOLERANCE if precision == "tensorfloat32" else (2e-2, 2e-1)
    assert checks.differences(again, exact, tolerance) == []
    assert checks.differences(again, exact, (0.0, 0.0)) == ["logits", "gradients"]


# ---- the judgement ---------------------------------------------------------------------------------------------

OF_NARROW = np.random.default_rng(2)
NARROW = np.float32(OF_NARROW.normal(size=(192, 1)) + 1e-4 * OF_NARROW.normal(size=(192, 2)))  # rounding decides


@jax.jit
def near_tie(x):
    """A network of two classes, a function that says nothing of its product."""
    return x.reshape(len(x), -1) @ NARROW


def right(x, precision=None):
    """Which images `near_tie` classifies as 1, with operands rounded or in float64."""
    x, w = (a if precision is None else nearest(a, precision) for a in (np.asarray(x).reshape(len(x), -1), NARROW))
    logits = x.astype(np.float64) @ w.astype(np.float64)
    return logits[:, 1] > logits[:, 0]


@pytest.fixture
def on_an_accelerator(monkeypatch):
    """Products are rounded as on a TPU, and programs are made for that."""
    monkeypatch.setitem(forms.TABLE, "cpu", forms.TABLE["cpu"]._replace(products="rounded"))
    with rounded("bfloat16"):
        yield


def test_what_an_attack_finds_is_judged_in_float32_and_changed_flags_are_counted(on_an_accelerator):
    x = np.float32(np.random.default_rng(1).uniform(size=(24, 8, 8, 3)))
    exact, seen = right(x), right(x, "bfloat16")
    alone = Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
    network, unchanged = lambda v, x, keys: (near_tie(x), {}), lambda eps, step_size: lambda key, f, x, y: x
    for attacked_in, differ in (("default", exact != seen), ("highest", exact & False)):
        scorer = Scorer(network, unchanged, alone, 24, "linf", attacked_in=attacked_in)
        flags, _ = scorer({}, Split(x, np.ones(24, np.int32)), 0, eps=0.1, step_size=0.1)
        np.testing.assert_array_equal(flags.robust, exact)
        np.testing.assert_array_equal(flags.changed, differ)
    assert 0 < (exact != seen).sum() < 24 and 0 < exact.sum() < 24


def test_autoattacks_flags_are_those_of_float32_and_its_result_says_which_were_others(on_an_accelerator):
    x, y = np.float32(np.random.default_rng(1).uniform(0.1, 0.9, size=(24, 8, 8, 3))), np.ones(24, np.int32)
    plan = {"apgd-ce": iterative_apgd("ce", "linf", 1e-3, steps=1)}
    result = autoattack(KEY, near_tie, x, y, eps=1e-3, attacks=plan, batch_size=24, precision="default")
    np.testing.assert_array_equal(result.clean, right(x))
    attacked = right(x, "bfloat16")  # an image that seemed misclassified was not attacked, and is not robust
    assert (attacked != right(x)).any()
    np.testing.assert_array_equal(result.robust, attacked & right(x) & right(result.x_adv))
    np.testing.assert_array_equal(result.robust_after["apgd-ce"], result.robust)
    text = f"{result.changed.sum()} images are classified otherwise when judged at the highest precision"
    assert result.changed.any() and any(text in said for said in result.warnings)


# ---- training --------------------------------------------------------------------------------------------------

# layers, and IBD's attention over them
NETWORKS = ("ibjax/models/layers.py", "ibjax/models/gradients.py", "ibjax/objectives/ibd_matching.py")
WITH_INFORMATION = ("hbar", "ib_rar-mask", "shared_information-mine", "shared_information-ara", "siriib", "mma", "dkl")


@pytest.mark.parametrize("name", WITH_INFORMATION)
def test_only_the_layers_of_networks_are_at_the_default_in_a_step(name, tmp_path):
    made = experiment(name, tmp_path, devices=1)
    images, labels = (array[: made.config.batch_size] for array in made.data.train)
    state = jax.eval_shape(initializer(made), KEY, jnp.zeros((1, *images.shape[1:])), made.frozen)
    with rounded("bfloat16") as found:
        jax.jit(made.train_step).lower(state, dict(image=images, label=labels, index=labels), KEY, made.frozen)
    assert found
    assert {product.line.split(":")[0] for product in found if not product.full} <= set(NETWORKS)
    assert name == "mma" or any(product.full for product in found)
