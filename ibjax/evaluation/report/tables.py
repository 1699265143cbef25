"""Groups result records into the lines of tables and the curves against eps.

A line is one network, or the runs of a recipe that differ only in their seed.

Guarantees (tests of the same names): the worst case counts the images that withstand every attack; no line loses its
worst case because another one has more attacks; one network is one line, whatever its checkpoint is called.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ibjax import config
from ibjax.attacks.geometry import fraction
from ibjax.evaluation.report import grids
from ibjax.evaluation.report.grids import Cell, Grid, Value
from ibjax.evaluation.results import (
    Record,
    attack_label,
    departed,
    is_bounded,
    is_main,
    network_label,
    robust_flags,
    run_label,
    strength,
    surrogate_of,
    weights_of,
)

# ---- rows --------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """All records of one network on one set of images, sorted by attack and eps; each pair occurs once."""

    label: str  # unique among rows
    records: list[Record]
    checkpoints: tuple[str, ...]  # all names of the network: ("best", "last") if both are the same step


class Family(NamedTuple):
    """Rows that a table shows as one line: one row, or those of runs that differ only in their seed."""

    label: str  # unique among families
    rows: list[Row]
    checkpoints: tuple[str, ...]  # names that all of its rows have


# fields that distinguish rows with equal titles; labels contain as many of them as needed, in this order
_PARTS = ("checkpoint", "step", "seed", "n", "dataset", "norm", "count", "folder")
# keys in which runs of one recipe may differ: the seed, and those without effect on training
_FREE = ("seed", *config.WITHOUT_EFFECT)


def rows(records: Iterable[Record]) -> list[Row]:
    """Groups records by network and images; the labels of rows with equal titles contain the fields that differ.

    Checkpoints of one step, and copies of a run, count as one network, identified by the digest of its weights where
    records have it.
    """
    groups: dict[str, list[Record]] = {}
    for record in _one_spelling(sources_told_apart(records)):
        network = [record.get("config", {}).get(section) for section in ("objective", "model", "attack")]
        images = [record.get(part) for part in ("seed", "n", "dataset", "norm", "count")]
        key = json.dumps([network_label(record), _which(record), images, network], sort_keys=True)
        groups.setdefault(key, []).append(record)
    made = [
        Row("", _each_once(group), tuple(sorted({record["checkpoint"] for record in group}, key=_checkpoint_order)))
        for group in groups.values()
    ]
    labels = _labels([network_label(row.records[0]) for row in made], [_parts([row], row.checkpoints) for row in made])
    return [row._replace(label=label) for row, label in zip(made, labels, strict=True)]


def _one_spelling(records):
    """The records, with each eps written as the first of its value: 8/255 is one threat model, however it was given."""
    spelled: dict[Any, Any] = {}
    return [{**record, "eps": spelled.setdefault(fraction(record["eps"]), record["eps"])} for record in records]


def _which(record):
    """The key of a record's network: the digest of its weights, else run and step, else run and checkpoint."""
    if weights := weights_of(record):
        return weights
    step = record.get("step")
    return [run_label(record), record["checkpoint"] if step is None else step]


def _checkpoint_order(name):
    """Sorts best, last, then steps."""
    return name not in ("best", "last"), len(name) if name.isdecimal() else 0, name


def _each_once(group):
    """The records of a network sorted by attack and eps; where a pair occurs twice, the record at the main
    eps is kept, and among those that of `best`."""
    once: dict[tuple, Record] = {}
    for record in sorted(group, key=lambda r: (not is_main(r), _checkpoint_order(r["checkpoint"]))):
        once.setdefault((strength(record["attack"]), fraction(record["eps"])), record)
    return [once[key] for key in sorted(once)]


def _named(checkpoints):
    return ", ".join(f"step {name}" if name.isdecimal() else name for name in checkpoints)


def _labels(titles, parts):
    """Unique labels: titles followed by as many of `_PARTS` as distinguish equal titles, else by a number."""
    labels = []
    for title, own in zip(titles, parts, strict=True):
        others, chosen = [p for t, p in zip(titles, parts, strict=True) if t == title], []
        for name in _PARTS:
            distinct = len({_shown(other, chosen) for other in others})
            if distinct < len(others) and len({_shown(other, [*chosen, name]) for other in others}) > distinct:
                chosen.append(name)
        label = ", ".join([title, *filter(None, _shown(own, chosen))])
        taken = sum(known == label or known.startswith(f"{label} #") for known in labels)
        labels.append(f"{label} #{taken + 1}" if taken else label)
    return labels


