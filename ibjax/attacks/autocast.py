"""A network whose products are in bfloat16, from any function that JAX can trace, by rewriting its program.

    product(a, b)   becomes   float32( product( bfloat16(a), bfloat16(b) ) )          convolutions and matrix products

Each product is accumulated in float32 by the hardware and stored in bfloat16. The operands of a product are stored in
bfloat16 too; whatever else reads them, such as the sum at the end of a residual block, reads the stored numbers.
Everything else, such as normalisations, sums and activation functions, is computed in float32 from what is stored.
Derivatives follow: the gradients of a product are products in bfloat16.

| what                                                  | becomes                                                      |
|-------------------------------------------------------|--------------------------------------------------------------|
| a product between two others                          | bfloat16, if both operands are float32                       |
| the first products, which read the pixels             | stay in float32: bfloat16 pixels lose what is below 1/512    |
| the last products, as the classifier                  | stay in float32: logits in bfloat16 would have three digits  |
| products of weights alone                             | stay in float32; `hoist.prepared` computes them once         |
| products that state the highest precision             | stay in float32, as a resize of the pixels before a network  |
| `jit`, `remat`                                        | as what they contain                                         |
| loops (`scan`, `while_loop`) and conditionals         | as one product: those between two others are in bfloat16     |
| `custom_jvp`, `custom_vjp`, and any other call        | stay in float32, as their derivatives are code of their own  |

`told` says which products of a network stay in float32 because of the last row.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import ClosedJaxpr, Literal, Var

from ibjax.attacks.hoist import alone
from ibjax.devices import precision

DTYPES = ("float32", "bfloat16")
_PRODUCTS = ("conv_general_dilated", "dot_general")
_INLINED = ("jit", "pjit", "closed_call")  # programs within a program
_REMAT = ("checkpoint", "remat", "remat2")
_LOOPS = ("scan", "while")


class _Step(NamedTuple):
    """An equation, and how it is computed."""

    equation: Any
    narrow: bool = False  # a product in bfloat16; a loop or conditional with such
    within: "list[_Step] | None" = None  # the steps of a program within the program
    levels: tuple[int, ...] = ()  # of the arguments of the branches of a conditional
    stored: tuple[bool, ...] = ()  # which of its results are stored in bfloat16


_WEIGHTS, _PIXELS, _FEATURES = range(3)  # a value depends on no argument; on one, through no product; on a product
_LAST, _BEFORE, _READ = range(3)  # no product depends on a value; one does; one in bfloat16 reads it


def narrowed(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` with its products in bfloat16, as the table above says; arguments and results keep their types."""

    def call(*arguments):
        closed, shapes = jax.make_jaxpr(f, return_shape=True)(*arguments)
        found = _run(closed.jaxpr, closed.consts, _of_network(closed.jaxpr), jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shapes), found)

    return call


def told(f: Callable[..., Any], *arguments: Any) -> list[str]:
    """Warnings: which products of `f` stay in float32 although they are not its last, or that none is in bfloat16.

    Of the arguments, arrays or their shapes and dtypes, no value is read.
    """
    narrow, left = _counted(_of_network(jax.make_jaxpr(f)(*arguments).jaxpr))
    warnings = []
    if left:
        where = ", ".join(f"{count} in {name}" for name, count in sorted(left.items()))
        warnings.append(f"search_dtype: products with derivatives of their own stay in float32 ({where})")
    if not narrow:
        warnings.append("search_dtype: no product of the network is narrowed: the search is as without search_dtype")
    return warnings


# ---- how each equation is computed ---------------------------------------------------------------------------


def _of_network(jaxpr):
    """The steps of a whole network: its arguments are pixels, its results logits."""
    return _planned(jaxpr, [_PIXELS] * len(jaxpr.invars), [_LAST] * len(jaxpr.outvars))[0]


def _planned(jaxpr, levels, uses):
    """(its steps, the uses of its arguments), given the levels of its arguments and the uses of its results."""
    known = _levels(jaxpr, levels)
    used: dict[Any, int] = {}

    def note(atoms, uses):
        for atom, use in zip(_variables(atoms), uses, strict=True):
            used[atom] = max(use, used.get(atom, _LAST))

    note(jaxpr.outvars, uses)
    steps = []
    for equation in reversed(jaxpr.eqns):
        given = [known.get(atom, _WEIGHTS) for atom in _variables(equation.invars)]
        step, reads = _step(equation, given, [used.get(variable, _LAST) for variable in equation.outvars])
        steps.append(step)
        note(equation.invars, reads)
    return steps[::-1], [used.get(variable, _LAST) for variable in jaxpr.invars]


def _variables(atoms):
    """The atoms, with None for a number."""
    return [atom if isinstance(atom, Var) else None for atom in atoms]


def _levels(jaxpr, levels):
    """{variable: what it depends on}, given what the arguments depend on."""
    known: dict[Any, int] = dict(zip(jaxpr.invars, levels, strict=True))
    for equation in jaxpr.eqns:
        given = [known.get(atom, _WEIGHTS) for atom in _variables(equation.invars)]
        made = [max(given, default=_WEIGHTS)] * len(equation.outvars)
        if equation.primitive.name in _INLINED + _REMAT:
            (program,) = _programs(equation)
            within = _levels(program, given)
            made = [within.get(atom, _WEIGHTS) for atom in _variables(program.outvars)]
        elif max(made, default=_WEIGHTS) > _WEIGHTS and _is_product(equation) and not _exact(equation):
            made = [_FEATURES] * len(made)
        known.update(zip(equation.outvars, made, strict=True))
    return known


