"""Functions as programs: what they close over becomes arguments, and what depends on that alone is computed once."""

import inspect
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array, lax
from jax.extend.core import ClosedJaxpr, Var, jaxpr_as_fun


def unjitted(f: Callable) -> Callable:
    """The function that `jax.jit` wraps, or f itself: a jitted function keeps what it closes over as constants."""
    return inspect.unwrap(f, stop=lambda f: not isinstance(f, jax.stages.Wrapped))


def hoisted(program: Callable, *arguments: Any) -> tuple[Callable, list[Any], Any]:
    """Traces `program` and returns (function, constants, tree structure of the result).

    The function maps (constants, *leaves of the arguments) to the leaves of the result. Of `arguments` only shapes and
    dtypes are used.
    """
    closed, shapes = jax.make_jaxpr(program, return_shape=True)(*arguments)

    def call(constants, *leaves):
        return jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, constants))(*leaves)

    return call, closed.consts, jax.tree.structure(shapes)


def prepared(f: Callable, x: Array) -> Callable:
    """`f` for many calls on arrays like x: what depends on its weights alone is computed here, once.

    A network folds its batch-norms into its convolutions and converts their weights; within the loop of an attack, that
    would be done in every step. It is done where `prepared` is called, and an optimisation barrier keeps the compiler
    from moving it back. Values that are larger than their operands, such as a bias for every pixel, are computed in the
    calls, where they need not be stored in memory. Of x only shape and dtype are used; a call with other ones is a call
    of f itself.
    """
    closed, shapes = jax.make_jaxpr(f, return_shape=True)(x)
    tree, like = jax.tree.structure(shapes), (x.shape, x.dtype)
    program = _Divided(closed)

    def prepare(values):
        made = _run(program.before, {**program.literals, **values})
        return lax.optimization_barrier({slot: made[slot] for slot in program.between})

    made = {**program.literals, **jax.jit(prepare)(program.constants)}

    def call(x):
        if (x.shape, x.dtype) != like:
            return f(x)
        values = _run(program.after, {**made, _ARGUMENT: x})
        return jax.tree.unflatten(tree, [values[slot] for slot in program.outputs])

    return call


_ARGUMENT = 0  # the slot of a program's argument


class _Step(NamedTuple):
    """One equation of a program; the values that it reads and writes have numbers, `slots`."""

    equation: Any
    within: Any  # the program that it is from
    reads: dict[Any, int]  # variable -> slot
    writes: list[int]

    def grows(self) -> bool:
        """Whether it writes more than twice as much as it reads, such as a broadcast."""
        sizes = [sum(v.aval.size for v in variables) for variables in (self.equation.outvars, self.reads)]
        return sizes[0] > 2 * sizes[1]


def alone(equation: Any, within: Any, reads: list[Any]) -> Callable[..., list[Any]]:
    """An equation of the program `within` as a function of the variables that it reads.

    It becomes a program of its own, since JAX's versions differ in how to call one equation.
    """
    parts = dict(constvars=[], invars=reads, outvars=equation.outvars, eqns=[equation])
    names = within.debug_info.with_unknown_names()
    return jaxpr_as_fun(ClosedJaxpr(within.replace(**parts, effects=equation.effects, debug_info=names), ()))


def _run(steps, values):
    """{slot: value} after some steps."""
    values = dict(values)
    for equation, within, reads, writes in steps:
        found = alone(equation, within, list(reads))(*(values[slot] for slot in reads.values()))
        values.update(zip(writes, found, strict=True))
    return values


class _Divided:
    """The steps of a program of one argument: those that do not depend on it, and those that remain.

    Attributes:
      constants, literals: {slot: value} of arrays that the program closes over, and of numbers in its text.
      before, after: the steps, each in order.
      between: slots that `before` or `constants` give to `after` or to the results.
      outputs: slots of the results.
    """

    def __init__(self, closed):
        self.constants, self.literals = {}, {}
        self._count, self._cheap, self._fixed = itertools.count(_ARGUMENT + 1), set(), set()
        before, after = [], []
        self.outputs = self._walk(closed, [_ARGUMENT], before, after)
        self.after, needed = _needed(after, self.outputs)
        self.between = [slot for slot in needed if slot in self._fixed]
        self.before, _ = _needed(before, self.between)

    def _walk(self, closed, arguments, before, after):
        jaxpr, place = closed.jaxpr, {}
        place.update(zip(jaxpr.invars, arguments, strict=True))
        for variable, value in zip(jaxpr.constvars, closed.consts, strict=True):
            place[variable] = slot = next(self._count)
            self.constants[slot] = value
            self._fixed.add(slot)
        for equation in jaxpr.eqns:
            reads = {atom: place[atom] for atom in equation.invars if isinstance(atom, Var)}
            step = _Step(equation, jaxpr, reads, [next(self._count) for _ in equation.outvars])
            slots, writes = set(reads.values()), step.writes
            known = slots <= self._fixed | self._cheap and not equation.effects
            cheap = known and (slots <= self._cheap or step.grows())
            if known:
                before.append(step)
                (self._cheap if cheap else self._fixed).update(writes)
            if not known and equation.primitive.name in ("jit", "pjit"):  # a program within the program
                given = [self._slot(atom, place) for atom in equation.invars]
                writes = self._walk(equation.params["jaxpr"], given, before, after)
            elif cheap or not known:
                after.append(step)
            place.update(zip(equation.outvars, writes, strict=True))
        return [self._slot(atom, place) for atom in jaxpr.outvars]

    def _slot(self, atom, place):
        if isinstance(atom, Var):
            return place[atom]
        self.literals[slot := next(self._count)] = atom.val
        self._cheap.add(slot)
        return slot


def _needed(steps, outputs):
    """(the steps that some slots depend on, all slots that these and the steps read)."""
    needed, kept = dict.fromkeys(outputs), []
    for step in reversed(steps):
        if step.equation.effects or any(slot in needed for slot in step.writes):
            needed.update(dict.fromkeys(step.reads.values()))
            kept.append(step)
    return kept[::-1], needed
