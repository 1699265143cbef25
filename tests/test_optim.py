"""Optimisers against PyTorch's, schedules at their boundaries."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ibjax import optim
from ibjax.errors import InputError


@pytest.mark.parametrize("name, options", [
    ("sgd", dict(momentum=0.9, weight_decay=5e-2)),
    ("sgd", dict(momentum=0.0, weight_decay=1e-2)),
    ("sgd", dict(momentum=0.9, weight_decay=5e-2, nesterov=True)),
    ("adam", dict(weight_decay=1e-2)),
])  # fmt: skip
def test_updates_are_pytorchs(name, options):
    """Weight decay coupled with the momentum, as torch.optim has it: optax's usual order is another method."""
    torch = pytest.importorskip("torch", reason="the oracle is PyTorch")
    rng = np.random.default_rng(0)
    w, gradients = rng.normal(size=4), rng.normal(size=(5, 4))
    parameter = torch.nn.Parameter(torch.tensor(w))
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[name]
    reference = kind([parameter], lr=0.1, **options)
    params = jnp.float32(w)
    transform = optim.optimizer(name=name, lr=lambda step: 0.1, **options)
    state = transform.init(params)
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        reference.step()
        updates, state = transform.update(jnp.float32(gradient), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, parameter.detach().numpy(), rtol=2e-5)


def schedule(name, **options):
    made = optim.schedule(name=name, lr=0.1, epochs=10, steps_per_epoch=4, **options)
    return lambda step: float(made(jnp.int32(step)))


def test_exponential_falls_in_stairs():
    """×0.97 after every second epoch (VIB); four steps make an epoch."""
    lr = schedule("exponential", factor=0.97, every=2)
    np.testing.assert_allclose(
        [lr(0), lr(7), lr(8), lr(15), lr(16)], 0.1 * 0.97 ** np.array([0, 0, 1, 1, 2]), rtol=1e-5
    )


def test_linear_goes_through_its_points():
    lr = schedule("linear", points=((0.0, 0.0), (2.0, 1.0), (4.0, 0.1)))
    np.testing.assert_allclose([lr(0), lr(4), lr(8), lr(12), lr(99)], [0, 0.05, 0.1, 0.055, 0.01], rtol=1e-5)


def test_piecewise_drops_at_its_boundaries():
    lr = schedule("piecewise", boundaries=(5, 7), factor=0.1)
    np.testing.assert_allclose(
        [lr(0), lr(19), lr(20), lr(27), lr(28), lr(39)], [0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3], rtol=1e-5
    )


def test_next_step_drops_one_batch_early():
    """Rice et al. evaluate the rate after the step: the drop hits the last batch of the epoch before."""
    lr = schedule("piecewise", boundaries=(5,), stepping="next_step")
    np.testing.assert_allclose([lr(18), lr(19), lr(20)], [0.1, 0.01, 0.01], rtol=1e-5)


def test_cosine_and_one_cycle_start_peak_and_end():
    lr = schedule("cosine", warmup=1)
    np.testing.assert_allclose([lr(0), lr(4), lr(22), lr(40)], [0, 0.1, 0.05, 0], atol=1e-7)
    lr = schedule("one_cycle", peak=0.5)
    np.testing.assert_allclose([lr(0), lr(10), lr(20), lr(30), lr(40)], [0, 0.05, 0.1, 0.05, 0], atol=1e-7)


def test_the_head_may_have_its_own_rate():
    network, head = (optim.sgd(lr=lambda step, lr=lr: lr, momentum=0.0, weight_decay=0.0) for lr in (0.1, 0.5))
    params = {"params": jnp.ones(2), "head": jnp.ones(2)}
    both = optim.with_head(network, head)
    updates, _ = both.update(params, both.init(params), params)
    np.testing.assert_allclose(updates["params"], -0.1)
    np.testing.assert_allclose(updates["head"], -0.5)


def test_norm_and_bias_can_be_spared_from_decay():
    transform = optim.sgd(lr=lambda step: 1.0, momentum=0.0, weight_decay=0.1, decay_norm_and_bias=False)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    zero = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    updates, _ = transform.update(zero, transform.init(params), params)
    assert updates["kernel"].max() < 0 and updates["bias"].max() == 0


@pytest.mark.parametrize("call", [
    lambda: optim.schedule(name="cosin", lr=0.1, epochs=1, steps_per_epoch=1),
    lambda: optim.schedule(name="cosine", lr=0.1, epochs=1, steps_per_epoch=1, boundary=3),
    lambda: optim.schedule(name="cosine", lr=0.1, epochs=1, steps_per_epoch=1, stepping="steps"),
    lambda: optim.optimizer(name="sgdd", lr=lambda s: 1.0),
    lambda: optim.optimizer(name="sgd", lr=lambda s: 1.0, momentun=0.9),
])  # fmt: skip
def test_unknown_names_are_refused(call):
    with pytest.raises(InputError, match="unknown"):
        call()
