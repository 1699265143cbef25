"""Which student layer IBD's learned matching assigns to which teacher layer: Figure 4 of IBD.

    python -m ibjax.analysis.attention --workdir=DIR [--checkpoint=best] [--attack=pgd-10] [--n=1000]
                                       [--picture=FILE.pdf]

    A_{i,j} = mean_b Attn_{b,i,j}                   i of n teacher layers, j of m student layers; rows sum to 1

Attn comes from the trained matching in evaluation mode (`objectives/ibd_matching.py`, running statistics of its
batch-norms). The mean is over test images x' that attack the student; the paper does not say which images it uses. The
student sees x'. The teacher sees what it saw in training: x' with `teacher_features="adv"`, else x (also x with
`adversarial=False`), without `teacher_noise`. The student has the weights that are evaluated; where a run averages its
weights, these are not the ones with which the matching was trained.

A value of 1/m everywhere means no preference among student layers. A standard deviation of 0 over the images means that
the matching does not adapt to the image.

Requires a run of `objective=dict(name="ibd", matching="adaptive", …)` with beta above 0, and the teacher with which it
was trained. Writes `attention/<checkpoint>.json` in the workdir. In the picture, rows are teacher layers and columns
student layers.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding

from ibjax import config
from ibjax.analysis import attacked, commands, output, pictures
from ibjax.devices import cluster, precision
from ibjax.errors import InputError
from ibjax.evaluation.results import threat_label
from ibjax.net import linen_net, to_float
from ibjax.objectives.ibd_matching import layers_of
from ibjax.runs import checkpoint as checkpoints
from ibjax.runs import command_line, run, rundir
from ibjax.training.experiment import Experiment, build, initializer
from ibjax.training.jobs import jobs


def experiment_of(workdir: Path) -> Experiment:
    """The experiment of a run, with its teacher; InputError where it learned no matching, or the teacher changed."""
    saved, facts = rundir.read_config(workdir)
    settings = config.complete(saved.copy_and_resolve_references())
    objective = settings.objective
    if objective.name != "ibd" or objective.matching != "adaptive" or not objective.beta:
        raise InputError(
            f"{workdir} is a run of objective '{objective.name}' and has learned no matching; give one of "
            f"objective.name='ibd', objective.matching='adaptive' and objective.beta above 0"
        )
    one = Mesh(np.array(jax.local_devices()[:1]), ("data",))  # one device, so that any batch size divides evenly
    experiment = build(settings, jobs(settings, workdir)[-1].teachers, mesh=one)
    if "teacher" in facts and facts["teacher"]["weights"] != experiment.facts["teacher"]["weights"]:
        raise InputError(f"the teacher of {workdir} is not the one of its training; restore that, or train again")
    return experiment


def restore_head(experiment: Experiment, workdir: Path, step: int) -> Any:
    """The variables of the matching that a checkpoint holds: {"params", "batch_stats"}."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, *experiment.facts["input_shape"]), jnp.float32)
    state = jax.eval_shape(initializer(experiment), key, x, experiment.frozen)
    everywhere = NamedSharding(cluster.mesh(), cluster.REPLICATED)
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), checkpoints.split(state)[1]
    )
    identity = rundir.identity(experiment.config, experiment.facts)
    with checkpoints.manager(workdir, read_only=True, run=identity) as orbax:
        return checkpoints.restore_part(orbax, step, "training", like)[1]["head"]


def attention(
    trained: run.Run, experiment: Experiment, head: Any, images: np.ndarray, taught: np.ndarray, batch_size: int
) -> tuple[np.ndarray, list[str], list[str]]:
    """(Attn (N, n, m) float32, names of the n teacher layers, of the m student layers).

    images, taught: (N, H, W, C), the inputs of the student and of the teacher.
    """
    module = experiment.objective.head
    assert module is not None  # experiment_of has checked it
    predict = linen_net(run.in_float32(trained.model)).predict

    features = partial(features_of, predict, experiment.bind_net)
    attend = jax.jit(partial(attend_to, module, predict, experiment.bind_net))

    def part(first):
        batch = slice(first, first + batch_size)
        return np.asarray(attend(trained.variables, experiment.frozen, head, images[batch], taught[batch]))

    shapes = jax.eval_shape(features, trained.variables, experiment.frozen, images[:1], taught[:1])
    student, teacher = (
        [str(name) for name in layers_of({name: name for name in taps}, module.granularity, module.stem)]
        for taps in shapes
    )
    return np.concatenate([part(first) for first in range(0, len(images), batch_size)]), teacher, student


