"""AutoAttack: Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks", ICML 2020; in l1: "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers", ICML 2021.

    robust_0 = { images that are classified correctly }
    robust_j = { images of robust_{j−1} that the j-th attack does not break }          in the order of the version

| version    | attacks                                                              |
|------------|----------------------------------------------------------------------|
| "standard" | apgd-ce, apgd-t (9 targets), fab-t (9 targets), square (5000 queries) |
| in l1      | apgd-ce with 5 restarts and apgd-t with 5 targets, both from 3·eps; fab-t, square |
| "plus"     | apgd-ce × 5, apgd-dlr × 5, fab × 5, square, apgd-t, fab-t             |
| "rand"     | apgd-ce, apgd-dlr; gradients are means over 20 samples               |

APGD and FAB take 100 steps. There are never more targets than other classes, and a target is only tried on the images
that are not broken yet. Where there are too few classes for DLR, the margin stands in for it and a warning says so.

Differences from the authors' code, in what is drawn only: every image draws from its own key, folded from the attack's
name and the image's index, so that batches, devices and interruptions change nothing; Square draws a square per image,
not per batch (see square.py).

Guarantees (tests of the same names): on a linear network robust means that the margin exceeds eps, in every norm;
neither batch size nor number of devices changes a flag; killed and run again it ends with the same flags and images, on
the same devices; every x_adv lies in the eps-ball and in [0, 1] to 1e-6.
"""

import json
import logging
import sys
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from ibjax import cluster
from ibjax.attacks import checks, entrance, geometry
from ibjax.attacks.apgd import FEWEST_CLASSES, iterative_apgd
from ibjax.attacks.fab import iterative_fab
from ibjax.attacks.iterative import Iterative, other_classes
from ibjax.attacks.runner import Runner, passes
from ibjax.attacks.square import iterative_square
from ibjax.checkpoint import digest
from ibjax.errors import InputError, PreemptedError, check_count, nearest
from ibjax.run import replacing

log = logging.getLogger(__name__)
SAMPLES = 20  # of a random network, for each gradient of "rand"
_SAVE_SECONDS = 30.0  # between two states on disk


class Result(NamedTuple):
    """Of all images, in their order; host arrays."""

    x_adv: np.ndarray  # (N, H, W, C) float32; the image itself where it is robust, or wrong as it is
    robust: np.ndarray  # (N,) bool: classified correctly, and still after every attack
    clean: np.ndarray  # (N,) bool: classified correctly as it is
    robust_after: dict[str, np.ndarray]  # attack -> (N,) bool: still robust after this and all attacks before it
    seconds: dict[str, float]  # attack -> wall-clock time, compilation included
    warnings: list[str]


def sub_attacks(
    version: str, norm: str, eps: "str | float", num_classes: int, attacks: Sequence[str] | None = None
) -> tuple[dict[str, Iterative], list[str]]:
    """({name: attack}, warnings) of a version, or of the names in `attacks` with the version's settings.

    Raises InputError on an unknown version, name or norm.
    """
    warnings: list[str] = []
    restarts, targets, eot, larger_eps = 1, 9, None, False
    norm, eps = geometry.check_norm(norm), geometry.one_radius(eps, norm)
    if version not in _VERSIONS:
        raise InputError(f"AutoAttack's version '{version}' is unknown; {nearest(version, _VERSIONS)}")
    if version == "standard" and norm == "l1":
        restarts, targets, larger_eps = 5, 5, True
    if version == "plus":
        restarts = 5
    if version == "rand":
        eot = SAMPLES

    def apgd(name, loss, restarts, targets):
        if num_classes < FEWEST_CLASSES.get(loss, 0):
            instead = loss.replace("dlr", "margin")
            warnings.append(
                f"{name}: DLR needs {FEWEST_CLASSES[loss]} classes, there are {num_classes}: {instead} used"
            )
            loss = instead
        return iterative_apgd(loss, norm, eps, 100, restarts, targets, larger_eps, eot)

    make = {
        "apgd-ce": lambda name: apgd(name, "ce", restarts, 1),
        "apgd-dlr": lambda name: apgd(name, "dlr", restarts, 1),
        "apgd-t": lambda name: apgd(name, "dlr_targeted", 1, targets),
        "fab": lambda name: iterative_fab(norm, eps, 100, restarts),
        "fab-t": lambda name: iterative_fab(norm, eps, 100, 1, 9),
        "square": lambda name: iterative_square(norm, eps, 5000),
    }
    names = _VERSIONS[version] if attacks is None else tuple(attacks)
    if not names or len(set(names)) < len(names):
        raise InputError(f"attacks={names}: give at least one name, each once")
    for name in names:
        if name not in make:
            raise InputError(f"attack '{name}' is unknown here; {nearest(name, make)}")
        if eot and not name.startswith("apgd"):
            raise InputError(f"attack '{name}' has no form for random networks; 'rand' runs {_VERSIONS['rand']}")
    return {name: make[name](name) for name in names}, warnings


_VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}


def autoattack(
    key: Array,
    logits_fn: Callable,
    x: Any,
    y: Any,
    norm: str = "linf",
    eps: "str | float" = "8/255",
    version: str = "standard",
    *,
    attacks: "Sequence[str] | Mapping[str, Iterative] | None" = None,
    batch_size: int = 256,
    state: "str | Path | None" = None,
    allow_randomized: bool = False,
    progress: str | None = None,
) -> Result:
    """Which images withstand AutoAttack.

    Args:
      key: one JAX key; the same key gives the same result.
      logits_fn: (B, H, W, C) in [0, 1] -> (B, classes), evaluation mode, traceable by JAX: a Flax, Equinox or Haiku
        network, or any function. With version "rand" it takes (x, keys), a key per image, and samples the network.
      x: images (N, H, W, C), float32 in [0, 1].
      y: integer labels (N,).
      norm: "linf", "l2" or "l1".
      eps: radius in pixel units, as "8/255" or a float.
      version: "standard", "plus" or "rand".
      attacks: run these in this order, in place of the version's: names, or {name: attack} with settings of its own, as
        `{"square": iterative_square("linf", "8/255", queries=1000)}`.
      batch_size: images at once, on all devices together.
      state: file that keeps the progress, about every 30 s; with it, the same call goes on where it was ended.
      allow_randomized: attack a network whose answers differ from call to call, which "standard" overestimates.
      progress: show a bar with this name, and stop at a preemption notice with PreemptedError.

    Raises:
      InputError: images not in [0, 1], wrong labels, an eps that is no radius, logits that are no logits, a random
        network, or a state of another evaluation: one line that says what to do.
    """
    norm, eps = geometry.check_norm(norm), geometry.one_radius(eps, norm)
    if not eps > 0:
        raise InputError("eps=0 is not allowed; AutoAttack takes a radius above 0")
    check_count("batch_size", batch_size)
    x, y = checks.images_and_labels(np.asarray(x), np.asarray(y))
    key = entrance.as_key(key, x)
    if key.ndim:
        raise InputError(
            f"key is {key.shape[0]} keys; give one JAX key, jax.random.key(0): AutoAttack folds in each image"
        )
    random = version == "rand"
    entrance.classes_of(logits_fn, x[:64], entrance.ANYTHING, stochastic=random)
    warnings = _check_network(logits_fn, x, y, random, allow_randomized)

    runner = Runner(key, logits_fn, x, y, norm=norm, eps=eps, batch_size=batch_size, randomized=random)
    logits = runner.clean_logits()
    if not np.all(np.isfinite(logits)):
        raise InputError(f"the network returns NaN or Inf for {int(np.sum(~np.isfinite(logits).all(1)))} images")
    if isinstance(attacks, Mapping):
        plan, notes = dict(attacks), []
        _check_plan(plan, norm, eps, random)
    else:
        plan, notes = sub_attacks(version, norm, eps, logits.shape[1], attacks)
    identities = [[name, attack.identity()] for name, attack in plan.items()]
    settings = dict(version=version, attacks=identities, norm=norm, eps=eps, images=digest(x), labels=digest(y))
    settings |= dict(key=runner.key.tolist(), key_kind=str(runner.key_kind))
    found = _Progress(Path(state) if state else None, settings, logits, x, logits.argmax(1) == y)
    _run(runner, plan, logits, found, progress)
    warnings += [*notes, *_gradient_warnings(plan, found.flat)]
    after = dict(zip(plan, found.after, strict=True))
    warnings += _final_checks(runner, found, after)
    seconds = {name: round(value, 2) for name, value in zip(plan, found.seconds[:-1], strict=True)}
    return Result(found.x_adv, found.robust, found.clean, after, seconds, list(dict.fromkeys(warnings)))


