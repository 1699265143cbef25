"""Runs the steps of an attack over many images on all devices, driven from the host.

The work is a list of items: one for each image and each restart and target, in the order of the targets. A batch takes
the next items whose image is not broken yet, for whichever target, so that the devices stay busy while few images are
left. If several items break an image, the first item's result is kept. Batches are padded to one of a few sizes. If an
attack reports that images are done (Square), the batch is compacted to a smaller size between its steps.

The random key of an item is derived from the attack's name, the image's index and the number of its pass (restart and
target), so batch size, number of devices and interruptions between batches do not change the random draws.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding

from ibjax import losses
from ibjax.attacks import geometry
from ibjax.attacks.hoist import hoisted, prepared, unjitted
from ibjax.attacks.iterative import UNTARGETED, Iterative
from ibjax.devices import cluster, cores

TOLERANCE = 1e-6  # how far x_adv may lie outside ball and box by float32 rounding
_STEPS_PER_CALL = 50
_COMPILING = 500  # a batch shrinks only if that saves the time of this many steps, as compiling takes time too


class Items(NamedTuple):
    """The items of a batch, each (B,) int32."""

    image: Any  # its index
    number: Any  # of the pass
    restart: Any  # number of the restart within the target
    other: Any  # target class, or UNTARGETED
    y: Any  # label


class Programs(NamedTuple):
    """The compiled programs at one batch size of all attacks with the same functions."""

    init: Callable
    steps: Callable
    finish: Callable
    done: Callable


class Found(NamedTuple):
    """The results of a batch."""

    x_adv: np.ndarray
    broken: np.ndarray
    flat: np.ndarray  # whether the gradient was zero or not finite at the start


class Runner:
    """A network, its images (N, H, W, C) float32 and labels (N,), and the devices; compiles each program once.

    With `randomized`, `logits_fn` takes `(x, keys)`.
    """

    def __init__(
        self,
        key: Array,
        logits_fn: Callable,
        x: np.ndarray,
        y: np.ndarray,
        *,
        norm: str,
        eps: float,
        batch_size: int,
        randomized: bool = False,
    ):
        self.logits_fn = cores.in_parts(unjitted(logits_fn))
        self.x, self.y, self.norm, self.eps, self.randomized = x, y, norm, eps, randomized
        self.batch_size = batch_size
        self.key, self.key_kind = np.asarray(jax.random.key_data(key)), jax.random.key_impl(key)
        mesh = cluster.mesh()
        self.mesh, self.sharded = mesh, NamedSharding(mesh, cluster.BATCH)
        self.replicated = NamedSharding(mesh, cluster.REPLICATED)
        take = lambda tree, rows: jax.tree.map(lambda leaf: leaf[rows], tree)  # noqa: E731
        self.take = jax.jit(take, out_shardings=self.sharded)
        largest = cluster.rounded_up(min(batch_size, _power_of_two(len(x))), mesh.size)
        shares = ((largest * eighths // 8) >> i for i in range(6) for eighths in (8, 7, 6, 5))
        self.sizes = sorted({cluster.rounded_up(max(share, 1), mesh.size) for share in shares})
        self.programs: dict[tuple, Programs] = {}  # (functions of the attack, size) -> its programs
        self.constants: dict[int, tuple[Any, Array]] = {}  # id -> (array that logits_fn closes over, its replica)
        self.flat = 0  # number of items so far whose gradient was zero or not finite at the start

    def logits(self, *seen: np.ndarray) -> list[np.ndarray]:
        """The logits of all images, (N, classes) float32, for each array (N, H, W, C) of them, such as `self.x`."""
        size = self.sizes[-1]

        def answer(key, image, x):
            return self.logits_fn(x, *self._keys(key, _number("clean"), image, 0 * image))

        program = self._on_each_device(answer, "css", gathered=True)

        def of(x):
            for first in range(0, len(x), size):
                chosen = np.minimum(np.arange(first, first + size, dtype=np.int32), len(x) - 1)
                yield np.asarray(program(self.key, *self._place(chosen, x[chosen])))[: len(x) - first]

        return [np.concatenate(list(of(x))).astype(np.float32) for x in seen]

    def draws(self, name: str, x: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
        """Whether a random network classifies the images `rows` of x (N, H, W, C) correctly, (count, len(rows)) bool.

        Each image has `count` draws of its own; a draw depends on `name`, the image's index and the draw's number.
        """
        answers, size = np.zeros((count, len(rows)), bool), self.sizes[-1]

        def answer(key, x, image, number, y):
            return losses.correct(self.logits_fn(x, *self._keys(key, _number(name), image, number)), y)

        program = self._on_each_device(answer, "cssss", gathered=True)
        for first in range(0, len(rows), size):
            chosen = rows[np.minimum(np.arange(first, first + size), len(rows) - 1)].astype(np.int32)
            shown, image, y = self._place(x[chosen], chosen, self.y[chosen].astype(np.int32))
            for draw in range(count):
                (number,) = self._place(np.full(size, draw, np.int32))
                found = np.asarray(program(self.key, shown, image, number, y))
                answers[draw, first : first + size] = found[: len(rows) - first]
        return answers

    def run(
        self,
        name: str,
        attack: Iterative,
        todo: np.ndarray,
        others: np.ndarray,
        broken: np.ndarray,
        x_adv: np.ndarray,
        position: int = 0,
    ) -> Iterator[int]:
        """Attacks the images `todo`; after each batch updates `broken` and `x_adv` and yields the next position.

        With a random network, `x_adv` also receives the attack's strongest image for an image that is not broken.

        Args:
          name: name of the attack; its random draws depend on it.
          attack: the attack.
          todo: indices of the images.
          others: (N, classes − 1) target classes, in order.
          broken, x_adv: (N,) bool and (N, H, W, C), updated in place.
          position: number of items that are done, of `passes(…)` times len(todo).
        """
        if attack.check is not None:
            attack.check(1 + others.shape[1])
        total = passes(attack, others) * len(todo)
        while position < total:
            ahead = np.arange(position, total)
            alive = ahead[~broken[todo[ahead % len(todo)]]][: self.sizes[-1]]
            position = alive[-1] + 1 if len(alive) == self.sizes[-1] else total
            if len(alive):
                image, number = todo[alive % len(todo)], alive // len(todo)
                towards = (
                    others[image, number // attack.restarts] if attack.targets else np.full_like(image, UNTARGETED)
                )
                found = self._batch(
                    name, attack, Items(image, number, number % attack.restarts, towards, self.y[image])
                )
                self.flat += int(found.flat.sum())
                for row in np.nonzero(found.broken | self.randomized)[0]:
                    if not broken[image[row]]:
                        broken[image[row]], x_adv[image[row]] = found.broken[row], found.x_adv[row]
            yield int(position)

    def _batch(self, name, attack, items):
        """Runs all steps of the attack for some items, arrays (n,)."""
        count = len(items.image)
        rows = self._padded(np.arange(count))
        programs = self._programs(attack, len(rows))
        draws, answers = _number(name), _number(f"{name} found")
        fixed = Items(*self._place(*(column[rows].astype(np.int32) for column in items)))
        (x,) = self._place(self.x[items.image[rows]])
        state = programs.init(self.key, draws, x, fixed)
        result = Found(np.zeros((count, *self.x.shape[1:]), np.float32), *np.zeros((2, count), bool))
        stride = 1 if cores.form().unroll and attack.gradient else _STEPS_PER_CALL
        i = 0
        while i < attack.steps:
            stop = min(i + stride, attack.steps)
            state = programs.steps(np.int32(i), np.int32(stop), x, fixed, state)
            i = stop
            if attack.done is None or i == attack.steps:
                continue
            going = np.nonzero(~np.asarray(programs.done(state)))[0]
            going = going[going < len(np.unique(rows))]  # the rest is padding
            if not len(going):
                break
            size = self._size(len(going))
            if (attack.steps - i) * (len(rows) - size) > _COMPILING * len(rows):
                self._harvest(programs.finish(self.key, answers, x, fixed, state), rows, result)
                kept = self._padded(going)
                state, x, fixed = jax.block_until_ready(self.take((state, x, fixed), kept))
                rows, programs = rows[kept], self._programs(attack, len(kept))
        self._harvest(programs.finish(self.key, answers, x, fixed, state), rows, result)
        return result

    def _harvest(self, finished, rows, result):
        """Writes the results of a batch so far into `result`, at the rows that the batch holds."""
        x_adv, broken, flat, distance = map(np.asarray, finished)
        if not float(distance.max()) <= self.eps + TOLERANCE:
            raise RuntimeError(
                f"an adversarial image is {distance.max():.8g} away or outside [0, 1]; eps is {self.eps:g}"
            )
        result.x_adv[rows], result.broken[rows], result.flat[rows] = x_adv, broken, flat

    def _programs(self, attack, size):
        which = (*attack.functions(), size)
        if which not in self.programs:
            self.programs[which] = self._make(attack)
        return self.programs[which]

    def _make(self, attack):
        def init(key, name, x, items):
            return attack.init(self._image_keys(key, name, items.image, items.number), items.restart, x, items.y)

        def steps(start, stop, x, items, state):
            fold = cores.form().fold and not self.randomized
            logits_fn = prepared(self.logits_fn, x) if fold else self.logits_fn

            def step(i, state):
                return attack.step(i, logits_fn, x, items.y, items.other, state)

            if cores.form().unroll and attack.gradient:
                return step(start, state)
            return lax.fori_loop(start, stop, step, state)

        def finish(key, name, x, items, state):
            x_adv = attack.x_adv(x, state)
            broken = ~losses.correct(self.logits_fn(x_adv, *self._keys(key, name, items.image, items.number)), items.y)
            x_adv = x_adv if attack.best is None else attack.best(x, state)
            distance = geometry.distance(x_adv, x, self.norm)
            in_box = jnp.all((x_adv >= 0) & (x_adv <= 1), axis=(1, 2, 3))
            flat = jnp.zeros(len(x), bool) if attack.flat is None else attack.flat(state)
            return x_adv, broken, flat, jnp.where(in_box, distance, jnp.inf)

        return Programs(
            self._on_each_device(init, "ccss"),
            self._on_each_device(steps, "ccsss", donate=True),
            self._on_each_device(finish, "ccsss", gathered=True),
            jax.jit(attack.done or (lambda state: None), out_shardings=self.replicated),
        )

    def _on_each_device(self, program, arguments, gathered=False, donate=False):
        """Compiles a program that runs on each device for its own images; no step waits for another device.

        The arrays that the program closes over, the weights of logits_fn, become arguments, so that they are not
        compiled in as constants.

        Args:
          program: a function of arrays and trees; it sees one device's share.
          arguments: one letter per argument: "s", sharded over the devices, or "c", common to all.
          gathered: whether all processes need the whole result.
          donate: whether the result may reuse the memory of the last argument (buffer donation).
        """
        specs = tuple({"s": cluster.BATCH, "c": cluster.REPLICATED}[kind] for kind in arguments)
        split = jax.shard_map(program, mesh=self.mesh, in_specs=specs, out_specs=cluster.BATCH, check_vma=False)
        compiled: list[tuple] = []

        def call(*arguments):
            leaves = jax.tree.leaves(arguments)
            if not compiled:
                program, constants, tree = hoisted(split, *arguments)
                kept = range(1 + len(leaves) - len(jax.tree.leaves(arguments[-1])), 1 + len(leaves))
                program = jax.jit(
                    program,
                    out_shardings=self.replicated if gathered else self.sharded,
                    donate_argnums=tuple(kept) if donate else (),
                )
                compiled.append((program, [self._everywhere(c) for c in constants], tree))
            program, constants, tree = compiled[0]
            return jax.tree.unflatten(tree, program(constants, *leaves))

        return call

    def _everywhere(self, constant):
        """An array that logits_fn closes over, replicated on all devices; transferred only once."""
        if id(constant) not in self.constants:
            self.constants[id(constant)] = constant, jax.device_put(constant, self.replicated)
        return self.constants[id(constant)][1]

    def _key(self, data):
        return jax.random.wrap_key_data(data, impl=self.key_kind)

    def _image_keys(self, key, name, image, number):
        """A key for each item, derived from the number of a name, the image and the number of the pass."""
        key = jax.random.fold_in(self._key(key), name)
        fold = jax.vmap(jax.random.fold_in)
        return fold(jax.vmap(jax.random.fold_in, (None, 0))(key, image), number)

    def _keys(self, key, name, image, number):
        """The arguments that logits_fn takes after x: keys for a random network, else none."""
        return [self._image_keys(key, name, image, number)] if self.randomized else []

    def _size(self, count):
        return next(size for size in self.sizes if size >= count)

    def _padded(self, rows):
        """`rows`, padded to the next batch size by repeating the last one."""
        return np.concatenate([rows, np.repeat(rows[-1:], self._size(len(rows)) - len(rows))])

    def _place(self, *arrays):
        return [jax.make_array_from_callback(a.shape, self.sharded, a.__getitem__) for a in arrays]


def passes(attack: Iterative, others: np.ndarray) -> int:
    """The number of runs for each image: all restarts towards the first target, then towards the next, …"""
    return attack.restarts * min(max(attack.targets, 1), others.shape[1])


def _number(name):
    """The number by which a name enters the derivation of random keys."""
    return np.uint32(zlib.crc32(name.encode()))


def _power_of_two(count):
    return 1 << (count - 1).bit_length()
