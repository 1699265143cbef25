"""SiRIIB's network: its sizes as printed, its parts as described."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_models import random_variables

from ibjax.devices import cores
from ibjax.errors import InputError
from ibjax.models import layers, resnet, siriib

RESNET, WRN = dict(name="resnet", depth=18), dict(name="wide_resnet", depth=28, width=10)
TINY = dict(name="resnet", blocks=(1,), width=4)
X = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)


def sizes(model, size=32):
    """{part: parameters}, {feature: shape}; nothing is computed."""
    x = np.zeros((1, size, size, 3), np.float32)
    (_, features), variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    count = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in variables["params"].items()}
    return count, {name: value.shape for name, value in features.items()}


@pytest.mark.parametrize(
    "model, total",
    [
        (siriib.Model(10, RESNET), 11_346_042),
        (siriib.Model(10, RESNET, connections=1), 11_235_258),
        (siriib.Model(10, RESNET, connections=2), 11_272_186),
        (siriib.Model(10, WRN), 36_789_754),
        (siriib.Model(10, WRN, widths=(160,) * 2, basic_blocks=True), 37_891_888),
        (siriib.Model(10, WRN, widths=(160,) * 4, basic_blocks=True), 38_814_768),
    ],
)
def test_parameters_are_those_of_the_structure_that_the_printed_tables_settle(model, total):
    count, _ = sizes(model)
    assert count["calibration"] == 4 * (144 + 9 + 9 + 6) == 672
    assert sum(count.values()) == total


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize(
    "backbone, most",
    [(dict(name="resnet", blocks=(1, 1, 1, 1)), 5), (dict(name="wide_resnet", depth=10, width=10), 4)],
)
def test_each_connection_has_the_shape_of_the_feature_it_is_added_to(backbone, most, size):
    for connections in (0, 1, most):
        _, shapes = sizes(siriib.Model(10, backbone, connections=connections), size)
        assert shapes["x_avg"] == (1, size, size, 3) and shapes["orthogonality"] == ()
        infos = [name for name in shapes if name.startswith("info")]
        assert len(infos) == connections
        for i, tap in enumerate(siriib.TAPS[:connections], 1):
            assert shapes[f"info{i}"] == shapes[tap]


def test_more_connections_than_the_backbone_has_features_are_refused():
    with pytest.raises(InputError, match="no 'stage4'"):
        sizes(siriib.Model(10, WRN, connections=5))
    with pytest.raises(InputError, match="connections=6"):
        sizes(siriib.Model(10, RESNET, connections=6))
    with pytest.raises(InputError, match=r"32×32 or 64×64"):
        sizes(siriib.Model(10, RESNET), 48)
    with pytest.raises(InputError, match="even numbers"):
        sizes(siriib.Model(10, RESNET, scales=(32, 9)))
    with pytest.raises(InputError, match="did you mean 'amplitude'"):
        sizes(siriib.Model(10, RESNET, fourier="amplitud"))


def test_without_connections_the_classifier_sees_the_image_or_the_calibrated_image():
    model = siriib.Model(10, dict(name="resnet", blocks=(1,), width=2), connections=0, scales=(8,))
    classifier = resnet.Model(10, blocks=(1,), width=2)

    @jax.jit
    def logits(variables):
        inside = {kind: tree["backbone"] for kind, tree in variables.items()}
        plain, features = model.apply(variables, X)
        calibrated, _ = model.clone(classify="calibrated").apply(variables, X)
        return plain, calibrated, *(classifier.apply(inside, x)[0] for x in (X, features["x_avg"]))

    plain, calibrated, of_images, of_calibrated_images = logits(random_variables(model, X.shape))
    np.testing.assert_allclose(plain, of_images, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(calibrated, of_calibrated_images, rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="did you mean 'calibrated'"):
        jax.eval_shape(model.clone(classify="calibrate").init, jax.random.key(1), X)


@pytest.fixture(scope="module")
def tiny():
    """(model, variables, apply) with two scales and two connections."""
    model = siriib.Model(10, TINY, connections=2, scales=(16, 8), widths=(4, 6))
    return model, random_variables(model, X.shape), jax.jit(model.apply)


def test_the_network_is_the_backbone_with_the_connections_added(tiny):
    """The same logits from the classifier alone when the recorded f_i are added to its features by hand."""
    _, variables, apply = tiny
    logits, features = apply(variables, X)
    alone = resnet.Model(10, blocks=(1,), width=4)
    inside = {kind: tree["backbone"] for kind, tree in variables.items()}
    add = {"stem": lambda f: f + features["info1"], "stage1": lambda f: f + features["info2"]}
    expected, _ = jax.jit(lambda v, x: alone.apply(v, x, edits=add))(inside, X)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert all(np.abs(features[name]).max() > 1e-3 for name in ("info1", "info2"))


def test_the_calibration_works_alone(tiny):
    model, _, apply = tiny
    variables = jax.jit(model.init)(jax.random.key(1), X)
    inside = {kind: tree["calibration"] for kind, tree in variables.items()}
    x_avg, penalty = jax.jit(siriib.Calibration(scales=(16, 8)).apply)(inside, X)
    features = apply(variables, X)[1]
    np.testing.assert_allclose(x_avg, features["x_avg"], atol=1e-6)
    assert x_avg.min() > 0 and x_avg.max() < 1
    assert penalty == pytest.approx(0, abs=1e-10)  # orthogonal as it starts


def test_the_orthogonal_layer_keeps_the_norm_of_an_image_and_not_the_image():
    """W_o acts on windows: with anything else in its place, singular values would change too."""
    w = np.float32(np.linalg.qr(np.random.default_rng(3).normal(size=(12, 12)))[0])
    y = jax.jit(lambda x: layers.pixel_shuffle(jnp.matmul(layers.pixel_unshuffle(x), w, precision="highest")))(X)
    np.testing.assert_allclose(np.linalg.norm(y), np.linalg.norm(X), rtol=1e-5)
    assert np.abs(y - X).max() > 0.1


@pytest.mark.parametrize("penalty", ["off_diagonal", "full"])
def test_the_penalty_is_that_of_the_kernels_that_are_there(penalty):
    module = siriib.Calibration(scales=(16, 8), penalty=penalty)
    variables = random_variables(module, X.shape)
    w = np.random.default_rng(0).normal(size=(2, 12, 12))  # as W_o x: a row for each channel that comes out
    for i in (1, 2):
        kernel = np.float32(w[i - 1].T.reshape(1, 1, 12, 12))
        seen = lax.conv_general_dilated(
            np.ones((1, 1, 1, 12), np.float32), kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        np.testing.assert_allclose(seen.ravel(), w[i - 1].sum(1), rtol=1e-4)
        variables["params"][f"sr{i}"]["vectors"]["conv"]["kernel"] = kernel
    gram = w @ w.transpose(0, 2, 1)
    error = gram * (1 - np.eye(12)) if penalty == "off_diagonal" else gram - np.eye(12)
    found = jax.jit(lambda variables: module.apply(variables, X)[1])(variables)
    np.testing.assert_allclose(found, (error**2).sum(), rtol=1e-4)


@pytest.mark.parametrize("options", [dict(fourier="amp_phase"), dict(fourier="reim"), dict(fuse="concat")])
def test_the_named_variants_differ_and_have_gradients(options):
    default, module = siriib.Calibration(scales=(8,)), siriib.Calibration(scales=(8,), **options)
    small = X[:, :8, :8]
    variables = random_variables(module, small.shape)
    one = jax.eval_shape(default.init, jax.random.key(0), small)["params"]["sr1"]
    assert jax.tree.map(np.shape, one) != jax.tree.map(np.shape, variables["params"]["sr1"])
    gradient = jax.jit(jax.grad(lambda x: module.apply(variables, x)[0].sum()))(small)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("size", [(24, 24), (16, 16), (8, 12), (64, 64), (32, 32)])
def test_resizing_is_pytorchs_without_anti_aliasing(size, platform):
    """Values and gradients, in the form of each platform."""
    torch = pytest.importorskip("torch", reason="the oracle is PyTorch")
    rng = np.random.default_rng(0)
    x, weights = (rng.uniform(size=(2, *s, 3)).astype(np.float32) for s in ((32, 32), size))
    theirs, upstream = (torch.from_numpy(a.transpose(0, 3, 1, 2).copy()) for a in (x, weights))
    expected = torch.nn.functional.interpolate(theirs.requires_grad_(), size=size, mode="bilinear", align_corners=False)
    expected.backward(upstream)

    @jax.jit
    def resized(x, weights):
        values, back = jax.vjp(lambda x: layers.resize(x, size), x)
        return values, back(weights)[0]

    with cores.elsewhere(platform):
        values, gradient = resized(x, weights)
    for ours, torchs in ((values, expected.detach()), (gradient, theirs.grad)):
        np.testing.assert_allclose(ours, torchs.numpy().transpose(0, 2, 3, 1), atol=1e-5)


def test_pixel_unshuffle_has_pytorchs_order():
    torch = pytest.importorskip("torch", reason="the oracle is PyTorch")
    expected = torch.nn.functional.pixel_unshuffle(torch.from_numpy(X.transpose(0, 3, 1, 2).copy()), 2).numpy()
    packed, again = jax.jit(lambda x: (layers.pixel_unshuffle(x), layers.pixel_shuffle(layers.pixel_unshuffle(x))))(X)
    np.testing.assert_array_equal(packed, expected.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(again, X)


def test_the_sigmoid_comes_before_the_interpolation(tiny):
    """By hand from the modules: the other order would give other values."""
    model, variables, _ = tiny
    module = siriib.SingularRegularization("amplitude", "add", "off_diagonal", 1)

    @jax.jit
    def by_hand(variables):
        maps, swapped = [], []
        for i, s in enumerate((16, 8), 1):
            inside = {kind: tree["calibration"][f"sr{i}"] for kind, tree in variables.items()}
            y, _ = module.apply(inside, layers.resize(X, (s, s)), train=False)
            maps.append(layers.resize(jax.nn.sigmoid(y), (16, 16)))
            swapped.append(jax.nn.sigmoid(layers.resize(y, (16, 16))))
        return sum(maps) / 2, sum(swapped) / 2

    expected, swapped = by_hand(variables)
    found = jax.jit(lambda variables: model.apply(variables, X)[1]["x_avg"])(variables)  # and nothing after it
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found - swapped).max() > 1e-5
