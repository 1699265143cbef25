"""Architectures: parameter counts, taps, PyTorch's conventions."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibjax.errors import InputError
from ibjax.models import (
    cnn,
    convnext,
    layers,
    preact_resnet,
    resnet,
    siriib,
    stochastic,
    swin,
    vgg,
    vit,
    wide_resnet,
    xcit,
)

CIFAR, MNIST, IMAGENET = (2, 32, 32, 3), (2, 28, 28, 1), (1, 224, 224, 3)
RESNET = dict(name="resnet", blocks=(1, 1, 1), width=4)
# every family, and every option that changes what is computed, in a size that a test can afford
SMALL = {
    "cnn": cnn.Model(10, widths=((4,), (8,)), hidden=(8, 8)),
    "resnet": resnet.Model(10, width=4, blocks=(1, 1, 1)),
    "resnet_bottleneck": resnet.Model(10, depth=50, width=4, blocks=(1, 1), stem="imagenet"),
    "preact_resnet": preact_resnet.Model(10, width=4, blocks=(1, 1, 1)),
    "preact_resnet_raw": preact_resnet.Model(10, width=4, blocks=(1, 1), projection="raw", final_norm=False),
    "wide_resnet": wide_resnet.Model(10, 10, 1, dropout=0.2),
    "wide_resnet_silu": wide_resnet.Model(10, 10, 1, variant="deepmind", activation="silu"),
    "wide_resnet_ib_rar": wide_resnet.Model(10, 10, 1, variant="ib_rar", dropout=0.3),
    "vgg": vgg.Model(10, depth=11, width=4, hidden=(8, 8)),
    "vgg_torchvision": vgg.Model(10, depth=11, width=2, hidden=(8, 8), variant="torchvision"),
    "stochastic": stochastic.Model(10, RESNET, latent=6),
    "siriib": siriib.Model(10, RESNET, widths=(4, 6)),
    "siriib_blocks": siriib.Model(10, RESNET, widths=(4, 4), basic_blocks=True),
    "convnext": convnext.Model(10, width=4, blocks=(1, 1), drop_path=0.2, layer_scale=0.5),
    "vit": vit.Model(10, depth=2, width=8, heads=2, patch=8, drop_path=0.2),
    "vit_convstem": vit.Model(10, depth=2, width=8, heads=2, stem="convstem", stem_width=2),
    "xcit": xcit.Model(10, depth=2, width=8, heads=2, patch=4, drop_path=0.2),
    "swin": swin.Model(10, blocks=(2, 1), width=8, heads=2, window=4, drop_path=0.2),
}


IMAGES = np.random.default_rng(1).random(CIFAR, np.float32)


def random_variables(model, shape=CIFAR, seed=0):
    """Of a network: to initialise it would compile it once more, and start some layers at zero."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros(shape, np.float32))
    random = np.random.default_rng(seed)

    def fill(path, leaf):
        if path[-1].key in ("scale", "var"):
            return random.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        return random.normal(0, 1 / np.sqrt(max(leaf.size / leaf.shape[-1], 2)), leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.fixture(scope="module")
def built():
    """name -> (model, variables, images, (logits, features) in evaluation mode, training-mode function of a key)."""

    @functools.cache
    def build(name):
        model, x = SMALL[name], IMAGES
        variables = random_variables(model)

        @jax.jit
        def train(key):
            return model.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key, "sample": key})

        return model, variables, x, jax.jit(model.apply)(variables, x), train

    return build


