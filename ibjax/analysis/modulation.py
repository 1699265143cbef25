"""The effect of SiRIIB's calibration on attacked images, in pictures and numbers: Figures 4 and 9 to 11 of SiRIIB.

    python -m ibjax.analysis.modulation --workdir=DIR [--checkpoint=best] [--n=1000] [--picture=FILE.pdf]
                                        [--attacks=pgd-20,margin-20,siriib-svd-20,siriib-info-20]

    passed = mean ‖x_avg(x') − x_avg(x)‖ / ‖x' − x‖         share of a perturbation that passes, over perturbed images
    σ      = mean ‖σ(x') − σ(x)‖                            change of the singular values of a colour channel
    σ_avg  = mean ‖σ(x_avg(x')) − σ(x_avg(x))‖              the same after the calibration           all norms are l2

Requires a run of `model=dict(name="siriib", …)`, whose network has the feature x_avg. The paper shows pictures without
numbers, and concludes from them that x_avg is stable under all attacks, including adaptive ones. A calibration that
merely lowered the contrast would look stable too, so its effect on perturbations must be compared with its effect on
images: the last row, "another image", takes the next image of the test set as x'. A calibration that removes
perturbations but keeps images passes a smaller share of a perturbation than of this difference. --attacks=noise-sign
adds a row for noise.

The picture shows 8 images, stratified by class: x, x_avg(x), and for each attack x', x_avg(x') and their difference.
Mid-grey means no difference; all differences have the same scale, which the picture states. The paper's Figure 4 has
one row of x_avg for each λ₁; its Figure 9 shows x − x' and x_avg − x', each at a scale of its own, which is not drawn.
(For Figure 7 see `analysis.score_cam`, for Figure 8 `analysis.embedding`.) Writes
`modulation/<checkpoint>.json` in the workdir.

With connections=0 there is no L_info to attack: attacks on it are refused, and are not among the default ones.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ibjax.analysis import attacked, commands, output, pictures
from ibjax.data import stratified
from ibjax.errors import InputError
from ibjax.evaluation.named import named
from ibjax.evaluation.results import attack_label
from ibjax.information.svd import singular_values_and_polar
from ibjax.models import siriib
from ibjax.net import linen_net, to_float
from ibjax.runs import command_line, run, rundir

ATTACKS = ("pgd-20", "margin-20", "siriib-svd-20", "siriib-info-20")
OTHER = "another image"
SHOWN = 8  # images in the picture at most


class Seen(NamedTuple):
    """Images before and after the calibration, and the singular values of their colour channels, descending."""

    x: np.ndarray  # (N, H, W, C), float32 in [0, 1]
    x_avg: np.ndarray
    sigma: np.ndarray  # (N, C, H)
    sigma_avg: np.ndarray


def check(model: Any, attacks: Sequence[str] | None) -> tuple[str, ...]:
    """The attacks to run (None: `ATTACKS`); InputError on networks other than SiRIIB's, and on unsuitable attacks."""
    if not isinstance(model, siriib.Model):
        raise InputError("the network has no x_avg; give a run with model.name='siriib', as of configs/siriib.py")
    names = ATTACKS if attacks is None else tuple(attacks)
    empty = [name for name in names if not model.connections and named(name).settings.get("terms") == ("info",)]
    if empty and attacks is not None:
        raise InputError(f"attack '{empty[0]}' climbs L_info, which model.connections=0 leaves empty; give another")
    return tuple(name for name in names if name not in empty)


def look(predict: Callable, batch_size: int) -> Callable[[Any, np.ndarray], Seen]:
    """`see(variables, images (N, H, W, C)) -> Seen`, for square images; `predict` has the feature x_avg."""

    one_batch = jax.jit(partial(seen, predict))

    def see(variables, images):
        parts = [images[first : first + batch_size] for first in range(0, len(images), batch_size)]
        return jax.tree.map(lambda *a: np.concatenate(a), *(one_batch(variables, part) for part in parts))

    return see


def seen(predict: Callable, variables: Any, images: Array) -> Seen:
    """`Seen` of one batch (B, H, W, C) of square images; a matrix is an image's colour channel."""
    x = to_float(images)
    x_avg = predict(variables, x)[1]["x_avg"]
    of_x, of_x_avg = (singular_values_and_polar(jnp.moveaxis(each, -1, 1))[0] for each in (x, x_avg))
    return Seen(x, x_avg, of_x, of_x_avg)


def change(before: Seen, after: Seen) -> dict[str, Any]:
    """{"moved", "passed", "sigma", "sigma_avg"} from the images in `before` to those in `after`, pair by pair.

    moved: the number of pairs that differ; passed: the mean over these, None where there are none.
    """

    def norms(a, b, axes):
        return np.sqrt(np.sum(np.square(a.astype(np.float64) - b), axis=axes))

    distance, behind = norms(after.x, before.x, (1, 2, 3)), norms(after.x_avg, before.x_avg, (1, 2, 3))
    moved = distance > 0
    return {
        "moved": int(moved.sum()),
        "passed": float(np.mean(behind[moved] / distance[moved])) if moved.any() else None,
        "sigma": float(norms(after.sigma, before.sigma, -1).mean()),
        "sigma_avg": float(norms(after.sigma_avg, before.sigma_avg, -1).mean()),
    }


