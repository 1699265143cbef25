"""Shell commands that reproduce the numbers of a report.

Guarantee (test of the same name): a shell splits each command into the arguments that are meant, whatever a path holds.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ibjax.attacks.geometry import fraction
from ibjax.evaluation import results
from ibjax.evaluation.results import Record, is_transfer, surrogate_of, weights_of
from ibjax.runs.rundir import benchmarked


class Block(NamedTuple):
    """Commands under a heading; the heading is text for the reader, not part of the commands."""

    heading: str
    commands: list[str]


def blocks(runs: Sequence[Any], out: Path, each: bool) -> list[Block]:
    """Commands to train, evaluate and report `report.RunResults` again; a nested run is trained by the outer one."""
    folders = [run.folder.resolve() for run in runs]
    top = [run for run in runs if not any(folder in run.folder.resolve().parents for folder in folders)]
    found = []
    for run in top:
        if (origin := origin_of(run)) is not None:
            found.append(Block(f"{run.title}: {origin}", []))
            continue
        taught = _section(run.config, "teacher").get("workdir")
        heading = f"{run.title}: train again" + (f", with the teacher in {taught}" if taught else "")
        again = _command("main", config=run.folder / "config.json", workdir=f"{run.folder}-again")
        found.append(Block(heading, [again]))
    sources: dict[str, tuple[Path, str]] = {}  # weights -> (workdir, checkpoint)
    for run in runs:
        for record in sorted(run.records, key=lambda record: record["checkpoint"] != "best"):
            if weights := weights_of(record):
                sources.setdefault(weights, (run.folder, record["checkpoint"]))
    for run in runs:
        if benchmarked(run.facts):  # no command has the network
            continue
        commands, missing = _evaluations(run, sources)
        if commands:
            found.append(Block(f"{run.title}: evaluate again", commands))
        found += [Block(f"{run.title}: {text}", []) for text in missing]
    options = ["--each"] if each else []
    found.append(Block("This report", [_command("report", *(run.folder for run in top), *options, out=out)]))
    return found


def origin_of(run: Any) -> str | None:
    """The origin of a network that no recipe trains, imported or masked after training, in words; else None."""
    if masked := _section(run.facts, "masked"):
        return f"made by ibjax.analysis.mask of a run's weights {str(masked.get('weights'))[:8]}"
    if "imported" not in run.facts:
        return None
    source = _section(run.facts, "imported")
    if benchmarked(run.facts):
        return f"given to ibjax.benchmark: {source.get('network')}, {source.get('library')} {source.get('version')}"
    return f"imported by ibjax.convert from {source.get('file')}, sha256 {source.get('sha256')}"


def _command(module, *positional, **options):
    words = ["python", "-m", f"ibjax.{module}", *map(str, positional)]
    words += [f"--{name}={value}" for name, value in options.items() if value is not None]
    return shlex.join(words)


def _evaluations(run, sources):
    """(commands, notes on records without one) for a run's main records; one command per checkpoint and setting."""
    groups: dict[tuple, list[Record]] = {}
    own = _section(run.config, "evaluate")
    for record in filter(results.is_main, run.records):
        source = weights_of(surrogate_of(record) or {})
        if is_transfer(record["attack"]) and source not in sources:
            source = record["attack"].partition(" from ")[2]  # only its name is known
        samples = str(record["samples"]) if record.get("samples") else None
        precision = record.get("precision")
        precision = None if precision == own.get("precision", precision) else precision
        key = record["checkpoint"], record["n"], record["norm"], str(record["eps"]), samples, precision, source
        groups.setdefault(key, []).append(record)
    commands, missing = [], []
    for (checkpoint, n, norm, eps, samples, precision, source), group in groups.items():
        if source is not None and source not in sources:
            missing.append(f"its attacks from {source} need that run, which is not on this page")
            continue
        names = sorted({record["attack"].partition(" from ")[0] for record in group}, key=results.strength)
        options = dict(workdir=run.folder, checkpoint=checkpoint, attacks=",".join(names))
        options |= {} if n == (own.get("n") or run.facts.get("n_test")) else {"n": n}
        options |= {**_threat(run.config, norm, eps, group), "samples": samples, "precision": precision}
        if source is not None:
            folder, name = sources[source]
            options |= {"surrogate": folder, **({} if name == "best" else {"surrogate_checkpoint": name})}
        commands.append(_command("evaluate", **options))
    return commands, missing


def _threat(configuration, norm, eps, group):
    """The options for a threat model other than the run's own: a teacher may be attacked with those of its student."""
    evaluated = {name: value for name, value in _section(configuration, "evaluate").items() if value is not None}
    own = {**_section(configuration, "threat"), **evaluated}
    same = norm == own.get("norm") and _length(eps) == _length(own.get("eps"))
    steps = {str(record.get("step_size")) for record in group if _takes_step(record)}
    step = steps.pop() if len(steps) == 1 else None
    if same and (step is None or own.get("step_size") is None or _length(step) == _length(own["step_size"])):
        return {}
    return {**({} if same else {"norm": norm, "eps": eps}), "step_size": step}


def _section(configuration: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = configuration.get(name)
    return section if isinstance(section, dict) else {}


def _takes_step(record):
    """Whether an attack uses the step size of the `evaluate` section instead of its own."""
    family, _, steps = record["attack"].rpartition("-")
    return family in ("pgd", "pgd-t", "cw", "margin", "bim", "mim", "nifgsm") and steps.isdecimal()


def _length(value):
    """A length as a number; None where it is not a number."""
    try:
        return float(fraction(value))
    except (TypeError, ValueError):
        return None
