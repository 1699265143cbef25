"""Score-CAM heat maps of clean images, as in Figure 7 of SiRIIB, and of attacked ones. Score-CAM: Wang, Wang, Du,
Yang, Zhang, Ding, Mardziel & Hu, "Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks",
CVPRW 2020.

    python -m ibjax.analysis.score_cam --workdir=DIR [--checkpoint=best] [--attack=pgd-20] [--n=8] [--tap=stage4]
                                       [--picture=FILE.pdf] [--names=plane,car,bird,cat,deer,dog,frog,horse,ship,truck]

    M_k = unit(up(A_k))                        A_k: channel k of the tap; up: bilinear resizing to the size of x
    w_k = softmax(f(x ⊙ M_k))_c                unit(a) = (a − min a) / (max a − min a)
    map = unit(ReLU(Σ_k w_k up(A_k)))          constant channels are left out

c is the network's prediction for the clean image, also in the map of x': both maps show the evidence for the same
class. The default tap is the network's last map of more than one pixel (of VGG on 32×32 images, that of stage 4).
The paper of SiRIIB states neither layer nor class.

The paper of Score-CAM subtracts a baseline's score from w_k and takes a softmax over channels; here, as in its code,
the w_k are plain scores. That code masks images after normalisation, so that masked pixels have the mean colour. Our
networks normalise inside, so masked pixels are black.

To compare runs, use the mean cosine similarity between the maps of x and x'. Maps are nonnegative, so even those of
different images are similar; as a reference, the record has the mean over all pairs of x and the x' of another image.
A map that is 0 everywhere, for instance because all channels are left out, is called empty and enters neither mean.

Writes `score_cam/<checkpoint>.json` in the workdir, and the images and maps beside it (.npz). The picture shows up to
ten of them, stratified by class.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ibjax.analysis import attacked, commands, output, pictures
from ibjax.data import stratified
from ibjax.errors import InputError, nearest
from ibjax.evaluation.results import threat_label
from ibjax.models import layers
from ibjax.net import linen_net, to_float
from ibjax.runs import command_line, run

CHUNK = 128  # masked images in one pass through the network
SHOWN = 10  # images in the picture at most


def spatial_taps(predict: Callable, variables: Any, input_shape: Sequence[int]) -> list[str]:
    """The names of features (B, H, W, C) with more than one pixel, in the order of their computation."""
    shapes = attacked.feature_shapes(predict, variables, input_shape)
    return [name for name, shape in shapes.items() if len(shape) == 4 and max(shape[1:3]) > 1]


def explainer(predict: Callable, tap: str, chunk: int = CHUNK) -> Callable[[Any, np.ndarray, np.ndarray], np.ndarray]:
    """`explain(variables, images (N, H, W, C), classes (N,)) -> maps (N, H, W)` in [0, 1], float32; empty ones are 0.

    predict: (variables, x) -> (logits, features). tap: a feature (B, h, w, K). chunk: images in one pass.
    """
    activations = jax.jit(lambda variables, x: predict(variables, x)[1][tap])

    scores = jax.jit(partial(masked_scores, predict))

    def explain_one(variables, x, c):
        a = np.moveaxis(np.asarray(activations(variables, x[None])[0]), -1, 0)  # (K, h, w)
        kept = np.flatnonzero(a.min((1, 2)) < a.max((1, 2)))
        size, weights = min(chunk, len(a)), np.zeros(len(a), np.float32)
        for first in range(0, len(kept), size):
            part = kept[first : first + size]
            padded = np.resize(part, size)  # one compiled size for all chunks; the excess is dropped
            weights[part] = np.asarray(scores(variables, x, a[padded], c))[: len(part)]
        total = np.tensordot(weights, a, 1)[None, ..., None]  # up is linear: the sum comes first
        total = np.maximum(np.asarray(layers.resize(jnp.asarray(total), x.shape[:2]))[0, ..., 0], 0)
        return (total - total.min()) / max(np.ptp(total), np.finfo(np.float32).tiny)

    def explain(variables, images, classes):
        x = to_float(jnp.asarray(images))
        return np.stack([explain_one(variables, *pair) for pair in zip(x, jnp.asarray(classes), strict=True)])

    return explain


def masked_scores(predict: Callable, variables: Any, x: Array, channels: Array, c: Array) -> Array:
    """(k,): the probability of class c for one image (H, W, C), masked by each of the channels (k, h, w)."""
    up = layers.resize(channels[..., None], x.shape[:2])
    low, high = (pick(up, axis=(1, 2), keepdims=True) for pick in (jnp.min, jnp.max))
    masks = (up - low) / jnp.maximum(high - low, jnp.finfo(up.dtype).tiny)
    return jax.nn.softmax(predict(variables, x[None] * masks)[0])[:, c]


def similarity(maps: np.ndarray, others: np.ndarray) -> dict[str, Any]:
    """Compares maps (N, H, W) with those of the same images under attack: {"cosine", "cosine_between", "empty"}.

    cosine: mean similarity over images; cosine_between: over pairs of different images; None where no pair counts.
    empty: the number of images that are left out because one of their two maps is 0.
    """
    a, b = (m.reshape(len(m), -1).astype(np.float64) for m in (maps, others))
    counts = a.any(1) & b.any(1)
    a, b = (m[counts] / np.linalg.norm(m[counts], axis=1, keepdims=True) for m in (a, b))
    cosines, same = a @ b.T, np.eye(len(a), dtype=bool)
    means = {name: cosines[pairs] for name, pairs in (("cosine", same), ("cosine_between", ~same))}
    found = {name: round(float(values.mean()), 4) if values.size else None for name, values in means.items()}
    return {**found, "empty": int(np.sum(~counts))}


def evaluate(
    workdir: Path, checkpoint: str = "best", *, attack: str = "pgd-20", n: int = 8, tap: str | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Computes the maps of `n` of a run's test images, clean and attacked; writes and returns (record, arrays).

    attack: a name of `evaluation/named.py`; norm, eps and step size are those of the run's `evaluate` section.
    arrays: x, x_adv (n, H, W, C); map, map_adv (n, H, W); label, predicted, predicted_adv (n,).
    """
    trained, settings, split = attacked.load(workdir, checkpoint, attacks=(attack,), n=n)
    settings["batch_size"] = min(settings["batch_size"], n)  # a batch is padded to its size
    predict = linen_net(run.in_float32(trained.model)).predict
    taps = spatial_taps(predict, trained.variables, trained.facts["input_shape"])
    if tap not in (None, *taps) or not taps:
        raise InputError(f"--tap={tap} is no map of more than one pixel of this network; {nearest(str(tap), taps)}")
    tap = tap or taps[-1]
    _, x_adv = attacked.attack(attack, predict, trained, split, settings)
    explain = explainer(predict, tap)
    pair = {"": split.images, "_adv": x_adv}
    predicted = [attacked.predictions(predict, trained.variables, x, settings["batch_size"]) for x in pair.values()]
    maps = [explain(trained.variables, x, predicted[0]) for x in pair.values()]
    record = {
        **run.origin(trained, checkpoint),
        "dataset": trained.facts["label"],
        "n": len(split.labels),
        "attack": attack,
        **{key: settings[key] for key in ("norm", "eps", "step_size")},
        "tap": tap,
        **similarity(*maps),
    }
    arrays: dict[str, np.ndarray] = {"label": split.labels}
    for suffix, x, m, classes in zip(pair, pair.values(), maps, predicted, strict=True):
        arrays |= {f"x{suffix}": x, f"map{suffix}": m, f"predicted{suffix}": classes}
    small = {name: a.astype(np.float16) if name.startswith("map") else a for name, a in arrays.items()}
    output.record(workdir / "score_cam", checkpoint, record, small)
    return record, arrays


