"""Results of runs: the table that is printed, and one self-contained HTML page that checks itself.

    python -m ibjax.report DIR [DIR …] [--out=report.html]

A DIR is a workdir or a folder above some; every run below it is reported, teachers and contrasts included.

Guarantees (tests of the same names): a record that cannot be read is named, and the rest is shown; the page refers to
nothing outside itself; whatever stands in a file is escaped; each check warns on the fault that it is for.
"""

import argparse
import base64
import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ibjax import errors, metrics
from ibjax.attacks.geometry import fraction
from ibjax.errors import InputError

Record = dict[str, Any]  # as evaluate.py writes it, accuracies in percent
TOLERANCE = 0.5  # percentage points by which a weaker attack may do better before a check warns
_NAMES = {"fgsm": "FGSM", "pgd": "PGD", "cw": "margin PGD", "autoattack": "AutoAttack"}
_SKIPPED = ("checkpoints", "eval", "tensorboard")  # folders of a workdir below which no run lies


def robust_flags(record: Record) -> np.ndarray:
    """The (n,) bool flags of a record: classified correctly both as it is and under the attack."""
    packed = np.frombuffer(base64.b64decode(record["robust_flags"]), np.uint8)
    return np.unpackbits(packed, count=record["n"]).astype(bool)


def attack_label(name: str) -> str:
    """As "margin PGD-20" for "cw-20"."""
    family, dash, steps = name.partition("-")
    return _NAMES.get(family, family) + dash + steps


# ---- records into rows and tables ----------------------------------------------------------------------------


class Row(NamedTuple):
    """All records of one network on one set of images: every attack, every eps."""

    label: str  # unique among rows
    records: list[Record]


class Line(NamedTuple):
    """One row of a table; accuracies in percent."""

    label: str
    checkpoint: str
    selected_on: str
    n: int
    clean: float
    robust: dict[str, float]  # attack -> accuracy
    worst: float | None  # of images that withstand all of these attacks; None when it cannot be known


class Table(NamedTuple):
    """Lines that may be compared: one data set, one threat model."""

    dataset: str
    norm: str
    eps: str
    attacks: list[str]
    lines: list[Line]


def rows(records: Iterable[Record]) -> list[Row]:
    """Groups records by network and images; a title shared by several gets what they differ in."""
    parts = ("checkpoint", "step", "seed", "n", "dataset", "norm")
    groups: dict[str, list[Record]] = {}
    for record in records:
        config = record.get("config") or {}
        network = [config.get(section) for section in ("objective", "model", "attack")]  # two runs may share a title
        key = json.dumps([record["title"], *(record.get(part) for part in parts), network], sort_keys=True)
        groups.setdefault(key, []).append(record)
    firsts = [group[0] for group in groups.values()]
    labels: list[str] = []
    for first in firsts:
        others = [other for other in firsts if other["title"] == first["title"]]
        differing = [part for part in parts if len({str(other.get(part)) for other in others}) > 1]
        label = ", ".join([first["title"], *(f"{part} {first.get(part)}" for part in differing)])
        labels.append(label if label not in labels else f"{label} #{labels.count(label) + 1}")
    return [Row(label, _sorted(group)) for label, group in zip(labels, groups.values(), strict=True)]


def _sorted(group):
    return sorted(group, key=lambda record: (_strength(record["attack"]), fraction(record["eps"])))


def _strength(attack):
    """Sorts one-step attacks before iterative ones and fewer steps before more."""
    family, _, steps = attack.partition("-")
    known = list(_NAMES)
    rank = known.index(family) if family in known else len(known)
    return rank, family, int(steps) if steps.isdigit() else 0, steps


def is_main(record: Record) -> bool:
    """Whether a record is at the eps of the table; the others are the ladder of the curve."""
    own = (record.get("config") or {}).get("evaluate", {}).get("eps")
    return record.get("main", record["eps"] == own)


