"""The training step, shared by all methods, and the interfaces that a method implements.

    Net        how a network is called: pure functions over plain nested dicts of arrays   ibjax.net
    Attack     (key, logits_fn, x, target) -> x_adv                                        ibjax.attacks
    Objective  the target of the attack, and the loss of the optimiser                     ibjax.objectives
    Perturb    (params, gradients, epoch) -> a step in weight space                        ibjax.perturb
    Problem    everything between a batch and its loss                                     below
    TrainState, make_train_step                                                            below

`variables` is a dict with these entries:

    "params", "batch_stats"   of the network
    "head"                    {"params": …, "batch_stats": …} of the objective's own trainable module, if it has one
    "memory"                  what the objective keeps from step to step, if anything

`Net.forward` takes `variables` and returns their new values, so the code of an objective shows the order in which the
batch-norm statistics are updated.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from ibjax.attacks import Attack, StatefulAttack
from ibjax.devices import placement, precision
from ibjax.errors import InputError
from ibjax.net import Net, Output, Variables, of_network, to_float
from ibjax.optim import epoch_of

# "image" (B, H, W, C) float32 in [0, 1]; "label" and "index" (B,) int32; "step" int32, the number of steps before this
# one; "epoch" float32, the same number in epochs (0.5: half of the first epoch is done); "epoch_step" int32, the number
# of steps of the current epoch before this one. Mixed images have "share" (B,) float32, the share of the image at
# "index"; their "label" holds distributions (B, C) float32; smoothed labels, which only the loss sees, do too
Batch = dict[str, Array]
Perturb = Callable[[Any, Any, Array], Any]


class PerImage(NamedTuple):
    """An augmentation of one image, which the step maps over a batch: what it draws depends on (seed, step, index)."""

    change: Callable[[Array, Array], Array]  # (key, image (H, W, C) float32 in [0, 1]) -> the same


Augment = Callable[[Array, Array], Array] | PerImage
_MIXING = 2**31 - 1  # folded into the key of the augmentation, whose own draws fold in small numbers


Loss = tuple[Array, tuple[Variables, dict[str, Array]]]  # value, (variables, metrics)


class Objective(NamedTuple):
    """A training method: its loss, and what its attack maximises.

    target: (net, variables, batch, key) -> the attack's target, against which the inner maximisation raises the loss:
      labels (B,), distributions (B, C), or any pytree that `attack_loss` takes.
    loss: (net, variables, batch, x_adv, key) -> (loss, (variables, metrics)); `x_adv` is None without an attack.
      `target` and `loss` get the same key, so XLA computes only once what both of them compute.
    head: a module with trainable weights that belong to the method, called as
      head(features, teacher_features, train=…).
    teachers: which of `net.teacher` and `net.assistant` the method needs, by name.
    attack_losses: the values of `attack.loss` that fit `target`; () if `attack` must be None.
    flat_at_x: the attack's loss has zero gradient at x, as the KL divergence to the network's own prediction at x has;
      the attack must then start at a random point.
    attack_loss: ((logits, features), target) -> (B,), used where `attack_losses` is ("objective",).
    attack: (net, variables, batch, key) -> (x_adv, variables), an inner maximisation that is specific to the method.
    memory: (training images, classes) -> variables["memory"] before the first step.
    remember: (net, variables, batch, key) -> variables with an updated memory. It runs before `target` and the attack,
      at the unperturbed weights; what `loss` adds to the memory is computed at the perturbed weights.
    proxy: (net, variables, batch, x_adv, key) -> the loss that a weight perturbation increases; None: `loss`.
    fits_labels: whether `loss` has a cross-entropy with batch["label"], which smoothed labels change.
    """

    target: Callable[[Net, Variables, Batch, Array], Any]
    loss: Callable[[Net, Variables, Batch, Any, Array], Loss]
    head: nn.Module | None = None
    teachers: tuple[str, ...] = ()
    attack_losses: tuple[str, ...] = ("ce", "margin")
    flat_at_x: bool = False
    attack_loss: Callable[[Output, Any], Array] | None = None
    attack: Callable[[Net, Variables, Batch, Array], tuple[Any, Variables]] | None = None
    memory: Callable[[int, int], Any] | None = None
    remember: Callable[[Net, Variables, Batch, Array], Variables] | None = None
    proxy: Callable[[Net, Variables, Batch, Any, Array], Array] | None = None
    fits_labels: bool = True


class TrainState(NamedTuple):
    """Everything that changes during training; all else is a function of this state and the configuration."""

    step: Array  # int32, optimiser steps done
    variables: Variables
    opt_state: Any
    ema_params: Any  # exponential moving average of variables["params"], or None
    ema_stats: Any = None  # the batch statistics of the averaged network; None: those of the network itself


def trainable(variables: Variables) -> dict[str, Any]:
    """The part of `variables` that has gradients: {"params": …} and, with a head, {"head": …}."""
    head = {"head": variables["head"]["params"]} if "head" in variables else {}
    return {"params": variables["params"], **head}


def with_trainable(variables: Variables, params: dict[str, Any]) -> Variables:
    """`variables` with `trainable(variables)` replaced by `params`."""
    head = {"head": {**variables["head"], "params": params["head"]}} if "head" in params else {}
    return {**variables, "params": params["params"], **head}


def evaluation_variables(state: TrainState) -> Variables:
    """The variables for evaluation and export, without the head: the averaged parameters if the state has them.

    The running statistics are those of the averaged network if the state has them, else those of the raw parameters, as
    in the code of Gowal et al. and of SCORE.
    """
    evaluated = of_network(state.variables)
    if state.ema_params is not None:
        evaluated["params"] = state.ema_params
    if state.ema_stats is not None:
        evaluated["batch_stats"] = state.ema_stats
    return evaluated


def init_state(
    key: Array,
    net: Net,
    model: nn.Module,
    head: nn.Module | None,
    optimizer: optax.GradientTransformation,
    x: Array,
    ema: bool,
    memory: Any = None,
    ema_stats: bool = False,
) -> TrainState:
    """The state before the first step; `x` (B, H, W, C) determines the shapes of network and head.

    `ema` and `ema_stats` say whether it has an average of the parameters, and batch statistics of its own for that.
    """
    model_key, head_key = jax.random.split(key)
    variables = {"batch_stats": {}, **model.init({"params": model_key}, x, train=False)}
    if head is not None:
        _, features = net.predict(variables, x)
        teacher_features = net.teacher(x)[1] if net.teacher else None
        variables["head"] = {
            "batch_stats": {},
            **head.init(head_key, features, teacher_features, train=False),
        }
    if memory is not None:  # where a Python number gave it a weak type, the first step would return another
        variables["memory"] = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), memory)
    ema_params = jax.tree.map(jnp.copy, variables["params"]) if ema else None
    statistics = jax.tree.map(jnp.copy, variables["batch_stats"]) if ema_stats else None
    return TrainState(jnp.zeros((), jnp.int32), variables, optimizer.init(trainable(variables)), ema_params, statistics)


class Passes(NamedTuple):
    """The batch-norm statistics in the passes of attack and loss, where they differ from what the objective says."""

    attack: str = "eval"  # or "batch": the attack sees the statistics of its batch, and moves no running statistics
    statistics: str = "all"  # or "adv": in the loss, passes over clean images leave the running ones as they are


AS_STATED = Passes()


class Problem(NamedTuple):
    """What an optimiser solves: how a batch becomes a loss, with the attack on the way.

    bind_net: {role: a teacher's variables} (or None) -> Net.
    objective: the method.
    attack: the inner maximisation, in evaluation mode; None: no attack, or the one of `objective.attack`.
    training_attack: the same attack with batch-norm in training mode, where every attack step updates the running
      statistics; it replaces `attack`.
    augment: (key, images) -> float32 images in [0, 1], or `PerImage`; None only converts the images to float32.
    mix: (key, batch) -> the batch with mixed "image", "label" (B, C) and "share"; the attack and the loss see it.
    smooth: batch -> the labels (B, C) that `objective.loss` fits; the attack sees those of the batch.
    steps_per_epoch: converts `state.step` into `batch["epoch"]`.
    microbatches: number of parts of a batch that are attacked and differentiated one after the other, to save memory;
      the optimiser takes one step with the mean gradient. Whatever couples the images of a batch then couples only
      those of one part: batch statistics (which the parts update in turn), HSIC and its widths, weight perturbations.
    passes: see `Passes`.
    products: the precision of float32 products in networks, heads, teachers and attack, by name.
    """

    bind_net: Callable[[Mapping[str, Variables] | None], Net]
    objective: Objective
    attack: Attack | None = None
    training_attack: StatefulAttack | None = None
    augment: Augment | None = None
    mix: Callable[[Array, Batch], Batch] | None = None
    smooth: Callable[[Batch], Array] | None = None
    steps_per_epoch: int = 1
    microbatches: int = 1
    passes: Passes = AS_STATED
    products: str = precision.TRAINING


def make_train_step(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    *,
    perturb: Perturb | None = None,
    ema_decay: float | Callable[[Array], Array] | None = None,
    average_stats: bool = False,
) -> Callable[[TrainState, Batch, Array, Mapping[str, Variables] | None], tuple[TrainState, dict[str, Array]]]:
    """The step `(state, batch, key, frozen=None) -> (state, metrics)`, pure and not yet jitted.

    `frozen` passes the teachers' weights as an argument, so that they are neither constants of the compiled program nor
    saved with the state.

    Args:
      problem: how a batch becomes a loss.
      optimizer: over `trainable(variables)`.
      perturb: a weight perturbation. The gradient is taken at the perturbed weights; the perturbation is subtracted
        after the optimiser's step.
      ema_decay: decay of the moving average of the parameters, if the state has one; or a function of the steps done.
      average_stats: whether `ema_stats` of the state is the same average of the batch statistics.
    """
    differentiate = _differentiation(problem, perturb)

    @precision.at(problem.products)
    def train_step(state, batch, key, frozen=None):
        batch, progress, keys = _prepared(problem, state.step, batch, key)
        net, variables = problem.bind_net(frozen), placement.gathered(state.variables)

        def one(variables, part, keys):
            return differentiate(net, variables, {**part, **progress}, *keys)

        summed, (variables, metrics) = _over_parts(one, variables, batch, keys, problem.microbatches)
        gradients, offset = placement.shared(summed)

        params = raw = placement.shared(trainable(state.variables))
        if offset is not None:
            params = {**params, "params": jax.tree.map(jnp.add, params["params"], offset)}
        updates, opt_state = optimizer.update(gradients, state.opt_state, params)
        # the optimiser computes its update Δ at w + v; as (w + v + Δ) − v = w + Δ, Δ is added to w without rounding v
        params = optax.apply_updates(raw, updates)
        variables, ema_params, ema_stats = with_trainable(variables, params), state.ema_params, state.ema_stats
        if ema_params is not None and ema_decay is not None:
            share = 1.0 - (ema_decay(state.step) if callable(ema_decay) else ema_decay)
            ema_params = optax.incremental_update(params["params"], ema_params, share)
            if average_stats:
                ema_stats = optax.incremental_update(variables["batch_stats"], ema_stats, share)
        metrics = {**metrics, "grad_norm": optax.tree.norm(gradients)}
        return TrainState(state.step + 1, variables, opt_state, ema_params, ema_stats), metrics

    return train_step


def make_statistics_step(
    problem: Problem,
) -> Callable[[TrainState, Batch, Array, Mapping[str, Variables] | None], TrainState]:
    """The step `(state, batch, key, frozen=None) -> state` that moves `ema_stats` as training moves the statistics.

    It makes the passes of a train step, with the same images, at the averaged parameters; nothing else changes but the
    number of the step.
    """

    @precision.at(problem.products)
    def statistics_step(state, batch, key, frozen=None):
        batch, progress, keys = _prepared(problem, state.step, batch, key)
        net = problem.bind_net(frozen)

        def one(variables, part, keys):
            seen, variables, fitted, x_adv = _attacked(problem, net, variables, {**part, **progress}, *keys)
            return (), (problem.objective.loss(seen, variables, fitted, x_adv, keys[1])[1][0], {})

        variables = {**state.variables, "params": state.ema_params, "batch_stats": state.ema_stats}
        variables = placement.gathered(variables)
        _, (variables, _) = _over_parts(one, variables, batch, keys, problem.microbatches)
        return state._replace(step=state.step + 1, ema_stats=variables["batch_stats"])

    return statistics_step


def _prepared(problem, step, batch, key):
    """(augmented and mixed batch, what all its images share, keys of attack and loss)."""
    augment_key, *keys = jax.random.split(jax.random.fold_in(key, step), 3)
    images = _augmented(problem.augment, augment_key, to_float(batch["image"]), batch.get("index"))
    batch = {**batch, "image": images}
    if problem.mix is not None:
        batch = problem.mix(jax.random.fold_in(augment_key, _MIXING), batch)
    n = problem.steps_per_epoch
    return batch, {"step": step, "epoch": epoch_of(step, n), "epoch_step": step % n}, jnp.stack(keys)


def _augmented(augment, key, images, index):
    """The augmented images (B, H, W, C)."""
    if augment is None:
        return images
    if not isinstance(augment, PerImage):
        return augment(key, images)
    return jax.vmap(augment.change)(jax.vmap(jax.random.fold_in, (None, 0))(key, index), images)


def _differentiation(problem, perturb):
    """(net, variables, batch, attack_key, loss_key) -> ((gradients, perturbation), (variables, metrics)).

    The batch may be a part of one.
    """
    objective = problem.objective

    def differentiate(net, variables, batch, attack_key, loss_key):
        net, variables, fitted, x_adv = _attacked(problem, net, variables, batch, attack_key, loss_key)

        def loss(params):
            return objective.loss(net, with_trainable(variables, params), fitted, x_adv, loss_key)

        params, offset = trainable(variables), None
        if perturb is not None:

            def proxy(weights):
                changed = with_trainable(variables, {**params, "params": weights})
                if objective.proxy is None:
                    return objective.loss(net, changed, fitted, x_adv, loss_key)[0]
                return objective.proxy(net, changed, fitted, x_adv, loss_key)

            offset = perturb(params["params"], jax.grad(proxy)(params["params"]), batch["epoch"])
            params = {**params, "params": jax.tree.map(jnp.add, params["params"], offset)}
        gradients, (updated, metrics) = jax.grad(loss, has_aux=True)(params)
        return (gradients, offset), (with_trainable(updated, trainable(variables)), metrics)

    return differentiate


def _attacked(problem, net, variables, batch, attack_key, loss_key):
    """(net, variables, batch, x_adv), as the loss takes them."""
    objective, passes, seen, x_adv = problem.objective, problem.passes, net, None
    if objective.remember is not None:
        variables = objective.remember(net, variables, batch, loss_key)
    if objective.attack is not None:
        x_adv, variables = objective.attack(net, variables, batch, attack_key)
    elif problem.training_attack is not None:
        x_adv, variables = _attack_in_training_mode(problem, attack_key, net, variables, batch, loss_key)
    elif problem.attack is not None:
        if passes.attack == "batch":
            seen = net._replace(predict=lambda v, x, edits=None: net.forward(v, x, loss_key, edits)[0])
        target = objective.target(seen, variables, batch, loss_key)
        answer = lambda x: _for_attack(objective, seen.predict(variables, x))  # noqa: E731
        x_adv = problem.attack(attack_key, answer, batch["image"], target)
    x_adv = jax.tree.map(lax.stop_gradient, x_adv)
    fitted = batch if problem.smooth is None else {**batch, "label": problem.smooth(batch)}
    return _with_statistics(net, batch["image"], x_adv, passes), variables, fitted, x_adv


def _with_statistics(net, x, x_adv, passes):
    """The network whose training-mode passes over `x` leave the running statistics as they are, if so asked."""
    if passes.statistics == "all":
        return net

    def forward(variables, images, key, edits=None):
        output, updated = net.forward(variables, images, key, edits)
        if images is not x and images is not x_adv:
            raise InputError(
                "bn_statistics='adv': the objective makes a pass over other images than x or x', whose statistics "
                "cannot be told apart; set 'all'"
            )
        return output, updated if images is x_adv else variables

    return net._replace(forward=forward)


def _over_parts(differentiate, variables, batch, keys, count):
    """Runs `differentiate` on `count` parts of the batch in turn.

    Returns (means of gradients and perturbations, (variables after all parts, means of metrics)). A part takes every
    `count`-th example, so every device holds an equal share of each part.
    """
    if count == 1:
        return differentiate(variables, batch, keys)
    parts = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, count, *a.shape[1:]), 1, 0), batch)

    def part(variables, i_and_part):
        i, part = i_and_part
        summed, (variables, metrics) = differentiate(variables, part, jax.vmap(jax.random.fold_in, (0, None))(keys, i))
        return variables, (summed, metrics)

    def add(carry, i_and_part):
        variables, total = carry
        variables, new = part(variables, i_and_part)
        return (variables, jax.tree.map(jnp.add, total, new)), None

    first = (jnp.zeros((), jnp.int32), jax.tree.map(lambda a: a[0], parts))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(part, variables, first)[1])
    (variables, total), _ = lax.scan(add, (variables, zeros), (jnp.arange(count), parts))
    summed, metrics = jax.tree.map(lambda a: a / count, total)
    return summed, (variables, metrics)


def _for_attack(objective, output):
    """What the attack sees of a network's output: the logits, or (logits, features) if the objective has its loss."""
    return output if objective.attack_loss is not None else output[0]


def _attack_in_training_mode(problem, key, net, variables, batch, loss_key):
    """Every attack step is a training-mode forward pass and moves the running statistics once (Rice et al.)."""
    objective = problem.objective
    target = objective.target(net, variables, batch, loss_key)
    params = trainable(variables)

    def forward(x, rest):
        output, updated = net.forward(with_trainable(rest, params), x, loss_key)
        return _for_attack(objective, output), {name: part for name, part in updated.items() if name != "params"}

    rest = {name: part for name, part in variables.items() if name != "params"}
    x_adv, rest = problem.training_attack(key, forward, batch["image"], target, rest)
    return x_adv, {**rest, "params": params["params"]}
