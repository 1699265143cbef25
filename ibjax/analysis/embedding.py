"""A network's features of its test images in two dimensions, by t-SNE: Figure 3 of IB-RAR and Figure 8 of SiRIIB.

    python -m ibjax.analysis.embedding --workdir=DIR [--workdir=DIR2 …] [--checkpoint=best] [--attack=pgd-10] [--n=1000]
                    [--tap=pre_logits] [--seed=33] [--names=plane,car,bird,…] [--picture=FILE.pdf]

    silhouette = mean_i (b_i − a_i) / max(a_i, b_i)    a_i, b_i: the mean distance of image i's feature to those of its
                                                       own class, and of the nearest other one; between −1 and 1

The features are the penultimate ones in evaluation mode, or another tap with --tap. A spatial tap is averaged over its
positions, as in the networks' own pooling; if it were flattened, the position of an object would count as much as its
kind. t-SNE is that of scikit-learn with its default perplexity of 30 (neither paper states one). It starts from random
points, so that the seed matters: another seed moves the clusters. (scikit-learn's newer default starts from principal
components.) Several runs are drawn side by side with the same range of axes, as in SiRIIB.

The picture alone is no evidence: t-SNE preserves neighbourhoods, but neither the widths of clusters nor the distances
between them, on which both papers rely. The silhouette by true class, computed in *feature* space, can be compared.

Writes `embedding/<checkpoint>.<attack>.npz` in each workdir, with `coordinates` (n, 2), `labels` and `predictions`
(n,), and a .json that states their origin. <attack> is "clean" without an attack; another tap adds `.<tap>`.
"""

import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ibjax import cli, files
from ibjax.analysis import attacked, commands, output, pictures
from ibjax.attacks.names import in_file_name
from ibjax.errors import InputError, check_range, nearest
from ibjax.evaluation.results import threat_label
from ibjax.evaluation.scoring import percent
from ibjax.net import linen_net, to_float
from ibjax.runs import command_line, run, rundir

CLEAN = "clean"  # used in place of an attack's name
PERPLEXITY = 30.0  # scikit-learn's default
# ten colours that the colour-blind can distinguish: Petroff, "Accessible Color Sequences for Data Visualization" (2021)
COLOURS = ["#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"]
_MARKS, _COLUMNS = "o^", 4


class Embedding(NamedTuple):
    """The embedding of one run, with its record; each row belongs to one test image."""

    record: dict[str, Any]
    coordinates: np.ndarray  # (n, 2) float32
    labels: np.ndarray  # (n,)
    predictions: np.ndarray  # (n,): for the embedded images, which may be attacked


# ---- numbers -------------------------------------------------------------------------------------------------


def taps(predict: Callable, variables: Any, input_shape: Sequence[int]) -> list[str]:
    """The taps of a network that have one entry per image; other features of a stochastic network do not."""
    shapes = attacked.feature_shapes(predict, variables, input_shape)
    return [name for name, shape in shapes.items() if len(shape) > 1 and shape[0] == 1]


def features(predict: Callable, variables: Any, images: Any, batch_size: int, tap: str) -> np.ndarray:
    """A tap (N, d) of images (N, H, W, C), float32; a spatial one is averaged over its positions."""

    part = jax.jit(partial(averaged, predict, tap))
    parts = [images[first : first + batch_size] for first in range(0, len(images), batch_size)]
    return np.concatenate([np.asarray(part(variables, images)) for images in parts])


def averaged(predict: Callable, tap: str, variables: Any, images: Array) -> Array:
    """A tap (B, d) of one batch (B, H, W, C), float32; a spatial one is averaged over its positions."""
    feature = predict(variables, to_float(images))[1][tap].astype(jnp.float32)
    return jnp.mean(feature, axis=tuple(range(1, feature.ndim - 1)))


def embedded(found: np.ndarray, seed: int = 33) -> np.ndarray:
    """t-SNE of features (n, d), n > 30: coordinates (n, 2) without a unit, determined by the seed."""
    from sklearn.manifold import TSNE  # slow to import

    return TSNE(2, perplexity=PERPLEXITY, init="random", random_state=seed).fit_transform(found)


