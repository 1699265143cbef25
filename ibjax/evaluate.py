"""Evaluation: restore a network, attack the test set, write one result record per attack.

    python -m ibjax.evaluate --workdir=DIR [--checkpoint=best|last|STEP] [--attacks=autoattack,pgd-20] [--n=1000]
    python -m ibjax.evaluate --workdir=DIR --surrogate=DIR2 --attacks=fgsm,pgd-100         transfer from another run
    python -m ibjax.evaluate --workdir=DIR --samples=12 --attacks=pgd-20,autoattack-rand   a stochastic network

`evaluation/named.py` lists the names of attacks: `fgsm`, `pgd-STEPS` (cross-entropy), `margin-STEPS` (PGD on the margin
loss), `autoattack` and its parts, adaptive attacks. Options are given as in
`--attacks="fgsm, cw-l2-200(c=0.1,lr=0.1)"`. An image counts as robust if it is classified correctly both clean and
under attack. AutoAttack runs at the main eps only, and continues where it was stopped. --leaderboard runs AutoAttack on
the whole test set, writes the run's entry for RobustBench to DIR/leaderboard/ and prints where it would stand.

A stochastic network is evaluated at the mean of its latent variable; with --samples, its prediction is the mean of that
many sampled softmaxes, and every attack differentiates through this mean (`scoring.sampling`). With --surrogate, the
attacks run on that run's network, at its `--surrogate_checkpoint`, and at the main eps only. Records and reports state
both.
"""

import jax

from ibjax import cli, config, errors, files
from ibjax.attacks import names
from ibjax.devices import cluster
from ibjax.errors import InputError
from ibjax.evaluation import leaderboard, report
from ibjax.evaluation.evaluate import attack_images, evaluate
from ibjax.pytorch import exports
from ibjax.runs import command_line, run

__all__ = ["attack_images", "evaluate"]


_OPTIONS = ("attacks", *command_line.OF_EVALUATION, "surrogate", "surrogate_checkpoint")


def parser() -> cli.Parser:
    """The arguments of this module."""
    parser = command_line.of_run("ibjax.evaluate", __doc__)
    command_line.add_attacks(parser)
    command_line.add_evaluation(parser)
    parser.add_argument("--surrogate", type=files.path, help="workdir of the run whose network is attacked instead")
    parser.add_argument(
        "--leaderboard", action="store_true", help="AutoAttack on all test images; write the entry for RobustBench"
    )
    parser.add_argument("--surrogate_checkpoint", help="of that run: best (default), last or a step")
    return parser


def main() -> None:
    """The command line of this module."""
    given = parser().parse_args()

    def command():
        if given.surrogate_checkpoint is not None and given.surrogate is None:
            raise InputError(
                f"--surrogate_checkpoint={given.surrogate_checkpoint} goes with --surrogate; give that too"
            )
        given.surrogate_checkpoint = given.surrogate_checkpoint or "best"
        cluster.initialize()
        names.tell_of_old(given.attacks or ())
        if given.leaderboard:
            _check_leaderboard(given)
            given.attacks = given.attacks or ["autoattack"]
        records = evaluate(given.workdir, given.checkpoint, **{name: getattr(given, name) for name in _OPTIONS})
        said = _place(given, records) if given.leaderboard else ()
        if jax.process_index() == 0:
            print(report.table(records), *said, sep="\n")

    errors.exit_with(command)


def _check_leaderboard(given):
    """Raises InputError where the evaluation would be none of RobustBench's, before it begins."""
    if given.surrogate or given.samples or (given.attacks and "autoattack" not in given.attacks):
        raise InputError("--leaderboard needs autoattack, without --surrogate and --samples")
    trained = run.load(given.workdir, given.checkpoint)
    settings, whole = config.effective(trained.config), trained.facts["n_test"]
    dataset, n = settings.data.get("dataset", settings.data.name), given.n or settings.evaluate.n
    allowed = [whole, *([exports.IMAGENET] if leaderboard.DATA.get(dataset) == "imagenet" else [])]
    if n not in (None, *allowed):
        raise InputError(f"--leaderboard takes all test images of {dataset}, not {n}; give --n={allowed[-1]}")
    threat = {key: getattr(given, key) or settings.evaluate[key] for key in ("norm", "eps")}
    leaderboard.rows(dataset, **threat)


def _place(given, records):
    """Lines on the entry and its place; all processes write it together."""
    record = next(record for record in records if record["attack"] == "autoattack" and record["main"])
    norm, eps = record["norm"], record["eps"]
    file, info = leaderboard.write(given.workdir, str(given.checkpoint), norm, eps)
    said = f"{file}: {info['architecture']}, clean {info['clean_acc']} %, AutoAttack {info['autoattack_acc']} %"
    return said, leaderboard.place(info["dataset"], norm, eps, float(info["autoattack_acc"]))


if __name__ == "__main__":
    main()
