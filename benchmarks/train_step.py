"""Times one PGD-10 training step of ResNet-18 of ibjax against its plain PyTorch twin, alternating in one run.

    python benchmarks/pgd_step.py [--batch=32] [--repeats=5] [--dtype=float32|bfloat16] [--quiet]

Speed is steps per second of ibjax over steps per second of the twin in the same round, as min – median – max: above 1,
ibjax is faster. On a CPU the twin runs as NCHW and as channels-last; on CUDA as channels-last with bf16 autocast, eager
and through `torch.compile`. The share of peak counts 23·F operations per image, F = 1.11 GFLOP.

Writes a JSON with every single time, and the table beside it as Markdown.
"""

import argparse
import datetime
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the twin needs memory of the same GPU

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ibjax import optim, run, step
from ibjax.attacks.pgd import pgd
from ibjax.models import resnet
from ibjax.objectives.pgd_at import pgd_at

GFLOP = 1.11  # nominal, of one forward pass of one 32×32 image
FORWARDS = 23  # of one image in a PGD-10 step
BUSY = 0.1  # processors: more than that elsewhere disturbs a round
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "v5 lite": 197, "v5e": 197, "v6 lite": 918, "v6e": 918}  # bf16

Steps = Callable[[int], Any]  # runs so many steps and waits for them; returns the last loss


def ibjax_steps(
    model: nn.Module,
    objective: step.Objective,
    attack: Callable,
    batch_size: int,
    teacher: nn.Module | None = None,
    shape: tuple[int, int, int] = (32, 32, 3),
) -> Steps:
    """Jitted and donated train steps of ibjax on one batch of noise."""
    x, y = (jnp.asarray(array) for array in noise(batch_size, shape))
    batch, key, optimizer = {"image": x, "label": y}, jax.random.key(0), optim.sgd(lr=0.01)
    teachers = {} if teacher is None else {"teacher": teacher}
    frozen = {role: jax.jit(module.init)(key, x[:1]) for role, module in teachers.items()}

    def bind_net(frozen):
        return step.linen_net(model, teachers, frozen)

    def init(x, frozen):
        return step.init_state(key, bind_net(frozen), model, objective.head, optimizer, x, ema=False)

    state = jax.jit(init)(x[:1], frozen)
    train_step = jax.jit(step.make_train_step(bind_net, objective, optimizer, attack), donate_argnums=0)

    def steps(n):
        nonlocal state
        for _ in range(n):
            state, metrics = train_step(state, batch, key, frozen)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return steps


def twin_steps(batch_size: int, *, bfloat16: bool, channels_last: bool, compile: bool) -> Steps:
    """Steps of the PyTorch twin of ResNet-18 on the same noise."""
    import torch
    import twin

    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32 in float32, as XLA's default on GPUs
    x, y = noise(batch_size)
    x = torch.from_numpy(x).permute(0, 3, 1, 2).to(device).contiguous(memory_format=layout)
    y = torch.from_numpy(y.astype(np.int64)).to(device)
    model = twin.ResNet().to(device, memory_format=layout)
    train_step = twin.make_step(model, twin.sgd(model, 0.01), bfloat16=bfloat16, compile=compile)

    def steps(n):
        for _ in range(n):
            loss = train_step(x, y)
        return float(loss.item())  # waits for the device

    return steps


def noise(batch_size: int, shape: tuple[int, int, int] = (32, 32, 3)) -> tuple[np.ndarray, np.ndarray]:
    """Images (B, H, W, C) float32 in [0, 1] and labels (B,) int32."""
    rng = np.random.default_rng(0)
    return rng.random((batch_size, *shape), np.float32), rng.integers(0, 10, batch_size).astype(np.int32)


