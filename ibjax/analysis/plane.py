"""The information plane of a network during training: Figure 5 of IB-RAR (Xu et al., 2023).

    python -m ibjax.analysis.plane --config=configs/ib_rar.py:vgg16-ce --workdir=DIR [--every=50] [--n=200]
                                   [--taps=stage4] [--attack=pgd-10] [--picture=FILE.pdf] [--config.epochs=20 …]

    per layer l, every `every` steps:    ( nHSIC(X, T_l), nHSIC(Y, T_l) )     Gaussian kernels, also for one-hot labels,
                                                                              σ = 5: see information/hsic.py

X is a fixed set of n test images, and T_l their features in evaluation mode and float32. With --attack, both X and T_l
are those of x', attacked anew at each record against the current network. nHSIC is not mutual information: nHSIC(X, T)
is at most n − 1, nHSIC(Y, T) at most C − 1, and both depend on n through their ridge.

The default taps are those of IB-RAR (`ib_rar.layers_of`); its figure shows stage4 of VGG16, trained by the recipes
vgg16-l and vgg16-ce. The authors record within an epoch and skip its first step. Here steps are counted from the start
of the run; the first record is of the untrained network, the last of the trained one. The published code never fills
its buffer of test images, and the paper does not say which images it uses; ours are stratified by class. We do not
record the authors' values per channel.

The network equals, bit for bit, the one that `ibjax.main` trains from this configuration, but it is not saved. The
teacher of a recipe is trained first, in DIR/teacher, if it is not there yet. Writes DIR/plane.json after every tenth
record and at the end. If the file is complete, the same command reads and draws it again, with a notice where other
code or versions have made it; another configuration or precision is refused. An interrupted training starts again.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict
from tqdm import tqdm

from ibjax import config, files
from ibjax.analysis import commands, embedding, pictures
from ibjax.data import sample
from ibjax.devices import cluster
from ibjax.errors import DivergedError, InputError, PreemptedError, check_range, nearest
from ibjax.evaluation.evaluate import make_scorer
from ibjax.evaluation.named import named
from ibjax.evaluation.results import threat_label
from ibjax.evaluation.settings import check_network, check_settings
from ibjax.information import hsic
from ibjax.net import linen_net, to_float
from ibjax.objectives.ib_rar import layers_of
from ibjax.runs import command_line, provenance, run, rundir
from ibjax.step import evaluation_variables
from ibjax.training import feed, jobs, loop
from ibjax.training.experiment import build, initial_state, run_key

log = logging.getLogger(__name__)
_RECORDS, _COLUMNS = 10, 4  # records between two writings of the file; panels in a row
# what must agree for a finished plane to be reused; "jax_settings" is there only for settings that are not the defaults
_FIXED = ("config", "data", "n", "every", "attack", "taps", "jax_settings")


def coordinates(x: Array, labels: Array, num_classes: int, layers: list[Array]) -> Array:
    """(nHSIC(X, T_l), nHSIC(Y, T_l)) of images (B, …) and labels (B,) with each of L layers (B, …), shape (2, L)."""
    r_x = hsic.correlation_operator(hsic.scaled_gram(x))
    r_y = hsic.label_operator(labels, num_classes, "gaussian")
    return hsic.nhsic_layers(jnp.stack([r_x, r_y]), layers)


def record(
    settings: ConfigDict,
    workdir: Path,
    *,
    every: int = 50,
    n: int = 200,
    taps: Sequence[str] | None = None,
    attack: str | None = None,
) -> dict[str, Any]:
    """Trains a configuration, and writes and returns its information plane; if that is complete, only reads it.

    Args:
      settings: the configuration; norm, eps and step size of the attack are those of its `evaluate` section.
      workdir: of plane.json.
      every: steps between two records.
      n: number of test images, stratified by class.
      taps: features of the network; None: the paper's layers.
      attack: a name of `evaluation/named.py`, except AutoAttack and its parts; None: clean images.

    Returns the record: "step" is a list, "nhsic" {tap: {"x": list, "y": list}}. Raises InputError where plane.json is
    of another configuration, DivergedError where a value is not finite.
    """
    check_range("--every", every, 1)
    check_range("--n", n, 2)
    alone = config.effective(config.complete(settings).copy_and_resolve_references())
    alone.contrast = {}
    todo = jobs.jobs(alone, workdir)
    # check all jobs first: an error in the last must not cost the training of a teacher
    checked = [loop.check(job.settings, job.teachers) for job in todo]
    settings, teachers = todo[-1].settings, todo[-1].teachers
    _measure(build(settings, teachers, abstract=True), n, taps, attack)
    for job, traced in zip(todo[:-1], checked[:-1], strict=True):
        with rundir.lock(job.workdir):
            loop.train(build(job.settings, job.teachers), job.workdir, checked=traced)
    with rundir.lock(workdir):
        experiment = build(settings, teachers)
        measure, names = _measure(experiment, n, taps, attack)
        evaluated = settings.evaluate
        about = {
            "dataset": experiment.facts["label"],
            "steps_per_epoch": experiment.steps_per_epoch,
            **dict(n=n, every=every, attack=attack, taps=names, sigma=hsic.SIGMA, ridge=hsic.RIDGE),
            **({} if attack is None else {key: evaluated[key] for key in ("norm", "eps", "step_size")}),
            "data": experiment.facts,
            "config": config.plain(settings),
            **provenance.jax_settings(),
        }
        about = json.loads(json.dumps(about))  # equal to what is read from the file
        return _finished(workdir / "plane.json", about) or _train(experiment, workdir, about, measure)


def _finished(file, about):
    """The plane in the file, if it is complete and the requested one; None where there is none worth keeping."""
    if not file.is_file():
        return None
    try:
        found = files.read_json(file)
        wholes = ({"jax_settings": {}, **part} for part in (found, about))
        old, new = (dict(config.leaves({key: part[key] for key in _FIXED})) for part in wholes)
        stopped = None if found["finished"] else found["step"][-1]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is damaged or of another version ({error}); remove it") from None
    if stopped is not None:
        log.info("%s was stopped after step %d; its training starts again", file, stopped)
        return None
    for path in {**new, **old}:
        if old.get(path) != new.get(path):
            raise InputError(
                f"{file} is finished with {path}={old.get(path)!r}, now {new.get(path)!r} is asked for; "
                f"give another --workdir, or the same command to read it"
            )
    own = {"commit": provenance.commit(), "versions": provenance.versions()}
    if changed := [key for key, value in own.items() if found.get(key) != value]:
        log.warning("%s is of other %s than this; another --workdir makes it anew", file, " and ".join(changed))
    log.info("%s is finished, and is read", file)
    return found


def _measure(experiment, n, taps, attack):
    """(a function variables -> (2, L) on the fixed images, the names of the L taps)."""
    model = run.in_float32(experiment.model)
    predict = linen_net(model).predict
    shape = experiment.data.train.images.shape[1:]
    variables = run.abstract_variables(experiment.model, shape, experiment.mesh)
    allowed = embedding.taps(predict, variables, shape)
    for tap in taps or ():
        if tap not in allowed:
            raise InputError(f"--taps={tap} is no feature of the images; {nearest(tap, allowed)}")
    taps = taps or layers_of({name: name for name in allowed})
    split = sample(experiment.data.test, n, "--n")
    split = split._replace(images=np.asarray(split.images[:]))  # streamed images are read once
    attacked = None if attack is None else _attacker(experiment, model, predict, split, attack)

    @jax.jit
    def measure(variables, images):
        x = to_float(images)
        features = predict(variables, x)[1]
        return coordinates(x, jnp.asarray(split.labels), experiment.data.num_classes, [features[tap] for tap in taps])

    return lambda variables: np.asarray(measure(variables, attacked(variables) if attacked else split.images)), taps


def _attacker(experiment, model, predict, split, name) -> Callable[[Any], np.ndarray]:
    """A function variables -> the attacked images (n, H, W, C), which is compiled once."""
    settings, chosen = config.plain(experiment.config.evaluate), named(name, experiment.config.objective)
    settings["attacks"] = (name,)
    check_settings(settings)
    check_network(model, split.images.shape[1:], settings)
    if chosen.make is None:
        raise InputError(f"--attack={name} is too long for every record; give one as pgd-10")
    scorer = make_scorer(chosen, lambda variables, x, keys: predict(variables, x), settings, experiment.mesh)
    size = dict(eps=settings["eps"], step_size=chosen.step_size(settings["eps"], settings["step_size"]))
    return lambda variables: scorer(variables, split, experiment.config.seed, keep=len(split.labels), **size)[1]


def _train(experiment, workdir, about, measure):
    """The loop of `ibjax.training.loop` without its validation and its checkpoints."""
    settings, per_epoch, every = experiment.config, experiment.steps_per_epoch, about["every"]
    total, step, state = settings.epochs * per_epoch, 0, initial_state(experiment)
    capacity, dispatch, recompute = feed.feed(experiment, run_key(settings.seed, 1, experiment.mesh), step)
    steps, rows, began = [], [], time.perf_counter()
    first = jax.process_index() == 0
    visible = first and sys.stderr.isatty()
    with tqdm(total=total, desc=_title(settings), unit="step", disable=not visible) as bar:
        while True:
            if step % every == 0 or step == total:
                variables = evaluation_variables(
                    state if recompute is None else recompute(jax.tree.map(jnp.copy, state))
                )
                steps.append(step)
                rows.append(measure(variables))
                if not np.isfinite(rows[-1]).all():
                    raise DivergedError(f"nHSIC became NaN or Inf by step {step}; lower optimizer.lr")
                if len(steps) % _RECORDS == 0 or step == total:
                    found = _record(experiment, workdir, about, variables, steps, rows)
                    if first:
                        files.write_json(workdir / "plane.json", found)
                    if step == total:
                        return found
                    if first and not visible:
                        left = (time.perf_counter() - began) / step * (total - step)
                        log.info("%s: step %d of %d, %.0f s left", _title(settings), step, total, left)
                if cluster.preempted():
                    raise PreemptedError(f"stopped at step {step} of {total}, which is not kept: it starts again")
            stop = min(step + capacity, *((step // unit + 1) * unit for unit in (every, per_epoch)))
            state, _ = dispatch(state, stop - step)
            bar.update(stop - step)
            step = stop


def _record(experiment, workdir, about, variables, steps, rows):
    logits_fn = linen_net(experiment.model).predict
    parts = (experiment.config, experiment.facts, steps[-1], workdir, {})
    network = run.Run(experiment.model, variables, logits_fn, *parts)
    values = np.round(np.array(rows, np.float64), 5)  # (records, 2, L)
    columns = {tap: dict(zip("xy", values[:, :, i].T.tolist(), strict=True)) for i, tap in enumerate(about["taps"])}
    finished = steps[-1] == experiment.config.epochs * experiment.steps_per_epoch
    return {**run.origin(network, "last"), **about, "finished": finished, "step": list(steps), "nhsic": columns}


def _title(settings):
    return settings.title or settings.objective.name


# ---- the picture ---------------------------------------------------------------------------------------------


def draw(found: dict[str, Any]) -> Any:
    """A matplotlib Figure of a plane: a panel for each layer, four in a row; colour shows the progress of training."""
    taps = found["taps"]
    rows = -(-len(taps) // _COLUMNS)
    columns = -(-len(taps) // rows)
    drawn = pictures.figure(2.7 * columns + 0.8, 2.6 * rows + 0.4)
    panels = drawn.subplots(rows, columns, squeeze=False).ravel()
    epochs = np.array(found["step"]) / found["steps_per_epoch"]
    name = "X" if found["attack"] is None else "X′"
    for panel, tap in zip(panels, taps, strict=False):
        x, y = found["nhsic"][tap]["x"], found["nhsic"][tap]["y"]
        panel.plot(x, y, color="0.75", linewidth=0.7, zorder=1)
        points = panel.scatter(x, y, c=epochs, cmap="viridis", s=14, linewidths=0, zorder=2)
        panel.set_title(tap, fontsize=10)
        panel.set_xlabel(f"nHSIC({name}, T)", fontsize=9)
        panel.set_ylabel("nHSIC(Y, T)", fontsize=9)
        panel.tick_params(labelsize=8)
    for panel in panels[len(taps) :]:
        panel.set_visible(False)
    bar = drawn.colorbar(points, ax=list(panels), aspect=30)
    bar.set_label("epoch", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    title = f"{found['title']} on {found['dataset']}, {found['n']} test images, {_images(found)}"
    drawn.suptitle(title, fontsize=11, parse_math=False)
    return drawn


def _images(found):
    """The images of a record in words: clean, or the attack with its norm and eps."""
    return "clean" if found["attack"] is None else threat_label(found)


def lines(found: dict[str, Any]) -> Iterable[str]:
    """The first and last record as a Markdown table: the untrained network and the trained one."""
    name = "X" if found["attack"] is None else "X′"
    yield f"{found['title']} on {found['dataset']}, n = {found['n']}, {_images(found)}, {len(found['step'])} records"
    yield f"| layer | nHSIC({name}, T) at step 0 | at step {found['step'][-1]} | nHSIC(Y, T) at step 0 | at the end |"
    yield "|---|---|---|---|---|"
    for tap, values in found["nhsic"].items():
        cells = [f"{values[axis][i]:.2f}" for axis in "xy" for i in (0, -1)]
        yield f"| {tap} | {' | '.join(cells)} |"


def main() -> None:
    """The command line of this module."""
    parser = command_line.of_training("ibjax.analysis.plane", __doc__)
    parser.add_argument("--every", type=int, default=50, help="steps between two records")
    commands.add_n(parser, 200)
    parser.add_argument(
        "--taps",
        type=command_line.comma_list,
        help="features, separated by commas; default: IB-RAR's layers of the network",
    )
    parser.add_argument("--attack", help="a name, as of an evaluation; default: the images as they are")
    pictures.add_argument(parser)
    given, recipe = command_line.parse_recipe(parser)

    def measure():
        options = dict(every=given.every, n=given.n, taps=given.taps, attack=given.attack)
        return record(given.settings, given.workdir, **options)

    commands.conduct(given, measure, lines, lambda found, file: pictures.save(draw(found), file), recipe=recipe)


if __name__ == "__main__":
    main()
