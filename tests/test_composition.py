"""What may be put around any objective: weight perturbation, averaged weights, teachers; and what may not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import smoke_config
from test_objectives import OBJECTIVES, Stepper, experiment

from ibjax import config
from ibjax.attacks.pgd import loss_function
from ibjax.errors import InputError
from ibjax.training.experiment import build, initial_state

NEITHER = dict(ema_decay=None, averaging=config.base().averaging.to_dict())
BOTH = dict(perturb=dict(name="awp", gamma=0.01, warmup=0), ema_decay=0.9)
# without the rows that differ in the step only
ATTACKED = [name for name, (_, attack, _) in OBJECTIVES.items() if "pgd_at-" not in name and attack]


def step_of(name, digits_run, **changes):
    """The compiled step of a row of the table of objectives, with changes, on one device."""
    return Stepper(experiment(name, digits_run / "teacher", devices=1, **changes))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_takes_perturbed_and_averaged_weights_and_distributions_as_labels(name, digits_run):
    """Both together, with the teachers that it has, mixed images and smoothed labels where it may; none is compiled."""
    objective = config.build("objectives", OBJECTIVES[name][0], "objective")
    delta = 0.1 * objective.fits_labels
    labels = dict(mix=dict(name="cutmix")) if objective.memory is None else {}
    made = step_of(name, digits_run, **BOTH, **labels, smoothing=dict(delta=delta, form="others", images="all"))
    state = jax.eval_shape(lambda: initial_state(made.experiment))
    after, _ = jax.eval_shape(made.dispatch, state, *made.arguments)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.structure(after.ema_params) == jax.tree.structure(after.variables["params"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if "awp" not in name])
def test_perturbed_and_averaged_weights_change_what_is_learned_and_nothing_else(name, digits_run):
    plain, both = (step_of(name, digits_run, **changes) for changes in (NEITHER, BOTH))
    first = jax.device_get(initial_state(both.experiment).variables["params"])
    (old, _), (new, metrics) = (made(initial_state(made.experiment), steps=2) for made in (plain, both))
    assert np.isfinite(metrics["loss"])
    learned, average = new.variables["params"], new.ema_params
    assert 0 < distance(learned, old.variables["params"]) < distance(learned, first)
    assert 0 < distance(average, learned) < distance(learned, first)
    assert 0 < distance(average, first) < distance(learned, first)
    # the images that the second step sees, and what it remembers of them, come from weights without perturbation
    if "memory" in old.variables:
        assert distance(new.variables["memory"], old.variables["memory"]) < 0.1


def distance(a, b):
    squares = jax.tree.map(lambda x, y: np.sum(np.square(np.float64(x) - np.float64(y))), a, b)
    return float(np.sqrt(sum(jax.tree.leaves(squares))))


@pytest.mark.parametrize("name", ATTACKED)
def test_an_objective_knows_whether_its_attack_starts_without_a_gradient(name, digits_run):
    """Then init='none' is refused. At the first step; where the loss gains terms later, these may have one."""
    made = experiment(name, digits_run / "teacher", devices=1)
    frozen, variables = jax.device_get((made.frozen, initial_state(made).variables))
    objective, net = made.objective, made.bind_net(frozen)
    rng = np.random.default_rng(0)  # a network whose predictions differ
    variables["params"] = jax.tree.map(
        lambda w: w + np.float32(0.1) * rng.standard_normal(w.shape, np.float32), variables["params"]
    )
    x = made.data.train.images[:16] / np.float32(255)
    batch = {"image": x, "label": made.data.train.labels[:16], "index": np.arange(16, dtype=np.int32)}
    batch |= {"step": np.int32(0), "epoch": np.float32(0)}
    kind = made.config.attack.loss
    loss = loss_function(objective.attack_loss if kind == "objective" else kind)

    @jax.jit
    def steepness(u):
        target = objective.target(net, variables, batch, jax.random.key(0))

        def climbed(u):
            output = net.predict(variables, u)
            return jnp.sum(loss(output if objective.attack_loss is not None else output[0], target))

        return jnp.linalg.norm(jax.grad(climbed)(u).ravel())

    at, beside = steepness(x), steepness(np.where(x < 0.5, x + np.float32(0.1), x - np.float32(0.1)))
    assert beside > 0 and (at < 1e-3 * beside) == objective.flat_at_x


@pytest.mark.parametrize("objective", ["pgd_at", "trades", "hbar", "mart"])
@pytest.mark.parametrize("role", config.TEACHERS)
def test_a_teacher_that_nobody_asks_is_refused(objective, role, digits_run):
    settings = smoke_config("digits")
    settings.teacher.recipe = None
    settings.objective = dict(name=objective)
    settings.attack.loss = "kl" if objective in ("trades", "hbar") else "ce"
    settings[role].workdir = str(digits_run / "teacher")
    with pytest.raises(InputError, match=rf"'{objective}' asks no {role} and would ignore it"):
        build(settings)
