"""Any objective under representation attacks: the second half of a batch, guided by the first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import in_programs, once

from ibjax import config
from ibjax.errors import InputError
from ibjax.models import stochastic
from ibjax.net import linen_net
from ibjax.objectives.ara import ara
from ibjax.objectives.shared_information import shared_information

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
BATCH = {
    "image": jnp.asarray(RNG.random((12, 8, 8, 1)), jnp.float32),
    "label": jnp.asarray(RNG.integers(0, 4, 12)),
    "index": jnp.arange(12),
    "step": jnp.int32(0),
    "epoch": jnp.float32(20.0),
}
CNN = dict(name="cnn", widths=((4,), (6,)), hidden=(8,), padding=1)
MODEL = stochastic.Model(num_classes=4, backbone=CNN, latent=5)
NET = in_programs(linen_net(MODEL))


@once
def initial():
    """Variables of the network."""
    return {"batch_stats": {}, **jax.jit(MODEL.init)(KEY, BATCH["image"])}


BASE = dict(name="shared_information", neighbours=3)


def test_the_second_half_is_attacked_towards_the_first():
    objective = ara(base=BASE, steps=3)
    assert objective.attack_losses == () and objective.attack is not None
    x_adv, variables = objective.attack(NET, initial(), BATCH, KEY)
    guide, source = jnp.split(BATCH["image"], 2)
    assert x_adv.shape == source.shape and float(jnp.abs(x_adv - source).max()) <= 10 / 255 + 1e-6

    def apart(x):
        return jnp.sum((NET.predict(variables, x)[1]["mu"] - NET.predict(variables, guide)[1]["mu"]) ** 2, -1)

    assert np.all(apart(x_adv) < apart(source))


def test_the_loss_is_that_of_the_objective_on_the_second_half():
    x_adv = BATCH["image"][6:] + 0.01
    second = {name: value[6:] if np.ndim(value) else value for name, value in BATCH.items()}
    expected, (_, metrics) = jax.jit(
        lambda: shared_information(neighbours=3).loss(NET, initial(), second, x_adv, KEY)
    )()
    value, (_, found) = jax.jit(lambda: ara(base=BASE).loss(NET, initial(), BATCH, x_adv, KEY))()
    assert float(value) == float(expected) and found.keys() == metrics.keys() > {"skl", "adv_acc"}


@pytest.mark.parametrize("name", ["standard", "mma", "vib"])
def test_an_objective_that_has_no_such_images_is_refused(name):
    with pytest.raises(InputError, match=f"'{name}' has no adversarial images"):
        ara(base=dict(name=name))


def test_a_typo_inside_the_section_is_named():
    settings = config.base()
    settings.attack = None
    settings.objective = dict(name="ara", base=dict(name="trades", betta=1.0))
    with pytest.raises(InputError, match=r"objective\.base\.betta is unknown"):
        config.check(settings)
    settings.objective = dict(name="ara", base=dict(name="trades"))
    assert config.complete(settings).objective.base.beta == 6.0
    settings.objective = dict(name="ara", base="trades")
    with pytest.raises(InputError, match="is not an objective"):
        config.check(settings)
