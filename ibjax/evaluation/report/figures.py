"""The figures of a report as HTML: curves against eps, training curves, example images.

Plots are SVG by matplotlib. Their colours are replaced by CSS variables of the page, so that they follow its light or
dark style: --line, and --s0 to --s6 for series. Images are PNG, in original resolution up to `_LARGEST` pixels a side.
"""

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ibjax import config
from ibjax.evaluation import results
from ibjax.evaluation.report import tables
from ibjax.evaluation.report.tables import Family
from ibjax.evaluation.results import attack_label

# Colours in which a plot is drawn, and the CSS variables that replace them on the page.
_TEXT, _GRID, _SERIES = "#0a0b0c", "#0a0b0d", [f"#5e0{i}5e" for i in range(7)]
_STYLE = {
    "svg.fonttype": "none",  # text stays text: small files, selectable, in the page's font
    "svg.hashsalt": "ibjax",  # the same results give the same bytes
    "text.parse_math": False,  # a "$" in a title is literal
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
_MARKS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"), ("X", "✖"))  # (in plot, in legend)
_UNCLIPPED = dict(clip_on=False, in_layout=False)  # marks at 0 and 100 % are not cut off and do not move the axes
_WIDTH = 9.6  # inches; the page's column enlarges it by a factor of about 1.35
_LARGEST = 96  # pixels a side of an example; larger ones are reduced
_POINTS = 300  # maximum number of points in a training curve; longer ones are averaged


def escape(value: Any) -> str:
    """Escapes a value for HTML text and attributes."""
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
    """An HTML legend from (number of the series, its symbol, text); outside the plot it cannot hide a curve."""
    items = (f'<li><span style="color:var(--s{i})">{mark}</span> {escape(text)}</li>' for i, mark, text in entries)
    return f'<ul class="legend">{"".join(items)}</ul>'


def _look(i):
    """(colour, mark) of series i; the pairs repeat after 49."""
    return i % 7, (i + i // 7) % 7


def curves(families: Sequence[Family]) -> str:
    """Accuracy against eps: a panel for each attack that is bounded by eps, a curve for each line of the table."""
    drawn = [tables.curves(family) for family in families]
    attacks = {attack for found in drawn for attack in found}
    ladders = {attack for attack in attacks if any(len(found.get(attack, [])) > 2 for found in drawn)}
    attacks = sorted(ladders or attacks, key=results.strength)  # for the others the tables suffice
    if not attacks:
        return ""
    columns = min(3, len(attacks))
    lines = -(-len(attacks) // columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 2.75 * lines + 0.2), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
        for panel, attack in zip(panels, attacks, strict=False):
            _draw_curves(panel, [found.get(attack, []) for found in drawn])
            panel.set_title(attack_label(attack))
        for panel in panels[len(attacks) :]:
            panel.set_visible(False)
        for panel in panels[::columns]:
            panel.set_ylabel("accuracy in %")
        picture = _svg(figure, "curves", f"Accuracy against eps under {', '.join(map(attack_label, attacks))}")
    looks = map(_look, range(len(families)))
    entries = [(colour, _MARKS[mark][1], family.label) for (colour, mark), family in zip(looks, families, strict=True)]
    caption = (
        "At eps 0 stands clean accuracy. A curve that does not fall far as eps grows is a sign of an attack that "
        "fails, not of a network that is robust."
    )
    shown = [found[attack] for found in drawn for attack in attacks if attack in found]
    if any(len(points) == 2 for points in shown):
        caption += " Two points are not joined: nothing was measured between them (evaluate.ladder adds values of eps)."
    if any(value.std is not None for points in shown for *_, value in points):
        caption += " Bars: standard deviation over training seeds."
    return (
        f'<section><h2>Accuracy under attack against eps</h2><figure>{_legend(entries)}<div class="scroll">{picture}'
        f"</div><figcaption>{caption}</figcaption></figure></section>"
    )


def _draw_curves(panel, series):
    """A curve of (eps, eps as written, value) for each line of the table; two points are not joined by a line."""
    ticks = {0.0: "0"}
    for i, points in enumerate(series):
        ticks.update((eps, text) for eps, text, _ in points)
        x, means = [eps for eps, *_ in points], [value.mean for *_, value in points]
        spread = [value.std or 0.0 for *_, value in points]
        colour, mark = _look(i)
        style = dict(color=_SERIES[colour], marker=_MARKS[mark][0], markersize=4)
        style |= dict(linestyle="-" if len(points) > 2 else "none")
        if any(spread):
            panel.errorbar(x, means, spread, capsize=2.5, elinewidth=1.0, **style)
        else:
            panel.plot(x, means, **style, **_UNCLIPPED)
    panel.set(ylim=(0, 100), xlim=(0, None))
    _eps_axis(panel, ticks)


def _eps_axis(panel, ticks):
    """Sets ticks at the eps of {eps: as written}; for 2/255, 4/255 … the labels are the numerators alone."""
    denominators = {text.partition("/")[2] for text in ticks.values() if text != "0"}
    common = denominators.pop() if len(denominators) == 1 else ""
    panel.set_xlabel(f"eps in 1/{common}" if common else "eps")
    labels = [text.partition("/")[0] if common else text for text in ticks.values()]
    labels = [text if len(text) < 7 else f"{eps:.3g}" for eps, text in zip(ticks, labels, strict=True)]
    panel.set_xticks(list(ticks), labels)


def training(runs: Sequence[Any]) -> str:
    """Training curves of `report.RunResults`: one figure per run; runs that differ only in their seed share one."""
    parts = []
    for i, group in enumerate(_alike(runs)):
        title = escape(_heading(group))
        if all(not run.metrics for run in group):
            parts.append(f"<h3>{title}</h3><p class=note>No rows in metrics.jsonl.</p>")
            continue
        picture, legend, caption = _training_figure(group, f"training{i}")
        parts.append(
            f'<figure><h3>{title}</h3>{legend}<div class="scroll">{picture}</div>'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return f"<section><h2>Training</h2>{''.join(parts)}</section>"


def _alike(runs):
    """Groups of runs that differ only in their seed."""
    groups: dict[str, list[Any]] = {}
    for run in runs:
        recipe = tables.without_seed(run.config, run.config.get("title", "")) if run.config else str(run.folder)
        groups.setdefault(recipe, []).append(run)
    return list(groups.values())


def _heading(group):
    """The title of a group: that of its one run, "student, seeds 0, 1, 2", or for copies with one seed their number."""
    if len(group) == 1:
        return group[0].title
    seeds = list(dict.fromkeys(str(run.config.get("seed")) for run in group))
    which = f"seeds {', '.join(seeds)}" if len(seeds) == len(group) else f"{len(group)} runs"
    return ", ".join([*dict.fromkeys(run.name for run in group), which])


class _Curve(NamedTuple):
    """The curve of one training metric in a panel."""

    panel: str
    kind: str  # of its rows in metrics.jsonl
    key: str
    colour: int
    line: str  # line style, for more than two points
    marker: str  # for one or two points
    symbol: str  # in the legend
    text: str


def _training_figure(group, name):
    """(picture, legend, caption) of runs of one recipe: loss, accuracies, dotted lines at evaluated checkpoints."""
    first = group[0]
    chosen = "test" if first.config.get("select_on") == "test" else "validation"
    curves = (
        _Curve("loss", "train", "loss", 6, "-", "o", "━", ""),
        _Curve("accuracy in %", "train", "clean_acc", 0, "-", "^", "━", "training images, clean"),
        _Curve("accuracy in %", "train", "adv_acc", 1, "-", "v", "━", "training images, attacked"),
        _Curve("accuracy in %", "val", "clean_acc", 2, "--o", "o", "●", f"{chosen} images, clean"),
        _Curve("accuracy in %", "val", "robust_acc", 3, "--s", "s", "■", f"{chosen} images, attacked"),
    )
    points = {curve: [_points(run.metrics, curve.kind, curve.key) for run in group] for curve in curves}
    shown = {curve: found for curve, found in points.items() if any(np.isfinite(y).any() for _, y in found)}
    titles = list(dict.fromkeys(curve.panel for curve in shown))
    if not titles:
        return "", "", "metrics.jsonl has no loss and no accuracy to draw."
    evaluated = {(run, step): names for run in range(len(group)) for step, names in _evaluated(group[run]).items()}
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 2.5), layout="constrained")
        panels = dict(zip(titles, figure.subplots(1, len(titles), squeeze=False)[0], strict=True))
        for curve, found in shown.items():
            for x, y in found:
                _draw_metric(panels[curve.panel], curve, x, y, 1.0 if len(group) == 1 else 0.6)
        for title, panel in panels.items():
            panel.set(title=title, xlabel="epoch", xlim=(0, None))
            for run, step in evaluated:
                if per_epoch := group[run].steps_per_epoch:
                    panel.axvline(step / per_epoch, color=_TEXT, linewidth=0.8, linestyle=":")
        if "loss" in panels and panels["loss"].dataLim.ymin >= 0:
            panels["loss"].set_ylim(bottom=0.0)
        if "accuracy in %" in panels:
            panels["accuracy in %"].set_ylim(0, 100)
        picture = _svg(figure, name, f"Training of {first.title}: {' and '.join(titles)} against epoch")
    legend = _legend([(curve.colour, curve.symbol, curve.text) for curve in shown if curve.text])
    marked = dict.fromkeys(f"{' and '.join(names)} (step {step})" for (_, step), names in evaluated.items())
    caption = f"Evaluated, dotted: {'; '.join(marked)}. " if marked else ""
    sections = {"training": first.config.get("attack"), chosen: config.lookup(first.config, "validate.attack", None)}
    caption += "".join(
        f"Attack on {name} images: {_in_words(given)}. " for name, given in sections.items() if isinstance(given, dict)
    )
    return picture, legend, escape(caption)


def _evaluated(run):
    """{step: names of the checkpoint} of a run's records."""
    found: dict[int, dict[str, None]] = {}
    for record in run.records:
        if type(record.get("step")) is int:
            found.setdefault(record["step"], {})[record["checkpoint"]] = None
    return found


def _draw_metric(panel, curve, x, y, alpha):
    """A line with marks at up to 30 points; one or two values are marks alone."""
    many = np.isfinite(y).sum() > 2
    style = dict(color=_SERIES[curve.colour], alpha=alpha, markersize=3.5 if many else 5, **_UNCLIPPED)
    panel.plot(x, y, curve.line if many else curve.marker, markevery=1 + len(x) // 30, **style)


def _in_words(section):
    """An `attack` section of a configuration in words, such as "pgd-10, loss kl, eps 0.15"."""
    steps = f"-{section['steps']}" if "steps" in section else ""
    rest = (f"{key} {section[key]}" for key in ("loss", "norm", "eps", "step_size", "init") if key in section)
    return ", ".join([f"{section.get('name')}{steps}", *rest])


def _points(metrics, kind, key):
    """(epochs, values) of a metric, NaN where it is not finite; longer curves are averaged down to `_POINTS`."""
    rows = [row for row in metrics if row.get("kind") == kind]
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
    """The stored images of `report.RunResults`: a strip for each run that has some; seeds of a recipe share one."""
    with_some = [[run for run in group if run.examples] for group in _alike(runs)]
    parts = [_strip(group[0]) for group in with_some if group]
    if not parts:
        return ""
    return f"<section><h2>Examples</h2>{''.join(parts)}</section>"


def _strip(run):
    """Clean, adversarial and difference images of a run, the predicted class under each; wrong ones are marked."""
    examples, names = run.examples, class_names(run.facts)
    order = np.argsort(examples["label"], kind="stable")
    x, x_adv, label, predicted, predicted_adv = (
        examples[part][order] for part in ("x", "x_adv", "label", "predicted", "predicted_adv")
    )
    delta = x_adv.astype(np.float64) - x
    largest = float(np.abs(np.nan_to_num(delta)).max(initial=0.0))
    factor = max(1, int(0.5 / largest)) if largest > 1e-3 else 1  # the largest whole number that clips no difference
    count = range(len(label))
    head = "".join(f'<th scope="col">{escape(_class_name(names, label[i]))}</th>' for i in count)
    lines = [
        ("clean", x, predicted),
        ("attacked", x_adv, predicted_adv),
        (f"difference × {factor}", 0.5 + factor * delta, None),
    ]
    body = ""
    for name, images, classes in lines:
        drawn = []
        for i in count:
            alt = f"image {i + 1}, {name}"
            under = "" if classes is None else _prediction(names, classes[i], label[i])
            drawn.append(f'<td><img alt="{escape(alt)}" src="data:image/png;base64,{_png(images[i])}">{under}</td>')
        body += f'<tr><th scope="row">{escape(name)}</th>{"".join(drawn)}</tr>'
    source = f"{attack_label(examples['attack'])}, checkpoint {examples['checkpoint']}"
    eps = [r["eps"] for r in run.records if results.is_main(r) and r["attack"] == examples["attack"]]
    source += f", eps {eps[0]}" if eps else ""
    which = ", the first of each class" if len(set(label.tolist())) == len(label) else ""
    return (
        f'<h3>{escape(run.title)}</h3><figure><div class="scroll"><table class="strip"><thead><tr>'
        f'<th scope="row">true class</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"<figcaption>Test images{which}, under {escape(source)}. Below each, the predicted class; "
        f"✗ marks a wrong one. In the difference, mid-grey is no change.</figcaption></figure>"
    )


def class_names(facts: Mapping[str, Any]) -> Sequence[str]:
    """The class names of the data, in order; empty where it has none."""
    names = facts.get("classes")
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _class_name(names, c):
    return names[c] if 0 <= c < len(names) else str(int(c))


def _prediction(names, predicted, label):
    name = escape(_class_name(names, predicted))
    return f"<span>{name}</span>" if predicted == label else f'<span class="wrong">✗ {name}</span>'


def _png(image: np.ndarray) -> str:
    """An (H, W, 1 or 3) image in [0, 1] as a base64 PNG."""
    pixels = np.round(255 * np.clip(np.nan_to_num(image), 0, 1)).astype(np.uint8)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    picture.thumbnail((_LARGEST, _LARGEST))  # does not enlarge smaller images
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
