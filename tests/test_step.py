"""The step's wiring: what each part is given, and that nothing is dropped on the way."""

import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from test_objectives import BATCH, MODEL, X_ADV, random_variables
from test_objectives import NET as CNN

from ibjax import losses
from ibjax.attacks.pgd import pgd, stateful_pgd
from ibjax.errors import InputError
from ibjax.models import cnn
from ibjax.net import Net, linen_net, to_float
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
    TrainState,
    evaluation_variables,
    init_state,
    make_statistics_step,
    make_train_step,
    trainable,
)

KEY = jax.random.key(0)
X = np.asarray(BATCH["image"])
RNG = np.random.default_rng(1)
VARIABLES = {
    "params": {"w": np.float32(RNG.normal(size=(8, 8, 1, 4)) / 4)},
    "batch_stats": {"mean": np.float32(RNG.uniform(size=(8, 8, 1)))},
}


def answer(variables, x, mean):
    """Logits and a feature, without a product that an accelerator would round."""
    centred = x - mean[None]
    logits = jnp.sum(centred[..., None] * variables["params"]["w"][None], axis=(1, 2, 3))
    return logits, {"pre_logits": centred.reshape(len(x), -1)}


def predict(variables, x, edits=None):
    return answer(variables, x, variables["batch_stats"]["mean"])


def forward(variables, x, key, edits=None):
    statistics = {"mean": 0.9 * variables["batch_stats"]["mean"] + 0.1 * x.mean(0)}
    return answer(variables, x, x.mean(0)), {**variables, "batch_stats": statistics}


# One layer after the mean of the batch is subtracted, as batch-norm does: a step of it compiles in no time
NET = Net(predict, forward)


def after_passes(*passes):
    """The running mean after training-mode passes over these images, in order."""
    mean = VARIABLES["batch_stats"]["mean"]
    for images in passes:
        mean = 0.9 * mean + 0.1 * np.asarray(images).mean(0)
    return {"mean": mean}


def begin(objective=None, optimizer=None, ema=False):
    memory = {"memory": objective.memory(12, 4)} if objective and objective.memory else {}
    optimizer = optimizer or sgd(lr=lambda step: 0.1)
    average = VARIABLES["params"] if ema else None
    return TrainState(np.int32(0), {**VARIABLES, **memory}, optimizer.init(trainable(VARIABLES)), average)


def take(objective, attack=None, optimizer=None, state=None, batch=BATCH, net=NET, **options):
    optimizer = optimizer or sgd(lr=lambda step: 0.1)
    state = begin(objective, optimizer) if state is None else state
    own = {name: options.pop(name) for name in ("perturb", "ema_decay", "average_stats") if name in options}
    step = make_train_step(Problem(lambda _: net, objective, attack, **options), optimizer, **own)
    return jax.jit(step)(state, batch, KEY)


def recording():
    """An objective whose metrics are what it is given; its loss is zero."""

    def target(net, variables, batch, key):
        return batch["label"]

    def value(net, variables, batch, x_adv, key):
        metrics = dict(batch=batch, x_adv=x_adv, key=key, variables=variables)
        return 0 * jnp.sum(variables["params"]["w"]), (variables, metrics)

    return Objective(target, value)


# ---- what the parts are given ------------------------------------------------------------------------------


def test_the_loss_sees_augmented_images_and_the_attacks_images():
    augmented = 1 - X
    _, seen = take(recording(), lambda key, f, x, y: 0.5 * x, augment=lambda key, x: 1 - x)
    np.testing.assert_array_equal(seen["batch"]["image"], augmented)
    np.testing.assert_array_equal(seen["x_adv"], 0.5 * augmented)


def test_uint8_images_reach_the_loss_in_the_unit_interval():
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), np.uint8)
    _, seen = take(recording(), batch={**BATCH, "image": images})
    np.testing.assert_allclose(seen["batch"]["image"], images / 255, rtol=1e-6)
    assert to_float(jnp.asarray(images)).dtype == jnp.float32


