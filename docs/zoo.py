"""Writes docs/zoo.md: the table of published networks that `ibjax.zoo` and `ibjax convert --zoo` read.

python docs/zoo.py             writes the page
python docs/zoo.py --check     ends with 1 where the page is not what it would write
"""

import re
from itertools import groupby

from generated import DATA, NORMS, command

from ibjax.pytorch.architectures import CIFAR10, CIFAR100, IMAGENET
from ibjax.pytorch.published import Published, table

HEAD = """# Published networks

`ibjax.zoo` knows these {count} networks; it holds no weights. `zoo.load(NAME, FILE)` reads a file ([your own
network](own_network.md#published-networks)), `ibjax convert --torch=FILE --zoo=NAME --workdir=DIR` makes a run from it
([networks from PyTorch](teachers.md)). Only `zoo.load` reads the architectures `kw` and `mlp_b`. Where several networks
share a name, write it in full, as in `cifar10/linf/Engstrom2019Robustness`. This page is generated from
`ibjax/pytorch/published.csv` by `python docs/zoo.py`; a test keeps it current.

Accuracies are the published ones, in percent, on 5,000 images for ImageNet and on the whole test set otherwise; those
for CIFAR and ImageNet are RobustBench's (commit 78fcc9e). Only networks that ibjax can import are listed;
[RobustBench's networks](robustbench.md) also lists the others, with the reason for each. *Exact*: the robust accuracy
that a verifier has proven. *Corruptions*: the accuracy under common corruptions.

## By architecture

| `--arch` | networks | normalisation |
|---|---|---|
"""
_WORDS = {
    (CIFAR10["mean"], CIFAR10["std"]): "CIFAR-10's",
    (CIFAR100["mean"], CIFAR100["std"]): "CIFAR-100's",
    (IMAGENET["mean"], IMAGENET["std"]): "ImageNet's",
    (None, None): "none",
}


def page() -> str:
    """The page."""
    rows = list(table().values())
    parts = [HEAD.format(count=len(rows)), *_architectures(rows)]
    for (data, norm), group in groupby(rows, key=lambda row: (row.data, row.norm)):
        parts += ["\n", *_section(data, norm, list(group))]
    return "".join(parts)


def _architectures(rows):
    """A line for each architecture and normalisation, with the names, shortened to authors and title."""

    def kind(row):
        return row.arch, _normalisation(row)

    for (arch, normalisation), group in groupby(sorted(rows, key=kind), key=kind):
        names = dict.fromkeys(re.sub(r"(20\d\d[A-Za-z-]+?)_.*", r"\1", row.name) for row in group)
        yield f"| `{arch}` | {', '.join(names)} | {normalisation} |\n"


def _normalisation(row):
    said = _WORDS.get((row.mean, row.std))
    return said or "; ".join(" ".join(f"{value:.4g}" for value in values) for values in (row.mean, row.std))


def _section(data: str, norm: str, rows: list[Published]):
    columns, eps = {"clean": "clean", "autoattack": "AutoAttack"}, ["eps"]
    if norm == "corruptions":
        columns, eps = {"clean": "clean", "corruptions": "corruptions"}, []
    elif any(row.exact for row in rows):
        columns |= {"pgd": "PGD-40", "exact": "exact"}
    heads = ["name", "network", *eps, *columns.values(), "file"]
    yield f"## {DATA[data]}, {NORMS[norm]}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n"
    for row in rows:
        size = "-".join(str(part) for part in (row.depth, row.width) if part)
        numbers = [getattr(row, column) for column in columns]
        shown = ["" if value is None else f"{value:.2f}" for value in numbers]
        digest = f", SHA-256 {row.sha256[:8]}…" if row.sha256 else ""
        named = [f"`{row.name}`", f"{row.arch} {size}".strip(), *([row.eps] if eps else [])]
        cells = [*named, *shown, f"[{row.file}]({row.url}){digest}"]
        yield f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    command("zoo", page())