def tables(records: Iterable[Record]) -> list[Table]:
    """One table for each data set, norm and main eps, in the order of the records."""
    found: dict[tuple, Table] = {}
    for row in rows(records):
        groups: dict[tuple, list[Record]] = {}
        for record in filter(is_main, row.records):
            groups.setdefault((record["dataset"], record["norm"], str(record["eps"])), []).append(record)
        for key, group in groups.items():
            first = group[0]
            robust = {record["attack"]: record["robust_acc"] for record in group}
            checkpoint, selected_on = str(first.get("checkpoint")), str(first.get("selected_on"))
            clean, worst = first["clean_acc"], worst_case(group)
            line = Line(row.label, checkpoint, selected_on, first["n"], clean, robust, worst)
            target = found.setdefault(key, Table(*key, [], []))
            target.lines.append(line)
            target.attacks[:] = sorted({*target.attacks, *robust}, key=_strength)
    return list(found.values())


def worst_case(records: Sequence[Record]) -> float | None:
    """Percent of images that are robust to every one of these attacks; None without flags or with one attack."""
    if len(records) < 2 or not all("robust_flags" in record for record in records):
        return None
    return 100 * float(np.mean(np.logical_and.reduce([robust_flags(record) for record in records])))


def cells(found: Table) -> list[list[str]]:
    """A table as text: the header, then one list for each line."""
    worst = any(line.worst is not None for line in found.lines)
    header = ["run", "checkpoint/selected on", "n", "clean", *map(attack_label, found.attacks)]
    grid = [[*header, "worst case"] if worst else header]
    for line in found.lines:
        accuracies = [line.clean, *(line.robust.get(attack) for attack in found.attacks)]
        accuracies += [line.worst] if worst else []
        numbers = ["–" if value is None else f"{value:.2f}" for value in accuracies]
        grid.append([line.label, f"{line.checkpoint}/{line.selected_on}", str(line.n), *numbers])
    return grid


