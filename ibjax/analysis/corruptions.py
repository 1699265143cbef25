"""Accuracy of a trained run under the common corruptions of CIFAR-10-C or CIFAR-100-C.

    python -m ibjax.analysis.corruptions --workdir=DIR --data_dir=DIR [--checkpoint=best] [--n=1000]
    python -m ibjax.analysis.corruptions --workdir=DIR --generate
    python -m ibjax.analysis.corruptions --workdir=DIR --calibrated …

The first command reads the published images of the twelve corruptions in SiRIIB's Table 9, which
`python -m ibjax.data.prepare --dataset=cifar10_c` prepares. The second generates eleven of them from the run's own test
images. With `--calibrated` the classifier sees their x_avg (the table's second row); this requires a run whose
calibration was trained beside the classifier. Writes `corruptions/<checkpoint>.json`, or
`<checkpoint>.calibrated.json`, in the workdir. The aggregate is the mean over severities, then over corruptions.
"""

import logging
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from tqdm import tqdm

from ibjax import files, losses
from ibjax.analysis import calibration, commands, output
from ibjax.data import Split, corruptions, sample, tfds
from ibjax.devices import cluster
from ibjax.errors import DataError, InputError
from ibjax.net import linen_net, to_float
from ibjax.runs import command_line, run, rundir

log = logging.getLogger(__name__)


class Source(NamedTuple):
    """Corrupted test images."""

    label: str
    names: tuple[str, ...]
    split: Callable[[str, int], Split]  # (corruption, severity) -> images and labels


def stored(num_classes: int, data_dir: str = "") -> Source:
    """The published images, CIFAR-10-C or CIFAR-100-C by the number of classes; DataError where they are missing."""
    if num_classes not in (10, 100):
        raise InputError(f"the run has {num_classes} classes; CIFAR-10-C has 10, CIFAR-100-C 100: use --generate")
    found = tfds.find(f"cifar{num_classes}_c", data_dir)
    if missing := [name for name in corruptions.TWELVE if name not in found.counts]:
        raise DataError(f"{found.folder} lacks {', '.join(missing)}; {found.remake}")

    def split(name, severity):
        size = found.counts[name] // len(corruptions.SEVERITIES)
        return tfds.read(found, name, (severity - 1) * size, severity * size)

    return Source(found.label, corruptions.TWELVE, split)


def generated(test: Split, label: str, seed: int = 0, n: int | None = None) -> Source:
    """All corruptions that can be generated from the test images, or from `n` of them: all but frost.

    Raises InputError where there are fewer than `n`.
    """
    chosen, labels = sample(Split(np.arange(len(test.labels)), test.labels), n)  # indices in place of images
    images = test.images[chosen]

    def split(name, severity):
        return Split(corruptions.corrupt(images, name, severity, seed, chosen), labels)

    return Source(f"{label}, corruptions generated with seed {seed}", corruptions.TWELVE[:-1], split)


def accuracies(logits_fn: Callable, source: Source, n: int | None = None, batch_size: int = 500) -> dict[str, Any]:
    """{corruption: its five accuracies in percent, …} of a network (B, H, W, C) in [0, 1] -> (B, classes)."""
    table: dict[str, list[float]] = {name: [] for name in source.names}
    pairs = [(name, severity) for name in source.names for severity in corruptions.SEVERITIES]
    for name, severity in tqdm(pairs, desc="corruptions", disable=not sys.stderr.isatty()):
        split = sample(source.split(name, severity), n, holds="a corruption of one severity has")
        table[name].append(_accuracy(logits_fn, split, batch_size))
    return table


def _accuracy(logits_fn, split, batch_size):
    """Accuracy in percent. All batches have one size: the last is padded with its final image, which does not count."""
    total, correct = len(split.labels), 0
    for first in range(0, total, batch_size):
        chosen = np.minimum(np.arange(first, first + batch_size), total - 1)
        logits = np.asarray(logits_fn(to_float(jax.numpy.asarray(split.images[chosen]))))
        count = min(batch_size, total - first)
        correct += int(losses.correct(logits, split.labels[chosen])[:count].sum())
    return round(100 * correct / total, 4)


