"""The precision of float32 products, by name.

| name      | CPU     | GPU            | TPU                           | usual for                     |
|-----------|---------|----------------|-------------------------------|-------------------------------|
| "default" | float32 | TensorFloat-32 | one pass of bfloat16 operands | training                      |
| "high"    | float32 | TensorFloat-32 | three passes, about 16 bits   | attacks, evaluation, analyses |
| "highest" | float32 | float32        | six passes, float32           | the judgement of an image     |

Every product of this package states its precision: the layers of networks state that of `stated()`, and computations
that need float32 state HIGHEST themselves. `at(name)` is entered where a program is traced: by the train step, by the
scorer of an evaluation, by AutoAttack. It also sets JAX's default while it lasts, which is the only means by which the
products of other people's functions can be given a precision; besides, JAX then traces a jitted function anew for each
precision.
"""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import jax
from jax import lax

from ibjax.errors import InputError, nearest

log = logging.getLogger(__name__)
F = TypeVar("F", bound=Callable[..., Any])
NAMES = ("default", "high", "highest")
TRAINING, EVALUATION, JUDGEMENT = NAMES
# other names of JAX's default precision
_SAME = {"bfloat16": "default", "tensorfloat32": "high", "float32": "highest"}

_asked: contextvars.ContextVar[str | None] = contextvars.ContextVar("precision", default=None)


def check(name: str, where: str = "precision") -> str:
    """The name; raises InputError unless it is one of NAMES."""
    if name not in NAMES:
        raise InputError(f"{where}={name!r} is unknown; {nearest(str(name), NAMES)}")
    return name


@contextlib.contextmanager
def at(name: str) -> Iterator[None]:
    """A context in which the products that are traced have this precision, unless they state another one themselves.

    The innermost context decides, and outweighs JAX's default; a warning says so, once, where they differ. Raises
    InputError on an unknown name.
    """
    if _asked.get() is None and asked() not in (None, name):
        _say_once(str(asked()), name)
    token = _asked.set(check(name))
    try:
        with jax.default_matmul_precision(name):
            yield
    finally:
        _asked.reset(token)


@functools.cache
def _say_once(given, name):
    log.warning(
        "JAX's default precision, '%s', is not used here: float32 products are at '%s'; set precision", given, name
    )


def evaluating() -> contextlib.AbstractContextManager[None]:
    """The context of an evaluation: "high", where neither a context around it nor JAX's default says another."""
    return contextlib.nullcontext() if asked() else at(EVALUATION)


def evaluated(f: F) -> F:
    """`f`, each call of which is in the context `evaluating()`."""

    @functools.wraps(f)
    def call(*args, **kwargs):
        with evaluating():
            return f(*args, **kwargs)

    return cast(F, call)


def asked() -> str | None:
    """The precision that is asked for here: of the innermost context, else JAX's default; None where there is none.

    It is one of NAMES, or one of JAX's algorithms, as "BF16_BF16_F32_X3", where JAX's default is one.
    """
    given = _asked.get() or jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return None if given is None else _SAME.get(given, given)


def of_record(record: Mapping[str, Any]) -> str:
    """The precision of an attack by its record; earlier versions recorded JAX's default, where it was set."""
    said = str(record.get("precision"))
    return "default" if said == "None" else _SAME.get(said, said)


def stated() -> lax.Precision | None:
    """The precision that a layer's product states; outside of any context that of JAX's default.

    None, which JAX replaces by its default, where that is an algorithm.
    """
    name = asked() or "default"
    return lax.Precision[name.upper()] if name in NAMES else None
