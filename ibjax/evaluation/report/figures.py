"""The figures of a report: curves against eps, training curves, example images.

On the page, plots are SVG by matplotlib whose colours are CSS variables, so that they follow its light or dark style:
--line, and --s0 to --s6 for series; images are PNG, in original resolution up to `_LARGEST` pixels a side. `write`
makes files of both, with their legend, for papers and slides.
"""

import base64
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from ibjax import config
from ibjax.evaluation import picture_files, results
from ibjax.evaluation.report import tables
from ibjax.evaluation.report.tables import Family
from ibjax.evaluation.results import attack_label


class Palette(NamedTuple):
    """The colours of a plot."""

    text: str
    grid: str
    series: tuple[str, ...]


# the colours that CSS variables of the page replace, and those of files: the page's light style
_ON_PAGE = Palette("#0a0b0c", "#0a0b0d", tuple(f"#5e0{i}5e" for i in range(7)))
_ON_PAPER = Palette("#1c1f24", "#d9dde3", ("#0068ad", "#c44e00", "#00805c", "#a8407d", "#946b00", "#4a57c4", "#5a626e"))
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
}
_TEXTS = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
_MARKS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"), ("X", "✖"))  # (in plot, in legend)
_UNCLIPPED = dict(clip_on=False, in_layout=False)  # marks at 0 and 100 % are not cut off and do not move the axes
_WIDTH = 9.6  # inches; the page's column enlarges it by a factor of about 1.35
_WRONG = "#b3261e"  # of a wrong class in a file
_LARGEST = 96  # pixels a side of an example; larger ones are reduced
_POINTS = 300  # maximum number of points in a training curve; longer ones are averaged


class Mark(NamedTuple):
    """An entry of a legend."""

    colour: int  # of the series
    symbol: str
    text: str


class Plot(NamedTuple):
    """A plot, drawn anew for the page and for each kind of file."""

    name: str  # unique among the plots of a report
    heading: str  # "" for the only plot of its section
    description: str  # for readers who do not see it
    draw: Callable[[Palette], Figure] | None  # None: there is nothing to draw, as the caption says
    legend: list[Mark]
    caption: str

    @property
    def svg(self) -> Markup:
        """The plot for the page."""
        assert self.draw is not None
        with _styled(_ON_PAGE):
            return _svg(self.draw(_ON_PAGE), self.name, self.description)


class Strip(NamedTuple):
    """Clean, adversarial and difference images of a run."""

    name: str
    heading: str
    classes: list[str]  # the true class of each image
    rows: list[tuple[str, list[np.ndarray], list[tuple[str, bool]]]]  # name, images; predicted classes, whether wrong
    caption: str


def write(drawn: Sequence[Plot | Strip], folder: Path) -> Iterator[Path]:
    """Writes each figure, with its legend, as PNG, SVG and PDF into the folder."""
    for each in drawn:
        if isinstance(each, Plot) and each.draw is None:
            continue
        with _styled(_ON_PAPER):
            made = _of_strip(each) if isinstance(each, Strip) else _with_legend(each)
            for suffix in picture_files.SUFFIXES:
                picture_files.write(made, file := folder / f"{each.name}{suffix}")
                yield file


# ---- plots -------------------------------------------------------------------------------------------------


def _styled(palette):
    """The style within which a plot is drawn and saved: matplotlib makes ticks when it saves."""
    colours = {"grid.color": palette.grid, **dict.fromkeys(_TEXTS, palette.text)}
    return matplotlib.rc_context({**_STYLE, **colours})


def _with_legend(plot):
    """A plot for a file: with a title, and its legend below."""
    figure = plot.draw(_ON_PAPER)
    if plot.heading:
        figure.suptitle(plot.heading, x=0.01, ha="left", fontsize=9.5)
    markers = {symbol: marker for marker, symbol in _MARKS}
    handles = [
        Line2D([], [], color=_ON_PAPER.series[mark.colour], marker=markers.get(mark.symbol, ""), label=mark.text,
               linestyle="none" if mark.symbol in markers else "-")
        for mark in plot.legend
    ]  # fmt: skip
    if handles:
        figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False)
    return figure


def _svg(figure: Figure, name: str, description: str) -> Markup:
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
    variables = ("currentColor", "var(--line)", *(f"var(--s{i})" for i in range(7)))
    for colour, variable in zip((_ON_PAGE.text, _ON_PAGE.grid, *_ON_PAGE.series), variables, strict=True):
        text = text.replace(colour, variable)
    size = re.search(r'viewBox="[^"]*"', text)
    rest = text[text.index(">") + 1 :]  # matplotlib has escaped it
    return Markup(f'<svg role="img" aria-label="{escape(description)}" {size[0] if size else ""}>{rest}')


