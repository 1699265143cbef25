"""Every network has the same values and gradients in the forms for a CPU, a GPU and a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ibjax import config, losses, step
from ibjax.devices import cores, forms
from ibjax.errors import InputError

RESNET = dict(name="resnet", blocks=(1, 1), width=8)
NETWORKS = {
    "resnet": RESNET,
    "resnet-imagenet": dict(name="resnet", depth=50, blocks=(1, 1), width=4, stem="imagenet"),
    "preact": dict(name="preact_resnet", blocks=(1, 1), width=8),
    "preact-silu": dict(name="preact_resnet", blocks=(1, 1), width=8, activation="silu", projection="deepmind"),
    "wide": dict(name="wide_resnet", depth=10, width=1),
    "wide-ib_rar": dict(name="wide_resnet", depth=10, width=1, variant="ib_rar", dropout=0.3),
    "vgg": dict(name="vgg", depth=11, width=4, hidden=(16, 16)),
    "vgg-torchvision": dict(name="vgg", depth=11, width=4, hidden=(16, 16), variant="torchvision"),
    "cnn": dict(name="cnn", widths=((8,), (8,)), hidden=(16,)),
    "cnn-norm": dict(name="cnn", widths=((8,), (8,)), hidden=(), pool="average", batch_norm=True, padding=1),
    "siriib": dict(name="siriib", backbone=RESNET, scales=(8,), widths=(8,), connections=3),
    "stochastic": dict(name="stochastic", backbone=RESNET, latent=8),
    "masked": dict(name="masked", backbone=RESNET, tap="stage2", channels=(1, 3)),
}
X = jax.random.uniform(jax.random.key(0), (4, 32, 32, 3))
Y = jnp.arange(4)


def shaken(variables):
    """Weights and statistics as of a trained network: none is zero, variances are positive."""
    key = jax.random.key(3)
    parts = variables["params"], variables.get("batch_stats", {})
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(key, a.shape), parts[0])
    return {"params": params, "batch_stats": jax.tree.map(lambda a: a + jax.random.uniform(key, a.shape), parts[1])}


def everything(model, variables, x):
    """Logits, taps and gradients of pixels in evaluation mode; the same of weights and statistics in training mode."""
    net = step.linen_net(model)

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
    variables = shaken(jax.jit(model.init)(jax.random.key(1), X))
    found = {}
    for platform in forms.TABLE:
        with cores.elsewhere(platform):
            found[platform] = jax.jit(lambda v, x: everything(model, v, x))(variables, X)
    for platform in ("cuda", "tpu"):
        pairs = zip(*map(jax.tree.leaves, (found[platform], found["cpu"])), strict=True)
        for a, b in pairs:
            np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()) + 1e-7, err_msg=platform)


def test_the_platform_is_that_of_the_program():
    assert cores.platform() == {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    for platform in forms.TABLE:
        with cores.elsewhere(platform):
            assert cores.platform() == platform and cores.form() is forms.TABLE[platform]
    with cores.elsewhere():
        assert cores.platform() in ("cuda", "tpu") and not cores.form().unroll
    with pytest.raises(InputError, match="the platform 'cuda13' is unknown; allowed: cpu, cuda, tpu"):
        cores.elsewhere("cuda13").__enter__()
