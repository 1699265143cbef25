"""With which mean and std an imported network normalises pixels, decided in one order, and who says so.

The file, where it keeps them; else the caller; else what the architecture's authors have for the data set, which is
none for many. Where it is known that a network normalises and not how, the caller must say.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ibjax.errors import CheckpointError, InputError
from ibjax.pytorch.architectures import ARCHITECTURES
from ibjax.pytorch.state_dicts import Found

_HOW = "give --mean=… --std=…, for pixels from 0 to 1, or --no-normalisation"


class Said(NamedTuple):
    """What the caller of an import says of the file."""

    key: str | None = None  # of several networks in it: the path of one
    mean: Sequence[float] | None = None  # of pixels from 0 to 1, one number for each channel or one for all
    std: Sequence[float] | None = None
    no_normalisation: bool = False
    sha256: str | None = None
    overrides: Sequence[str] = ()  # of the configuration, as ["--config.data.data_dir=…"]

    def paths(self) -> set[str]:
        """The configuration's keys that are overridden, as "model.mean"."""
        return {flag.lstrip("-").removeprefix("config.").partition("=")[0] for flag in self.overrides}


def decide(
    file: Path, arch: str, channels: int, found: Found, exported: Mapping[str, Any], said: Said, dataset: str | None
) -> tuple[dict[str, Any], str]:
    """(our model's options, who says so).

    Args:
      file: for messages.
      arch: key of `ARCHITECTURES`.
      channels: of the images.
      found: the network in the file.
      exported: what an export of ours says of the network's options; {} of any other file.
      said: what the caller says.
      dataset: the name of the data set that the network is for, where it has one.

    Raises InputError or CheckpointError where two of them contradict each other, or nobody knows.
    """
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
        return dict(mean=mean, std=std), "the file"
    if speaking:
        return _spoken(said, channels), speaking[0]
    if exported:
        return dict(mean=None, std=None), "ibjax's export"
    if found.lost:
        raise CheckpointError(f"{file}: {found.lost}: its normalisation, most likely, which is not kept; {_HOW}")
    known = ARCHITECTURES[arch].normalized
    usual = next((options for name, options in known.items() if str(dataset).startswith(name)), None)
    if usual is not None and len(usual["mean"]) == channels:
        kept = {option: value for option, value in usual.items() if f"model.{option}" not in said.paths()}
        return kept, f"usual of {arch} on {dataset}"
    if known:
        raise InputError(
            f"networks of {arch} normalise their pixels, and {file} does not keep how; {_HOW}, or if its data set is "
            f"one of {', '.join(known)}, name that with --config.data.dataset"
        )
    return dict(mean=None, std=None), f"usual of {arch}"


def _spoken(said, channels):
    """What the caller says, other than by --config."""
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
    """One number for each channel."""
    if len(values) not in (1, channels):
        raise InputError(f"{name}={_text(values)} has {len(values)} numbers, the network takes {channels} channels")
    return tuple(map(float, values)) * (channels // len(values))


def _text(values):
    return ",".join(f"{value:g}" for value in values)
