"""Compiles a recipe's train step for an accelerator that this machine lacks; counts its FLOPs, bytes and collectives.

    FLOPs = m · ( FLOPs(dispatch) + (k − 1) · FLOPs(attack step) )          for m microbatches; the same for bytes

The compiler counts the body of a rolled loop once, however long the loop is, hence the correction for the k steps of
the attack. The bodies of other loops, such as MMA's bisection, are counted once too; the number of such loops is
reported. FLOPs and bytes are the compiler's figures for the optimised program of one chip. The bounds on images/s
assume the chip's peak in bfloat16 and its full bandwidth, so no run reaches them.

For a TPU, `ibjax.training.hlo.estimate` adds the time that the compiler expects.

For a GPU, compiling without the card yields neither figure. Reported instead are the kernels and the bytes that they
read and write, and the bound on images/s that follows from these. Nothing is autotuned: which of cuDNN's kernels is
fastest can only be measured on a card.
"""

import argparse
import functools
import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from ml_collections import ConfigDict

from ibjax import config, files
from ibjax.data import IMAGES, extra
from ibjax.devices import cluster, cores
from ibjax.errors import InputError, nearest
from ibjax.runs import (
    recipe_files,
    run,
)
from ibjax.training import feed, hlo
from ibjax.training.experiment import build, state_shapes
from ibjax.training.hlo import Kernels, collectives, kernels, loops

# Set before jax looks for chips: there are none, and another process may be compiling at the same time.
WITHOUT_CHIPS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # CUDA's compiler needs no driver
}
# topology -> description of the card for XLA
GPUS = {name: Path(cluster.__file__).with_name(f"{name}.txtpb") for name in ("h100", "h200")}


log = logging.getLogger(__name__)


class Chip(NamedTuple):
    """The peak figures of a chip, according to its vendor."""

    flops: float  # per second, dense bfloat16
    hbm: float  # bytes
    bandwidth: float  # bytes per second
    clock: float | None = None  # Hz, of a TPU: peak = 2 · rows · columns · arrays of its matrix units · clock


GIB = 2**30


CHIPS = {  # keys: JAX's `device_kind`; sources: Cloud TPU's documentation, NVIDIA's data sheet
    "NVIDIA H100 80GB HBM3": Chip(989e12, 84_942_979_072, 3352e9),
    "NVIDIA H200 141GB HBM3e": Chip(989e12, 151_397_597_184, 4800e9),
    "TPU v4": Chip(275e12, 32 * GIB, 1228e9, 1.05e9),
    "TPU v5 lite": Chip(197e12, 16 * GIB, 819e9, 1.5e9),
    "TPU v5": Chip(459e12, 95 * GIB, 2765e9, 1.75e9),
    "TPU v6 lite": Chip(918e12, 32 * GIB, 1640e9, 1.75e9),
}


def slice_mesh(topology: str) -> Mesh:
    """A mesh of one axis for a TPU slice such as "v5e:16x16", or for a GPU in GPUS; InputError if it is unknown."""
    if topology in GPUS:
        return _gpu_mesh(topology)
    try:
        from jax.experimental import topologies

        devices = topologies.get_topology_desc(topology, platform="tpu").devices
    except ImportError:
        raise InputError("the compiler for TPUs is not installed; pip install 'ibjax[tpu]'") from None
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        if "libtpu" in reason and "not" in reason.lower():
            raise InputError("the compiler for TPUs is not installed; pip install 'ibjax[tpu]'") from None
        raise InputError(f"--topology={topology} is no slice ({reason}); give KIND:SHAPE as v5e:16x16") from None
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def _gpu_mesh(name):
    from jax.experimental import topologies

    facts = GPUS[name].read_text(encoding="utf-8")
    try:
        devices = topologies.get_topology_desc(name, platform="cuda", target_config=facts, topology="1x1x1").devices
    except (ValueError, RuntimeError, NotImplementedError):  # JAX has no plugin for the platform
        raise InputError("the compiler for GPUs is not installed; pip install 'ibjax[cuda13]'") from None
    return Mesh(np.array(devices)[:1], ("data",), axis_types=(AxisType.Auto,))


