"""Is an attack strong enough for a network? The binarisation test of Zimmermann, Brendel, Tramèr & Carlini, "Increasing
Confidence in Adversarial Robustness Evaluations", NeurIPS 2022.

    python -m ibjax.analysis.binarisation --workdir=DIR [--checkpoint=best] [--attacks=pgd-20,apgd-ce] [--n=64]

For each image x, the last layer is replaced by a readout that has an adversarial image within ε by construction:

    x_i  = x, and points drawn in the ball of radius η·ε around it, i = 0 … inner
    x_b  = a point drawn on the sphere of radius ε; all of them lie in [0, 1]
    w    = argmin ||w||  subject to  <w, φ(x_b) − φ(x_i)> ≥ 1 for all i            φ: the features before the last layer
    f(u) = ( 0, <w, φ(u) − φ(x_b)> + τ )                                           class 1 at x_b, class 0 at all x_i

An attack on f with label 0 should find x_b or another image of class 1. If it succeeds on fewer than 95 % of the
images, the attack is too weak for this network, or gradients are masked: the robust accuracy under it is then no
evidence. Passing the test is necessary, not sufficient. The record also states how often one of `inner` random draws
from the sphere succeeds; if these reach 95 % too, the test is too easy to be informative.

| symbol        | code  | default |
|---------------|-------|---------|
| η             | ETA   | 0.95    |
| points inside | inner | 999     | beside x itself, for one point on the sphere
| τ             | SLACK | 0.01    | of the margin between the two classes

Images whose features no readout separates are left out and counted. With two classes, AutoAttack's DLR loss is
replaced by the margin, and its targeted attacks have one target. A result counts only within ε, in the norm of the
evaluation.

Deviations: the authors' scripts for most of their case studies draw x_b from the corners of the l_inf ball; ours is on
the sphere, in a uniform direction. Their rate of random draws also counts an image whose points inside are adversarial
already. They fit an unpenalised logistic regression, which tends to the readout of largest margin. With one point on
the sphere that readout solves a small problem directly (`readout`). Their class boundary may be as close to φ(x_b) as
0.1 % of the margin; ours is at 1 %, because of rounding in float32.

Guarantees (tests of the same names): the boundary point is adversarial for its own readout; batch size changes no flag.
Writes `binarisation/<checkpoint>.json` in the workdir.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding
from scipy.optimize import nnls
from tqdm import tqdm

from ibjax import losses
from ibjax.analysis import attacked, commands, output
from ibjax.attacks import Attack, geometry
from ibjax.attacks.iterative import as_attack
from ibjax.devices import cluster
from ibjax.errors import InputError, PreemptedError, check_count
from ibjax.evaluation.named import named
from ibjax.evaluation.scoring import percent
from ibjax.net import linen_net, taps, to_float
from ibjax.runs import command_line, run

ETA, SLACK, CRITERION = 0.95, 0.01, 95.0
_SEPARATED = 1e-4  # minimum margin relative to the features' length, well above the rounding of float32
_BINARISATION = 0x62696E  # folded into the seed, then an image's index, then what is drawn
_INNER, _BOUNDARY, _RANDOM, _ATTACK = range(4)


class Found(NamedTuple):
    """The results for each image; the flags are false where no readout separates the features."""

    used: np.ndarray  # (N,) bool: a readout separates the features of the points inside and on the sphere
    broken: dict[str, np.ndarray]  # attack -> (N,) bool: it found an adversarial image within eps
    random: np.ndarray  # (N,) bool: one of `inner` random draws is adversarial
    boundary: np.ndarray  # (N, H, W, C) float32: x_b, adversarial by construction


def binarisation(
    features: Callable,
    variables: Any,
    images: Any,
    attacks: Mapping[str, Attack],
    *,
    norm: str,
    eps: "str | float",
    inner: int = 999,
    seed: int = 0,
    batch_size: int = 64,
    progress: str | None = None,
) -> Found:
    """Finds the images on which each attack succeeds, with readouts that are known to have an adversarial image.

    Args:
      features: φ in evaluation mode, (variables, x (B, H, W, C) in [0, 1]) -> (B, …).
      variables: what `features` takes.
      images: (N, H, W, C), uint8 or float32 in [0, 1]; their labels play no part.
      attacks: {name: (keys, logits_fn, x, y) -> x_adv}; `logits_fn` is called on whole batches in the order of x, since
        each row has its own readout.
      norm, eps: of the ball.
      inner: points drawn inside the ball for each image, and random draws.
      seed: of all draws, with the image's index.
      batch_size: images at once, on all devices together.
      progress: show a bar with this name, and stop at a preemption notice with PreemptedError.

    Raises InputError on an invalid eps or count, and on features that are not finite.
    """
    norm, radius = geometry.check_norm(norm), geometry.one_radius(eps, norm)
    if not radius > 0:
        raise InputError(f"eps={eps} is not allowed; give a radius above 0, as '8/255'")
    check_count("inner", inner)
    check_count("batch_size", batch_size)
    mesh, total = cluster.mesh(), len(images)
    size = cluster.rounded_up(min(batch_size, total), mesh.size)
    rows, place = cluster.parts_of_batch(mesh, size)
    program = partial(jax.jit, out_shardings=NamedSharding(mesh, cluster.REPLICATED))
    gathered, phi = program(lambda value: value), program(partial(_flat, features))
    score = program(lambda *at: _logits(features, *at)[:, 1])
    attacked = {name: program(partial(_broken, attack, features, norm, radius)) for name, attack in attacks.items()}

    def batch(first):
        index, count = (first + rows).astype(np.int32), min(size, total - first)
        x = place(np.asarray(to_float(images[np.minimum(index, total - 1)])))  # the padding repeats the last image
        keys = _keys(np.uint32(seed), place(index))
        inside = partial(_draw, in_ball, norm, keys, x, ETA * radius, _INNER)
        sphere = partial(_draw, on_sphere, norm, keys, x, radius)

        x_b = sphere(_BOUNDARY, 0)
        anchor = np.asarray(phi(variables, x_b))
        # one at a time: on CPUs, several running programs with all-gathers would wait for each other
        around = [np.asarray(phi(variables, inside(number))) for number in range(inner)]
        w, separated = _readouts(anchor, np.stack([np.asarray(phi(variables, x)), *around], 1), count)
        behind = (variables, place(w[rows]), place(anchor[rows]))  # the network and each image's readout
        used = separated & (np.asarray(score(*behind, x)) < 0) & (np.asarray(score(*behind, x_b)) > 0)
        random = np.zeros(size, bool)
        for number in range(inner):
            random |= np.asarray(score(*behind, sphere(_RANDOM, number))) > 0
        broken = {}
        for name, attack in attacked.items():
            if progress and cluster.preempted():
                raise PreemptedError(f"stopped during {progress}")
            broken[name] = used & np.asarray(attack(*behind, keys, x))
        found = Found(used, broken, used & random, np.asarray(gathered(x_b)))
        return jax.tree.map(lambda value: value[:count], found)

    starts = tqdm(range(0, total, size), desc=progress, unit="batch", disable=not (progress and sys.stderr.isatty()))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *map(batch, starts))


# ---- the network behind a readout ------------------------------------------------------------------------------


def _flat(features, variables, x):
    return features(variables, x).reshape(len(x), -1)


def _logits(features, variables, w, anchor, x):
    """f(x), where each row has its own readout; x must therefore be a whole batch in its order."""
    score = jnp.sum(w * (_flat(features, variables, x) - anchor), axis=1) + SLACK
    return jnp.stack([jnp.zeros_like(score), score], axis=1)


def _broken(attack, features, norm, radius, variables, w, anchor, keys, x):
    """(B,) bool: the attack's result lies within the radius and in [0, 1], and is of class 1."""
    shown, label = partial(_logits, features, variables, w, anchor), jnp.zeros(len(x), jnp.int32)
    x_adv = attack(geometry.fold(keys, _ATTACK), shown, x, label)
    in_box = jnp.all((x_adv >= 0) & (x_adv <= 1), axis=(1, 2, 3))  # NaN fails
    within = geometry.distance(x_adv, x, norm) <= radius + geometry.tolerance(radius, x.shape[1:])
    return in_box & within & ~losses.correct(shown(x_adv), label)


