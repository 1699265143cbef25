"""Times what each of the four methods adds to a step of PGD-AT, all alternating in one run.

    python benchmarks/cost.py [--batch=32] [--width=64] [--repeats=5] [--dtype=float32|bfloat16] [--quiet]

A method's step over that of PGD-AT on the same network, and over that of PGD-AT on the plain ResNet-18 of `--width`:
quotients of the same round, as min – median – max. The attack is PGD-10, IBD's teacher another such ResNet-18, images
are noise. Writes a JSON with every single time, and the table beside it as Markdown.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import pgd_step

from ibjax import run
from ibjax.attacks import Attack
from ibjax.attacks.pgd import pgd
from ibjax.models import resnet, siriib, stochastic
from ibjax.objectives.ib_rar import ib_rar
from ibjax.objectives.ibd import ibd
from ibjax.objectives.pgd_at import pgd_at
from ibjax.objectives.shared_information import shared_information
from ibjax.objectives.siriib import siriib as siriib_objective
from ibjax.step import Objective

PLAIN = "PGD-AT"
# method -> PGD-AT on its network
BASES = {
    "IB-RAR": PLAIN,
    "IBD": PLAIN,
    "shared information": "PGD-AT, stochastic layer",
    "SiRIIB": "PGD-AT, SiRIIB's network",
}


def contestants(batch_size: int, width: int, dtype: str) -> dict[str, pgd_step.Steps]:
    """{name: its steps}."""
    backbone = dict(name="resnet", depth=18, width=width, dtype=dtype)
    plain = resnet.Model(10, depth=18, width=width, dtype=dtype)
    latent, calibrated = stochastic.Model(10, backbone), siriib.Model(10, backbone)

    def steps(model: nn.Module, objective: Objective, attack: Attack | None = None, teacher: nn.Module | None = None):
        return pgd_step.ibjax_steps(model, objective, attack or pgd(), batch_size, teacher)

    return {
        PLAIN: steps(plain, pgd_at()),
        "IB-RAR": steps(plain, ib_rar()),
        "IBD": steps(plain, ibd(), pgd(loss="kl", init="gaussian"), plain),
        "PGD-AT, stochastic layer": steps(latent, pgd_at()),
        "shared information": steps(latent, shared_information()),
        "PGD-AT, SiRIIB's network": steps(calibrated, pgd_at()),
        "SiRIIB": steps(calibrated, siriib_objective()),
    }


def measure(batch_size: int, width: int, dtype: str, repeats: int, n: int, quiet: bool) -> dict[str, Any]:
    """The record that the JSON holds. `n` is the number of steps per contestant and round."""
    runners = contestants(batch_size, width, dtype)
    first = pgd_step.warm_up(runners, [])
    seconds, elsewhere, disturbed = pgd_step.alternate(runners, repeats, n, quiet)
    return {
        "model": f"resnet-18 of width {width}, 32×32, 10 classes",
        "batch": batch_size,
        "dtype": dtype,
        "repeats": repeats,
        "steps_per_repeat": n,
        "first_two_steps_s": first,
        "seconds_per_step": seconds,
        "processors_busy_elsewhere": elsewhere,
        "disturbed_rounds_left_out": disturbed,
    }


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    seconds = record["seconds_per_step"]
    heads = ("", "s/step, median (min – max)", "over PGD-AT of its network", "over PGD-AT of the plain network")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, times in seconds.items():
        own = over(times, seconds[BASES[name]]) if name in BASES else ""
        plain = over(times, seconds[PLAIN]) if name != PLAIN else ""
        lines.append(
            f"| {name} | {statistics.median(times):.4g} ({min(times):.4g} – {max(times):.4g}) | {own} | {plain} |"
        )
    return "\n".join(lines)


def over(times: list[float], base: list[float]) -> str:
    """Quotients of the rounds, as min – median – max."""
    quotients = [ours / theirs for ours, theirs in zip(times, base, strict=True)]
    return f"{min(quotients):.2f} – {statistics.median(quotients):.2f} – {max(quotients):.2f}"


def main() -> None:
    """The command line."""
    gpu = jax.default_backend() != "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=512 if gpu else 32)
    parser.add_argument("--width", type=int, default=64, help="of the ResNet-18's first stage")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--steps", type=int, default=10 if gpu else 1, help="steps per contestant and round")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if gpu else "float32")
    parser.add_argument("--quiet", action="store_true", help="wait for other processes to rest")
    parser.add_argument("--out", type=Path, help="default: results/cost-BACKEND-DATE.json")
    given = parser.parse_args()
    found = pgd_step.environment()
    out = given.out or Path("results") / f"cost-{jax.default_backend()}-{found['date'][:10]}.json"
    record = measure(given.batch, given.width, given.dtype, given.repeats, given.steps, given.quiet)
    run.write_json(out, {"benchmark": "cost", **found, "records": [record]})
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    text = (
        f"{table(record)}\n\n{record['model']}; batch {given.batch}; {given.dtype}; {given.repeats} rounds; "
        f"{found['hardware']}; {versions}; {found['date'][:10]}\n"
    )
    out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
