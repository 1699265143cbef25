"""AutoAttack: Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks", ICML 2020; in l1: "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers", ICML 2021.

    robust_0 = { images that are classified correctly }
    robust_j = { images of robust_{j−1} that the j-th attack does not break }          in the order below

| version          | attacks                                                                           |
|------------------|-----------------------------------------------------------------------------------|
| "standard"       | apgd-ce, apgd-t (9 targets), fab-t (9 targets), square (5000 queries)             |
| "standard" in l1 | apgd-ce with 5 restarts and apgd-t with 5 targets, both from 3·eps; fab-t, square |
| "plus"           | apgd-ce × 5, apgd-dlr × 5, fab × 5, square, apgd-t, fab-t                         |
| "rand"           | apgd-ce, apgd-dlr; gradients are means over 20 samples                            |

APGD and FAB take 100 steps. The number of targets is at most the number of other classes, and a target is only tried on
the images that are not broken yet. With too few classes for DLR, the margin loss replaces it and a warning says so.

Gradients and the search for adversarial images use float32 products of `precision`, "high" unless said otherwise: on a
GPU TensorFloat-32, as PyTorch's convolutions. At the end every image and its adversarial image are classified once more
at "highest", and the flags are those of this judgement. An image that was only broken by rounding counts as robust, and
one that was only robust by rounding does not; `Result.changed` says which flags the judgement changed. A network that
draws random numbers in each call, and is attacked with `allow_randomized`, is not judged again.

With `search_dtype="bfloat16"` gradients and candidates come from the network with its products in bfloat16. The network
itself, in float32, classifies every image that an attack reports, the image of largest loss and the last one of each
run, every image at which Square would stop and every step of FAB, so that no number depends on what bfloat16 broke.

Differences from the authors' code:
- The random key of an image is folded from the attack's name and the image's index, so batch size, number of devices
  and interruptions do not change the result.
- Square draws a square per image, not per batch (see square.py).
- An image with NaN logits counts as broken; `argmax` would predict class 0.
- A network whose logits for an image depend on the rest of the batch is refused.

With "rand" the flags follow the authors' definition: an image is broken once a single random draw of the network
misclassifies the clean image or the result of an attack. One draw may be unlucky, so the robust accuracy to report for
a random network is that of `Result.drawn`: mean and standard error over K fresh draws on the adversarial images. To
find these, every attack also runs on images that are already flagged as broken, unless all of K further draws
misclassify them. Of the clean image and the results of all attacks, `x_adv` keeps the one that these draws classify
correctly least often. This does not change the flags.

Guarantees (tests of the same names): on a linear network robust means that the margin exceeds eps, in every norm;
neither batch size nor number of devices changes a flag; an evaluation that was killed and run again on the same devices
ends with the same flags and images; every x_adv lies in [0, 1] and, to rounding (`geometry.tolerance`), in the
eps-ball.
"""

import functools
import hashlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from tqdm import tqdm

from ibjax import files, losses
from ibjax.attacks import autocast, checks, entrance, geometry
from ibjax.attacks.apgd import FEWEST_CLASSES, iterative_apgd
from ibjax.attacks.fab import iterative_fab
from ibjax.attacks.hoist import unjitted
from ibjax.attacks.iterative import Iterative, other_classes
from ibjax.attacks.progress import Progress
from ibjax.attacks.runner import Runner, passes
from ibjax.attacks.sparse_rs import iterative_sparse_rs
from ibjax.attacks.square import iterative_square
from ibjax.devices import cluster, cores
from ibjax.devices import precision as precisions
from ibjax.errors import InputError, PreemptedError, check_count, nearest
from ibjax.files import content_digest

log = logging.getLogger(__name__)
SAMPLES = 20  # samples of a random network for each gradient of "rand"
DRAWS = 20  # draws of a random network for each adversarial image


