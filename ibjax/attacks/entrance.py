"""The entrance of every public attack: what it is given is checked, and turned into what it computes with.

| argument  | what is taken                                                                                        |
|-----------|------------------------------------------------------------------------------------------------------|
| key       | a JAX key, one or one per image (B,), old ones of jax.random.PRNGKey too; a whole number, as seed    |
| logits_fn | a function that JAX can trace                                                                        |
| x         | (B, H, W, C) float32 in [0, 1], of NumPy or JAX; up to 1e-6 outside, which is clipped                |
| target    | labels (B,), classes that the network has; where the loss takes them, distributions (B, classes)     |

Everything else is refused in one line. Called with arrays that have values, the attack looks at those once, on the
host, and asks the network whether its answer about an image depends on the rest of the batch, once for each function
that it is given; where that cannot be found out, it says so. Inside a trace (jit, vmap, a train step), and where parts
of an array lie with other processes, it looks at shapes and types only, in Python: the compiled program is that of the
attack without an entrance.
"""

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from ibjax.attacks import Attack, checks
from ibjax.attacks.checks import first
from ibjax.errors import InputError

# what an attack's target may be
LABELS = "labels"  # (B,) integers
SOFT_LABELS = "labels or distributions"  # (B,) integers, or (B, classes) rows that sum to 1, but not one-hot rows
DISTRIBUTIONS = "distributions or labels"  # one-hot rows too
ANYTHING = "anything"  # the loss is the caller's, or there is none

log = logging.getLogger(__name__)
_known: weakref.WeakSet[Hashable] = weakref.WeakSet()  # networks that have been asked, or need not be


def checked(
    attack: Attack, target: str = LABELS, *, network: bool = True, stochastic: bool = False, draws: bool = True
) -> Attack:
    """`attack` behind its entrance.

    Args:
      attack: (key, logits_fn, x, target) -> x_adv, for a typed key and JAX arrays.
      target: what it takes, one of the constants above.
      network: whether it calls `logits_fn` at all.
      stochastic: whether it calls `logits_fn(x, keys)`, with a key per image.
      draws: whether it draws anything; else its key may be anything, None too.
    """

    @functools.wraps(attack)
    def entered(key: Any, logits_fn: Callable, x: Any, goal: Any) -> Array:
        asked = logits_fn if network else None
        key, x, goal = enter(key, asked, x, goal, target, stochastic=stochastic, draws=draws)
        return attack(key, logits_fn, x, goal)

    return entered


def enter(
    key: Any,
    logits_fn: Any,
    x: Any,
    target: Any,
    kind: str = LABELS,
    *,
    stochastic: bool = False,
    draws: bool = True,
    coupled: bool = False,
) -> tuple[Array, Array, Any]:
    """(key, x, target) as an attack computes with them; `kind` is the target's, all else as in `checked`.

    `logits_fn` None is not looked at; where it is `coupled`, its answers may depend on the batch and on its place.
    Raises InputError on what an attack cannot take.
    """
    x = images(x)
    classes = None if logits_fn is None else classes_of(logits_fn, x, kind, stochastic)
    key, target = as_key(key, x) if draws else key, target_of(target, len(x), classes, kind)
    if coupled:
        _remember(logits_fn)
    elif logits_fn is not None and has_values(x) and not checks.inside_a_trace():
        _ask(logits_fn, x, stochastic)
    return key, x, target


def _ask(logits_fn, x, stochastic):
    """Raises InputError where a network's answer about an image depends on the others, the first time that it is seen.

    What could not be found out is said once: of one image alone, and of a network that draws anew in each call. What is
    no (B, classes) is no answer about images.
    """
    if isinstance(logits_fn, Hashable) and logits_fn in _known:
        return
    if len(x) < 2:  # there may be more the next time
        _say_once(checks.ONE_IMAGE)
        return
    keys = jax.random.split(jax.random.key(0), len(x)) if stochastic else None
    found = first(jax.eval_shape(logits_fn, x, *([] if keys is None else [keys])))
    if found.ndim == 2 and len(found) == len(x):
        for text in checks.independent(logits_fn, x, keys):
            log.warning(text)
        _remember(logits_fn)


@functools.cache
def _say_once(text):
    """Once in a process: of images that are attacked one by one it is no news the second time."""
    log.warning(text)


def _remember(network):
    with contextlib.suppress(TypeError):  # it cannot be hashed or referred to weakly: it will be asked again
        _known.add(network)


def has_values(array: Any) -> bool:
    """Whether an array's values can be read here: it is no tracer, and no part of it lies with another process."""
    return not isinstance(array, Tracer) and (not isinstance(array, jax.Array) or array.is_fully_addressable)


