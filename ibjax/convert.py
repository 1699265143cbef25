"""Converts PyTorch networks into runs and runs into PyTorch networks, and runs into model cards and back.

    python -m ibjax.convert --torch FILE --arch NAME --workdir DIR [--clean_acc=84.92] [--config.KEY=VALUE …]
    python -m ibjax.convert --torch FILE --robustbench NAME --workdir DIR [--config.KEY=VALUE …]
    python -m ibjax.convert --workdir DIR --to torch --out FOLDER [--checkpoint=best|last|STEP] [--arch NAME]
    python -m ibjax.convert --workdir DIR --to card [--out FOLDER] [--checkpoint=best|last|STEP]
    python -m ibjax.convert --card FOLDER --workdir DIR [--config.data.data_dir=…]

Nothing is written unless the logits of a PyTorch network and ours agree. --to FOLDER means --to torch --out FOLDER.

A card is a folder in the layout of Hugging Face: README.md with metadata and the evaluation, model.safetensors,
config.json. It is written to DIR/card unless --out says otherwise. The run that is made from a card has bit-identical
weights.

FILE is .pt, .pth, .t7 or .safetensors; --key selects one of several networks in it. An import compares logits on the
test images of the configuration's data set (set by --config.data.data_dir=…), or without that data set on crops of
photographs (--photographs=SIDE). The resulting run can be evaluated and can serve as a teacher like any other. The file
does not say how its network was trained, so the other sections of the configuration hold defaults that do not describe
the training.

Guarantees (tests of the same names): Nothing in a file can run code. Every weight is filled, and no weight of the file
is left over. The gate (logits of real images agree to 1e-4) notices a change of any parameter array. Import, export and
import give the same bits. A folder that is not empty is refused; a new one is written whole or not at all.

--robustbench, or --zoo, takes a name of RobustBench's leaderboards or of the other networks in docs/zoo.md. The name
says architecture, size and normalisation; where the test set is there, the import checks the published clean accuracy.

A PyTorch file does not say how pixels are normalised unless the network itself holds mean and std. Otherwise give
--mean and --std, or --no-normalisation; without them the architecture's usual values are used. --clean_acc, the
published accuracy, checks whether they are right. After an import, one line lists every property of the network and its
source.
"""

import argparse
import sys
from pathlib import Path

from ibjax import cli, errors, files
from ibjax.devices import cluster
from ibjax.errors import InputError, nearest
from ibjax.evaluation import card
from ibjax.pytorch import torch_file, zoo
from ibjax.pytorch.architectures import ARCHITECTURES
from ibjax.pytorch.exports import to_torch
from ibjax.pytorch.imports import from_torch, hint
from ibjax.pytorch.normalisation import Said
from ibjax.runs import command_line

__all__ = ["from_torch", "main", "to_torch"]

_SAID = ("key", "mean", "std", "no_normalisation")  # what --zoo says, as it says --arch
_N = 256  # images that are compared
_OF_IMPORTS = ("zoo", *_SAID, "sha256", "clean_acc", "photographs")


def main() -> None:
    """The command line of this module."""
    words, overrides = command_line.apart(sys.argv[1:])
    given = parser().parse_args(words)

    def command():
        _check(given, overrides)
        cluster.keep_compiled()
        if given.card is not None:
            about = card.from_card(given.card, given.workdir, overrides)
            print(f"{given.workdir}: {card.summary(about)}")
            return
        if given.to == "card":
            print(card.to_card(given.workdir, given.out or given.workdir / "card", given.checkpoint or "best"))
            return
        if given.to is not None:
            to = given.out if given.to == "torch" else files.path(given.to)
            delta = to_torch(given.workdir, to, given.checkpoint or "best", arch=given.arch, n=given.n or _N)
            print(f"{to}: max |Δlogit| {delta:.1e}; python {to / 'check.py'} checks it in PyTorch")
            return
        arch = arch_of(given, given.torch)
        said = said_of(given)._asdict() | dict(overrides=overrides)
        clean_acc = given.clean_acc
        if given.zoo is not None and given.photographs is None and clean_acc is None:
            clean_acc = zoo.find(given.zoo).clean
        options = dict(clean_acc=clean_acc, photographs=given.photographs, n=given.n or _N)
        found = from_torch(given.torch, arch, given.workdir, **said, **options)
        accuracy = f", clean accuracy {found['clean_acc']:.2f} %" if "clean_acc" in found else ""
        read = "; ".join(f"{what} {part['is']} ({part['from']})" for what, part in found["network"].items())
        print(f"{given.torch}: {read}")
        print(f"{given.workdir}: max |Δlogit| {found['max_delta_logit']:.1e} on {found['images']}{accuracy}")

    errors.exit_with(command)


