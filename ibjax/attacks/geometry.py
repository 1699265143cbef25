"""Geometry that all attacks share: the threat model (norm, eps, pixel box [0, 1]), projection, step rule and starts.

Images are (B, H, W, C) float32 in [0, 1]; eps is a radius in the same units, one number or one per image (B,).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer

from ibjax.errors import InputError, is_number, nearest

NORMS = ("linf", "l2", "l1")
ALL_NORMS = (*NORMS, "l0")  # l0 counts the pixels that differ in any channel; only attacks made for it take it
# Every published eps for [0, 1] images lies below these bounds; an eps in 0..255 units does not.
_LARGEST_EPS = {"linf": 1.0, "l2": 8.0, "l1": 256.0, "l0": np.inf}
TOLERANCE = 1e-6  # how far rounding may move a pixel in float32; see `tolerance` for distances


def check_norm(norm: Any, allowed: Sequence[str] = NORMS) -> str:
    """The norm's name in NORMS, from any spelling: "linf", "Linf", "L_inf", "inf", np.inf; "l2", "L2", "2", 2; "L1", 1.

    Raises InputError unless the norm is in `allowed`; "l0" is allowed only by attacks that are made for it.
    """
    text = str(norm).lower().replace("_", "").removeprefix("l").removesuffix(".0")
    name = f"l{text}"
    if name not in allowed:
        raise InputError(f"norm '{norm}' is unknown{' here' * (name in ALL_NORMS)}; {nearest(name, allowed)}")
    return name


def fraction(value: "str | float | Array") -> "float | Array":
    """ "8/255" -> 0.0313…; numbers and arrays pass unchanged. Raises InputError on a string that is not a number."""
    if not isinstance(value, str):
        return value
    try:
        numerator, _, denominator = value.partition("/")
        return float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        raise InputError(f"'{value}' is not a number; write a fraction as '8/255' or a decimal as 0.031") from None


def radius(eps: "str | float | Array", norm: str, name: str = "eps") -> "float | Array":
    """`eps` as a number or an array, checked: eps=8 in l_inf is refused, since images lie in [0, 1].

    A 0-d array counts as a number; an array (B,) has one radius per image. The values of arrays are checked only
    outside `jit`.
    """
    norm, eps = check_norm(norm, ALL_NORMS), fraction(eps)
    if isinstance(eps, jax.Array | np.ndarray):
        if eps.ndim > 1 or not eps.size:
            raise InputError(f"{name} has shape {eps.shape}; give one number, or an array (B,), one for each image")
        if isinstance(eps, Tracer):
            return eps
        if eps.ndim == 1:
            for value in (np.min(eps), np.max(eps)):
                radius(value.item(), norm, name)
            eps = jnp.asarray(eps)
            return eps if jnp.issubdtype(eps.dtype, jnp.floating) else eps.astype(float)
        eps = eps.item()
    if not is_number(eps):
        raise InputError(
            f"{name}={eps!r} is no length; give a number, as '8/255', or an array (B,), one for each image"
        )
    if not 0 <= eps < _LARGEST_EPS[norm]:  # NaN and Inf too
        raise InputError(
            f"{name}={eps:g} is outside [0, {_LARGEST_EPS[norm]:g}) for {norm}: images are in [0, 1]; "
            f"write 8 grey levels as '8/255'"
        )
    return float(eps)


def step(step_size: "str | float | Array", norm: str, eps: "float | Array") -> "float | Array":
    """`radius` for a step size. It must be above 0 unless eps is 0, as the attack would never leave its start."""
    length = radius(step_size, norm, "step_size")
    zero = [not isinstance(value, Tracer) and np.any(np.asarray(value) == 0) for value in (length, eps)]
    if zero[0] and not zero[1]:
        raise InputError(f"step_size={step_size} is not allowed; give a length above 0, as '2/255'")
    return length


def one_radius(eps: "str | float", norm: str) -> float:
    """`radius` for attacks that need one concrete number: arrays other than 0-d ones, and tracers, are refused."""
    length = radius(eps, norm)
    if isinstance(length, jax.Array):
        raise InputError("eps is an array; this attack takes one number for all images, as '8/255'")
    return length


def per_image(value: "float | Array", x: Array) -> "float | Array":
    """Reshapes a value per image (B,) so that it broadcasts against x (B, H, W, C); scalars pass unchanged.

    Raises InputError unless there is one value, or one per image.
    """
    if isinstance(value, jax.Array) and value.ndim == 1:
        if value.shape[0] not in (1, x.shape[0]):
            raise InputError(f"{value.shape[0]} lengths are given for {x.shape[0]} images; give one, or one for each")
        return value.reshape((-1,) + (1,) * (x.ndim - 1))
    return value


def finite(gradient: Array) -> Array:
    """The gradient with 0 in place of NaN and infinite entries, which carry no information."""
    return jnp.where(jnp.isfinite(gradient), gradient, 0.0)


def l2_norm(x: Array) -> Array:
    """Euclidean norm of each image, kept broadcastable: (B, 1, 1, 1)."""
    return jnp.sqrt(jnp.sum(x * x, axis=tuple(range(1, x.ndim)), keepdims=True))


def size(delta: Array, norm: str) -> Array:
    """The norm of `delta` for each image, kept broadcastable: (B, 1, 1, 1)."""
    norm, axes = check_norm(norm, ALL_NORMS), tuple(range(1, delta.ndim))
    if norm == "l0":
        return jnp.sum(jnp.any(delta != 0, axis=-1, keepdims=True), axis=axes, keepdims=True).astype(delta.dtype)
    if norm == "linf":
        return jnp.max(jnp.abs(delta), axis=axes, keepdims=True)
    return l2_norm(delta) if norm == "l2" else jnp.sum(jnp.abs(delta), axis=axes, keepdims=True)


def distance(x_adv: Array, x: Array, norm: str) -> Array:
    """The size of the perturbation of each image in `norm`, shape (B,)."""
    delta = x_adv - x
    return size(delta, norm).reshape(-1)


def tolerance(eps: float, shape: Sequence[int]) -> float:
    """How far float32 rounding may leave an image (H, W, C) of a correct attack outside of the ball of radius `eps`.

    At least 1e-6, or 1e-6·eps if eps is above 1. Norms are sums over all pixels, whose rounding error grows with their
    number n: if it is random, to ½·√n·2^−24 of the norm. Where all terms are equal it is not, and noise of random signs
    at ε = 1 in l2 lies 5e-6 outside for 224×224×3 pixels, where ½·√n·2^−24 is 1.2e-5 (CPU). Up to 32×32×3 pixels and ε
    = 0.5 that is less than 1e-6.
    """
    return max(TOLERANCE * max(1.0, eps), eps * math.sqrt(math.prod(shape)) * 2**-25)


def project(x_adv: Array, x: Array, norm: str, eps: "float | Array") -> Array:
    """Π: first onto the eps-ball around x, then onto the box [0, 1].

    Clipping moves every pixel towards x, which is in the box, so the result lies in both. In l1 it is the exact
    projection onto the intersection of ball and box.
    """
    norm, eps = check_norm(norm), per_image(eps, x)
    if norm == "l1":
        return _project_l1(x_adv, x, eps)
    if norm == "linf":
        x_adv = jnp.clip(x_adv, x - eps, x + eps)
    else:
        delta = x_adv - x
        x_adv = x + delta * jnp.minimum(1.0, eps / jnp.maximum(l2_norm(delta), 1e-12))
    return jnp.clip(x_adv, 0.0, 1.0)


def _project_l1(x_adv, x, eps):
    """The nearest point, in Euclidean distance, of { u : ||u − x||_1 ≤ ε, u in [0, 1] } (Croce & Hein 2021).

        u_i = x_i + sign(δ_i) · clip(|δ_i| − λ, 0, room_i)        δ = x_adv − x, room_i: distance of x_i to its bound

    with the smallest λ ≥ 0 that brings u into the ball. ||u − x||_1 decreases with λ, so bisection finds it. The radius
    is reduced by a millionth, so that float32 rounding of the sum does not put u outside the ball.
    """
    delta = x_adv - x
    room, length = jnp.where(delta > 0, 1.0 - x, x), jnp.abs(delta)

    def moved(threshold):
        return jnp.clip(length - threshold, 0.0, room)

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        inside = size(moved(middle), "l1") <= eps * (1 - 1e-6)
        return jnp.where(inside, low, middle), jnp.where(inside, middle, high)

    zero = jnp.zeros_like(delta, shape=(x.shape[0],) + (1,) * (x.ndim - 1))
    _, threshold = lax.fori_loop(0, 40, halve, (zero, size(delta, "linf")))
    threshold = jnp.where(size(moved(zero), "l1") <= eps * (1 - 1e-6), zero, threshold)
    return jnp.clip(x + jnp.sign(delta) * moved(threshold), 0.0, 1.0)


def largest_threshold(holds: Callable[[Array], Array], like: Array) -> Array:
    """The largest number t ≥ 0 for which `holds(t)`, exactly, for each image: (B, 1, 1, 1), of the dtype of `like`.

    It must hold for 0, and for no number beyond one for which it does not. Bisection of the bits of t, which are
    ordered as numbers that are not negative: 31 rounds in float32. It replaces sorts, which take a TPU's compiler
    seconds each and a CPU longer than the rounds.

    Args:
      holds: (B, 1, 1, 1) numbers -> (B, 1, 1, 1) whether.
      like: images (B, H, W, C), float32 or float64.
    """
    bits = jnp.int32 if like.dtype == jnp.float32 else jnp.int64
    zero = jnp.zeros((like.shape[0],) + (1,) * (like.ndim - 1), bits)
    infinite = lax.bitcast_convert_type(jnp.full(zero.shape, jnp.inf, like.dtype), bits)

    def halve(_, bracket):
        low, high = bracket
        middle = low + (high - low) // 2
        held = holds(lax.bitcast_convert_type(middle, like.dtype))
        return jnp.where(held, middle, low), jnp.where(held, high, middle)

    found, _ = lax.fori_loop(0, jnp.iinfo(bits).bits - 1, halve, (zero, infinite))
    threshold = lax.bitcast_convert_type(found, like.dtype)
    return jnp.where(threshold < jnp.finfo(like.dtype).tiny, 0.0, threshold)  # to the processor these are 0


def ascent_direction(gradient: Array, norm: str) -> Array:
    """The unit step of steepest ascent: sign(g) for l_inf, g/||g|| per image for l2."""
    if check_norm(norm, ("linf", "l2")) == "linf":
        return jnp.sign(gradient)
    return gradient / (l2_norm(gradient) + 1e-10)


# ---- starting points ---------------------------------------------------------------------------------------


def draw(sampler: Callable, key: Array, x: Array) -> Array:
    """Noise of x's shape from one key, or image by image from a key per image (B,).

    Evaluation passes a key per image, folded from the image's index, so that neither batch size nor number of devices
    changes the draws.
    """
    if key.ndim == 0:
        return sampler(key, x.shape, x.dtype)
    return jax.vmap(lambda k: sampler(k, x.shape[1:], x.dtype))(key)


def keys_per_image(key: Array, x: Array) -> Array:
    """A key for each image (B,), from one key or as they were given."""
    return jax.random.split(key, x.shape[0]) if key.ndim == 0 else key


def fold(keys: Array, data: "int | Array") -> Array:
    """`jax.random.fold_in` of one number into each key (B,)."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def _none(key, x, norm, eps):
    return x


