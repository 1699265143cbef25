"""Fast adversarial training: its attack's two rules, batch-norm in training mode, its schedules and their refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import smoke_config
from test_objectives import BATCH, NET, VARIABLES, first_state

from ibjax import config, optim
from ibjax.attacks import geometry
from ibjax.attacks.pgd import pgd, stateful_pgd
from ibjax.errors import InputError
from ibjax.objectives.pgd_at import pgd_at
from ibjax.optim import sgd
from ibjax.step import Problem, make_train_step
from ibjax.training.experiment import build

KEY = jax.random.key(3)
EPS = 0.1
X = np.concatenate([np.asarray(BATCH["image"])[:6], np.zeros((6, 8, 8, 1), np.float32)])  # half of them at the border


def forward(x):
    return NET.predict(VARIABLES, x)[0]


def gradient(x, through=lambda x: x):
    def loss(x):
        logits = forward(through(x))
        return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), BATCH["label"][:, None], 1))

    return np.asarray(jax.jit(jax.grad(loss))(x))


def attacked(x, **options):
    """The images that PGD makes of these, as one program."""
    return jax.jit(lambda x: pgd(**options)(KEY, forward, x, BATCH["label"]))(x)


def start(init):
    return np.asarray(jax.jit(lambda x: geometry.start(KEY, x, "linf", EPS, init))(X))


def clip(x):
    return jnp.clip(x, 0.0, 1.0)


def test_on_cifar_the_start_is_clipped_and_every_pixel_moves():
    """x' = Π(x + δ + 1.25·ε·sign g), δ clipped to the box before the gradient g is taken."""
    options = dict(eps=EPS, step_size=1.25 * EPS, steps=1)
    x_adv = attacked(X, **options)
    first = start("uniform")
    assert first.min() >= 0
    step = first + 1.25 * EPS * np.sign(gradient(first))
    expected = np.clip(np.clip(step, X - EPS, X + EPS), 0, 1)
    np.testing.assert_allclose(x_adv, expected, atol=1e-6)


def test_on_imagenet_pixels_outside_the_box_have_no_gradient():
    """δ <- clip(δ + 1.25·ε·sign ∇L(clip(x + δ)), ±ε), and the images are clip(x + δ)."""
    options = dict(eps=EPS, step_size=1.25 * EPS, steps=1, init="uniform_unclipped", clip_input=True)
    x_adv = attacked(X, **options)
    first = start("uniform_unclipped")
    direction = np.sign(gradient(first, clip))
    outside = (first < 0) | (first > 1)
    assert outside.any() and (direction[outside] == 0).all() and (direction[~outside] != 0).any()
    delta = np.clip(first - X + 1.25 * EPS * direction, -EPS, EPS)
    np.testing.assert_allclose(x_adv, np.clip(X + delta, 0, 1), atol=1e-6)
    assert np.abs(x_adv - attacked(X, **{**options, "clip_input": False})).max() > 0.01


def test_a_step_has_two_passes_in_training_mode():
    """The running statistics after it are those of the start, then x'."""
    options = dict(eps=EPS, step_size=1.25 * EPS, steps=1)
    optimizer = sgd(lr=lambda step: 0.0)
    step = make_train_step(Problem(lambda _: NET, pgd_at(), training_attack=stateful_pgd(**options)), optimizer)
    statistics = jax.jit(lambda state: step(state, BATCH, KEY)[0].variables["batch_stats"])  # nothing else is asked
    found = statistics(first_state(optimizer))

    @jax.jit
    def by_hand(image):
        attack_key, loss_key = jax.random.split(jax.random.fold_in(KEY, 0), 3)[1:]
        first = geometry.start(attack_key, image, "linf", EPS, "uniform")

        def loss(x):
            (logits, _), after = NET.forward(VARIABLES, x, loss_key)
            return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), BATCH["label"][:, None], 1)), after

        direction, once = jax.grad(loss, has_aux=True)(first)
        moved = first + 1.25 * EPS * jnp.sign(direction)
        second = jnp.clip(jnp.clip(moved, image - EPS, image + EPS), 0, 1)
        return NET.forward(once, second, loss_key)[1]["batch_stats"]

    twice = by_hand(BATCH["image"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, twice)


def rates(steps, **options):
    made = optim.schedule(steps_per_epoch=100, **options)
    return [float(made(jnp.int32(step))) for step in steps]


def test_the_learning_rate_is_a_triangle_from_step_to_step():
    found = rates([0, 375, 750, 1125, 1499], name="one_cycle", lr=0.2, epochs=15, peak=0.5)
    np.testing.assert_allclose(found, [0, 0.1, 0.2, 0.1, 0.2 / 750], atol=1e-6)


def test_straight_lines_through_the_phases_of_imagenet():
    points = ((0.0, 0.0), (1.0, 1.0), (6.0, 0.1), (12.0, 0.01), (15.0, 0.001))
    found = rates([0, 50, 100, 600, 900, 1200, 1500], name="linear", lr=0.4, epochs=15, points=points)
    np.testing.assert_allclose(found, [0, 0.2, 0.4, 0.04, 0.022, 0.004, 0.0004], rtol=1e-5, atol=1e-9)
    for wrong in ((), ((1.0, 1.0), (0.0, 0.5))):
        with pytest.raises(InputError, match="rising"):
            rates([0], name="linear", lr=0.4, epochs=15, points=wrong)


def test_each_boundary_may_have_its_own_factor():
    """MMA's 0.3, 0.09, 0.03, 0.009."""
    options = dict(name="piecewise", lr=0.3, epochs=4, boundaries=(1, 2, 3))
    np.testing.assert_allclose(
        rates([0, 99, 100, 200, 300], factor=(0.3, 1 / 3, 0.3), **options), [0.3, 0.3, 0.09, 0.03, 0.009], rtol=1e-5
    )
    with pytest.raises(InputError, match="give one for each"):
        rates([0], factor=(0.3,), **options)


def test_the_recipe_stops_on_catastrophic_overfitting():
    settings = smoke_config("baselines_original", "fast_at")
    assert settings.validate.stop_on_overfitting and settings.validate.every == 1 and settings.attack_bn == "train"


def test_the_recipes_rates_and_momentum_are_their_authors():
    """On ImageNet the first phase rises for one epoch; on CIFAR-10 momentum moves as PyTorch's CyclicLR has it."""
    settings = config.plain(smoke_config("ibd_imagenet", "fast_at-4"))
    found = rates([99, 599, 1199, 1499], lr=settings["optimizer"]["lr"], epochs=15, **settings["schedule"])
    np.testing.assert_allclose(found, [0.4, 0.04, 0.004, 0.0004], rtol=1e-5)
    assert not settings["optimizer"]["decay_norm"] and "decay_norm_and_bias" not in settings["optimizer"]
    optimizer = smoke_config("baselines_original", "fast_at").optimizer
    assert (optimizer.momentum, optimizer.momentum_at_peak) == (0.9, 0.8)


def test_on_imagenet_the_network_sees_the_box_of_an_unclipped_start_in_training_mode():
    settings = config.effective(smoke_config("ibd_imagenet", "fast_at-4"))
    attack = settings.attack
    assert attack.steps == 1 and attack.init == "uniform_unclipped" and attack.clip_input
    assert (attack.eps, attack.step_size, settings.attack_bn) == ("4/255", "5/255", "train")


def test_a_start_without_gradient_is_refused_on_either_base_of_its_own_prediction():
    settings = smoke_config("baselines_original", "te_trades,smoke")
    settings.attack.init = "none"
    with pytest.raises(InputError, match="no gradient"):
        build(settings)
