"""The figures of a report as HTML: curves against eps, training curves, example images.

Plots are SVG by matplotlib whose colours are replaced by CSS variables of the page, so that they follow its light or
dark style: --line, and --s0 to --s6 for series. Images are PNG, one pixel of data to one of the file up to `_LARGEST`.
"""

import base64
import html
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ibjax import results
from ibjax.results import Row, attack_label

# Colours that a plot is drawn in, and what the page puts in their place.
_TEXT, _GRID, _SERIES = "#0a0b0c", "#0a0b0d", [f"#5e0{i}5e" for i in range(7)]
_STYLE = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "svg.hashsalt": "ibjax",  # the same results give the same bytes
    "text.parse_math": False,  # a "$" in a title is a "$"
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.7,
    "lines.linewidth": 1.4,
    "grid.linewidth": 0.6,
    "grid.color": _GRID,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _TEXT),
}
_MARKS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"), ("X", "✖"))  # in plot, in legend
_UNCLIPPED = dict(clip_on=False, in_layout=False)  # marks at 0 and 100 % are whole, and move no axes
_WIDTH = 9.6  # inches; what the page's column shows at about 1.35 times its size
_LARGEST = 96  # pixels a side of an example; larger ones are reduced
_POINTS = 300  # of a training curve; beyond them neighbours are averaged


def escape(value: Any) -> str:
    """Text for HTML, attributes included."""
    return html.escape(str(value), quote=True)


# ---- plots -------------------------------------------------------------------------------------------------


def _svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an inline <svg> in the page's colours and font; `name` makes its ids unique on the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"\s*\n\s*", " ", text.replace("xlink:href", "href"))
    used = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'href="#|url\(#', lambda m: f"{m[0]}{name}-", text)
    for colour, variable in [(_TEXT, "currentColor"), (_GRID, "var(--line)"), *_series_variables()]:
        text = text.replace(colour, variable)
    size = re.search(r'viewBox="[^"]*"', text)
    rest = text[text.index(">") + 1 :]
    return f'<svg role="img" aria-label="{escape(description)}" {size[0] if size else ""}>{rest}'


def _series_variables():
    return [(colour, f"var(--s{i})") for i, colour in enumerate(_SERIES)]


def _legend(entries):
    """(number of the series, its symbol, text) -> a line of HTML: it never hides a curve, and takes any title."""
    items = (f'<li><span style="color:var(--s{i})">{mark}</span> {escape(text)}</li>' for i, mark, text in entries)
    return f'<ul class="legend">{"".join(items)}</ul>'


