"""Published networks by name: what is known of them, and how their files are read.

    from ibjax import zoo

    zoo.names("cifar10", "linf")                            ['cifar10/linf/Addepalli2021Towards_RN18', …]
    zoo.find("Carmon2019Unlabeled").autoattack              59.53
    network = zoo.load("Carmon2019Unlabeled", "Carmon2019Unlabeled.pt")

`load` returns a wrapped network (`ibjax.wrap`), which attacks and `ibjax.benchmark` take; `ibjax convert --zoo=NAME`
makes a run of it, which can be evaluated and can serve as a teacher. The zoo holds no weights. `published.csv` is its
table, from which docs/zoo.md is made; `Published.url` says where a file is offered.

Guarantees (tested): a file is read with PyTorch's restricted unpickler (weights_only), no code of it is run; a file of
another architecture, size, number of classes, normalisation or digest than that of the name is refused.
"""

import urllib.parse
from pathlib import Path

import jax
import jax.numpy as jnp

from ibjax import files, wrap
from ibjax.data import archives
from ibjax.errors import CheckpointError, InputError
from ibjax.pytorch import imports, torch_file, verified
from ibjax.pytorch.normalisation import Said
from ibjax.pytorch.published import Published, find, table
from ibjax.wrap.networks import Network, of

__all__ = ["Published", "find", "load", "names", "said"]


def names(data: str | None = None, norm: str | None = None) -> list[str]:
    """The unique names of all published networks, or of those on a data set or for a norm, as "cifar10", "linf"."""
    for what, given in (("data", data), ("norm", norm)):
        known = sorted({getattr(row, what) for row in table().values()})
        if given not in (None, *known):
            raise InputError(f"{what}={given!r} is unknown to the zoo; allowed: {', '.join(known)}")
    return [path for path, row in table().items() if data in (None, row.data) and norm in (None, row.norm)]


def load(name: str, source: str | Path) -> Network:
    """The network of a published file, in evaluation mode.

    Args:
      name: as "Carmon2019Unlabeled", or where several share it "cifar10/linf/Engstrom2019Robustness".
      source: the file, .pt, .pth or .safetensors, or its URL, from which it is downloaded into the cache folder. What
        is not the network does not stay there.

    Raises InputError on an unknown name, and CheckpointError where the file is not that of the name. Its logits are
    compared with those of PyTorch's network on crops of photographs, except of `kw` and `mlp_b`, which have no
    definition in PyTorch here.
    """
    row = find(name)
    file = _file(row, source)
    try:
        return _loaded(row, file)
    except CheckpointError:
        if _is_url(source):  # what was downloaded would be taken for the network again, whatever the URL
            file.unlink(missing_ok=True)
        raise


def _loaded(row, file):
    if row.arch in verified.NETWORKS:
        return _verified(row, file)
    made = imports.load(file, row.arch, said=said(row))
    network = wrap.linen(made.model, made.variables)
    return network._replace(says={**network.says, **_says(row, made.facts["imported"]["sha256"])})


def said(row: Published) -> Said:
    """What the table states about a file, for `imports`."""
    return Said(row.key, sha256=row.sha256, published=row)


def _says(row, digest):
    return {"title": row.name, "network": row.path, "arch": row.arch, "sha256": digest}


def _verified(row, file):
    """A network of `verified`, whose file is known by its digest."""
    content = torch_file.read(file, row.sha256)
    (node,) = content.nodes
    weights = {name: jnp.asarray(torch_file.array(file, name, tensor)) for name, tensor in node.tensors.items()}
    says = {"library": "jax", "version": jax.__version__, **_says(row, content.sha256)}
    return of(verified.NETWORKS[row.arch], weights, says, sum(value.size for value in weights.values()))


def _is_url(source):
    return urllib.parse.urlsplit(str(source)).scheme in ("http", "https")


def _file(row, source):
    """The file of a path, or of a URL, which is downloaded once."""
    if not _is_url(source):
        if (file := files.path(source)).is_file():
            return file
        raise InputError(f"{source} is no file; download that of {row.path}, {row.file}: {row.url}")
    folder = files.cache_folder() / "zoo" / row.path
    return archives.find(archives.Archive(row.file, str(source), ""), folder, download=True)