def _uniform(key, x, norm, eps):
    if norm == "linf":
        return project(_uniform_unclipped(key, x, norm, eps), x, norm, eps)
    # Rice et al.: a Gaussian direction and a radius uniform in [0, eps]
    if key.ndim == 0:
        direction_key, length_key = jax.random.split(key)
        length = jax.random.uniform(length_key, (x.shape[0],), x.dtype)
    else:
        direction_key, length_key = jnp.moveaxis(jax.vmap(jax.random.split)(key), 1, 0)
        length = jax.vmap(lambda k: jax.random.uniform(k, (), x.dtype))(length_key)
    direction = draw(jax.random.normal, direction_key, x)
    direction = direction / (l2_norm(direction) + 1e-10)
    return project(x + direction * per_image(length * eps, x), x, norm, eps)


def _uniform_unclipped(key, x, norm, eps):
    unit = draw(lambda k, s, d: jax.random.uniform(k, s, d, -1.0, 1.0), key, x)
    return x + per_image(eps, x) * unit


def _uniform_projected(key, x, norm, eps):
    return project(_uniform_unclipped(key, x, norm, eps), x, norm, eps)


def _gaussian(key, x, norm, eps):
    return x + 0.001 * draw(jax.random.normal, key, x)


STARTS = {
    "none": _none,  # x itself (FGSM; not for a KL to the clean prediction, whose gradient is zero here)
    "uniform": _uniform,  # in the ball, inside the box (PGD; l2: Gaussian direction × U(0, eps))
    "uniform_unclipped": _uniform_unclipped,  # in the l_inf cube; may lie outside the box (ARD)
    "uniform_projected": _uniform_projected,  # l2: a point of the cube, projected (advertorch)
    "gaussian": _gaussian,  # x + 0.001·N(0, 1), not clipped (TRADES, MART, RSLAD, IBD)
}


def start(key: Array, x: Array, norm: str, eps: "float | Array", init: str) -> Array:
    """The attack's first point, by the rule called `init` in STARTS; `norm` is "linf" or "l2"."""
    return STARTS[init](key, x, check_norm(norm, ("linf", "l2")), eps)


def check_start(init: str) -> None:
    """Raises InputError unless `init` is one of STARTS."""
    if init not in STARTS:
        raise InputError(f"init '{init}' is unknown; {nearest(init, STARTS)}")
