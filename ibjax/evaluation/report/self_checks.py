"""Checks the numbers in result records for signs that a reader should not trust them.

A failed check means that the numbers are invalid; a warning means that they may not mean what a reader expects.

Guarantee (test of the same name): each check warns on the fault that it is for.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ibjax.attacks.geometry import fraction
from ibjax.evaluation.report.tables import ladders, rows
from ibjax.evaluation.results import Record, attack_label, departed, is_bounded, is_pgd, robust_flags, run_label

TOLERANCE = 0.5  # percentage points by which a weaker attack may beat a stronger one without a warning


class Check(NamedTuple):
    """A statement about the numbers, and whether they support it."""

    name: str
    status: str  # "pass", "fail", "warn" or "not checked"
    details: list[str]  # with the numbers


def checks(records: Sequence[Record], problems: Sequence[str] = ()) -> list[Check]:
    """All checks of the records; `problems` are the problems of the files from which the records were read."""
    grouped = rows(filter(is_bounded, records))
    warned = Counter((run_label(record), str(text)) for record in records for text in record.get("warnings", ()))
    warnings = [f"{title}: {text} ({count} records)" for (title, text), count in warned.items()]
    selected = sorted({(run_label(record), record["selected_on"]) for record in records})
    commits = sorted({str(record.get("commit") or "an installed package") for record in records})
    mixed = len(commits) > 1 or any(commit.endswith("+") for commit in commits)  # "+": local changes
    found = [
        _facts("Every run is finished, and all of its files can be read", problems, "nothing is missing"),
        _cases(
            "Every network is better than chance", _chance(rows(records)), "no record says how many classes", "fail"
        ),
        _same_images(records),
        _facts(
            "No checkpoint was selected on the test set",
            [f"{title}: selected on the test set" for title, split in selected if split == "test"],
            "; ".join(f"{title}: {split}" for title, split in selected),
        ),
        _facts(
            "Training, validation and evaluation have one threat model", departed(records), "no difference is recorded"
        ),
        _cases("PGD is at least as strong as FGSM", _iterative(grouped), "no two of these attacks at one eps"),
        _cases("Accuracy under attack does not rise with eps", _rises(grouped)),
        _cases("The largest eps of the ladder at least halves accuracy", _falls(grouped), "evaluate.ladder is empty"),
        _cases("Every adversarial image lies in the eps-ball, to 1e-6", _distances(grouped), fault="fail"),
        _cases("Percentages are those of the flags per image", _agreement(grouped), fault="fail"),
        _facts("No record carries a warning", warnings, f"{len(records)} records"),
        _facts("All records come from one commit without local changes", commits if mixed else [], ", ".join(commits)),
    ]
    strongest = _strongest(grouped)
    if strongest:
        found.insert(6, _cases("AutoAttack is at least as strong as every other attack", strongest))
    if not records:
        found[1:] = [check._replace(status="not checked", details=["no records"]) for check in found[1:]]
    return found


def _facts(name, faults, otherwise):
    return Check(name, "warn" if faults else "pass", list(faults) or [otherwise])


def _cases(name, cases, missing="no records to compare", fault="warn"):
    """A check from comparisons [(margin, text)]: `fault` with all texts of negative margin, "pass" without any."""
    if not cases:
        return Check(name, "not checked", [missing])
    faults = [text for margin, text in cases if not margin >= 0]
    if faults:
        return Check(name, fault, faults)
    return Check(name, "pass", [f"{len(cases)} compared; the closest: {min(cases)[1]}"])


def _chance(grouped):
    """Compares clean accuracy with chance plus two standard errors of chance on as many images: [(margin, text)].

    Chance is the share of the most frequent class (`chance_acc`) where a record states it, else one over the classes.
    """
    cases = []
    for row in grouped:
        first = row.records[0]
        chance, classes = first.get("chance_acc"), first.get("num_classes")
        if not isinstance(chance, int | float) or not 0 < chance <= 100:
            if type(classes) is not int or classes < 1:
                continue
            chance = 100 / classes
        bound = chance + 2 * (chance * (100 - chance) / first["n"]) ** 0.5
        text = f"{row.label}: {first['clean_acc']:.2f} clean on {first['n']} images; a guess scores {chance:.2f}"
        cases.append((first["clean_acc"] - bound, f"{text}, and up to {min(bound, 100):.2f} by luck"))
    return cases


def _same_images(records):
    """Warns where records differ in data set or n, or where those of one checkpoint differ in its step."""
    digests: dict[str, set[str]] = {}
    for record in records:
        known = digests.setdefault(f"{record['dataset']}, n = {record['n']}", set())
        known |= {str(record["images"])} if "images" in record else set()
    named = [
        text if len(known) < 2 else f"{text} (images {digest[:8]})"
        for text, known in sorted(digests.items())
        for digest in sorted(known) or [""]
    ]
    steps = {(run_label(record), record["checkpoint"], str(record.get("step"))) for record in records}
    moved = [key for key, count in Counter((title, name) for title, name, _ in steps).items() if count > 1]
    faults = named if len(named) > 1 else []
    faults += [f"{title}: the records of {name} are of several steps; evaluate again" for title, name in moved]
    return _facts("All records are on the same images", faults, "".join(named))


def _iterative(grouped):
    cases = []
    for row in grouped:
        one_step = {str(record["eps"]): record["robust_acc"] for record in row.records if record["attack"] == "fgsm"}
        for record in row.records:
            eps, strong, name = str(record["eps"]), record["robust_acc"], attack_label(record["attack"])
            if is_pgd(record["attack"]) and eps in one_step:
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
            # for a random network the accuracies are means over draws, but the flags are those of the first draw
            one_draw = record.get("robust_acc_of_draws", [record["robust_acc"]])[0]
            counted, stated = 100 * float(np.mean(robust_flags(record))), one_draw
            clean = max(record["clean_acc"], one_draw) if "draws" in record else record["clean_acc"]
            name = f"{row.label}, {attack_label(record['attack'])}, eps {record['eps']}"
            text = f"{name}: {stated:.4f} stated, {counted:.4f} counted, {clean:.4f} clean"
            most = 100.0 if "count=attacked" in record["attack"] else clean
            cases.append((min(0.001 - abs(counted - stated), most + 0.001 - stated), text))
    return cases
