"""Every network has the same values and gradients in the forms for a CPU, a GPU and a TPU.

And what these forms consist of: networks prepared once per attack, and operations with a gradient of their own.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import once
from ml_collections import ConfigDict
from test_models import random_variables

from ibjax import config, losses
from ibjax.attacks import hoist, pgd
from ibjax.devices import cluster, cores, forms
from ibjax.errors import InputError
from ibjax.models import gradients, layers, packed
from ibjax.net import linen_net

RESNET = dict(name="resnet", blocks=(1, 1), width=8)
NETWORKS = {
    "resnet": RESNET,
    "resnet-packed": dict(name="resnet", blocks=(2, 1), width=64),
    "resnet-imagenet": dict(name="resnet", depth=50, blocks=(1, 1), width=4, stem="imagenet"),
    "preact": dict(name="preact_resnet", blocks=(1, 1), width=8),
    "preact-packed": dict(name="preact_resnet", blocks=(2, 1), width=64),
    "preact-silu": dict(name="preact_resnet", blocks=(1, 1), width=8, activation="silu", projection="deepmind"),
    "wide": dict(name="wide_resnet", depth=10, width=1),
    "wide-ib_rar": dict(name="wide_resnet", depth=10, width=1, variant="ib_rar", dropout=0.3),
    "vgg": dict(name="vgg", depth=11, width=4, hidden=(16, 16)),
    "vgg-torchvision": dict(name="vgg", depth=11, width=4, hidden=(16, 16), variant="torchvision"),
    "cnn": dict(name="cnn", widths=((8,), (8,)), hidden=(16,)),
    "cnn-norm": dict(name="cnn", widths=((8, 8),), hidden=(), pool="average", batch_norm=True, padding=1),
    "siriib": dict(name="siriib", backbone=RESNET, scales=(8,), widths=(8,), connections=3),
    "stochastic": dict(name="stochastic", backbone=RESNET, latent=8),
    "convnext": dict(name="convnext", blocks=(1, 1), width=8),
    "vit": dict(name="vit", depth=2, width=16, heads=2, patch=8),
    "xcit": dict(name="xcit", depth=2, width=16, heads=2, patch=4),
    "swin": dict(name="swin", blocks=(2, 1), width=16, heads=2, window=4),
    "masked": dict(name="masked", backbone=RESNET, tap="stage2", channels=(1, 3)),
}
X = np.random.default_rng(0).random((4, 32, 32, 3), np.float32)
Y = np.arange(4, dtype=np.int32)


def normal(seed, *shape):
    """Normally distributed float32 numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@once
def pixels():
    return jax.random.uniform(jax.random.key(0), X.shape)


def started(model, x):
    """Weights and statistics as of a trained network: none is zero, variances are positive.

    With these and `pixels()`, rounding switches no ReLU of the networks below, which would change a gradient far more.
    So they are added up in NumPy: as one program with the initialisation, the last bits are others.
    """
    variables = {"batch_stats": {}, **jax.device_get(jax.jit(model.init)(jax.random.key(1), x))}
    params, statistics = variables["params"], variables["batch_stats"]
    length = max(leaf.size for leaf in jax.tree.leaves(variables))
    normally, uniformly = jax.device_get(noise(length))
    params = jax.tree.map(lambda a: a + np.float32(0.1) * normally[: a.size].reshape(a.shape), params)
    return {
        "params": params,
        "batch_stats": jax.tree.map(lambda a: a + uniformly[: a.size].reshape(a.shape), statistics),
    }


@functools.partial(jax.jit, static_argnums=0)
def noise(length):
    """Of one key: what JAX draws for an array of any shape is the beginning of what it draws for a longer one."""
    key = jax.random.key(3)
    return jax.random.normal(key, (length,)), jax.random.uniform(key, (length,))


def everything(model, variables, x):
    """Logits, taps and gradients of pixels in evaluation mode; the same of weights and statistics in training mode."""
    net = linen_net(model)

    def value(params, x, train):
        weights = {**variables, "params": params}
        if train:
            (logits, features), updated = net.forward(weights, x, jax.random.key(2))
        else:
            (logits, features), updated = net.predict(weights, x), {}
        return losses.cross_entropy(logits, Y).mean(), (logits, dict(features), updated.get("batch_stats"))

    params = variables["params"]
    return [jax.grad(value, 1 - train, has_aux=True)(params, x, bool(train)) for train in (0, 1)]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_the_same_on_every_platform(name):
    model = config.build("models", ConfigDict(NETWORKS[name]), "model", num_classes=5)
    x, found = pixels(), {}
    variables = started(model, x)
    for platform in forms.TABLE:
        with cores.elsewhere(platform):
            found[platform] = jax.jit(lambda v, x: everything(model, v, x))(variables, x)
    for platform in ("cuda", "tpu"):
        pairs = zip(*map(jax.tree.leaves, (found[platform], found["cpu"])), strict=True)
        for a, b in pairs:
            np.testing.assert_allclose(a, b, atol=5e-5 * np.abs(b).max() + 3e-6, err_msg=platform)


