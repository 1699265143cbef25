"""Optimisers against PyTorch's, schedules at their boundaries."""

import jax
import numpy as np
import optax
import pytest

from ibjax import optim
from ibjax.errors import InputError


def trajectory(transform, params, gradients):
    """The parameters after each step, (steps, *params.shape), as one program."""

    def step(carry, gradient):
        params, state = carry
        updates, state = transform.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    run = jax.jit(lambda params, gradients: jax.lax.scan(step, (params, transform.init(params)), gradients)[1])
    return run(params, gradients)


def first_updates(transform, gradients, params):
    return jax.jit(lambda g, params: transform.update(g, transform.init(params), params)[0])(gradients, params)


def ones(*shape):
    return np.ones(shape, np.float32)


def zeros_like(params):
    return jax.tree.map(np.zeros_like, params)


@pytest.mark.parametrize("name, options", [
    ("sgd", dict(momentum=0.9, weight_decay=5e-2)),
    ("sgd", dict(momentum=0.0, weight_decay=1e-2)),
    ("sgd", dict(momentum=0.9, weight_decay=5e-2, nesterov=True)),
    ("adam", dict(weight_decay=1e-2)),
    ("adamw", dict(weight_decay=0.3)),
])  # fmt: skip
def test_updates_are_pytorchs(name, options):
    """Weight decay coupled with the momentum, as torch.optim has it: optax's usual order is another method."""
    torch = pytest.importorskip("torch", reason="the oracle is PyTorch")
    rng = np.random.default_rng(0)
    w, gradients = rng.normal(size=4), rng.normal(size=(5, 4))
    parameter = torch.nn.Parameter(torch.tensor(w))
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    reference = kind([parameter], lr=0.1, **options)
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        reference.step()
    transform = optim.optimizer(name=name, lr=lambda step: 0.1, **options)
    params = trajectory(transform, np.float32(w), np.float32(gradients))
    np.testing.assert_allclose(params[-1], parameter.detach().numpy(), rtol=2e-5)


def test_a_moving_momentum_is_that_of_pytorchs_cyclic_schedule():
    """CyclicLR as Fast-AT has it: the rate 0 → 0.2 → 0 and the momentum 0.9 → 0.8 → 0.9, step by step."""
    torch = pytest.importorskip("torch", reason="the oracle is PyTorch")
    rng = np.random.default_rng(0)
    w, gradients = rng.normal(size=4), rng.normal(size=(12, 4))
    parameter = torch.nn.Parameter(torch.tensor(w))
    reference = torch.optim.SGD([parameter], lr=0.2, momentum=0.9, weight_decay=5e-2)
    half = dict(step_size_up=len(gradients) / 2, step_size_down=len(gradients) / 2)
    scheduler = torch.optim.lr_scheduler.CyclicLR(reference, base_lr=0.0, max_lr=0.2, **half)
    lr = optim.schedule(name="one_cycle", lr=0.2, epochs=3, steps_per_epoch=4, peak=0.5)
    transform = optim.sgd(lr=lr, momentum=0.9, momentum_at_peak=0.8, weight_decay=5e-2)
    rates, moments, expected = [], [], []
    for gradient in gradients:
        rates.append(reference.param_groups[0]["lr"])
        moments.append(reference.param_groups[0]["momentum"])
        parameter.grad = torch.tensor(gradient)
        reference.step()
        scheduler.step()
        expected.append(parameter.detach().numpy().copy())
    np.testing.assert_allclose(at(lr, *range(len(gradients))), rates, atol=1e-6)
    params = trajectory(transform, np.float32(w), np.float32(gradients))
    np.testing.assert_allclose(params, expected, rtol=1e-5, atol=1e-6)
    assert moments[0] == 0.9 and min(moments) == pytest.approx(0.8)
    with pytest.raises(InputError, match="follows a schedule"):
        optim.sgd(lr=lambda step: 0.1, momentum_at_peak=0.8)
    with pytest.raises(InputError, match="nesterov needs a momentum"):  # which PyTorch refuses too
        optim.sgd(lr=lambda step: 0.1, momentum=0.0, nesterov=True)