def parameters(model, shape):
    variables = jax.eval_shape(model.init, jax.random.key(0), np.zeros(shape, np.float32))
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize(
    "model, shape, count",
    [
        (cnn.Model(10), MNIST, 312_202),  # TRADES's SmallCNN
        (preact_resnet.Model(10, depth=18), CIFAR, 11_172_170),
        (preact_resnet.Model(10, depth=34), CIFAR, 21_280_330),
        (resnet.Model(10, depth=18), CIFAR, 11_173_962),
        (resnet.Model(10, depth=34), CIFAR, 21_282_122),
        (resnet.Model(10, depth=50), CIFAR, 23_520_842),  # pytorch-cifar
        (resnet.Model(1000, depth=18, stem="imagenet"), IMAGENET, 11_689_512),  # torchvision
        (resnet.Model(1000, depth=50, stem="imagenet"), IMAGENET, 25_557_032),  # torchvision
        (resnet.Model(1000, depth=50, stem="imagenet", inner_width=2), IMAGENET, 68_883_240),  # wide_resnet50_2
        (wide_resnet.Model(10, depth=28, width=4), CIFAR, 5_849_050),
        (wide_resnet.Model(10, depth=28, width=10), CIFAR, 36_479_194),
        (wide_resnet.Model(10, depth=34, width=10), CIFAR, 46_160_474),
        (wide_resnet.Model(10, depth=34, width=20), CIFAR, 184_531_674),
        (wide_resnet.Model(10, depth=70, width=16), CIFAR, 266_796_506),
        (wide_resnet.Model(10, 28, 10, variant="ib_rar"), CIFAR, 36_489_290),
        (vgg.Model(1000, depth=16, hidden=()), CIFAR, 14_723_136 + 512 * 1000 + 1000),  # torchvision's features
        (vgg.Model(10, depth=16), CIFAR, 33_663_050),
        (vgg.Model(1000, depth=16, variant="torchvision"), IMAGENET, 138_365_992),  # vgg16_bn
        (stochastic.Model(10, dict(name="resnet", depth=18)), CIFAR, 11_434_058),
        (convnext.Model(1000), IMAGENET, 28_589_128),  # this and the following: timm
        (convnext.Model(1000, stem="convstem"), IMAGENET, 28_627_432),  # Singh et al., with timm's body
        (convnext.Model(1000, depth=36), IMAGENET, 50_223_688),
        (convnext.Model(1000, depth=36, width=128), IMAGENET, 88_591_464),
        (convnext.Model(1000, depth=36, width=192), IMAGENET, 197_767_336),
        (vit.Model(1000), IMAGENET, 22_050_664),
        (vit.Model(1000, width=768), IMAGENET, 86_567_656),
        (xcit.Model(1000), IMAGENET, 26_253_304),
        (swin.Model(1000), IMAGENET, 28_288_354),
        (swin.Model(1000, depth=24), IMAGENET, 49_606_258),
        (swin.Model(1000, depth=24, width=128), IMAGENET, 87_768_224),
        (swin.Model(1000, depth=24, width=192), IMAGENET, 196_532_476),
    ],
)
def test_parameter_counts_are_the_published_ones(model, shape, count):
    assert parameters(model, shape) == count


@pytest.mark.parametrize(
    "model, blocks, sizes",
    [
        (preact_resnet.Model(10, depth=18, width=4), 8, [32, 32, 16, 16, 8, 8, 4, 4]),
        (resnet.Model(10, depth=18, width=4), 8, [32, 32, 16, 16, 8, 8, 4, 4]),
        (wide_resnet.Model(10, depth=16, width=1), 6, [32, 32, 16, 16, 8, 8]),
    ],
)
def test_every_block_is_a_tap_of_the_right_size(model, blocks, sizes):
    logits, features = jax.jit(model.apply)(random_variables(model), IMAGES)
    assert logits.shape == (2, 10) and logits.dtype == jnp.float32
    assert [features[f"block{i}"].shape[1] for i in range(1, blocks + 1)] == sizes
    assert {"stem", "stage1", "stage2", "stage3", "pre_logits"} <= set(features)
    last = features.get(f"block{blocks}_relu", features[f"block{blocks}"])
    assert last.min() >= 0
    np.testing.assert_allclose(features["pre_logits"], np.asarray(last).mean((1, 2)), rtol=1e-5)


def test_pre_activation_taps_are_the_normalised_block_outputs(built):
    _, variables, _, (_, features), _ = built("preact_resnet")
    norm, running = (variables[kind]["block2"]["bn1"] for kind in ("params", "batch_stats"))  # the next block's first
    normalised = (np.float64(features["block1"]) - running["mean"]) / np.sqrt(running["var"] + 1e-5)
    expected = np.maximum(normalised * norm["scale"] + norm["bias"], 0)
    np.testing.assert_allclose(features["block1_relu"], expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_where_it_matters():
    model = preact_resnet.Model(10, depth=10, width=8, dtype="bfloat16")
    x = IMAGES
    variables = jax.jit(model.init)(jax.random.key(1), x)
    train = jax.jit(lambda x: model.apply(variables, x, train=True, mutable=["batch_stats"]))
    (logits, features), updated = train(x)
    assert features["block1"].dtype == jnp.bfloat16 and logits.dtype == features["pre_logits"].dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves([variables, updated]))
    exact, _ = jax.jit(model.clone(dtype="float32").apply)(variables, x)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, x)[0], exact, atol=0.05)


