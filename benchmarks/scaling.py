"""Measures how the cost of a ResNet-18 train step grows with batch, image size, layers of HSIC, and devices.

    python benchmarks/scaling.py [--axes=batch,image,layers,devices] [--batch 32] [--dtype=float32|bfloat16] [--quiet]

| axis    | what is timed                                                                                            |
|---------|----------------------------------------------------------------------------------------------------------|
| batch   | a PGD-10 step at a quarter to four times the batch                                                       |
| image   | a PGD-10 step on images of 32×32, 48×48 and 64×64                                                        |
| layers  | IB-RAR on PGD-10 with nHSIC of 1, 2, 5 and all 10 layers, relative to plain PGD-10 (0 layers)            |
| devices | a PGD-10 step of the same batch on 1, 2, 4 and 8 devices, in separate processes; on a CPU the devices    |
|         | are virtual and share its cores, which shows the overhead of sharding but not its gain                   |

The points of an axis alternate in one run, so that quotients are of the same rounds; those of `devices` do not, and
have quotients of medians. Writes a JSON file with every single time, and the table beside it as Markdown.
"""

import json
import statistics
from functools import partial
from typing import Any

import jax
import measuring
import methods
from measuring import Steps
from methods import Section

LAYERS = ("pre_logits", "block8", "block7", "block6", "block5", "block4", "block3", "block2", "block1", "stem")
AXES = ("batch", "image", "layers", "devices")


def runner(
    network: Section,
    attack_steps: int,
    dtype: str,
    batch_size: int,
    side: int = 32,
    layers: tuple[str, ...] = (),
    devices: int = 1,
) -> Steps:
    """The steps of one point: PGD-AT, with layers IB-RAR."""
    options = dict(layers=tuple(layers)) if layers else {}
    given = methods.settings("ib_rar" if layers else "pgd_at", network, attack_steps, **options)
    case = methods.build(given, network, dtype=dtype)
    return methods.ibjax_steps(case, batch_size, (side, side, 3), devices=devices)


def points(axis: str, batch_size: int, quick: bool) -> dict[int, dict[str, Any]]:
    """{value on the axis: options of `runner`}, the first one the base of the quotients."""
    if axis == "batch":
        sizes = (4, 8) if quick else [batch_size * factor // 4 for factor in (1, 2, 4, 8, 16)]
        return {size: dict(batch_size=size) for size in sizes}
    fixed = dict(batch_size=batch_size)
    if axis == "image":
        return {side: dict(side=side, **fixed) for side in ((16, 32) if quick else (32, 48, 64))}
    if axis == "layers":
        names = ("pre_logits", "block2", "block1", "stem") if quick else LAYERS
        counts = [n for n in (0, 1, 2, 5, 10) if n <= len(names)]
        return {count: dict(layers=names[:count], **fixed) for count in counts}
    most = 8 if jax.default_backend() == "cpu" else jax.device_count()
    return {n: dict(devices=n, **fixed) for n in (1, 2, 4, 8) if n <= most}


def alone(devices: int, repeats: int, n: int, quiet: bool, **options: Any) -> dict[str, Any]:
    """Times one runner in this process, which has so many devices."""
    runners = {"": runner(devices=devices, **options)}
    measuring.warm_up(runners, [])
    return measuring.alternate(runners, repeats, n, quiet).record()


def measure(axis: str, batch_size: int, repeats: int, n: int, quiet: bool, quick: bool, **size: Any) -> dict[str, Any]:
    """The record of one axis."""
    given = points(axis, batch_size, quick)
    if axis == "devices":
        timing = dict(repeats=repeats, n=n, quiet=quiet)
        found = {}
        for at, options in given.items():
            pretended = {"JAX_NUM_CPU_DEVICES": str(at)}  # of no effect on accelerators
            found[str(at)] = measuring.in_new_process(__file__, {**options, **size, **timing}, pretended)
        if problems := [f"{at}: {record['error']}" for at, record in found.items() if "error" in record]:
            raise RuntimeError("; ".join(problems))
        kinds = ("seconds_per_step", "processors_busy_elsewhere")
        times = {kind: {at: record[kind][""] for at, record in found.items()} for kind in kinds}
    else:
        runners = {str(at): runner(**options, **size) for at, options in given.items()}
        measuring.warm_up(runners, [])
        times = measuring.alternate(runners, repeats, n, quiet).record()
    images = {str(at): options["batch_size"] for at, options in given.items()}
    return {"axis": axis, "batch": images, "repeats": repeats, "steps_per_repeat": n, **size, **times}


def table(records: list[dict]) -> str:
    """The records as Markdown."""
    heads = ("axis", "at", "batch", "s/step, median (min – max)", "ms/image", "of the first, min – median – max")
    rows = []
    for record in records:
        if "error" in record:
            rows.append((record["axis"], "", "", record["error"], "", ""))
            continue
        seconds = record["seconds_per_step"]
        base = next(iter(seconds.values()))
        for at, times in seconds.items():
            together = record["axis"] != "devices"  # its points are processes of their own, which share no round
            ratio = measuring.ratio(times, base) if together else measuring.ratio_of_medians(times, base)
            images = record["batch"][at]
            per_image = f"{1e3 * statistics.median(times) / images:.3g}"
            rows.append((record["axis"], at, images, measuring.spread(times), per_image, ratio))
    return measuring.markdown(heads, rows)


def main() -> None:
    """The command line."""
    parser = measuring.command_line(__doc__, batches=((32,), (512,)))
    parser.add_argument("--axes", type=lambda text: text.split(","), default=AXES, help=",".join(AXES))
    parser.add_argument("--child", type=json.loads, help="one point of devices, printed")
    given = measuring.parse(parser)
    if given.child:
        print(json.dumps(alone(**given.child)))
        return
    if unknown := set(given.axes) - set(AXES):
        parser.error(f"--axes: {', '.join(sorted(unknown))} is unknown; allowed: {', '.join(AXES)}")
    network, attack_steps = (methods.TINY, 1) if given.quick else (methods.RESNET18, 10)
    size = dict(network=network, attack_steps=attack_steps, dtype=given.dtype)
    page = measuring.Page("scaling", given.out, table, f"{given.repeats} rounds", quick=given.quick)
    for axis, batch_size in ((a, b) for a in given.axes for b in given.batch):
        timing = (given.repeats, given.steps, given.quiet, given.quick)
        page.attempt(dict(axis=axis), partial(measure, axis, batch_size, *timing, **size))
    page.finish()


if __name__ == "__main__":
    measuring.run(main)
