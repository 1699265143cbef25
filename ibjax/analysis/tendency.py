"""Which class an attack turns each class into: Table 5 of IB-RAR.

    python -m ibjax.analysis.tendency --workdir=DIR [--checkpoint=best] [--attack=pgd-10] [--n=1000] [--top=4]
                                      [--names=plane,car,bird,cat,deer,dog,frog,horse,ship,truck]

    count[y, c] = #{ x' of true class y : argmax f(x') = c }

For each class, the table lists the wrong classes that are predicted most often for its attacked images. Two classes
that are first in each other's row are confused in both directions, as the paper finds for cars and trucks. Every image
counts, whether or not the network classified it correctly before the attack. The authors' code ranks the true class
among the others, the table in the paper does not; here it has its own column. Writes
`tendency/<checkpoint>.<attack>.json` in the workdir, with all counts.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ibjax.analysis import attacked, commands, output
from ibjax.attacks.names import in_file_name
from ibjax.errors import InputError
from ibjax.evaluation.results import threat_label
from ibjax.net import linen_net
from ibjax.runs import command_line, run


def counts(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """The confusion matrix (classes, classes): row y, column c counts images of class y that are predicted as c."""
    table = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(table, (labels, predictions), 1)
    return table


def ranked(table: np.ndarray, top: int) -> list[list[int]]:
    """For each class, up to `top` wrong classes with nonzero counts, most frequent first; ties go to lower numbers."""
    rows = []
    for true, row in enumerate(table):
        order = [int(c) for c in np.argsort(-row, kind="stable") if c != true and row[c] > 0]
        rows.append(order[:top])
    return rows


def evaluate(
    workdir: Path, checkpoint: str = "best", *, attack: str = "pgd-10", n: int | None = None
) -> dict[str, Any]:
    """Attacks a run's test images, or `n` of them; writes and returns the record.

    attack: a name of `evaluation/named.py`; norm, eps and step size are those of the run's `evaluate` section.
    """
    trained, settings, split = attacked.load(workdir, checkpoint, attacks=(attack,), n=n)
    predict = linen_net(run.in_float32(trained.model)).predict
    _, x_adv = attacked.attack(attack, predict, trained, split, settings)
    classes = attacked.predictions(predict, trained.variables, x_adv, settings["batch_size"])
    record = {
        **run.origin(trained, checkpoint),
        "dataset": trained.facts["label"],
        "n": len(split.labels),
        "attack": attack,
        **{key: settings[key] for key in ("norm", "eps", "step_size")},
        "counts": counts(split.labels, classes, trained.facts["num_classes"]).tolist(),
    }
    output.record(workdir / "tendency", f"{checkpoint}.{in_file_name(attack)}", record)
    return record


def lines(record: dict[str, Any], top: int = 4, names: list[str] | None = None) -> Iterable[str]:
    """The record as a Markdown table."""
    table = np.array(record["counts"])
    names = names or commands.class_names(None, {"num_classes": len(table)})
    order = ranked(table, top)
    yield f"{record['title']} on {record['dataset']}, n = {record['n']}, {threat_label(record)}"
    yield f"| true class | kept | taken for |{' |' * (top - 1)}"
    yield "|---" * (top + 2) + "|"
    for true, others in enumerate(order):
        cells = [f"{names[c]} {table[true, c]}" for c in others] + [""] * (top - len(others))
        yield f"| {names[true]} | {table[true, true]} | {' | '.join(cells)} |"
    pairs = [(a, o[0]) for a, o in enumerate(order) if o and order[o[0]][:1] == [a] and a < o[0]]
    yield "both ways: " + (", ".join(f"{names[a]} – {names[b]}" for a, b in pairs) or "none")


def main() -> None:
    """The command line of this module."""
    parser = command_line.of_run("ibjax.analysis.tendency", __doc__)
    commands.add_attack(parser, "pgd-10")
    commands.add_n(parser)
    parser.add_argument("--top", type=int, default=4, help="wrong classes in a row")
    commands.add_class_names(parser)
    given = parser.parse_args()

    def measure():
        if given.top < 1:
            raise InputError(f"--top={given.top} is not allowed; give a whole number of at least 1")
        return evaluate(given.workdir, given.checkpoint, attack=given.attack, n=given.n)

    commands.conduct(given, measure, lambda found: lines(found, given.top, given.names))


if __name__ == "__main__":
    main()
