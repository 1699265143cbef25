"""HSIC and its normalised form against float64 oracles written as loops, traces and inverses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from ibjax.errors import InputError
from ibjax.information import hsic

RNG = np.random.default_rng(0)
B, CLASSES = 24, 4
LABELS = RNG.integers(0, CLASSES, B)
ONE_HOT = np.eye(CLASSES)[LABELS]
IMAGES = RNG.random((B, 5, 4, 3))
FEATURES = np.maximum(ONE_HOT @ RNG.normal(size=(CLASSES, 30)) + RNG.normal(size=(B, 30)), 0)


# ---- the oracle ----------------------------------------------------------------------------------------------


def gaussian(u, sigma):
    """exp(−||u_a − u_b||² / (2σ²)), pair by pair."""
    u = u.reshape(len(u), -1)
    return np.array([[np.exp(-np.sum((a - b) ** 2) / (2 * sigma**2)) for b in u] for a in u])


def scaled_gaussian(u, sigma=5.0):
    return gaussian(u, sigma * np.sqrt(u[0].size))


def linear(u):
    return np.array([[float(np.dot(a.ravel(), b.ravel())) for b in u] for a in u])


def trace_hsic(k, l):
    h = np.eye(len(k)) - 1 / len(k)
    return np.trace(k @ h @ l @ h)


def operator(k, ridge=1e-5, both_sides=True):
    h = np.eye(len(k)) - 1 / len(k)
    k = h @ k @ h if both_sides else k @ h
    return k @ np.linalg.inv(k + ridge * len(k) * np.eye(len(k)))


def nhsic(k, l):
    return np.trace(operator(k) @ operator(l))


def directional(f, x, direction, step=1e-5):
    return (f(x + step * direction) - f(x - step * direction)) / (2 * step)


def f32(x):
    return np.asarray(x, np.float32)


hsic_of, nhsic_of = jax.jit(hsic.hsic), jax.jit(hsic.nhsic_cca)


# ---- values --------------------------------------------------------------------------------------------------


def test_gram_matrices_are_their_definition():
    @jax.jit
    def grams(x, labels):
        of_labels = [hsic.label_gram(labels, CLASSES, kernel) for kernel in hsic.KERNELS]
        return hsic.gaussian_gram(x, 1.7), hsic.linear_gram(x), hsic.scaled_gram(x, 5.0), *of_labels

    narrow, products, scaled, equal, alike = grams(f32(IMAGES), LABELS)
    np.testing.assert_allclose(narrow, gaussian(IMAGES, 1.7), rtol=1e-5)
    np.testing.assert_allclose(products, linear(IMAGES), rtol=1e-5)
    np.testing.assert_allclose(scaled, scaled_gaussian(IMAGES) - 1, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(equal, linear(ONE_HOT), atol=1e-6)
    np.testing.assert_allclose(alike, scaled_gaussian(ONE_HOT) - 1, rtol=1e-5, atol=1e-8)


def test_label_kernels_take_their_width_from_all_classes():
    """With the classes present only, the Gaussian kernel would be a wider one."""
    got = jax.jit(lambda labels: hsic.label_gram(labels, 100, "gaussian"))(LABELS % 2)
    np.testing.assert_allclose(np.min(got), np.expm1(-2 / (2 * 25 * 100)), rtol=1e-5)


def test_hsic_is_the_trace_over_b_minus_1_squared():
    k, l = gaussian(IMAGES, 1.7), gaussian(FEATURES, 4.0)
    np.testing.assert_allclose(jax.jit(hsic.hsic_trace)(f32(k), f32(l)), trace_hsic(k, l), rtol=1e-5)
    np.testing.assert_allclose(hsic_of(f32(k), f32(l)), trace_hsic(k, l) / (B - 1) ** 2, rtol=1e-5)
    several = hsic_of(f32([k, l]), f32([l, l]))
    np.testing.assert_allclose(several, [trace_hsic(k, l) / (B - 1) ** 2, trace_hsic(l, l) / (B - 1) ** 2], rtol=1e-5)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_nhsic_is_the_trace_of_the_operators_in_float32(scale):
    """Also where the kernel is nearly 1 everywhere, and where it is nearly the identity."""
    features = f32(FEATURES * scale)
    expected = nhsic(scaled_gaussian(IMAGES), scaled_gaussian(np.asarray(features, np.float64)))
    np.testing.assert_allclose(nhsic_of(f32(IMAGES), features), expected, rtol=1e-5)


def test_nhsic_over_layers_and_channels_is_one_by_one():
    """Layers of different sizes; channels in one piece and in chunks that do not divide them."""
    maps = RNG.normal(size=(B, 3, 3, 7))
    layers = [FEATURES, maps, IMAGES * 2]
    others = [scaled_gaussian(IMAGES), linear(ONE_HOT)]
    wanted = [[nhsic(k, scaled_gaussian(z)) for z in layers] for k in others]
    wanted_channels = [[nhsic(k, scaled_gaussian(maps[..., c])) for c in range(7)] for k in others]

    @jax.jit
    def of_layers(x, labels, layers):
        r = [hsic.correlation_operator(hsic.scaled_gram(x)), hsic.label_operator(labels, CLASSES)]
        channels = [hsic.nhsic_channels(jnp.stack(r), layers[1], chunk=chunk) for chunk in (None, 3)]
        return hsic.nhsic_layers(jnp.stack(r), layers), channels

    found, channels = of_layers(f32(IMAGES), LABELS, [f32(z) for z in layers])
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    for each in channels:
        np.testing.assert_allclose(each, wanted_channels, rtol=1e-5)

    @jax.jit
    def of_channels(grams, maps):
        return hsic.nhsic_channels(jax.vmap(hsic.correlation_operator)(grams), maps)

    with jax.enable_x64(True):
        np.testing.assert_allclose(of_channels(np.stack(others), maps), wanted_channels, rtol=1e-8)


@pytest.mark.parametrize("kernel", ["linear", "gaussian"])
def test_the_operator_of_labels_is_that_of_their_gram_matrix(kernel):
    """In class space, with more classes than samples and with classes that are absent."""
    gram = linear if kernel == "linear" else scaled_gaussian
    cases = ((LABELS, CLASSES), (LABELS % 2, 10), (np.arange(B), 40), (np.zeros(B, int), 10))

    @jax.jit
    def operators(given):
        return [hsic.label_operator(labels, classes, kernel) for labels, (_, classes) in zip(given, cases, strict=True)]

    found = operators([labels for labels, _ in cases])
    for got, (labels, classes) in zip(found, cases, strict=True):
        np.testing.assert_allclose(got, operator(gram(np.eye(classes)[labels])), rtol=1e-5, atol=1e-6)


def test_right_centred_and_doubly_centred_forms_agree():
    """The authors' code centres on one side only; to 1e-6, in float64."""
    k, l = scaled_gaussian(IMAGES), scaled_gaussian(FEATURES)
    one_sided = np.trace(operator(k, both_sides=False) @ operator(l, both_sides=False))
    with jax.enable_x64(True):
        np.testing.assert_allclose(nhsic_of(IMAGES, FEATURES), one_sided, rtol=1e-6)


