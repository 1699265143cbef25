"""Times what the four methods, TRADES and MART add to a step of PGD-AT and to inference, alternating in one run.

    python benchmarks/cost.py [--batch 32] [--width=64] [--repeats=5] [--dtype=float32|bfloat16] [--quiet]

The table shows the time of a method's step divided by that of PGD-AT on the same network, and by that of PGD-AT on the
plain ResNet-18 of `--width`. Both times of a quotient are from the same round; the format is min – median – max. The
attack is PGD-10, IBD's teacher is another such ResNet-18, and images are noise. Testing is one prediction of a batch.
For memory see `compiled.py`, for parameters `ibjax.analysis.complexity`.

Writes a JSON file with every single time, and the table beside it as Markdown.
"""

from functools import partial
from typing import Any

import measuring
import methods
from measuring import Steps
from methods import Section

PLAIN = "PGD-AT"
# row -> (objective, whose network, the row of PGD-AT on it)
ROWS = {
    PLAIN: ("pgd_at", "pgd_at", ""),
    "TRADES": ("trades", "pgd_at", PLAIN),
    "MART": ("mart", "pgd_at", PLAIN),
    "IB-RAR": ("ib_rar", "ib_rar", PLAIN),
    "IBD": ("ibd", "ibd", PLAIN),
    "PGD-AT, stochastic layer": ("pgd_at", "shared_information", ""),
    "shared information": ("shared_information", "shared_information", "PGD-AT, stochastic layer"),
    "PGD-AT, SiRIIB's network": ("pgd_at", "siriib", ""),
    "SiRIIB": ("siriib", "siriib", "PGD-AT, SiRIIB's network"),
}
TESTING = "testing"
# row -> whose network; the first is the plain one
TESTS = {
    TESTING: "pgd_at",
    "testing, stochastic layer": "shared_information",
    "testing, SiRIIB's network": "siriib",
}


def contestants(batch_size: int, network: Section, attack_steps: int, dtype: str) -> dict[str, Steps]:
    """{row: its steps, or predictions}."""

    def steps(objective: str, owner: str) -> Steps:
        given = methods.settings(objective, network, attack_steps)
        given.model = methods.settings(owner, network).model
        return methods.ibjax_steps(methods.build(given, network, dtype=dtype), batch_size)

    def predictions(owner: str) -> Steps:
        case = methods.build(methods.settings(owner, network), network, dtype=dtype)
        return methods.ibjax_predictions(case, batch_size)

    trained = {row: steps(objective, owner) for row, (objective, owner, _) in ROWS.items()}
    return trained | {row: predictions(owner) for row, owner in TESTS.items()}


def measure(
    batch_size: int, network: Section, attack_steps: int, dtype: str, repeats: int, n: int, quiet: bool
) -> dict[str, Any]:
    """The record that the JSON holds. `n` is the number of steps per contestant and round."""
    runners = contestants(batch_size, network, attack_steps, dtype)
    first = measuring.warm_up(runners, [])
    return {
        "network": dict(network),
        "batch": batch_size,
        "dtype": dtype,
        "repeats": repeats,
        "steps_per_repeat": n,
        "first_two_steps_s": first,
        **measuring.alternate(runners, repeats, n, quiet).record(),
    }


def table(records: list[dict[str, Any]]) -> str:
    """The records as Markdown."""
    heads = (
        "batch",
        "dtype",
        "",
        "s/step, median (min – max)",
        "over PGD-AT on its network",
        "over the same on the plain one",
    )
    rows = []
    for record in records:
        about, seconds = (record["batch"], record["dtype"]), record.get("seconds_per_step", {})
        if "error" in record:
            rows.append((*about, record["error"], "", "", ""))
        for name, times in seconds.items():
            base, first = ("", TESTING) if name in TESTS else (ROWS[name][2], PLAIN)
            own = measuring.ratio(times, seconds[base]) if base else ""
            plain = measuring.ratio(times, seconds[first]) if name != first else ""
            rows.append((*about, name, measuring.spread(times), own, plain))
    return measuring.markdown(heads, rows)


def main() -> None:
    """The command line."""
    parser = measuring.command_line(__doc__, batches=((32,), (512,)))
    parser.add_argument("--width", type=int, default=64, help="of the ResNet-18's first stage")
    given = measuring.parse(parser)
    network, attack_steps = (methods.TINY, 1) if given.quick else ({**methods.RESNET18, "width": given.width}, 10)
    page = measuring.Page("cost", given.out, table, f"{given.repeats} rounds", quick=given.quick)
    for batch_size in given.batch:
        timing = (given.dtype, given.repeats, given.steps, given.quiet)
        about = dict(batch=batch_size, dtype=given.dtype)
        page.attempt(about, partial(measure, batch_size, network, attack_steps, *timing))
    page.finish()


if __name__ == "__main__":
    measuring.run(main)
