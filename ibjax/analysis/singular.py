"""Whether an attack lies in the singular values of an image: Figures 1 and 2 of SiRIIB.

    python -m ibjax.analysis.singular --workdir=DIR [--checkpoint=best] [--attacks=pgd-20,margin-20,autoattack]
                                      [--n=1000] [--picture=FILE.pdf]

    x = U Σ Vᵀ,   x' = U' Σ' V'ᵀ                               SVD of each channel, an H×W matrix; values descending

| row       | the network sees          |                                                                          |
|-----------|---------------------------|--------------------------------------------------------------------------|
| image     | x'                        | Figure 1, solid                                                          |
| swapped   | x'' = U' Σ V'ᵀ in [0, 1]  | Figure 1, hollow                                                         |
| unclipped | x'' without clipping      | shows the effect of clipping                                             |
| converse  | U Σ' Vᵀ in [0, 1]         | the effect of the attack through the singular values alone               |
| noise     | x' + N, ‖N‖ = ‖Σ − Σ'‖    | control: x' plus random noise of the swap's size; clipped                |
| clipped   |                           | share of the values of x'' outside [0, 1]                                |
| moved     |                           | ‖x'' − x'‖ / ‖x' − x‖ = ‖Σ − Σ'‖ / ‖x' − x‖, at most 1 (Mirsky)          |
| left      |                           | ‖x'' − x‖ / ‖x' − x‖                                                     |

The paper has the first two rows and concludes that singular values hold adversarial information. But these rows could
also differ because x'' is nearer to x; the other rows separate the two explanations. Each costs a forward pass and no
further SVD. The paper does not say whether x'' is clipped; here it is, because networks expect images in [0, 1].

An image counts if it is classified correctly both clean and as the row changes it. The last three rows are means over
the images that the attack changed, since AutoAttack leaves images that stay robust unchanged. Where singular values of
x' coincide, for instance at zero, U' and V' are not unique, and x'' depends on LAPACK's choice. The SVD runs in float64
on the host. Writes `singular/<checkpoint>.json` in the workdir, in percent.

The picture shows x, x', x'', x' − x and x'' − x' for the first images on which the first attack succeeds, with the
predicted class below x' and x''; in the differences, mid-grey means no change.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ibjax.analysis import commands, output, pictures
from ibjax.analysis.attacked import attack, check_counts, load, predictions
from ibjax.attacks.geometry import TOLERANCE
from ibjax.evaluation.results import attack_label
from ibjax.evaluation.scoring import percent
from ibjax.net import float_on_host, linen_net
from ibjax.runs import command_line, run

SEEN = ("swapped", "unclipped", "converse", "noise")
MEASURES = ("clipped", "moved", "left")
DRAWN = 4  # images of each attack in the picture


class Example(NamedTuple):
    """The part of the picture for one attack: images (k, H, W, C) in [0, 1] with their true and predicted classes."""

    x: np.ndarray
    x_adv: np.ndarray
    swapped: np.ndarray
    label: np.ndarray
    predicted_adv: np.ndarray
    predicted_swapped: np.ndarray


def decompose(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(U (N, C, H, k), Σ (N, C, k), Vᵀ (N, C, k, W)) of images (N, H, W, C), in float64; k = min(H, W)."""
    u, s, vt = np.linalg.svd(np.moveaxis(images.astype(np.float64), -1, 1), full_matrices=False)
    return u, s, vt


def compose(u: np.ndarray, s: np.ndarray, vt: np.ndarray) -> np.ndarray:
    """The images (N, H, W, C) with these singular vectors and values, not clipped."""
    return np.moveaxis((u * s[..., None, :]) @ vt, 1, -1)