def test_batch_norm_keeps_pytorchs_running_statistics():
    """Against torch.nn.BatchNorm1d on a small batch, where biased and unbiased variance differ by a quarter."""
    torch = pytest.importorskip("torch", reason="the oracle is PyTorch")
    x = np.random.default_rng(0).normal(2.0, 3.0, (5, 3)).astype(np.float32)
    reference = torch.nn.BatchNorm1d(3)
    expected = reference(torch.tensor(x)).detach().numpy()
    norm = layers.BatchNorm()

    @jax.jit
    def ours(x):
        variables = norm.init(jax.random.key(0), x, train=False)
        y, updated = norm.apply(variables, x, train=True, mutable=["batch_stats"])
        return y, updated["batch_stats"], norm.apply({**variables, **updated}, x, train=False)

    y, running, evaluated = ours(x)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(running["mean"], reference.running_mean.numpy(), rtol=1e-6)
    np.testing.assert_allclose(running["var"], reference.running_var.numpy(), rtol=1e-6)
    np.testing.assert_allclose(evaluated, reference.eval()(torch.tensor(x)).detach().numpy(), atol=1e-5)


def test_batch_norm_groups_normalise_each_part_of_the_batch_by_itself():
    x = np.random.default_rng(0).normal(size=(8, 4, 4, 3)) * np.arange(1, 9).reshape(8, 1, 1, 1)
    norm, grouped = layers.BatchNorm(), layers.BatchNorm(groups=2)

    @jax.jit
    def both(x):
        variables = norm.init(jax.random.key(0), x, train=False)
        together = grouped.apply(variables, x, train=True, mutable=["batch_stats"])[0]
        halves = [norm.apply(variables, half, train=True, mutable=["batch_stats"])[0] for half in (x[:4], x[4:])]
        return together, jnp.concatenate(halves)

    together, halves = both(np.float32(x))
    np.testing.assert_allclose(together, halves, atol=1e-5)


def test_stride_two_pads_both_sides_as_pytorch_does():
    """ "SAME" would pad one side only, and shift every feature map after it."""
    x = np.zeros((1, 4, 4, 1), np.float32)
    x[0, 0, 0, 0] = 1
    conv = layers.Conv(1, stride=2, kernel_init=lambda key, shape, dtype: jnp.arange(9.0).reshape(shape))
    y = np.asarray(jax.jit(conv.init_with_output)(jax.random.key(0), x)[0])
    assert y[0, 0, 0, 0] == 4.0  # the kernel's centre, at (1, 1) of 3×3, meets the corner pixel


@pytest.mark.parametrize(
    "init, std", [(layers.torch_uniform, (3 * 9 * 16) ** -0.5), (layers.fan_out_normal, (2 / (9 * 32)) ** 0.5)]
)
def test_initialisers_have_the_papers_scale(init, std):
    kernel = np.asarray(jax.jit(lambda key: init(key, (3, 3, 16, 32), jnp.float32))(jax.random.key(0)))
    assert abs(float(kernel.std()) / std - 1) < 0.03
    if init is layers.torch_uniform:
        assert abs(float(np.abs(kernel).max()) * (9 * 16) ** 0.5 - 1) < 0.01


def test_standardising_is_inside_the_model_and_is_pytorchs():
    """advertorch's batch_per_image_standardization, in NumPy; a flat image is finite and has a gradient."""
    x = np.random.default_rng(0).random(CIFAR).astype(np.float32)
    x[1] = 0.25
    flat = x.reshape(len(x), -1)
    deviation = np.maximum(flat.std(1, ddof=1), flat.shape[1] ** -0.5)
    expected = ((flat - flat.mean(1, keepdims=True)) / deviation[:, None]).reshape(x.shape)
    plain, standardizing = wide_resnet.Model(10, 10, 1), wide_resnet.Model(10, 10, 1, standardize=True)
    variables = random_variables(plain)

    @jax.jit
    def ours(x):
        gradient = jax.grad(lambda x: layers.standardize(x)[:, 0, 0, 0].sum())(x)
        return (
            layers.standardize(x),
            gradient,
            standardizing.apply(variables, x)[0],
            plain.apply(variables, expected)[0],
        )

    standardized, gradient, inside, outside = ours(x)
    np.testing.assert_allclose(standardized, expected, atol=1e-5)
    np.testing.assert_allclose(inside, outside, atol=1e-5)
    assert np.isfinite(gradient).all()


