"""Runs the steps of an attack over many images on all devices, driven from the host.

The work is a list of items: one for each image and each restart and target, in the order of the targets. A batch takes
the next items whose image is not broken yet, for whichever target, so that the devices stay busy while few images are
left. If several items break an image, the first item's result is kept. Batches are padded to one of a few sizes: a
smaller one is only used where an attack's steps save more time than compiling takes (`worthwhile`). If an attack
reports that images are done (Square), the batch is compacted to a smaller size between its steps.

The random key of an item is derived from the attack's name, the image's index and the number of its pass (restart and
target), so batch size, number of devices and interruptions between batches do not change the random draws.
"""

import functools
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ibjax import losses
from ibjax.attacks import autocast, geometry
from ibjax.attacks.hoist import prepared, unjitted
from ibjax.attacks.iterative import UNTARGETED, Iterative
from ibjax.attacks.programs import Compiler, Program
from ibjax.devices import cluster, cores, precision

_LOOKED_AFTER = 50  # queries after which a program looks whether all of its images are done


class Items(NamedTuple):
    """The items of a batch, each (B,) int32."""

    image: Any  # its index
    number: Any  # of the pass
    restart: Any  # number of the restart within the target
    other: Any  # target class, or UNTARGETED
    y: Any  # label


class Programs(NamedTuple):
    """The compiled programs at one batch size of all attacks with the same functions."""

    init: Program
    steps: Program
    finish: Program
    done: Program | None


class Found(NamedTuple):
    """The results of a batch."""

    x_adv: np.ndarray
    broken: np.ndarray
    flat: np.ndarray  # whether the gradient was zero or not finite at the start


