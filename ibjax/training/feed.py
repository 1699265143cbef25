"""How training images reach the step: they stay in device memory, or are streamed to it one batch ahead.

Generated images (`ibjax.data.extra`) follow the original ones in the same array, or are read from their file while the
original ones stay in device memory.

Guarantees (all tested): the data order is a function of (seed, epoch, step); nothing is transferred from
the host inside an epoch, where the data lie in device memory; the step compiles once.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding

from ibjax.data import extra, stream, streamed
from ibjax.devices import cluster
from ibjax.errors import InputError
from ibjax.step import TrainState
from ibjax.training.experiment import Experiment, state_sharding


class Feed(NamedTuple):
    """The compiled steps of a run, together with their data."""

    capacity: int  # maximum number of steps in one dispatch
    dispatch: Callable[[TrainState, int], tuple[TrainState, dict[str, Array]]]  # (state, steps) -> (state, metrics)
    # state -> the state to go on with, its `ema_stats` recomputed; None where nothing is recomputed
    recompute: Callable[[TrainState], TrainState] | None = None


def feed(experiment: Experiment, key: Array, step: int, made: Callable | None = None) -> Feed:
    """The compiled steps from `step` on, with their data.

    `key` is the run's key for training, `made` the function of `make_step`, if it exists.
    """
    streams = streamed(experiment.data.train)
    run = _streaming if streams else _reading if reads_extra(experiment) else _resident
    data = () if streams else tuple(cluster.replicate(array, experiment.mesh) for array in resident_data(experiment))
    begin = run(experiment, made or make_step(experiment), key, data)
    if experiment.statistics_step is None:
        return Feed(_capacity(experiment), begin(step))
    return Feed(_capacity(experiment), begin(step), _recomputing(experiment, run, key, data))


def make_step(experiment: Experiment) -> Any:
    """The jitted steps of a dispatch, a function of what `arguments` says."""
    if streamed(experiment.data.train):
        return make_batch_dispatch(experiment)
    if reads_extra(experiment):
        return make_reading_dispatch(experiment)
    return make_dispatch(experiment, _capacity(experiment))


def _capacity(experiment):
    """The number of steps of a dispatch at most."""
    settings = experiment.config
    if streamed(experiment.data.train) or reads_extra(experiment):
        if (settings.steps_per_dispatch or 1) != 1:
            what = "streamed data" if streamed(experiment.data.train) else "generated images that are read"
            raise InputError(f"steps_per_dispatch={settings.steps_per_dispatch}: {what} take 1 step at a time")
        return 1
    default = 1 if jax.default_backend() == "cpu" else settings.log_every
    return min(settings.steps_per_dispatch or default, experiment.steps_per_epoch)


def _recomputing(experiment, run, key, data):
    """The function `recompute` of a Feed: the passes of the last batches, at the averaged parameters."""

    def statistics_step(*arguments):
        return experiment.statistics_step(*arguments), {}

    settings = experiment.config.copy_and_resolve_references()
    settings.steps_per_dispatch = 1
    passing = experiment._replace(config=settings, train_step=statistics_step)
    begin = run(passing, make_step(passing), key, data)

    @functools.partial(jax.jit, out_shardings=state_sharding(experiment))
    def start(state, count):
        statistics = jax.tree.map(jnp.copy, state.variables["batch_stats"])  # both are donated to the first step
        return state._replace(step=state.step - count, ema_stats=statistics)

    def recompute(state):
        step = int(state.step)
        count = min(settings.averaging.batches, experiment.steps_per_epoch, step)
        dispatch, state = begin(step - count), start(state, np.int32(count))
        for _ in range(count):
            state, _ = dispatch(state, 1)
        return state

    return recompute


def with_raw_statistics(state: TrainState) -> TrainState:
    """The state whose `ema_stats` are the network's own statistics."""
    return state._replace(ema_stats=jax.tree.map(jnp.copy, state.variables["batch_stats"]))


def reads_extra(experiment: Experiment) -> bool:
    """Whether generated images are read from their file while training."""
    return experiment.data.extra is not None and not experiment.data.extra.resident


def resident_data(experiment: Experiment) -> tuple[Any, Any]:
    """(images, labels) that stay in device memory: images as `rows_of`, labels as class numbers or distributions."""
    data = experiment.data
    images, labels = data.train
    if data.extra is not None:
        if data.extra.labels.ndim == 2:
            labels = np.eye(data.num_classes, dtype=np.float32)[labels]
        if data.extra.resident:
            images, labels = np.concatenate([images, data.extra.images]), np.concatenate([labels, data.extra.labels])
    return rows_of(images), labels


