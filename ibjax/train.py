"""Training: everything built from a configuration, and the loop around its compiled steps (ibjax.feed).

Guarantees (tests of the same names): a killed run continues to the bit; the step compiles once.
"""

import contextlib
import functools
import logging
import sys
import time
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
from tqdm import tqdm

from ibjax import checkpoint as checkpoints
from ibjax import cluster, config, feed, optim, perturb, run
from ibjax.data import Arrays, augment
from ibjax.errors import CheckpointError, DivergedError, InputError, PreemptedError
from ibjax.metrics import MetricsLog, Window
from ibjax.scoring import Scorer
from ibjax.step import Net, Objective, TrainState, Variables, init_state, linen_net, make_train_step

log = logging.getLogger(__name__)
_CATASTROPHE = 20.0  # points of robust accuracy lost on validation images, where one-step training overfits at once


class Experiment(NamedTuple):
    """What a configuration means, built and checked; nothing has been written or compiled."""

    config: ConfigDict
    data: Arrays
    facts: dict[str, Any]  # what identifies data and teacher, for config.json
    model: nn.Module
    bind_net: Callable[[Mapping[str, Variables] | None], Net]
    objective: Objective
    optimizer: optax.GradientTransformation
    learning_rate: Callable
    train_step: Callable
    frozen: dict[str, Variables]  # the teachers' variables, by role
    steps_per_epoch: int
    mesh: Any