def _shown(parts, names):
    values = {name: parts.get(name) for name in names}
    bare = ("checkpoint", "folder")  # these values are clear without their names
    return tuple(
        "" if value is None else str(value) if name in bare else f"{name} {value}" for name, value in values.items()
    )


def sources_told_apart(records: Iterable[Record]) -> list[Record]:
    """The records with a unique name for each surrogate, such as "pgd-20 from WRN (step 8, weights 3fa1c2e4)".

    A surrogate that is itself among the records has the name of its run.
    """
    records = list(records)
    sources = [source for record in records if (source := surrogate_of(record))]
    names = {source["weights"]: str(source.get("title")) for source in sources}
    names |= {weights: run_label(record) for record in records if (weights := weights_of(record))}
    counts = Counter(names.values())
    others = {record["title"] for record in records if not weights_of(record)}

    def told(record):
        if not (source := surrogate_of(record)):
            return record
        name = names[source["weights"]]
        if counts[name] > 1 or name in others:
            name += f" (step {source.get('step')}, weights {source['weights'][:8]})"
        return {**record, "attack": f"{record['attack'].partition(' from ')[0]} from {name}"}

    return [told(record) for record in records]


def families(records: Iterable[Record], each: bool = False) -> list[Family]:
    """The rows of records, in families of runs that differ only in their seed; with `each`, one family per row."""
    alike: dict[str, list[Row]] = {}
    for row in rows(records):
        first = row.records[0]
        images = [first.get(part) for part in ("n", "dataset", "norm", "count", "samples")]
        key = json.dumps([without_seed(first.get("config", {}), first["title"]), images, row.label if each else None])
        alike.setdefault(key, []).append(row)
    found: dict[tuple[str, ...], Family] = {}  # by the labels of its rows
    for group in alike.values():
        for name in dict.fromkeys(name for row in group for name in row.checkpoints):
            same = [row for row in group if name in row.checkpoints]
            seeds = {str(row.records[0].get("seed")) for row in same}
            for members in [same] if len(seeds) == len(same) else [[row] for row in same]:  # no seed counts twice
                family = found.setdefault(tuple(row.label for row in members), Family("", members, ()))
                found[tuple(row.label for row in members)] = family._replace(checkpoints=(*family.checkpoints, name))
    titles = [_title(family) for family in found.values()]
    labels = _labels(titles, [_parts(family.rows, family.checkpoints) for family in found.values()])
    seeds = [f", {len(family.rows)} seeds" if len(family.rows) > 1 else "" for family in found.values()]
    made = zip(found.values(), labels, seeds, strict=True)
    return [family._replace(label=label + suffix) for family, label, suffix in made]


def _title(family):
    """The common title of a family's rows; where titles differ, as those from folders, their common prefix."""
    titles = list(dict.fromkeys(network_label(row.records[0]) for row in family.rows))
    if len(titles) == 1:
        return titles[0]
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*titles, strict=False))
    return "".join(letters[0] for letters in same).rstrip(" -_.,(") or ", ".join(titles)


def _parts(members, checkpoints):
    """{name in `_PARTS`: value} of the fields on which all rows agree."""
    first, *others = (row.records[0] for row in members)
    common = {part: first.get(part) for part in _PARTS if all(other.get(part) == first.get(part) for other in others)}
    return {**common, "checkpoint": _named(checkpoints)}


def without_seed(configuration: Mapping[str, Any], title: str) -> str:
    """A text that is equal for runs which differ only in their seed; `title` is part of it if the recipe sets one."""
    kept = {name: value for name, value in configuration.items() if name not in _FREE}
    return json.dumps([kept, title if configuration.get("title", title) else ""], sort_keys=True, default=str)


# ---- tables ------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """One line of a table."""

    label: str
    checkpoint: str
    selected_on: str
    n: int
    clean: Value
    robust: dict[str, Value]  # by attack
    worst: Value | None
    worst_of: frozenset[str]  # the attacks that `worst` is over; every run of the line has them


class Table(NamedTuple):
    """Comparable lines: all are of one data set and one threat model."""

    dataset: str
    norm: str
    eps: str
    attacks: list[str]
    bounded: frozenset[str]  # the attacks that are bounded by eps; the worst case is over these
    lines: list[Line]