# ---- the readouts --------------------------------------------------------------------------------------------


def readout(anchor: np.ndarray, inside: np.ndarray) -> np.ndarray | None:
    """The shortest w (D,) with <w, anchor − φ> ≥ 1 for each row φ of `inside` (inner, D); None where there is none.

    This is the least distance problem of Lawson & Hanson, "Solving Least Squares Problems", 1974, ch. 23, with
    d_i = anchor − φ_i:

        r = (Σ u_i d_i, Σ u_i − 1),   u = argmin_{u ≥ 0} ||r||²          w = −r_{1…D} / r_{D+1}

    1 / ||w|| is the distance from the anchor to the convex hull of `inside`. It is 0 where the anchor lies in the hull,
    and then r = 0. A distance as small as rounding errors is treated as 0.
    """
    d = (anchor - inside.astype(np.float64)).T  # (D, inner)
    scale = float(np.linalg.norm(d, axis=0).max())
    if scale <= _SEPARATED * np.linalg.norm(anchor):
        return None
    system, wanted = np.vstack([d / scale, np.ones(d.shape[1])]), np.zeros(len(d) + 1)
    wanted[-1] = 1
    try:
        u, _ = nnls(system, wanted, maxiter=10 * d.shape[1])
    except RuntimeError:  # no convergence
        return None
    r = system @ u - wanted
    if r[-1] > -1e-12:
        return None
    w = -r[:-1] / r[-1] / scale
    separated = (w @ d).min() > 0.99 and _SEPARATED * np.linalg.norm(anchor) * np.linalg.norm(w) < 1
    return w if separated else None


