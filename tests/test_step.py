"""The step's wiring: what each part is given, and that nothing is dropped on the way."""

import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_objectives import BATCH, MODEL, NET, TEACHER, VARIABLES, X_ADV, random_variables

from ibjax import losses
from ibjax.attacks.pgd import pgd, stateful_pgd
from ibjax.errors import InputError
from ibjax.net import linen_net, to_float
from ibjax.objectives.alp import alp
from ibjax.objectives.ibd import ibd
from ibjax.objectives.pgd_at import pgd_at
from ibjax.objectives.standard import standard
from ibjax.objectives.trades import trades
from ibjax.optim import average_decay, sgd, with_head
from ibjax.runs.checkpoint import join, split
from ibjax.step import (
    Objective,
    Passes,
    Problem,
    evaluation_variables,
    init_state,
    make_statistics_step,
    make_train_step,
)

KEY = jax.random.key(0)


def begin(objective=None, optimizer=None, ema=False, net=NET):
    objective = objective or pgd_at()
    memory = objective.memory(12, 4) if objective.memory else None
    optimizer = optimizer or sgd(lr=lambda step: 0.1)
    state = jax.jit(lambda: init_state(KEY, net, MODEL, objective.head, optimizer, BATCH["image"], ema, memory))()
    return state._replace(variables={**state.variables, **VARIABLES})


def take(objective, attack=None, optimizer=None, state=None, batch=BATCH, net=NET, **options):
    optimizer = optimizer or sgd(lr=lambda step: 0.1)
    state = begin(objective, optimizer, net=net) if state is None else state
    own = {name: options.pop(name) for name in ("perturb", "ema_decay", "average_stats") if name in options}
    return make_train_step(Problem(lambda _: net, objective, attack, **options), optimizer, **own)(state, batch, KEY)


def recording(seen, loss=None):
    """An objective that keeps what it is given."""

    def target(net, variables, batch, key):
        return batch["label"]

    def value(net, variables, batch, x_adv, key):
        seen.update(batch=batch, x_adv=x_adv, key=key, variables=variables)
        return standard().loss(net, variables, batch, x_adv, key)

    return Objective(target, value)


# ---- what the parts are given ------------------------------------------------------------------------------


def test_the_loss_sees_augmented_images_and_the_attacks_images():
    seen = {}
    augmented = 1 - BATCH["image"]
    take(recording(seen), lambda key, f, x, y: 0.5 * x, augment=lambda key, x: 1 - x)
    np.testing.assert_array_equal(seen["batch"]["image"], augmented)
    np.testing.assert_array_equal(seen["x_adv"], 0.5 * augmented)


def test_uint8_images_reach_the_loss_in_the_unit_interval():
    seen = {}
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1)), jnp.uint8)
    take(recording(seen), batch={**BATCH, "image": images})
    np.testing.assert_allclose(seen["batch"]["image"], np.asarray(images) / 255, rtol=1e-6)
    assert to_float(images).dtype == jnp.float32


def test_step_and_epoch_count_what_is_done():
    seen = {}
    state = begin()._replace(step=jnp.int32(7))
    take(recording(seen), state=state, steps_per_epoch=4)
    assert int(seen["batch"]["step"]) == 7 and float(seen["batch"]["epoch"]) == 7 / 4


def test_the_whole_epochs_are_exact():
    """At every step that begins an epoch the fraction is zero, however many steps an epoch has."""
    seen = {}
    for epoch, steps_per_epoch in ((89, 391), (149, 383), (10_000, 97)):
        state = begin()._replace(step=jnp.int32(epoch * steps_per_epoch))
        take(recording(seen), state=state, steps_per_epoch=steps_per_epoch)
        assert float(seen["batch"]["epoch"]) == epoch


def test_every_step_draws_new_randomness():
    """Augmentation, attack and loss get keys of their own, which change with the step."""
    keys = []

    def attack(key, f, x, y):
        keys.append(key)
        return x

    def augment(key, x):
        keys.append(key)
        return x

    for step in (0, 1):
        seen = {}
        take(recording(seen), attack, state=begin()._replace(step=jnp.int32(step)), augment=augment)
        keys.append(seen["key"])
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in keys}) == 6