def arguments(experiment: Experiment, state: Any, key: Any) -> tuple:
    """The shapes that the function of `make_step` is called with; those of state and key are given."""
    data, size, mesh = experiment.data, experiment.config.batch_size, experiment.mesh
    images, frozen = data.train.images, cluster.shapes(experiment.frozen, mesh)
    distributions = data.extra is not None and data.extra.labels.ndim == 2
    kind, classes = (jnp.float32, (data.num_classes,)) if distributions else (jnp.int32, ())

    def shaped(count, shape, spec):
        """Shapes of so many images and labels."""
        made = jax.ShapeDtypeStruct((count, *shape), images.dtype), jax.ShapeDtypeStruct((count, *classes), kind)
        return cluster.shapes(made, mesh, spec)

    batch = dict(zip(("image", "label"), shaped(size, images.shape[1:], cluster.BATCH), strict=True))
    if streamed(data.train):
        return state, {**batch, "index": batch["label"]}, key, frozen
    count = len(images) + (0 if data.extra is None or reads_extra(experiment) else len(data.extra.labels))
    held = shaped(count, (math.prod(images.shape[1:]),), cluster.REPLICATED)  # see rows_of
    if reads_extra(experiment):
        return state, *held, batch, key, frozen
    return state, *held, key, frozen, cluster.shapes(jax.ShapeDtypeStruct((), jnp.int32), mesh)


def _nothing_transferred():
    """A context in which transfers from the host are errors, except under JAX_DISABLE_JIT, which needs them."""
    eager = jax.config.jax_disable_jit  # pyright: ignore[reportAttributeAccessIssue]
    return jax.transfer_guard("allow" if eager else "disallow")


def _step(experiment, state, batch, key, frozen):
    """(state, metrics) after one step, the learning rate among the metrics."""
    state, metrics = experiment.train_step(state, batch, key, frozen)
    return state, {**metrics, "lr": experiment.learning_rate(state.step - 1)}


def _in_a_row(made):
    """(state, metrics) of one step, as those of a dispatch of one."""
    state, metrics = made
    return state, jax.tree.map(lambda value: value[None], metrics)


# ---- in device memory --------------------------------------------------------------------------------------


def _resident(experiment, dispatch, key, data):
    """A function from the number of the first step to the `dispatch` of a Feed; `dispatch` is that of `make_step`."""
    lengths = {n: cluster.replicate(np.int32(n), experiment.mesh) for n in range(1, _capacity(experiment) + 1)}

    def run(state, steps):
        with _nothing_transferred():
            return dispatch(state, *data, key, experiment.frozen, lengths[steps])

    return lambda step: run


def rows_of(images: Any) -> Any:
    """Images (N, H, W, C) as rows (N, H·W·C), as which they lie in device memory.

    As maps, a TPU's compiler copies all of them in each dispatch into a layout that pads a row of 32 pixels to 128: for
    50,000 images 614 MB, and 5.1 ms on a v5e, as it estimates.
    """
    return images.reshape(len(images), -1)


def make_dispatch(experiment: Experiment, capacity: int) -> Callable:
    """The jitted `(state, images, labels, key, frozen, n) -> (state, metrics)`: n <= capacity steps.

    `images` are the `rows_of` all training images, or these themselves.

    `metrics` are arrays (capacity,) whose first n entries are valid. The loop's length is an argument, so that one
    program serves every n. On a CPU the capacity is 1 and there is no loop, since XLA runs the body of a loop on fewer
    threads there. The order of an epoch is a permutation drawn from (key, epoch); an incomplete last batch is left out.
    """
    batch_size, per_epoch = experiment.config.batch_size, experiment.steps_per_epoch
    sharded, replicated = (NamedSharding(experiment.mesh, spec) for spec in (cluster.BATCH, cluster.REPLICATED))
    stored = state_sharding(experiment)
    step = jax.jit(functools.partial(_step, experiment), inline=True)  # traced once: for its shapes, and in the loop

    def dispatch(state, images, labels, key, frozen, n):
        order_key, step_key = jax.random.split(key)
        if experiment.shares is None:
            epoch = state.step // per_epoch  # the loop never dispatches across the end of an epoch
            order = jax.random.permutation(jax.random.fold_in(order_key, epoch), len(labels))

        def chosen(step):
            if experiment.shares is not None:
                return experiment.shares.index(extra.key_data(order_key), step)
            return lax.dynamic_slice(order, (step % per_epoch * batch_size,), (batch_size,))

        def one(state):
            # otherwise the compiler may shard a weight between two steps and gather it in every step of the attack
            state = lax.with_sharding_constraint(state, stored)
            index = lax.with_sharding_constraint(chosen(state.step), sharded)
            chosen_images = images[index].reshape(batch_size, *experiment.data.train.images.shape[1:])
            batch = {"image": chosen_images, "label": labels[index], "index": index}
            batch = jax.tree.map(lambda leaf: lax.with_sharding_constraint(leaf, sharded), batch)
            return step(state, batch, step_key, frozen)

        if capacity == 1:
            return _in_a_row(one(state))

        def body(i, carry):
            state, rows = carry
            state, metrics = one(state)
            return state, jax.tree.map(lambda row, value: row.at[i].set(value), rows, metrics)

        shapes = jax.eval_shape(one, state)[1]
        rows = jax.tree.map(lambda s: jnp.zeros((capacity, *s.shape), s.dtype), shapes)
        return lax.fori_loop(0, n, body, (state, rows))

    return jax.jit(dispatch, donate_argnums=0, out_shardings=(stored, replicated))


