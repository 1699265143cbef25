"""Decides with which mean and std an imported network normalises pixels, and reports the source of the decision.

The sources, in order: the file, if it holds mean and std; the caller; the values that the architecture's authors use
for the data set, which for many architectures is no normalisation. Where a network is known to normalise but mean and
std are unknown, the caller must give them.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ibjax.errors import CheckpointError, InputError
from ibjax.pytorch.architectures import ARCHITECTURES
from ibjax.pytorch.published import Published
from ibjax.pytorch.state_dicts import Found

_HOW = "give --mean=… --std=…, for pixels from 0 to 1, or --no-normalisation"


class Said(NamedTuple):
    """What the caller of an import states about the file."""

    key: str | None = None  # path of the requested network, where the file holds several
    mean: Sequence[float] | None = None  # of pixels from 0 to 1, one number for each channel or one for all
    std: Sequence[float] | None = None
    no_normalisation: bool = False
    sha256: str | None = None
    overrides: Sequence[str] = ()  # of the configuration, such as ["--config.data.data_dir=…"]
    published: Published | None = None  # the network that the file must be

    def paths(self) -> set[str]:
        """The overridden keys of the configuration, such as "model.mean"."""
        return {flag.lstrip("-").removeprefix("config.").partition("=")[0] for flag in self.overrides}


def decide(
    file: Path, arch: str, channels: int, found: Found, exported: Mapping[str, Any], said: Said, dataset: str | None
) -> tuple[dict[str, Any], str]:
    """(our model's options for the normalisation, the source of this decision in words).

    Args:
      file: named in messages.
      arch: key of `ARCHITECTURES`.
      channels: of the images.
      found: the network in the file.
      exported: the network's options, if the file is an export of ibjax; {} for any other file.
      said: what the caller states.
      dataset: the name of the network's data set, if it has one.

    Raises InputError or CheckpointError where two sources contradict each other, or where no source has mean and std
    of a network that is known to normalise.
    """
    known = ARCHITECTURES[arch].normalized
    usual = next((options for name, options in known.items() if str(dataset).startswith(name)), None)
    if usual is not None and len(usual["mean"]) != channels:
        usual = None
    values, source = _mean_and_std(file, arch, channels, found, exported, said, dataset, usual)
    if usual is not None and not exported:  # a border is there whoever says mean and std; an export says it itself
        values = {**{option: value for option, value in usual.items() if option not in ("mean", "std")}, **values}
    return {option: value for option, value in values.items() if f"model.{option}" not in said.paths()}, source


def _mean_and_std(file, arch, channels, found, exported, said, dataset, usual):
    """What `decide` returns, of mean and std alone; `usual`: the authors' on this data set, or None."""
    voices = {
        "--mean and --std": said.mean is not None or said.std is not None,
        "--no-normalisation": said.no_normalisation,
        "--config.model.mean and std": bool(said.paths() & {"model.mean", "model.std"}),
    }
    speaking = [voice for voice, speaks in voices.items() if speaks]
    if len(speaking) > 1:
        raise InputError(f"{' as well as '.join(speaking)} say how pixels are normalised; give one of them")
    if found.normalization is not None:
        mean, std = (_each("the file's normalisation", part, channels) for part in found.normalization)
        if speaking:
            raise InputError(f"{file} keeps its normalisation, mean {mean} and std {std}; leave {speaking[0]} out")
        if (row := said.published) is not None and not _same((mean, std), (row.mean, row.std)):
            raise CheckpointError(
                f"{file} keeps mean {mean} and std {std}, {row.path} has {row.mean} and {row.std}: another network"
            )
        return dict(mean=mean, std=std), "the file"
    if speaking:
        return _spoken(said, channels), speaking[0]
    if said.published is not None:
        return dict(mean=said.published.mean, std=said.published.std), "the zoo"
    if exported:
        return dict(mean=None, std=None), "ibjax's export"
    if found.lost:
        raise CheckpointError(f"{file}: {found.lost}: its normalisation, most likely, which is not kept; {_HOW}")
    if usual is not None:
        return dict(mean=usual["mean"], std=usual["std"]), f"usual of {arch} on {dataset}"
    if asks := ARCHITECTURES[arch].asks:
        raise InputError(f"networks of {arch} normalise {asks}, and {file} does not keep how; {_HOW}")
    if known := ARCHITECTURES[arch].normalized:
        raise InputError(
            f"networks of {arch} normalise their pixels, and {file} does not keep how; {_HOW}, or if its data set is "
            f"one of {', '.join(known)}, name that with --config.data.dataset"
        )
    return dict(mean=None, std=None), f"usual of {arch}"


def _same(kept, published):
    """Whether two pairs of mean and std are equal, up to the rounding of published numbers."""
    if None in published:
        return False
    return bool(np.allclose(kept, published, rtol=0, atol=1e-3))


def _spoken(said, channels):
    """The options that the caller gives by --mean, --std or --no-normalisation; {} where --config sets them."""
    if said.no_normalisation:
        return dict(mean=None, std=None)
    if said.mean is None and said.std is None:
        if not {"model.mean", "model.std"} <= said.paths():
            raise InputError("--config.model.mean and --config.model.std are halves of a normalisation; give both")
        return {}
    if said.mean is None or said.std is None:
        raise InputError(f"--{'std' if said.mean is None else 'mean'} says one half of a normalisation; give both")
    mean, std = _each("--mean", said.mean, channels), _each("--std", said.std, channels)
    if not (max(map(abs, mean)) <= 1 and min(std) > 0 and max(std) <= 1 and all(map(math.isfinite, (*mean, *std)))):
        raise InputError(
            f"--mean={_text(mean)} --std={_text(std)} are not those of pixels from 0 to 1; divide those of pixels from "
            f"0 to 255 by 255"
        )
    return dict(mean=mean, std=std)


def _each(name, values, channels):
    """The values, one for each channel; a single value is repeated."""
    if len(values) not in (1, channels):
        raise InputError(f"{name}={_text(values)} has {len(values)} numbers, the network takes {channels} channels")
    return tuple(map(float, values)) * (channels // len(values))


def _text(values):
    return ",".join(f"{value:g}" for value in values)