def _check_network(logits_fn, x, y, random, allow_randomized):
    """Warnings; raises InputError on a network that cannot be attacked so."""
    if random:
        keys = jax.random.split(jax.random.key(0), len(x[:256]))
        try:
            return checks.network(lambda x: logits_fn(x, keys[: len(x)]), x, y)
        except TypeError as error:
            raise InputError(f"version 'rand' calls logits_fn(x, keys), a key per image: {error}") from None
    warnings = checks.network(logits_fn, x, y)
    if any("randomised" in text for text in warnings) and not allow_randomized:
        raise InputError(
            "the network answers differently from call to call, so that 'standard' would overestimate it; give "
            "version='rand' with logits_fn(x, keys), or allow_randomized=True"
        )
    return warnings


def _check_plan(plan, norm, eps, random):
    """Raises InputError where attacks with settings of their own are not of this evaluation."""
    if not plan:
        raise InputError("attacks={} is not allowed; give at least one, or None for those of the version")
    for name, attack in plan.items():
        if (attack.norm, attack.eps) != (norm, eps):
            raise InputError(
                f"attack '{name}' is made for {attack.norm} and eps={attack.eps:g}, the evaluation for {norm} and "
                f"eps={eps:g}; make them equal"
            )
        if (attack.eot is not None) != random:
            raise InputError(
                f"attack '{name}' has eot={attack.eot}; with version 'rand', and only there, give each attack an eot"
            )


def _run(runner, plan, logits, state, bar_name):
    """All attacks that are not behind yet."""
    others = np.asarray(other_classes(jnp.asarray(logits)))
    for name, attack in list(plan.items())[len(state.after) :]:
        todo = np.nonzero(state.after[-1] if state.after else state.clean)[0]
        total = passes(attack, others) * len(todo)
        bar = tqdm(total=total, initial=min(state.position, total), desc=f"{bar_name or ''} {name}".strip(),
                   unit="run", leave=False, disable=not (bar_name and sys.stderr.isatty()))  # fmt: skip
        with bar:
            bar.set_postfix_str(f"robust {100 * state.robust.mean():.2f} %")
            before, runner.flat = time.perf_counter(), state.flat[-1]
            for position in runner.run(name, attack, todo, others, state.broken, state.x_adv, state.position):
                state.seconds[-1] += time.perf_counter() - before
                before = time.perf_counter()
                bar.update(position - state.position)
                bar.set_postfix_str(f"robust {100 * state.robust.mean():.2f} %")
                state.position, state.flat[-1] = position, runner.flat
                state.save(at_once=False)
                if bar_name and cluster.preempted():
                    state.save()
                    raise PreemptedError(f"stopped during {bar_name}")
        state.finish_attack()
        if bar_name:
            seconds = state.seconds[-2]
            log.info(
                "%s: robust accuracy %.2f %% after %s (%.1f s)", bar_name, 100 * state.robust.mean(), name, seconds
            )


def _gradient_warnings(plan, flat):
    return [
        f"{name}: the gradient is zero or not finite at the start of {count} runs: it may be masked"
        for name, count in zip(plan, flat, strict=False)
        if count
    ]


