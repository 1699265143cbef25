"""What result records say: tables, curves against eps, and checks of the numbers. No file is read or written here.

A record is what evaluate.py writes for one network under one attack at one eps.

Guarantees (tests of the same names): the worst case counts the images that withstand every attack; each check warns
on the fault that it is for.
"""

import base64
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ibjax.attacks.geometry import fraction
from ibjax.attacks.names import parse, with_options

Record = dict[str, Any]  # accuracies in percent
TOLERANCE = 0.5  # percentage points by which the weaker of two attacks may do better before a check warns
_NAMES = {
    "fgsm": "FGSM",
    "pgd": "PGD",
    "margin": "margin PGD",
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
    """As "PGD-20 (restarts 5)" for "pgd-20(restarts=5)", "PGD-9, transfer from teacher" for "pgd-9 from teacher"."""
    name, _, source = name.partition(" from ")
    base, options = parse(name)
    count = options.pop("count", "both")
    family, dash, steps = base.partition("-")
    label = _NAMES.get(family, family) + dash + steps
    said = [f"{option} {value}" for option, value in options.items()]
    if base.startswith("cw-l2-"):
        label, said = f"C&W l2-{base.removeprefix('cw-l2-')}", ["any size", *said]
    if count == "attacked":
        said.append("counts images wrong as they are")
    label += f" ({', '.join(said)})" if said else ""
    return f"{label}, transfer from {source}" if source else label


def departures(record: Record) -> list[str]:
    """Where training, validation and evaluation of a record's network had different threat models, as sentences.

    Training on clean images has none, and of an imported network it is not known: neither is a difference.
    """
    evaluated = {"norm": record["norm"], "eps": record["eps"]}
    found = []
    for what, key in (("trained", "train_threat"), ("validated", "validate_threat")):
        other = record.get(key)
        if isinstance(other, dict) and not _same_threat(other, evaluated):
            found.append(f"{what} in {_threat_in_words(other)}, evaluated in {_threat_in_words(evaluated)}")
    return found


def _same_threat(one, other):
    return one["norm"] == other["norm"] and fraction(one["eps"]) == fraction(other["eps"])


def _threat_in_words(threat):
    norm = {"linf": "l_inf"}.get(threat["norm"], threat["norm"])
    return f"{norm} at eps {threat['eps']}"


def strength(attack: str) -> tuple:
    """Sorts one-step attacks before iterative ones, fewer steps before more, and transfer attacks after all others."""
    name, _, source = attack.partition(" from ")
    base, options = parse(name)
    family, _, steps = base.partition("-")
    known = list(_NAMES)
    rank = known.index(family) if family in known else len(known)
    return bool(source), rank, family, int(steps) if steps.isdigit() else 0, steps, with_options("", options), source


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
    texts += ["\n".join(found)] if (found := _departed(records)) else []
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


# ---- checks ------------------------------------------------------------------------------------------------


class Check(NamedTuple):
    """A statement that the numbers support or not."""

    name: str
    status: str  # "pass", "warn" or "not checked"
    details: list[str]  # with the numbers


def checks(records: Sequence[Record], problems: Sequence[str] = ()) -> list[Check]:
    """What should make a reader trust or doubt a table; `problems` are those of the files that records came from."""
    grouped = rows(filter(is_bounded, records))
    warned = Counter((record["title"], str(text)) for record in records for text in record.get("warnings", ()))
    warnings = [f"{title}: {text} ({count} records)" for (title, text), count in warned.items()]
    selected = sorted({(record["title"], record["selected_on"]) for record in records})
    commits = sorted({str(record.get("commit") or "an installed package") for record in records})
    mixed = len(commits) > 1 or any(commit.endswith("+") for commit in commits)  # "+": local changes
    found = [
        _facts("Every run is finished, and all of its files can be read", problems, "nothing is missing"),
        _same_images(records),
        _facts(
            "No checkpoint was selected on the test set",
            [f"{title}: selected on the test set" for title, split in selected if split == "test"],
            "; ".join(f"{title}: {split}" for title, split in selected),
        ),
        _threats(records),
        _cases("PGD is at least as strong as FGSM", _iterative(grouped), "no two of these attacks at one eps"),
        _cases("Accuracy under attack does not rise with eps", _rises(grouped)),
        _cases("The largest eps of the ladder at least halves accuracy", _falls(grouped), "evaluate.ladder is empty"),
        _cases("Every adversarial image lies in the eps-ball, to 1e-6", _distances(grouped)),
        _cases("Percentages are those of the flags per image", _agreement(grouped)),
        _facts("No record carries a warning", warnings, f"{len(records)} records"),
        _facts("All records come from one commit without local changes", commits if mixed else [], ", ".join(commits)),
    ]
    strongest = _strongest(grouped)
    if strongest:
        found.insert(5, _cases("AutoAttack is at least as strong as every other attack", strongest))
    if not records:
        found[1:] = [check._replace(status="not checked", details=["no records"]) for check in found[1:]]
    return found


def _facts(name, faults, otherwise):
    return Check(name, "warn" if faults else "pass", list(faults) or [otherwise])


def _cases(name, cases, missing="no records to compare"):
    """A check from (margin, text) of each comparison: it warns with every text whose margin is negative."""
    if not cases:
        return Check(name, "not checked", [missing])
    faults = [text for margin, text in cases if not margin >= 0]
    if faults:
        return Check(name, "warn", faults)
    return Check(name, "pass", [f"{len(cases)} compared; the closest: {min(cases)[1]}"])


def _same_images(records):
    """Warns where records differ in data set or n, or those of one checkpoint in the step that it was of."""
    images = sorted({f"{record['dataset']}, n = {record['n']}" for record in records})
    steps = {(record["title"], record["checkpoint"], record.get("step")) for record in records}
    moved = [key for key, count in Counter((title, name) for title, name, _ in steps).items() if count > 1]
    faults = images if len(images) > 1 else []
    faults += [f"{title}: the records of {name} are of several steps; evaluate again" for title, name in moved]
    return _facts("All records are on the same images", faults, "".join(images))


def _threats(records):
    """Warns where a network was trained or selected under another threat model than that of its main evaluation."""
    return _facts(
        "Training, validation and evaluation have one threat model", _departed(records), "no difference is recorded"
    )


def _departed(records):
    mains = [record for record in records if is_main(record)]
    return list(dict.fromkeys(f"{record['title']}: {text}" for record in mains for text in departures(record)))


def _iterative(grouped):
    cases = []
    for row in grouped:
        one_step = {str(record["eps"]): record["robust_acc"] for record in row.records if record["attack"] == "fgsm"}
        for record in row.records:
            eps, strong, name = str(record["eps"]), record["robust_acc"], attack_label(record["attack"])
            if record["attack"].startswith("pgd-") and not is_transfer(record["attack"]) and eps in one_step:
                text = f"{row.label}, eps {eps}: {name} leaves {strong:.2f}, FGSM {one_step[eps]:.2f}"
                cases.append((one_step[eps] + TOLERANCE - strong, text))
    return cases


def _strongest(grouped):
    cases = []
    for row in grouped:
        for auto in (record for record in row.records if record["attack"] == "autoattack"):
            for other in row.records:
                if other is not auto and str(other["eps"]) == str(auto["eps"]):
                    strong, weak, name = auto["robust_acc"], other["robust_acc"], attack_label(other["attack"])
                    text = f"{row.label}, eps {auto['eps']}: AutoAttack leaves {strong:.2f}, {name} {weak:.2f}"
                    cases.append((weak + TOLERANCE - strong, text))
    return cases


def _rises(grouped):
    cases = []
    for row in grouped:
        for attack, points in ladders(row).items():
            for (_, eps, before), (_, larger, after) in itertools.pairwise(points):
                text = f"{row.label}, {attack_label(attack)}: {before:.2f} at eps {eps}, {after:.2f} at eps {larger}"
                cases.append((before + TOLERANCE - after, text))
    return cases


def _falls(grouped):
    cases = []
    for row in grouped:
        curves = {attack: points for attack, points in ladders(row).items() if len(points) > 2}  # clean, main, more
        if not curves:
            continue
        top = max(points[-1][0] for points in curves.values())
        reached = {attack: points[-1] for attack, points in curves.items() if points[-1][0] == top}
        attack, (_, eps, accuracy) = min(reached.items(), key=lambda item: item[1][2])
        clean = row.records[0]["clean_acc"]
        text = f"{row.label}: {clean:.2f} clean, {accuracy:.2f} at eps {eps} under {attack_label(attack)}"
        cases.append((clean / 2 - accuracy, text))
    return cases


def _distances(grouped):
    cases = []
    for row in grouped:
        for record in row.records:
            name, eps, distance = attack_label(record["attack"]), record["eps"], record["max_distance"]
            text = f"{row.label}, {name}: largest distance {distance:.8f}, eps {eps}"
            cases.append((fraction(eps) + 1e-6 - distance, text))
    return cases


def _agreement(grouped):
    cases = []
    for row in grouped:
        for record in row.records:
            counted, stated, clean = (
                100 * float(np.mean(robust_flags(record))),
                record["robust_acc"],
                record["clean_acc"],
            )
            name = f"{row.label}, {attack_label(record['attack'])}, eps {record['eps']}"
            text = f"{name}: {stated:.4f} stated, {counted:.4f} counted, {clean:.4f} clean"
            most = 100.0 if "count=attacked" in record["attack"] else clean
            cases.append((min(0.001 - abs(counted - stated), most + 0.001 - stated), text))
    return cases