def _readouts(anchor, inside, count):
    """(w (B, D) float32, separated (B,) bool) of the first `count` rows; all other rows are zero."""
    if not (np.all(np.isfinite(inside)) and np.all(np.isfinite(anchor))):
        raise InputError("the network's features are NaN or infinite within eps; mend the network first")
    found = [readout(anchor[row], inside[row]) for row in range(count)]
    found += [None] * (len(anchor) - count)
    w = np.stack([np.zeros(anchor.shape[1]) if one is None else one for one in found]).astype(np.float32)
    return w, np.array([one is not None for one in found])


# ---- points around an image ------------------------------------------------------------------------------------


@jax.jit
def _keys(seed, index):
    """A key for each image, from its index."""
    key = jax.random.fold_in(jax.random.key(seed), _BINARISATION)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


@partial(jax.jit, static_argnums=(0, 1))
def _draw(sampler, norm, keys, x, radius, purpose, number):
    return sampler(geometry.fold(geometry.fold(keys, purpose), number), x, norm, radius)


_DIRECTIONS = {
    "linf": lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -1.0, 1.0),
    "l2": jax.random.normal,
    "l1": jax.random.laplace,
}  # divided by their norm: the directions of points that are uniform in the ball


def in_ball(keys: Array, x: Array, norm: str, radius: float) -> Array:
    """A point for each image (B, H, W, C), uniform in the ball of `radius` around it, clipped to [0, 1]."""
    dimensions = x[0].size
    share = jax.vmap(lambda key: jax.random.uniform(key, (), x.dtype))(geometry.fold(keys, 1)) ** (1 / dimensions)
    return jnp.clip(x + geometry.per_image(radius * share, x) * _direction(keys, x, norm), 0.0, 1.0)


def on_sphere(keys: Array, x: Array, norm: str, radius: float) -> Array:
    """A point for each image, in [0, 1] and at distance `radius`, on a random ray from the image that is clipped.

    The distance grows along the clipped ray, so bisection finds the point. Where clipping stops the ray before it
    reaches the radius, the point is the end of the ray.
    """
    direction = _direction(keys, x, norm)

    def at(length):
        return jnp.clip(x + length * direction, 0.0, 1.0)

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        within = geometry.size(at(middle) - x, norm) <= radius
        return jnp.where(within, middle, low), jnp.where(within, high, middle)

    zero = jnp.zeros_like(x, shape=(len(x),) + (1,) * (x.ndim - 1))
    low, _ = lax.fori_loop(0, 40, halve, (zero, zero + 16 * radius))
    return at(low)


def _direction(keys, x, norm):
    direction = geometry.draw(_DIRECTIONS[norm], geometry.fold(keys, 0), x)
    return direction / jnp.maximum(geometry.size(direction, norm), 1e-12)


# ---- of a run ------------------------------------------------------------------------------------------------


def attack_of(name: str, *, norm: str, eps: "str | float", step_size: "str | float") -> tuple[Attack, list[str]]:
    """(attack, warnings) of a name of `evaluation/named.py`, for two classes; InputError if it needs features."""
    chosen = named(name)
    if chosen.features is not None:
        raise InputError(f"attack '{name}' climbs features or losses of the whole network; give one on logits alone")
    if chosen.make is not None:
        return chosen.make(norm=norm, eps=eps, step_size=chosen.step_size(eps, step_size)), []
    if chosen.settings["version"] == "rand":
        raise InputError(f"attack '{name}' is for random networks, the test for deterministic ones; give 'autoattack'")
    plan, warnings = chosen.parts(norm, eps, 2)
    return _in_turn([as_attack(part) for part in plan.values()]), warnings


