"""Argument handling of every public attack: checks the arguments and converts them to JAX arrays and typed keys.

| argument  | accepted                                                                                             |
|-----------|------------------------------------------------------------------------------------------------------|
| key       | a JAX key, or one per image (B,), also old ones of jax.random.PRNGKey; a whole number, used as seed  |
| logits_fn | a function that JAX can trace                                                                        |
| x         | (B, H, W, C) float32 in [0, 1], of NumPy or JAX; up to 1e-6 outside, which is clipped                |
| target    | labels (B,), classes that the network has; where the loss takes them, distributions (B, classes)     |

Everything else raises an InputError of one line. If the arrays have concrete values, these are checked once, on the
host, and each `logits_fn` is tested once for whether its logits for an image depend on the rest of the batch; a warning
says if that could not be determined. Inside a JAX trace (jit, vmap, a train step), and for arrays that are partly on
other processes, only shapes and types are checked, in Python, so the checks add nothing to the compiled program.
"""

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from ibjax.attacks import Attack, checks
from ibjax.attacks.checks import first
from ibjax.attacks.hoist import prepared
from ibjax.devices import cores, precision
from ibjax.errors import CodeError, InputError

# what an attack's target may be
LABELS = "labels"  # (B,) integers
SOFT_LABELS = "labels or distributions"  # (B,) integers, or (B, classes) rows that sum to 1 and are not one-hot
DISTRIBUTIONS = "distributions or labels"  # the same, and one-hot rows too
ANYTHING = "anything"  # not checked: the loss is the caller's, or there is none

log = logging.getLogger(__name__)
_known: weakref.WeakSet[Hashable] = weakref.WeakSet()  # networks that were tested, or need no test


def checked(
    attack: Attack, target: str = LABELS, *, network: bool = True, stochastic: bool = False, draws: bool = True
) -> Attack:
    """`attack` with its arguments checked and converted, and on accelerators its network prepared once for all steps.

    The products of `logits_fn` have the precision of an evaluation, unless the caller asks for another one
    (`ibjax.devices.precision`).

    Args:
      attack: (key, logits_fn, x, target) -> x_adv, for a typed key and JAX arrays.
      target: the targets that the attack accepts, one of the constants above.
      network: whether it calls `logits_fn` at all.
      stochastic: whether it calls `logits_fn(x, keys)`, with a key per image.
      draws: whether it uses the key; if not, any value is accepted, including None.
    """

    @functools.wraps(attack)
    @precision.evaluated
    def entered(key: Any, logits_fn: Callable, x: Any, goal: Any) -> Array:
        asked = logits_fn if network else None
        key, x, goal = enter(key, asked, x, goal, target, stochastic=stochastic, draws=draws)
        if network and not stochastic and cores.form().fold:
            logits_fn = prepared(logits_fn, x)
        return attack(key, logits_fn, x, goal)

    return entered


def own_attack(source: Any, made: Any, options: Mapping[str, Any]) -> Attack:
    """The attack that a factory of the user's own has made, with its arguments and the form of its result checked.

    Its option `loss`, if it has one, decides which target it takes, as for `pgd`. CodeError if it is no function.
    """
    if not callable(made):
        raise CodeError(f"{source} is a {type(made).__name__}; return a function (key, logits_fn, x, target) -> x_adv")

    def attack(key, logits_fn, x, target):
        x_adv: Any = made(key, logits_fn, x, target)
        if not isinstance(x_adv, jax.Array) or (x_adv.shape, x_adv.dtype) != (x.shape, x.dtype):
            given = f"{x_adv.dtype}{list(x_adv.shape)}" if hasattr(x_adv, "dtype") else f"a {type(x_adv).__name__}"
            raise CodeError(
                f"{source} returns {given}; return adversarial images as those it got, {x.dtype}{list(x.shape)}"
            )
        return x_adv

    loss = options.get("loss")
    return checked(attack, ANYTHING if callable(loss) else DISTRIBUTIONS if loss == "kl" else SOFT_LABELS)


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
    """(key, x, target), checked and converted; `kind` is the kind of target, the other options are as in `checked`.

    `logits_fn` None is not checked. With `coupled`, its logits for an image may depend on the rest of the batch and on
    the image's position. Raises InputError on arguments that an attack does not accept.
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
    """Tests a network at its first use: raises InputError if its logits for an image depend on the other images.

    A warning, given once, says if the test is impossible: with a single image, or for a network that draws random
    numbers in each call. Outputs of another shape than (B, classes) are not tested.
    """
    if isinstance(logits_fn, Hashable) and logits_fn in _known:
        return
    if len(x) < 2:  # not remembered: the next call may have more images
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
    """Logs a warning once per process, since a caller may attack many images one by one."""
    log.warning(text)


def _remember(network):
    with contextlib.suppress(TypeError):  # not hashable, or no weak references: it is tested again next time
        _known.add(network)


def has_values(array: Any) -> bool:
    """Whether an array's values can be read: it is not a tracer, and no part of it is on another process."""
    return not isinstance(array, Tracer) and (not isinstance(array, jax.Array) or array.is_fully_addressable)


def images(x: Any, name: str = "images") -> Array:
    """x as a JAX array of images, checked."""
    widest = jax.dtypes.canonicalize_dtype(np.float64).name  # float64 with jax_enable_x64
    checks.kind_of_images(x, name, ("float32", widest))
    if not has_values(x):
        return x
    seen = np.asarray(x)
    clipped = checks.in_the_box(seen, name)
    return x if clipped is seen and isinstance(x, jax.Array) else jnp.asarray(clipped)


def as_key(key: Any, x: Any) -> Array:
    """A typed key, or one per image of x, from a typed key, an old-style key or a seed; else raises InputError."""
    typed = _typed(key)
    if typed is not None and typed.shape in ((), (len(x),)):
        return typed
    what = f"an array {key.dtype}{list(key.shape)}" if hasattr(key, "dtype") else repr(key)
    raise InputError(
        f"key is {what}; give one JAX key, jax.random.key(0), or one for each image, jax.random.split(key, {len(x)})"
    )


def _typed(key) -> Array | None:
    """Typed keys of any shape; None if `key` is neither a key nor a seed."""
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
    """The number of classes of a network, from its output shape (`jax.eval_shape`, which computes nothing).

    None inside a trace, and with `kind` ANYTHING, where the output is not restricted either. Otherwise the output, or
    the first element of a tuple, must be (B, classes). Raises InputError if it is not, and on a network that is not
    callable, is a PyTorch module, or cannot be traced by JAX.
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
    """The target of `count` images, checked, with labels as int32; of a tuple (labels, …) only the first is checked."""
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
    """Rows of class probabilities (B, classes), checked."""
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
