"""Reads the contents of run folders for a report."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ibjax import files
from ibjax.attacks.geometry import fraction
from ibjax.attacks.names import canonical
from ibjax.errors import InputError
from ibjax.evaluation import results
from ibjax.evaluation.report import tables
from ibjax.evaluation.results import Record, is_pgd, strength
from ibjax.files import read_npz
from ibjax.runs import metrics
from ibjax.runs.rundir import doubts

_SKIPPED = ("checkpoints", "damaged", "eval", "tensorboard", "wandb")  # folders of a workdir that contain no other run


class RunResults(NamedTuple):
    """The contents of a workdir; missing or damaged parts are empty, and named in `problems`."""

    folder: Path
    name: str  # the recipe's title, else that of the folder
    title: str  # the name, extended so that it is unique among the runs that are read together
    config: dict[str, Any]
    facts: dict[str, Any]  # of the data
    env: dict[str, Any]
    metrics: list[dict[str, Any]]  # rows of metrics.jsonl
    steps_per_epoch: int | None
    records: list[Record]  # with "title", "run" (the title of this run), "folder", "main" and "num_classes" filled in
    examples: dict[str, Any] | None  # x, x_adv (k, H, W, C); label, predicted, predicted_adv (k,); attack, checkpoint
    problems: list[str]  # one sentence each


def read(workdirs: Iterable[str | os.PathLike], *, unfinished: bool = False) -> list[RunResults]:
    """All runs in and below the folders, in the order given. Raises InputError where a folder holds none.

    A file that cannot be read does not stop the rest: it is named in the `problems` of its run. With `unfinished` it is
    no problem that a run still trains or has no results yet.
    """
    runs = [_read_run(folder, unfinished) for folder in _folders([files.path(workdir) for workdir in workdirs])]
    return [_with_title(run, [other for other in runs if other.name == run.name]) for run in runs]


def _with_title(run, namesakes):
    """The run with a unique title: runs of one name add the seed, if only that differs, else the folder."""
    recipes = {tables.without_seed(other.config, "") for other in namesakes}
    seeds = {str(other.config.get("seed")) for other in namesakes}
    title, folder = run.name, str(run.folder)
    if len(namesakes) > 1:
        seed = f"{title}, seed {run.config.get('seed')}"
        title = seed if len(recipes) == 1 and len(seeds) == len(namesakes) else f"{title} ({folder})"
    says = {"title": run.name, "run": title, "folder": folder}
    classes = {"num_classes": run.facts["num_classes"]} if "num_classes" in run.facts else {}
    return run._replace(title=title, records=[{**classes, **record, **says} for record in run.records])


def _folders(workdirs):
    """The run folders, each once: each given folder is followed by those below it, unless these are given too."""
    given = {workdir.resolve() for workdir in workdirs}
    found = {}
    for workdir in workdirs:
        if not workdir.is_dir():
            raise InputError(f"{workdir} is not a folder; give the --workdir of a run, or a folder above some")
        inside = []
        for folder, names, there in os.walk(workdir, onerror=_refuse):
            names[:] = sorted(name for name in names if name not in _SKIPPED)
            if "config.json" in there and "model.safetensors" not in there:  # which a model card has
                inside.append(Path(folder))
        if not inside:
            raise InputError(f"{workdir} holds no run (no config.json in it or below); give the --workdir of a run")
        for folder in inside:
            if folder == workdir or folder.resolve() not in given:
                found.setdefault(folder.resolve(), folder)
    return list(found.values())


def _refuse(error):
    """Raises InputError for a folder that cannot be listed, since its runs would silently be missing on the page."""
    raise InputError(f"{error.filename} cannot be listed ({error.strerror}); give the folders of runs one by one")


def _read_run(folder, unfinished):
    problems: list[str] = []
    content = _read_json(folder / "config.json", problems)
    config, facts = content.get("config"), content.get("data")
    if content and not (isinstance(config, dict) and isinstance(facts, dict)):
        problems.append("config.json is not that of a run: it needs the sections 'config' and 'data'")
    config, facts = (part if isinstance(part, dict) else {} for part in (config, facts))
    env = _read_json(folder / "env.json", problems)
    logged = _read_metrics(folder / "metrics.jsonl", problems)
    steps_per_epoch = _state(config, facts, logged, problems, unfinished)
    problems += doubts(folder)
    found = _read_records(folder, problems)
    if not found and not unfinished:
        problems.append(f"it has no results yet; python -m ibjax.evaluate --workdir={folder}")
    examples = _read_examples(folder, problems)
    name = str(config.get("title") or folder.resolve().name)
    return RunResults(folder, name, name, config, facts, env, logged, steps_per_epoch, found, examples, problems)


def _state(config, facts, logged, problems, unfinished):
    """The steps per epoch, or None where they are unknown; adds a problem for a diverged or unfinished run."""
    if "imported" in facts:
        return None
    try:
        per_epoch = int(facts["n_train"]) // int(config["batch_size"])
        total = int(config["epochs"]) * per_epoch
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    step = max((row["step"] for row in logged), default=0)
    reasons = [row["reason"] for row in logged if row.get("kind") == "diverged" and "reason" in row]
    if reasons:
        problems.append(f"it diverged: {reasons[-1]}")
    elif any(not np.isfinite(value) for row in logged for value in row.values() if isinstance(value, float)):
        problems.append(f"it diverged: metrics.jsonl holds NaN or Inf, {step} of {total} steps")
    elif step < total and not unfinished:
        problems.append(f"it is not finished, {step} of {total} steps: it runs, was stopped, or diverged")
    return per_epoch or None


def _read_json(file, problems):
    """The JSON object in a file; where it is missing or unreadable, {} and a problem."""
    try:
        return files.read_json(file)
    except FileNotFoundError:
        problems.append(f"{file.name} is missing")
    except (OSError, ValueError) as error:
        problems.append(f"{_short(file)} cannot be read ({error})")
    return {}


def _short(file):
    """A file's path below the workdir if it is in eval/<checkpoint>/, else its name."""
    return "/".join(file.parts[-3:]) if file.parent.parent.name == "eval" else file.name