def test_knn_width_is_the_mean_distance_to_the_nearest_others():
    z = RNG.normal(size=(B, 9))
    distances = np.array([sorted(np.linalg.norm(a - b) for j, b in enumerate(z) if j != i) for i, a in enumerate(z)])
    numbers = (1, 10, B - 1, 1000)
    widths, slopes = jax.jit(lambda z: ([hsic.knn_width(z, k) for k in numbers], jax.grad(hsic.knn_width)(z)))(f32(z))
    np.testing.assert_allclose(widths, [distances[:, :k].mean() for k in numbers], rtol=1e-5)
    assert not np.any(slopes)


# ---- properties ----------------------------------------------------------------------------------------------


def test_nhsic_is_in_the_tens_where_hsic_is_about_6e_7():
    """What the page says of their sizes, on 100 digits and features of a random layer."""

    @jax.jit
    def both(x):
        t = jnp.tanh(x.reshape(100, -1) @ jax.random.normal(jax.random.key(0), (64, 200)) / 8)
        return hsic.hsic(hsic.scaled_gram(x), hsic.scaled_gram(t)), hsic.nhsic_cca(x, t)

    plain, normalised = both(f32(load_digits().images[:100] / 16))
    np.testing.assert_allclose(plain, 6e-7, rtol=0.1)
    assert 10 < normalised < 30