def check(settings: ConfigDict, folders: Mapping[str, Path] | None = None) -> None:
    """Raises InputError on whatever is wrong with a configuration, its data or its teacher.

    The whole step and the validation are traced; nothing is saved, compiled or computed. A teacher that has yet to be
    made is taken from its recipe.
    """
    experiment = build(settings, folders, abstract=True)
    frozen = experiment.frozen
    x = jax.ShapeDtypeStruct((1, *experiment.data.train.images.shape[1:]), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    try:
        state = jax.eval_shape(initializer(experiment), key, x, frozen)
        feed.trace(experiment, state, key)
        scorer, _ = _validator(experiment)
        scorer.trace(checkpoints.split(state)[0], _selection_split(experiment))
    except InputError:
        raise
    except Exception as error:  # a contradiction that only tracing sees: shapes, types, values
        first = (str(error).strip() or "no message").splitlines()[0]
        raise InputError(f"this configuration cannot be traced: {type(error).__name__}: {first}") from error


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
      folders: role -> workdir of that teacher; without one, `teacher.workdir` and `assistant.workdir` count.
      abstract: give a teacher's variables as shapes where it has yet to be trained from its recipe.
      mesh: the devices to train on; None takes all that are here.
    """
    config.check(settings)
    mesh = cluster.mesh() if mesh is None else mesh
    cluster.check_divides(settings.batch_size, "batch_size", mesh.size, settings.microbatches)
    data = run.load_data(settings)
    if settings.select_on == "val" and data.val is None:
        raise InputError("data.val_size=0 leaves nothing to select on; hold some out, or set select_on='test'")
    steps_per_epoch = len(data.train.labels) // settings.batch_size
    if not steps_per_epoch:
        raise InputError(f"batch_size={settings.batch_size} exceeds the {len(data.train.labels)} training images")
    model = run.build_model(settings.model, data.num_classes, "model")
    objective = config.build("objectives", settings.objective, "objective")
    _check_attack(settings, objective)
    for role in config.TEACHERS:
        if role not in objective.teachers and (settings[role].workdir or settings[role].recipe):
            raise InputError(
                f"objective '{settings.objective.name}' asks no {role} and would ignore it; set {role}.workdir='' and "
                f"{role}.recipe=None"
            )
    taught = {
        role: _teacher(settings, role, data, (folders or {}).get(role), abstract, mesh) for role in objective.teachers
    }
    modules, frozen = ({role: parts[i] for role, parts in taught.items()} for i in (0, 1))
    optimizer, learning_rate = _optimizer(settings, steps_per_epoch)

    def bind_net(frozen):
        return linen_net(model, modules, frozen)

    train_step = make_train_step(
        bind_net,
        objective,
        optimizer,
        *_attacks(settings, objective),
        augment=augment.crop_and_flip(**settings.augment),
        ema_decay=settings.ema_decay,
        perturb=_perturb(settings),
        steps_per_epoch=steps_per_epoch,
        microbatches=settings.microbatches,
    )
    return Experiment(
        config=settings,
        data=data,
        facts={**run.facts(data), **{role: made for role, (_, _, made) in taught.items() if made}},
        model=model,
        bind_net=bind_net,
        objective=objective,
        optimizer=optimizer,
        learning_rate=learning_rate,
        train_step=train_step,
        frozen=frozen,
        steps_per_epoch=steps_per_epoch,
        mesh=mesh,
    )


def _check_attack(settings, objective):
    """Refuses an attack that the objective would ignore, lacks, or that climbs away from something else."""
    name, losses = settings.objective.name, objective.attack_losses
    if settings.attack is None:
        if losses:
            raise InputError(f"objective '{name}' needs an attack; set attack=dict(name='pgd', loss='{losses[0]}', …)")
        return
    loss = settings.attack.get("loss", "ce")
    if not losses:
        why = "makes its own adversarial images" if objective.attack else "trains on clean images"
        raise InputError(f"objective '{name}' {why} and would ignore the attack; set attack=None")
    if loss not in losses:
        raise InputError(f"attack.loss='{loss}' does not go with objective '{name}'; allowed: {', '.join(losses)}")
    if objective.flat_at_x and settings.attack.get("init") == "none":
        raise InputError(
            f"attack.init='none' starts where the loss that objective '{name}' has the attack climb has no gradient; "
            f"use 'gaussian'"
        )


def _teacher(settings, role, data, folder, abstract, mesh):
    """(model, variables, facts) of the teacher or the assistant."""
    section = settings[role]
    recipe = section.recipe
    if not (folder or section.workdir or recipe):
        raise InputError(
            f"objective '{settings.objective.name}' needs a teacher; set {role}.workdir to the workdir of a trained "
            f"run, or {role}.recipe to a configuration that makes one"
        )
    folder = Path(folder or section.workdir or role)
    if abstract and recipe is not None and not run.has_checkpoint(folder):
        taught = run.load_data(recipe)
        _check_teacher(folder, run.facts(taught), data)
        model = run.build_model(recipe.model, taught.num_classes, f"{role}.recipe.model")
        return model, run.abstract_variables(model, taught.train.images.shape[1:], mesh), {}
    if not run.has_checkpoint(folder):
        command = section.made_by or f"python -m ibjax.main --config=… --workdir={folder}"
        raise InputError(f"{role}.workdir={folder} holds no trained run; train the {role} first: {command}")
    _check_teacher(folder, run.read_config(folder)[1], data)
    taught = run.load(folder, section.checkpoint)
    return taught.model, taught.variables, {"step": taught.step, "weights": checkpoints.tree_digest(taught.variables)}


def _check_teacher(folder, taught, data):
    if taught["num_classes"] != data.num_classes:
        raise InputError(
            f"the teacher in {folder} has {taught['num_classes']} classes, the data has {data.num_classes}; "
            f"give a teacher of this data set"
        )
    if tuple(taught["input_shape"]) != data.train.images.shape[1:]:
        raise InputError(
            f"the teacher in {folder} takes images of shape {tuple(taught['input_shape'])}, "
            f"the data has {data.train.images.shape[1:]}"
        )


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
    """(attack in evaluation mode, attack in training mode): at most one of them is there."""
    if settings.attack is None:
        return None, None
    options = config.arguments("attacks", settings.attack, "attack")
    if options.get("loss") == "objective":
        options["loss"] = objective.attack_loss
    if settings.attack_bn == "eval":
        return config.factory("attacks", settings.attack.name)(**options), None
    if settings.attack.name != "pgd":
        raise InputError("attack_bn='train' goes with attack.name='pgd' only")
    from ibjax.attacks.pgd import stateful_pgd

    if options.pop("restarts", 1) != 1:
        raise InputError("attack_bn='train' goes with attack.restarts=1 only")
    return None, stateful_pgd(**options)


def _perturb(settings):
    if settings.perturb is None:
        return None
    options = {key: value for key, value in config.plain(settings.perturb).items() if key != "name"}
    return perturb.named(settings.perturb.name)(**options)


# ---- the first state ---------------------------------------------------------------------------------------


def initial_state(experiment: Experiment) -> TrainState:
    """The state before the first step, on all devices, from the configuration's seed."""
    replicated = NamedSharding(experiment.mesh, cluster.REPLICATED)
    key = _key(experiment.config.seed, 0, experiment.mesh)
    x = np.zeros((1, *experiment.data.train.images.shape[1:]), np.float32)
    return jax.jit(initializer(experiment), out_shardings=replicated)(key, x, experiment.frozen)


def initializer(experiment):
    """(key, x, frozen) -> the first state."""
    objective, data = experiment.objective, experiment.data
    ema = experiment.config.ema_decay is not None

    def init(key, x, frozen):
        net = experiment.bind_net(frozen)
        memory = objective.memory(len(data.train.labels), data.num_classes) if objective.memory else None
        return init_state(key, net, experiment.model, objective.head, experiment.optimizer, x, ema, memory)

    return init


def _key(seed, which, mesh):
    """One of the run's keys (0: initial weights, 1: training), on all devices of all processes."""
    replicated = NamedSharding(mesh, cluster.REPLICATED)
    return jax.jit(lambda: jax.random.split(jax.random.key(seed))[which], out_shardings=replicated)()


# ---- the loop ----------------------------------------------------------------------------------------------


def train(experiment: Experiment, workdir: Path) -> None:
    """Trains to the last epoch, from the newest good checkpoint if there is one.

    Raises PreemptedError after saving when SIGTERM has come, DivergedError when the loss is not finite.
    """
    settings = experiment.config
    total = settings.epochs * experiment.steps_per_epoch
    run.write_config(workdir, settings, experiment.facts)
    with checkpoints.manager(workdir) as orbax:
        state = initial_state(experiment)
        state = checkpoints.restore_latest(orbax, state) or state
        step = int(state.step)
        if step >= total:
            log.info("%s: already trained, %d steps", workdir, step)
            return
        if step and settings.validate.stop_on_overfitting and _overfitted(orbax, checkpoints.metrics(orbax, step)):
            log.info("%s: stopped at step %d by catastrophic overfitting", workdir, step)
            return
        if step:
            log.info("%s: continuing from step %d of %d", workdir, step, total)
        if jax.process_index() == 0:
            with contextlib.closing(MetricsLog(workdir, step)) as metrics_log:
                _loop(experiment, orbax, state, step, total, metrics_log.write)
        else:
            _loop(experiment, orbax, state, step, total, lambda *args, **values: None)


def _loop(experiment, orbax, state, step, total, write):
    settings, per_epoch, mesh = experiment.config, experiment.steps_per_epoch, experiment.mesh
    capacity, dispatch = feed.feed(experiment, _key(settings.seed, 1, mesh), step)
    validator = _validator(experiment)
    window, first, began = Window(step), step, time.perf_counter()

    with _progress(settings, total, step) as bar:
        while step < total:
            stop = min(step + capacity, _next_multiple(step, settings.log_every), _next_multiple(step, per_epoch))
            with _naming_the_batch(settings, mesh):
                state, metrics = dispatch(state, stop - step)
            window.add(stop - step, metrics)
            bar.update(stop - step)
            step = stop
            epoch, in_epoch = divmod(step, per_epoch)
            validated = not in_epoch and _validate_now(settings, epoch)
            saved = not in_epoch and (validated or epoch % settings.checkpoint_every == 0)
            preempted = cluster.preempted()
            if saved or preempted or step % settings.log_every == 0:
                values = window.fetch()
                if reason := _divergence(values, window.first, orbax):
                    write("diverged", step, reason=reason)
                    raise DivergedError(reason)
                row = window.row(values, step, settings.batch_size)
                write("train", step, epoch=step / per_epoch, **row)
                bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['images_per_s']:.0f} images/s")
                window = Window(step)
            if saved or preempted:
                scores = _validate(experiment, validator, state) if validated else None
                if scores:
                    write("val", step, epoch=step / per_epoch, **scores)
                    _tell(settings, epoch, scores, (time.perf_counter() - began) / (step - first) * (total - step))
                overfitted = scores is not None and _overfitted(orbax, scores)
                _save(orbax, state, scores)
                if overfitted and _alarm(settings, epoch):
                    return
                window = Window(step)
            if preempted:
                orbax.wait_until_finished()
                raise PreemptedError(f"saved step {step} of {total}")


