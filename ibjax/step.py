"""The core: what a method may vary, and the one train step that never varies.

    Net        how a network is called: three pure functions over plain nested dicts of arrays
    Attack     (key, logits_fn, x, target) -> x_adv                                  ibjax.attacks
    Objective  what the attack climbs away from, and what the optimiser descends     ibjax.objectives
    TrainState, make_train_step                                                      below

`variables` are {"params": …, "batch_stats": …} of the network and, where the objective has trainable weights of its
own, {"head": {"params": …, "batch_stats": …}}. They go into and come out of `Net.forward`, so the order of
batch-norm updates is read off an objective's page.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from ibjax.attacks import Attack, StatefulAttack

Variables = dict[str, Any]
Batch = dict[str, Array]  # "image" (B, H, W, C) float32 in [0, 1], "label" (B,) int32, "index" (B,) int32
Output = tuple[Array, dict[str, Array]]  # logits (B, C) float32, features


class Net(NamedTuple):
    """The only seam to the neural-network library."""

    predict: Callable[[Variables, Array], Output]  # evaluation mode: nothing changes
    forward: Callable[[Variables, Array, Array], tuple[Output, Variables]]  # training mode (variables, x, key)
    teacher: Callable[[Array], Output] | None = None  # frozen, evaluation mode, no gradient


class Objective(NamedTuple):
    """A paper.

    target: (net, variables, batch, key) -> what the inner maximisation climbs away from: labels (B,) or
      distributions (B, C).
    loss: (net, variables, batch, x_adv, key) -> (loss, (variables, metrics)); `x_adv` is None without an attack.
      `target` and `loss` get the same key, so what both compute XLA computes once.
    head: module of the method's own trainable weights, called as head(features, teacher_features, train=…).
    needs_teacher: whether `net.teacher` must be there.
    attack_losses: the losses that climb away from `target`; () where the method trains on clean images.
    """

    target: Callable[[Net, Variables, Batch, Array], Array]
    loss: Callable[[Net, Variables, Batch, Array | None, Array], tuple[Array, tuple[Variables, dict[str, Array]]]]
    head: nn.Module | None = None
    needs_teacher: bool = False
    attack_losses: tuple[str, ...] = ("ce", "margin")


class TrainState(NamedTuple):
    """All that changes in training; everything else is a function of it and the configuration."""

    step: Array  # int32, optimiser steps done
    variables: Variables
    opt_state: Any
    ema_params: Any  # exponential moving average of variables["params"], or None


def linen_net(model: nn.Module, teacher: nn.Module | None = None, teacher_variables: Variables | None = None) -> Net:
    """The seam: a Linen module (and a frozen teacher) as pure functions of `variables`."""

    def predict(variables, x):
        return model.apply(_network(variables), x, train=False)

    def forward(variables, x, key):
        rngs = dict(zip(("dropout", "sample"), jax.random.split(key), strict=True))
        output, updated = model.apply(_network(variables), x, train=True, mutable=["batch_stats"], rngs=rngs)
        return output, {**variables, **updated}

    if teacher is None:
        return Net(predict, forward)

    def teach(x):
        return jax.tree.map(lax.stop_gradient, teacher.apply(teacher_variables, x, train=False))

    return Net(predict, forward, teach)


def _network(variables):
    return {name: variables[name] for name in ("params", "batch_stats") if name in variables}


def trainable(variables: Variables) -> dict[str, Any]:
    """The part of `variables` that has gradients: {"params": …} and, with a head, {"head": …}."""
    head = {"head": variables["head"]["params"]} if "head" in variables else {}
    return {"params": variables["params"], **head}


def with_trainable(variables: Variables, params: dict[str, Any]) -> Variables:
    """`variables` with `trainable(variables)` replaced by `params`."""
    head = {"head": {**variables["head"], "params": params["head"]}} if "head" in params else {}
    return {**variables, "params": params["params"], **head}


def evaluation_variables(state: TrainState) -> Variables:
    """What is evaluated and saved for use: the averaged parameters where there are any, without the head.

    The running statistics are those of the raw parameters, which is what published code with averaging does.
    """
    params = state.variables["params"] if state.ema_params is None else state.ema_params
    return {**_network(state.variables), "params": params}


def init_state(
    key: Array,
    net: Net,
    model: nn.Module,
    head: nn.Module | None,
    optimizer: optax.GradientTransformation,
    x: Array,
    ema: bool,
) -> TrainState:
    """The state before the first step; `x` (B, H, W, C) gives the shapes of network and head."""
    model_key, head_key = jax.random.split(key)
    variables = {"batch_stats": {}, **model.init({"params": model_key}, x, train=False)}
    if head is not None:
        _, features = net.predict(variables, x)
        teacher_features = net.teacher(x)[1] if net.teacher else None
        variables["head"] = {
            "batch_stats": {},
            **head.init(head_key, features, teacher_features, train=False),
        }
    ema_params = jax.tree.map(jnp.copy, variables["params"]) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), variables, optimizer.init(trainable(variables)), ema_params)


def make_train_step(
    bind_net: Callable[[Variables | None], Net],
    objective: Objective,
    optimizer: optax.GradientTransformation,
    attack: Attack | None,
    training_attack: StatefulAttack | None = None,
    augment: Callable[[Array, Array], Array] | None = None,
    ema_decay: float | None = None,
) -> Callable[[TrainState, Batch, Array, Variables | None], tuple[TrainState, dict[str, Array]]]:
    """The step `(state, batch, key, teacher_variables=None) -> (state, metrics)`, pure and not yet jitted.

    The teacher's weights are an argument so that they are neither baked into the program nor saved with the state.

    Args:
      bind_net: teacher's variables (or None) -> Net.
      objective: the method.
      optimizer: over `trainable(variables)`.
      attack: the inner maximisation in evaluation mode; None trains on the images alone.
      training_attack: the same attack in batch-norm's training mode, moving the running statistics; replaces `attack`.
      augment: (key, images) -> float32 images in [0, 1]; None only converts.
      ema_decay: of the moving average of the parameters, if the state has one.
    """

    def train_step(state, batch, key, teacher_variables=None):
        key = jax.random.fold_in(key, state.step)
        augment_key, attack_key, loss_key = jax.random.split(key, 3)
        net, variables = bind_net(teacher_variables), state.variables
        x = to_float(batch["image"])
        batch = {**batch, "image": augment(augment_key, x) if augment else x}

        x_adv = None
        if training_attack is not None:
            x_adv, variables = _attack_in_training_mode(
                training_attack, attack_key, net, variables, batch, objective, loss_key
            )
        elif attack is not None:
            target = objective.target(net, variables, batch, loss_key)
            x_adv = attack(attack_key, lambda x: net.predict(variables, x)[0], batch["image"], target)
        x_adv = None if x_adv is None else lax.stop_gradient(x_adv)

        def loss(params):
            return objective.loss(net, with_trainable(variables, params), batch, x_adv, loss_key)

        params = trainable(variables)
        gradients, (variables, metrics) = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, params)
        params = optax.apply_updates(params, updates)
        ema_params = state.ema_params
        if ema_params is not None and ema_decay is not None:
            ema_params = optax.incremental_update(params["params"], ema_params, 1.0 - ema_decay)
        metrics = {**metrics, "grad_norm": optax.tree.norm(gradients)}
        return TrainState(state.step + 1, with_trainable(variables, params), opt_state, ema_params), metrics

    return train_step


def _attack_in_training_mode(attack, key, net, variables, batch, objective, loss_key):
    """Every attack step is a training-mode forward pass and moves the running statistics once (Rice et al.)."""
    target = objective.target(net, variables, batch, loss_key)
    params = trainable(variables)

    def forward(x, changing):
        (logits, _), updated = net.forward(with_trainable(changing, params), x, loss_key)
        return logits, {name: part for name, part in updated.items() if name != "params"}

    rest = {name: part for name, part in variables.items() if name != "params"}
    x_adv, rest = attack(
        key, lambda x, rest: forward(x, {**rest, "params": params["params"]}), batch["image"], target, rest
    )
    return x_adv, {**rest, "params": params["params"]}


def to_float(images: Array) -> Array:
    """uint8 images become float32 in [0, 1]; float images pass unchanged."""
    return images.astype(jnp.float32) / 255.0 if images.dtype == jnp.uint8 else images
