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

from ibjax import errors, files
from ibjax.attacks import names
from ibjax.devices import cluster
from ibjax.evaluation import report
from ibjax.evaluation.evaluate import evaluate
from ibjax.runs import command_line

__all__ = ["evaluate"]


def main() -> None:
    """The command line of this module."""
    parser = command_line.of_run("ibjax.evaluate", __doc__)
    command_line.add_attacks(parser)
    parser.add_argument("--n", type=int, help="number of test images; default: all")
    parser.add_argument("--samples", type=int, help="judge the mean of so many drawn predictions; default: no draw")
    parser.add_argument("--norm", help="linf, l2, l1 or l0; another than the run's needs --eps")
    parser.add_argument("--eps", help='radius, as "8/255"')
    parser.add_argument("--step_size", help='of iterative attacks, as "2/255"; default: the run\'s share of eps')
    parser.add_argument("--batch_size", type=int, help="images at a time")
    parser.add_argument("--surrogate", type=files.path, help="workdir of the run whose network is attacked instead")
    parser.add_argument("--surrogate_checkpoint", default="best", help="of that run: best, last or a step")
    given = parser.parse_args()

    def command():
        cluster.initialize()
        names.tell_of_old(given.attacks or ())
        options = ("attacks", "n", "samples", "norm", "eps", "step_size", "batch_size", "surrogate")
        options += ("surrogate_checkpoint",)
        records = evaluate(given.workdir, given.checkpoint, **{name: getattr(given, name) for name in options})
        if jax.process_index() == 0:
            print(report.table(records))

    errors.exit_with(command)


if __name__ == "__main__":
    main()