def parser() -> cli.Parser:
    """The arguments of this module."""
    parser = cli.parser("ibjax.convert", __doc__)
    command_line.add_trust(parser)
    add = parser.add_argument
    add("--workdir", type=files.path, required=True, help="of the run: made by an import, read by an export")
    add("--torch", type=files.path, help="the file to import")
    add_import(parser)
    add("--clean_acc", type=float, help="its published clean accuracy in percent, to be checked")
    add("--photographs", type=int, metavar="SIDE", help="compare on photographs, not on a data set")
    add("--card", type=files.path, metavar="FOLDER", help="the model card to import")
    add("--to", metavar="card|torch|FOLDER", help="export a model card or a PyTorch network; FOLDER: torch, to there")
    add("--out", type=files.path, metavar="FOLDER", help="the folder to export to; default for a card: DIR/card")
    add("--checkpoint", help="to export: best (the default), last or a step")
    add("--n", type=int, help=f"images that are compared with PyTorch; default: {_N}")
    return parser


def add_import(parser: cli.Parser) -> None:
    """Adds what is said of a PyTorch file: --arch, --key, the normalisation, the digest."""
    add = parser.add_argument
    add(
        *("--zoo", "--robustbench"),
        dest="zoo",
        metavar="NAME",
        help="the published network that it is (docs/robustbench.md), in place of --arch and the rest",
    )
    add("--arch", help=f"architecture of the file, or the one whose names an export uses: {', '.join(ARCHITECTURES)}")
    add("--key", help="of several networks in the file the one that is meant, as state_dict or model_ema.module")
    add("--mean", help="with which pixels are normalised, as 0.4914,0.4822,0.4465; for pixels from 0 to 1")
    add("--std", help="likewise")
    add(
        "--no-normalisation",
        "--no-normalization",
        dest="no_normalisation",
        action="store_true",
        help="pixels are not normalised",
    )
    add("--sha256", help="the digest that the file must have, or its first digits")


def said_of(given: argparse.Namespace) -> Said:
    """What the options of `add_import` but --arch state; raises InputError where --mean or --std are no numbers."""
    if given.zoo is not None:
        said = zoo.said(zoo.find(given.zoo))
        if given.sha256 and said.sha256 and not said.sha256.startswith(given.sha256.lower()):
            raise InputError(f"--sha256={given.sha256} is not that of --zoo={given.zoo}, {said.sha256}; leave it out")
        return said._replace(sha256=said.sha256 or given.sha256)
    numbers = {option: _numbers(option, getattr(given, option)) for option in ("mean", "std")}
    return Said(given.key, **numbers, no_normalisation=given.no_normalisation, sha256=given.sha256)


def arch_of(given: argparse.Namespace, file: Path) -> str:
    """The architecture that --zoo or --arch names; InputError without both, which names the one that fits `file` best.

    Raises InputError where options say again, or otherwise, what --zoo says.
    """
    if given.zoo is not None:
        if more := [option for option in ("arch", *_SAID) if getattr(given, option) not in (None, False)]:
            raise InputError(f"--zoo={given.zoo} says --{more[0].replace('_', '-')} too; leave one of them out")
        row = zoo.find(given.zoo)
        if row.arch not in ARCHITECTURES:
            raise InputError(f"--zoo={given.zoo} has no definition in ibjax.models; ibjax.zoo.load takes its file")
        return row.arch
    if given.arch is None:
        there = f"; {hint(torch_file.read(file, given.sha256))}" if file.is_file() else ""
        raise InputError(f"--arch is missing; {nearest('', ARCHITECTURES)}{there}")
    return given.arch


def _check(given, overrides):
    if sum(option is not None for option in (given.torch, given.card, given.to)) != 1:
        raise InputError(
            "give --torch FILE --arch NAME (or --zoo NAME) or --card FOLDER for an import, or --to card or --to torch "
            "for an export"
        )
    if given.n is not None:
        errors.check_range("--n", given.n, 1)
    values = [getattr(given, option) for option in _OF_IMPORTS]
    of_torch = any(value is not None and value is not False for value in values)
    if (of_torch and not given.torch) or (overrides and given.to) or (given.checkpoint is not None and not given.to):
        flags = ", ".join(f"--{option.replace('no_normalisation', 'no-normalisation')}" for option in _OF_IMPORTS)
        raise InputError(f"{flags} go with --torch, --config.KEY=VALUE with --torch or --card, --checkpoint with --to")
    if given.arch is not None and (given.card or given.to == "card"):
        raise InputError("--arch names a PyTorch network; a card needs none, leave it out")
    if given.n is not None and (given.card or given.to == "card"):
        raise InputError(f"--n={given.n} images are compared with PyTorch; a card needs none, leave it out")
    if (given.to == "torch") > (given.out is not None):
        raise InputError("--to torch needs --out FOLDER, the folder to export to")
    if given.out is not None and given.to not in ("card", "torch"):
        raise InputError("--out goes with --to card or --to torch")


def _numbers(option, text):
    """The numbers of --mean or --std; None where it is not given."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.strip("()[] ").split(",") if part.strip())
    except ValueError:
        raise InputError(f"--{option}={text} are no numbers; give them as 0.4914,0.4822,0.4465") from None


if __name__ == "__main__":
    main()
