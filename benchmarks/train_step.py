"""Times a ResNet-18 train step of ibjax and of its plain PyTorch twin, alternating in one run, for any objective.

    python benchmarks/train_step.py [--objective=pgd_at,trades|all] [--batch 32 128] [--dtype=bfloat16] [--quiet]
    JAX_NUM_CPU_DEVICES=2 python benchmarks/train_step.py --devices=2

Speed is the ratio of steps per second, ibjax to twin in the same round, as min – median – max; above 1 ibjax is faster.
On a CPU the twin runs in NCHW and in channels-last layout; on CUDA in channels-last with bf16 autocast, eager and with
`torch.compile`. ibjax uses --devices devices; those of a CPU are virtual and share its cores. Attacks have ten steps,
teachers are ResNet-18 too, and images are noise. The share of the peak FLOP/s counts the forward passes that a method
needs (`ibjax.analysis.flops`), each of 1.11 GFLOP per image.

Writes a JSON file with every single time, and the table beside it as Markdown.
"""

import statistics
from functools import partial
from typing import Any

import jax
import measuring
import methods
import numpy as np
from measuring import Steps
from methods import Section

from ibjax.analysis import flops

GFLOP = 1.11  # nominal, of one forward pass of ResNet-18 on one 32×32 image
WITHOUT_TWIN = ("siriib",)  # its network is a method of its own


def twin_steps(
    name: str, network: Section, batch_size: int, attack_steps: int, *, bfloat16: bool, channels_last: bool,
    compile: bool,
) -> Steps:  # fmt: skip
    """Steps of an objective's PyTorch twin on the same noise."""
    import torch
    import twin
    import twin_methods
    import twin_step

    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32 in float32, as XLA's default on GPUs
    x, y = measuring.noise(batch_size)
    x = torch.from_numpy(x).permute(0, 3, 1, 2).to(device).contiguous(memory_format=layout)
    y = torch.from_numpy(y.astype(np.int64)).to(device)

    shape = {key: network[key] for key in ("blocks", "width") if key in network}
    method = twin_methods.TWINS[name](**(dict(steps=attack_steps) if name == "mma" else {}))
    student = twin.student(name, **shape).to(device, memory_format=layout)
    teacher = head = None
    if name in ("ard", "rslad", "iad", "ibd"):
        teacher = twin.ResNet(**shape).to(device, memory_format=layout)
    if name == "ibd":
        head = twin.Attention(student.block_widths, teacher.block_widths).to(device)
    train_step = twin_step.make_step(
        method,
        student,
        twin.sgd(student, head, lr=0.01),
        teacher=teacher,
        head=head,
        steps=attack_steps,
        memory=method.memory(batch_size, 10).to(device) if method.memory else None,
        bfloat16=bfloat16,
        compile=compile,
    )

    def steps(n):
        for _ in range(n):
            loss = train_step(x, y)
        return float(loss.item())  # waits for the device

    return steps


def twins(
    name: str, network: Section, batch_size: int, attack_steps: int, dtype: str, compiled: bool
) -> tuple[dict[str, Steps], list[str]]:
    """({name: steps of a twin}, what could not be had)."""
    if name in WITHOUT_TWIN:
        return {}, [f"{name} has no twin"]
    try:
        import torch
    except ImportError:
        return {}, ["PyTorch is not installed: no twin"]
    backend = jax.default_backend()
    if torch.cuda.is_available() != (backend == "gpu"):
        return {}, [f"JAX runs on {backend}, PyTorch does not: no twin"]
    kinds = {"NCHW": (False, False), "channels-last": (True, False)}
    if backend == "gpu":
        kinds = {"channels-last": (True, False)} | ({"channels-last compiled": (True, True)} if compiled else {})
    options = dict(bfloat16=dtype == "bfloat16")
    return {
        f"torch {kind}": twin_steps(
            name, network, batch_size, attack_steps, channels_last=last, compile=compile, **options
        )
        for kind, (last, compile) in kinds.items()
    }, []