def _step(equation, levels, uses):
    """(how an equation is computed, the uses of its arguments), given their levels and the uses of its results."""
    name, feeds = equation.primitive.name, max(uses, default=_LAST) > _LAST
    stored = tuple(use == _READ for use in uses)
    if name in _PRODUCTS:
        float32 = all(atom.aval.dtype == jnp.float32 for atom in (*equation.invars, *equation.outvars))
        narrow = float32 and feeds and max(levels) == _FEATURES and not _exact(equation)
        reads = [_READ if narrow and level == _FEATURES else _BEFORE for level in levels]
        return _Step(equation, narrow=narrow, stored=stored), reads
    if name in _INLINED + _REMAT:
        (program,) = _programs(equation)
        steps, reads = _planned(program, levels, uses)
        return _Step(equation, within=steps), reads
    product = _is_product(equation)
    narrow = product and name in (*_LOOPS, "cond") and feeds and max(levels) == _FEATURES
    reads = [_BEFORE if product or feeds else _LAST] * len(equation.invars)
    return _Step(equation, narrow=narrow, levels=tuple(levels[1:]), stored=stored), reads


def _is_product(equation):
    """Whether it is a product, or has one in it."""
    return equation.primitive.name in _PRODUCTS or any(map(_products, _programs(equation)))


def _exact(equation):
    """Whether a product states the highest precision by itself, and not because all products here are asked to."""
    stated = equation.params.get("precision")
    return stated == (lax.Precision.HIGHEST,) * 2 and str(precision.asked()) != precision.JUDGEMENT


def _programs(equation) -> Iterator[Any]:
    """The programs within an equation."""
    for value in equation.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if hasattr(each, "jaxpr") or hasattr(each, "eqns"):
                yield each.jaxpr if hasattr(each, "jaxpr") else each


def _counted(steps):
    """(number of products in bfloat16, {name of a call: number of its products that stay in float32})."""
    narrow, left = 0, Counter()
    for step in steps:
        name = step.equation.primitive.name
        if step.within is not None:
            found, beside = _counted(step.within)
            narrow, left = narrow + found, left + beside
        elif name in (*_PRODUCTS, *_LOOPS, "cond"):
            narrow += step.narrow
        else:
            left[name] += sum(map(_products, _programs(step.equation)))
    return narrow, +left


def _products(program):
    return sum(
        1 if equation.primitive.name in _PRODUCTS else sum(map(_products, _programs(equation)))
        for equation in program.eqns
    )


# ---- running it ----------------------------------------------------------------------------------------------


def _run(jaxpr, constants, steps, arguments) -> list[Any]:
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, constants, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    for step in steps:
        found = _applied(step, jaxpr, [read(atom) for atom in step.equation.invars])
        if any(step.stored):
            found = [
                _stored(value).astype(jnp.float32) if stored else value
                for value, stored in zip(found, step.stored, strict=True)
            ]
        values.update(zip(step.equation.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _applied(step, within, given):
    """The results of one step."""
    equation, name = step.equation, step.equation.primitive.name
    if name in _REMAT:
        rerun = lambda *given: _run(equation.params["jaxpr"], (), step.within, given)  # noqa: E731
        kept = {key: equation.params[key] for key in ("prevent_cse", "policy")}
        return jax.checkpoint(rerun, **kept)(*given)
    if step.within is not None:
        program = next(value for value in equation.params.values() if isinstance(value, ClosedJaxpr))
        return _run(program.jaxpr, program.consts, step.within, given)
    if name in _PRODUCTS and step.narrow:
        return [_product(equation, *given)]
    if step.narrow:
        levels = step.levels if name == "cond" else None
        equation = equation.replace(params={key: _narrow(value, levels) for key, value in equation.params.items()})
    variables = {atom: value for atom, value in zip(equation.invars, given, strict=True) if isinstance(atom, Var)}
    return alone(equation, within, list(variables))(*variables.values())


def _narrow(value, levels):
    """A parameter of a loop or conditional: each program in it, with its products in bfloat16."""
    if isinstance(value, tuple | list):
        return type(value)(_narrow(each, levels) for each in value)
    if not isinstance(value, ClosedJaxpr):
        return value
    program = value.jaxpr
    steps, _ = _planned(program, levels or [_FEATURES] * len(program.invars), [_BEFORE] * len(program.outvars))
    like = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=getattr(a, "weak_type", False)) for a in value.in_avals]
    return jax.make_jaxpr(lambda *given: _run(value.jaxpr, value.consts, steps, given))(*like)


@jax.custom_vjp
def _stored(x: Array) -> Array:
    """x in bfloat16, as an array in memory; its gradient is passed on as it is.

    Without the barrier, XLA computes a sum of residual blocks again from the results of all products before it.
    """
    return lax.optimization_barrier(x.astype(jnp.bfloat16))


_stored.defvjp(lambda x: (_stored(x), None), lambda _, g: (g.astype(jnp.float32),))


def _product(equation, a: Array, b: Array) -> Array:
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    how = dict(precision=lax.Precision.DEFAULT, preferred_element_type=None)  # products of bfloat16 numbers are exact
    if equation.primitive.name == "dot_general":
        return lax.dot_general(a, b, equation.params["dimension_numbers"], **how).astype(jnp.float32)
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers")
    names += ("feature_group_count", "batch_group_count")
    return lax.conv_general_dilated(a, b, **{name: equation.params[name] for name in names}, **how).astype(jnp.float32)
