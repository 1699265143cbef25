"""Training: everything built from a configuration, one compiled dispatch, the loop around it.

Guarantees (tests of the same names): the data order is a function of (seed, epoch, step); a killed run continues to
the bit; nothing is transferred from the host inside an epoch; the step compiles once.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding
from ml_collections import ConfigDict
from tqdm import tqdm

from ibjax import checkpoint as checkpoints
from ibjax import cluster, config, optim, run
from ibjax.data import Arrays, augment
from ibjax.errors import CheckpointError, DivergedError, InputError, PreemptedError
from ibjax.evaluate import Scorer
from ibjax.metrics import MetricsLog, Window
from ibjax.step import Net, Objective, TrainState, Variables, init_state, linen_net, make_train_step

log = logging.getLogger(__name__)


class Experiment(NamedTuple):
    """What a configuration means, built and checked; nothing has been written or compiled."""

    config: ConfigDict
    data: Arrays
    model: nn.Module
    bind_net: Callable[[Variables | None], Net]
    objective: Objective
    optimizer: optax.GradientTransformation
    learning_rate: Callable
    train_step: Callable
    teacher_variables: Variables | None
    steps_per_epoch: int
    mesh: Any


def check(settings: ConfigDict) -> Arrays:
    """Raises InputError on whatever is wrong with a configuration, its data or its teacher; returns the data.

    Nothing is saved, trained or computed. A teacher that has yet to be made from its recipe is not looked for.
    """
    config.check(settings)
    cluster.check_divides(settings.batch_size, "batch_size")
    data = run.load_data(settings)
    if settings.select_on == "val" and data.val is None:
        raise InputError("data.val_size=0 leaves nothing to select on; hold some out, or set select_on='test'")
    if settings.batch_size > len(data.train.labels):
        raise InputError(f"batch_size={settings.batch_size} exceeds the {len(data.train.labels)} training images")
    model = run.build_model(settings.model, data.num_classes, "model")
    run.abstract_variables(model, data.train.images.shape[1:], cluster.mesh())  # refuses impossible shapes and depths
    augment.crop_and_flip(**settings.augment)
    _attacks(settings)
    _optimizer(settings, steps_per_epoch=1)
    if config.build("objectives", settings.objective, "objective").needs_teacher and settings.teacher.recipe is None:
        _check_teacher(settings, data)
    return data


def build(settings: ConfigDict) -> Experiment:
    """Builds all parts of a checked experiment, the teacher's weights included."""
    data = check(settings)
    steps_per_epoch = len(data.train.labels) // settings.batch_size
    model = run.build_model(settings.model, data.num_classes, "model")
    objective = config.build("objectives", settings.objective, "objective")
    teacher, teacher_variables = None, None
    if objective.needs_teacher:
        _check_teacher(settings, data)
        teacher, teacher_variables, *_ = run.load(settings.teacher.workdir, settings.teacher.checkpoint)
    optimizer, learning_rate = _optimizer(settings, steps_per_epoch)

    def bind_net(variables):
        return linen_net(model, teacher, variables)

    crop_and_flip = augment.crop_and_flip(**settings.augment)
    attacks = _attacks(settings)
    train_step = make_train_step(bind_net, objective, optimizer, *attacks, crop_and_flip, settings.ema_decay)
    return Experiment(
        settings,
        data,
        model,
        bind_net,
        objective,
        optimizer,
        learning_rate,
        train_step,
        teacher_variables,
        steps_per_epoch,
        cluster.mesh(),
    )


def _check_teacher(settings, data):
    folder = settings.teacher.workdir
    if not folder:
        raise InputError(
            f"objective '{settings.objective.name}' needs a teacher; set teacher.workdir to the workdir of a trained "
            f"run, or teacher.recipe to a configuration that makes one"
        )
    if not run.has_checkpoint(Path(folder)):
        command = settings.teacher.made_by or f"python -m ibjax.main --config=… --workdir={folder}"
        raise InputError(f"teacher.workdir={folder} holds no trained run; train the teacher first: {command}")
    taught = run.read_config(Path(folder))[1]
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
        head = optim.optimizer(lr=schedule(settings.head_optimizer.lr), **options)
    return optim.with_head(optim.optimizer(lr=learning_rate, **options), head), learning_rate