def test_linear_layers_start_as_their_name_says():
    """Xavier's bound is √(6/(fan_in + fan_out)), with biases of zero; PyTorch's is 1/√fan_in for both."""
    backbone = dict(name="cnn", widths=(), hidden=(300,), dropout=0.0)
    models = {
        name: stochastic.Model(10, backbone | dict(linear_init=name), latent=100, linear_init=name)
        for name in ("xavier", "torch")
    }
    images = np.zeros((1, 28, 28, 1), np.float32)
    started = jax.jit(lambda key: {name: model.init(key, images) for name, model in models.items()})
    for name, variables in started(jax.random.key(0)).items():
        params = variables["params"]
        for layer, fans in (
            (params["backbone"]["fc1"], (784, 300)),
            (params["gaussian"], (300, 200)),
            (params["head"], (100, 10)),
        ):
            dense, bound = layer["dense"], (6 / sum(fans)) ** 0.5 if name == "xavier" else fans[0] ** -0.5
            assert dense["kernel"].shape == fans
            assert 0.9 * bound < np.abs(dense["kernel"]).max() <= bound
            assert (np.abs(dense["bias"]).max() == 0) == (name == "xavier")
    with pytest.raises(InputError, match=r"linear_init 'he' is unknown; allowed: "):
        parameters(stochastic.Model(10, backbone, linear_init="he"), (1, 28, 28, 1))


def test_normalisation_is_inside_the_model():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    plain = SMALL["resnet"]
    normalising = plain.clone(mean=mean, std=std)
    variables, outside = random_variables(plain), np.float32((IMAGES - mean) / std)
    found, expected = jax.jit(lambda x: (normalising.apply(variables, x)[0], plain.apply(variables, outside)[0]))(
        IMAGES
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_training_mode_moves_every_running_statistic_and_nothing_else(name, built):
    _, variables, _, (_, evaluated), train = built(name)
    (logits, features), updated = train(jax.random.key(1))
    assert logits.shape == (2, 10) and np.isfinite(logits).all()
    assert set(features) == set(evaluated)
    assert set(updated) == {"batch_stats"} & set(variables)
    before, after = (jax.tree.leaves(each.get("batch_stats", {})) for each in (variables, updated))
    assert all(np.any(a != np.asarray(b)) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_keeps_parameters_statistics_and_logits_in_float32(name):
    model, x = SMALL[name], np.zeros(CIFAR, np.float32)
    half = dict(dtype="bfloat16")
    rounded = model.clone(**half) if hasattr(model, "dtype") else model.clone(backbone=model.backbone | half)
    variables = jax.eval_shape(rounded.init, jax.random.key(0), x)
    logits, features = jax.eval_shape(rounded.apply, variables, x)
    assert {leaf.dtype for leaf in jax.tree.leaves([variables, logits])} == {jnp.dtype("float32")}
    assert features["stage1" if "stage1" in features else "block1"].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", SMALL)
def test_an_edit_changes_what_comes_after_it_and_nothing_before(name, built):
    model, variables, x, (logits, features), _ = built(name)
    order = []
    jax.eval_shape(lambda x: order.extend(model.apply(variables, x)[1]), x)
    assert set(order) == set(features)  # which jit has sorted by name
    tap = "stage1" if "stage1" in features else "block1"
    edits = {tap: lambda f: f * f + 1}  # no layer norm undoes it
    changed, edited = jax.jit(lambda x: model.apply(variables, x, edits=edits))(x)
    np.testing.assert_allclose(edited[tap], np.square(features[tap]) + 1, rtol=1e-5, atol=1e-5)
    for before in order[: order.index(tap)]:
        np.testing.assert_allclose(edited[before], features[before], rtol=1e-5, atol=1e-6, err_msg=before)
    assert np.abs(np.asarray(changed) - np.asarray(logits)).max() > 1e-3


def test_edits_of_zero_ablate_a_channel_and_a_wrong_one_is_named(built):
    model, variables, x, (_, features), _ = built("resnet")
    mask = np.arange(features["pre_logits"].shape[1], dtype=np.float32)[None] % 2
    changed, _ = jax.jit(lambda x: model.apply(variables, x, edits={"pre_logits": lambda f: f * mask}))(x)
    head = variables["params"]["head"]["dense"]
    expected = (np.asarray(features["pre_logits"]) * mask) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(changed, expected, atol=1e-5)
    with pytest.raises(InputError, match=r"no feature 'stage_1'; allowed: .* did you mean 'stage1'\?"):
        jax.eval_shape(lambda x: model.apply(variables, x, edits={"stage_1": lambda f: f}), x)
    with pytest.raises(InputError, match="the edit of 'stem' returns"):
        jax.eval_shape(lambda x: model.apply(variables, x, edits={"stem": lambda f: f[:1]}), x)


def test_an_edit_of_a_normalised_tap_is_what_the_next_convolutions_see():
    """Zeros there leave of a block with equal widths only what it adds to: the raw input."""
    model = wide_resnet.Model(10, 16, 1)

    @jax.jit
    def run(key):  # where batch-norms start, they keep zeros
        return model.apply(model.init(key, IMAGES), IMAGES, edits={"block1_relu": lambda f: 0 * f})

    _, features = run(jax.random.key(0))
    np.testing.assert_array_equal(features["block2"], features["block1"])


@pytest.mark.parametrize(
    "name",
    ["resnet", "resnet_bottleneck", "preact_resnet", "wide_resnet_silu", "siriib", "convnext", "vit", "xcit", "swin"],
)
def test_rematerialisation_changes_no_value_and_no_gradient(name, built):
    """The same outputs, batch statistics and gradients; only in training, convolutions are computed twice."""
    model, variables, x, *_ = built(name)
    lean = model.clone(remat=True) if name != "siriib" else model.clone(backbone={**RESNET, "remat": True})

    def training(model):
        def value(params):
            options = dict(train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(2)})
            output, updated = model.apply({**variables, "params": params}, x, **options)
            return jnp.mean(jnp.square(output[0])), (output, updated)

        return jax.grad(value, has_aux=True)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * (0.1 + np.abs(a).max())),
        *(jax.jit(training(m))(variables["params"]) for m in (model, lean)),
    )

    def products(f, given):
        return len(re.findall("conv_general|dot_general", str(jax.make_jaxpr(f)(given))))

    plain, again = (products(training(m), variables["params"]) for m in (model, lean))
    assert plain < again
    plain, again = (products(jax.grad(lambda x, m=m: m.apply(variables, x)[0].sum()), x) for m in (model, lean))
    assert plain == again


