"""What generated images cost: images/s with 70 % of them against none, their memory, and a kill that changes no bit.

    python benchmarks/generated.py [--images=1000000] [--resident=100000] [--batch 256] [--depth=10]
                                   [--width=1] [--repeats=5] [--kills=2] [--quick]

An .npz of noise, as large as the published files (`--images`), is read while training; one of `--resident` images is
kept in the memory of every device. Steps of TRADES-10 on a WideResNet with these two and without generated images
alternate in one run, on eight simulated devices where there is a CPU alone (JAX_NUM_CPU_DEVICES). *Memory*: the bytes
of all arrays of images and labels on the devices, against those that follow from their number: N·(H·W·C + 4) on each.
*Kill*: a small training with a file that is read is killed by SIGKILL at a random time, run again until it ends, and
its last checkpoint compared with that of a training that was not; `--kills` trials, after the times are written.

Writes a JSON file with every single time, and the table beside it as Markdown.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")  # before the backend is made

import jax
import measuring
import numpy as np
from jax.sharding import NamedSharding
from measuring import Steps

from ibjax import config
from ibjax.data.extra import RESIDENT
from ibjax.devices import cluster
from ibjax.runs import run, trees
from ibjax.training import feed
from ibjax.training.experiment import build, initial_state

SHAPE, CLASSES, FRACTION = (32, 32, 3), 10, 0.7
WITHOUT, KEPT, READ = "without", "kept in memory", "read while training"


def settings(given: argparse.Namespace, file: Path | None = None) -> Any:
    """TRADES-10 on synthetic images of CIFAR's size and number, with the generated images of `file`."""
    made = config.base()
    n_train = 2000 if given.quick else 50_000
    made.data = dict(
        name="synthetic", shape=SHAPE, num_classes=CLASSES, n_train=n_train, val_size=CLASSES, split_seed=0
    )
    if file is not None:
        made.data.extra = dict(path=str(file), fraction=FRACTION, resident=file.name.startswith("kept"))
    made.model = dict(name="wide_resnet", depth=given.depth, width=given.width)
    made.objective = dict(name="trades", beta=5.0)
    made.attack.update(loss="kl", steps=1 if given.quick else 10)
    made.update(batch_size=given.batch_size, epochs=2, checkpoint_every=1, log_every=1000)
    return made


def write(file: Path, count: int) -> Path:
    """An .npz of `count` images of noise, without compression."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *SHAPE), dtype=np.uint8)
    np.savez(file, image=images, label=rng.integers(0, CLASSES, count))
    return file


def runner(made: Any) -> tuple[Steps, dict[str, int]]:
    """(steps of a configuration on its own feed of images, {"bytes", "calculated"} of images on all devices)."""
    experiment = build(made)
    before = {id(array) for array in jax.live_arrays()}
    key = jax.device_put(jax.random.key(1), NamedSharding(experiment.mesh, cluster.REPLICATED))
    fed = feed.feed(experiment, key, 0)
    kept = [array for array in jax.live_arrays() if id(array) not in before and array.dtype in (np.uint8, np.int32)]
    large = [array for array in kept if array.size > made.batch_size]
    there = sum(shard.data.nbytes for array in large for shard in array.addressable_shards)
    data = experiment.data
    resident = len(data.train.labels) + (len(data.extra.labels) if data.extra and data.extra.resident else 0)
    calculated = experiment.mesh.size * resident * (int(np.prod(SHAPE)) + 4)
    read = made.batch_size * int(np.prod(SHAPE)) if feed.reads_extra(experiment) else 0  # the batch that is ahead
    state, done = initial_state(experiment), 0

    def steps(n):
        nonlocal state, done
        for _ in range(n):
            state, metrics = fed.dispatch(state, 1)
            done += 1
        jax.block_until_ready(state)
        return float(metrics["loss"][0])

    return steps, {"bytes": there, "calculated": calculated + read}


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The record of a batch size."""
    kept = write(folder / "kept.npz", given.resident)
    read = write(folder / "read.npz", given.images)
    runners, memory = {}, {}
    for name, file in ((WITHOUT, None), (KEPT, kept), (READ, read)):
        runners[name], memory[name] = runner(settings(given, file))
    first = measuring.warm_up(runners, [])
    times = measuring.alternate(runners, given.repeats, given.steps, given.quiet)
    return {
        "devices": jax.device_count(),
        "batch": given.batch_size,
        "network": f"WRN-{given.depth}-{given.width}",
        "images": {KEPT: given.resident, READ: given.images},
        "memory": memory,
        "first_two_steps_s": first,
        **times.record(),
    }