def _in_turn(attacks):
    """Runs attacks in turn; the result for an image is the first success, or x where all attacks fail."""

    def attack(keys: Array, logits_fn: Callable, x: Array, y: Array) -> Array:
        x_adv = x
        for number, part in enumerate(attacks):
            robust = losses.correct(logits_fn(x_adv), y)
            x_adv = jnp.where(geometry.per_image(robust, x), part(geometry.fold(keys, number), logits_fn, x, y), x_adv)
        return x_adv

    return attack


def features_of(model: nn.Module, input_shape: Sequence[int]) -> Callable:
    """φ of a network in float32, the input of its last layer: `mu` of a stochastic network, else `pre_logits`."""
    predict = linen_net(run.in_float32(model)).predict
    found = taps(model, input_shape)
    tap = next((name for name in ("mu", "pre_logits") if name in found), None)
    if tap is None:
        raise InputError("this network has no feature 'pre_logits' or 'mu' to put a readout on; the test needs one")
    return lambda variables, x: predict(variables, x)[1][tap]


def evaluate(
    workdir: Path,
    checkpoint: str = "best",
    *,
    attacks: Sequence[str] | None = None,
    n: int = 64,
    inner: int = 999,
) -> dict[str, Any]:
    """Tests attacks on a run; writes and returns the record, rates in percent of the images used.

    attacks: replace those of the run's `evaluate` section, which sets norm, eps and step size.
    n, inner: numbers of test images, and of points inside the ball around each.
    """
    trained, settings, split = attacked.load(workdir, checkpoint, attacks=attacks, n=n)
    lengths = {key: settings[key] for key in ("norm", "eps", "step_size")}
    prepared = {name: attack_of(name, **lengths) for name in settings["attacks"]}
    features = features_of(trained.model, trained.facts["input_shape"])
    found = binarisation(
        features, trained.variables, split.images, {name: attack for name, (attack, _) in prepared.items()},
        norm=settings["norm"], eps=settings["eps"], inner=inner, seed=trained.config.seed,
        batch_size=settings["batch_size"], progress="binarisation",
    )  # fmt: skip
    if not found.used.any():
        raise InputError(
            f"no readout separates a point at distance eps from {inner} inside, on any of {n} images: the test can say "
            f"nothing; give fewer with --inner, and look whether the features change within eps at all"
        )
    random = percent(found.random[found.used])
    success = {name: percent(found.broken[name][found.used]) for name in prepared}
    record = {
        **run.origin(trained, checkpoint),
        "dataset": trained.facts["label"],
        "n": n,
        "used": int(found.used.sum()),
        **lengths,
        "inner": inner,
        "eta": ETA,
        "slack": SLACK,
        "random_asr": random,
        "asr": success,
        "verdict": {name: verdict(value, random) for name, value in success.items()},
        "attack_settings": {name: named(name).settings for name in prepared},
        "warnings": [text for _, warnings in prepared.values() for text in warnings],
    }
    output.record(workdir / "binarisation", checkpoint, record)
    return record


def verdict(success: float, random: float) -> str:
    """The conclusion from the success rates of an attack and of random draws, in percent."""
    if success < CRITERION:
        return "fails"
    return "passes" if random < CRITERION else "too easy"


def lines(record: dict[str, Any]) -> Iterable[str]:
    """The record as a Markdown table."""
    yield (
        f"{record['title']} on {record['dataset']}: binarisation test, {record['norm']} eps {record['eps']}, "
        f"{record['inner']} points inside, {record['used']} of {record['n']} images used, percent"
    )
    yield "| attack | success | random draws | test |"
    yield "|---|---|---|---|"
    for name, value in record["asr"].items():
        row = f"{value:.2f} | {record['random_asr']:.2f} | {record['verdict'][name]}"
        yield f"| {name} | {row} |"
    yield from record["warnings"]


def main() -> None:
    """The command line of this module."""
    parser = command_line.of_run("ibjax.analysis.binarisation", __doc__)
    command_line.add_attacks(parser)
    commands.add_n(parser, 64)
    parser.add_argument("--inner", type=int, default=999, help="points inside the ball, of each image")
    given = parser.parse_args()

    def measure():
        return evaluate(given.workdir, given.checkpoint, attacks=given.attacks, n=given.n, inner=given.inner)

    commands.conduct(given, measure, lines)


if __name__ == "__main__":
    main()