def table(records: Iterable[Record]) -> str:
    """The plain-text tables of records: a row for each run, a column for each attack at the main eps, in percent."""
    texts = []
    for found in tables(records):
        grid = cells(found)
        widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
        lines = [f"{found.dataset}, {found.norm}, eps {found.eps}: accuracy in percent"]
        for line in grid:
            aligned = (f"{c:<{w}}" if i < 2 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            lines.append("  ".join(aligned).rstrip())
        texts.append("\n".join(lines))
    return "\n\n".join(texts) or "no records: nothing has been evaluated yet"


# ---- from disk -----------------------------------------------------------------------------------------------


class RunResults(NamedTuple):
    """What a workdir holds; parts that are missing are empty and named in `problems`."""

    folder: Path
    title: str  # unique among the runs that are read together
    config: dict[str, Any]
    facts: dict[str, Any]  # of the data
    env: dict[str, Any]
    metrics: list[dict[str, Any]]  # rows of metrics.jsonl
    records: list[Record]  # with "title" and "main" filled in
    examples: dict[str, Any] | None  # x, x_adv (k, H, W, C), label, predicted, predicted_adv (k,); attack, checkpoint
    total_steps: int | None
    problems: list[str]  # one sentence each


def read(workdirs: Iterable[str | os.PathLike]) -> list[RunResults]:
    """All runs in and below the folders. Raises InputError where a folder holds none.

    A file that cannot be read does not stop the rest: it is named in the `problems` of its run.
    """
    runs = [_read_run(folder) for folder in _folders([Path(workdir) for workdir in workdirs])]
    counts = Counter(run.title for run in runs)
    unique = []
    for run in runs:
        title = run.title if counts[run.title] == 1 else f"{run.title} ({run.folder})"
        unique.append(run._replace(title=title, records=[{**record, "title": title} for record in run.records]))
    return unique


def _folders(workdirs):
    """Folders of runs, each once: a given folder, then what lies below it unless it is given too."""
    given = {workdir.resolve() for workdir in workdirs}
    found = {}
    for workdir in workdirs:
        if not workdir.is_dir():
            raise InputError(f"{workdir} is not a folder; give the --workdir of a run, or a folder above some")
        inside = []
        for folder, names, files in os.walk(workdir):
            names[:] = sorted(name for name in names if name not in _SKIPPED)
            if "config.json" in files:
                inside.append(Path(folder))
        if not inside:
            raise InputError(f"{workdir} holds no run (no config.json in it or below); give the --workdir of a run")
        for folder in inside:
            if folder == workdir or folder.resolve() not in given:
                found.setdefault(folder.resolve(), folder)
    return list(found.values())


def _read_run(folder):
    problems: list[str] = []
    content = _read_json(folder / "config.json", problems) or {}
    config, facts = content.get("config"), content.get("data")
    if content and not (isinstance(config, dict) and isinstance(facts, dict)):
        problems.append("config.json is not that of a run: it needs the sections 'config' and 'data'")
    config, facts = (part if isinstance(part, dict) else {} for part in (config, facts))
    logged = _read_metrics(folder / "metrics.jsonl", problems)
    records = _read_records(folder, problems)
    total = _total_steps(config, facts)
    step = max((row["step"] for row in logged), default=0)
    if any(not np.isfinite(v) for row in logged for v in row.values() if isinstance(v, float)):
        problems.append("it diverged: metrics.jsonl holds NaN or Inf")
    elif total is not None and step < total:
        problems.append(f"it is not finished: metrics end at step {step} of {total}; it was stopped, or it diverged")
    if not records:
        problems.append("it has no records: evaluate it with python -m ibjax.evaluate")
    title = str(config.get("title") or folder.resolve().name)
    env = _read_json(folder / "env.json", problems) or {}
    examples = _read_examples(folder, problems)
    return RunResults(folder, title, config, facts, env, logged, records, examples, total, problems)


def _read_json(file, problems):
    """The object in a file; None, and a problem, where there is none."""
    try:
        content = json.loads(file.read_text())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content
    except FileNotFoundError:
        problems.append(f"{file.name} is missing")
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{_short(file)} cannot be read ({error})")
    return None


def _short(file):
    """The path below the workdir of a file in eval/<checkpoint>/; the name of others."""
    return "/".join(file.parts[-3:]) if file.parent.parent.name == "eval" else file.name


def _total_steps(config, facts):
    try:
        return int(config["epochs"]) * (int(facts["n_train"]) // int(config["batch_size"]))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _read_metrics(file, problems):
    try:
        found = metrics.read(file)
        lines = len(file.read_text().splitlines()) if file.is_file() else 0
    except (OSError, ValueError) as error:
        problems.append(f"{file.name} cannot be read ({error})")
        return []
    if len(found) < lines - 1:  # one cut line at the end is what a crash leaves, and no damage
        problems.append(f"{file.name} is damaged at line {len(found) + 1}; the rows after it are not shown")
    return [row for row in found if isinstance(row, dict) and isinstance(row.get("step"), int)]


def _read_records(folder, problems):
    """The records of all checkpoints, each (checkpoint, step, attack, eps, n) once."""
    found: dict[tuple, Record] = {}
    files = sorted(folder.glob("eval/*/*.json"), key=lambda file: (file.parent.name, "@" in file.stem, file.name))
    for file in files:
        record = _read_json(file, problems)
        if record is None:
            continue
        try:
            _check_record(record)
        except (ValueError, TypeError, KeyError) as error:
            problems.append(f"{_short(file)} is damaged ({error}); delete it and evaluate again")
            continue
        key = (file.parent.name, record.get("step"), record["attack"], fraction(record["eps"]), record["n"])
        # the main eps of one evaluation may be on the ladder of an earlier one: the same numbers, once
        found.setdefault(key, {**record, "main": "@" not in file.stem})
    return list(found.values())


def _check_record(record):
    """Raises ValueError, TypeError or KeyError unless a record has what tables and checks need."""
    for name in ("attack", "norm", "dataset", "checkpoint", "selected_on", "robust_flags"):
        if not isinstance(record[name], str):
            raise TypeError(f"{name} is {record[name]!r}")
    if type(record["n"]) is not int or record["n"] < 1:
        raise TypeError(f"n is {record['n']!r}")
    if not 0 <= fraction(record["eps"]) < np.inf:
        raise ValueError(f"eps is {record['eps']!r}")
    for name in ("clean_acc", "robust_acc"):
        if not 0 <= record[name] <= 100:
            raise ValueError(f"{name} is {record[name]!r}, not a percentage")
    if not 0 <= record["max_distance"] < np.inf:
        raise ValueError(f"max_distance is {record['max_distance']!r}")
    if len(base64.b64decode(record["robust_flags"], validate=True)) != -(-record["n"] // 8):
        raise ValueError("robust_flags do not hold n flags")


def _read_examples(folder, problems):
    """The stored images of the strongest cross-entropy PGD, of `best` where there is a choice."""
    files = folder.glob("eval/*/*.examples.npz")
    attack = {file: file.name.removesuffix(".examples.npz") for file in files}
    preferred = sorted(
        attack, key=lambda f: (attack[f].startswith("pgd-"), f.parent.name == "best", _strength(attack[f]))
    )
    for file in reversed(preferred):
        try:
            with np.load(file, allow_pickle=False) as arrays:
                names = ("x", "x_adv", "label", "predicted", "predicted_adv")
                found = {name: arrays[name] for name in names}
            if found["x"].ndim != 4 or found["x"].shape != found["x_adv"].shape:
                raise ValueError(f"images of shapes {found['x'].shape} and {found['x_adv'].shape}")
            return {**found, "attack": attack[file], "checkpoint": file.parent.name}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            problems.append(f"{_short(file)} cannot be read ({error})")
    return None


# ---- checks --------------------------------------------------------------------------------------------------


class Check(NamedTuple):
    """A question that the numbers answer."""

    name: str
    status: str  # "pass", "warn" or "not checked"
    details: list[str]  # with the numbers


def checks(runs: Sequence[RunResults]) -> list[Check]:
    """What should make a reader trust or doubt the page, from records alone."""
    records = [record for run in runs for record in run.records]
    grouped = rows(records)
    states = [(run.title, [text for text in run.problems]) for run in runs]
    warned = Counter((record["title"], str(text)) for record in records for text in record.get("warnings") or ())
    on_test = sorted({record["title"] for record in records if record["selected_on"] == "test"})
    commits = sorted({str(record.get("commit") or "installed package") for record in records})
    sets = sorted({f"{record['dataset']}, n={record['n']}" for record in records})
    steps = {(record["title"], record["checkpoint"], record.get("step")) for record in records}
    sets += [f"{t}/{c} at several steps" for (t, c), k in Counter((t, c) for t, c, _ in steps).items() if k > 1]
    return [
        _facts("Every run is finished and all of its files are readable", [f"{t}: {p}" for t, ps in states for p in ps]),
        _facts("All numbers are on the same images", sets if len(sets) > 1 else [], "; ".join(sets)),
        _facts("No checkpoint was selected on the test set", [f"{title}: selected on test" for title in on_test]),
        _cases("PGD is at least as strong as FGSM", _iterative(grouped)),
        _cases("Robust accuracy does not rise with eps", _rises(grouped)),
        _cases("The largest eps of the ladder at least halves accuracy", _falls(grouped), "no ladder: evaluate.ladder"),
        _cases("Every adversarial image lies in the eps-ball (to 1e-6)", _distances(grouped)),
        _cases("Percentages agree with the flags of the images", _agreement(grouped)),
        _facts("No warning in any record", [f"{t}: {text} ({k} records)" for (t, text), k in warned.items()]),
        _facts(
            "All records come from one commit, without uncommitted changes",
            commits if len(commits) > 1 or any(commit.endswith("+") for commit in commits) else [],
            ", ".join(commits),
        ),
    ]


def _facts(name, faults, otherwise="none found"):
    return Check(name, "warn" if faults else "pass", list(faults) or [otherwise])


def _cases(name, cases, missing="no records to compare"):
    """A check from (margin, text) of each comparison: it warns with all whose margin is negative."""
    if not cases:
        return Check(name, "not checked", [missing])
    faults = [text for margin, text in cases if not margin >= 0]
    if faults:
        return Check(name, "warn", faults)
    return Check(name, "pass", [f"{len(cases)} compared; the closest is {min(cases)[1]}"])


def _iterative(grouped):
    cases = []
    for row in grouped:
        one_step = {record["eps"]: record["robust_acc"] for record in row.records if record["attack"] == "fgsm"}
        for record in row.records:
            if record["attack"].startswith("pgd-") and record["eps"] in one_step:
                weak, strong = one_step[record["eps"]], record["robust_acc"]
                text = f"{row.label}, eps {record['eps']}: {attack_label(record['attack'])} {strong:.2f}, FGSM {weak:.2f}"
                cases.append((weak + TOLERANCE - strong, text))
    return cases


def ladders(row: Row) -> dict[str, list[tuple[float, str, float]]]:
    """attack -> [(eps, eps as written, accuracy)], rising in eps from (0, "0", clean accuracy)."""
    found: dict[str, list] = {}
    for record in row.records:  # sorted by attack, then eps
        points = found.setdefault(record["attack"], [(0.0, "0", record["clean_acc"])])
        if fraction(record["eps"]) > 0:
            points.append((fraction(record["eps"]), str(record["eps"]), record["robust_acc"]))
    return found


def _rises(grouped):
    cases = []
    for row in grouped:
        for attack, points in ladders(row).items():
            for (_, eps, before), (_, larger, after) in zip(points, points[1:], strict=False):
                text = f"{row.label}, {attack_label(attack)}: {before:.2f} at eps {eps}, {after:.2f} at eps {larger}"
                cases.append((before + TOLERANCE - after, text))
    return cases


def _falls(grouped):
    cases = []
    for row in grouped:
        curves = ladders(row)
        if max((len(points) for points in curves.values()), default=0) < 3:
            continue  # clean and the main eps alone are no ladder
        top = max(points[-1][0] for points in curves.values())
        (_, eps, accuracy), attack = min(
            ((points[-1], attack) for attack, points in curves.items() if points[-1][0] == top),
            key=lambda case: case[0][2],
        )
        clean = row.records[0]["clean_acc"]
        text = f"{row.label}: {clean:.2f} clean, {accuracy:.2f} at eps {eps} under {attack_label(attack)}"
        cases.append((clean / 2 - accuracy, text))
    return cases


def _distances(grouped):
    return [
        (
            fraction(record["eps"]) + 1e-6 - record["max_distance"],
            f"{row.label}, {attack_label(record['attack'])}: {record['max_distance']:.8f} for eps {record['eps']}",
        )
        for row in grouped
        for record in row.records
    ]


def _agreement(grouped):
    cases = []
    for row in grouped:
        for record in row.records:
            counted, stated = 100 * float(np.mean(robust_flags(record))), record["robust_acc"]
            text = f"{row.label}, {attack_label(record['attack'])}, eps {record['eps']}: {stated:.2f}, flags {counted:.2f}"
            cases.append((min(0.001 - abs(counted - stated), record["clean_acc"] - stated + 0.001), text))
    return cases


# ---- the page ------------------------------------------------------------------------------------------------


def write(workdirs: Iterable[str | os.PathLike], out: str | os.PathLike) -> list[RunResults]:
    """Writes the HTML page of all runs in and below the folders, whole or not at all; returns what it shows."""
    from ibjax import report_page  # it loads matplotlib, which training has no need of

    runs = read(workdirs)
    records = [record for run in runs for record in run.records]
    text = report_page.page(runs, tables(records), rows(records), checks(runs), Path(out))
    temporary = Path(out).with_name(Path(out).name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}); give another --out") from None
    return runs


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m ibjax.report", allow_abbrev=False, description=__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, nargs="+", help="a workdir, or a folder above some")
    parser.add_argument("--out", type=Path, help="the page to write; default: report.html in the first DIR")
    given = parser.parse_args()

    def command():
        out = given.out or given.folder[0] / "report.html"
        runs = write(given.folder, out)
        print(table(record for run in runs for record in run.records))
        for run in runs:
            for problem in run.problems:
                print(f"warning: {run.title}: {problem}")
        print(f"report: {out}")

    errors.exit_with(command)


if __name__ == "__main__":
    main()