def test_no_gradient_flows_through_the_attack():
    def attack(key, logits_fn, x, y):
        return jnp.clip(x + 0.1 * logits_fn(x).sum(), 0, 1)

    free, _ = take(pgd_at(), attack)
    fixed = attack(KEY, lambda x: NET.predict(VARIABLES, x)[0], BATCH["image"], None)
    stored, _ = take(pgd_at(), lambda *_: fixed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), free.variables, stored.variables)


# ---- state -------------------------------------------------------------------------------------------------


def test_the_moving_average_keeps_its_decay_and_is_what_is_evaluated():
    """ema <- decay·ema + (1 − decay)·params, after the optimiser's step."""
    state = begin(ema=True)
    old = jax.tree.map(jnp.copy, state.ema_params)
    state, _ = take(pgd_at(), lambda *_: X_ADV, state=state, ema_decay=0.9)
    expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, old, state.variables["params"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.ema_params, expected)
    assert evaluation_variables(state)["params"] is state.ema_params


def test_the_average_with_its_warm_up_is_that_of_a_hand():
    """Over three steps, statistics averaged as the weights are; the network itself learns as without an average."""
    options = dict(ema_decay=average_decay(0.6, warmup=True, start=1), average_stats=True)
    state = begin(ema=True)._replace(ema_stats=jax.tree.map(jnp.copy, VARIABLES["batch_stats"]))
    plain = begin()
    problem = Problem(lambda _: NET, standard())
    step = jax.jit(make_train_step(problem, sgd(lr=lambda s: 0.1), **options))
    alone = jax.jit(make_train_step(problem, sgd(lr=lambda s: 0.1)))
    expected = state.ema_params, state.ema_stats
    for t in range(4):
        state, _ = step(state, BATCH, KEY)
        plain, _ = alone(plain, BATCH, KEY)
        tau = 0.0 if t < 1 else min(0.6, (1 + (t - 1)) / (10 + (t - 1)))
        new = state.variables["params"], state.variables["batch_stats"]
        expected = jax.tree.map(lambda e, w, tau=tau: tau * e + (1 - tau) * w, expected, new)
    found = state.ema_params, state.ema_stats
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
    chex.assert_trees_all_close(state.variables, plain.variables, rtol=1e-6)
    evaluated = evaluation_variables(state)
    assert evaluated["batch_stats"] is state.ema_stats and evaluated["params"] is state.ema_params
    assert jax.tree.structure(join(*split(state))) == jax.tree.structure(state)
    chex.assert_trees_all_equal(join(*split(state)), state)


