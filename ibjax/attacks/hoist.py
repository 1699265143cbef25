"""Functions as programs: what they close over becomes arguments, what depends on that alone is computed once."""

import inspect
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
    from moving it back. What is larger than what it is made from, such as a bias for every pixel, stays in the calls,
    where it is no array in memory. Of x only shape and dtype are used; a call with other ones is a call of f itself.
    """
    closed, shapes = jax.make_jaxpr(f, return_shape=True)(x)
    tree, like = jax.tree.structure(shapes), (x.shape, x.dtype)
    program = _Divided(closed)
    made = program.read()
    arrays = {slot: value for slot, value in made.items() if slot not in program.literals}
    made |= zip(arrays, lax.optimization_barrier(list(arrays.values())), strict=True)

    def call(x):
        if (x.shape, x.dtype) != like:
            return f(x)
        values = {**made, 0: x}
        for step in program.steps:
            values.update(step.run(values))
        return jax.tree.unflatten(tree, [values[slot] for slot in program.outputs])

    return call


class _Step(NamedTuple):
    """One equation of a program; the values that it reads and writes have numbers, `slots`."""

    equation: Any
    within: Any  # the program that it is from
    reads: dict[Any, int]  # variable -> slot
    writes: list[int]

    def run(self, values):
        """{slot: value} of the results; as a program of its own, since JAX's versions differ in how to call one."""
        parts = dict(constvars=[], invars=list(self.reads), outvars=self.equation.outvars, eqns=[self.equation])
        names = self.within.debug_info.with_unknown_names()
        alone = self.within.replace(**parts, effects=self.equation.effects, debug_info=names)
        found = jaxpr_as_fun(ClosedJaxpr(alone, ()))(*(values[slot] for slot in self.reads.values()))
        return dict(zip(self.writes, found, strict=True))

    def grows(self):
        """Whether it writes more than twice as much as it reads, such as a broadcast."""
        sizes = [sum(v.aval.size for v in variables) for variables in (self.equation.outvars, self.reads)]
        return sizes[0] > 2 * sizes[1]


class _Divided:
    """A program of one argument, slot 0: the values that do not depend on it, and the steps that remain.

    Attributes:
      steps: the remaining steps, in order.
      outputs: slots of the results.
      literals: slots of numbers in the program's text, and of what is made from these alone.
    """

    def __init__(self, closed):
        self._count, self._known, self._later = iter(range(1, 1 << 62)), {}, {}
        self.steps, self.literals = [], set()
        self.outputs = self._walk(closed, [0])
        needed, kept = set(self.outputs), []
        for step in reversed(self.steps):
            if step.equation.effects or needed.intersection(step.writes):
                needed.update(step.reads.values())
                kept.append(step)
        self.steps = kept[::-1]

    def read(self):
        """{slot: value} of what the remaining steps and the results read of the values that are known."""
        slots = dict.fromkeys([*(slot for step in self.steps for slot in step.reads.values()), *self.outputs])
        return {slot: self._known[slot] for slot in slots if slot in self._known}

    def _walk(self, closed, arguments):
        jaxpr, place = closed.jaxpr, {}
        place.update(zip(jaxpr.invars, arguments, strict=True))
        place.update(zip(jaxpr.constvars, map(self._new, closed.consts), strict=True))
        for equation in jaxpr.eqns:
            reads = {atom: place[atom] for atom in equation.invars if isinstance(atom, Var)}
            step = _Step(equation, jaxpr, reads, [next(self._count) for _ in equation.outvars])
            writes = step.writes
            if all(slot in self._known or slot in self._later for slot in reads.values()) and not equation.effects:
                if step.grows():
                    self._later |= dict.fromkeys(writes, step)
                    self.steps.append(step)
                else:
                    self._known |= step.run({slot: self._value(slot) for slot in reads.values()})
                    self.literals.update(writes if self.literals.issuperset(reads.values()) else ())
            elif equation.primitive.name in ("jit", "pjit"):
                writes = self._walk(equation.params["jaxpr"], [self._slot(atom, place) for atom in equation.invars])
            else:
                self.steps.append(step)
            place.update(zip(equation.outvars, writes, strict=True))
        return [self._slot(atom, place) for atom in jaxpr.outvars]

    def _new(self, value):
        self._known[slot := next(self._count)] = value
        return slot

    def _slot(self, atom, place):
        if isinstance(atom, Var):
            return place[atom]
        self.literals.add(slot := self._new(atom.val))
        return slot

    def _value(self, slot):
        """A value that is known; one that grows is computed where another one that is known needs it."""
        if slot in self._known:
            return self._known[slot]
        step = self._later[slot]
        return step.run({slot: self._value(slot) for slot in step.reads.values()})[slot]