def prepare(settings: ConfigDict, shape: tuple[int, ...], classes: int, teachers: dict[str, ConfigDict]) -> ConfigDict:
    """The configuration for a compilation: shapes in place of data, and rolled loops as on an accelerator.

    Generated images (`data.extra`) are given to `compile_step`, as `generated` makes them.
    """
    settings = settings.copy_and_resolve_references()
    with settings.unlocked():
        size = dict(shape=shape, num_classes=classes, n_train=settings.batch_size + classes)
        settings.data = dict(name="synthetic", val_size=classes, split_seed=0, **size)
        settings.smoothing.images = "all"
        for role, recipe in teachers.items():
            settings[role].recipe = prepare(recipe, shape, classes, {})
            settings[role].workdir = ""
        if settings.attack is not None and settings.attack.name in ("pgd", "pgd_adam"):
            settings.attack.unroll = False
    return settings


GENERATED = 1_000_000  # generated images of a recipe whose file is absent


def generated(data: ConfigDict, shape: Sequence[int], count: int | None) -> extra.Extra | None:
    """Generated images of a recipe's data section without their values; None where it has none.

    count: their number; None: that of their file, or GENERATED where there is no file. They stay in device memory, or
    are read while training, as in a run. Raises DataError where the file is damaged.
    """
    given = data.get("extra")
    if given is None:
        return None
    file = files.path(given["path"])
    if count is None:
        count = extra.count(file) if file.is_file() else GENERATED
    fraction, resident = given.get("fraction", extra.FRACTION), given.get("resident")
    images = np.broadcast_to(np.uint8(0), (count, *shape))  # takes no memory
    keep = images.size <= extra.RESIDENT if resident is None else resident
    held = images if keep else extra.Stored(file, 0, images.shape, ())
    return extra.Extra(held, np.broadcast_to(np.int32(0), (count,)), fraction, "", file)


def compile_step(
    settings: ConfigDict, mesh: Mesh, images: int | None, made: extra.Extra | None = None
) -> dict[str, Any]:
    """Compiles the train step of a configuration (see `prepare`) for the devices of `mesh`; nothing is run.

    `images` is the number of training images on every device, None where they are streamed; `made` are generated ones,
    see `generated`. Returns figures for one chip and one step.
    """
    target = {"gpu": "cuda"}.get(mesh.devices.flat[0].platform, "tpu")  # a CPU's devices stand for the chips of a slice
    with cores.elsewhere(target):
        return _compile_step(settings, mesh, images, made)