def test_momentum_follows_one_cycle_as_in_pytorch():
    """OneCycleLR's 0.95 → 0.85 → 0.95, which replaces the optimiser's own: exact in the fall, to 0.004 in the rise."""
    torch = pytest.importorskip("torch", reason="the oracle is PyTorch")
    parameter, count = torch.nn.Parameter(torch.zeros(1)), 40
    reference = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(reference, max_lr=0.2, total_steps=count, pct_start=0.25)
    lr = optim.schedule(name="torch_one_cycle", lr=0.2, epochs=count, steps_per_epoch=1, pct_start=0.25)
    transform = optim.sgd(lr=lr, momentum=0.95, momentum_at_peak=0.85, weight_decay=0.0)
    expected = []
    for step in range(count):
        expected.append(reference.param_groups[0]["momentum"])
        reference.step()
        if step + 1 < count:
            scheduler.step()

    @jax.jit
    def traces(params):
        def step(state, _):
            _, state = transform.update(ones(1), state, params)
            return state, state[1].trace[0]

        return jax.lax.scan(step, transform.init(params), length=count)[1]

    trace = np.asarray(traces(np.zeros(1, np.float32)))
    difference = np.abs((trace[1:] - 1) / trace[:-1] - expected[1:])
    assert difference[:8].max() < 0.005 and difference[8:].max() < 1e-4


def at(schedule, *steps):
    """The values of a schedule at these steps, as one program."""
    return jax.jit(jax.vmap(schedule))(np.int32(steps))


def schedule(name, **options):
    made = optim.schedule(name=name, lr=0.1, epochs=10, steps_per_epoch=4, **options)
    return lambda *steps: at(made, *steps)


def test_exponential_falls_in_stairs():
    """×0.97 after every second epoch (VIB); four steps make an epoch."""
    lr = schedule("exponential", factor=0.97, every=2)
    np.testing.assert_allclose(lr(0, 7, 8, 15, 16), 0.1 * 0.97 ** np.array([0, 0, 1, 1, 2]), rtol=1e-5)


def test_linear_goes_through_its_points():
    lr = schedule("linear", points=((0.0, 0.0), (2.0, 1.0), (4.0, 0.1)))
    np.testing.assert_allclose(lr(0, 4, 8, 12, 99), [0, 0.05, 0.1, 0.055, 0.01], rtol=1e-5)


def test_piecewise_drops_at_its_boundaries():
    lr = schedule("piecewise", boundaries=(5, 7), factor=0.1)
    np.testing.assert_allclose(lr(0, 19, 20, 27, 28, 39), [0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3], rtol=1e-5)


def test_next_step_drops_one_batch_early():
    """Rice et al. evaluate the rate after the step: the drop hits the last batch of the epoch before."""
    lr = schedule("piecewise", boundaries=(5,), stepping="next_step")
    np.testing.assert_allclose(lr(18, 19, 20), [0.1, 0.01, 0.01], rtol=1e-5)


def test_cosine_and_one_cycle_start_peak_and_end():
    lr = schedule("cosine", warmup=1)
    np.testing.assert_allclose(lr(0, 4, 22, 40), [0, 0.1, 0.05, 0], atol=1e-7)
    lr = schedule("one_cycle", peak=0.5)
    np.testing.assert_allclose(lr(0, 10, 20, 30, 40), [0, 0.05, 0.1, 0.05, 0], atol=1e-7)


def test_boundaries_are_met_to_the_step_under_jit():
    """A compiled division by a constant is a product with its inverse, and may fall short of a whole number."""
    for n, stepping in ((230, "next_step"), (230, "step"), (117, "step")):
        made = optim.schedule(
            name="piecewise", lr=1.0, epochs=200, steps_per_epoch=n, boundaries=(90, 100), stepping=stepping
        )
        steps = np.arange(80 * n, 110 * n)
        drops = steps[:-1][np.diff(at(made, *steps)) < 0] + 1
        assert drops.tolist() == [90 * n - (stepping == "next_step"), 100 * n - (stepping == "next_step")]
    made = optim.schedule(name="exponential", lr=1.0, epochs=200, steps_per_epoch=1, factor=0.5, every=47.0)
    rates = at(made, *range(100))
    assert rates[46] == 1.0 and rates[47] == 0.5 and rates[93] == 0.5 and rates[94] == 0.25


def test_a_head_of_its_own_optimiser_goes_with_parameters_that_do_not_decay():
    network, head = (optim.sgd(lr=lambda step: 1.0, momentum=0.0, weight_decay=1.0, decay_norm=False) for _ in range(2))
    params = {"params": {"norm": {"scale": ones(2)}, "dense": {"kernel": ones(2)}}, "head": ones(2)}
    updates = first_updates(optim.with_head(network, head), zeros_like(params), params)
    moved = jax.tree.map(lambda update: float(update[0]), updates)
    assert moved == {"params": {"norm": {"scale": 0.0}, "dense": {"kernel": -1.0}}, "head": -1.0}