def silhouette(found: np.ndarray, labels: np.ndarray) -> float:
    """The mean silhouette of features (n, d) by class, in Euclidean distance; the only image of a class counts as 0."""
    from sklearn.metrics import silhouette_score

    classes = len(np.unique(labels))
    if not 1 < classes < len(labels):
        raise InputError(f"a silhouette of {len(labels)} images of {classes} classes is not defined; give more images")
    return float(silhouette_score(found, labels))


def evaluate(
    workdir: Path,
    checkpoint: str = "best",
    *,
    attack: str = CLEAN,
    n: int | None = None,
    tap: str = "pre_logits",
    seed: int = 33,
) -> Embedding:
    """Embeds a run's test images, or `n` of them stratified by class; writes and returns the embedding.

    attack: "clean", or a name of `evaluation/named.py`; the run's `evaluate` section sets norm, eps and step size.
    The record's accuracy, in percent, is that on the embedded images, which may be attacked.
    """
    check_range("--seed", seed, 0, 2**32 - 1)
    names = None if attack == CLEAN else (attack,)
    trained, settings, split = attacked.load(workdir, checkpoint, attacks=names, n=n)
    predict = linen_net(run.in_float32(trained.model)).predict
    allowed = taps(predict, trained.variables, trained.facts["input_shape"])
    if len(split.labels) <= PERPLEXITY:
        raise InputError(f"n={len(split.labels)} is not allowed; t-SNE of perplexity 30 takes at least 31 images")
    if tap not in allowed:
        raise InputError(f"--tap={tap} is no feature of the images in {workdir}; {nearest(tap, allowed)}")
    images = split.images if names is None else attacked.attack(attack, predict, trained, split, settings)[1]
    found = features(predict, trained.variables, images, settings["batch_size"], tap)
    classes = attacked.predictions(predict, trained.variables, images, settings["batch_size"])
    origin = run.origin(trained, checkpoint)
    origin["versions"]["scikit-learn"] = importlib.metadata.version("scikit-learn")
    record = {
        **origin,
        "dataset": trained.facts["label"],
        "num_classes": trained.facts["num_classes"],
        "n": len(split.labels),
        "attack": attack,
        **({} if names is None else {key: settings[key] for key in ("norm", "eps", "step_size")}),
        "tap": tap,
        "dimension": found.shape[1],
        "acc": percent(classes == split.labels),
        "silhouette": round(silhouette(found, split.labels), 4),
        "perplexity": PERPLEXITY,
        "tsne_seed": seed,
    }
    result = Embedding(record, embedded(found, seed), split.labels, classes)
    name = f"{checkpoint}.{in_file_name(attack)}" + ("" if tap == "pre_logits" else f".{tap}")
    arrays = dict(coordinates=result.coordinates, labels=result.labels, predictions=result.predictions)
    output.record(workdir / "embedding", name, record, arrays)
    return result


def compare(
    workdirs: Sequence[Path], checkpoint: str = "best", *, n: int | None = None, **options: Any
) -> list[Embedding]:
    """`evaluate` of each run; InputError unless all runs have the same images."""
    shown = set()
    for workdir in workdirs:
        settings, facts = rundir.read_config(workdir)
        shown.add((facts["digests"]["test"], settings.evaluate.n if n is None else n))
    if len(shown) > 1:
        raise InputError("the runs differ in their test images; give runs of one data set, and their number with --n")
    return [evaluate(workdir, checkpoint, n=n, **options) for workdir in workdirs]


def lines(results: Sequence[Embedding]) -> Iterable[str]:
    """The records as a Markdown table."""
    first = results[0].record
    yield f"features {first['tap']} of {first['dataset']}, n = {first['n']}; the silhouette is of the feature space"
    yield "| run | images | dimension | accuracy in % | silhouette |"
    yield "|---|---|---|---|---|"
    for record in (result.record for result in results):
        cells = (record["title"], _shown(record), record["dimension"], f"{record['acc']:.2f}")
        yield f"| {' | '.join(map(str, cells))} | {record['silhouette']:.3f} |"


