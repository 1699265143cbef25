"""The table of published networks, `published.csv`, and the SHA-256 digests of their files.

One row is one entry of a leaderboard; the networks that cannot be imported say why in `uncovered`, the others are one
file each. Architecture, normalisation, key and accuracies of the networks for CIFAR and ImageNet are those of
RobustBench at commit 78fcc9e (`robustbench/model_zoo/`, `model_info/`). It publishes no digests; those of
Carmon2019Unlabeled.pt and of torchvision's resnet50-0676ba61.pth (Standard_R50) are recorded independently in three
public repositories or more. The networks for MNIST, their numbers and digests are those of vtjeng/MIPVerify_data
35578a1, Hadisalman/robust-verify-benchmark fce1c27 and yaodongyu/TRADES f94f414. Files of torch.hub, torchvision and
timm have the first digits of their digest in their names, such as resnet18-f37072fd.pth.
"""

import csv
import functools
import re
from pathlib import Path
from typing import NamedTuple

from ibjax.errors import CheckpointError, InputError, nearest

_TABLE = Path(__file__).with_name("published.csv")
Numbers = tuple[float, ...] | None


class Published(NamedTuple):
    """A published network; accuracies in percent, of ImageNet on 5,000 images, else on the whole test set."""

    name: str  # as RobustBench's
    data: str  # cifar10, cifar100, imagenet or mnist
    norm: str  # linf, l2 or corruptions
    eps: str  # "8/255"; empty for corruptions
    arch: str  # a key of `architectures.ARCHITECTURES`, or of `verified.NETWORKS`; empty where it cannot be imported
    depth: int | None
    width: int | None  # the factor of a WideResNet; channels of the first block of the networks on patches
    key: str | None  # of the network in the file, where the file holds several
    mean: Numbers  # of pixels in [0, 1], with which it normalises; None: it does not
    std: Numbers
    clean: float
    autoattack: float | None
    external: float | None  # the lowest robust accuracy that is known, where that is below AutoAttack's
    corruptions: float | None  # accuracy under common corruptions
    pgd: float | None  # PGD with 40 steps of size 0.01; given only where it starts at x, not at a random point
    exact: float | None  # robust accuracy by mixed-integer programming
    file: str
    sha256: str | None
    source: str  # "robustbench" and the file's id at Google Drive, or the repository and its commit
    uncovered: str  # the network, and why it cannot be imported; empty where it can

    @property
    def path(self) -> str:
        """The unique name, "cifar10/linf/Carmon2019Unlabeled"."""
        return f"{self.data}/{self.norm}/{self.name}"

    @property
    def url(self) -> str:
        """Where the file is offered, for a reader."""
        origin, _, identity = self.source.partition(" ")
        if origin == "robustbench":
            return f"https://drive.google.com/file/d/{identity}"
        if origin == "torchvision":
            return f"https://download.pytorch.org/models/{self.file}"
        return f"https://github.com/{origin}"

    @property
    def classes(self) -> int:
        """The number of classes."""
        return {"cifar100": 100, "imagenet": 1000}.get(self.data, 10)

    @property
    def robust(self) -> float | None:
        """What a leaderboard ranks by: accuracy under corruptions, or the lowest robust accuracy that is known."""
        if self.norm == "corruptions":
            return self.corruptions
        return self.autoattack if self.external is None else self.external


@functools.cache
def table() -> dict[str, Published]:
    """The rows that can be imported, by `Published.path`."""
    return {path: row for path, row in entries().items() if not row.uncovered}


@functools.cache
def entries() -> dict[str, Published]:
    """All rows by `Published.path`."""
    with _TABLE.open(encoding="utf-8", newline="") as lines:
        rows = [_row(row) for row in csv.DictReader(lines)]
    return {row.path: row for row in rows}


def _row(texts):
    read = dict(texts)
    for name in ("depth", "width"):
        read[name] = int(texts[name]) if texts[name] else None
    for name in ("clean", "autoattack", "external", "corruptions", "pgd", "exact"):
        read[name] = float(texts[name]) if texts[name] else None
    for name in ("mean", "std"):
        read[name] = None if texts[name] == "none" else tuple(map(float, texts[name].split()))
    for name in ("key", "sha256"):
        read[name] = texts[name] or None
    return Published(**read)


def find(name: str) -> Published:
    """The row of a name: "Carmon2019Unlabeled" where it is unique, else "cifar10/linf/Engstrom2019Robustness"."""
    rows = table()
    if name in rows:
        return rows[name]
    found = [path for path, row in rows.items() if row.name == name]
    if len({(rows[path].source, rows[path].file) for path in found}) > 1:
        raise InputError(f"'{name}' is the name of several published networks; give {' or '.join(found)}")
    if not found and (uncovered := [row for path, row in entries().items() if name in (path, row.name)]):
        raise InputError(f"'{name}' cannot be imported: {uncovered[0].uncovered}")
    if not found:
        raise InputError(f"'{name}' is no published network of the zoo; {nearest(name, _near(name, rows))}")
    return rows[found[0]]


def _near(name, rows):
    """Names that a message about an unknown one lists: those of the same authors, or else of each data set."""
    first = re.split(r"[\d_]", name.rpartition("/")[2])[0].lower()
    same = sorted({row.name for row in rows.values() if first and row.name.lower().startswith(first)})
    return same or sorted({f"{row.data}/{row.norm}/…" for row in rows.values()})


# ---- digests -------------------------------------------------------------------------------------------------


@functools.cache
def digests() -> dict[str, str]:
    """{file name: its SHA-256} of the published files whose digest is known."""
    return {row.file: row.sha256 for row in table().values() if row.sha256}


def expected(name: str) -> tuple[str, str] | None:
    """(the first digits of a file's SHA-256, their source); None where none is published for this file name."""
    if name in digests():
        return digests()[name], "the published one"
    match = re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
    if match and not match[1].isdigit():  # digits alone are a date
        return match[1], "the one in its name"
    return None


def compare(name: str, digest: str, given: str | None) -> str:
    """Compares a file's digest with the caller's, else with the published one; says in words which one it matches.

    Raises InputError where `given` is no SHA-256, CheckpointError where the digests differ.
    """
    if given is not None:
        if not re.fullmatch(r"[0-9a-f]{8,64}", given.lower()):
            raise InputError(f"--sha256={given} is no SHA-256; give its 64 hexadecimal digits, or the first 8 or more")
        if not digest.startswith(given.lower()):
            raise CheckpointError(f"{name} has the SHA-256 {digest}, wanted is {given}: download it again")
        return "agrees with --sha256"
    known = expected(name)
    if known is None:
        return "compared with none"
    if not digest.startswith(known[0]):
        raise CheckpointError(
            f"{name} has the SHA-256 {digest}, {known[1]} is {known[0]}: download it again, or if it is another file "
            f"of that name, give --sha256={digest}"
        )
    return f"agrees with {known[1]}"