def killed(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Kills trainings at random times; {"at_s", "of_s", "starts", "same_bits"} of each against one left alone."""
    recipe, whole = folder / "recipe.py", folder / "whole"
    small = argparse.Namespace(**{**vars(given), "quick": True, "batch_size": 64, "depth": 10, "width": 1})
    made = settings(small, write(folder / "read.npz", 3000))
    made.validate.batch_size = CLASSES
    recipe.write_text(_RECIPE.format(text=repr(config.plain(made))), encoding="utf-8")
    _, seconds = _train(recipe, whole, None)
    right, found = trees.digest(run.load(whole, "last").variables), []
    for trial in range(given.kills):
        workdir, at = folder / f"killed-{trial}", random.Random(trial).uniform(0.3, 0.9) * seconds
        (ended, _), starts = _train(recipe, workdir, at), 1
        while not ended:
            (ended, _), starts = _train(recipe, workdir, None), starts + 1
        same = trees.digest(run.load(workdir, "last").variables) == right
        found.append({"at_s": round(at, 1), "of_s": round(seconds, 1), "starts": starts, "same_bits": same})
    return {"kills": found}


_RECIPE = """from ml_collections import ConfigDict

from ibjax import config


def get_config(arg=None):
    made = config.base()
    plain = {text}
    for key, value in plain.items():
        if value is not None:
            made[key] = value
    return made
"""


def _train(recipe, workdir, at):
    """(whether the training ended by itself, seconds); it is killed after `at` seconds."""
    command = [sys.executable, "-m", "ibjax.main", f"--config={recipe}", f"--workdir={workdir}", "--mode=train"]
    began = time.perf_counter()
    try:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=at)
    except subprocess.TimeoutExpired:  # it was ended by SIGKILL
        return False, time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(done.stderr.decode()[-2000:])
    return True, time.perf_counter() - began


def table(records: list[dict[str, Any]]) -> str:
    """The records as Markdown."""
    timing = ("s/step, median (min – max)", "images/s over none")
    heads = ("network", "devices", "batch", "generated", *timing, "bytes of images", "calculated")
    rows, lines = [], []
    for record in records:
        if "error" in record:
            rows.append((record["error"], *[""] * (len(heads) - 1)))
            continue
        if "kills" in record:
            same = sum(kill["same_bits"] for kill in record["kills"])
            lines.append(f"Killed and run again: the same bits in {same} of {len(record['kills'])} trials.\n")
            continue
        seconds = record["seconds_per_step"]
        for name, times in seconds.items():
            count, memory = record["images"].get(name), record["memory"][name]
            what = name if count is None else f"{count:,}, {name}"
            faster = "" if name == WITHOUT else measuring.ratio(seconds[WITHOUT], times)
            about = (record["network"], record["devices"], record["batch"], what)
            sizes = (f"{memory[kind]:,}" for kind in ("bytes", "calculated"))
            rows.append((*about, measuring.spread(times), faster, *sizes))
    return "\n".join([measuring.markdown(heads, rows), "", *lines])


def main() -> None:
    """The command line."""
    parser = measuring.command_line(__doc__, batches=((256,), (1024,)))
    for name, value, words in (
        ("images", 1_000_000, "of the file that is read"),
        ("resident", 100_000, "of the file that is kept in memory"),
        ("depth", 10, "of the WideResNet"),
        ("width", 1, "of the WideResNet"),
        ("kills", 2, "trials of a kill"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{words}; default: %(default)s")
    given = measuring.parse(parser)
    if given.quick:
        given.images, given.resident = 3000, 2000
    assert given.resident * int(np.prod(SHAPE)) < RESIDENT
    page = measuring.Page("generated", given.out, table, f"{given.repeats} rounds", quick=given.quick)
    for batch_size in given.batch:
        given.batch_size = batch_size
        with tempfile.TemporaryDirectory() as folder:
            page.attempt(dict(batch=batch_size), partial(measure, given, Path(folder)))
    if given.kills:
        with tempfile.TemporaryDirectory() as folder:
            page.attempt(dict(kills=given.kills), partial(killed, given, Path(folder)))
    page.finish()


if __name__ == "__main__":
    measuring.run(main)
