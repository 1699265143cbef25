"""Training: the check of a whole configuration, and the loop around the compiled steps (`ibjax.training.feed`).

Guarantees (tests of the same names): a killed run continues to the bit, that is, it ends with the same bits as an
uninterrupted one; the step compiles once.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ibjax import config, extensions
from ibjax.devices import cluster
from ibjax.errors import DivergedError, InputError, PreemptedError
from ibjax.evaluation.scoring import GradientError, nan_warnings
from ibjax.runs import checkpoint as checkpoints
from ibjax.runs import rundir, trees, writers
from ibjax.runs.metrics import MetricsLog, Window
from ibjax.training import feed, programs
from ibjax.training.experiment import Experiment, build, initial_state, run_key

log = logging.getLogger(__name__)
_CATASTROPHE = 20.0  # drop in robust validation accuracy, in points, that counts as catastrophic overfitting


def check(settings: ConfigDict, folders: Mapping[str, Path] | None = None) -> programs.Programs:
    """Raises InputError on any error in a configuration, its data or its teacher.

    The whole step and the validation are traced; nothing is saved, compiled or computed. A teacher that has yet to be
    trained is represented by its recipe. Returns what is traced, for `train`.
    """
    writers.check(settings.writers)
    experiment = build(settings, folders, abstract=True)
    try:
        made = programs.make(experiment)
        made.trace()
    except InputError:
        raise
    except Exception as error:  # an inconsistency of shapes, types or values that only tracing finds
        raise InputError(f"this configuration cannot be traced: {extensions.failure(error)}") from error
    return made


# ---- the loop ----------------------------------------------------------------------------------------------


def train(
    experiment: Experiment,
    workdir: Path,
    *,
    restart: bool = False,
    checked: programs.Programs | None = None,
    part: bool = False,
) -> None:
    """Trains to the last epoch, from the newest undamaged checkpoint if there is one.

    Where all checkpoints are lost or damaged, `restart` begins again at step 0; without it, InputError is raised for
    lost checkpoints and CheckpointError for damaged ones. `checked` is what `check` returned: nothing is traced again
    that it has traced. `part`: see `writers.Started`. Raises PreemptedError after it has saved because of a SIGTERM,
    and DivergedError where a metric or the state is not finite.
    """
    settings = experiment.config
    total = settings.epochs * experiment.steps_per_epoch
    identity = rundir.write_config(workdir, settings, experiment.facts, restart=restart)
    made = programs.make(experiment) if checked is None else checked.of(experiment)
    with checkpoints.manager(workdir, run=identity) as orbax:
        state = initial_state(experiment, made.initial)
        state = checkpoints.restore_latest(orbax, state, restart=restart) or state
        step = int(state.step)
        if step >= total:
            log.info("%s: already trained, %d steps", workdir, step)
            return
        validated = checkpoints.metrics(orbax, step) if step else {}
        if settings.validate.stop_on_overfitting and _overfitted(experiment, orbax, validated):
            log.info("%s: stopped at step %d by catastrophic overfitting", workdir, step)
            return
        if step:
            log.info("%s: continuing from step %d of %d", workdir, step, total)
        if jax.process_index() == 0:
            title = settings.title or workdir.resolve().name
            started = writers.Started(workdir, title, config.plain(settings), step, part)
            told = writers.start(settings.writers, started)
            with contextlib.closing(MetricsLog(workdir, step, told)) as metrics_log:
                _loop(made, orbax, state, step, total, metrics_log.write)
        else:
            _loop(made, orbax, state, step, total, lambda *args, **values: None)


def _loop(made, orbax, state, step, total, write):
    experiment, validator = made.experiment, made.validator
    settings, per_epoch, mesh = experiment.config, experiment.steps_per_epoch, experiment.mesh
    capacity, dispatch, recompute = feed.feed(experiment, run_key(settings.seed, 1, mesh), step, made.step)
    window, first, began, pace = Window(step), step, time.perf_counter(), _Pace(settings, capacity)

    with _progress(settings, total, step) as bar:
        while step < total:
            stop = min(step + pace.capacity, _next_multiple(step, settings.log_every), _next_multiple(step, per_epoch))
            with _naming_the_batch(settings, mesh):
                state, metrics = dispatch(state, stop - step)
                pace.wait(metrics)
            window.add(stop - step, metrics)
            bar.update(stop - step)
            step = stop
            epoch, in_epoch = divmod(step, per_epoch)
            validated = not in_epoch and _validate_now(settings, epoch)
            saved = not in_epoch and (validated or epoch % settings.checkpoint_every == 0)
            preempted = cluster.preempted()
            if saved or preempted or step % settings.log_every == 0:
                values = window.fetch()
                reason = _divergence(settings, values, window.first, orbax)
                if not reason and (saved or preempted) and (broken := _first_broken(state)):
                    reason = _in_words(broken, step, values["grad_norm"], orbax)
                if reason:
                    write("diverged", step, reason=reason)
                    raise DivergedError(reason)
                row = window.row(values, step, settings.batch_size) | checkpoints.saved(orbax)
                if window.first > first:  # not the first, which includes the compilation
                    pace.measure(batch_size=settings.batch_size, images_per_s=row["images_per_s"])
                left = (time.perf_counter() - began) / (step - first) * (total - step)
                write("train", step, epoch=step / per_epoch, **row, seconds_left=round(left, 1))
                bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['images_per_s']:.0f} images/s")
                window = Window(step)
            if saved or preempted:
                if recompute is not None:  # after a notice of preemption only where a save is due
                    state = recompute(state) if saved else feed.with_raw_statistics(state)
                try:
                    scores = _validate(experiment, validator, state) if validated else None
                except GradientError as error:  # the weights are so large that the network cannot be judged
                    reason = _in_words("validation accuracy", step, values["grad_norm"], orbax, str(error))
                    write("diverged", step, reason=reason)
                    raise DivergedError(reason) from None
                if scores:
                    orbax.wait_until_finished()  # a row is a sign that the checkpoint before it was saved
                    write("val", step, epoch=step / per_epoch, **scores)
                    _tell(settings, epoch, scores, (time.perf_counter() - began) / (step - first) * (total - step))
                overfitted = scores is not None and _overfitted(experiment, orbax, scores)
                checkpoints.save(orbax, state, scores and {**scores, "select": experiment.select})
                if overfitted and _alarm(settings, epoch) and not preempted:
                    return
                window = Window(step)
            if preempted:
                orbax.wait_until_finished()
                write("preempted", step)
                raise PreemptedError(f"saved step {step} of {total}")


class _Pace:
    """How many steps a dispatch takes. At most one dispatch is computed while the one before it is waited for.

    A notice of preemption takes effect between two dispatches, and a machine may be gone 30 s after it. So dispatches
    whose length the configuration leaves open take some seconds at most.
    """

    seconds = 5.0

    def __init__(self, settings, capacity):
        self.capacity, self.before = capacity, None
        self.open = capacity > 1 and settings.steps_per_dispatch is None

    def wait(self, metrics):
        """Waits for the dispatch before the one that has these metrics."""
        jax.block_until_ready(self.before)
        self.before = metrics

    def measure(self, batch_size, images_per_s):
        """Sets the length once, as the first process has measured it."""
        if self.open:
            steps = int(np.clip(self.seconds * images_per_s / batch_size, 1, self.capacity))
            self.capacity, self.open = int(cluster.word_of_first("steps of a dispatch", str(steps))), False


@contextlib.contextmanager
def _naming_the_batch(settings, mesh):
    """Turns an out-of-memory error into one that says how many images a device had to hold."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        size, count = settings.batch_size, mesh.size
        raise MemoryError(
            f"batch_size={size} is {size // count} images on each of {count} devices; set model.remat=True, raise "
            f"microbatches, lower batch_size, use more devices, or set model.dtype='bfloat16' "
            f"({' '.join(str(error).split())[:200]})"
        ) from None