def test_recomputed_statistics_are_those_of_passes_of_the_averaged_network():
    """Over x', at the averaged weights, in order; weights and raw statistics stay."""
    state = begin(ema=True)._replace(
        ema_params=jax.tree.map(lambda w: 0.5 * w, VARIABLES["params"]), ema_stats=VARIABLES["batch_stats"]
    )
    step = make_statistics_step(Problem(lambda _: NET, pgd_at(passes="adv,clean"), lambda *_: X_ADV))
    after = step(state, BATCH, KEY)
    expected = {**VARIABLES, "params": state.ema_params}
    for images in (X_ADV, BATCH["image"]):
        _, expected = NET.forward(expected, images, KEY)
    chex.assert_trees_all_close(after.ema_stats, expected["batch_stats"], rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_equal(after._replace(step=state.step, ema_stats=state.ema_stats), state)
    assert int(after.step) == int(state.step) + 1


# ---- batch-norm ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [trades(), pgd_at(passes="clean,adv")], ids=["trades", "pgd_at"])
def test_statistics_of_the_adversarial_pass_alone(objective):
    """The passes over x move nothing; loss and gradient stay the same."""
    (state, metrics), (both, other) = (
        take(objective, lambda *_: X_ADV, passes=Passes(statistics=which)) for which in ("adv", "all")
    )
    _, expected = NET.forward(VARIABLES, X_ADV, KEY)
    chex.assert_trees_all_close(state.variables["batch_stats"], expected["batch_stats"], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state.variables["params"], both.variables["params"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], other["loss"], rtol=1e-6)


def test_what_is_neither_clean_nor_adversarial_has_no_statistics_of_its_own():
    with pytest.raises(InputError, match="bn_statistics='adv': the objective makes a pass over other images"):
        take(alp(), lambda *_: X_ADV, passes=Passes(statistics="adv"))


def test_an_attack_on_the_batchs_statistics_sees_them_and_moves_none():
    """Target and attack see the network in training mode; the running statistics are those of the loss's passes."""
    seen = {}

    def attack(key, logits_fn, x, target):
        seen.update(logits=logits_fn(x), target=target)
        return x

    state, _ = take(trades(), attack, passes=Passes(attack="batch"))
    logits = NET.forward(VARIABLES, BATCH["image"], KEY)[0][0]
    np.testing.assert_allclose(seen["logits"], logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen["target"], jax.nn.softmax(logits), rtol=1e-4, atol=1e-5)
    plain, _ = take(trades(), lambda key, f, x, y: x)
    chex.assert_trees_all_close(state.variables["batch_stats"], plain.variables["batch_stats"], rtol=1e-6)


def test_the_methods_own_weights_follow_their_own_learning_rate():
    """A head's rate of zero leaves it, and only it, where it was."""
    for head_rate, moves in ((0.0, False), (0.1, True)):
        optimizer = with_head(sgd(lr=lambda s: 0.1), sgd(lr=lambda s, rate=head_rate: rate))
        state = begin(ibd(), optimizer)
        before = jax.tree.map(jnp.copy, state.variables)
        state, _ = take(ibd(), lambda *_: X_ADV, optimizer, state)
        moved = [
            float(optax.tree.norm(optax.tree.sub(after["params"], start["params"])))
            for after, start in ((state.variables["head"], before["head"]), (state.variables, before))
        ]
        assert (moved[0] > 0) == moves and moved[1] > 0


def test_a_memory_is_carried_from_step_to_step():
    def target(net, variables, batch, key):
        return batch["label"]

    def loss(net, variables, batch, x_adv, key):
        value, (after, metrics) = standard().loss(net, variables, batch, x_adv, key)
        seen = variables["memory"].at[batch["index"]].add(1.0)
        return value, ({**after, "memory": seen}, metrics)

    counting = Objective(target, loss, attack_losses=(), memory=lambda n, classes: jnp.zeros((n, classes)))
    state = begin(counting)
    for expected in (1, 2):
        state, _ = take(counting, state=state)
        np.testing.assert_array_equal(state.variables["memory"], np.full((12, 4), expected))
    assert "memory" not in evaluation_variables(state)


def test_what_is_remembered_is_there_for_target_attack_and_loss():
    """And it sees augmented images, before anything else has changed the variables."""
    seen = {}

    def remember(net, variables, batch, key):
        np.testing.assert_array_equal(batch["image"], 1 - BATCH["image"])
        return {**variables, "memory": variables["memory"] + 1}

    def target(net, variables, batch, key):
        return variables["memory"]

    def attack(key, logits_fn, x, target):
        seen["target"] = target
        return x

    objective = recording(seen)._replace(target=target, remember=remember, memory=lambda n, classes: jnp.zeros(()))
    state, _ = take(objective, attack, augment=lambda key, x: 1 - x)
    assert float(seen["target"]) == float(seen["variables"]["memory"]) == float(state.variables["memory"]) == 1


# ---- attacks of an objective's own -------------------------------------------------------------------------


def test_an_objectives_own_attack_replaces_the_configured_one_and_may_change_the_variables():
    seen = {}

    def attack(net, variables, batch, key):
        return X_ADV, {**variables, "memory": variables["memory"] + 1}

    objective = recording(seen)._replace(attack=attack, memory=lambda n, classes: jnp.zeros(()))
    state, _ = take(objective)
    np.testing.assert_array_equal(seen["x_adv"], X_ADV)
    assert float(state.variables["memory"]) == 1


@pytest.mark.parametrize("training", [False, True])
def test_an_objectives_own_attack_loss_sees_logits_features_and_its_target(training):
    """With CE on the logits it is PGD on CE; the features reach it too."""

    def attack_loss(output, target):
        logits, features = output
        assert "pre_logits" in features
        return losses.cross_entropy(logits, target["label"]) + 0.0 * target["weight"]

    def target(net, variables, batch, key):
        return {"label": batch["label"], "weight": jnp.float32(3)}

    made = {}
    options = dict(eps=0.1, step_size=0.05, steps=2, init="none", unroll=False)
    for loss in ("ce", attack_loss):
        seen = {}
        objective = recording(seen)
        if callable(loss):
            objective = objective._replace(target=target, attack_losses=("objective",), attack_loss=attack_loss)
        if training:
            take(objective, training_attack=stateful_pgd(loss=loss, **options))
        else:
            take(objective, pgd(loss=loss, **options))
        made[str(loss)] = seen["x_adv"]
    np.testing.assert_array_equal(*made.values())


# ---- the seam ----------------------------------------------------------------------------------------------


def test_both_teachers_answer_with_their_own_weights():
    assistant = random_variables(9)
    modules = {"teacher": MODEL, "assistant": MODEL}
    net = linen_net(MODEL, modules, {"teacher": TEACHER, "assistant": assistant})
    for got, variables in ((net.teacher, TEACHER), (net.assistant, assistant)):
        np.testing.assert_array_equal(got(X_ADV)[0], MODEL.apply(variables, X_ADV)[0])
    assert NET.assistant is None and linen_net(MODEL).teacher is None


# ---- microbatches ------------------------------------------------------------------------------------------


def test_gradients_of_parts_are_those_of_the_whole_where_nothing_couples_images():
    """Evaluation mode and no random start: then the mean over parts is the mean over the batch."""

    def loss(net, variables, batch, x_adv, key):
        logits, _ = net.predict(variables, x_adv)
        value = jnp.mean(losses.cross_entropy(logits, batch["label"]))
        return value, (variables, {"loss": value})

    objective = Objective(lambda net, variables, batch, key: batch["label"], loss)
    attack = pgd(eps="8/255", step_size="2/255", steps=2, init="none")
    exact = dict(products="highest")  # of the network: it is the sum over parts that is looked at
    (whole, metrics), (parts, averaged) = (take(objective, attack, microbatches=count, **exact) for count in (1, 3))
    chex.assert_trees_all_close(parts.variables["params"], whole.variables["params"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(averaged["loss"], metrics["loss"], rtol=1e-5)


def test_parts_update_the_batch_statistics_in_turn():
    """As so many steps over the parts would, without a step of the optimiser between them."""
    variables = begin().variables
    for i in range(3):
        part = {name: value[i::3] for name, value in BATCH.items()}
        _, variables = NET.forward(variables, part["image"], KEY)
    state, _ = take(standard(), microbatches=3)
    chex.assert_trees_all_close(state.variables["batch_stats"], variables["batch_stats"], rtol=1e-5, atol=1e-6)


def test_the_step_with_parts_is_taken_at_the_mean_perturbation():
    """Without a gradient only weight decay is left, which sees w + v."""

    def loss(net, variables, batch, x_adv, key):
        value = 0.0 * jnp.sum(variables["params"]["head"]["dense"]["kernel"])
        return value, (variables, {"loss": value})

    def perturb(params, gradients, epoch):
        return jax.tree.map(jnp.ones_like, params)

    objective = Objective(lambda *_: None, loss)
    state, _ = take(objective, optimizer=sgd(lr=lambda step: 0.1, weight_decay=0.5), perturb=perturb, microbatches=2)
    before, after = (s.variables["params"]["head"]["dense"]["kernel"] for s in (begin(objective), state))
    np.testing.assert_allclose(after, before - 0.1 * 0.5 * (before + 1), rtol=1e-5, atol=1e-6)


def test_the_loop_of_the_training_page_learns():
    """The code of docs/train.md, as it is printed there."""
    page = (Path(__file__).parent.parent / "docs" / "train.md").read_text(encoding="utf-8")
    code = re.search(r"## A training loop of your own.*?^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert code is not None
    names: dict = {}
    exec(code[1], names)
    assert 0.5 < names["metrics"]["clean_acc"] <= 1