def images(x: Any, name: str = "images") -> Array:
    """x as a JAX array, checked."""
    widest = jax.dtypes.canonicalize_dtype(np.float64).name  # float64 with jax_enable_x64
    checks.kind_of_images(x, name, ("float32", widest))
    if not has_values(x):
        return x
    seen = np.asarray(x)
    clipped = checks.in_the_box(seen, name)
    return x if clipped is seen and isinstance(x, jax.Array) else jnp.asarray(clipped)


def as_key(key: Any, x: Any) -> Array:
    """A typed key, or one per image of x, from any form that JAX has had, or from a seed; else InputError."""
    typed = _typed(key)
    if typed is not None and typed.shape in ((), (len(x),)):
        return typed
    what = f"an array {key.dtype}{list(key.shape)}" if hasattr(key, "dtype") else repr(key)
    raise InputError(
        f"key is {what}; give one JAX key, jax.random.key(0), or one for each image, jax.random.split(key, {len(x)})"
    )


def _typed(key) -> Array | None:
    """Typed keys of any shape; None where it is none and no seed."""
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        return jax.random.key(_seed(int(key)))
    if not isinstance(key, jax.Array | np.ndarray):
        return None
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    if not key.ndim and jnp.issubdtype(key.dtype, jnp.integer):
        return jax.random.key(key if isinstance(key, Tracer) else _seed(key.item()))
    words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    if key.dtype == words.dtype and key.shape[-1:] == words.shape:
        return jax.random.wrap_key_data(jnp.asarray(key))
    return None


def _seed(number):
    if not -(2**63) <= number < 2**63:
        raise InputError(f"key={number} is no seed; give a whole number of 64 bits, or jax.random.key(0)")
    return number


def classes_of(logits_fn: Any, x: Any, kind: str = LABELS, stochastic: bool = False) -> int | None:
    """How many classes a network has, found by a trace that computes nothing.

    None inside a trace, and where the target may be anything: then the output may be so too. Else the output, or the
    first of a tuple, must be (B, classes). Raises InputError where it is not, and on a network that cannot be called,
    is PyTorch's, or cannot be traced by JAX.
    """
    given = type(logits_fn)
    if any(base.__module__.partition(".")[0] == "torch" for base in given.__mro__):
        raise InputError(
            f"logits_fn is a PyTorch module ({given.__name__}); bring its weights with python -m ibjax.convert, or "
            "write it in jax.numpy"
        )
    if not callable(logits_fn):
        raise InputError(f"logits_fn is a {given.__name__}; give a function (B, H, W, C) -> (B, classes)")
    if not has_values(x):
        return None
    keys = [jax.random.split(jax.random.key(0), len(x))] if stochastic else []
    try:
        output = jax.eval_shape(logits_fn, x, *keys)
    except InputError:
        raise
    except Exception as error:
        words, call = " ".join(str(error).split())[:150], f"logits_fn(x{', keys' * stochastic})"
        raise InputError(
            f"JAX cannot trace {call}: {type(error).__name__}: {words}; give a function in jax.numpy, from images "
            f"{x.shape}{' and a key for each' * stochastic} to (B, classes)"
        ) from error
    if kind == ANYTHING:
        return None
    found = first(output)
    if found.ndim != 2 or len(found) != len(x) or found.shape[1] < 2:
        raise InputError(f"logits have shape {found.shape}; give ({len(x)}, classes), with at least two classes")
    return found.shape[1]


def target_of(target: Any, count: int, classes: int | None, kind: str) -> Any:
    """The target of `count` images, checked, its labels int32; of a tuple (labels, …) the first is looked at."""
    if kind == ANYTHING:
        return target
    labels, rest = (target[0], target[1:]) if isinstance(target, tuple) and target else (target, None)
    is_array = isinstance(labels, jax.Array | np.ndarray)
    if kind != LABELS and is_array and labels.ndim == 2 and jnp.issubdtype(labels.dtype, jnp.floating):
        labels = _distributions(labels, count, classes, one_hot=kind == DISTRIBUTIONS)
    else:
        checks.kind_of_labels(labels, count)
        if has_values(labels):
            if classes is not None:
                checks.in_classes(np.asarray(labels), classes)
            labels = jnp.asarray(labels, jnp.int32)
    return labels if rest is None else (labels, *rest)


def _distributions(rows, count, classes, one_hot):
    """Rows of probabilities (B, classes), checked."""
    if rows.shape[0] != count or (classes is not None and rows.shape[1] != classes):
        raise InputError(
            f"targets have shape {rows.shape}; give ({count}, {classes or 'classes'}), or labels ({count},)"
        )
    if not has_values(rows):
        return rows
    seen = np.asarray(rows, np.float64)
    if not (np.all(seen >= 0) and np.allclose(seen.sum(1), 1, atol=1e-2)):
        raise InputError("targets are no distributions: give rows that are at least 0 and sum to 1, or labels")
    if not one_hot and np.all(seen.max(1) == 1):
        raise InputError(f"labels are one-hot {seen.shape}; give integers of shape ({count},): labels.argmax(axis=1)")
    return jnp.asarray(rows)