def heading(record: dict[str, Any]) -> str:
    """One line that states what was measured, and on which data."""
    seen = f"{record['title']} on {record['dataset']}, n = {record['n']}"
    return f"{seen}, {threat_label(record)}, Score-CAM of {record['tap']}"


def lines(record: dict[str, Any]) -> Iterable[str]:
    """The record as a Markdown table."""
    yield heading(record) + (f", {record['empty']} empty" if record["empty"] else "")
    yield "| maps of | mean cosine similarity |"
    yield "|---|---|"
    for key, text in (("cosine", "x and its x'"), ("cosine_between", "x and the x' of another image")):
        yield f"| {text} | {'–' if record[key] is None else f'{record[key]:.3f}'} |"


# ---- the picture -------------------------------------------------------------------------------------------


def draw(record: dict[str, Any], arrays: dict[str, np.ndarray], file: Path, names: Sequence[str]) -> None:
    """The picture: rows x, its map, x', its map; above an image its prediction and, if that is wrong, its class."""
    shown = stratified(arrays["label"], min(len(arrays["label"]), SHOWN), seed=0)
    labels = ["$x$", "map of $x$", f"$x'$\n{pictures.attack_lines(record['attack'])}", "map of $x'$"]
    drawn, panels = pictures.grid(labels, len(shown), above=(0.3, 0.0, 0.35, 0.0), right=0.5)
    heat = None
    for column, i in zip(panels.T, shown, strict=True):
        true = int(arrays["label"][i])
        for row, suffix in ((0, ""), (2, "_adv")):
            image, seen = arrays[f"x{suffix}"][i], int(arrays[f"predicted{suffix}"][i])
            text = pictures.short(names[seen]) + ("" if seen == true else f"\n(is {pictures.short(names[true])})")
            colour = "black" if seen == true else "firebrick"
            column[row].set_title(text, fontsize=8, pad=2, color=colour, parse_math=False)
            pictures.show(column[row], image)
            # the image shows through in similar greys, which hardly change the lightness that encodes the map
            grey = 0.35 + 0.3 * np.mean(to_float(jnp.asarray(image)), -1, keepdims=True)
            pictures.show(column[row + 1], grey)
            heat = column[row + 1].imshow(arrays[f"map{suffix}"][i], cmap="viridis", vmin=0, vmax=1, alpha=0.75)
    for row in (1, 3):
        place = panels[row, -1].inset_axes((1.08, 0, 0.08, 1), facecolor="0.5")
        drawn.colorbar(heat, cax=place, ticks=[0, 1]).ax.tick_params(labelsize=8)
    pictures.title(drawn, heading(record))
    pictures.save(drawn, file)


def main() -> None:
    """The command line of this module."""
    parser = command_line.of_run("ibjax.analysis.score_cam", __doc__)
    commands.add_attack(parser, "pgd-20")
    commands.add_n(parser, 8)
    parser.add_argument("--tap", help="the feature, as stage4; default: the last map of more than one pixel")
    pictures.add_argument(parser)
    commands.add_class_names(parser)
    given = parser.parse_args()

    def measure():
        return evaluate(given.workdir, given.checkpoint, attack=given.attack, n=given.n, tap=given.tap)

    def picture(found, file):
        record, arrays = found
        draw(record, arrays, file, given.names)

    commands.conduct(given, measure, lambda found: lines(found[0]), picture)


if __name__ == "__main__":
    main()