def _look(i):
    """(colour, mark) of series i; the pairs repeat after 49."""
    return i % 7, (i + i // 7) % 7


def curves(families: Sequence[Family]) -> Plot | None:
    """Accuracy against eps: a panel for each attack that is bounded by eps, on each data set and in each norm; a curve
    for each line of the table."""
    drawn = [_curves_of(family) for family in families]
    keys = {key for found in drawn for key in found}
    ladders = {key for key in keys if any(len(found.get(key, [])) > 2 for found in drawn)}
    keys = sorted(ladders or keys, key=lambda key: (results.strength(key[0]), key))  # for the others the tables suffice
    if not keys:
        return None
    several = len({key[1:] for key in keys}) > 1
    titles = [", ".join([attack_label(attack), *(where if several else ())]) for attack, *where in keys]

    def draw(palette):
        columns = min(3, len(keys))
        lines = -(-len(keys) // columns)
        figure = Figure(figsize=(_WIDTH, 2.75 * lines + 0.2), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
        for panel, key, title in zip(panels, keys, titles, strict=False):
            _draw_curves(panel, [found.get(key, []) for found in drawn], palette)
            panel.set_title(title)
        for panel in panels[len(keys) :]:
            panel.set_visible(False)
        for panel in panels[::columns]:
            panel.set_ylabel("accuracy in %")
        return figure

    looks = map(_look, range(len(families)))
    legend = [Mark(hue, _MARKS[mark][1], family.label) for (hue, mark), family in zip(looks, families, strict=True)]
    caption = (
        "At eps 0 stands clean accuracy. A curve that does not fall far as eps grows is a sign of an attack that "
        "fails, not of a network that is robust."
    )
    shown = [found[key] for found in drawn for key in keys if key in found]
    if any(len(points) == 2 for points in shown):
        caption += " Two points are not joined: nothing was measured between them (evaluate.ladder adds values of eps)."
    if any(value.std is not None for points in shown for *_, value in points):
        caption += " Bars: standard deviation over training seeds."
    return Plot("curves", "", f"Accuracy against eps under {'; '.join(titles)}", draw, legend, caption)


def _curves_of(family):
    """`tables.curves` by (attack, data set, norm): lengths in different norms have no common axis."""
    first = family.rows[0].records[0]
    return {(attack, first["dataset"], first["norm"]): found for attack, found in tables.curves(family).items()}


def _draw_curves(panel, series, palette):
    """A curve of (eps, eps as written, value) for each line of the table; two points are not joined by a line."""
    ticks = {0.0: "0"}
    for i, points in enumerate(series):
        ticks.update((eps, text) for eps, text, _ in points)
        x, means = [eps for eps, *_ in points], [value.mean for *_, value in points]
        spread = [value.std or 0.0 for *_, value in points]
        colour, mark = _look(i)
        style = dict(color=palette.series[colour], marker=_MARKS[mark][0], markersize=4)
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


def training(runs: Sequence[Any]) -> list[Plot]:
    """Training curves of `report.RunResults`: one plot per run; runs that differ only in their seed share one."""
    return [_training(group, f"training{i}") for i, group in enumerate(_alike(runs))]


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


def _training(group, name):
    """The plot of runs of one recipe: loss, accuracies, dotted lines at evaluated checkpoints."""
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
        empty = all(not run.metrics for run in group)
        caption = "No rows in metrics.jsonl." if empty else "metrics.jsonl has no loss and no accuracy to draw."
        return Plot(name, _heading(group), "", None, [], caption)
    evaluated = {(run, step): names for run in range(len(group)) for step, names in _evaluated(group[run]).items()}

    def draw(palette):
        figure = Figure(figsize=(_WIDTH, 2.5), layout="constrained")
        panels = dict(zip(titles, figure.subplots(1, len(titles), squeeze=False)[0], strict=True))
        for curve, found in shown.items():
            colour = palette.series[curve.colour]
            for x, y in found:
                _draw_metric(panels[curve.panel], curve, colour, x, y, 1.0 if len(group) == 1 else 0.6)
        for title, panel in panels.items():
            panel.set(title=title, xlabel="epoch", xlim=(0, None))
            for run, step in evaluated:
                if per_epoch := group[run].steps_per_epoch:
                    panel.axvline(step / per_epoch, color=palette.text, linewidth=0.8, linestyle=":")
        if "loss" in panels and panels["loss"].dataLim.ymin >= 0:
            panels["loss"].set_ylim(bottom=0.0)
        if "accuracy in %" in panels:
            panels["accuracy in %"].set_ylim(0, 100)
        return figure

    legend = [Mark(curve.colour, curve.symbol, curve.text) for curve in shown if curve.text]
    marked = dict.fromkeys(f"{' and '.join(names)} (step {step})" for (_, step), names in evaluated.items())
    caption = f"Evaluated, dotted: {'; '.join(marked)}. " if marked else ""
    sections = {"training": first.config.get("attack"), chosen: config.lookup(first.config, "validate.attack", None)}
    caption += "".join(
        f"Attack on {name} images: {_in_words(given)}. " for name, given in sections.items() if isinstance(given, dict)
    )
    description = f"Training of {first.title}: {' and '.join(titles)} against epoch"
    return Plot(name, _heading(group), description, draw, legend, caption)


def _evaluated(run):
    """{step: names of the checkpoint} of a run's records."""
    found: dict[int, dict[str, None]] = {}
    for record in run.records:
        if type(record.get("step")) is int:
            found.setdefault(record["step"], {})[record["checkpoint"]] = None
    return found


def _draw_metric(panel, curve, colour, x, y, alpha):
    """A line with marks at up to 30 points; one or two values are marks alone."""
    many = np.isfinite(y).sum() > 2
    style = dict(color=colour, alpha=alpha, markersize=3.5 if many else 5, **_UNCLIPPED)
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


def examples(runs: Sequence[Any]) -> list[Strip]:
    """The stored images of `report.RunResults`: a strip for each run that has some; seeds of a recipe share one."""
    with_some = [[run for run in group if run.examples] for group in _alike(runs)]
    return [_strip(group[0], f"examples{i}") for i, group in enumerate(with_some) if group]


def _strip(run, name):
    """The images of a run, with the predicted class under each."""
    examples, names = run.examples, class_names(run.facts)
    order = np.argsort(examples["label"], kind="stable")
    x, x_adv, label, predicted, predicted_adv = (
        examples[part][order] for part in ("x", "x_adv", "label", "predicted", "predicted_adv")
    )
    delta = x_adv.astype(np.float64) - x
    largest = float(np.abs(np.nan_to_num(delta)).max(initial=0.0))
    factor = max(1, int(0.5 / largest)) if largest > 1e-3 else 1  # the largest whole number that clips no difference

    def named(classes):
        pairs = zip(classes, label, strict=True)
        return [(_class_name(names, found), bool(found != true)) for found, true in pairs]

    rows = [
        ("clean", list(x), named(predicted)),
        ("attacked", list(x_adv), named(predicted_adv)),
        (f"difference × {factor}", list(0.5 + factor * delta), []),
    ]
    source = f"{attack_label(examples['attack'])}, checkpoint {examples['checkpoint']}"
    source += f", {examples['norm']}, eps {examples['eps']}" if examples["norm"] else ""
    which = ", the first of each class" if len(set(label.tolist())) == len(label) else ""
    caption = (
        f"Test images{which}, under {source}. Below each, the predicted class; ✗ marks a wrong one. In the difference, "
        "mid-grey is no change."
    )
    return Strip(name, run.title, [_class_name(names, c) for c in label], rows, caption)


def _of_strip(strip):
    """A strip for a file, each image with its predicted class below."""
    columns = max(1, len(strip.classes))
    figure = Figure(figsize=(1.2 + 0.85 * columns, 3.6), layout="constrained")
    panels = figure.subplots(len(strip.rows), columns, squeeze=False)
    for line, (name, images, predicted) in zip(panels, strip.rows, strict=True):
        line[0].set_ylabel(name)
        for panel, image in zip(line, images, strict=False):
            panel.imshow(_pixels(image), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        for panel, (text, wrong) in zip(line, predicted, strict=False):
            panel.set_xlabel(f"{'✗ ' * wrong}{text}", color=_WRONG if wrong else _ON_PAPER.text)
    for panel in panels.ravel():
        panel.grid(False)
        panel.spines[:].set_visible(False)
        panel.set(xticks=[], yticks=[])
    for panel, name in zip(panels[0], strip.classes, strict=False):
        panel.set_title(name, loc="center", fontsize=8.5)
    figure.suptitle(strip.heading, x=0.01, ha="left", fontsize=9.5)
    return figure


def class_names(facts: Mapping[str, Any]) -> Sequence[str]:
    """The class names of the data, in order; empty where it has none."""
    names = facts.get("classes")
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _class_name(names, c):
    return names[c] if 0 <= c < len(names) else str(int(c))


def _pixels(image: np.ndarray) -> np.ndarray:
    """An (H, W, 1 or 3) image in [0, 1] as uint8, (H, W) or (H, W, 3)."""
    pixels = np.round(255 * np.clip(np.nan_to_num(image), 0, 1)).astype(np.uint8)
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def png(image: np.ndarray) -> str:
    """An (H, W, 1 or 3) image in [0, 1] as a base64 PNG."""
    picture = Image.fromarray(_pixels(image))
    picture.thumbnail((_LARGEST, _LARGEST))  # does not enlarge smaller images
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
