"""Auto-PGD: Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks", ICML 2020; in l1: "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers", ICML 2021.

    u       = Π( x_t + η · direction(∇L(x_t)) )                               direction: sign(g), g/||g||_2
    x_{t+1} = Π( x_t + a·(u − x_t) + (1 − a)·(x_t − x_{t−1}) )                a = 0.75, in the first step 1

At a checkpoint, k steps after the last one, η is halved and the search continues from the point of largest loss if

    #{ steps since the last checkpoint with L(x_t) > L(x_{t−1}) } ≤ 0.75·k     or
    η was not halved at the last checkpoint, and the largest loss has not risen since.

| symbol       | code     | default |
|--------------|----------|---------|
| L            | loss     | "ce"    | "dlr", "margin"; "dlr_targeted" and "margin_targeted" attack 9 classes in turn
| N_iter       | steps    | 100     | checkpoints after 22, 41, 57, 70, 80, 87, 93, 99 steps
| η            |          | 2·eps   |
| N_restarts   | restarts | 1       |

In l1 there is no momentum. A step has l1 length η and moves only the share `top` of the pixels with the largest
gradient; Π projects onto the intersection of ball and box. Every 0.04·N_iter steps, with s = ||x_best − x||_0 and D
pixel values: top = s / (1.5·D); if s fell below 0.95 of its last value, η = eps and the search continues from x_best;
else η is divided by 1.5, down to eps/10. With `larger_eps` the search uses the radii 3·eps, 2·eps and eps in turn, for
0.3, 0.3 and 0.4 of the steps.

This file follows the authors' code where it differs from the paper:
- the first checkpoint uses 0 in place of the loss before the first step;
- at the first checkpoint the second condition never holds;
- the attack returns the latest misclassified iterate, not the one of largest loss;
- after a return to x_best the momentum term is x_best − x_{t−1}.

Guarantees (tested in `tests/test_apgd.py`): x_adv lies in the eps-ball and in [0, 1]; an image that is
misclassified without attack, or that the attack does not break, is returned unchanged; each image's result is
independent of the others in its batch.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ibjax import losses
from ibjax.attacks import Attack, geometry
from ibjax.attacks.iterative import UNTARGETED, Iterative, as_attack
from ibjax.errors import InputError, check_count, nearest

LOSSES = {"ce": losses.cross_entropy, "dlr": losses.dlr, "margin": losses.margin}
TARGETED_LOSSES = {"dlr_targeted": losses.dlr_targeted, "margin_targeted": losses.margin_targeted}
FEWEST_CLASSES = {"dlr": 3, "dlr_targeted": 4}  # their denominators contain the third and fourth largest logit
# losses whose attacks are one program: the first where there is no target class, the last where there is one
_TOGETHER = (("ce", "dlr_targeted"), ("margin", "margin_targeted"), ("dlr",))
_RHO, _MOMENTUM = 0.75, 0.75


def apgd(
    *,
    loss: str = "ce",
    norm: str = "linf",
    eps: "str | float" = "8/255",
    steps: int = 100,
    restarts: int = 1,
    targets: int = 9,
    larger_eps: bool = False,
    eot: int | None = None,
) -> Attack:
    """An attack `(key, logits_fn, x, y) -> x_adv`.

    Args:
      loss: "ce", "dlr", "margin"; or "dlr_targeted", "margin_targeted".
      norm: "linf", "l2" or "l1".
      eps: radius in [0, 1] pixel units, as "8/255" or a float.
      steps: gradient steps of each run.
      restarts: number of runs, each from another start and on the images that are not broken yet.
      targets: with a targeted loss, the number of target classes, from the second largest clean logit down.
      larger_eps: in l1, start with the radius 3·eps.
      eot: number of samples that a gradient is averaged over; `logits_fn` then takes `(x, keys)`, a key per image.

    Returns:
      The attack. `x` is (B, H, W, C) in [0, 1], `y` labels (B,), `key` one key or one per image.

    Raises:
      InputError: an unknown loss or norm, an invalid eps, or a number out of range.
    """
    return as_attack(iterative_apgd(loss, norm, eps, steps, restarts, targets, larger_eps, eot))


class State(NamedTuple):
    """The state of a run; images are (B, H, W, C), numbers (B,)."""

    keys: Array
    x: Array  # x_t
    x_before: Array  # x_{t−1}
    x_found: Array  # latest misclassified iterate
    found: Array  # whether an iterate was misclassified
    flat: Array  # whether the gradient at the first point was zero or not finite
    x_best: Array  # the iterate of largest loss
    gradient_best: Array
    loss_best: Array
    loss_checked: Array  # loss_best at the last checkpoint
    loss_before: Array
    rises: Array  # number of steps since the last checkpoint that increased the loss
    halved: Array  # whether the last checkpoint halved the step
    step_size: Array
    top: Array  # l1: share of the pixels that a step changes
    nonzero: Array  # l1: ||x_best − x||_0 at the last checkpoint


def iterative_apgd(
    loss: str,
    norm: str,
    eps: "str | float",
    steps: int = 100,
    restarts: int = 1,
    targets: int = 9,
    larger_eps: bool = False,
    eot: int | None = None,
) -> Iterative:
    """APGD as an `Iterative`, for the runner; arguments as in `apgd`."""
    norm, largest = geometry.check_norm(norm), geometry.one_radius(eps, norm)
    if loss not in LOSSES and loss not in TARGETED_LOSSES:
        raise InputError(f"apgd's loss '{loss}' is unknown; {nearest(loss, [*LOSSES, *TARGETED_LOSSES])}")
    if larger_eps and norm != "l1":
        raise InputError(f"larger_eps is the schedule of l1; the norm is {norm}")
    for name, value in dict(steps=steps, restarts=restarts, targets=targets, eot=eot).items():
        if value is not None or name != "eot":
            check_count(f"apgd's {name}", value)
    if larger_eps and steps < 2:
        raise InputError(f"apgd's steps={steps} is not allowed with larger_eps; give at least 2")
    stages = larger_eps_stages(largest, steps) if larger_eps else [(largest, steps)]
    together = next(names for names in _TOGETHER if loss in names)
    init, step, x_adv, best = _functions(together, norm, tuple(stages), larger_eps, eot)

    def check(classes):
        if classes < FEWEST_CLASSES.get(loss, 0):
            raise InputError(
                f"apgd's loss '{loss}' needs {FEWEST_CLASSES[loss]} classes, there are {classes}; give "
                f"loss='{loss.replace('dlr', 'margin')}'"
            )

    targets = targets if loss in TARGETED_LOSSES else 0
    return Iterative(
        "apgd", norm, largest, init, step, sum(n + 1 for _, n in stages), x_adv, flat=_flat, restarts=restarts,
        targets=targets, eot=eot, settings=dict(loss=loss, larger_eps=larger_eps), best=best if eot else None,
        ends=_ends, check=check,
    )  # fmt: skip


def _flat(state):
    return state.flat


def _ends(x, state):
    return state.x_best, state.x


@functools.lru_cache(maxsize=64)
def _functions(together, norm, stages, larger_eps, eot):
    """(init, step, x_adv, best) of an `Iterative` for some losses; the same functions for the same arguments."""
    # one row per evaluation of the network: a stage of n steps has n + 1
    radii = np.concatenate([np.full(n + 1, stage_eps) for stage_eps, n in stages]).astype(np.float32)
    first = np.concatenate([np.arange(n + 1) == 0 for _, n in stages])
    windows = np.concatenate([checkpoint_windows(n, norm) for _, n in stages])
    gradient_of = _gradient(together, eot)

    def init(keys, restart, x, y):
        x_start = jnp.clip(_start(keys, x, norm, radii[0]), 0.0, 1.0)
        number, flag, image = jnp.zeros(x.shape[0]), jnp.zeros(x.shape[0], bool), jnp.zeros_like(x)
        blank = dict.fromkeys(State._fields, number)  # the first evaluation sets most fields
        blank |= dict.fromkeys(("found", "flat", "halved"), flag) | dict.fromkeys(("x_best", "gradient_best"), image)
        return State(**blank | dict(keys=keys, x=x_start, x_before=x_start, x_found=x, rises=number.astype(jnp.int32)))

    def step(i, logits_fn, x, y, other, state, exact=None):  # it never stops at an image
        radius, is_first, window = (jnp.asarray(table)[i] for table in (radii, first, windows))
        if larger_eps:  # each stage begins at the best point of the stage before
            restart = jnp.where(i == 0, state.x, state.x_best)
            state = state._replace(x=jnp.where(is_first, geometry.project(restart, x, norm, radius), state.x))
        logits, loss_now, gradient = gradient_of(i, logits_fn, state.x, y, other, state.keys)
        loss_now = jnp.where(jnp.isnan(loss_now), -jnp.inf, loss_now)  # else no later loss compares as larger
        unusable = jnp.all((gradient == 0) | ~jnp.isfinite(gradient), axis=(1, 2, 3))
        gradient = geometry.finite(gradient)
        state = _note(state, is_first, ~losses.correct(logits, y), loss_now, gradient, unusable)
        if norm == "l1":
            state, gradient = _check_l1(state, x, gradient, radius, is_first, window, whole_image=not larger_eps)
        else:
            state, gradient = _check(state, gradient, radius, is_first, window)
        return _move(state, x, gradient, norm, radius, is_first)

    def x_adv(x, state):
        return jnp.where(geometry.per_image(state.found, x), state.x_found, x)

    def best(x, state):  # correct samples at every iterate do not prove robustness
        return jnp.where(geometry.per_image(state.found, x), state.x_found, state.x_best)

    return init, step, x_adv, best


def larger_eps_stages(eps: float, steps: int) -> list[tuple[float, int]]:
    """(eps, steps) of the three stages in l1: 3·eps, 2·eps, eps for 0.3, 0.3, 0.4 of the steps."""
    early = math.ceil(0.3 * steps)
    return [(3 * eps, early), (2 * eps, early), (eps, steps - 2 * early)]


def checkpoint_windows(steps: int, norm: str) -> np.ndarray:
    """For each step t = 0 … steps, k if a checkpoint follows it, else 0: (steps + 1,) int32."""
    if norm == "l1":
        size, shrink, least = max(int(0.04 * steps), 1), 0, 1
    else:
        size, shrink, least = (max(int(part * steps), 1) for part in (0.22, 0.03, 0.06))
    windows, t = np.zeros(steps + 1, np.int32), size
    while t <= steps:
        windows[t] = size
        size = max(size - shrink, least)
        t += size
    return windows


def _start(keys, x, norm, eps):
    """A point on the surface of the ball, not clipped; in l1, Gaussian noise projected onto ball and box."""
    if norm == "linf":
        t = geometry.draw(lambda k, s, d: jax.random.uniform(k, s, d, -1.0, 1.0), keys, x)
        return x + eps * t / (geometry.size(t, "linf") + 1e-12)
    t = geometry.draw(jax.random.normal, keys, x)
    if norm == "l2":
        return x + eps * t / (geometry.l2_norm(t) + 1e-12)
    return geometry.project(x + t, x, norm, eps)


def _gradient(together, eot):
    """(i, logits_fn, x, y, other, keys) -> (logits, loss (B,), gradient); the gradient is the mean of `eot` samples."""

    def climbed(logits, y, other):
        """(loss (B,), its slope (B, classes)): of each image those of its own loss alone, to the bit."""

        def of(name):
            arguments = (y, jnp.maximum(other, 0)) if name in TARGETED_LOSSES else (y,)
            loss = (LOSSES | TARGETED_LOSSES)[name]
            value, pull_back = jax.vjp(lambda logits: loss(logits, *arguments), logits)
            return value, pull_back(jnp.ones_like(value))[0]  # images do not depend on each other

        # a loss without enough classes has no attack here: `Iterative.check` refuses it
        made = [of(name) for name in together if logits.shape[-1] >= FEWEST_CLASSES.get(name, 0)]
        plain = other == UNTARGETED
        (loss, slope), (loss_targeted, slope_targeted) = made[0], made[-1]
        return jnp.where(plain, loss, loss_targeted), jnp.where(plain[:, None], slope, slope_targeted)

    def at(logits_fn, x, y, other):
        logits, pull_back = jax.vjp(logits_fn, x)
        per_image, slope = climbed(logits, y, other)
        return logits, per_image, pull_back(slope)[0]

    def mean(i, logits_fn, x, y, other, keys):
        if eot is None:
            return at(logits_fn, x, y, other)
        keys = geometry.fold(keys, i)

        def sample(j, before):
            logits, per_image, gradient = at(lambda x: logits_fn(x, geometry.fold(keys, j)), x, y, other)
            return logits, per_image, before[2] + gradient / eot  # logits and loss are the last sample's

        shapes = jax.eval_shape(sample, 0, (None, None, x))
        return lax.fori_loop(0, eot, sample, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))

    return mean


def _note(state, is_first, wrong, loss_now, gradient, unusable):
    """Updates the state with the evaluation at x_t; the first evaluation of a stage resets the earlier records."""
    better = is_first | (loss_now > state.loss_best)
    pick = geometry.per_image(better, gradient)
    latest = geometry.per_image(wrong, gradient)
    loss_best = jnp.where(better, loss_now, state.loss_best)
    return state._replace(
        x_found=jnp.where(latest, state.x, state.x_found),
        found=wrong | (state.found & ~is_first),
        flat=jnp.where(is_first, unusable, state.flat),
        x_best=jnp.where(pick, state.x, state.x_best),
        gradient_best=jnp.where(pick, gradient, state.gradient_best),
        loss_best=loss_best,
        loss_checked=jnp.where(is_first, loss_best, state.loss_checked),
        loss_before=jnp.where(is_first, 0.0, loss_now),  # 0: in the authors' code, the last, unset entry of the buffer
        rises=jnp.where(is_first, 0, state.rises + (loss_now > state.loss_before).astype(jnp.int32)),
        halved=is_first | state.halved,
    )


def _check(state, gradient, eps, is_first, window):
    """l_inf and l2: at a checkpoint (window > 0), halves the step size of the images that do not progress."""
    few_rises = state.rises.astype(jnp.float32) <= _RHO * window.astype(jnp.float32)
    stuck = few_rises | (~state.halved & (state.loss_checked >= state.loss_best))
    at_checkpoint = window > 0
    halve = at_checkpoint & stuck
    step_size = jnp.where(is_first, 2 * eps, state.step_size * jnp.where(halve, 0.5, 1.0))
    pick = geometry.per_image(halve, gradient)
    state = state._replace(
        x=jnp.where(pick, state.x_best, state.x),
        loss_checked=jnp.where(at_checkpoint, state.loss_best, state.loss_checked),
        rises=jnp.where(at_checkpoint, 0, state.rises),
        halved=jnp.where(at_checkpoint, stuck, state.halved),
        step_size=step_size,
    )
    return state, jnp.where(pick, state.gradient_best, gradient)


def _check_l1(state, x, gradient, eps, is_first, window, whole_image):
    """l1: at a checkpoint, adapts the share of pixels and the step size to the sparsity of the best perturbation."""
    pixels = math.prod(x.shape[1:])
    nonzero = jnp.sum((state.x_best != x).reshape(x.shape[0], -1), 1).astype(jnp.float32)
    sparser = nonzero < 0.95 * state.nonzero
    step_size = jnp.where(sparser, eps, jnp.maximum(state.step_size / 1.5, eps / 10))
    again = (window > 0) & sparser
    top = nonzero / pixels / 1.5
    first_nonzero, first_top = (pixels, 0.2) if whole_image else (nonzero, top)

    def choose(first, checked, before):
        return jnp.where(is_first, first, jnp.where(window > 0, checked, before))

    pick = geometry.per_image(again, gradient)
    state = state._replace(
        x=jnp.where(pick, state.x_best, state.x),
        step_size=choose(eps, step_size, state.step_size),
        top=choose(first_top, top, state.top),
        nonzero=choose(first_nonzero, nonzero, state.nonzero),
    )
    return state, jnp.where(pick, state.gradient_best, gradient)


def _move(state, x, gradient, norm, eps, is_first):
    """The step from x_t to x_{t+1}."""
    eta = geometry.per_image(state.step_size, x)
    if norm == "l1":
        direction = _sparse_sign(gradient, state.top)
        moved = geometry.project(state.x + eta * direction, x, norm, eps)
    else:
        a = jnp.where(is_first, 1.0, _MOMENTUM)
        direction = jnp.sign(gradient) if norm == "linf" else gradient / (geometry.l2_norm(gradient) + 1e-12)
        u = geometry.project(state.x + eta * direction, x, norm, eps)
        moved = state.x + a * (u - state.x) + (1 - a) * (state.x - state.x_before)
        moved = geometry.project(moved, x, norm, eps)
    # x_before is the iterate before this step, even if a checkpoint has just replaced x_t by x_best
    return state._replace(x=moved, x_before=state.x)


def _sparse_sign(gradient, top):
    """The signs of the share `top` (B,) of gradient entries that are largest, scaled to l1 norm 1."""
    size, axes = jnp.abs(gradient), tuple(range(1, gradient.ndim))
    pixels = gradient.size // len(gradient)
    smaller = geometry.per_image(jnp.clip((1.0 - top) * pixels, 0, pixels - 1).astype(jnp.int32), gradient)
    fewer = lambda t: jnp.sum(size < t, axes, keepdims=True, dtype=jnp.int32) <= smaller  # noqa: E731
    least = geometry.largest_threshold(fewer, gradient)
    sign = jnp.where(size >= least, jnp.sign(gradient), 0.0)
    return sign / (geometry.size(sign, "l1") + 1e-10)