def swap(x: np.ndarray, x_adv: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """{row: value} for images in [0, 1]: changed images (N, H, W, C) float32 for SEEN, shares (N,) for MEASURES.

    The shares are NaN where x and x_adv are equal.
    """
    (u, s, vt), (u_adv, s_adv, vt_adv) = decompose(x), decompose(x_adv)
    swapped, noise = compose(u_adv, s, vt_adv), rng.standard_normal(x.shape)
    noise *= (np.sqrt(np.sum((s - s_adv) ** 2, (1, 2))) / _length(noise))[:, None, None, None]
    seen = dict(
        swapped=_clip(swapped),
        unclipped=swapped,
        converse=_clip(compose(u, s_adv, vt)),
        noise=_clip(x_adv + noise),
    )
    perturbation = _length(x_adv.astype(np.float64) - x)
    perturbation = np.where(perturbation > 0, perturbation, np.nan)
    return {
        **{row: images.astype(np.float32) for row, images in seen.items()},
        "clipped": np.where(perturbation > 0, np.mean(np.abs(swapped - _clip(swapped)) > TOLERANCE, (1, 2, 3)), np.nan),
        "moved": _length(swapped - x_adv) / perturbation,
        "left": _length(swapped - x) / perturbation,
    }


def _clip(images):
    return np.clip(images, 0, 1)


def _length(images):
    return np.sqrt(np.sum(images**2, (1, 2, 3)))


def evaluate(
    workdir: Path,
    checkpoint: str = "best",
    *,
    attacks: Sequence[str] | None = None,
    n: int | None = None,
    picture: Path | None = None,
) -> dict[str, Any]:
    """Attacks a run and swaps singular values; writes and returns the record, in percent; draws `picture`.

    attacks, n: replace those of the run's `evaluate` section, which sets norm, eps and step size.
    """
    trained, settings, split = load(workdir, checkpoint, attacks=attacks, n=n)
    check_counts(settings["attacks"])
    predict, size = linen_net(run.in_float32(trained.model)).predict, settings["batch_size"]

    def classes(images):
        return predictions(predict, trained.variables, images, size)

    x, y = float_on_host(split.images[:]), split.labels
    accuracy: dict[str, dict[str, float]] = {row: {} for row in ("image", *SEEN)}
    perturbation: dict[str, dict[str, float | None]] = {row: {} for row in MEASURES}
    examples: dict[str, Example] = {}
    chosen = None  # images to draw: the first successes of the first attack; if few, others too
    for name in settings["attacks"]:
        flags, x_adv = attack(name, predict, trained, split, settings)
        rng = np.random.default_rng(trained.config.seed)
        batches = [slice(first, first + size) for first in range(0, len(x), size)]
        parts = [swap(x[batch], x_adv[batch], rng) for batch in batches]
        found = {row: np.concatenate([part[row] for part in parts]) for row in parts[0]}
        predicted = {row: classes(found[row]) for row in SEEN}
        accuracy["image"] |= {"clean": percent(flags.clean), name: percent(flags.robust)}
        for row in SEEN:
            accuracy[row] |= {"clean": percent(flags.clean), name: percent(flags.clean & (predicted[row] == y))}
        for row in MEASURES:
            perturbation[row][name] = _mean(found[row])
        chosen = np.argsort(~(flags.clean & ~flags.robust), kind="stable")[:DRAWN] if chosen is None else chosen
        images = x[chosen], x_adv[chosen], found["swapped"][chosen]
        examples[name] = Example(*images, y[chosen], classes(images[1]), predicted["swapped"][chosen])
    record = {
        **run.origin(trained, checkpoint),
        "dataset": trained.facts["label"],
        "n": len(y),
        **{key: settings[key] for key in ("norm", "eps", "step_size")},
        "acc": accuracy,
        "perturbation": perturbation,
    }
    output.record(workdir / "singular", checkpoint, record)
    if jax.process_index() == 0 and picture is not None:
        draw(examples, record, commands.class_names(None, trained.facts), picture)
    return record


def _mean(shares):
    """The mean in percent over the images with a finite share; None where there are none."""
    known = shares[~np.isnan(shares)]
    return round(100 * float(np.mean(known)), 4) if len(known) else None


def lines(record: dict[str, Any]) -> Iterable[str]:
    """The record as a Markdown table."""
    columns = list(record["acc"]["image"])
    yield f"{record['title']} on {record['dataset']}, n = {record['n']}, {record['norm']} eps {record['eps']}, percent"
    yield f"| | {' | '.join(map(attack_label, columns))} |"
    yield "|---" * (len(columns) + 1) + "|"
    for row, values in {**record["acc"], **record["perturbation"]}.items():
        cells = ("" if values.get(column) is None else f"{values[column]:.2f}" for column in columns)
        yield f"| {row} | {' | '.join(cells)} |"


# ---- the picture -------------------------------------------------------------------------------------------


def draw(examples: dict[str, Example], record: dict[str, Any], classes: Sequence[str], file: Path) -> None:
    """Figure 2: the images of each attack side by side; both differences have the same scale, which is stated.

    classes: the class names, in order.
    """
    size = np.quantile([np.abs(_differences(example)) for example in examples.values()], 0.999)
    scale = max(1, int(0.5 / size)) if size > 1e-3 else 1  # the largest whole number that clips at most a thousandth
    names = ("x", "x′", "x″", f"x′ − x\n(× {scale})", f"x″ − x′\n(× {scale})")
    count, shown = len(examples), len(next(iter(examples.values())).x)
    widths = ([1.0] * shown + [0.25]) * count
    drawn = pictures.figure(0.9 + 0.9 * sum(widths[:-1]), 5.3)
    about = f"{record['title']} on {record['dataset']}, {record['norm']} eps {record['eps']}"
    drawn.suptitle(about, fontsize=10, parse_math=False)
    panels = drawn.subplots(len(names), len(widths) - 1, squeeze=False, width_ratios=widths[:-1])
    for panel in panels[:, shown :: shown + 1].ravel():  # between the attacks
        panel.set_visible(False)
    for panel, name in zip(panels[:, 0], names, strict=True):
        panel.set_ylabel(name, rotation=0, ha="right", va="center")
    for i, (name, example) in enumerate(examples.items()):
        block = panels[:, i * (shown + 1) :][:, :shown]
        block[0, 0].set_title(attack_label(name), loc="left", fontsize=10)
        _fill(block, example, scale, classes)
    pictures.save(drawn, file)


def _differences(example):
    return np.stack([example.x_adv - example.x, example.swapped - example.x_adv])


def _fill(panels, example, scale, names):
    """Draws the images into (5, k) panels, with classes below the first three rows, wrong predictions in red."""
    rows = [example.x, example.x_adv, example.swapped, *(0.5 + scale * _differences(example))]
    under = [example.label, example.predicted_adv, example.predicted_swapped, None, None]
    for row, images, classes in zip(panels, rows, under, strict=True):
        for i, (panel, image) in enumerate(zip(row, images, strict=True)):
            pictures.show(panel, image)
            panel.set(xticks=[], yticks=[])
            if classes is not None:
                wrong = classes[i] != example.label[i]
                colour = "#b00020" if wrong else "black"
                panel.set_xlabel(pictures.short(names[classes[i]]), color=colour, labelpad=2, parse_math=False)


def main() -> None:
    """The command line of this module."""
    parser = command_line.of_run("ibjax.analysis.singular", __doc__)
    command_line.add_attacks(parser)
    commands.add_n(parser)
    pictures.add_argument(parser)
    given = parser.parse_args()

    def measure():
        return evaluate(given.workdir, given.checkpoint, attacks=given.attacks, n=given.n, picture=given.picture)

    commands.conduct(given, measure, lines)


if __name__ == "__main__":
    main()