def _look(i):
    """(colour, mark) of series i: 49 pairs before one comes again."""
    return i % 7, (i + i // 7) % 7


def curves(rows: Sequence[Row]) -> str:
    """Accuracy against eps: a panel for each attack, a curve for each row."""
    attacks = sorted({record["attack"] for row in rows for record in row.records}, key=results.strength)
    if not attacks:
        return ""
    columns = min(3, len(attacks))
    lines = -(-len(attacks) // columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 2.75 * lines + 0.2), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
        for panel, attack in zip(panels, attacks, strict=False):
            ticks = {0.0: "0"}
            for i, row in enumerate(rows):
                points = results.ladders(row).get(attack, [])
                ticks.update((eps, text) for eps, text, _ in points)
                colour, mark = _look(i)
                style = dict(color=_SERIES[colour], marker=_MARKS[mark][0], markersize=4, **_UNCLIPPED)
                panel.plot([eps for eps, *_ in points], [accuracy for *_, accuracy in points], **style)
            panel.set_title(attack_label(attack))
            panel.set(ylim=(0, 100), xlim=(0, None))
            _eps_axis(panel, ticks)
        for panel in panels[len(attacks) :]:
            panel.set_visible(False)
        for panel in panels[::columns]:
            panel.set_ylabel("accuracy in %")
        picture = _svg(figure, "curves", f"Accuracy against eps under {', '.join(map(attack_label, attacks))}")
    looks = map(_look, range(len(rows)))
    legend = _legend([(colour, _MARKS[mark][1], row.label) for (colour, mark), row in zip(looks, rows, strict=True)])
    return (
        f'<section><h2>Accuracy under attack against eps</h2><figure>{legend}<div class="scroll">{picture}</div>'
        f"<figcaption>At eps 0 stands clean accuracy. A curve that does not fall far as eps grows is a sign of an "
        f"attack that fails, not of a network that is robust.</figcaption></figure></section>"
    )


def _eps_axis(panel, ticks):
    """Ticks at the eps of {eps: as written}; of 2/255, 4/255 … only the numerators stand at the axis."""
    denominators = {text.partition("/")[2] for text in ticks.values() if text != "0"}
    common = denominators.pop() if len(denominators) == 1 else ""
    panel.set_xlabel(f"eps in 1/{common}" if common else "eps")
    labels = [text.partition("/")[0] if common else text for text in ticks.values()]
    labels = [text if len(text) < 7 else f"{eps:.3g}" for eps, text in zip(ticks, labels, strict=True)]
    panel.set_xticks(list(ticks), labels)


def training(runs: Sequence[Any]) -> str:
    """Training curves of `report.RunResults`, a figure for each."""
    parts = []
    for i, run in enumerate(runs):
        if not run.metrics:
            parts.append(f"<h3>{escape(run.title)}</h3><p class=note>No rows in metrics.jsonl.</p>")
            continue
        picture, legend, caption = _training_figure(run, f"training{i}")
        parts.append(
            f'<figure><h3>{escape(run.title)}</h3>{legend}<div class="scroll">{picture}</div>'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return f"<section><h2>Training</h2>{''.join(parts)}</section>"


def _training_figure(run, name):
    """(picture, legend, caption): loss at the left, accuracies at the right, dotted lines at evaluated checkpoints."""
    train = [row for row in run.metrics if row.get("kind") == "train"]
    val = [row for row in run.metrics if row.get("kind") == "val"]
    chosen = "test" if run.config.get("select_on") == "test" else "validation"
    curves = (  # rows, key, factor to percent, symbol in the plot, in the legend, name
        (train, "clean_acc", 1, "-", "━", "training images, clean"),
        (train, "adv_acc", 1, "-", "━", "training images, attacked"),
        (val, "clean_acc", 1, "--o", "●", f"{chosen} images, clean"),
        (val, "robust_acc", 1, "--s", "■", f"{chosen} images, attacked"),
    )
    evaluated = sorted({(r["step"], r["checkpoint"]) for r in run.records if type(r.get("step")) is int})
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 2.5), layout="constrained")
        losses, accuracies = figure.subplots(1, 2)
        epochs, loss = _points(train, "loss")
        losses.plot(epochs, loss, color=_SERIES[6])
        if np.nan_to_num(loss).min(initial=0.0) >= 0:
            losses.set_ylim(bottom=0.0)
        legend = []
        for i, (rows, key, factor, line, mark, text) in enumerate(curves):
            x, y = _points(rows, key)
            if np.isfinite(y).any():
                style = dict(color=_SERIES[i], markersize=3.5, markevery=1 + len(x) // 30, **_UNCLIPPED)
                accuracies.plot(x, factor * y, line, **style)
                legend.append((i, mark, text))
        for panel, title in ((losses, "loss"), (accuracies, "accuracy in %")):
            panel.set(title=title, xlabel="epoch", xlim=(0, None))
            for step, _ in evaluated if run.steps_per_epoch else ():
                panel.axvline(step / run.steps_per_epoch, color=_TEXT, linewidth=0.8, linestyle=":")
        accuracies.set_ylim(0, 100)
        picture = _svg(figure, name, f"Training of {run.title}: loss and accuracies against epoch")
    marked = ", ".join(f"{checkpoint} (step {step})" for step, checkpoint in evaluated)
    caption = f"Evaluated checkpoint, dotted: {marked}. " if marked else ""
    names = {"training": run.config.get("attack"), chosen: (run.config.get("validate") or {}).get("attack")}
    caption += "".join(f"Attack on {name} images: {_in_words(section)}. " for name, section in names.items() if section)
    return picture, _legend(legend), escape(caption)


def _in_words(section):
    """An `attack` section of a configuration, as "pgd-10, loss kl, eps 0.15"."""
    steps = f"-{section['steps']}" if "steps" in section else ""
    rest = (f"{key} {section[key]}" for key in ("loss", "norm", "eps", "step_size", "init") if key in section)
    return ", ".join([f"{section.get('name')}{steps}", *rest])


def _points(rows, key):
    """(epochs, values) of a metric, NaN where it is not a finite number; at most `_POINTS`, means of neighbours."""
    pairs = [
        (row["epoch"], row[key]) for row in rows if all(isinstance(row.get(k), int | float) for k in ("epoch", key))
    ]
    values = np.array(pairs, np.float64).reshape(-1, 2)
    values = np.where(np.isfinite(values), values, np.nan)
    if len(values) > _POINTS:
        values = np.array([part.mean(0) for part in np.array_split(values, _POINTS)])
    return values[:, 0], values[:, 1]


# ---- images ------------------------------------------------------------------------------------------------


def examples(runs: Sequence[Any]) -> str:
    """The stored images of `report.RunResults`, a strip for each that has some."""
    parts = [_strip(run) for run in runs if run.examples]
    if not parts:
        return ""
    return f"<section><h2>Examples</h2>{''.join(parts)}</section>"


def _strip(run):
    """Clean, adversarial and difference images of a run, the predicted class under each; wrong ones are marked."""
    examples = run.examples
    x, x_adv, label = examples["x"], examples["x_adv"], examples["label"]
    delta = x_adv.astype(np.float64) - x
    largest = float(np.abs(np.nan_to_num(delta)).max(initial=0.0))
    factor = max(1, int(0.5 / largest)) if largest > 1e-3 else 1  # the largest whole one that clips no difference
    count = range(len(label))
    head = "".join(f'<th scope="col">{int(label[i])}</th>' for i in count)
    lines = [
        ("clean", x, examples["predicted"]),
        ("attacked", x_adv, examples["predicted_adv"]),
        (f"difference × {factor}", 0.5 + factor * delta, None),
    ]
    body = ""
    for name, images, predicted in lines:
        drawn = []
        for i in count:
            alt = f"image {i + 1}, {name}"
            under = "" if predicted is None else _prediction(int(predicted[i]), int(label[i]))
            drawn.append(f'<td><img alt="{escape(alt)}" src="data:image/png;base64,{_png(images[i])}">{under}</td>')
        body += f'<tr><th scope="row">{escape(name)}</th>{"".join(drawn)}</tr>'
    source = f"{attack_label(examples['attack'])}, checkpoint {examples['checkpoint']}"
    eps = [r["eps"] for r in run.records if results.is_main(r) and r["attack"] == examples["attack"]]
    source += f", eps {eps[0]}" if eps else ""
    return (
        f'<h3>{escape(run.title)}</h3><figure><div class="scroll"><table class="strip"><thead><tr>'
        f'<th scope="row">true class</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"<figcaption>The first images of the test set under {escape(source)}. Below each, the predicted class; "
        f"✗ marks a wrong one. In the difference, mid-grey is no change.</figcaption></figure>"
    )


def _prediction(predicted, label):
    if predicted == label:
        return f"<span>{predicted}</span>"
    return f'<span class="wrong">✗ {predicted}</span>'


def _png(image: np.ndarray) -> str:
    """An (H, W, 1 or 3) image in [0, 1] as a base64 PNG."""
    pixels = np.round(255 * np.clip(np.nan_to_num(image), 0, 1)).astype(np.uint8)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    picture.thumbnail((_LARGEST, _LARGEST))  # leaves smaller ones as they are
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