def contestants(
    batch_size: int, dtype: str, unroll: bool | None, compiled_twin: bool
) -> tuple[dict[str, Steps], list[str]]:
    """({name: its steps}, what could not be had)."""
    model, bfloat16 = resnet.Model(num_classes=10, depth=18, dtype=dtype), dtype == "bfloat16"
    found, warnings = {"ibjax": ibjax_steps(model, pgd_at(), pgd(unroll=unroll), batch_size)}, []
    try:
        import torch
    except ImportError:
        return found, ["PyTorch is not installed: no twin"]
    backend = jax.default_backend()
    if torch.cuda.is_available() != (backend == "gpu"):
        return found, [f"JAX runs on {backend}, PyTorch does not: no twin"]
    kinds = {"NCHW": (False, False), "channels-last": (True, False)}
    if backend == "gpu":
        kinds = {"channels-last": (True, False)} | ({"channels-last compiled": (True, True)} if compiled_twin else {})
    for name, (channels_last, compile) in kinds.items():
        found[f"torch {name}"] = twin_steps(batch_size, bfloat16=bfloat16, channels_last=channels_last, compile=compile)
    return found, warnings


class Times(NamedTuple):
    """Of each runner, one entry per round."""

    seconds: dict[str, list[float]]  # per step
    elsewhere: dict[str, list[float]]  # processors that other processes kept busy meanwhile, on average
    disturbed: int  # rounds left out because others were busy


def alternate(runners: dict[str, Steps], repeats: int, n: int, quiet: bool = False) -> Times:
    """Times n steps of each runner in each round, one runner after the other in every round.

    With `quiet` a round waits for other processes to rest, and is repeated (50 times at most in all) where they then
    keep a tenth of a processor busy: on two cores one busy neighbour makes OpenMP, and so PyTorch, eight times slower.
    """
    times = Times({name: [] for name in runners}, {name: [] for name in runners}, 0)
    for _ in range(repeats + 50):
        if quiet:
            while busy_elsewhere(lambda: time.sleep(2))[1] > BUSY:
                time.sleep(5)
        row = {name: busy_elsewhere(partial(steps, n)) for name, steps in runners.items()}
        if quiet and max(elsewhere for _, elsewhere in row.values()) > BUSY:
            times = times._replace(disturbed=times.disturbed + 1)
            continue
        for name, (seconds, elsewhere) in row.items():
            times.seconds[name].append(seconds / n)
            times.elsewhere[name].append(round(elsewhere, 2))
        if len(times.seconds[name]) == repeats:
            return times
    raise RuntimeError(f"other processes were busy in {times.disturbed} rounds; measure when the machine is idle")


def busy_elsewhere(call: Callable[[], Any]) -> tuple[float, float]:
    """(seconds that a call takes, processors that other processes keep busy meanwhile)."""
    started, others = time.perf_counter(), others_seconds()
    call()
    seconds = time.perf_counter() - started
    rounding = 3 / os.sysconf("SC_CLK_TCK")  # the kernel counts in ticks of 10 ms, for them and for us
    return seconds, max(others_seconds() - others - rounding, 0.0) / seconds


def others_seconds() -> float:
    """Processor seconds that all other processes have used so far; 0 where Linux's /proc/stat is not there."""
    file = Path("/proc/stat")
    if not file.is_file():
        return 0.0
    user, nice, system = map(int, file.read_text().split()[1:4])
    mine = os.times()
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - mine.user - mine.system


def warm_up(runners: dict[str, Steps], warnings: list[str]) -> dict[str, float]:
    """Compiles every runner with two steps; drops a compiled twin that fails. Returns the seconds each took."""
    took = {}
    for name, steps in list(runners.items()):
        started = time.perf_counter()
        try:
            steps(2)
        except Exception as error:  # torch.compile raises errors of many kinds; eager PyTorch still stands
            if "compiled" not in name:
                raise
            del runners[name]
            warnings.append(f"{name} failed: {' '.join(str(error).split())[:300]}")
            continue
        took[name] = round(time.perf_counter() - started, 2)
    return took


def peak_tflops(dtype: str, given: float | None = None) -> float | None:
    """Dense peak of one device: the given one, or in bfloat16 what is known of this kind of device; else None."""
    if given or dtype != "bfloat16":
        return given
    kind = jax.devices()[0].device_kind
    return next((value for name, value in PEAK_TFLOPS.items() if name in kind), None)


