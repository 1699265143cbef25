"""Finds the requested network in a file: its key, the common prefix of its names, and its normalisation of pixels.

A checkpoint may hold several networks: a network and its running average, a student and its teacher, or one network
twice. A candidate is every place that has all weights common to the files of an architecture (`architectures.anchors`).
Copies with equal values count once. A single candidate is taken; of several the caller must name one by its path, which
joins with dots the keys that lead to its mapping and the prefix of its names: state_dict.module.encoder.

Names that wrappers add, at the front or within, are removed: `module` of DataParallel, `_orig_mod` of torch.compile,
and those of FSDP. Counters are ignored, whatever their type.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ibjax.errors import CheckpointError, InputError
from ibjax.pytorch import torch_file
from ibjax.pytorch.architectures import ARCHITECTURES, anchors
from ibjax.pytorch.fit import some

_WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
_COUNTERS = frozenset(("num_batches_tracked", "n_averaged"))
_MEANS = frozenset(("mean", "mu", "new_mean", "means", "_mean", "pixel_mean", "image_mean", "norm_mean"))
_STDS = frozenset(("std", "sigma", "new_std", "stds", "sds", "sd", "_std", "pixel_std", "image_std", "norm_std"))

Normalization = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of each channel


class Found(NamedTuple):
    """A network that was found in a file."""

    state: dict[str, np.ndarray]  # weights and statistics in float32, by their names without prefix
    key: str  # path of the mapping that holds it; "" is the top-level mapping
    prefix: str  # common prefix of its names, as in the file
    chosen: str  # reason for the choice: "--key", or "the only network in it"
    normalization: Normalization | None  # None where the file does not hold it
    lost: str | None  # evidence that the network normalised but the file does not hold mean and std
    left_out: int  # number of tensors in the mapping that do not belong to the network


class _Place(NamedTuple):
    """The place of a candidate in a file."""

    node: torch_file.Node
    names: Mapping[str, str]  # clean name -> name in the file, of the whole mapping
    stem: str  # common prefix of the clean names, ending with a dot, or ""
    prefix: str  # the same prefix as written in the file
    ours: bool  # whether ibjax exported the file

    @property
    def path(self) -> str:
        return ".".join(part for part in (self.node.key, self.prefix.rstrip(".")) if part)

    def own(self) -> dict[str, Any]:
        """The network's tensors by their names without prefix, but not those of a normalisation."""
        tensors = {
            clean.removeprefix(self.stem): self.node.tensors[name]
            for clean, name in self.names.items()
            if clean.startswith(self.stem)
        }
        return {
            name: tensor
            for name, tensor in tensors.items()
            if tensor.is_floating_point() and not _is_normalization(name, tensor, self.ours)
        }


def find(file: Path, content: torch_file.Content, arch: str, key: str | None = None) -> Found:
    """The network of an architecture in a file; where there are several, the one at the path `key`.

    Where there is none, the largest state dict is returned, without the common prefix of its names; `fit.check` then
    reports what it lacks. Raises InputError or CheckpointError where no network can be chosen.
    """
    places = _places(content, arch)
    chosen = "the only network in it"
    if key is not None:
        places, chosen = _named(file, content, places, key), "--key"
    elif len(places := _distinct(places)) > 1:
        raise CheckpointError(
            f"{file} holds {len(places)} networks: {', '.join(place.path or 'its own names' for place in places)}; "
            f"say with --key=… which is meant"
        )
    place = places[0] if places else _largest(content)
    others = [other for other in _places(content, arch) if other.node is place.node and other.stem != place.stem]
    return _take(file, place, chosen, [other.stem for other in others if _equal(place.own(), other.own())])


def all_of(content: torch_file.Content) -> list[dict[str, Any]]:
    """Every state in the file that could be a network of some architecture, as {name: tensor}.

    It is used to name the closest one.
    """
    places = [place for arch in ARCHITECTURES for place in _places(content, arch)]
    return [place.own() for place in [*{place.path: place for place in places}.values(), _largest(content)]]


def _places(content, arch):
    """The candidates of a file, shorter paths first."""
    found = []
    first, *others = anchors(arch)
    for node in content.nodes:
        names = _clean(node)
        for clean in names:
            stem = clean.removesuffix(first)
            if clean.endswith(first) and stem[-1:] in ("", ".") and all(stem + other in names for other in others):
                found.append(_Place(node, names, stem, _prefix(names[clean], first), bool(content.metadata)))
    return sorted(found, key=lambda place: place.path.count("."))


def _clean(node):
    """{name without wrappers: name in the file}, without counters; wrappers stay if names would otherwise collide."""
    names = {name: name.split(".") for name in node.tensors}
    names = {name: parts for name, parts in names.items() if parts[-1] not in _COUNTERS}
    clean = {".".join(part for part in parts if part not in _WRAPPERS): name for name, parts in names.items()}
    return clean if len(clean) == len(names) else {name: name for name in names}


def _prefix(name, anchor):
    """The prefix before `anchor` in a name of the file; wrappers may separate the parts of the anchor."""
    parts, wanted = name.split("."), anchor.split(".")
    while wanted:
        if parts.pop() == wanted[-1]:
            wanted.pop()
    return "".join(f"{part}." for part in parts)