def _compile_step(settings, mesh, images, made):
    experiment = build(settings, {role: Path("/nowhere") for role in config.TEACHERS}, abstract=True, mesh=mesh)
    if made is not None:
        if images is None:
            raise InputError("data.extra goes with images in device memory, not with data.name='stream'")
        shares = extra.shares(made, images, settings.batch_size, settings.microbatches)
        experiment = experiment._replace(data=experiment.data._replace(extra=made), shares=shares)
    shaped = functools.partial(cluster.shapes, mesh=mesh)

    def of_images(count, dtype):
        """Shapes of images and labels, in shares."""
        arrays = jax.ShapeDtypeStruct((count, *shape), dtype), jax.ShapeDtypeStruct((count,), jnp.int32)
        return shaped(arrays, spec=cluster.BATCH)

    def held(count):
        """Shapes of images and labels in device memory: see `feed.rows_of`."""
        rows = jax.ShapeDtypeStruct((count, int(np.prod(shape))), jnp.uint8)
        return shaped((rows, jax.ShapeDtypeStruct((count,), jnp.int32)))

    key = shaped(jax.eval_shape(lambda: jax.random.key(0)))
    shape = experiment.data.train.images.shape[1:]
    frozen = shaped(experiment.frozen)
    state = state_shapes(experiment, key)
    variables = shaped(state.variables)
    reads = made is not None and not made.resident
    steps = 1 if images is None or reads else settings.steps_per_dispatch or settings.log_every
    began = time.perf_counter()
    if images is None:
        batch = dict(zip(("image", "label"), of_images(settings.batch_size, jnp.uint8), strict=True))
        lowered = feed.make_batch_dispatch(experiment).lower(state, {**batch, "index": batch["label"]}, key, frozen)
    elif reads:
        read = dict(zip(("image", "label"), of_images(settings.batch_size, jnp.uint8), strict=True))
        data = held(images)
        lowered = feed.make_reading_dispatch(experiment).lower(state, *data, read, key, frozen)
    else:
        there = images + (0 if made is None else len(made.labels))
        data, n = held(there), shaped(jax.ShapeDtypeStruct((), jnp.int32))
        lowered = feed.make_dispatch(experiment, steps).lower(state, *data, key, frozen, n)
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
    cost, memory, program = compiled.cost_analysis() or {}, compiled.memory_analysis(), compiled.as_text()
    flops, accessed = cost.get("flops"), cost.get("bytes accessed")  # both None for a GPU that is absent
    repeated = _attack_steps(settings)
    if flops is not None and repeated > 1:
        part = of_images(settings.batch_size // settings.microbatches, jnp.float32)
        one = _attack_step(experiment).lower(variables, *part).compile().cost_analysis() or {}
        flops += (repeated - 1) * one["flops"]
        accessed += (repeated - 1) * one["bytes accessed"]
    platform, kind = mesh.devices.flat[0].platform, mesh.devices.flat[0].device_kind
    known = (steps > 1) + (repeated > 1) + (settings.microbatches > 1)
    flops = None if flops is None else settings.microbatches * flops
    parts = dict(around=int(steps > 1), attack_steps=repeated, microbatches=settings.microbatches)
    return {
        "chips": mesh.size,
        "kind": kind,
        "batch_size": settings.batch_size,
        "generated": None if made is None else _generated(experiment),
        "memory": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "flops": flops,
        "bytes": None if flops is None else settings.microbatches * accessed,
        "collectives": collectives(program, around=int(steps > 1)),
        "other_loops": max(loops(program) - known, 0),
        "compile_seconds": seconds,
        "attack_steps": repeated,
        "kernels": kernels(program, int(steps > 1))._asdict() if platform == "gpu" else None,
        **_expected(program, CHIPS.get(kind), flops, settings.batch_size, parts),
    }


def _expected(program, chip, flops, batch_size, parts):
    """What a TPU's compiler expects: "estimated", None elsewhere, and kernels: the slow ones and the ten slowest."""
    made = hlo.estimate(program, chip, **parts) if chip is not None and flops is not None else None
    if chip is None or made is None:
        return {"estimated": None, "slow_kernels": [], "slowest_kernels": [], "unpriced": {}}
    estimated = {name: getattr(made, name) for name in ("attack_step_ms", "rest_ms", "step_ms")}
    estimated["share_of_peak"] = flops / chip.flops / (made.step_ms / 1e3)
    estimated["images_per_s"] = batch_size / (made.step_ms / 1e3)

    def described(kernel):
        return {"operation": kernel.operation, "ms": kernel.ms, "bound_ms": kernel.bound_ms, "attack": kernel.in_attack}

    slow = [described(kernel) for kernel in made.kernels if kernel.slow()]
    return {
        "estimated": estimated,
        "slow_kernels": slow,
        "slowest_kernels": [described(kernel) for kernel in made.kernels[:10]],
        "unpriced": made.unpriced,
    }


def _generated(experiment):
    """How generated images are kept: their number, those in a batch, and their bytes on a chip at rest or in a step."""
    found, shares = experiment.data.extra, experiment.shares
    size = int(np.prod(found.images.shape[1:]))
    in_batch = int(shares.generated.sum())
    at_rest = len(found.labels) * (size + 4) if found.resident else 0
    in_step = 0 if found.resident else len(shares.generated) * (size + 4) // experiment.mesh.size
    return {"count": len(found.labels), "in_batch": in_batch, "bytes": at_rest, "bytes_a_step": in_step}


def _attack_steps(settings):
    """How often the body of the attack's loop runs in a step."""
    if settings.attack is None or settings.attack.name not in ("pgd", "pgd_adam"):
        return 1
    return settings.attack.get("steps", 10) * settings.attack.get("restarts", 1)


def _attack_step(experiment):
    """One gradient to the input in evaluation mode: what a rolled attack repeats."""

    def one(variables, x, label):
        def loss(x):
            logits, _ = experiment.bind_net(None).predict(variables, x)
            return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], 1))

        return jnp.clip(x + jnp.sign(jax.grad(loss)(x)), 0, 1)

    return jax.jit(one, out_shardings=NamedSharding(experiment.mesh, cluster.BATCH))