def test_step_and_epoch_count_what_is_done():
    _, seen = take(recording(), state=begin()._replace(step=np.int32(7)), steps_per_epoch=4)
    assert int(seen["batch"]["step"]) == 7 and float(seen["batch"]["epoch"]) == 7 / 4


def test_the_whole_epochs_are_exact():
    """At every step that begins an epoch the fraction is zero, however many steps an epoch has."""
    for epoch, steps_per_epoch in ((89, 391), (149, 383), (10_000, 97)):
        state = begin()._replace(step=np.int32(epoch * steps_per_epoch))
        _, seen = take(recording(), state=state, steps_per_epoch=steps_per_epoch)
        assert float(seen["batch"]["epoch"]) == epoch


def test_every_step_draws_new_randomness():
    """Augmentation, attack and loss get keys of their own, which change with the step."""

    def attack(key, f, x, y):
        return jax.random.key_data(key)

    def augment(key, x):  # the first two pixels of the first image
        return x.at[0, 0, :2, 0].set(jax.lax.bitcast_convert_type(jax.random.key_data(key), jnp.float32))

    keys, state = [], begin()
    for _ in range(2):
        state, seen = take(recording(), attack, state=state, augment=augment)
        drawn = np.asarray(seen["batch"]["image"])[0, 0, :2, 0].view(np.uint32)
        keys += [drawn, seen["x_adv"], jax.random.key_data(seen["key"])]
    assert len({tuple(np.asarray(key)) for key in keys}) == 6


def test_no_gradient_flows_through_the_attack():
    def attack(key, logits_fn, x, y):
        return jnp.clip(x + 0.1 * logits_fn(x)[:, :1, None, None], 0, 1)

    free, _ = take(pgd_at(), attack)
    fixed = jax.jit(attack, static_argnums=1)(KEY, lambda x: NET.predict(VARIABLES, x)[0], X, None)
    stored, _ = take(pgd_at(), lambda *_: fixed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), free.variables, stored.variables)


# ---- state -------------------------------------------------------------------------------------------------


def test_the_moving_average_keeps_its_decay_and_is_what_is_evaluated():
    """ema <- decay·ema + (1 − decay)·params, after the optimiser's step."""
    state = begin(ema=True)
    state, _ = take(pgd_at(), lambda *_: X_ADV, state=state, ema_decay=0.9)
    expected = 0.9 * VARIABLES["params"]["w"] + 0.1 * np.asarray(state.variables["params"]["w"])
    np.testing.assert_allclose(state.ema_params["w"], expected, rtol=1e-5, atol=1e-7)
    assert evaluation_variables(state)["params"] is state.ema_params