def test_without_classes_a_backbone_ends_before_its_last_layer(built):
    model, variables, x, (_, features), _ = built("wide_resnet")
    backbone = model.clone(num_classes=None)
    assert "head" not in jax.eval_shape(backbone.init, jax.random.key(0), x)["params"]
    headless = {**variables, "params": {k: v for k, v in variables["params"].items() if k != "head"}}
    output, _ = jax.jit(backbone.apply)(headless, x)
    np.testing.assert_allclose(output, features["pre_logits"], rtol=1e-5, atol=1e-7)


PYTORCH = (3 * 9 * 16) ** -0.5  # of U(±1/√fan_in), for 3×3 kernels from 16 to 32 channels
FAN_OUT = (2 / (9 * 32)) ** 0.5


@pytest.mark.parametrize(
    "model, std, zero_bias",
    [
        (wide_resnet.Model(10, 10, 2), FAN_OUT, True),
        (wide_resnet.Model(10, 10, 2, variant="ib_rar"), PYTORCH, False),
        (resnet.Model(10, blocks=(1,)), PYTORCH, False),
        (resnet.Model(10, 50, stem="imagenet", blocks=(1,)), FAN_OUT, False),
        (preact_resnet.Model(10, blocks=(1,)), PYTORCH, False),
        (vgg.Model(10, depth=11), PYTORCH, False),
        (vgg.Model(10, depth=11, variant="torchvision"), FAN_OUT, True),
        (cnn.Model(10), (2 / (9 * 16)) ** 0.5, True),
        (SMALL["convnext"], 0.02, True),
        (SMALL["vit_convstem"], PYTORCH, True),
        (SMALL["xcit"], PYTORCH, True),
        (SMALL["swin"], PYTORCH, True),
    ],
)
def test_every_convolution_of_a_family_starts_as_its_published_file_does(model, std, zero_bias):
    convolutions, heads = [], []

    def collect(call, args, kwargs, context):
        module = context.module
        if isinstance(module, nn.Conv):
            convolutions.append(module.kernel_init)
        elif context.module.name == "head":
            heads.append(module.bias_init)
        return call(*args, **kwargs)

    with nn.intercept_methods(collect):
        jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    assert convolutions
    for init in set(convolutions):
        kernel = init(jax.random.key(0), (3, 3, 16, 32), jnp.float32)
        assert abs(float(np.std(kernel)) / std - 1) < 0.05
    assert (heads[0] is nn.initializers.zeros) is zero_bias