def table(found: dict[str, Any]) -> str:
    """The result of `compile_step` as a readable table."""
    chip = CHIPS.get(found["kind"])
    lines = [
        f"{found['chips']} × {found['kind']}, batch {found['batch_size']} "
        f"({found['batch_size'] // found['chips']} images a chip), compiled in {found['compile_seconds']:.0f} s"
    ]
    memory = f"{found['memory'] / GIB:.2f} GiB"
    if chip is None:
        lines += [f"memory of a chip  {memory}", f"FLOPs of a chip   {found['flops']:.3g} a step"]
        lines += [f"no peak is known for {found['kind']}; {nearest(found['kind'], CHIPS)}"]
    else:
        share = found["memory"] / chip.hbm
        lines += [f"memory of a chip  {memory} of {chip.hbm / GIB:.0f} GiB ({100 * share:.0f} %)"]
        for name, unit, peak in (("flops", "FLOP", chip.flops), ("bytes", "bytes", chip.bandwidth)):
            if found[name] is None:
                continue
            rate = found["batch_size"] * peak / found[name]
            lines += [f"{name:17} {found[name]:.3g} {unit} a step and chip: at most {rate:,.0f} images/s"]
        if share > 1:
            lines += ["does not fit: model.remat=True, more microbatches or chips, or model.dtype='bfloat16'"]
    if images := found.get("generated"):
        where = f"{images['bytes'] / 1e9:.2f} GB in the memory of every chip"
        if not images["bytes"]:
            where = f"read while training, {images['bytes_a_step'] / 1e6:.2f} MB a step and chip"
        lines += [f"generated images  {images['in_batch']} of a batch, of {images['count']:,}: {where}"]
    if found["kernels"]:
        count = Kernels(**found["kernels"])
        loop = f"{count.in_loops} in loops, {count.bytes_in_loops / 1e9:.2f} GB each time round"
        lines += [f"kernels           {loop}; {count.outside} outside, {count.bytes_outside / 1e9:.2f} GB a step"]
        moved = found["attack_steps"] * count.bytes_in_loops + count.bytes_outside
        if chip is not None:
            most = found["batch_size"] * chip.bandwidth / moved
            lines += [f"bytes             {moved:.3g} bytes a step: at most {most:,.0f} images/s"]
    lines += _expected_lines(found)
    if found["other_loops"]:
        lines += [f"other loops       {found['other_loops']}, whose bodies FLOPs and bytes count once"]
    where = {-1: "once a dispatch", 0: "each step"}
    lines += ["collectives       kind, count, MB of a chip, where" if found["collectives"] else "no collectives"]
    for item in found["collectives"]:
        place = where.get(
            item.depth,
            "IN A LOOP OF THE STEP (an attack must have none, but with attack_bn='train' sums of batch-norms)",
        )
        lines += [f"                  {item.kind}, {item.count}, {item.bytes / 1e6:.2f}, {place}"]
    return "\n".join(lines)


