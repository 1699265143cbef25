"""How training images reach the step: they stay in device memory, or are streamed to it one batch ahead.

Guarantees (tests of the same names): the data order is a function of (seed, epoch, step); nothing is transferred from
the host inside an epoch, where the data lie in device memory; the step compiles once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding

from ibjax.data import stream, streamed
from ibjax.devices import cluster
from ibjax.errors import InputError
from ibjax.step import TrainState
from ibjax.training.experiment import Experiment


class Feed(NamedTuple):
    """The compiled steps of a run, together with their data."""

    capacity: int  # maximum number of steps in one dispatch
    dispatch: Callable[[TrainState, int], tuple[TrainState, dict[str, Array]]]  # (state, steps) -> (state, metrics)


def feed(experiment: Experiment, key: Array, step: int) -> Feed:
    """The compiled steps from `step` on, with their data; `key` is the run's key for training."""
    return (_streaming if streamed(experiment.data.train) else _resident)(experiment, key, step)


def trace(experiment: Experiment, state: Any, key: Any) -> None:
    """Traces one step on shapes; raises whatever error the tracing meets."""
    images, labels = experiment.data.train
    n = jax.ShapeDtypeStruct((), jnp.int32)
    if streamed(experiment.data.train):
        size = experiment.config.batch_size
        batch = {"image": jax.ShapeDtypeStruct((size, *images.shape[1:]), images.dtype)}
        batch |= dict.fromkeys(("label", "index"), jax.ShapeDtypeStruct((size,), jnp.int32))
        jax.eval_shape(make_batch_dispatch(experiment), state, batch, key, experiment.frozen)
        return
    shapes = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (rows_of(images), labels))
    jax.eval_shape(make_dispatch(experiment, capacity=1), state, *shapes, key, experiment.frozen, n)


def _nothing_transferred():
    """A context in which transfers from the host are errors, except under JAX_DISABLE_JIT, which needs them."""
    eager = jax.config.jax_disable_jit  # pyright: ignore[reportAttributeAccessIssue]
    return jax.transfer_guard("allow" if eager else "disallow")


# ---- in device memory --------------------------------------------------------------------------------------


def _resident(experiment, key, step):
    settings, mesh = experiment.config, experiment.mesh
    default = 1 if jax.default_backend() == "cpu" else settings.log_every
    capacity = min(settings.steps_per_dispatch or default, experiment.steps_per_epoch)
    dispatch = make_dispatch(experiment, capacity)
    images, labels = experiment.data.train
    data = [cluster.replicate(array, mesh) for array in (rows_of(images), labels)]
    lengths = {n: cluster.replicate(np.int32(n), mesh) for n in range(1, capacity + 1)}

    def run(state, steps):
        with _nothing_transferred():
            return dispatch(state, *data, key, experiment.frozen, lengths[steps])

    return Feed(capacity, run)


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

    def dispatch(state, images, labels, key, frozen, n):
        order_key, step_key = jax.random.split(key)
        epoch = state.step // per_epoch  # the loop never dispatches across the end of an epoch
        order = jax.random.permutation(jax.random.fold_in(order_key, epoch), len(labels))

        def one(state):
            # otherwise the compiler may shard a weight between two steps and gather it in every step of the attack
            state = lax.with_sharding_constraint(state, replicated)
            index = lax.dynamic_slice(order, (state.step % per_epoch * batch_size,), (batch_size,))
            index = lax.with_sharding_constraint(index, sharded)
            chosen = images[index].reshape(batch_size, *experiment.data.train.images.shape[1:])
            batch = {"image": chosen, "label": labels[index], "index": index}
            batch = jax.tree.map(lambda leaf: lax.with_sharding_constraint(leaf, sharded), batch)
            state, metrics = experiment.train_step(state, batch, step_key, frozen)
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

    return jax.jit(dispatch, donate_argnums=0, out_shardings=replicated)


# ---- streamed ----------------------------------------------------------------------------------------------


def _streaming(experiment, key, step):
    settings, mesh = experiment.config, experiment.mesh
    if (settings.steps_per_dispatch or 1) != 1:
        raise InputError(f"steps_per_dispatch={settings.steps_per_dispatch}: streamed data take 1 step at a time")
    dispatch = make_batch_dispatch(experiment)
    sharding, size = NamedSharding(mesh, cluster.BATCH), settings.batch_size
    held = sharding.addressable_devices_indices_map((size,)).values()  # batch positions on this process's devices
    rows = np.unique(np.concatenate([np.arange(size)[index] for index in held]))
    source = stream.batches(experiment.data.train, batch_size=size, seed=settings.seed, step=step, rows=rows)

    def placed(batch):
        return {
            name: jax.make_array_from_process_local_data(sharding, value, (size, *value.shape[1:]))
            for name, value in batch.items()
        }

    ahead = [placed(next(source))]

    def run(state, steps):
        batch = ahead.pop()
        with _nothing_transferred():
            result = dispatch(state, batch, key, experiment.frozen)
        ahead.append(placed(next(source)))  # while the devices compute
        return result

    return Feed(1, run)


def make_batch_dispatch(experiment: Experiment) -> Callable:
    """The jitted `(state, batch, key, frozen) -> (state, metrics)`: one step on a given batch."""

    def dispatch(state, batch, key, frozen):
        _, step_key = jax.random.split(key)
        state, metrics = experiment.train_step(state, batch, step_key, frozen)
        metrics = {**metrics, "lr": experiment.learning_rate(state.step - 1)}
        return state, jax.tree.map(lambda value: value[None], metrics)

    replicated = NamedSharding(experiment.mesh, cluster.REPLICATED)
    return jax.jit(dispatch, donate_argnums=0, out_shardings=replicated)