def test_the_platform_is_that_of_the_program():
    assert cores.platform() == {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    for platform in forms.TABLE:
        with cores.elsewhere(platform):
            assert cores.platform() == platform and cores.form() is forms.TABLE[platform]
    with cores.elsewhere():
        assert cores.platform() in ("cuda", "tpu") and not cores.form().unroll
    with pytest.raises(InputError, match="the platform 'cuda13' is unknown; allowed: cpu, cuda, tpu"):
        cores.elsewhere("cuda13").__enter__()


# ---- a network that is prepared ----------------------------------------------------------------------------------


def body_of_the_attack(dtype):
    """The body of PGD's loop on a small network as traced for a GPU, and how many of its arguments are constants."""
    model = config.build("models", ConfigDict({**RESNET, "dtype": dtype}), "model", num_classes=5)
    variables = jax.eval_shape(model.init, jax.random.key(1), X)
    net, attack = linen_net(model), pgd.pgd()

    def program(variables, x):
        return attack(jax.random.key(0), lambda x: net.predict(variables, x)[0], x, Y)

    with cores.elsewhere("cuda"):
        equations = jax.make_jaxpr(program)(variables, X).eqns
    (loop,) = (
        equation for equation in equations if equation.primitive.name == "scan" and equation.params["length"] == 10
    )
    body = loop.params["jaxpr"].jaxpr
    return body, len(body.invars) - len(body.outvars)  # a loop without arrays that it runs over returns its carry


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_that_depends_on_weights_alone_is_in_the_loop_of_an_attack(dtype):
    """But what the compiler fuses: broadcasts of a few numbers to whole maps."""
    body, constants = body_of_the_attack(dtype)
    fixed, left = set(body.invars[:constants]), []
    for equation in body.eqns:
        read = [atom for atom in equation.invars if not hasattr(atom, "val")]
        if read and fixed.issuperset(read):
            fixed.update(equation.outvars)
            left += (
                [equation] if equation.outvars[0].aval.ndim < 3 or equation.outvars[0].aval.shape[0] != len(X) else []
            )
    transposed = {"transpose", "rev", "broadcast_in_dim", "reshape"}  # of the kernels, for gradients: no arithmetic
    assert {equation.primitive.name for equation in left} <= transposed, left


def test_a_prepared_function_is_the_function():
    """Values, gradients and the tree of results; through a jitted function, and with arrays of another shape."""
    weights = np.arange(6, dtype=np.float32).reshape(2, 3) + 1

    def f(x):
        hidden = jax.jit(lambda x: gradients.relu_by_output(x @ jnp.square(weights) - 20))(x)
        return {"hidden": hidden, "sum": jnp.where(x > 1, x, 0).sum(), "weights": weights.sum(), "x": x}

    x = np.arange(8, dtype=np.float32).reshape(4, 2)
    total = lambda f: lambda x: f(x)["hidden"].sum() * f(x)["weights"] + f(x)["sum"]  # noqa: E731

    @jax.jit
    def both(x):
        prepared = hoist.prepared(f, x)
        found = {"whole": prepared(x), "part": prepared(x[:3]), "gradient": jax.grad(total(prepared))(x)}
        expected = {"whole": f(x), "part": f(x[:3]), "gradient": jax.grad(total(f))(x)}
        found["mapped"] = jax.vmap(lambda x: hoist.prepared(f, x)(x)["hidden"])(x[None])[0]
        return found, expected | {"mapped": f(x)["hidden"]}

    jax.tree.map(np.testing.assert_array_equal, *both(x))


# ---- two rows side by side ---------------------------------------------------------------------------------------


def test_convolutions_of_packed_maps_are_convolutions():
    """All forms, values and both gradients: what packs, what stays packed, what reads packed maps, and the others."""
    cases = [  # kernel, stride, padding, channels in and out, whether x is packed, whether the result is
        (3, 1, (1, 1), 3, 64, False, True),
        (3, 1, (1, 1), 64, 64, True, True),
        (3, 2, (1, 1), 64, 16, True, False),
        (1, 2, (0, 0), 64, 16, True, False),
        (1, 1, (0, 0), 64, 16, True, False),
        (3, 1, (1, 1), 3, 32, False, False),
    ]
    for size, stride, pads, inside, out, was, becomes in cases:
        x, kernel = normal(0, 2, 8, 6, inside), normal(1, size, size, inside, out)

        def pack(x):
            b, h, w, c = x.shape
            return packed.Packed(x.reshape(b, h // 2, 2, w, c).transpose(0, 1, 3, 2, 4).reshape(b, h // 2, w, 2 * c))

        def ours(x, kernel, was=was, stride=stride, pads=pads, becomes=becomes, pack=pack):
            made = packed.arranged(pack(x) if was else x, kernel, stride, pads, begins=True)
            assert made.packs == becomes
            y = jax.lax.conv_general_dilated(*made[:4], dimension_numbers=gradients.NHWC)
            return packed.unpacked(packed.Packed(y) if becomes else y)

        def usual(x, kernel, stride=stride, pads=pads):
            options = dict(dimension_numbers=gradients.NHWC)
            return jax.lax.conv_general_dilated(x, kernel, (stride, stride), (pads, pads), **options)

        @jax.jit
        def both(x, kernel, ours=ours, usual=usual):
            made = [jax.vjp(f, x, kernel) for f in (ours, usual)]
            return [(y, back(made[1][0])) for y, back in made]

        a, b = both(x, kernel)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), a, b)
    assert packed.Packed(x).shape == (2, 16, 6, 1)


def test_edits_and_taps_of_packed_maps_are_those_of_maps():
    """An edit sees maps, and changes what follows."""
    model = config.build("models", ConfigDict(dict(name="resnet", blocks=(1,), width=64)), "model", num_classes=5)
    x = X[:2, :8, :8]
    variables = random_variables(model, x.shape)  # of values alone, where a ReLU that rounding switches is no matter
    kept = np.arange(64)[None, None, None] % 3 == 0
    edits = {"stem": lambda z: jnp.where(kept, z, 0)}
    found = []
    for platform in ("cuda", "tpu"):
        with cores.elsewhere(platform):
            found.append(jax.jit(lambda v, x: linen_net(model).predict(v, x, edits))(variables, x))
            text = str(jax.make_jaxpr(lambda x: linen_net(model).predict(variables, x))(x))
        assert ("f32[2,4,8,128]" in text) == (platform == "tpu")  # two rows in the channels
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


# ---- operations with a gradient of their own -----------------------------------------------------------------------


@pytest.mark.parametrize("by_product", [False, True])
@pytest.mark.parametrize(
    "size, stride, pad, channels", [(3, 1, 1, 3), (3, 1, 0, 1), (5, 1, 1, 3), (7, 2, 3, 3), (3, 1, 3, 3)]
)
def test_the_convolution_of_pixels_is_a_convolution(size, stride, pad, channels, by_product):
    """In float32, where the second part of the pixels is 0: values, and both gradients."""
    x, kernel = normal(0, 2, 9, 8, channels), normal(1, size, size, channels, 4)
    where = [stride] * 2, [(pad, pad)] * 2

    ours = lambda x, kernel: gradients.convolve_pixels(x, kernel, *where, jnp.float32, by_product)  # noqa: E731
    usual = lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, *where, dimension_numbers=gradients.NHWC)  # noqa: E731
    weight = normal(2, *jax.eval_shape(usual, x, kernel).shape)

    @jax.jit
    def both(x, kernel):
        made = [jax.vjp(convolve, x, kernel) for convolve in (ours, usual)]
        return [(y, *back(weight)) for y, back in made]

    for a, b in zip(*both(x, kernel), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("platform", forms.TABLE)
def test_a_small_step_of_the_pixels_reaches_a_bfloat16_network(platform):
    """The difference of neighbouring pixels, 0.001 beside 0.5: bfloat16 pixels would be equal."""
    x = np.float32(0.5) + np.float32(0.001) * normal(0, 1, 4, 6, 1)
    conv = layers.Conv(1, padding=0, dtype=jnp.bfloat16, pixels=True)
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[1, 1], kernel[1, 2] = 1, -1

    @jax.jit
    def apply(x):
        return conv.apply({"params": {"conv": {"kernel": kernel}}}, x)

    with cores.elsewhere(platform):
        y, program = apply(x), str(jax.make_jaxpr(apply)(x))
    # XLA drops a conversion to bfloat16 and back, on a GPU at least, and with it the second part of each pixel
    assert ("reduce_precision" in program) == (platform != "cpu")
    expected = (x[:, :, :-1] - x[:, :, 1:])[:, 1:-1, 1:]
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float32), expected, atol=2e-5)


