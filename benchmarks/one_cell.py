"""One cell of `results.py`: its configuration, its training and attacks in the working folders, and its records."""

import argparse
import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import comparison
import effects
import measuring
import numpy as np
from cells import Cell, cells
from ml_collections import ConfigDict
from parts import ROOT

from ibjax import config, files
from ibjax.attacks import names
from ibjax.data import folder as class_folders
from ibjax.devices import cluster
from ibjax.errors import DivergedError, InputError
from ibjax.evaluation.evaluate import evaluate
from ibjax.runs import recipe_files, run
from ibjax.training import loop
from ibjax.training.experiment import build

SHAPES = {"mnist": (28, 28, 1), "digits": (8, 8, 1), "cifar10": (32, 32, 3)}
NARROW = {  # for --quick
    "cnn": dict(widths=((2,), (4,))),
    "resnet": dict(depth=10, width=4, dtype="float32"),
    "preact_resnet": dict(depth=10, width=4, dtype="float32"),
    "vgg": dict(depth=11, width=4, hidden=(8, 8), dtype="float32"),
}


def settings(cell: Cell, given: argparse.Namespace) -> ConfigDict:
    """The configuration of a cell's network; its best checkpoint is its last."""
    kind, _, objective = cell.recipe.partition(":")
    if kind == "digits":
        epochs = cell.changes["epochs"]
        made = comparison.recipe(objective, epochs, comparison.given_length(objective, epochs))
    else:
        made = recipe_files.load(str(ROOT / cell.recipe))
    made.title, made.seed, made.writers = cell.row, cell.seed, ()
    if cell.data != "digits":
        made.data = data(cell.data, given)
    for path, value in cell.changes.items():
        section, _, key = path.rpartition(".")
        (config.lookup(made, section) if section else made)[key] = value
    made.validate.update(every=made.epochs, dense_from=None)
    made.checkpoint_every = 1
    made.evaluate.update(attacks=cell.attacks, n=cell.n, ladder=(), batch_size=500 if cell.accelerator else 64)
    if cell.teacher:
        made.teacher.update(workdir=str(given.work / cell.teacher), checkpoint="last", recipe=None)
    return shrunk(made, cell) if given.quick else made