def tables(records: Iterable[Record], each: bool = False) -> list[Table]:
    """One table for each data set, norm and main eps, in the order of the records; `each`: a line for every seed."""
    found: dict[tuple, Table] = {}
    for family in families(records, each):
        groups: dict[tuple, list[list[Record]]] = {}
        for row in family.rows:
            of_row: dict[tuple, list[Record]] = {}
            for record in filter(is_main, row.records):
                of_row.setdefault((record["dataset"], record["norm"], str(record["eps"])), []).append(record)
            for key, group in of_row.items():
                groups.setdefault(key, []).append(group)
        for (dataset, norm, eps), runs in groups.items():
            line = _line(family, runs)
            bounded = {record["attack"] for record in itertools.chain(*runs) if is_bounded(record)}
            table = found.get((dataset, norm, eps), Table(dataset, norm, eps, [], frozenset(), []))
            found[dataset, norm, eps] = table._replace(
                attacks=sorted({*table.attacks, *line.robust}, key=strength),
                bounded=table.bounded | bounded,
                lines=[*table.lines, line],
            )
    return list(found.values())


def _line(family, runs):
    """The line of a family in one table; `runs` holds the records of each of its runs in this table."""
    by_attack = [{record["attack"]: record for record in run} for run in runs]
    attacks = dict.fromkeys(itertools.chain(*by_attack))
    robust = {attack: [run[attack]["robust_acc"] for run in by_attack if attack in run] for attack in attacks}
    first, total = runs[0][0], len(family.rows)
    bounded = [{attack for attack in run if is_bounded(run[attack])} for run in by_attack]
    common = frozenset.intersection(*map(frozenset, bounded))
    worst = [_withstanding([run[attack] for attack in common]) for run in by_attack] if common else []
    return Line(
        family.label,
        _named(family.checkpoints),
        _selected_on(family, runs),
        first["n"],
        _value([run[0]["clean_acc"] for run in runs], total),
        {attack: _value(values, total) for attack, values in robust.items()},
        _value(worst, total) if worst else None,
        common,
    )


def _selected_on(family, runs):
    """The images on which the checkpoint was selected; for a network that is both best and last, those of best."""
    records = list(itertools.chain(*runs))
    own = [record for record in records if record["checkpoint"] == family.checkpoints[0]]
    return ", ".join(dict.fromkeys(record["selected_on"] for record in own or records))


def _value(values, of):
    values = np.array(values, np.float64)
    return Value(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None, len(values), of)


def _withstanding(records):
    """The percentage of images that are robust under all of these attacks."""
    return 100 * float(np.mean(np.logical_and.reduce([robust_flags(record) for record in records])))


def worst_case(records: Sequence[Record]) -> float | None:
    """The percentage of images that are robust under all of these attacks; None for fewer than two attacks."""
    return None if len(records) < 2 else _withstanding(records)


def cells(table: Table) -> list[list[str]]:
    """A table as text, header first."""
    return grid(table).cells()


def grid(table: Table) -> Grid:
    """The cells of a table; its numbers are in percent."""
    title = f"{table.dataset}, {table.norm}, eps {table.eps}: accuracy in percent"
    worst = len(table.bounded) > 1
    header = ["run", "checkpoint / selected on", "n", "clean", *map(attack_label, table.attacks)]
    lines = []
    for line in table.lines:
        numbers = [line.clean, *(line.robust.get(attack) for attack in table.attacks)]
        if worst:  # over fewer attacks it is an upper bound
            numbers.append(line.worst and line.worst._replace(bound=_is_bound(table, line)))
        lines.append([line.label, f"{line.checkpoint} / {line.selected_on}", str(line.n), *numbers])
    return Grid(title, [*header, "worst case"] if worst else header, lines, 2, notes(table))


def _is_bound(table, line):
    return line.worst is not None and not line.worst_of >= table.bounded


def notes(table: Table) -> list[str]:
    """One sentence for each sign that occurs in the table."""
    values = [value for line in table.lines for value in (line.clean, *line.robust.values(), line.worst) if value]
    found = []
    if len(table.bounded) > 1 and any(_is_bound(table, line) for line in table.lines):
        found.append("≤: not every attack of the table was made on this run, so that its worst case is at most this.")
    if any(value.std is not None for value in values):
        found.append("±: mean and sample standard deviation over training seeds.")
    if any(value.count < value.of for value in values):
        found.append("(1/3): of so many of the seeds.")
    return found