def test_dropout_stands_where_each_variant_has_it(built):
    """Before the second batch-norm (IB-RAR) its statistics see the dropped values; after it they do not."""
    for name, seen in (("wide_resnet", False), ("wide_resnet_ib_rar", True)):
        train = built(name)[-1]
        one, two = (train(jax.random.key(seed))[1]["batch_stats"]["block1"]["bn2"]["mean"] for seed in (1, 2))
        assert bool((one != two).any()) is seen


@pytest.mark.parametrize(
    "model",
    [
        preact_resnet.Model(10, depth=19),
        preact_resnet.Model(10, projection="rwa"),
        resnet.Model(10, depth=7),
        resnet.Model(10, stem="image_net"),
        wide_resnet.Model(10, 30),
        wide_resnet.Model(10, 10, variant="deep_mind"),
        wide_resnet.Model(10, 10, activation="mish"),
        vgg.Model(10, depth=17),
        vgg.Model(10, variant="torch_vision"),
    ],
)
def test_an_impossible_depth_or_variant_is_refused(model):
    with pytest.raises(InputError, match="allowed"):
        parameters(model, CIFAR)


@pytest.mark.parametrize(
    "model, match",
    [
        (resnet.Model(10, depth=18, inner_width=2), "inner_width=2: give 1 or more, and 1 for depths below 50"),
        (resnet.Model(10, depth=50, inner_width=0), "inner_width=0"),
        (wide_resnet.Model(10, 10, border=-1), "border=-1 is not allowed"),
    ],
)
def test_an_impossible_width_or_border_is_refused(model, match):
    with pytest.raises(InputError, match=match):
        parameters(model, CIFAR)


@pytest.mark.parametrize("name", ["wide_resnet", "preact_resnet"])
def test_a_border_is_zeros_before_normalisation(name):
    model, inner = SMALL[name].clone(mean=(0.5,) * 3, std=(0.25,) * 3), IMAGES[:, 2:-2, 2:-2]
    variables, padded = random_variables(model), np.pad(inner, ((0, 0), (2, 2), (2, 2), (0, 0)))
    expected, _ = jax.jit(model.apply)(variables, padded)
    found, features = jax.jit(model.clone(border=2).apply)(variables, inner)
    np.testing.assert_array_equal(found, expected)
    assert features["stem"].shape[1:3] == (32, 32)


@pytest.mark.parametrize("side", [1, 2, 3, 7, 10, 14])
def test_adaptive_average_pooling_is_pytorchs(side):
    """Cell i is the mean of every pixel that it touches: rows floor(i·H/7) to ceil((i + 1)·H/7)."""
    x = np.random.default_rng(0).random((2, side, side + 1, 3), np.float32)
    rows, columns = (
        [slice(int(np.floor(i * n / 7)), int(np.ceil((i + 1) * n / 7))) for i in range(7)] for n in x.shape[1:3]
    )
    expected = [[x[:, row, column].mean((1, 2)) for column in columns] for row in rows]
    found = jax.jit(lambda x: layers.AdaptiveAverage(7).apply({}, x))(x)
    np.testing.assert_allclose(found, np.moveaxis(expected, 2, 0), rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (1, 7, 9, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pooling_has_the_gradient_of_xlas_pooling_also_where_values_are_equal(shape, dtype):
    x, weight = np.random.default_rng(0).normal(size=(2, *shape))
    x = np.maximum(x, 0).astype(jnp.dtype(dtype))  # as after a ReLU: many zeros
    weight = weight[:, : shape[1] // 2, : shape[2] // 2].astype(jnp.dtype(dtype))

    def value(pool, x):
        return jnp.sum(weight * pool(x).astype(dtype))

    @jax.jit
    def gradients(x):
        ours = jax.grad(lambda x: value(lambda x: layers.MaxPool(2, 2).apply({}, x), x))(x)
        return ours, jax.grad(lambda x: value(lambda x: nn.max_pool(x, (2, 2), (2, 2)), x))(x)

    ours, xlas = gradients(x)
    assert np.sum(x == 0) > 10
    np.testing.assert_array_equal(np.float32(ours), np.float32(xlas))


def test_the_gradient_of_pooling_does_not_look_for_a_value_again():
    """XLA may compute x twice and round it differently: a maximum that is found by equality would then be lost."""
    pool = layers.MaxPool(2, 2)
    program = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(pool.apply({}, x))))(jnp.ones((1, 4, 4, 1)))
    compared = [equation.invars for equation in program.eqns if equation.primitive.name == "eq"]
    assert compared and not any(jnp.issubdtype(v.aval.dtype, jnp.floating) for pair in compared for v in pair)