@contextlib.contextmanager
def _naming_the_batch(settings, mesh):
    """An out-of-memory error that says how many images a device had to hold."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        size, count = settings.batch_size, mesh.size
        raise MemoryError(
            f"batch_size={size} is {size // count} images on each of {count} devices; raise microbatches, lower "
            f"batch_size, use more devices, or model.dtype='bfloat16' ({' '.join(str(error).split())[:200]})"
        ) from None


def _next_multiple(step, interval):
    return (step // interval + 1) * interval


def _validate_now(settings, epoch):
    last = epoch == settings.epochs
    dense = settings.validate.dense_from is not None and epoch >= settings.validate.dense_from
    return last or dense or epoch % settings.validate.every == 0


def _selection_split(experiment):
    return experiment.data.val if experiment.config.select_on == "val" else experiment.data.test


def _validator(experiment):
    """The scorer of the attack that selects checkpoints, with its eps and step size."""
    section = config.complete(experiment.config.copy_and_resolve_references()).validate.attack
    options = config.arguments("attacks", section, "validate.attack")
    eps, step_size = options.pop("eps"), options.pop("step_size")
    attack = functools.partial(config.factory("attacks", section.name), **options)
    predict, size = experiment.bind_net(None).predict, experiment.config.validate.batch_size
    scorer = Scorer(lambda variables, x, keys: predict(variables, x), attack, experiment.mesh, size, section.norm)
    return scorer, {"eps": eps, "step_size": eps if step_size is None else step_size}


def _validate(experiment, validator, state):
    """{"clean_acc", "robust_acc", "selection"} in percent on the split that selects."""
    (scorer, size), split = validator, _selection_split(experiment)
    flags, _ = scorer(checkpoints.split(state)[0], split, experiment.config.seed, **size)
    clean, robust = (100 * float(np.mean(part)) for part in (flags.clean, flags.robust))
    return {"clean_acc": clean, "robust_acc": robust, "selection": robust}


def _overfitted(orbax, scores):
    """Whether robust accuracy has fallen catastrophically from the best checkpoint's."""
    best = checkpoints.best_step(orbax)
    if best is None or "robust_acc" not in scores:
        return False
    return checkpoints.metrics(orbax, best)["robust_acc"] - scores["robust_acc"] > _CATASTROPHE