def _results(folder, suffix, problems):
    """The files eval/<checkpoint>/* whose names end with `suffix`, sorted."""
    try:
        names = files.files_below(folder / "eval")
    except FileNotFoundError:
        return []
    except (OSError, InputError) as error:
        problems.append(f"eval cannot be listed ({error})")
        return []
    return [folder / "eval" / name for name in names if name.count("/") == 1 and name.endswith(suffix)]


def _read_metrics(file, problems):
    try:
        found, damaged = metrics.read_lines(file)
    except (OSError, InputError) as error:
        problems.append(f"{file.name} cannot be read ({error})")
        return []
    if damaged:
        problems.append(f"{file.name} has {damaged} damaged line(s), which are left out")
    return found


def _read_records(folder, problems):
    """The records of all checkpoints, without duplicates in checkpoint, step, attack, eps and further settings."""
    found: dict[tuple, Record] = {}
    for file in _results(folder, ".json", problems):  # "pgd-20.json" before "pgd-20@0.1.json"
        record = _read_json(file, problems)
        if not record:
            continue
        try:
            results.validate(record)
            record["attack"] = canonical(record["attack"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            missing = "it lacks " if isinstance(error, KeyError) else ""
            problems.append(f"{_short(file)} is damaged ({missing}{error}); delete it and evaluate again")
            continue
        key = (file.parent.name, record["attack"], fraction(record["eps"]))
        key += tuple(str(record.get(name)) for name in ("step", "norm", "n", "samples", "count", "attack_settings"))
        # the main eps of one evaluation may be on the ladder of an earlier one; the numbers are equal and kept once
        found.setdefault(key, {**record, "main": "@" not in file.stem})
    return list(found.values())


def _attack_of(file_name):
    """The attack in a record's file name: "pgd-20(restarts=5)" for "pgd-20(restarts=5).n40"."""
    found = re.match(r"[\w-]+(\([^()]*\))?", file_name)
    attack = re.sub(r"(\d)_(\d)", r"\1/\2", found[0] if found else file_name)
    return f"{attack} from another network" if "~" in file_name else attack


def _read_examples(folder, problems):
    """The stored images of one attack, with the norm and eps of the record beside them.

    Preferably PGD on cross-entropy, then of `best`, then with the most steps, then under the run's own threat model,
    whose file has the shortest name.
    """
    suffix = ".examples.npz"
    files = {f: _attack_of(f.name.removesuffix(suffix)) for f in _results(folder, suffix, problems)}

    def value(file):
        return is_pgd(files[file]), file.parent.name == "best", strength(files[file]), -len(file.name)

    for file in sorted(files, key=value, reverse=True):
        try:
            arrays = read_npz(file)
            found = {name: arrays[name] for name in ("x", "x_adv", "label", "predicted", "predicted_adv")}
            shape = found["x"].shape
            if len(shape) != 4 or shape[-1] not in (1, 3) or found["x_adv"].shape != shape:
                raise ValueError(f"images of shapes {shape} and {found['x_adv'].shape}")
            for labels in (found["label"], found["predicted"], found["predicted_adv"]):
                if labels.shape != shape[:1] or not np.issubdtype(labels.dtype, np.integer):
                    raise ValueError(f"labels of shape {labels.shape} and type {labels.dtype}")
            beside = _read_json(file.with_name(file.name.removesuffix(suffix) + ".json"), [])
            threat = {name: str(beside.get(name, "")) for name in ("norm", "eps")}
            return {**found, **threat, "attack": files[file], "checkpoint": file.parent.name}
        except (OSError, ValueError, KeyError) as error:  # an InputError is a ValueError
            problems.append(f"{_short(file)} cannot be read ({error})")
    return None