def stages(table: Table, records: Iterable[Record], each: bool = False) -> list[Grid]:
    """Robust accuracy after each attack of AutoAttack: one grid per list of attacks.

    For version "rand" these are the numbers as the authors' code computes them, with one draw for each image and
    attack. The last column is that of the table, the mean over fresh draws for every adversarial image (with its
    standard error for a single run).
    """
    found: dict[tuple[str, ...], list[list[Cell]]] = {}
    for family in families(records, each):
        of_attack: dict[tuple, list[Record]] = {}
        for record in itertools.chain(*(row.records for row in family.rows)):
            here = (record["dataset"], record["norm"], str(record["eps"])) == (table.dataset, table.norm, table.eps)
            if here and is_main(record) and len(record.get("robust_after", {})) > 1:
                names = (record["attack"], tuple(record["robust_after"]), record.get("draws"))
                of_attack.setdefault(names, []).append(record)
        for (attack, after, draws), runs in of_attack.items():
            columns = zip(*(_stages_of(record) for record in runs), strict=True)
            numbers = [_value(column, len(family.rows)) for column in columns]
            names = [*map(attack_label, after)]
            if draws:  # for a random network the stages count one draw, as in the authors' code
                names = [*(f"{name}, one draw" for name in names), f"mean of {draws} draws"]
                if len(runs) == 1:
                    numbers[-1] = numbers[-1]._replace(std=runs[0]["standard_error"])
            found.setdefault(tuple(names), []).append([f"{family.label}, {attack_label(attack)}", *numbers])
    title = "Robust accuracy after each attack, in percent"
    return [Grid(title, ["robust after", "clean", *names], lines, 1, []) for names, lines in found.items()]


def _stages_of(record):
    """Clean accuracy, robust accuracy after each attack and, for a random network, the mean over fresh draws."""
    one_draw = record.get("reference", record)["clean_acc"]
    return [one_draw, *record["robust_after"].values(), *([record["robust_acc"]] if "draws" in record else [])]


def as_text(records: Iterable[Record], each: bool = False) -> str:
    """The tables of records for a terminal, each followed by the stages of AutoAttack.

    Runs that differ only in their seed share a line with mean ± standard deviation; with `each` every run has its own.
    """
    texts, records = [], list(records)
    for table in tables(records, each):
        shown = grid(table)
        title, *notes = map(grids.in_terminal, (shown.title, *shown.notes))
        texts.append("\n".join([title, *grids.aligned(shown), *notes]))
        texts += ["\n".join(grids.aligned(stage)) for stage in stages(table, records, each)]
    texts += ["\n".join(map(grids.in_terminal, found))] if (found := departed(records)) else []
    return "\n\n".join(texts) or "no records: nothing has been evaluated yet"


def named(records: Iterable[Record], each: bool = False) -> dict[str, Grid]:
    """{name of a file, without its ending: grid} of all tables: means over seeds, every seed, AutoAttack's stages."""
    records, found = list(records), {}
    single = {table[:3]: grid(table) for table in tables(records, each=True)}  # by data set, norm, eps
    for table in tables(records, each):
        plain = "-".join(re.sub(r"[^\w.]+", "_", part) for part in table[:3])
        name = next(name for i in itertools.count(1) if (name := plain if i == 1 else f"{plain}-{i}") not in found)
        found[name] = grid(table)
        if has_seeds(table):
            found[f"{name}-every-seed"] = single[table[:3]]
        for i, stage in enumerate(stages(table, records, each)):
            title = f"{table.dataset}, {table.norm}, eps {table.eps}: {stage.title.lower()}"
            found[f"{name}-after-each-attack{f'-{i + 1}' * bool(i)}"] = stage._replace(title=title)
    return found


def has_seeds(table: Table) -> bool:
    """Whether a line of the table is the mean of several runs."""
    return any(line.clean.of > 1 for line in table.lines)


# ---- curves ------------------------------------------------------------------------------------------------


def ladders(row: Row) -> dict[str, list[tuple[float, str, float]]]:
    """{attack: [(eps, eps as written, accuracy)]}, in ascending order of eps from (0, "0", clean accuracy)."""
    found: dict[str, list] = {}
    for record in row.records:
        points = found.setdefault(record["attack"], [(0.0, "0", record["clean_acc"])])
        if fraction(record["eps"]) > 0:
            points.append((fraction(record["eps"]), str(record["eps"]), record["robust_acc"]))
    return found


def curves(family: Family) -> dict[str, list[tuple[float, str, Value]]]:
    """`ladders` over the seeds of a family, for the attacks that are bounded by eps."""
    found: dict[str, dict[float, tuple[str, list[float]]]] = {}
    for row in family.rows:
        bounded = row._replace(records=list(filter(is_bounded, row.records)))
        for attack, points in ladders(bounded).items():
            for eps, text, accuracy in points:
                found.setdefault(attack, {}).setdefault(eps, (text, []))[1].append(accuracy)
    return {
        attack: [(eps, text, _value(values, len(family.rows))) for eps, (text, values) in sorted(points.items())]
        for attack, points in found.items()
    }
