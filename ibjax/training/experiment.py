"""Builds and checks every part of an experiment from a configuration, and its initial state. Writes nothing.

`ibjax.training.feed` compiles the train steps, `ibjax.training.loop` runs them.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from ibjax import config, files, losses, optim
from ibjax.data import Arrays, augment, extra
from ibjax.devices import cluster, placement
from ibjax.errors import InputError
from ibjax.net import Net, Variables, linen_net
from ibjax.runs import run, rundir, trees
from ibjax.step import (
    Objective,
    Passes,
    Problem,
    TrainState,
    init_state,
    make_statistics_step,
    make_train_step,
    trainable,
    with_trainable,
)
from ibjax.training import checks


class Experiment(NamedTuple):
    """The built and checked parts of a configuration; nothing has been written or compiled."""

    config: ConfigDict  # `effective`
    data: Arrays
    facts: dict[str, Any]  # the facts that identify data and teacher, for config.json
    model: nn.Module
    bind_net: Callable[[Mapping[str, Variables] | None], Net]
    objective: Objective
    optimizer: optax.GradientTransformation
    learning_rate: Callable
    train_step: Callable
    frozen: dict[str, Variables]  # the teachers' variables, by role
    statistics_step: Callable | None  # recomputes the averaged network's batch statistics, where that is wanted
    steps_per_epoch: int
    mesh: Any
    teachers: dict[str, nn.Module]  # by role
    shares: extra.Shares | None  # which images of a batch are generated; None without generated images

    @property
    def attacked(self) -> bool:
        """Whether the objective trains on adversarial images."""
        return self.config.attack is not None or self.objective.attack is not None

    @property
    def select(self) -> str:
        """The validation accuracy that selects the `best` checkpoint: "robust", "clean" or the "mean" of both."""
        return self.config.validate.select or ("robust" if self.attacked else "clean")


def build(
    settings: ConfigDict,
    folders: Mapping[str, Path] | None = None,
    *,
    abstract: bool = False,
    mesh: Mesh | None = None,
) -> Experiment:
    """Builds all parts of an experiment and checks them. Raises InputError on whatever is wrong.

    Args:
      settings: the configuration.
      folders: {role: workdir of that teacher}; None uses `teacher.workdir` and `assistant.workdir`.
      abstract: represent a teacher by the shapes of its variables if it has yet to be trained from its recipe.
      mesh: the devices to train on; None uses all available devices.
    """
    config.check(settings)
    settings = config.effective(settings)
    mesh = cluster.mesh() if mesh is None else mesh
    cluster.check_divides(settings.batch_size, "batch_size", mesh.size, settings.microbatches)
    data = run.load_data(settings)
    checks.data(settings, data)
    steps_per_epoch = len(data.train.labels) // settings.batch_size
    mixture = None
    if data.extra is not None:
        mixture = extra.shares(data.extra, len(data.train.labels), settings.batch_size, settings.microbatches)
    model = run.build_model(settings.model, data.num_classes, "model")
    checks.model(settings, model, data)
    objective = config.build("objectives", settings.objective, "objective")
    checks.objective(settings, objective)
    taught = {
        role: _teacher(settings, role, data, (folders or {}).get(role), abstract, mesh) for role in objective.teachers
    }
    modules, frozen = ({role: parts[i] for role, parts in taught.items()} for i in (0, 1))
    optimizer, learning_rate = _optimizer(settings, steps_per_epoch)
    attack, training_attack = _attacks(settings, objective)
    problem = Problem(
        bind_net=lambda frozen: linen_net(model, modules, frozen),
        objective=objective,
        attack=attack,
        training_attack=training_attack,
        augment=_augmentation(settings),
        mix=_mix(settings, objective, data.num_classes),
        smooth=_smooth(settings, objective, data),
        steps_per_epoch=steps_per_epoch,
        microbatches=settings.microbatches,
        passes=Passes("batch" if settings.attack_bn == "batch" else "eval", settings.bn_statistics),
        products=settings.precision,
    )
    placed = functools.partial(_placed, mesh=mesh, fsdp=settings.sharding == "fsdp")
    step = make_train_step(problem, optimizer, perturb=_perturb(settings), **_averaging(settings, steps_per_epoch))
    recompute = settings.averaging.statistics == "recomputed"

    return Experiment(
        config=settings,
        data=data,
        facts={**run.facts(data), **{role: made for role, (_, _, made) in taught.items() if made}},
        model=model,
        bind_net=problem.bind_net,
        objective=objective,
        optimizer=optimizer,
        learning_rate=learning_rate,
        train_step=placed(step),
        statistics_step=placed(make_statistics_step(problem)) if recompute else None,
        frozen=frozen,
        steps_per_epoch=steps_per_epoch,
        mesh=mesh,
        teachers=modules,
        shares=mixture,
    )


def _placed(step, mesh, fsdp):
    """A step whose parts lie on the devices of `mesh`."""

    def placed(state, batch, key, frozen=None):
        with placement.over(mesh, fsdp):
            return step(state, batch, key, frozen)

    return placed


def _teacher(settings, role, data, folder, abstract, mesh):
    """(model, variables, facts) of the teacher or the assistant."""
    section = settings[role]
    recipe = section.recipe
    if not (folder or section.workdir or recipe):
        raise InputError(
            f"objective '{settings.objective.name}' needs a teacher; set {role}.workdir to the workdir of a trained "
            f"run, or {role}.recipe to a configuration that makes one"
        )
    folder = files.path(folder or section.workdir or role)
    if abstract and recipe is not None and not rundir.has_checkpoint(folder):
        taught = run.load_data(recipe)
        checks.teacher(folder, run.facts(taught), data)
        model = run.build_model(recipe.model, taught.num_classes, f"{role}.recipe.model")
        return model, run.abstract_variables(model, taught.train.images.shape[1:], mesh), {}
    if not rundir.has_checkpoint(folder):
        command = section.made_by or f"python -m ibjax.main --config=… --workdir={folder}"
        raise InputError(f"{role}.workdir={folder} holds no trained run; train the {role} first: {command}")
    checks.teacher(folder, rundir.read_config(folder)[1], data)
    taught = run.load(folder, section.checkpoint)
    return taught.model, taught.variables, {"step": taught.step, "weights": trees.digest(taught.variables)}


def _optimizer(settings, steps_per_epoch):
    """(optimiser over network and head, step -> the network's learning rate)."""
    options = config.plain(settings.optimizer)
    lr = options.pop("lr")

    def schedule(lr):
        section = config.plain(settings.schedule)
        return optim.schedule(lr=lr, epochs=settings.epochs, steps_per_epoch=steps_per_epoch, **section)

    learning_rate = schedule(lr)
    head = None
    if settings.head_optimizer.lr is not None:
        own = {"name": settings.head_optimizer.name} if settings.head_optimizer.name else options
        head = optim.optimizer(lr=schedule(settings.head_optimizer.lr), **own)
    return optim.with_head(optim.optimizer(lr=learning_rate, **options), head), learning_rate


def _attacks(settings, objective):
    """(attack in evaluation mode, attack in training mode); at most one of them is not None."""
    if settings.attack is None:
        return None, None
    options = config.arguments("attacks", settings.attack, "attack")
    if options.get("loss") == "objective":
        options["loss"] = objective.attack_loss
    if settings.attack_bn != "train":
        return config.factory("attacks", settings.attack.name)(**options), None
    if settings.attack.name != "pgd":
        raise InputError("attack_bn='train' goes with attack.name='pgd' only")
    from ibjax.attacks.pgd import stateful_pgd

    if options.pop("restarts", 1) != 1:
        raise InputError("attack_bn='train' goes with attack.restarts=1 only")
    return None, stateful_pgd(**options)


def _averaging(settings, steps_per_epoch):
    """The arguments of the train step for the average of the weights."""
    decay, options = settings.ema_decay, settings.averaging
    if decay is None:
        if config.plain(options) != config.plain(config.base().averaging):
            raise InputError("averaging says how the weights are averaged, and they are not; set ema_decay, as 0.995")
        return {}
    start = round(options.start * steps_per_epoch)
    if options.warmup or start:
        decay = optim.average_decay(decay, warmup=options.warmup, start=start)
    return {"ema_decay": decay, "average_stats": options.statistics == "averaged"}


def _perturb(settings):
    if settings.perturb is None:
        return None
    return config.build("perturbations", settings.perturb, "perturb")


def _augmentation(settings):
    if "name" in settings.augment:
        return config.build("augmentations", settings.augment, "augment")
    return augment.crop_and_flip(**settings.augment)


def _mix(settings, objective, classes):
    """(key, batch) -> the batch with mixed images, or None."""
    if settings.mix is None:
        return None
    if _remembers_images(objective, classes):
        raise InputError(
            f"mix='{settings.mix.name}' does not go with objective '{settings.objective.name}', which remembers "
            f"something of each image; set mix=None"
        )
    make = config.build("mixes", settings.mix, "mix")

    def mix(key, batch):
        labels = losses.as_distribution(batch["label"], classes)
        mixed = make(key, batch["image"], labels, batch["index"])
        return {**batch, "image": mixed.image, "label": mixed.label, "share": mixed.share}

    return mix


def _remembers_images(objective, classes):
    """Whether the objective's memory has an entry for each training image."""
    count = 104_729  # a number that is no other size
    made = jax.eval_shape(lambda: objective.memory(count, classes)) if objective.memory else ()
    return any(leaf.shape[:1] == (count,) for leaf in jax.tree.leaves(made))


def _smooth(settings, objective, data):
    """batch -> smoothed labels, or None."""
    delta, form, images = (settings.smoothing[key] for key in ("delta", "form", "images"))
    if not delta:
        return None
    if not objective.fits_labels:
        raise InputError(
            f"smoothing.delta={delta:g}: objective '{settings.objective.name}' with these options has no cross-entropy "
            f"with the labels, which would change nothing; set it to 0"
        )
    classes = data.num_classes
    if form == "others" and delta >= (classes - 1) / classes:
        raise InputError(f"smoothing.delta={delta:g} with {classes} classes leaves no likeliest class; give less")
    original = len(data.train.labels)
    if images == "generated" and data.extra is None:
        raise InputError("smoothing.images='generated' needs generated images; set data.extra, or 'all'")

    def smooth(batch):
        smoothed = losses.smooth(batch["label"], classes, delta, form)
        if images == "all":
            return smoothed
        kept = losses.as_distribution(batch["label"], classes)
        return jnp.where((batch["index"] >= original)[:, None], smoothed, kept)

    return smooth


# ---- the first state ---------------------------------------------------------------------------------------


def initial_state(experiment: Experiment, program: Callable[..., TrainState] | None = None) -> TrainState:
    """The state before the first step from the configuration's seed; `program` is an existing `initial_program`."""
    key = run_key(experiment.config.seed, 0, experiment.mesh)
    x = np.zeros((1, *experiment.data.train.images.shape[1:]), np.float32)
    return (program or initial_program(experiment))(key, x, experiment.frozen)


def initial_program(experiment: Experiment) -> Any:
    """The jitted `initializer`, whose state is placed as `state_sharding` says."""
    return jax.jit(initializer(experiment), out_shardings=state_sharding(experiment))


def state_shapes(experiment: Experiment, key: Any, program: Callable[..., TrainState] | None = None) -> TrainState:
    """The shapes of `initial_state`, with their shardings, given that of the key; `program` as there."""
    x = jax.ShapeDtypeStruct((1, *experiment.data.train.images.shape[1:]), jnp.float32)
    state = jax.eval_shape(program or initializer(experiment), key, x, experiment.frozen)
    stored = jax.tree.broadcast(state_sharding(experiment), state)
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), state, stored)