def data(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """The data section of MNIST or CIFAR-10 (JPEG)."""
    path, label = {"mnist": (given.mnist, "MNIST"), "cifar10": (given.cifar10, "CIFAR-10 (JPEG)")}[name]
    if path.is_dir():
        path = packed(path, given.work / f"{name}.npz")
    return dict(name="npz", path=str(path), label=label, val_size=1000, split_seed=0)


def packed(path: Path, file: Path) -> Path:
    """`file`, with the images of class folders in one array, so that each cell reads them in a second."""
    if not file.is_file():
        arrays = class_folders.load(path=str(path))
        named = {f"{axis}_{split}": getattr(getattr(arrays, split), part) for split in ("train", "test")
                 for axis, part in (("x", "images"), ("y", "labels"))}  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(file) as temporary, temporary.open("wb") as handle:
            np.savez(handle, **named)
    return file


def shrunk(made: ConfigDict, cell: Cell) -> ConfigDict:
    """Tiny sizes and random images, to try the whole path."""
    network = made.model.get("backbone", made.model)
    if "blocks" not in network:
        network.update(NARROW[network.name])
    config.smoke(made, SHAPES[cell.data], 10, {})
    made.validate.every = made.epochs
    made.evaluate.update(attacks=("apgd-ce",) if cell.of else ("pgd-2",), n=8)
    return made


def execute(cell: Cell, given: argparse.Namespace) -> None:
    """Trains and attacks a cell's network, or continues, and writes its records."""
    cluster.initialize()
    known, folder = cells(), given.work / (cell.of or cell.name)
    trained = known[cell.of] if cell.of else cell
    try:
        train(trained, given)
        made = settings(trained, given)
        asked = config.effective(config.complete(settings(cell, given))).evaluate
        with clocked(given.work / cell.name, "evaluate"):
            records = evaluate(folder, "last", settings=asked, keep=0)
            measured = terms(cell, folder, asked.n) if cell.terms else {}
    except DivergedError as error:
        write(cell, given, settings(trained, given), [], {}, failed=str(error))
        print(f"{cell.name}: diverged: {error}", flush=True)
        return
    write(cell, given, made, records, measured)


def train(cell: Cell, given: argparse.Namespace) -> None:
    """Trains a cell's network in its working folder, and its teacher before it, unless they are there."""
    if cell.teacher:
        train(cells()[cell.teacher], given)
    folder = given.work / cell.name
    made = settings(cell, given)
    asked, file = json.loads(json.dumps(portable(config.plain(made)))), folder / "asked.json"
    if file.is_file() and {**files.read_json(file), "evaluate": None} != {**asked, "evaluate": None}:
        raise InputError(f"{folder} is of another configuration of {cell.name}; delete it")
    if is_trained(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(file, asked)
    with clocked(folder, "train"):
        loop.train(build(made, {"teacher": Path(made.teacher.workdir)} if cell.teacher else {}), folder)
    files.write_json(folder / "seconds.json", {**seconds(folder), "trained": 1})


def terms(cell: Cell, folder: Path, n: int | None) -> dict[str, float]:
    """The terms of an objective's loss on test images, as benchmarks/effects.py measures them."""
    objective = config.build("objectives", dict(name=cell.terms), "objective")
    return effects.terms(run.load(folder, "last"), objective, tuple(effects.TERMS[cell.terms]), n)


def forget(cell: Cell, given: argparse.Namespace) -> None:
    """Deletes what a cell has left in the working folders, so that it runs from its beginning.

    One that attacks another cell's network leaves the network, but neither its record there nor an attack's progress.
    """
    shutil.rmtree(given.work / cell.name, ignore_errors=True)
    for attack in settings(cell, given).evaluate.attacks if cell.of else ():
        name, folder = names.in_file_name(attack), given.work / cell.of / "eval" / "last"
        for file in (*folder.glob(f"{name}.*"), *folder.glob(f".{name}[.-]*")):
            file.unlink()


def write(
    cell: Cell,
    given: argparse.Namespace,
    made: ConfigDict,
    records: list[dict],
    measured: dict[str, float],
    failed: str = "",
) -> None:
    """Writes a finished cell's folder, whole or not at all: cell.json, which comes last, says that it is there."""
    out = given.cells / cell.name
    out.mkdir(parents=True, exist_ok=True)
    about = {key: value for key, value in measuring.environment().items() if key != "command"}
    files.write_json(out / "config.json", portable(config.plain(made)))
    files.write_json(out / "records.json", {"records": [portable(record) for record in records]})
    metrics = given.work / cell.name / "metrics.jsonl"
    if not cell.of and metrics.is_file():
        (out / "metrics.jsonl").write_bytes(metrics.read_bytes())
    phases = {key: round(value, 1) for key, value in seconds(given.work / cell.name).items() if key != "trained"}
    made_of = dict(cell=cell.name, seconds=phases, terms=measured, failed=failed, environment=about)
    files.write_json(out / "cell.json", made_of)


def portable(content: Any) -> Any:
    """A record or configuration without this machine's paths; a record's copy of the configuration is left out."""
    if isinstance(content, Mapping):
        return {
            key: Path(value).name if key in ("path", "workdir", "data_dir") and value else portable(value)
            for key, value in content.items()
            if not (key == "config" and "robust_acc" in content)
        }
    return [portable(value) for value in content] if isinstance(content, list | tuple) else content


@contextlib.contextmanager
def clocked(folder: Path, phase: str) -> Iterator[None]:
    """Adds the seconds of a block to the cell's; a cell may take several calls."""
    folder.mkdir(parents=True, exist_ok=True)
    begun, before = time.monotonic(), seconds(folder)
    try:
        yield
    finally:
        total = round(before.get(phase, 0.0) + time.monotonic() - begun, 1)
        files.write_json(folder / "seconds.json", {**seconds(folder), phase: total})


def seconds(folder: Path) -> dict[str, float]:
    """What `clocked` has kept of a working folder."""
    file = folder / "seconds.json"
    return files.read_json(file) if file.is_file() else {}


def spent(folder: Path) -> float:
    """Seconds that a cell has taken so far."""
    return sum(value for phase, value in seconds(folder).items() if phase != "trained")


def is_trained(folder: Path) -> bool:
    """Whether a working folder has a network that was trained to its end."""
    return bool(seconds(folder).get("trained"))