def measure(
    batch_size: int,
    dtype: str,
    repeats: int,
    n: int,
    unroll: bool | None = None,
    peak: float | None = None,
    compiled_twin: bool = True,
    quiet: bool = False,
) -> dict[str, Any]:
    """One comparison: the record that the JSON holds. `n` is the number of steps per contestant and round."""
    runners, warnings = contestants(batch_size, dtype, unroll, compiled_twin)
    first = warm_up(runners, warnings)
    seconds, elsewhere, disturbed = alternate(runners, repeats, n, quiet)
    rates = {name: batch_size / statistics.median(times) for name, times in seconds.items()}
    speed = {}
    for name in seconds.keys() - {"ibjax"}:
        ratios = [theirs / ours for theirs, ours in zip(seconds[name], seconds["ibjax"], strict=True)]
        speed[name] = {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)}
    peak = peak_tflops(dtype, peak)
    share = {name: rate * FORWARDS * GFLOP / (peak * 1e3) for name, rate in rates.items()} if peak else None
    return {
        "model": "resnet-18, 32×32, 10 classes",
        "step": "PGD-10 adversarial training, attack in evaluation mode, SGD",
        "batch": batch_size,
        "dtype": dtype,
        "unroll": unroll,
        "repeats": repeats,
        "steps_per_repeat": n,
        "first_two_steps_s": first,
        "seconds_per_step": seconds,
        "processors_busy_elsewhere": elsewhere,
        "disturbed_rounds_left_out": disturbed,
        "images_per_s": rates,
        "speed_of_ibjax": speed,
        "peak_tflops": peak,
        "share_of_peak": share,
        "warnings": warnings,
    }


def environment() -> dict[str, Any]:
    """Date, hardware and versions, PyTorch's among them."""
    found = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **run.environment()}
    found["runtime"] = jax.devices()[0].client.platform_version.splitlines()[0]  # with CUDA's version on GPUs
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    found["processor"] = models[0] if models else platform.processor()
    try:
        import torch
    except ImportError:
        return found
    found["versions"] = {**found["versions"], "torch": torch.__version__}
    return found


def table(records: list[dict]) -> str:
    """The records as Markdown."""
    heads = (
        "batch",
        "dtype",
        "",
        "s/step, median (min – max)",
        "images/s",
        "speed of ibjax, min – median – max",
        "of peak",
    )
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for record in records:
        for name, times in record["seconds_per_step"].items():
            speed, share = record["speed_of_ibjax"].get(name), record["share_of_peak"]
            cells = [
                record["batch"],
                record["dtype"],
                name,
                f"{statistics.median(times):.4g} ({min(times):.4g} – {max(times):.4g})",
                f"{record['images_per_s'][name]:,.4g}",
                "{min:.2f} – {median:.2f} – {max:.2f}".format(**speed) if speed else "",
                f"{100 * share[name]:.1f} %" if share else "",
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    gpu = jax.default_backend() != "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[512 if gpu else 32], help="one or more batch sizes")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; every contestant runs once in each")
    parser.add_argument("--steps", type=int, default=10 if gpu else 1, help="steps per contestant and round")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if gpu else "float32")
    parser.add_argument("--unroll", choices=("auto", "true", "false"), default="auto", help="ibjax's attack loop")
    parser.add_argument(
        "--quiet", action="store_true", help="wait for other processes to rest, repeat disturbed rounds"
    )
    parser.add_argument("--peak-tflops", type=float, help="of the accelerator in bf16; default: known for some")
    parser.add_argument("--out", type=Path, help="default: results/pgd_step-BACKEND-DATE.json")
    given = parser.parse_args()
    unroll = {"auto": None, "true": True, "false": False}[given.unroll]
    found = environment()
    out = given.out or Path("results") / f"pgd_step-{jax.default_backend()}-{found['date'][:10]}.json"
    records = []
    for batch_size in given.batch:
        records.append(
            measure(batch_size, given.dtype, given.repeats, given.steps, unroll, given.peak_tflops, quiet=given.quiet)
        )
        run.write_json(out, {"benchmark": "pgd_step", **found, "records": records})
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    text = f"{table(records)}\n\n{found['hardware']}; {given.repeats} rounds; {versions}; {found['date'][:10]}\n"
    out.with_suffix(".md").write_text(text)
    print(text)
    for warning in (warning for record in records for warning in record["warnings"]):
        print("warning:", warning)


if __name__ == "__main__":
    main()