def state_sharding(experiment: Experiment) -> Any:
    """The sharding of the state between two steps: one for all its arrays, or a TrainState of shardings with "fsdp".

    Batch statistics and what the objective remembers are whole on every device.
    """
    whole = NamedSharding(experiment.mesh, cluster.REPLICATED)
    if experiment.config.sharding == "replicated":
        return whole
    x = jax.ShapeDtypeStruct((1, *experiment.data.train.images.shape[1:]), np.float32)
    state = jax.eval_shape(initializer(experiment), jax.random.key(0), x, experiment.frozen)
    placed = jax.tree.map(lambda _: whole, state.variables)
    shares = {name: placement.shares(part, experiment.mesh) for name, part in state._asdict().items()}
    variables = with_trainable(placed, placement.shares(trainable(state.variables), experiment.mesh))
    return TrainState(**{**shares, "variables": variables})


def initializer(experiment: Experiment) -> Callable[..., TrainState]:
    """A function (key, x, frozen) -> the initial state."""
    objective, data = experiment.objective, experiment.data
    ema = experiment.config.ema_decay is not None
    statistics = experiment.config.averaging.statistics != "raw"

    def init(key, x, frozen):
        net = experiment.bind_net(frozen)
        images = len(data.train.labels) + (0 if data.extra is None else len(data.extra.labels))
        memory = objective.memory(images, data.num_classes) if objective.memory else None
        return init_state(key, net, experiment.model, objective.head, experiment.optimizer, x, ema, memory, statistics)

    return init


def run_key(seed: int, which: int, mesh: Mesh) -> jax.Array:
    """One of the run's keys (0: initial weights, 1: training), on all devices of all processes."""
    return _key_program(seed, which, mesh)()


@functools.cache
def _key_program(seed, which, mesh):
    replicated = NamedSharding(mesh, cluster.REPLICATED)
    return jax.jit(lambda: jax.random.split(jax.random.key(seed))[which], out_shardings=replicated)