def _expected_lines(found):
    """The part of `table` on the time that a TPU's compiler expects."""
    expected = found["estimated"]
    if expected is None:
        return []
    loop = f"{found['attack_steps']} × {expected['attack_step_ms']:.2f} ms of attack, " * (found["attack_steps"] > 1)
    lines = [
        f"estimated         {loop}{expected['rest_ms']:.2f} ms of the rest: {expected['step_ms']:.1f} ms a step, "
        f"{100 * expected['share_of_peak']:.0f} % of peak, {expected['images_per_s']:,.0f} images/s of the slice",
        "                  by the compiler's own cost model, without communication: no measurement",
    ]
    if found["unpriced"]:
        lines += ["without estimate  " + ", ".join(f"{count} {kind}" for kind, count in found["unpriced"].items())]
    for title, name in (("slowest kernels ", "slowest_kernels"), ("over 3 × bound  ", "slow_kernels")):
        lines += [f"{title}  ms, bound, where, operation" if found[name] else f"{title}  none"]
        for kernel in found[name]:
            where = "attack" if kernel["attack"] else "rest"
            lines += [f"{kernel['ms']:25.3f} {kernel['bound_ms']:7.3f}  {where:6}  {kernel['operation'][-70:]}"]
    return lines


def teachers_of(settings, given):
    """{role: recipe} of the teachers that the objective needs: from --teacher, the configuration, or its hint."""
    found = {}
    for role in config.build("objectives", settings.objective, "objective").teachers:
        hint = re.search(r"--config=(\S+)", settings[role].made_by)
        file = (given if role == "teacher" else None) or (hint[1] if hint else None)
        if settings[role].recipe is not None:
            found[role] = settings[role].recipe
        elif file:
            found[role] = recipe_files.load(file)
        else:
            raise InputError(
                f"objective '{settings.objective.name}' needs a {role}; give its recipe, --teacher=FILE.py"
            )
    return found


def images_of(data: ConfigDict, shape: str | None, classes: int | None) -> tuple[tuple[int, ...], int]:
    """(shape, classes) of a recipe's images: the given ones, else those of the known data set, else of its files.

    Raises InputError where the files are missing too.
    """
    known, number = IMAGES.get(data.get("dataset", data.name), (None, None))
    if data.name == "synthetic":
        known, number = tuple(data.shape), data.num_classes
    if data.get("size") is not None:
        known = (data.size, data.size, 1 if data.get("grey") else 3)
    number, reason = number if classes is None else classes, ""
    if shape is not None:
        sides = shape.split(",")
        known = tuple(int(side) for side in sides if side.isdecimal() and int(side) > 0)
        known = known if len(known) == len(sides) == 3 else None
    elif "path" in data:
        try:
            read = run.load_data(ConfigDict({"data": {**data, "val_size": 0, "split_seed": 0}}))
            known, number = read.train.images.shape[1:], read.num_classes if classes is None else classes
        except InputError as error:
            reason = f" ({error})"
    if known is None or number is None or number < 1:
        raise InputError(
            f"--shape={shape}, --classes={classes}: data={dict(data)} does not say what its images are{reason}; "
            "give --shape=HEIGHT,WIDTH,CHANNELS and --classes"
        )
    return known, number


def in_words(shape: Sequence[int], classes: int) -> str:
    """The shape and classes in words, such as "images 32×32×3, 10 classes"."""
    return f"images {'×'.join(map(str, shape))}, {classes} classes"


def add_images(parser: argparse.ArgumentParser) -> None:
    """Adds --shape and --classes, for `images_of`."""
    parser.add_argument("--shape", help="of an image: H,W,C; default: the data set's")
    parser.add_argument("--classes", type=int, help="of the data; default: the data set's")