class Runner:
    """A network, its images (N, H, W, C) float32 and labels (N,), and the devices; compiles each program once.

    With `randomized`, `logits_fn` takes `(x, keys)`. With the search dtype "bfloat16" attacks see the network that
    `autocast.narrowed` makes of it; what they find, and where they end, is judged by the network itself.
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
        search_dtype: str = "float32",
    ):
        self.logits_fn = cores.in_parts(unjitted(logits_fn))
        self.search = autocast.narrowed(self.logits_fn) if search_dtype == "bfloat16" else None
        self.x, self.y, self.norm, self.eps, self.randomized = x, y, norm, eps, randomized
        self.batch_size = batch_size
        self.key, self.key_kind = np.asarray(jax.random.key_data(key)), jax.random.key_impl(key)
        self.compiler = Compiler()
        mesh, self.sharded = self.compiler.mesh, self.compiler.sharded
        take = lambda tree, rows: jax.tree.map(lambda leaf: leaf[rows], tree)  # noqa: E731
        self.take = jax.jit(take, out_shardings=self.sharded)
        largest = cluster.rounded_up(min(batch_size, _power_of_two(len(x))), mesh.size)
        shares = ((largest * eighths // 8) >> i for i in range(6) for eighths in (8, 7, 6, 5))
        self.sizes = sorted({cluster.rounded_up(max(share, 1), mesh.size) for share in shares})
        self.programs: dict[tuple, Programs] = {}  # (functions of the attack, size) -> its programs
        self.answers: dict[tuple[str, str], Program] = {}  # ("logits" or "draws", precision) -> their program
        self.meanwhile: list[Callable[[], None]] = []  # what to do as soon as the devices are at work
        self.heed: Callable[[], None] | None = None  # called between the programs of a batch; may raise, to end it
        self.flat = 0  # number of items so far whose gradient was zero or not finite at the start

    def logits(self, *seen: np.ndarray) -> list[np.ndarray]:
        """The logits of all images, (N, classes) float32, for each array (N, H, W, C) of them, such as `self.x`."""
        size, program = self.sizes[-1], self._answer()

        def of(x):
            for first in range(0, len(x), size):
                chosen = np.minimum(np.arange(first, first + size, dtype=np.int32), len(x) - 1)
                yield np.asarray(program(self.key, *self._place(chosen, x[chosen])))[: len(x) - first]

        return [np.concatenate(list(of(x))).astype(np.float32) for x in seen]

    def expect_logits(self) -> None:
        """Begins to compile the program of `logits`, for the precision that is asked for here."""
        image = jax.ShapeDtypeStruct((self.sizes[-1],), jnp.int32)
        self._answer().lower(self.key, image, self._pixels(self.sizes[-1]))

    def _answer(self):
        def answer(key, image, x):
            return self.logits_fn(x, *self._keys(key, _number("clean"), image, 0 * image))

        return self._kept("logits", answer, "css")

    def _kept(self, what, function, places):
        """The program of a function for the precision that is asked for here, made at its first use."""
        asked = str(precision.asked())
        for (known, other), program in self.answers.items():
            if known == what and not cores.differ(other, asked):  # products that no precision changes are one program
                return program
        return self.answers.setdefault((what, asked), self.compiler.program(function, places, gathered=True))

    def draws(self, name: str, x: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
        """Whether a random network classifies the images `rows` of x (N, H, W, C) correctly, (count, len(rows)) bool.

        Each image has `count` draws of its own; a draw depends on `name`, the image's index and the draw's number.
        """
        answers, size, drawn = np.zeros((count, len(rows)), bool), self.sizes[-1], _number(name)

        def answer(key, drawn, x, image, number, y):
            return losses.correct(self.logits_fn(x, *self._keys(key, drawn, image, number)), y)

        program = self._kept("draws", answer, "ccssss")
        for first in range(0, len(rows), size):
            chosen = rows[np.minimum(np.arange(first, first + size), len(rows) - 1)].astype(np.int32)
            shown, image, y = self._place(x[chosen], chosen, self.y[chosen].astype(np.int32))
            for draw in range(count):
                (number,) = self._place(np.full(size, draw, np.int32))
                found = np.asarray(program(self.key, drawn, shown, image, number, y))
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

        With a random network, `x_adv` also receives what the latest pass made of an image that is not broken.

        Args:
          name: name of the attack; its random draws depend on it.
          attack: the attack.
          todo: indices of the images.
          others: (N, classes − 1) target classes, in order.
          broken, x_adv: (N,) bool and (N, H, W, C), updated in place.
          position: number of items that are done, of `passes(…)` times len(todo).
        """
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

    def expect(self, attack: Iterative, count: int) -> None:
        """Begins to compile the programs for `count` items of an attack, or more, before it is known which."""
        self._programs(
            attack, len(_padded(np.arange(min(count, self.sizes[-1])), worthwhile(self.sizes, attack.steps)))
        )

    def _batch(self, name, attack, items):
        """Runs all steps of the attack for some items, arrays (n,)."""
        count, sizes = len(items.image), worthwhile(self.sizes, attack.steps)
        rows = _padded(np.arange(count), sizes)
        programs = self._programs(attack, len(rows))
        draws, answers = _number(name), _number(f"{name} found")
        fixed = Items(*self._place(*(column[rows].astype(np.int32) for column in items)))
        (x,) = self._place(self.x[items.image[rows]])
        state = programs.init(self.key, draws, x, fixed)
        result = Found(np.zeros((count, *self.x.shape[1:]), np.float32), *np.zeros((2, count), bool))
        i = 0
        for stop in stops(attack):
            state = programs.steps(np.int32(i), np.int32(stop), x, fixed, state)
            i = stop
            if i < attack.steps:
                self._pause(state)
            if programs.done is None or i == attack.steps:
                continue
            going = np.nonzero(~np.asarray(programs.done(state)))[0]
            going = going[going < len(np.unique(rows))]  # the rest is padding
            if not len(going):
                break
            kept = _padded(going, sizes)
            if (attack.steps - i) * (len(rows) - len(kept)) > cores.form().compiling * sizes[-1]:
                self._harvest(programs.finish(self.key, answers, x, fixed, state), rows, result)
                state, x, fixed = jax.block_until_ready(self.take((state, x, fixed), kept))
                rows, programs = rows[kept], self._programs(attack, len(kept))
        finished = programs.finish(self.key, answers, x, fixed, state)
        self._do_meanwhile()
        self._harvest(finished, rows, result)
        return result

    def _pause(self, state):
        """Between two programs of a batch, whose result the devices may still be computing."""
        self._do_meanwhile()
        if self.heed is not None:
            jax.block_until_ready(state)  # else the host would have been through all steps before the devices
            self.heed()

    def _do_meanwhile(self):
        while self.meanwhile:
            self.meanwhile.pop(0)()

    def _harvest(self, finished, rows, result):
        """Writes the results of a batch so far into `result`, at the rows that the batch holds."""
        x_adv, broken, flat, distance = map(np.asarray, finished)
        if not float(distance.max()) <= self.eps + geometry.tolerance(self.eps, self.x.shape[1:]):
            raise RuntimeError(
                f"an adversarial image is {distance.max():.8g} away or outside [0, 1]; eps is {self.eps:g}"
            )
        count = len(np.unique(rows))  # the rest is padding
        rows = rows[:count]
        result.x_adv[rows], result.broken[rows], result.flat[rows] = x_adv[:count], broken[:count], flat[:count]

    def _programs(self, attack, size):
        """The programs of an attack at one size, lowered."""
        which = (*attack.functions(), attack.steps, size)
        if which not in self.programs:
            made, x = self._make(attack), self._pixels(size)
            number, name = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.uint32)
            items = Items(*[jax.ShapeDtypeStruct((size,), jnp.int32)] * len(Items._fields))
            state = made.init.lower(self.key, name, x, items)
            made.steps.lower(number, number, x, items, state)
            made.finish.lower(self.key, name, x, items, state)
            if made.done is not None:
                made.done.lower(state)
            self.programs[which] = made
        return self.programs[which]

    def _make(self, attack):
        def init(key, name, x, items):
            return attack.init(self._image_keys(key, name, items.image, items.number), items.restart, x, items.y)

        def steps(start, stop, x, items, state):
            fold = cores.form().fold and not self.randomized
            ready = functools.partial(prepared, x=x) if fold else lambda network: network
            exact = {} if self.search is None else {"exact": ready(self.logits_fn)}
            logits_fn = ready(self.search or self.logits_fn)

            def step(i, state):
                return attack.step(i, logits_fn, x, items.y, items.other, state, **exact)

            return _steps(attack, step, start, stop, state)

        def finish(key, name, x, items, state):
            keys = self._keys(key, name, items.image, items.number)
            judged = lambda found: ~losses.correct(self.logits_fn(found, *keys), items.y)  # noqa: E731
            x_adv = attack.x_adv(x, state)
            broken = judged(x_adv)
            x_adv = x_adv if attack.best is None else attack.best(x, state)
            more_ends = self.search and attack.ends and not self.randomized  # which is judged by one draw
            for end in attack.ends(x, state) if more_ends else ():
                more = ~broken & judged(end)
                x_adv, broken = jnp.where(geometry.per_image(more, x), end, x_adv), broken | more
            distance = geometry.distance(x_adv, x, self.norm)
            in_box = jnp.all((x_adv >= 0) & (x_adv <= 1), axis=(1, 2, 3))
            flat = jnp.zeros(len(x), bool) if attack.flat is None else attack.flat(state)
            return x_adv, broken, flat, jnp.where(in_box, distance, jnp.inf)

        program = self.compiler.program
        return Programs(
            program(init, "ccss"),
            program(steps, "ccsss", donate=True),
            program(finish, "ccsss", gathered=True),
            None if attack.done is None else program(attack.done, "s", gathered=True),
        )

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

    def _pixels(self, size):
        return jax.ShapeDtypeStruct((size, *self.x.shape[1:]), jnp.float32)

    def _place(self, *arrays):
        return [jax.make_array_from_callback(a.shape, self.sharded, a.__getitem__) for a in arrays]