def _attacks(settings):
    """(attack in evaluation mode, attack in training mode): at most one of them is there."""
    if settings.attack is None:
        return None, None
    if settings.attack_bn == "eval":
        return config.build("attacks", settings.attack, "attack"), None
    if settings.attack.name != "pgd":
        raise InputError("attack_bn='train' goes with attack.name='pgd' only")
    from ibjax.attacks.pgd import stateful_pgd

    options = config.arguments("attacks", settings.attack, "attack")
    if options.pop("restarts", 1) != 1:
        raise InputError("attack_bn='train' goes with attack.restarts=1 only")
    return None, stateful_pgd(**options)


# ---- the compiled part -------------------------------------------------------------------------------------


def make_dispatch(experiment: Experiment, capacity: int) -> Callable:
    """The jitted `(state, images, labels, key, teacher_variables, n) -> (state, metrics)`: n <= capacity steps.

    `metrics` are arrays (capacity,), of which the first n count. The loop's length is an argument, so that one program
    serves every n; on CPU the capacity is 1 and there is no loop, whose body XLA would run on fewer threads.
    The order of an epoch is a permutation drawn from (key, epoch); a last incomplete batch is left out.
    """
    batch_size, per_epoch = experiment.config.batch_size, experiment.steps_per_epoch
    sharded = NamedSharding(experiment.mesh, cluster.BATCH)

    def dispatch(state, images, labels, key, teacher_variables, n):
        order_key, step_key = jax.random.split(key)
        epoch = state.step // per_epoch  # the loop never dispatches across the end of an epoch
        order = jax.random.permutation(jax.random.fold_in(order_key, epoch), len(labels))

        def one(state):
            index = lax.dynamic_slice(order, (state.step % per_epoch * batch_size,), (batch_size,))
            index = lax.with_sharding_constraint(index, sharded)
            batch = {"image": images[index], "label": labels[index], "index": index}
            batch = jax.tree.map(lambda leaf: lax.with_sharding_constraint(leaf, sharded), batch)
            state, metrics = experiment.train_step(state, batch, step_key, teacher_variables)
            return state, {**metrics, "lr": experiment.learning_rate(state.step - 1)}

        if capacity == 1:
            state, metrics = one(state)
            return state, jax.tree.map(lambda value: value[None], metrics)

        def body(i, carry):
            state, rows = carry
            state, metrics = one(state)
            return state, jax.tree.map(lambda row, value: row.at[i].set(value), rows, metrics)

        shapes = jax.eval_shape(one, state)[1]
        rows = jax.tree.map(lambda s: jnp.zeros((capacity, *s.shape), s.dtype), shapes)
        return lax.fori_loop(0, n, body, (state, rows))

    replicated = NamedSharding(experiment.mesh, cluster.REPLICATED)
    return jax.jit(dispatch, donate_argnums=0, out_shardings=replicated)