def _next_multiple(step, interval):
    return (step // interval + 1) * interval


def _validate_now(settings, epoch):
    last = epoch == settings.epochs
    dense = settings.validate.dense_from is not None and epoch >= settings.validate.dense_from
    return last or dense or epoch % settings.validate.every == 0


def _validate(experiment, validator, state):
    """{"clean_acc", "robust_acc", "selection"} in percent on the split that selects checkpoints."""
    (scorer, size), split = validator, programs.selection_split(experiment)
    variables = cluster.on_every_device(checkpoints.split(state)[0], experiment.mesh)
    flags, _ = scorer(variables, split, experiment.config.seed, **size)
    for text in nan_warnings(flags):
        log.warning("%s: validation: %s", _name(experiment.config), text)
    clean, robust = (100 * float(np.mean(part)) for part in (flags.clean, flags.robust))
    selection = {"robust": robust, "clean": clean, "mean": (clean + robust) / 2}[experiment.select]
    return {"clean_acc": clean, "robust_acc": robust, "selection": selection}


def _overfitted(experiment, orbax, scores):
    """Whether adversarial training has overfitted: its robust accuracy is far below the best checkpoint's."""
    best = checkpoints.best_step(orbax)
    if best is None or "robust_acc" not in scores or not experiment.attacked:
        return False
    return checkpoints.metrics(orbax, best)["robust_acc"] - scores["robust_acc"] > _CATASTROPHE


def _alarm(settings, epoch):
    """Logs catastrophic overfitting; returns whether to stop."""
    stop = settings.validate.stop_on_overfitting
    log.warning(
        "%s: epoch %d: robust accuracy fell by more than %g points: catastrophic overfitting; the best checkpoint is "
        "kept; %s",
        _name(settings),
        epoch,
        _CATASTROPHE,
        "stopping" if stop else "validate.stop_on_overfitting=True would stop here",
    )
    return stop


def _divergence(settings, values, first, orbax):
    """Says which metric was the first to be non-finite, at which step, and what to do; None where all are finite."""
    broken = {
        name: int(np.argmin(np.isfinite(value))) for name, value in values.items() if not np.isfinite(value).all()
    }
    if not broken:
        return None
    name = min(broken, key=lambda name: (broken[name], name != "loss"))
    if not first + broken[name]:  # no update has been made: no learning rate is at fault
        return (
            f"{name} is NaN or Inf in the very first batch, at the initial weights, so objective "
            f"'{settings.objective.name}', model '{settings.model.name}' or the images make it; JAX_DEBUG_NANS=True "
            f"names the operation"
        )
    return _in_words(name, first + broken[name] + 1, values["grad_norm"][: broken[name]], orbax)


def _in_words(name, step, norms, orbax, why=""):
    good = checkpoints.latest_step(orbax)
    return (
        f"{name} became NaN or Inf in the batch of step {step} ({why}{'; ' * bool(why)}gradient norms before: "
        f"{norms[-2:].tolist()}); the last good checkpoint is {'none' if good is None else f'step {good}'}; lower "
        f"optimizer.lr"
    )


def _first_broken(state):
    """The path of the first leaf of the state that is not finite; "" where all are finite."""
    finite = trees.flatten(jax.device_get(jax.tree.map(_finite, state)))
    return next((path for path, value in finite.items() if not value), "")


@jax.jit  # leaf by leaf: those of equal shapes share a program, and one for a whole state has as many parts as leaves
def _finite(leaf):
    return jnp.isfinite(leaf).all()


@contextlib.contextmanager
def _progress(settings, total, step):
    """A progress bar with the time left, if stderr is a terminal; log lines appear above it."""
    visible = sys.stderr.isatty() and jax.process_index() == 0
    with (
        tqdm(total=total, initial=step, desc=_name(settings), unit="step", disable=not visible, mininterval=0.5) as bar,
        logging_redirect_tqdm() if visible else contextlib.nullcontext(),
    ):
        yield bar


def _tell(settings, epoch, scores, seconds_left):
    """Logs one line for each validation."""
    if jax.process_index() == 0:
        log.info(
            "%s: epoch %d of %d, validation clean %.2f %%, robust %.2f %%, %.0f s left",
            _name(settings),
            epoch,
            settings.epochs,
            scores["clean_acc"],
            scores["robust_acc"],
            seconds_left,
        )


def _name(settings):
    return settings.title or extensions.unanchored(settings.objective.name)