def measure(
    name: str,
    batch_size: int,
    dtype: str,
    repeats: int,
    n: int,
    *,
    network: Section = methods.RESNET18,
    attack_steps: int = 10,
    unroll: bool | None = None,
    peak: float | None = None,
    compiled_twin: bool = True,
    quiet: bool = False,
    devices: int = 1,
) -> dict[str, Any]:
    """One comparison: the record that the JSON holds. `n` is the number of steps per contestant and round."""
    given = methods.settings(name, network, attack_steps)
    case = methods.build(given, network, dtype=dtype, unroll=unroll)
    runners = {"ibjax": methods.ibjax_steps(case, batch_size, devices=devices)}
    found, warnings = twins(name, network, batch_size, attack_steps, dtype, compiled_twin)
    runners |= found
    first = measuring.warm_up(runners, warnings)
    times = measuring.alternate(runners, repeats, n, quiet)
    seconds = times.seconds
    rates = {kind: batch_size / statistics.median(taken) for kind, taken in seconds.items()}
    forwards = flops.expected_forwards(given, teacher=1.0)
    peak = measuring.peak_tflops(dtype, peak) if network == methods.RESNET18 and forwards else None
    share = {kind: rate * forwards * GFLOP / (peak * 1e3) for kind, rate in rates.items()} if peak else None
    speed = {kind: measuring.quotients(seconds[kind], seconds["ibjax"]) for kind in seconds if kind != "ibjax"}
    return {
        "objective": name,
        "network": dict(network),
        "attack_steps": attack_steps,
        "batch": batch_size,
        "dtype": dtype,
        "devices": devices,
        "unroll": unroll,
        "repeats": repeats,
        "steps_per_repeat": n,
        "first_two_steps_s": first,
        **times.record(),
        "images_per_s": rates,
        "speed_of_ibjax": speed,
        "forward_passes": forwards,
        "peak_tflops": peak,
        "share_of_peak": share,
        "warnings": warnings,
    }


def table(records: list[dict]) -> str:
    """The records as Markdown."""
    speed = "speed of ibjax, min – median – max"
    heads = ("objective", "batch", "dtype", "", "s/step, median (min – max)", "images/s", speed, "of peak")
    rows = []
    for record in records:
        about = (record["objective"], record["batch"], record["dtype"])
        if "error" in record:
            rows.append((*about, record["error"], "", "", "", ""))
            continue
        for kind, times in record["seconds_per_step"].items():
            ours, share = record["seconds_per_step"]["ibjax"], record["share_of_peak"]
            cells = (
                f"{record['images_per_s'][kind]:,.4g}",
                measuring.ratio(times, ours) if kind != "ibjax" else "",
                f"{100 * share[kind]:.1f} %" if share else "",
            )
            several = f", {record['devices']} devices" if kind == "ibjax" and record["devices"] > 1 else ""
            rows.append((*about, kind + several, measuring.spread(times), *cells))
    return measuring.markdown(heads, rows)


def main() -> None:
    """The command line."""
    parser = measuring.command_line(__doc__, batches=((32,), (512,)))
    parser.add_argument("--objective", default="pgd_at", help=f"all, or some of {','.join(methods.NAMES)}")
    parser.add_argument("--unroll", choices=("auto", "true", "false"), default="auto", help="ibjax's attack loop")
    parser.add_argument("--devices", type=int, default=1, help="of ibjax; the batch is divided among them")
    parser.add_argument("--peak-tflops", type=float, help="of the accelerator in bf16; default: known for some")
    given = measuring.parse(parser)
    if not 1 <= given.devices <= jax.device_count():
        parser.error(f"--devices={given.devices}: JAX has {jax.device_count()}; on a CPU, set JAX_NUM_CPU_DEVICES")
    size = dict(network=methods.TINY, attack_steps=1) if given.quick else {}
    unroll = {"auto": None, "true": True, "false": False}[given.unroll]
    size |= dict(unroll=unroll, peak=given.peak_tflops, devices=given.devices)
    page = measuring.Page("train_step", given.out, table, f"{given.repeats} rounds", quick=given.quick)
    for name in methods.chosen(parser, given.objective):
        for batch_size in given.batch:
            about = dict(objective=name, batch=batch_size, dtype=given.dtype)
            timing = (given.repeats, given.steps)
            page.attempt(about, partial(measure, name, batch_size, given.dtype, *timing, quiet=given.quiet, **size))
    page.finish()


if __name__ == "__main__":
    measuring.run(main)