def features_of(predict: Callable, bind_net: Callable, variables: Any, frozen: Any, x: Array, taught: Array) -> Any:
    """(features of the student at x, of the teacher at `taught`), batches (B, H, W, C)."""
    teacher = bind_net(frozen).teacher
    assert teacher is not None
    return predict(variables, to_float(x))[1], teacher(to_float(taught))[1]


def attend_to(
    module: nn.Module, predict: Callable, bind_net: Callable, variables: Any, frozen: Any, head: Any, x: Array,
    taught: Array,
) -> Any:  # fmt: skip
    """Attn (B, n, m) of one batch, by the matching `module` with the variables `head`."""
    with precision.evaluating():
        return module.apply(head, *features_of(predict, bind_net, variables, frozen, x, taught), train=False)[1]


def evaluate(
    workdir: Path, checkpoint: str = "best", *, attack: str = "pgd-10", n: int | None = None
) -> dict[str, Any]:
    """Attacks a run's test images, or `n` of them, and applies its matching; writes and returns the record.

    attack: a name of `evaluation/named.py`; norm, eps and step size are those of the run's `evaluate` section.
    """
    experiment = experiment_of(workdir)
    trained, settings, split = attacked.load(workdir, checkpoint, attacks=(attack,), n=n)
    head = restore_head(experiment, workdir, trained.step)
    predict = linen_net(run.in_float32(trained.model)).predict
    _, x_adv = attacked.attack(attack, predict, trained, split, settings)
    objective = experiment.config.objective
    adversarial = objective.adversarial and objective.teacher_features == "adv"
    taught = x_adv if adversarial else split.images[:]
    values, teacher, student = attention(trained, experiment, head, x_adv, taught, settings["batch_size"])
    record = {
        **run.origin(trained, checkpoint),
        "dataset": trained.facts["label"],
        "n": len(split.labels),
        "attack": attack,
        **{key: settings[key] for key in ("norm", "eps", "step_size")},
        "teacher": experiment.facts["teacher"],
        "teacher_sees": "x_adv" if adversarial else "x",
        "teacher_layers": teacher,
        "student_layers": student,
        "mean": values.mean(0, dtype=np.float64).tolist(),
        "std": values.std(0, dtype=np.float64).tolist(),
    }
    output.record(workdir / "attention", checkpoint, record)
    return record


def about(record: dict[str, Any]) -> tuple[str, str]:
    """Describes what the matrix was computed on: (network and data, images)."""
    images = f"n = {record['n']}, {threat_label(record)}"
    return f"{record['title']} on {record['dataset']}", images


def lines(record: dict[str, Any]) -> Iterable[str]:
    """The record as a Markdown table, mean ± standard deviation over the images."""
    yield ", ".join(about(record))
    yield f"| teacher \\ student | {' | '.join(record['student_layers'])} |"
    yield "|---" * (len(record["student_layers"]) + 1) + "|"
    for name, means, deviations in zip(record["teacher_layers"], record["mean"], record["std"], strict=True):
        cells = (f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in zip(means, deviations, strict=True))
        yield f"| {name} | {' | '.join(cells)} |"


def draw(record: dict[str, Any], file: Path) -> None:
    """The mean as an annotated heat map from 0 to 1; rows are teacher layers, columns student layers."""
    teacher, student = record["teacher_layers"], record["student_layers"]
    drawn = pictures.figure(2.8 + 0.45 * len(student), 1.7 + 0.45 * len(teacher))
    panel = drawn.subplots()
    heat = panel.imshow(record["mean"], cmap="viridis", vmin=0, vmax=1)
    for (i, j), value in np.ndenumerate(np.array(record["mean"])):
        colour = "black" if value > 0.6 else "white"  # legible on viridis
        panel.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    panel.set_xticks(range(len(student)), student, rotation=45, ha="right", rotation_mode="anchor")
    panel.set_yticks(range(len(teacher)), teacher)
    panel.set(xlabel="student layer", ylabel="teacher layer")
    panel.tick_params(labelsize=9)
    drawn.suptitle("\n".join(about(record)), fontsize=9, parse_math=False)
    drawn.colorbar(heat, label="mean attention")
    pictures.save(drawn, file)


def main() -> None:
    """The command line of this module."""
    parser = command_line.of_run("ibjax.analysis.attention", __doc__)
    commands.add_attack(parser, "pgd-10")
    commands.add_n(parser)
    pictures.add_argument(parser)
    given = parser.parse_args()

    def measure():
        return evaluate(given.workdir, given.checkpoint, attack=given.attack, n=given.n)

    commands.conduct(given, measure, lines, draw)


if __name__ == "__main__":
    main()
