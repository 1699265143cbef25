"""How much of an attack the singular regularisation removes from an image: Table 8 of SiRIIB.

    python -m ibjax.analysis.calibration --workdir=DIR [--checkpoint=best] [--attacks=pgd-20,margin-100] [--n=1000]

| row        | the classifier sees  | the attack sees |                                                     |
|------------|----------------------|-----------------|-----------------------------------------------------|
| image      | x'                   | the classifier  | the plain network                                   |
| calibrated | x_avg of the same x' | the classifier  | grey-box: what is removed, and no robustness        |
| through    | x_avg of x'          | both together   | white-box: the robustness of the two                |

Requires a run of `model=dict(name="siriib", connections=0, …)`, which trains classifier and calibration separately. The
paper has the first two rows. An image counts as robust if it is classified correctly both clean and under attack, along
the path of its row. Writes `calibration/<checkpoint>.json` in the workdir.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ibjax.analysis import commands, output
from ibjax.analysis.attacked import attack, check_counts, load, predictions
from ibjax.errors import InputError
from ibjax.evaluation.results import attack_label
from ibjax.evaluation.scoring import percent
from ibjax.models import siriib
from ibjax.net import linen_net
from ibjax.runs import command_line, run

ROWS = ("image", "calibrated", "through")


def calibrated(model: Any) -> siriib.Model:
    """The network whose classifier sees x_avg; InputError unless calibration and classifier were trained separately."""
    if not isinstance(model, siriib.Model) or model.connections:
        raise InputError(
            "only a network with model.name='siriib', model.connections=0 is trained apart from its classifier"
        )
    return model.clone(classify="calibrated")


def evaluate(
    workdir: Path, checkpoint: str = "best", *, attacks: Sequence[str] | None = None, n: int | None = None
) -> dict[str, Any]:
    """Attacks a run as the three rows say; writes and returns the record, accuracies in percent.

    attacks, n: replace those of the run's `evaluate` section, which sets norm, eps and step size.
    """
    trained, settings, split = load(workdir, checkpoint, attacks=attacks, n=n)
    check_counts(settings["attacks"])
    model = run.in_float32(trained.model)
    plain, through = (linen_net(network).predict for network in (model, calibrated(model)))

    accuracy: dict[str, dict[str, float]] = {row: {} for row in ROWS}
    batch_size = settings["batch_size"]
    as_they_are = predictions(through, trained.variables, split.images, batch_size) == split.labels
    accuracy["calibrated"]["clean"] = accuracy["through"]["clean"] = percent(as_they_are)
    for name in settings["attacks"]:
        flags, x_adv = attack(name, plain, trained, split, settings)
        purified = predictions(through, trained.variables, x_adv, batch_size) == split.labels
        white, _ = attack(name, through, trained, split, settings)
        accuracy["image"] |= {"clean": percent(flags.clean), name: percent(flags.robust)}
        accuracy["calibrated"][name] = percent(as_they_are & purified)
        accuracy["through"][name] = percent(white.robust)
    record = {
        **run.origin(trained, checkpoint),
        "dataset": trained.facts["label"],
        "n": len(split.labels),
        **{key: settings[key] for key in ("norm", "eps", "step_size")},
        "acc": accuracy,
    }
    output.record(workdir / "calibration", checkpoint, record)
    return record


def lines(record: dict[str, Any]) -> Iterable[str]:
    """The record as a Markdown table."""
    columns = list(record["acc"]["through"])
    yield f"{record['title']} on {record['dataset']}, n = {record['n']}, {record['norm']} eps {record['eps']}, percent"
    yield f"| | {' | '.join(map(attack_label, columns))} |"
    yield "|---" * (len(columns) + 1) + "|"
    for row, values in record["acc"].items():
        yield f"| {row} | {' | '.join(f'{values[column]:.2f}' for column in columns)} |"


def main() -> None:
    """The command line of this module."""
    parser = command_line.of_run("ibjax.analysis.calibration", __doc__)
    command_line.add_attacks(parser)
    commands.add_n(parser, otherwise="all")
    given = parser.parse_args()

    def measure():
        return evaluate(given.workdir, given.checkpoint, attacks=given.attacks, n=given.n)

    commands.conduct(given, measure, lines)


if __name__ == "__main__":
    main()