def _alarm(settings, epoch):
    """Tells of catastrophic overfitting; returns whether to stop."""
    stop = settings.validate.stop_on_overfitting
    log.warning(
        "%s: epoch %d: robust accuracy fell by more than %g points: catastrophic overfitting; the best checkpoint is "
        "kept; %s",
        _name(settings),
        epoch,
        _CATASTROPHE,
        "stopping" if stop else "validate.stop_on_overfitting=True would stop here",
    )
    return stop


def _divergence(values, first, orbax):
    """Which metric was not finite first, where, and what to do; None when all is well."""
    broken = {
        name: int(np.argmin(np.isfinite(value))) for name, value in values.items() if not np.isfinite(value).all()
    }
    if not broken:
        return None
    name = min(broken, key=lambda name: (broken[name], name != "loss"))
    norms = values["grad_norm"][: broken[name]][-2:].tolist()
    good = checkpoints.latest_step(orbax)
    return (
        f"{name} became NaN or Inf in the batch of step {first + broken[name] + 1} (gradient norms before: {norms}); "
        f"the last good checkpoint is {'none' if good is None else f'step {good}'}; lower optimizer.lr"
    )


def _save(orbax, state, scores):
    try:
        checkpoints.save(orbax, state, scores)
    except CheckpointError as error:
        if "NaN" in str(error):
            raise DivergedError(str(error)) from None
        raise


def _progress(settings, total, step):
    """A bar with the time left, on a terminal."""
    visible = sys.stderr.isatty() and jax.process_index() == 0
    return tqdm(total=total, initial=step, desc=_name(settings), unit="step", disable=not visible, mininterval=0.5)


def _tell(settings, epoch, scores, seconds_left):
    """One line for each validation, where there is no terminal to draw a bar on."""
    if not sys.stderr.isatty() and jax.process_index() == 0:
        log.info(
            "%s: epoch %d of %d, validation clean %.2f %%, robust %.2f %%, %.0f s left",
            _name(settings),
            epoch,
            settings.epochs,
            scores["clean_acc"],
            scores["robust_acc"],
            seconds_left,
        )


def _name(settings):
    return settings.title or settings.objective.name