def passes(attack: Iterative, others: np.ndarray) -> int:
    """The number of runs for each image: all restarts towards the first target, then towards the next, …"""
    return attack.restarts * min(max(attack.targets, 1), others.shape[1])


def stops(attack: Iterative) -> list[int]:
    """The steps before which an attack's programs are left; only there can a batch be compacted, on all devices alike.

    The number of queries between two stops grows, since most images that Square breaks are broken early.
    """
    if attack.done is None:
        stride = 1 if cores.form().unroll and attack.gradient else attack.steps
        return [*range(stride, attack.steps, stride), attack.steps]
    found = [0]
    while found[-1] < attack.steps:
        stride = max(_LOOKED_AFTER, min(found[-1], cores.form().queries))
        found.append(min(found[-1] + stride, attack.steps))
    return found[1:]


def _steps(attack, step, start, stop, state):
    """The state after steps start … stop − 1, those between two of `stops`.

    A loop whose length is known while it is compiled runs on a GPU without asking the host before each step.
    """
    if attack.done is None:
        if cores.form().unroll and attack.gradient:
            return step(start, state)
        return lax.fori_loop(0, attack.steps, step, state)

    def query(_, carry):
        i, state = carry
        keep = functools.partial(jnp.where, i < stop)
        return i + 1, jax.tree.map(keep, step(i, state), state)

    def goes_on(carry):
        i, state = carry
        return (i < stop) & ~jnp.all(attack.done(state))

    looked_after = min(_LOOKED_AFTER, attack.steps)
    return lax.while_loop(goes_on, lambda carry: lax.fori_loop(0, looked_after, query, carry), (start, state))[1]


def worthwhile(sizes: list[int], steps: int) -> list[int]:
    """Those of some batch sizes, ascending, that an attack of so many steps uses.

    The largest, and each one that saves more time, compared with the next larger one, than compiling its program takes.
    Both are counted in steps at the largest size (`cores.form().compiling`), never by a clock or by what is compiled
    already: an evaluation that was interrupted goes on with the same sizes, and so with the same bits.
    """
    chosen = [sizes[-1]]
    for size in reversed(sizes):
        if steps * (chosen[0] - size) > cores.form().compiling * sizes[-1]:
            chosen.insert(0, size)
    return chosen


def _padded(rows, sizes):
    """`rows`, padded to the next of these batch sizes by repeating the last one."""
    size = next(size for size in sizes if size >= len(rows))
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows))])


def _number(name):
    """The number by which a name enters the derivation of random keys."""
    return np.uint32(zlib.crc32(name.encode()))


def _power_of_two(count):
    return 1 << (count - 1).bit_length()