class Drawn(NamedTuple):
    """How K fresh draws of a random network classify the clean and the adversarial images, one row per draw."""

    clean: np.ndarray  # (K, N) bool: the image is classified correctly
    robust: np.ndarray  # (K, N) bool: the adversarial image is classified correctly

    @property
    def accuracy(self) -> float:
        """Robust accuracy in percent: the mean of `robust` over draws and images."""
        return 100 * float(self.robust.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy over draws (not over images), in percent."""
        return 100 * float(np.std(self.robust.mean(1), ddof=1) / np.sqrt(len(self.robust)))


class Result(NamedTuple):
    """The result for all images in their order, as host arrays.

    With version "rand" the flags are those of one draw of the network for each image and attack, as the authors count;
    `x_adv` has the worst image found for every input, and `drawn.accuracy` is the robust accuracy.
    """

    # (N, H, W, C) float32; except with "rand", x itself if misclassified without attack, or robust and not `changed`
    x_adv: np.ndarray
    robust: np.ndarray  # (N,) bool: classified correctly without attack and after every attack
    clean: np.ndarray  # (N,) bool: classified correctly without attack
    robust_after: dict[str, np.ndarray]  # attack -> (N,) bool: still robust after this and all attacks before it
    seconds: dict[str, float]  # attack -> wall-clock time, compilation included
    warnings: list[str]
    changed: np.ndarray  # (N,) bool: the judgement at "highest" differs from what the attacks saw
    drawn: Drawn | None = None  # with version "rand" only


def sub_attacks(
    version: str,
    norm: str,
    eps: "str | float",
    num_classes: int,
    attacks: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Iterative], list[str]]:
    """({name: attack}, warnings) for a version, or for the attacks named in `attacks` with the version's settings.

    `options` override the version's settings. Raises InputError on an unknown version, name or norm.
    """
    warnings: list[str] = []
    restarts, targets, eot, larger_eps = 1, 9, None, False
    norm, eps = geometry.check_norm(norm, geometry.ALL_NORMS), geometry.one_radius(eps, norm)
    _check_version(version)
    if version == "standard" and norm == "l1":
        restarts, targets, larger_eps = 5, 5, True
    if version == "plus":
        restarts = 5
    if version == "rand":
        eot = SAMPLES

    own = dict(options or {})

    def apgd(name, loss, restarts, targets):
        if num_classes < FEWEST_CLASSES.get(loss, 0):
            instead = loss.replace("dlr", "margin")
            warnings.append(
                f"{name}: DLR needs {FEWEST_CLASSES[loss]} classes, there are {num_classes}: {instead} used"
            )
            loss = instead
        made = dict(steps=100, restarts=restarts, targets=targets) | own
        return iterative_apgd(loss, norm, eps, larger_eps=larger_eps, eot=eot, **made)

    make = {
        "apgd-ce": lambda name: apgd(name, "ce", restarts, 1),
        "apgd-dlr": lambda name: apgd(name, "dlr", restarts, 1),
        "apgd-t": lambda name: apgd(name, "dlr_targeted", 1, targets),
        "fab": lambda name: iterative_fab(norm, eps, **(dict(steps=100, restarts=restarts) | own)),
        "fab-t": lambda name: iterative_fab(norm, eps, **(dict(steps=100, restarts=1, targets=9) | own)),
        "square": lambda name: iterative_square(norm, eps, **(dict(queries=5000) | own)),
        "sparse-rs": lambda name: iterative_sparse_rs(norm, eps, **own),
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


def _check_version(version):
    if version not in _VERSIONS:
        raise InputError(f"AutoAttack's version '{version}' is unknown; {nearest(version, _VERSIONS)}")


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
    options: Mapping[str, Any] | None = None,
    batch_size: int = 256,
    state: "str | Path | None" = None,
    restart: bool = False,
    draws: int = DRAWS,
    allow_randomized: bool = False,
    precision: str | None = None,
    search_dtype: str = "float32",
    progress: str | None = None,
) -> Result:
    """Runs AutoAttack and returns which images it does not break, the adversarial images, and warnings.

    Args:
      key: one JAX key; the same key gives the same result.
      logits_fn: (B, H, W, C) in [0, 1] -> (B, classes), or (logits, …), in evaluation mode, traceable by JAX: any
        function, or a network of Flax, Equinox or Haiku (`ibjax.wrap`). With version "rand" it takes (x, keys), a
        key per image, and samples the network.
      x: images (N, H, W, C), float32 in [0, 1].
      y: integer labels (N,).
      norm: "linf", "l2" or "l1"; "l0", where eps is a number of pixels, with attacks=["sparse-rs"] alone.
      eps: radius in pixel units, as "8/255" or a float.
      version: "standard", "plus" or "rand".
      attacks: the attacks to run, in this order, in place of the version's: their names, or {name: attack} to give
        them other settings, as `{"square": iterative_square("linf", "8/255", queries=1000)}`.
      options: settings of the attacks named in `attacks`, in place of the version's, as `{"queries": 1000}`.
      batch_size: number of images in a batch, over all devices together.
      state: file to which progress is saved, about every 30 s; the same call then resumes from it. The file is refused
        if anything that the result depends on has changed, such as the network's logits or gradients.
      restart: ignore the content of the state file and start again.
      draws: with version "rand", number of draws of the network for each adversarial image at the end; at least 2.
      allow_randomized: attack a network whose logits differ from call to call, although "standard" overestimates its
        robustness.
      precision: of float32 products while attacking: "default", "high" or "highest" (`ibjax.devices.precision`). None:
        "high", or what JAX's `default_matmul_precision` is set to.
      search_dtype: "float32", or "bfloat16": gradients and the search use the network with its products in bfloat16
        (`ibjax.attacks.autocast`), for speed; images are judged by the network itself. The result is not the
        standard one.
      progress: name of a progress bar; with it, a preemption notice stops the attack with PreemptedError: on a CPU
        between two steps, on an accelerator between two programs of Square's queries.

    Raises:
      InputError: images outside [0, 1], wrong labels, an invalid eps, an output that is not logits, a random network, a
        network whose logits for an image depend on the rest of the batch, a call inside a JAX trace, or a state file of
        another evaluation. The message is one line and says what to do.
    """
    checks.outside_traces(key, x, y, eps)
    norm, eps = geometry.check_norm(norm, geometry.ALL_NORMS), geometry.one_radius(eps, norm)
    if not eps > 0:
        raise InputError("eps=0 is not allowed; AutoAttack takes a radius above 0")
    check_count("batch_size", batch_size)
    _check_version(version)
    if options and (attacks is None or isinstance(attacks, Mapping)):
        raise InputError(f"options={dict(options)} are those of attacks given by name; set attacks=[…] to names")
    if search_dtype not in autocast.DTYPES:
        raise InputError(f"search_dtype={search_dtype!r} is unknown; {nearest(str(search_dtype), autocast.DTYPES)}")
    x, y = checks.images_and_labels(np.asarray(x), np.asarray(y))
    key = entrance.as_key(key, x)
    if key.ndim:
        raise InputError(
            f"key is {key.shape[0]} keys; give one JAX key, jax.random.key(0): AutoAttack folds in each image"
        )
    random = version == "rand"
    if random and draws < 2:
        raise InputError(f"draws={draws} is not allowed; give at least 2, for a mean and its standard error")
    with precisions.at(precision) if precision else precisions.evaluating():
        entrance.classes_of(logits_fn, x[:64], entrance.ANYTHING, stochastic=random)
        asked = _check_network(logits_fn, x, y, random, allow_randomized)
        runner = Runner(
            key, _logits_alone(logits_fn), x, y, norm=norm, eps=eps, batch_size=batch_size, randomized=random,
            search_dtype=search_dtype,
        )  # fmt: skip
        file = files.path(state) if state else None
        try:
            return _evaluated(runner, asked, version, attacks, options, file, restart, draws, progress)
        finally:
            runner.compiler.close()


def _evaluated(runner, asked, version, attacks, options, file, restart, draws, progress):
    """`autoattack` of a network that has been `asked`, after the arguments are checked; see there."""
    x, y, norm, eps, random = runner.x, runner.y, runner.norm, runner.eps, runner.randomized
    (logits,) = runner.logits(x)
    if not np.all(np.isfinite(logits)):
        raise InputError(f"the network returns NaN or Inf for {int(np.sum(~np.isfinite(logits).all(1)))} images")
    if isinstance(attacks, Mapping):
        plan, notes = dict(attacks), []
        _check_plan(plan, norm, eps, random)
    else:
        plan, notes = sub_attacks(version, norm, eps, logits.shape[1], attacks, options)
    for attack in plan.values():
        if attack.check is not None:
            attack.check(logits.shape[1])
    settings = dict(version=version, batch_size=runner.batch_size, draws=draws if random else None, dtype=asked.dtype)
    settings |= _identity(plan, runner)
    found = Progress(file, settings, asked.fingerprint, x, logits.argmax(1) == y, restart)
    if random and found.right is None:
        found.right = runner.draws("chosen", x, np.arange(len(x)), draws).sum(0)
    _run(runner, plan, logits, found, progress)
    if runner.search is not None:
        keys = [jax.random.split(jax.random.key(0), len(x))[:1]] if random else []
        notes = [*notes, *autocast.told(runner.logits_fn, x[:1], *keys)]
    warnings = [*asked.warnings, *notes, *_gradient_warnings(plan, found.flat)]
    after = dict(zip(plan, found.after, strict=True))
    warnings += _gains(found.clean, after)
    seconds = {name: round(value, 2) for name, value in zip(plan, found.seconds[:-1], strict=True)}
    clean, robust, drawn = found.clean, found.robust, None
    if random:
        drawn, changed = _drawn(runner, found, draws)
        if progress:
            spread = f"{drawn.accuracy:.2f} ± {drawn.standard_error:.2f} %"
            log.info("%s: robust accuracy %s over %d fresh draws", progress, spread, draws)
    elif asked.randomised:  # one more draw would judge nothing
        changed = np.zeros(len(x), bool)
    else:
        (clean, robust), said = _judged(runner, found.x_adv)
        robust &= found.clean  # who seemed misclassified was not attacked
        changed = (clean != found.clean) | (robust != found.robust)
        after = {name: np.where(changed, robust, kept) for name, kept in after.items()}
        warnings += said
        if changed.any():
            warnings.append(
                f"{changed.sum()} images are classified otherwise when judged at the highest precision: rounding "
                f"decides on them"
            )
    return Result(found.x_adv, robust, clean, after, seconds, list(dict.fromkeys(warnings)), changed, drawn)


def _identity(plan, runner):
    """Everything that the result of these attacks depends on, apart from the network, as plain data."""
    return dict(
        attacks=[[name, attack.identity()] for name, attack in plan.items()],
        norm=runner.norm,
        eps=runner.eps,
        images=content_digest({"x": runner.x}),
        labels=content_digest({"y": runner.y}),
        key=runner.key.tolist(),
        key_kind=str(runner.key_kind),
        precision=precisions.asked(),
        search_dtype="float32" if runner.search is None else "bfloat16",
        code=code_digest(),
    )


@functools.cache
def code_digest() -> str:
    """A digest of the attacks' source files, so that saved results are not mixed with those of other code."""
    return digest_of((*sorted(Path(__file__).parent.glob("*.py")), Path(losses.__file__)))


def digest_of(sources: Iterable[Path]) -> str:
    """A digest of source files."""
    total = hashlib.blake2b(digest_size=8)
    for file in sources:
        total.update(file.read_bytes())
    return total.hexdigest()


def _logits_alone(logits_fn):
    """The network without what it returns beside its logits, as the features of the networks of `ibjax.models`."""
    network = unjitted(logits_fn)
    return lambda *given: output[0] if isinstance(output := network(*given), tuple) else output


def _check_network(logits_fn, x, y, random, allow_randomized):
    """`checks.network` of this network; raises InputError if it cannot be evaluated with the given version."""
    if random:
        try:
            return checks.network(logits_fn, x, y, jax.random.split(jax.random.key(0), len(x)))
        except TypeError as error:
            raise InputError(f"version 'rand' calls logits_fn(x, keys), a key per image: {error}") from None
    asked = checks.network(logits_fn, x, y)
    if asked.randomised and not allow_randomized:
        raise InputError(
            "the network answers differently from call to call, so that 'standard' would overestimate it; give "
            "version='rand' with logits_fn(x, keys), or allow_randomized=True"
        )
    return asked


def _check_plan(plan, norm, eps, random):
    """Raises InputError if attacks that the caller built do not fit the norm, eps or version of this evaluation."""
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
    """Runs all attacks that are not finished yet."""
    others = np.asarray(jax.jit(other_classes)(logits))

    def heed():
        """Ends with PreemptedError after a notice. The state is that before a batch that is not finished.

        All processes pass through the same programs in the same batches, and so ask equally often.
        """
        if cluster.preempted():
            state.save()
            raise PreemptedError(f"stopped during {bar_name}")

    runner.heed = heed if bar_name else None
    for number, (name, attack) in enumerate(plan.items()):
        if number < len(state.after):
            continue
        images, broken = state.attacked
        todo = np.nonzero(state.todo)[0]
        total = passes(attack, others) * len(todo)
        runner.meanwhile = [functools.partial(_expect, runner, list(plan.values())[number + 1 :], others, len(todo))]
        bar = tqdm(total=total, initial=min(state.position, total), desc=f"{bar_name or ''} {name}".strip(),
                   unit="run", leave=False, disable=not (bar_name and sys.stderr.isatty()))  # fmt: skip
        with bar:
            bar.set_postfix_str(f"robust {100 * state.robust.mean():.2f} %")
            before, runner.flat = time.perf_counter(), state.flat[-1]
            for position in runner.run(name, attack, todo, others, broken, images, state.position):
                state.seconds[-1] += time.perf_counter() - before
                before = time.perf_counter()
                bar.update(position - state.position)
                bar.set_postfix_str(f"robust {100 * np.mean(state.robust & ~broken):.2f} %")
                state.position, state.flat[-1] = position, runner.flat
                state.save(at_once=False)
                if runner.heed is not None:
                    runner.heed()
        right = None if state.right is None else runner.draws("chosen", images, todo, state.settings["draws"]).sum(0)
        state.finish_attack(todo, right)
        if bar_name:
            seconds = state.seconds[-2]
            log.info(
                "%s: robust accuracy %.2f %% after %s (%.1f s)", bar_name, 100 * state.robust.mean(), name, seconds
            )


def _expect(runner, later, others, count):
    """Begins to compile what follows an attack that `count` images are left to: the next attack, or the judgement."""
    if not cores.form().ahead:
        return
    if later:
        runner.expect(later[0], count * passes(later[0], others))
    elif not runner.randomized:
        with precisions.at(precisions.JUDGEMENT):
            runner.expect_logits()


def _gradient_warnings(plan, flat):
    return [
        f"{name}: the gradient is zero or not finite at the start of {count} runs: it may be masked"
        for name, count in zip(plan, flat, strict=False)
        if count
    ]


def _gains(clean, after):
    """A warning where Square breaks many images that the attacks before it do not."""
    accuracy = [100 * float(flags.mean()) for flags in (clean, *after.values())]
    place = list(after).index("square") if "square" in after else 0
    if place > 0 and (gain := accuracy[place] - accuracy[place + 1]) > 0.2:
        return [f"square lowers robust accuracy by {gain:.2f} points more: gradients may be masked"]
    return []


def _judged(runner, x_adv):
    """((clean, robust), warnings): flags of the images and their adversarial images, in the highest precision."""
    with precisions.at(precisions.JUDGEMENT):
        answers = runner.logits(runner.x, x_adv)
    right, withstood = (np.asarray(jax.jit(losses.correct)(logits, runner.y)) for logits in answers)
    warnings, undefined = [], int(np.sum(~np.isfinite(answers[1]).all(1)))
    if undefined:
        warnings.append(
            f"the network returns NaN or Inf for {undefined} adversarial images: where it names no class, they count "
            f"as not robust"
        )
    return (right, right & withstood), warnings


def _drawn(runner, found, draws):
    """(`Drawn` in the highest precision, where the first draw is another while attacking)."""

    def draw(count):
        rows = np.arange(len(runner.x))
        return Drawn(*(runner.draws("judged", shown, rows, count) for shown in (runner.x, found.x_adv)))

    with precisions.at(precisions.JUDGEMENT):
        drawn = draw(draws)
    changed = np.zeros(len(runner.x), bool)
    if cores.differ(str(precisions.asked()), precisions.JUDGEMENT):
        before = draw(1)
        changed = (before.clean[0] != drawn.clean[0]) | (before.robust[0] != drawn.robust[0])
    return drawn, changed