def test_the_average_with_its_warm_up_is_that_of_a_hand():
    """Over three steps, statistics averaged as the weights are; the network itself learns as without an average."""
    options = dict(ema_decay=average_decay(0.6, warmup=True, start=1), average_stats=True)
    state = begin(ema=True)._replace(ema_stats=VARIABLES["batch_stats"])
    plain = begin()
    problem = Problem(lambda _: NET, standard())
    step = jax.jit(make_train_step(problem, sgd(lr=lambda s: 0.1), **options))
    alone = jax.jit(make_train_step(problem, sgd(lr=lambda s: 0.1)))
    expected = state.ema_params, state.ema_stats
    for t in range(4):
        state, _ = step(state, BATCH, KEY)
        plain, _ = alone(plain, BATCH, KEY)
        tau = 0.0 if t < 1 else min(0.6, (1 + (t - 1)) / (10 + (t - 1)))
        new = jax.device_get((state.variables["params"], state.variables["batch_stats"]))
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
        ema_params={"w": 0.5 * VARIABLES["params"]["w"]}, ema_stats={"mean": 0.5 * VARIABLES["batch_stats"]["mean"]}
    )

    def forward(variables, x, key, edits=None):
        """Statistics that depend on the weights too, as those of all layers but the first do."""
        output, after = NET.forward(variables, x, key)
        return output, {
            **after,
            "batch_stats": {"mean": after["batch_stats"]["mean"] + variables["params"]["w"][..., 0]},
        }

    net = NET._replace(forward=forward)
    after = jax.jit(make_statistics_step(Problem(lambda _: net, pgd_at(passes="adv,clean"), lambda *_: X_ADV)))(
        state, BATCH, KEY
    )
    expected = state.ema_stats["mean"]
    for images in (X_ADV, X):
        expected = 0.9 * expected + 0.1 * np.asarray(images).mean(0) + state.ema_params["w"][..., 0]
    np.testing.assert_allclose(after.ema_stats["mean"], expected, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_equal(after._replace(step=state.step, ema_stats=state.ema_stats), state)
    assert int(after.step) == int(state.step) + 1


# ---- batch-norm ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [trades(), pgd_at(passes="clean,adv")], ids=["trades", "pgd_at"])
def test_statistics_of_the_adversarial_pass_alone(objective):
    """The passes over x move nothing; loss and gradient stay the same."""
    (state, metrics), (both, other) = (
        take(objective, lambda *_: X_ADV, passes=Passes(statistics=which)) for which in ("adv", "all")
    )
    chex.assert_trees_all_close(state.variables["batch_stats"], after_passes(X_ADV), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(both.variables["batch_stats"], after_passes(X, X_ADV), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state.variables["params"], both.variables["params"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], other["loss"], rtol=1e-6)


def test_what_is_neither_clean_nor_adversarial_has_no_statistics_of_its_own():
    with pytest.raises(InputError, match="bn_statistics='adv': the objective makes a pass over other images"):
        take(alp(), lambda *_: X_ADV, passes=Passes(statistics="adv"))


def test_an_attack_on_the_batchs_statistics_sees_them_and_moves_none():
    """Target and attack see the network in training mode; the running statistics are those of the loss's passes."""

    def attack(key, logits_fn, x, target):
        return dict(images=x, logits=logits_fn(x), target=target)

    def loss(net, variables, batch, x_adv, key):
        value, (after, _) = trades().loss(net, variables, batch, x_adv["images"], key)
        return value, (after, x_adv)

    state, seen = take(trades()._replace(loss=loss), attack, passes=Passes(attack="batch"))
    logits = np.einsum("bhwc,hwck->bk", X - X.mean(0), VARIABLES["params"]["w"])
    np.testing.assert_allclose(seen["logits"], logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen["target"], scipy.special.softmax(logits, 1), rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(state.variables["batch_stats"], after_passes(X, X), rtol=1e-6)


def test_the_methods_own_weights_follow_their_own_learning_rate():
    """A head's rate of zero leaves it, and only it, where it was."""
    for head_rate, moves in ((0.0, False), (0.1, True)):
        optimizer = with_head(sgd(lr=lambda s: 0.1), sgd(lr=lambda s, rate=head_rate: rate))
        begin = lambda o=optimizer: init_state(KEY, CNN, MODEL, ibd().head, o, BATCH["image"], False)  # noqa: E731
        state = jax.jit(begin)()
        before = state.variables
        state, _ = take(ibd(), lambda *_: X_ADV, optimizer, state, net=CNN)
        moved = [
            float(optax.tree.norm(optax.tree.sub(after["params"], start["params"])))
            for after, start in ((state.variables["head"], before["head"]), (state.variables, before))
        ]
        assert (moved[0] > 0) == moves and moved[1] > 0


def test_a_memory_is_carried_from_step_to_step():
    def loss(net, variables, batch, x_adv, key):
        value, (after, metrics) = standard().loss(net, variables, batch, x_adv, key)
        seen = variables["memory"].at[batch["index"]].add(1.0)
        return value, ({**after, "memory": seen}, metrics)

    counting = standard()._replace(loss=loss, memory=lambda n, classes: np.zeros((n, classes), np.float32))
    state, optimizer = begin(counting), sgd(lr=lambda step: 0.1)
    step = jax.jit(make_train_step(Problem(lambda _: NET, counting), optimizer))
    for expected in (1, 2):
        state, _ = step(state, BATCH, KEY)
        np.testing.assert_array_equal(state.variables["memory"], np.full((12, 4), expected))
    assert "memory" not in evaluation_variables(state)


def test_a_memory_begins_with_the_types_that_it_keeps():
    """The weak type of a Python number is lost in the first step, and the second step would be compiled again."""
    memory, optimizer = {"share": jnp.full((3,), 0.5)}, sgd(lr=lambda step: 0.1)
    begin = lambda: init_state(KEY, CNN, MODEL, None, optimizer, BATCH["image"], False, memory)  # noqa: E731
    assert memory["share"].weak_type and not jax.eval_shape(begin).variables["memory"]["share"].weak_type


def test_what_is_remembered_is_there_for_target_attack_and_loss():
    """And it sees augmented images, before anything else has changed the variables."""

    def remember(net, variables, batch, key):
        return {**variables, "memory": variables["memory"] + 1 - batch["image"]}

    def target(net, variables, batch, key):
        return variables["memory"]

    objective = recording()._replace(target=target, remember=remember, memory=lambda n, classes: np.zeros_like(X))
    state, seen = take(objective, lambda key, logits_fn, x, target: target, augment=lambda key, x: 1 - x)
    for found in (seen["x_adv"], seen["variables"]["memory"], state.variables["memory"]):
        np.testing.assert_array_equal(found, 1 - (1 - X))


# ---- attacks of an objective's own -------------------------------------------------------------------------


def test_an_objectives_own_attack_replaces_the_configured_one_and_may_change_the_variables():
    def attack(net, variables, batch, key):
        return X_ADV, {**variables, "memory": variables["memory"] + 1}

    objective = recording()._replace(attack=attack, memory=lambda n, classes: np.float32(0))
    state, seen = take(objective)
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
        objective = recording()
        if callable(loss):
            objective = objective._replace(target=target, attack_losses=("objective",), attack_loss=attack_loss)
        if training:
            _, seen = take(objective, training_attack=stateful_pgd(loss=loss, **options))
        else:
            _, seen = take(objective, pgd(loss=loss, **options))
        made[str(loss)] = seen["x_adv"]
    np.testing.assert_array_equal(*made.values())


# ---- the seam ----------------------------------------------------------------------------------------------


def test_both_teachers_answer_with_their_own_weights():
    model = cnn.Model(4, widths=((2,),), hidden=())
    teacher, assistant = (random_variables(seed, model) for seed in (7, 9))
    net = linen_net(model, {"teacher": model, "assistant": model}, {"teacher": teacher, "assistant": assistant})
    alone = jax.jit(lambda variables: model.apply(variables, X_ADV)[0])
    for got, variables in ((net.teacher, teacher), (net.assistant, assistant)):
        np.testing.assert_array_equal(jax.jit(got)(X_ADV)[0], alone(variables))
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
    state, _ = take(standard(), microbatches=3)
    expected = after_passes(*(X[i::3] for i in range(3)))
    chex.assert_trees_all_close(state.variables["batch_stats"], expected, rtol=1e-5, atol=1e-6)


def test_the_step_with_parts_is_taken_at_the_mean_perturbation():
    """Without a gradient only weight decay is left, which sees w + v."""

    def loss(net, variables, batch, x_adv, key):
        value = 0.0 * jnp.sum(variables["params"]["w"])
        return value, (variables, {"loss": value})

    def perturb(params, gradients, epoch):
        return jax.tree.map(jnp.ones_like, params)

    objective = Objective(lambda *_: None, loss)
    state, _ = take(objective, optimizer=sgd(lr=lambda step: 0.1, weight_decay=0.5), perturb=perturb, microbatches=2)
    before = VARIABLES["params"]["w"]
    np.testing.assert_allclose(state.variables["params"]["w"], before - 0.1 * 0.5 * (before + 1), rtol=1e-5, atol=1e-6)


def test_the_loop_of_the_training_page_learns():
    """The code of docs/train.md, as it is printed there."""
    page = (Path(__file__).parent.parent / "docs" / "train.md").read_text(encoding="utf-8")
    code = re.search(r"## A training loop of your own.*?^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert code is not None
    names: dict = {}
    exec(code[1], names)
    assert 0.5 < names["metrics"]["clean_acc"] <= 1