def evaluate(
    workdir: Path, checkpoint: str = "best", *, attacks: Sequence[str] | None = None, n: int | None = None
) -> tuple[dict[str, Any], dict[str, Seen]]:
    """Attacks a run's test images, or `n` of them; writes the record and returns (record, `SHOWN` of the images).

    attacks: names of `evaluation/named.py`; the run's `evaluate` section sets norm, eps and step size. The keys of the
    images are "x" and the attacks' names.
    """
    saved, facts = rundir.read_config(workdir)
    attacks = check(run.build_model(saved.model, facts["num_classes"], "model"), attacks)
    trained, settings, split = attacked.load(workdir, checkpoint, attacks=attacks, n=n)
    settings["batch_size"] = min(settings["batch_size"], len(split.labels))  # a batch is padded to its size
    predict = linen_net(run.in_float32(trained.model)).predict
    see = look(predict, settings["batch_size"])
    clean = see(trained.variables, split.images)
    chosen = stratified(split.labels, min(SHOWN, len(split.labels)), seed=0)
    changes, shown = {}, {"x": jax.tree.map(lambda a: a[chosen], clean)}
    for name in attacks:
        seen = see(trained.variables, attacked.attack(name, predict, trained, split, settings)[1])
        changes[name], shown[name] = change(clean, seen), jax.tree.map(lambda a: a[chosen], seen)
    changes[OTHER] = change(clean, jax.tree.map(lambda a: np.roll(a, 1, axis=0), clean))
    record = {
        **run.origin(trained, checkpoint),
        "dataset": trained.facts["label"],
        "n": len(split.labels),
        **{key: settings[key] for key in ("norm", "eps", "step_size")},
        "changes": changes,
    }
    output.record(workdir / "modulation", checkpoint, record)
    return record, shown


def heading(record: dict[str, Any]) -> str:
    """One line that states what was measured, and on which data."""
    return f"{record['title']} on {record['dataset']}, n = {record['n']}, {record['norm']} eps {record['eps']}"


def lines(record: dict[str, Any]) -> Iterable[str]:
    """The record as a Markdown table."""
    yield heading(record)
    yield "| x' | passed | change of σ | of σ behind the calibration |"
    yield "|---|---|---|---|"
    for name, row in record["changes"].items():
        passed = "–" if row["passed"] is None else f"{row['passed']:.3f}"
        label = name if name == OTHER else attack_label(name)
        yield f"| {label} | {passed} | {row['sigma']:.3f} | {row['sigma_avg']:.3f} |"


def draw(record: dict[str, Any], shown: dict[str, Seen], file: Path) -> None:
    """The picture: rows x and x_avg(x), and for each attack x', x_avg(x') and their difference."""
    clean, *rest = shown.values()
    differences = [seen.x - seen.x_avg for seen in rest]
    largest = max(float(np.abs(d).max()) for d in differences)
    scale = largest if largest > 0 else 1.0
    labels, images, above = ["$x$", r"$x_{\rm avg}(x)$"], [clean.x, clean.x_avg], [0.05, 0.0]
    for name, seen, difference in zip(list(shown)[1:], rest, differences, strict=True):
        labels += [f"$x'$\n{pictures.attack_lines(name)}", r"$x_{\rm avg}(x')$"]
        labels += [f"$x' - x_{{\\rm avg}}(x')$\n−{scale:.2f} to {scale:.2f}"]
        images += [seen.x, seen.x_avg, 0.5 + difference / (2 * scale)]
        above += [0.12, 0.0, 0.0]
    drawn, panels = pictures.grid(labels, len(clean.x), above)
    for row, of_row in zip(panels, images, strict=True):
        for panel, image in zip(row, of_row, strict=True):
            pictures.show(panel, image)
    pictures.title(drawn, heading(record))
    pictures.save(drawn, file)


def main() -> None:
    """The command line of this module."""
    parser = command_line.of_run("ibjax.analysis.modulation", __doc__)
    parser.add_argument(
        "--attacks",
        type=command_line.comma_list,
        help=f"names, separated by commas; default: {','.join(ATTACKS)}",
    )
    commands.add_n(parser)
    pictures.add_argument(parser)
    given = parser.parse_args()

    def measure():
        return evaluate(given.workdir, given.checkpoint, attacks=given.attacks, n=given.n)

    commands.conduct(given, measure, lambda found: lines(found[0]), lambda found, file: draw(*found, file))


if __name__ == "__main__":
    main()