def evaluate(
    workdir: Path,
    checkpoint: str = "best",
    *,
    data_dir: str = "",
    generate: bool = False,
    calibrated: bool = False,
    n: int | None = None,
    batch_size: int = 500,
) -> dict[str, Any]:
    """Evaluates a run and writes and returns its record; networks trained in bfloat16 are scored in float32."""
    if n is not None and n < 1:
        raise InputError(f"n={n} is not allowed; give a whole number of at least 1")
    if generate and data_dir:
        raise InputError("--data_dir is that of the published images; leave it out with --generate")
    shape = rundir.read_config(workdir)[1]["input_shape"]
    if tuple(shape) != (corruptions.SIZE, corruptions.SIZE, 3):
        raise InputError(
            f"{workdir} takes images of {'×'.join(map(str, shape))}, and the corruptions of CIFAR-10-C are made for "
            f"32×32×3: blur, pixels and JPEG blocks of that size would say nothing of others; give a run on such images"
        )
    trained = run.load(workdir, checkpoint)
    if generate:
        source = generated(run.test_split(trained), trained.facts["label"], n=n)
    else:
        with cluster.together("corruptions"):
            if (name := trained.config.data.get("dataset", "cifar10")) not in ("cifar10", "cifar100"):
                raise InputError(f"the run is on {name}, and the published images are CIFAR's; use --generate")
            source = stored(trained.facts["num_classes"], data_dir)
    model = calibration.calibrated(trained.model) if calibrated else trained.model
    network, mesh = linen_net(run.in_float32(model)).predict, cluster.mesh()
    batch_size = cluster.rounded_up(batch_size, mesh.size)
    rows, place = cluster.parts_of_batch(mesh, batch_size)
    predict = jax.jit(lambda *given: network(*given)[0], out_shardings=NamedSharding(mesh, cluster.REPLICATED))
    shown = lambda x: predict(trained.variables, place(np.asarray(x)[rows]))  # noqa: E731
    table = accuracies(shown, source, n, batch_size)
    record = {
        **run.origin(trained, checkpoint),
        "trained_on": trained.facts["label"],
        "dataset": source.label,
        "calibrated": calibrated,
        "n": n,  # images per corruption and severity; null: all
        "mean_acc": round(float(np.mean([np.mean(row) for row in table.values()])), 4),
        "acc": table,
        "missing": [name for name in corruptions.TWELVE if name not in table],
    }
    output.record(workdir / "corruptions", f"{checkpoint}.calibrated" if calibrated else checkpoint, record)
    return record


def lines(record: dict[str, Any]) -> Iterable[str]:
    """The record as a Markdown table."""
    seen = ", calibrated" if record["calibrated"] else ""
    yield f"{record['title']} on {record['dataset']}{seen}, accuracy in percent, n = {record['n'] or 'all'}"
    yield "| corruption | 1 | 2 | 3 | 4 | 5 | mean |"
    yield "|---|---|---|---|---|---|---|"
    for name, row in record["acc"].items():
        yield f"| {name} | {' | '.join(f'{value:.2f}' for value in row)} | {np.mean(row):.2f} |"
    yield f"| mean of {len(record['acc'])} | | | | | | {record['mean_acc']:.2f} |"


def main() -> None:
    """The command line of this module."""
    parser = command_line.of_run("ibjax.analysis.corruptions", __doc__)
    parser.add_argument("--data_dir", default="", help="TFDS's folder of data sets, with cifar10_c or cifar100_c")
    parser.add_argument("--generate", action="store_true", help="corrupt the run's own test images instead")
    parser.add_argument("--calibrated", action="store_true", help="the classifier sees x_avg")
    parser.add_argument("--n", type=int, help="images of each corruption and severity; default: all")
    given = parser.parse_args()

    def measure():
        data_dir = str(files.path(given.data_dir)) if given.data_dir else ""
        options = dict(data_dir=data_dir, generate=given.generate, calibrated=given.calibrated, n=given.n)
        return evaluate(given.workdir, given.checkpoint, **options)

    commands.conduct(given, measure, lines)


if __name__ == "__main__":
    main()
