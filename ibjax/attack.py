"""Attacks the images of an .npz file on the network of a run or of a PyTorch file.

    python -m ibjax.attack FILE.npz --model=RUN [--checkpoint=best|last|STEP] [--attacks=autoattack,pgd-20] [--eps=…]
    python -m ibjax.attack FILE.npz --model=NETWORK.pt --arch=resnet [--attacks=…]        also .pth .t7 .safetensors

FILE.npz holds the images `x` (N, H, W, C), or (N, H, W) if they are grey, uint8 or float in [0, 1], and their labels
`y`, (N,) or (N, 1); or `x_test` and `y_test` of Keras's layout. RUN is the folder of a trained run. A PyTorch file is
read as by ibjax.convert; its logits are compared on the given images. Unless they are given, attacks, norm and eps are
those of the run; for a PyTorch file they are FGSM, PGD-20 and margin PGD-20 in linf at 8/255.

The table of accuracies is printed, and a file written (--out):

| array     | content                                                                                  |
|-----------|------------------------------------------------------------------------------------------|
| `attacks` | (A,) names                                                                               |
| `x_adv`   | (A, N, H, W, C) float32 in [0, 1]; where the attack fails, its last or strongest attempt |
| `robust`  | (A, N) bool: classified correctly both clean and under the attack                        |
| `y`       | (N,) labels                                                                              |
| `records` | (A,) JSON, with the keys of the records of ibjax.evaluate                                |
"""

import json

import jax
import numpy as np

from ibjax import cli, config, convert, errors, files
from ibjax.attacks import names
from ibjax.data import npz, sample
from ibjax.devices import cluster
from ibjax.errors import InputError, check_count
from ibjax.evaluation import report, results
from ibjax.evaluation.evaluate import attack_images
from ibjax.evaluation.settings import replaced
from ibjax.pytorch import imports
from ibjax.runs import command_line, own_code, run, rundir, trees

__all__ = ["attack_images"]


def parser() -> cli.Parser:
    """The arguments of this module."""
    parser = cli.parser("ibjax.attack", __doc__)
    parser.add_argument("file", metavar="FILE.npz", type=files.path, help="images x and labels y")
    parser.add_argument("--model", type=files.path, required=True, help="the folder of a run, or a PyTorch file")
    parser.add_argument("--checkpoint", help="of the run: best (default), last or a step")
    command_line.add_trust(parser)
    command_line.add_attacks(parser)
    command_line.add_evaluation(parser)
    parser.add_argument("--seed", type=int, help="of the attacks' random draws; default: the run's, or 0")
    parser.add_argument("--out", type=files.path, help="the file to write; default: FILE-attacked.npz beside FILE.npz")
    convert.add_import(parser)
    return parser


def main() -> None:
    """The command line of this module."""
    given = parser().parse_args()

    def command():
        out = given.out or given.file.with_name(f"{given.file.stem}-attacked.npz")
        if out.suffix != ".npz" or out.resolve() == given.file.resolve():
            raise InputError(f"--out={out} is not allowed; give another file that ends in .npz")
        cluster.initialize()
        names.tell_of_old(given.attacks or ())
        rundir.check_writable(out.parent)
        with cluster.together("images"):
            split = npz.images(given.file)
        seen = {given.file.name: trees.digest(split)} if cluster.several() else {}
        cluster.agree("images", seen, f"give all hosts the same {given.file.name}")
        if given.n is not None:
            check_count("--n", given.n)
        split = sample(split, given.n, "--n", "there are")  # first: a PyTorch file's logits are compared on these
        trained = _network(given, split)
        if given.attacks is None:  # they come from the run's folder
            own_code.permit_attacks(trained.config.evaluate.attacks, trained.workdir / "config.json")
        section = {**config.plain(trained.config.evaluate), "n": None, "ladder": ()}
        settings = replaced(
            section, **{name: getattr(given, name) for name in ("attacks", *command_line.OF_EVALUATION)}
        )
        if given.seed is not None:
            check_count("--seed", given.seed, 0, config.LARGEST_SEED)
            trained.config.seed = given.seed
        records, x_adv = attack_images(trained, split, given.file.stem, given.checkpoint or "best", settings)
        if jax.process_index() == 0:
            _write(out, records, x_adv, split)
            print(report.table(records))
            print(f"adversarial images and records: {out}")

    errors.exit_with(command)


def _network(given, split):
    """The network that --model names."""
    said = convert.said_of(given)
    if given.model.is_dir():
        if given.arch or any(said):
            raise InputError(f"--model={given.model} is a run, which says all of its network; leave --arch … out")
        return run.load(given.model, given.checkpoint or "best")
    if not given.model.is_file():
        raise InputError(f"--model={given.model} is neither the folder of a run nor a file of a network")
    if given.checkpoint is not None:
        raise InputError(f"--model={given.model} is a file, --checkpoint={given.checkpoint} goes with a run")
    return imports.load(given.model, convert.arch_of(given, given.model), split, given.file.stem, said)


def _write(out, records, x_adv, split):
    arrays = {
        "attacks": np.array([record["attack"] for record in records]),
        "x_adv": x_adv,
        "robust": np.stack([results.robust_flags(record) for record in records]),
        "y": split.labels,
        "records": np.array([json.dumps(record) for record in records]),
    }
    with files.replacing(out) as temporary, temporary.open("wb") as handle:
        np.savez_compressed(handle, **arrays)


if __name__ == "__main__":
    main()
