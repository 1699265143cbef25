"""What result records say: tables, and curves against eps. No file is read or written here.

A record is what evaluate.py writes for one network under one attack at one eps.

Guarantee (test of the same name): the worst case counts the images that withstand every attack.
"""

import base64
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ibjax.attacks.geometry import fraction

Record = dict[str, Any]  # accuracies in percent
_NAMES = {
    "fgsm": "FGSM",
    "pgd": "PGD",
    "cw": "margin PGD",
    "square": "Square",
    "fab": "FAB",
    "apgd": "APGD",
    "autoattack": "AutoAttack",
    "noise": "noise",
    "bim": "BIM",
    "mim": "MIM",
    "nifgsm": "NI-FGSM",
    "spsa": "SPSA",
    "ara": "ARA",
    "ib_rar": "adaptive PGD (IB-RAR)",
    "siriib": "adaptive PGD (SiRIIB)",
}


def robust_flags(record: Record) -> np.ndarray:
    """The (n,) bool flags of a record: classified correctly both as it is and under the attack."""
    packed = np.frombuffer(base64.b64decode(record["robust_flags"]), np.uint8)
    return np.unpackbits(packed, count=record["n"]).astype(bool)


def validate(record: Record) -> None:
    """Raises ValueError, TypeError, KeyError or AttributeError unless a record has what the functions below need."""
    for name in ("attack", "norm", "dataset", "checkpoint", "selected_on", "robust_flags"):
        if not isinstance(record[name], str):
            raise TypeError(f"{name} is {record[name]!r}")
    if type(record["n"]) is not int or record["n"] < 1:
        raise TypeError(f"n is {record['n']!r}")
    for name, high in (("clean_acc", 100), ("robust_acc", 100), ("max_distance", np.inf)):
        if not 0 <= record[name] <= high:  # NaN fails too
            raise ValueError(f"{name} is {record[name]!r}")
    if not 0 <= fraction(record["eps"]) < np.inf:
        raise ValueError(f"eps is {record['eps']!r}")
    if len(base64.b64decode(record["robust_flags"], validate=True)) != -(-record["n"] // 8):
        raise ValueError("robust_flags do not hold n flags")
    for name, accuracy in record.get("robust_after", {}).items():
        if not 0 <= accuracy <= 100:
            raise ValueError(f"robust_after {name} is {accuracy!r}")
    evaluated = record.get("config", {}).get("evaluate", {})
    for name, value, kind in (
        ("warnings", record.get("warnings", []), list),
        ("versions", record.get("versions", {}), dict),
        ("config.evaluate", evaluated, dict),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name} is {value!r}")


def is_main(record: Record) -> bool:
    """Whether a record is at the eps of the table; the others are the ladder of the curve."""
    if "main" in record:
        return record["main"]
    return record["eps"] == record.get("config", {}).get("evaluate", {}).get("eps")


def is_bounded(record: Record) -> bool:
    """Whether its attack stays within eps; one that looks for the smallest perturbation does not."""
    return record.get("bounded", True)


def is_transfer(attack: str) -> bool:
    """Whether its images were made on another network, as those of "pgd-100 from teacher"."""
    return " from " in attack


def attack_label(name: str) -> str:
    """As "margin PGD-20" for "cw-20", "PGD-100, transfer from teacher" for "pgd-100 from teacher"."""
    name, _, source = name.partition(" from ")
    family, dash, steps = name.partition("-")
    label = _NAMES.get(family, family) + dash + steps
    if name.startswith("cw-l2-"):
        label = f"C&W l2-{name.removeprefix('cw-l2-')} (any size)"
    return f"{label}, transfer from {source}" if source else label


def strength(attack: str) -> tuple:
    """Sorts one-step attacks before iterative ones, fewer steps before more, and transfer attacks after all others."""
    name, _, source = attack.partition(" from ")
    family, _, steps = name.partition("-")
    known = list(_NAMES)
    rank = known.index(family) if family in known else len(known)
    return bool(source), rank, family, int(steps) if steps.isdigit() else 0, steps, source


def network_label(record: Record) -> str:
    """The run's title; where its predictions were drawn, with "(sampled, 12)": that is another classifier."""
    samples = record.get("samples")
    return f"{record['title']} (sampled, {samples})" if samples else record["title"]


# ---- rows and tables ---------------------------------------------------------------------------------------


class Row(NamedTuple):
    """All records of one network on one set of images: every attack, every eps, sorted by both."""

    label: str  # unique among rows
    records: list[Record]


class Line(NamedTuple):
    """One line of a table; accuracies in percent."""

    label: str
    checkpoint: str
    selected_on: str
    n: int
    clean: float
    robust: dict[str, float]  # attack -> accuracy
    worst: float | None


class Table(NamedTuple):
    """Lines that may be compared: one data set, one threat model."""

    dataset: str
    norm: str
    eps: str
    attacks: list[str]
    lines: list[Line]


_PARTS = ("checkpoint", "step", "seed", "n", "dataset", "norm")


def rows(records: Iterable[Record]) -> list[Row]:
    """Groups records by network and images; rows of one title get what they differ in as part of their label."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        network = [record.get("config", {}).get(section) for section in ("objective", "model", "attack")]
        key = [network_label(record), *(record.get(part) for part in _PARTS), network]
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(record)
    firsts, labels = [group[0] for group in groups.values()], []
    for first in firsts:
        title = network_label(first)
        others = [other for other in firsts if network_label(other) == title]
        differing = [part for part in _PARTS if len({str(other.get(part)) for other in others}) > 1]
        label = ", ".join([title, *(f"{part} {first.get(part)}" for part in differing)])
        taken = labels.count(label)
        labels.append(f"{label} #{taken + 1}" if taken else label)
    by_attack_and_eps = (
        sorted(group, key=lambda record: (strength(record["attack"]), fraction(record["eps"])))
        for group in groups.values()
    )
    return [Row(label, group) for label, group in zip(labels, by_attack_and_eps, strict=True)]


def tables(records: Iterable[Record]) -> list[Table]:
    """One table for each data set, norm and main eps, in the order of the records."""
    found: dict[tuple, Table] = {}
    for row in rows(records):
        groups: dict[tuple, list[Record]] = {}
        for record in filter(is_main, row.records):
            groups.setdefault((record["dataset"], record["norm"], str(record["eps"])), []).append(record)
        for (dataset, norm, eps), group in groups.items():
            first = group[0]
            robust = {record["attack"]: record["robust_acc"] for record in group}
            selection = first["checkpoint"], first["selected_on"]
            line = Line(
                row.label, *selection, first["n"], first["clean_acc"], robust, worst_case([*filter(is_bounded, group)])
            )
            table = found.setdefault((dataset, norm, eps), Table(dataset, norm, eps, [], []))
            table.lines.append(line)
            table.attacks[:] = sorted({*table.attacks, *robust}, key=strength)
    return list(found.values())


def worst_case(records: Sequence[Record]) -> float | None:
    """Percent of images that withstand every one of these attacks; None where there is one attack only."""
    if len(records) < 2:
        return None
    return 100 * float(np.mean(np.logical_and.reduce([robust_flags(record) for record in records])))


def cells(table: Table) -> list[list[str]]:
    """A table as text, header first; the first two columns are words, the others numbers in percent."""
    worst = any(line.worst is not None for line in table.lines)
    header = ["run", "checkpoint / selected on", "n", "clean", *map(attack_label, table.attacks)]
    grid = [[*header, "worst case"] if worst else header]
    for line in table.lines:
        complete = len(line.robust) == len(table.attacks)  # the worst of fewer attacks must not look better
        accuracies = [line.clean, *(line.robust.get(attack) for attack in table.attacks)]
        accuracies += [line.worst if complete else None] * worst
        numbers = ["–" if value is None else f"{value:.2f}" for value in accuracies]
        grid.append([line.label, f"{line.checkpoint} / {line.selected_on}", str(line.n), *numbers])
    return grid


def stages(table: Table, records: Iterable[Record]) -> list[list[list[str]]]:
    """Robust accuracy after each attack of AutoAttack: for each list of attacks a grid of text, header first."""
    found: dict[tuple[str, ...], list[list[str]]] = {}
    for row in rows(records):
        for record in filter(is_main, row.records):
            after = record.get("robust_after", {})
            here = (record["dataset"], record["norm"], str(record["eps"])) == (table.dataset, table.norm, table.eps)
            if here and len(after) > 1:
                numbers = [f"{value:.2f}" for value in (record["clean_acc"], *after.values())]
                name = f"{row.label}, {attack_label(record['attack'])}"
                found.setdefault(tuple(after), []).append([name, *numbers])
    return [[["robust after", "clean", *map(attack_label, names)], *lines] for names, lines in found.items()]


def as_text(records: Iterable[Record]) -> str:
    """The tables of records, as the terminal shows them, each with the stages of AutoAttack below it."""
    texts, records = [], list(records)
    for table in tables(records):
        title = f"{table.dataset}, {table.norm}, eps {table.eps}: accuracy in percent"
        texts.append("\n".join([title, *_aligned(cells(table), 2)]))
        texts += ["\n".join(_aligned(grid, 1)) for grid in stages(table, records)]
    return "\n\n".join(texts) or "no records: nothing has been evaluated yet"


def _aligned(grid, words):
    """Lines of text: the first `words` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    for line in grid:
        sides = [str.ljust] * words + [str.rjust] * (len(line) - words)
        yield "  ".join(side(cell, width) for side, cell, width in zip(sides, line, widths, strict=True))


def ladders(row: Row) -> dict[str, list[tuple[float, str, float]]]:
    """attack -> [(eps, eps as written, accuracy)], rising in eps from (0, "0", clean accuracy)."""
    found: dict[str, list] = {}
    for record in row.records:
        points = found.setdefault(record["attack"], [(0.0, "0", record["clean_acc"])])
        if fraction(record["eps"]) > 0:
            points.append((fraction(record["eps"]), str(record["eps"]), record["robust_acc"]))
    return found