def plain_norm(x, scale, bias, skip, relu):
    mean, var = jnp.mean(x, (0, 1, 2), keepdims=True), jnp.var(x, (0, 1, 2), keepdims=True)
    y = (x - mean) * jax.lax.rsqrt(var + 1e-5) * scale.reshape(mean.shape) + bias.reshape(mean.shape)
    y = y if skip is None else y + skip
    return (jnp.maximum(y, 0) if relu else y), mean.ravel(), var.ravel()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("has_skip", [False, True])
def test_batch_norm_in_one_pass_is_batch_norm(relu, has_skip):
    """In float64 to 1e-12: values, moments and all gradients."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, skip, weight = (rng.normal(3, 2, (4, 6, 6, 8)) for _ in range(3))
        scale, bias, shift = (rng.normal(1, 0.3, 8) for _ in range(3))
        given = (x, scale, bias, skip) if has_skip else (x, scale, bias)

        def both(f):
            @jax.jit
            def found(*given):
                y, back, moments = jax.vjp(lambda *a: (lambda y, *m: (y, m))(*f(*a)), *given, has_aux=True)
                return y, moments, back(weight)

            return found(*given)

        part = lambda rest: rest[0] if rest else None  # noqa: E731
        ours = both(lambda x, s, b, *rest: gradients.norm_add_relu(x, s, b, shift, part(rest), 1e-5, relu))
        usual = both(lambda x, s, b, *rest: plain_norm(x, s, b, part(rest), relu))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(usual), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs several devices")
def test_statistics_in_one_pass_are_those_of_the_whole_batch_on_several_devices():
    norm, size = layers.BatchNorm(), 2 * jax.device_count()
    x = normal(0, size, 3, 3, 4) * np.arange(1, size + 1, dtype=np.float32)[:, None, None, None]
    zeros, ones = np.zeros(4, np.float32), np.ones(4, np.float32)
    variables = {"params": {"scale": ones, "bias": zeros}, "batch_stats": {"mean": ones, "var": ones}}
    with cores.elsewhere("tpu"):

        def moments(x):
            make = lambda norm, x: layers.normed(x, True, norm, activation="relu")  # noqa: E731
            return norm.apply(variables, x, mutable=["batch_stats"], method=make)

        sharded = jax.device_put(x, jax.sharding.NamedSharding(cluster.mesh(), cluster.BATCH))
        compiled = jax.jit(moments).lower(sharded).compile()
        (y, updated), program = compiled(sharded), compiled.as_text()
    expected, after = jax.jit(lambda x: norm.apply(variables, x, True, mutable=["batch_stats"]))(x)
    np.testing.assert_allclose(y, np.maximum(expected, 0), atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), updated, after)
    assert "all-reduce" in program and "all-gather" not in program


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scale_and_shift_have_the_usual_gradients(dtype):
    x, mul, add = normal(0, 3, 4, 4, 8).astype(dtype), normal(1, 8), normal(2, 8)

    def usual(x, mul, add):
        return (x.astype(jnp.float32) * mul[None, None, None] + add[None, None, None]).astype(dtype)

    @jax.jit
    def gradients_of(x, mul, add):
        ours = lambda *a: gradients.scale_shift(*a, jnp.dtype(dtype))  # noqa: E731
        (y, back), (z, expected) = (jax.vjp(f, x, mul, add) for f in (ours, usual))
        return (y, z), back(y), expected(y)

    (y, z), found, expected = gradients_of(x, mul, add)
    np.testing.assert_array_equal(y, z)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-5 if dtype == "float32" else 1e-2
        )


# ---- as compiled for the accelerator -------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("row", ["loop resnet18 512", "loop vgg16 512", "loop wrn16 128"])
@pytest.mark.parametrize("topology, needs", [("v5e:2x2", "libtpu"), ("h200", "jax_cuda13_plugin")])
def test_the_loop_of_an_attack_costs_what_the_table_says(row, topology, needs):
    """Within 10 %: of the kernels and bytes for a GPU, of the milliseconds that a TPU's compiler expects."""
    if not importlib.util.find_spec(needs):
        pytest.skip(f"needs {needs}")
    known = json.loads((ROOT / "results" / f"forms-{topology.replace(':', '-')}.json").read_text(encoding="utf-8"))
    if row not in known:
        pytest.skip(f"results/ has no '{row}' for {topology}")
    command = [sys.executable, "benchmarks/forms.py", f"--topology={topology}", f"--child={row}", "--forms=now"]
    environment = {**os.environ, "XLA_FLAGS": ""}  # libtpu knows none of the CPU's
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    found, expected = json.loads(made.stdout.strip().splitlines()[-1]), known[row]["now"]
    for name in {"in_loops", "bytes_in_loops"} & set(expected):
        assert found[name] == pytest.approx(expected[name], rel=0.1), name