def test_the_head_may_have_its_own_rate():
    network, head = (optim.sgd(lr=lambda step, lr=lr: lr, momentum=0.0, weight_decay=0.0) for lr in (0.1, 0.5))
    params = {"params": ones(2), "head": ones(2)}
    updates = first_updates(optim.with_head(network, head), params, params)
    np.testing.assert_allclose(updates["params"], -0.1)
    np.testing.assert_allclose(updates["head"], -0.5)


def test_norm_and_bias_can_be_spared_from_decay():
    transform = optim.sgd(lr=lambda step: 1.0, momentum=0.0, weight_decay=0.1, decay_norm_and_bias=False)
    params = {"kernel": ones(2, 2), "bias": ones(2)}
    updates = first_updates(transform, zeros_like(params), params)
    assert updates["kernel"].max() < 0 and updates["bias"].max() == 0


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adams_masks_are_those_of_sgd(name):
    """With zero gradients only what decays moves; LayerNorm and batch-norm are spared alike."""
    norm, dense = {"scale": ones(2), "bias": ones(2)}, {"kernel": ones(2, 2), "bias": ones(2)}
    params = {"params": {"ln": norm, "dense": dense}}
    for options, kept in (
        (dict(decay_norm=False), {"ln"}),
        (dict(decay_norm_and_bias=False), {"ln", "bias"}),
        (dict(decay_bias=False), {"bias"}),
        ({}, set()),
    ):
        transform = optim.optimizer(name=name, lr=lambda step: 0.1, weight_decay=0.1, **options)
        updates = first_updates(transform, zeros_like(params), params)
        moved = jax.tree.map(lambda update: bool((update < 0).all()), updates["params"])
        assert moved["ln"] == {"scale": "ln" not in kept, "bias": not kept & {"ln", "bias"}}
        assert moved["dense"] == {"kernel": True, "bias": "bias" not in kept}


@pytest.mark.parametrize("options", [
    dict(pct_start=0.25),
    dict(pct_start=0.4, anneal="linear", div_factor=10.0, final_div_factor=100.0),
    dict(pct_start=0.1, stepping="epoch"),
])  # fmt: skip
def test_one_cycle_is_pytorchs(options):
    """Step by step, or stepped once an epoch as Wang et al. do."""
    torch = pytest.importorskip("torch", reason="the oracle is PyTorch")
    by_epoch = options.get("stepping") == "epoch"
    epochs, n = (20, 3) if by_epoch else (5, 4)
    theirs = {key: value for key, value in options.items() if key not in ("stepping", "anneal")}
    reference = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        reference, max_lr=0.2, total_steps=epochs if by_epoch else epochs * n, **theirs,
        anneal_strategy=options.get("anneal", "cos"), cycle_momentum=False,
    )  # fmt: skip
    expected = []
    for step in range(epochs * n):
        expected.append(reference.param_groups[0]["lr"])
        reference.step()
        if step + 1 < epochs * n and (not by_epoch or (step + 1) % n == 0):
            scheduler.step()
    ours = optim.schedule(name="torch_one_cycle", lr=0.2, epochs=epochs, steps_per_epoch=n, **options)
    np.testing.assert_allclose(at(ours, *range(epochs * n)), expected, rtol=1e-5, atol=2e-8)


def test_the_decay_of_the_average_warms_up():
    """min(τ, (1 + t)/(10 + t)) from `start` on, and nothing is averaged before."""
    decay = optim.average_decay(0.9, warmup=True, start=3)
    steps = np.arange(120)
    t = steps - 3.0
    expected = np.where(t < 0, 0.0, np.minimum(0.9, (1 + t) / (10 + t)))
    np.testing.assert_allclose(at(decay, *steps), expected, rtol=1e-6)
    np.testing.assert_allclose(at(optim.average_decay(0.9, start=2), 2), 0.9, rtol=1e-6)


def test_batch_norm_alone_can_be_spared_from_decay():
    """As Fast-AT on ImageNet does: the last layer's bias decays."""
    transform = optim.sgd(lr=lambda step: 1.0, momentum=0.0, weight_decay=0.1, decay_norm=False)
    norm, dense = {"scale": ones(2), "bias": ones(2)}, {"kernel": ones(2, 2), "bias": ones(2)}
    params = {"params": {"block1": {"bn1": norm}, "head": {"dense": dense}}}
    updates = first_updates(transform, zeros_like(params), params)
    moved = jax.tree.map(lambda update: bool((update < 0).all()), updates["params"])
    assert moved["block1"]["bn1"] == {"scale": False, "bias": False}
    assert moved["head"]["dense"] == {"kernel": True, "bias": True}


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