def _distinct(places):
    """The places without those whose tensors equal the tensors of an earlier one."""
    kept: list[_Place] = []
    for place in places:
        if not any(_equal(place.own(), other.own()) for other in kept):
            kept.append(place)
    return kept


def _equal(first, second):
    """Whether two sets of tensors have the same names, shapes and values."""
    torch = torch_file.modules()

    def same(one, other):
        try:
            return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
        except (RuntimeError, NotImplementedError):  # tensors without plain values
            return False

    return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)


def _named(file, content, places, key):
    """The candidate at a path, or where there is none, the state dict at that path."""
    key = key.rstrip(".")
    found = [place for place in places if key in (place.path, place.stem.rstrip("."))]
    found = found or _distinct([place for place in places if place.node.key == key])
    if len(found) == 1:
        return found
    if not found and any(node.key == key for node in content.nodes):
        node = next(node for node in content.nodes if node.key == key)
        return [_largest(content._replace(nodes=[node]))]
    there = [place.path for place in places if place.path] or [node.key for node in content.nodes if node.key]
    if len(found) > 1:
        there = [place.path for place in found]
    raise InputError(
        f"{file} has {'several networks' if found else 'nothing'} at --key={key}; "
        + (f"give one of {', '.join(there)}" if there else "it is one state dict itself: leave --key out")
    )


def _largest(content):
    """The largest state dict, without the common prefix of its names, for use in error messages."""
    node = max(content.nodes, key=lambda node: len(node.tensors))
    names, ours = _clean(node), bool(content.metadata)
    shared = [name.split(".")[:-2] for name in names if not _is_normalization(name, node.tensors[names[name]], ours)]
    depth = 0
    while shared and all(len(parts) > depth and parts[depth] == shared[0][depth] for parts in shared):
        depth += 1
    stem = "".join(f"{part}." for part in shared[0][:depth]) if shared else ""
    return _Place(node, names, stem, stem, ours)


# ---- one network -------------------------------------------------------------------------------------------


def _take(file, place, chosen, copies):
    """The network at a place; CheckpointError where its mapping holds other weights and --key was not given."""
    node, state, outside = place.node, {}, []
    constants: dict[str, tuple[float, ...]] = {}
    for clean, name in place.names.items():
        tensor = node.tensors[name]
        if not tensor.is_floating_point():
            continue
        if _is_normalization(clean, tensor, place.ours) and _stands_before(clean, place.stem):
            constants[name] = tuple(float(str(v)) for v in torch_file.array(file, name, tensor).reshape(-1))
        elif clean.startswith(place.stem):
            state[clean.removeprefix(place.stem)] = torch_file.array(file, name, tensor)
        elif not _is_normalization(clean, tensor, place.ours) and not any(clean.startswith(copy) for copy in copies):
            outside.append(name)
    if outside and chosen != "--key":
        raise CheckpointError(
            f"{file} holds more than the network below {place.prefix or 'its own names'}: it has {some(outside)}; "
            f"--key={place.path} takes that network alone"
        )
    normalization = _normalization(file, constants)
    left_out = len(node.tensors) - len(state)
    lost = None if normalization else _lost(place)
    return Found(state, node.key, place.prefix, chosen, normalization, lost, left_out)


def _is_normalization(name, tensor, ours):
    if ours and name in ("mean", "std"):  # of any number of channels
        return True
    return _last(name) in _MEANS | _STDS and tensor.numel() in (1, 3)


def _last(name):
    return name.rpartition(".")[2]


def _stands_before(name, stem):
    """Whether the module that holds a constant, or its parent, also contains the network at `stem`."""
    parts = name.split(".")
    return any(stem.startswith("".join(f"{part}." for part in above)) for above in (parts[:-1], parts[:-2]))


def _normalization(where, constants):
    """(mean, std) from {name: values} of the constants before the network; CheckpointError unless they are one pair."""
    found = {}
    for kind, names in (("mean", _MEANS), ("std", _STDS)):
        values = [constants[name] for name in constants if _last(name) in names]
        if len(values) > 1:
            raise CheckpointError(f"{where} keeps several normalisations: {', '.join(constants)}; save it with one")
        found[kind] = values[0] if values else None
    mean, std = found["mean"], found["std"]
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise CheckpointError(
            f"{where} keeps {'std' if mean is None else 'mean'} of its normalisation alone: {', '.join(constants)}; "
            f"save the network with mean and std"
        )
    if max(map(abs, mean)) > 1 or not all(0 < value <= 1 for value in std):
        raise CheckpointError(
            f"{where} keeps mean {mean} and std {std}, not those of pixels from 0 to 1; save it with those"
        )
    return mean, std


def _lost(place):
    """Says why a module, likely a normalisation, preceded the network: in a Sequential, its number is not the first."""
    parts = place.stem.split(".")[:-1]
    for i, part in enumerate(parts):
        before = "".join(f"{above}." for above in parts[:i])
        missing = [j for j in range(int(part)) if not _some_start(place, f"{before}{j}.")] if part.isdigit() else []
        if missing:
            return f"its names begin with {place.prefix}, so that something stood before the network"
    return None


def _some_start(place, start):
    return any(name.startswith(start) for name in place.names)