def _final_checks(runner, state, after):
    """Warnings on the flags, and on the images as the network sees them once more."""
    warnings, accuracy = [], [100 * float(flags.mean()) for flags in (state.clean, *after.values())]
    if "square" in after:
        gain = accuracy[list(after).index("square")] - accuracy[list(after).index("square") + 1]
        if gain > 0.2 and list(after).index("square") > 0:
            warnings.append(f"square lowers robust accuracy by {gain:.2f} points more: gradients may be masked")
    if not runner.randomized:
        again = Runner(
            jax.random.wrap_key_data(runner.key, impl=runner.key_kind), runner.logits_fn, state.x_adv, runner.y,
            norm=runner.norm, eps=runner.eps, batch_size=runner.sizes[-1],
        ).clean_logits()  # fmt: skip
        if not np.all(np.isfinite(again)):
            warnings.append(
                f"the network returns NaN or Inf for {np.sum(~np.isfinite(again).all(1))} adversarial images"
            )
        differing = int(np.sum((again.argmax(1) == runner.y) != state.robust))
        if differing:
            warnings.append(f"{differing} images are classified otherwise when scored again: rounding decides on them")
    return warnings


class _Progress:
    """What has been found so far, and the file that keeps it."""

    def __init__(
        self, file: Path | None, settings: dict[str, Any], logits: np.ndarray, x: np.ndarray, clean: np.ndarray
    ):
        self.file, self.settings, self.x, self.clean = file, settings, x, clean
        self.probe = logits[:64]
        self.x_adv, self.broken = x.copy(), ~clean
        self.after: list[np.ndarray] = []
        self.seconds, self.flat = [0.0], [0]  # of each attack; the last one is under way
        self.position, self.saved = 0, time.monotonic()
        if file is not None and file.exists():
            self._restore(file)

    @property
    def robust(self) -> np.ndarray:
        return ~self.broken

    def finish_attack(self) -> None:
        self.after.append(self.robust)
        self.seconds.append(0.0)
        self.flat.append(0)
        self.position = 0
        self.save()

    def save(self, at_once: bool = True) -> None:
        """Writes the file, whole or not at all; unless `at_once`, only where the last one is half a minute old."""
        if self.file is None or jax.process_index() != 0:
            return
        if not at_once and time.monotonic() - self.saved < _SAVE_SECONDS:
            return
        changed = np.nonzero(self.broken & self.clean)[0]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.file) as temporary, temporary.open("wb") as handle:
            np.savez(
                handle,
                settings=np.array(json.dumps(self.settings, sort_keys=True)),
                probe=self.probe,
                clean=self.clean,
                after=np.array(self.after, bool).reshape(len(self.after), len(self.clean)),
                changed=changed,
                images=self.x_adv[changed],
                seconds=np.array(self.seconds),
                flat=np.array(self.flat),
                position=np.array(self.position),
            )
        self.saved = time.monotonic()

    def _restore(self, file):
        try:
            with file.open("rb") as handle, np.load(handle, allow_pickle=False) as stored:
                found = {name: stored[name] for name in stored.files}
            settings = json.loads(str(found["settings"]))
            wrong = [name for name, value in self.settings.items() if settings.get(name) != value]
            same = found["probe"].shape == self.probe.shape and np.allclose(found["probe"], self.probe, 1e-3, 1e-3)
            if not wrong and not (same and np.array_equal(found["clean"], self.clean)):
                wrong = ["network"]
            if not wrong:
                changed, self.position = found["changed"], int(found["position"])
                self.seconds, self.flat = found["seconds"].tolist(), found["flat"].tolist()
                self.after = [flags.copy() for flags in found["after"]]
                self.x_adv[changed], self.broken[changed] = found["images"], True
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{file} is no state of AutoAttack, or damaged ({error}); delete it") from None
        if wrong:
            raise InputError(
                f"{file} is of another evaluation (its {', '.join(wrong)} differ); delete it or give another file"
            )