def initial_state(experiment: Experiment) -> TrainState:
    """The state before the first step, on all devices, from the configuration's seed."""
    model_key = _key(experiment.config.seed, 0, experiment.mesh)
    x = jnp.zeros((1, *experiment.data.train.images.shape[1:]), jnp.float32)

    def init(key, teacher_variables):
        net = experiment.bind_net(teacher_variables)
        ema = experiment.config.ema_decay is not None
        head, optimizer = experiment.objective.head, experiment.optimizer
        return init_state(key, net, experiment.model, head, optimizer, x, ema)

    replicated = NamedSharding(experiment.mesh, cluster.REPLICATED)
    return jax.jit(init, out_shardings=replicated)(model_key, experiment.teacher_variables)


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
    run.write_config(workdir, settings, facts(experiment.data))
    with checkpoints.manager(workdir) as orbax:
        state = initial_state(experiment)
        state = checkpoints.restore_latest(orbax, state) or state
        step = int(state.step)
        if step >= total:
            log.info("%s: already trained, %d steps", workdir, step)
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
    capacity = min(settings.steps_per_dispatch or _default_capacity(settings), per_epoch)
    dispatch, validate = make_dispatch(experiment, capacity), _validator(experiment)
    train_data = experiment.data.train
    arguments = [cluster.replicate(array, mesh) for array in (train_data.images, train_data.labels)]
    arguments += [_key(settings.seed, 1, mesh), experiment.teacher_variables]
    lengths = {n: cluster.replicate(np.int32(n), mesh) for n in range(1, capacity + 1)}
    window, first, began = Window(step), step, time.perf_counter()

    with _progress(settings, total, step) as bar:
        while step < total:
            stop = min(step + capacity, _next_multiple(step, settings.log_every), _next_multiple(step, per_epoch))
            with jax.transfer_guard("disallow"):
                state, metrics = dispatch(state, *arguments, lengths[stop - step])
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
                scores = validate(state) if validated else None
                if scores:
                    write("val", step, epoch=step / per_epoch, **scores)
                    _tell(settings, epoch, scores, (time.perf_counter() - began) / (step - first) * (total - step))
                _save(orbax, state, scores)
                window = Window(step)
            if preempted:
                orbax.wait_until_finished()
                raise PreemptedError(f"saved step {step} of {total}")


def _default_capacity(settings):
    return 1 if jax.default_backend() == "cpu" else settings.log_every


def _next_multiple(step, interval):
    return (step // interval + 1) * interval


def _validate_now(settings, epoch):
    last = epoch == settings.epochs
    dense = settings.validate.dense_from is not None and epoch >= settings.validate.dense_from
    return last or dense or epoch % settings.validate.every == 0


def _validator(experiment):
    """state -> {"clean_acc", "robust_acc", "selection"} in percent on the split that selects."""
    settings = experiment.config
    options = dict(settings.validate.attack)
    attack = config.build("attacks", options, "validate.attack")
    split = experiment.data.val if settings.select_on == "val" else experiment.data.test
    predict = experiment.bind_net(None).predict
    norm = options.get("norm", "linf")
    scorer = Scorer(predict, lambda **_: attack, experiment.mesh, settings.validate.batch_size, norm)
    eps = options.get("eps", 0.0)

    def validate(state):
        variables = checkpoints.split(state)[0]
        flags = scorer(variables, split, settings.seed, eps=eps, step_size=eps)
        robust = 100 * float(np.mean(flags.robust))
        return {"clean_acc": 100 * float(np.mean(flags.clean)), "robust_acc": robust, "selection": robust}

    return validate


def _divergence(values, first, orbax):
    """What is not finite, where, and what to do; None when all is well."""
    for name, value in values.items():
        if not np.all(np.isfinite(value)):
            step = first + int(np.argmin(np.isfinite(value))) + 1
            norms = values["grad_norm"][: step - first][-2:].tolist()
            good = checkpoints.latest_step(orbax)
            return (
                f"{name} became NaN or Inf at step {step} (last gradient norms: {norms}); "
                f"the last good checkpoint is {'none' if good is None else f'step {good}'}; lower optimizer.lr"
            )
    return None


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


def facts(data: Arrays) -> dict[str, Any]:
    """What config.json says of the data."""
    sizes = {f"n_{name}": len(split.labels) for name in ("train", "val", "test") if (split := getattr(data, name))}
    return {
        "label": data.label,
        "input_shape": list(data.train.images.shape[1:]),
        "num_classes": data.num_classes,
        **sizes,
    }