# ---- streamed ----------------------------------------------------------------------------------------------


def _streaming(experiment, dispatch, key, data):
    """As `_resident`; `data` is empty."""
    rows, placed = _placing(experiment)
    options = dict(batch_size=experiment.config.batch_size, seed=experiment.config.seed, rows=rows)

    def begin(step):
        source = stream.batches(experiment.data.train, step=step, **options)
        return _one_ahead(lambda state, batch: dispatch(state, batch, key, experiment.frozen), source, placed)

    return begin


def _one_ahead(dispatch, source, placed):
    """The `dispatch` of a Feed that takes one batch of `source` after the other, of which one is read ahead."""
    ahead = [placed(next(source))]

    def run(state, steps):
        batch = ahead.pop()
        with _nothing_transferred():
            result = dispatch(state, batch)
        ahead.append(placed(next(source)))  # while the devices compute
        return result

    return run


def _placing(experiment):
    """(the places of a batch that are on this process's devices, a function that puts their values there)."""
    rows, place = cluster.parts_of_batch(experiment.mesh, experiment.config.batch_size)
    return rows, lambda batch: {name: place(value) for name, value in batch.items()}


def make_batch_dispatch(experiment: Experiment) -> Callable:
    """The jitted `(state, batch, key, frozen) -> (state, metrics)`: one step on a given batch."""

    def dispatch(state, batch, key, frozen):
        _, step_key = jax.random.split(key)
        return _in_a_row(_step(experiment, state, batch, step_key, frozen))

    placed = (state_sharding(experiment), NamedSharding(experiment.mesh, cluster.REPLICATED))
    return jax.jit(dispatch, donate_argnums=0, out_shardings=placed)


# ---- generated images that are read --------------------------------------------------------------------------


def _reading(experiment, dispatch, key, data):
    """As `_resident`."""
    rows, placed = _placing(experiment)
    words = np.asarray(jax.random.key_data(jax.random.split(key)[0]).addressable_data(0))  # of the order, on the host

    def begin(step):
        source = extra.batches(experiment.data.extra, experiment.shares, words, step, rows)
        return _one_ahead(lambda state, read: dispatch(state, *data, read, key, experiment.frozen), source, placed)

    return begin


def make_reading_dispatch(experiment: Experiment) -> Callable:
    """The jitted `(state, images, labels, read, key, frozen) -> (state, metrics)`: one step.

    `read` has "image" and "label" of the generated places of the batch; those of the others are taken from `images`
    and `labels`, and are the same as if all were in device memory.
    """
    sharded, replicated = (NamedSharding(experiment.mesh, spec) for spec in (cluster.BATCH, cluster.REPLICATED))
    shares = experiment.shares
    assert shares is not None

    def dispatch(state, images, labels, read, key, frozen):
        order_key, step_key = jax.random.split(key)
        index = lax.with_sharding_constraint(shares.index(extra.key_data(order_key), state.step), sharded)

        def merged(resident, values):
            generated = shares.generated.reshape(-1, *(1,) * (values.ndim - 1))
            return jnp.where(generated, values, resident[jnp.minimum(index, shares.n_original - 1)])

        maps = images.reshape(-1, *read["image"].shape[1:])
        batch = {"image": merged(maps, read["image"]), "label": merged(labels, read["label"]), "index": index}
        batch = jax.tree.map(lambda leaf: lax.with_sharding_constraint(leaf, sharded), batch)
        return _in_a_row(_step(experiment, state, batch, step_key, frozen))

    return jax.jit(dispatch, donate_argnums=0, out_shardings=(state_sharding(experiment), replicated))