def test_hsic_is_not_negative_and_ignores_the_order_of_samples():
    """Both samples permuted together; permuted apart, dependence falls."""
    order = RNG.permutation(B)
    x, t = f32(IMAGES), f32(FEATURES)
    np.testing.assert_allclose(nhsic_of(x[order], t[order]), nhsic_of(x, t), rtol=1e-5)
    k, l = f32(linear(ONE_HOT)), f32(gaussian(FEATURES, 5.0))
    np.testing.assert_allclose(hsic_of(k[order][:, order], l[order][:, order]), hsic_of(k, l), rtol=1e-5)
    assert hsic_of(k[order][:, order], l) < 0.5 * hsic_of(k, l)
    for seed in range(5):
        u, v = np.random.default_rng(seed).normal(size=(2, B, 3))
        assert hsic_of(f32(gaussian(u, 1.0)), f32(gaussian(v, 1.0))) >= 0


def test_nhsic_lies_between_zero_and_the_rank():
    """The linear kernel of C classes has rank C − 1 after centring, features of 2 dimensions have rank 2."""

    @jax.jit
    def operators(one_hot, features):
        grams = hsic.linear_gram(one_hot), hsic.linear_gram(features[:, :2]), hsic.scaled_gram(features)
        made = jax.vmap(hsic.correlation_operator)(jnp.stack(grams))
        return made, [hsic.operator_product(r, made[2]) for r in made]

    with jax.enable_x64(True):
        made, products = map(np.asarray, operators(ONE_HOT, FEATURES))
    for r, product, rank in zip(made, products, (CLASSES - 1, 2, B - 1), strict=True):
        assert 0 <= product <= rank
        eigenvalues = np.linalg.eigvalsh(r)
        assert eigenvalues.min() > -1e-9 and eigenvalues.max() < 1
        assert (eigenvalues > 1e-9).sum() <= rank


@pytest.mark.parametrize("kernel", ["linear", "gaussian"])
def test_nhsic_of_labels_with_collapsed_features_is_the_number_of_classes_less_one(kernel):
    collapsed = f32(10 * ONE_HOT @ RNG.normal(size=(CLASSES, 30)))

    @jax.jit
    def of_labels(labels, t):
        r = hsic.correlation_operator(hsic.label_gram(labels, CLASSES, kernel, sigma=1.0))
        return hsic.nhsic_layers(r[None], [t])[0, 0]

    value = of_labels(LABELS, collapsed)
    np.testing.assert_allclose(value, CLASSES - 1, rtol=0.01)
    assert value < CLASSES - 1


# ---- gradients -----------------------------------------------------------------------------------------------


def test_the_gradient_of_nhsic_is_the_oracles_finite_difference():
    direction = RNG.normal(size=FEATURES.shape)
    k = scaled_gaussian(IMAGES)
    expected = directional(lambda t: nhsic(k, scaled_gaussian(t)), FEATURES, direction)

    gradient = jax.jit(jax.grad(hsic.nhsic_cca, argnums=1))
    with jax.enable_x64(True):
        np.testing.assert_allclose(np.sum(np.asarray(gradient(IMAGES, FEATURES)) * direction), expected, rtol=1e-6)
    found = np.asarray(gradient(f32(IMAGES), f32(FEATURES)), np.float64)
    np.testing.assert_allclose(np.sum(found * direction), expected, rtol=1e-4)