def _shown(record):
    return CLEAN if record["attack"] == CLEAN else threat_label(record)


# ---- the picture ---------------------------------------------------------------------------------------------


def draw(results: Sequence[Embedding], names: Sequence[str]) -> Any:
    """A Figure with a panel for each run, at most four in a row, all with the same axes; `names` are the class names.

    Up to ten classes have a colour each, up to twenty a colour and a marker. With more, classes with close numbers look
    alike, and a colour bar replaces the legend.
    """
    rows = -(-len(results) // _COLUMNS)
    columns = -(-len(results) // rows)
    drawn = pictures.figure(3.1 * columns + 0.9, 3.6 * rows)
    panels = drawn.subplots(rows, columns, squeeze=False).ravel()
    points = np.concatenate([result.coordinates for result in results])
    middle, reach = (points.max(0) + points.min(0)) / 2, 0.53 * np.ptp(points, axis=0).max()
    classes = results[0].record["num_classes"]
    for panel, result in zip(panels, results, strict=False):
        record = result.record
        (left, low), (right, high) = middle - reach, middle + reach
        panel.set(xlim=(left, right), ylim=(low, high), aspect="equal", xticks=[], yticks=[])  # t-SNE has no unit
        panel.set_title(record["title"], fontsize=10, parse_math=False)
        numbers = f"accuracy {record['acc']:.1f} %, silhouette {record['silhouette']:.2f}".replace("-", "−")
        panel.set_xlabel(f"{_shown(record)}\n{numbers}", fontsize=8, parse_math=False)
        scatter = _scatter(panel, result, classes)
    for panel in panels[len(results) :]:
        panel.set_visible(False)
    if classes > len(COLOURS) * len(_MARKS):
        drawn.colorbar(scatter, ax=list(panels), label="class", shrink=0.8)
    else:
        _legend(drawn, names)
    return drawn


def _scatter(panel, result, classes):
    """All points, in the order of the images, so that no class lies above another."""
    (x, y), labels = result.coordinates.T, result.labels
    style = dict(s=float(np.clip(7000 / len(labels), 2, 16)), linewidths=0, alpha=0.8)
    if classes > len(COLOURS) * len(_MARKS):
        return panel.scatter(x, y, c=labels, cmap="turbo", vmin=0, vmax=classes - 1, **style)
    for i, mark in enumerate(_MARKS):
        shown = labels // len(COLOURS) == i
        colours = [COLOURS[c % len(COLOURS)] for c in labels[shown]]
        panel.scatter(x[shown], y[shown], c=colours, marker=mark, **style)
    return None


def _legend(drawn, names):
    from matplotlib.lines import Line2D

    entries = []
    for c, name in enumerate(names):
        look = dict(marker=_MARKS[c // len(COLOURS)], color=COLOURS[c % len(COLOURS)], linestyle="", markersize=6)
        entries.append(Line2D([], [], label=name, **look))
    drawn.legend(handles=entries, loc="outside right center", fontsize=8, frameon=False)


def main() -> None:
    """The command line of this module."""
    parser = cli.parser("ibjax.analysis.embedding", __doc__)
    command_line.add_trust(parser)
    parser.add_argument("--workdir", type=files.path, action="append", required=True, help="again for a run beside it")
    parser.add_argument("--checkpoint", default="best", help="best, last or a step")
    commands.add_attack(parser, CLEAN, "; default: the images as they are")
    commands.add_n(parser)
    parser.add_argument("--tap", default="pre_logits", help="the feature, as stage4")
    parser.add_argument("--seed", type=int, default=33, help="of t-SNE")
    commands.add_class_names(parser)
    pictures.add_argument(parser)
    given = parser.parse_args()

    def measure():
        options = dict(attack=given.attack, n=given.n, tap=given.tap, seed=given.seed)
        return compare(given.workdir, given.checkpoint, **options)

    commands.conduct(given, measure, lines, lambda found, file: pictures.save(draw(found, given.names), file))


if __name__ == "__main__":
    main()
