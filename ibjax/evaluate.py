"""Evaluation: restore a network, attack the test set, write one result record per attack.

    python -m ibjax.evaluate --workdir=DIR [--checkpoint=best|last|STEP] [--attacks=autoattack,pgd-20] [--n=1000]
    python -m ibjax.evaluate --workdir=DIR --surrogate=DIR2 --attacks=fgsm,pgd-100         transfer from another run
    python -m ibjax.evaluate --workdir=DIR --samples=12 --attacks=pgd-20,autoattack-rand   a stochastic network

`evaluation/named.py` lists the names of attacks: `fgsm`, `pgd-STEPS` (cross-entropy), `margin-STEPS` (PGD on the margin
loss), `autoattack` and its parts, adaptive attacks. Options are given as in
`--attacks="fgsm, cw-l2-200(c=0.1,lr=0.1)"`. An image counts as robust if it is classified correctly both clean and
under attack. AutoAttack runs at the main eps only, and continues where it was stopped.

A stochastic network is evaluated at the mean of its latent variable; with --samples, its prediction is the mean of that
many sampled softmaxes, and every attack differentiates through this mean (`scoring.sampling`). With --surrogate, the
attacks run on that run's network, at its `--surrogate_checkpoint`, and at the main eps only. Records and reports state
both.
"""

import jax

from ibjax import cli, errors, files
from ibjax.attacks import names
from ibjax.devices import cluster
from ibjax.evaluation import report
from ibjax.evaluation.evaluate import attack_images, evaluate
from ibjax.runs import command_line

__all__ = ["attack_images", "evaluate"]


_OPTIONS = ("attacks", *command_line.OF_EVALUATION, "surrogate", "surrogate_checkpoint")


def parser() -> cli.Parser:
    """The arguments of this module."""
    parser = command_line.of_run("ibjax.evaluate", __doc__)
    command_line.add_attacks(parser)
    command_line.add_evaluation(parser)
    parser.add_argument("--surrogate", type=files.path, help="workdir of the run whose network is attacked instead")
    parser.add_argument("--surrogate_checkpoint", default="best", help="of that run: best, last or a step")
    return parser


def main() -> None:
    """The command line of this module."""
    given = parser().parse_args()

    def command():
        cluster.initialize()
        names.tell_of_old(given.attacks or ())
        records = evaluate(given.workdir, given.checkpoint, **{name: getattr(given, name) for name in _OPTIONS})
        if jax.process_index() == 0:
            print(report.table(records))

    errors.exit_with(command)


if __name__ == "__main__":
    main()