def test_the_gradient_of_hsic_is_the_oracles_finite_difference():
    direction, l = RNG.normal(size=FEATURES.shape), gaussian(IMAGES, 1.0)
    expected = directional(lambda t: trace_hsic(gaussian(t, 4.0), l) / (B - 1) ** 2, FEATURES, direction)
    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(lambda t: hsic.hsic(hsic.gaussian_gram(t, 4.0), l)))(FEATURES)
        np.testing.assert_allclose(np.sum(np.asarray(gradient) * direction), expected, rtol=1e-6)


DEGENERATE = {
    "identical samples": np.tile(FEATURES[:1], (B, 1)),
    "pairs of identical samples": np.repeat(FEATURES[: B // 2], 2, axis=0),
    "black": np.zeros((B, 30)),
    "saturated": np.ones((B, 30)),
    "constant, each another": np.tile(np.linspace(0, 1, B)[:, None], (1, 30)),
    "huge": 1e4 * FEATURES,
    "tiny": 1e-6 * FEATURES,
}


@jax.jit
@jax.value_and_grad
def every_measure(t, labels):
    y = hsic.label_gram(labels, 30)  # more classes than samples
    r = jnp.stack([hsic.correlation_operator(k) for k in (hsic.scaled_gram(t), y)])
    plain = hsic.hsic(hsic.gaussian_gram(t, hsic.knn_width(t)), y)
    return jnp.sum(hsic.nhsic_layers(r, [t])) + plain


@pytest.mark.parametrize("features", DEGENERATE.values(), ids=list(DEGENERATE))
@pytest.mark.parametrize(
    "labels", [LABELS, np.zeros(B, int), np.arange(B)], ids=["classes", "one class", "a class each"]
)
def test_no_nan_on_degenerate_features_and_one_class(features, labels):
    value, gradient = every_measure(f32(features), labels)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_no_nan_on_a_batch_smaller_than_the_number_of_classes():
    t = f32(FEATURES[:3])

    def value(t):
        r = hsic.correlation_operator(hsic.label_gram(jnp.arange(3), 10))
        return hsic.nhsic_layers(r[None], [t])[0, 0]

    value, gradient = jax.jit(jax.value_and_grad(value))(t)
    assert 0 <= value <= 2 and np.all(np.isfinite(gradient))
    assert nhsic_of(t[:1], t[:1]) == 0.0


def test_one_class_has_no_dependence():

    @jax.jit
    def value(labels, t):
        y = hsic.label_gram(labels, 10)
        return hsic.nhsic_layers(hsic.correlation_operator(y)[None], [t])[0, 0]

    assert value(np.zeros(B, np.int32), f32(FEATURES)) == 0.0


# ---- dtype and errors ----------------------------------------------------------------------------------------


def test_bfloat16_features_are_treated_in_float32():
    t = jnp.asarray(FEATURES, jnp.bfloat16)
    got = nhsic_of(f32(IMAGES), t)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, nhsic_of(f32(IMAGES), f32(t)), rtol=1e-6)


def test_what_is_not_defined_is_refused():
    k = np.ones((1, 1), np.float32)
    for call, words in (
        (lambda: hsic.hsic(k, k), "HSIC of 1 sample is not defined"),
        (lambda: hsic.knn_width(np.ones((1, 3))), "knn_width of 1 samples"),
        (lambda: hsic.knn_width(np.ones((4, 3)), k=0), "with k=0"),
        (lambda: hsic.gaussian_gram(np.ones((4, 3)), 0.0), r"sigma=0\.0 is not allowed"),
        (lambda: hsic.label_gram(np.zeros(4, np.int32), 10, "cubic"), "label kernel 'cubic' is unknown"),
    ):
        with pytest.raises(InputError, match=words):
            call()
