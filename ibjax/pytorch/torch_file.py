"""Reads the tensors of PyTorch files, by the mappings that hold them, and verifies the files' checksums.

Files of torch.save are read with PyTorch's restricted unpickler (`weights_only=True`); no code of the file is run, and
one that holds more than tensors and plain containers is refused. torch.save writes a zip archive; every member is read
completely and its CRC compared. Three kinds of file have no checksum and are verified by their SHA-256 alone:
safetensors, the older format of torch.save, and archives written with CRCs switched off. Any exception that a damaged
file causes in the readers becomes an error of one line.
"""

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from packaging.version import Version

from ibjax.errors import CheckpointError, InputError
from ibjax.pytorch import published

METADATA = "ibjax"  # key in the metadata of safetensors under which our exports describe themselves
SAFE = "2.10"  # the first version whose torch.load(weights_only=True) no file is known to make run code
_AGAIN = "download it again"


class Node(NamedTuple):
    """A mapping of a file that holds tensors."""

    key: str  # the keys that lead to it, joined by dots; "" is the top-level mapping
    tensors: dict[str, Any]  # name -> torch.Tensor


class Content(NamedTuple):
    """The content of a file."""

    nodes: list[Node]
    sha256: str
    compared: str  # says which digest the file's SHA-256 was compared with
    metadata: dict[str, Any]  # description of the network, if ibjax exported the file; else {}


def modules() -> Any:
    """The module `torch`, which only conversion needs; InputError where it or safetensors is not installed."""
    try:
        import safetensors  # noqa: F401
        import torch
    except ModuleNotFoundError as error:
        raise InputError(f"ibjax.convert needs {error.name}: pip install 'ibjax[torch]'") from None
    return torch


def read(file: Path, sha256: str | None = None) -> Content:
    """The tensors of a file; raises InputError or CheckpointError, in one line, on anything else.

    Args:
      file: .pt, .pth, .t7, .ckpt or .safetensors; its format is recognised by its first bytes, not by its name.
      sha256: the required digest. None compares with the published digest for this file name
        (`ibjax.pytorch.published`), if there is one.
    """
    torch = modules()
    if not file.is_file():
        raise InputError(f"--torch={file} is {_no_file(file)}; give a .pt, .pth, .t7 or .safetensors file")
    try:
        digest, start = _digest(file)
    except OSError as error:
        raise InputError(f"--torch={file} cannot be read ({error.strerror})") from None
    compared = published.compare(file.name, digest, sha256)
    if other := _other_kind(file, start):
        raise CheckpointError(f"{file} is {other}")
    if _is_safetensors(file, start):
        content, metadata = _load_safetensors(file)
    else:
        content, metadata = _load(torch, file), {}
    try:
        nodes = [node for node in _nodes(torch, content) if any("." in name for name in node.tensors)]
    except RecursionError:
        raise CheckpointError(f"{file} nests its dictionaries too deep; save network.state_dict() alone") from None
    if not nodes:
        there = ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"{file} holds no state dict; it has {there or 'nothing'}; save network.state_dict() alone"
        )
    return Content(nodes, digest, compared, metadata)


def array(where: Path, name: str, tensor: Any) -> np.ndarray:
    """A tensor's values in float32, whatever its type; CheckpointError where they cannot be read."""
    try:
        return np.ascontiguousarray(tensor.detach().to(device="cpu", dtype=modules().float32).numpy())
    except (RuntimeError, TypeError, NotImplementedError, ValueError) as error:  # sparse, quantised, without values
        raise CheckpointError(f"{where}: {name} is no plain tensor ({_reason(error)}); save it as one") from None


# ---- which kind of file ------------------------------------------------------------------------------------


def _no_file(file):
    if not file.is_dir():
        return "no file"
    if (file / "config.json").is_file():
        return "a folder of ibjax, which needs no import: give it as --workdir, or to teacher.workdir"
    return "a folder"


def _digest(file):
    """(SHA-256 of a file, its first bytes)."""
    with file.open("rb") as handle:
        start = handle.read(4096)
        handle.seek(0)
        return hashlib.file_digest(handle, "sha256").hexdigest(), start


_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"7z\xbc\xaf": "7z",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_TORCH_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # in the first pickle of what torch.save wrote before PyTorch 1.6
_NO_WEIGHTS = "ibjax.convert reads PyTorch's state dicts"


def _other_kind(file, start):
    """For a file of neither torch.save nor safetensors: what it is and what to do. None where it may be one of them."""
    text = start.lstrip()[:200].lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, as a server sends that asks for a confirmation or refuses; download the file itself"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file that it stands for; run git lfs pull, or download that file"
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            return f"compressed with {name}; unpack it first"
    if start.startswith(b"\x93NUMPY"):
        return f"an array of NumPy (.npy); {_NO_WEIGHTS}"
    if start.startswith(b"\x89HDF"):
        return f"an HDF5 file, as Keras writes; {_NO_WEIGHTS}"
    if start.startswith(b"PK"):
        return _other_zip(file)
    if start[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    if re.match(rb"[\x81-\x8f](?:[\xa0-\xbf]|\xd9)", start) or start.startswith(b"\xde\x00"):
        return f"a msgpack file, as Flax writes; {_NO_WEIGHTS}"
    if re.match(rb"\x80[\x02-\x05]", start) and _TORCH_MAGIC not in start[:32]:
        return (
            "a pickle that torch.save has not written, as JAX's or NumPy's parameters are kept in, and which to load "
            f"would run code of whoever made it: refused; {_NO_WEIGHTS}"
        )
    return None


def _other_zip(file):
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except Exception:  # zipfile raises many types on damaged archives; `_load` reports them
        return None
    if any(name.endswith("/constants.pkl") for name in names):
        return (
            "a program of TorchScript (torch.jit.save); load it where it is trusted, and save its weights alone: "
            "torch.save(torch.jit.load(FILE).state_dict(), …)"
        )
    if names and all(name.endswith(".npy") for name in names):
        return f"an archive of NumPy (.npz) with {', '.join(names[:3])}; {_NO_WEIGHTS}"
    if not any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        return f"a zip archive of {', '.join(names[:3]) or 'nothing'}, none of torch.save; unpack it first"
    return None


def _is_safetensors(file, start):
    return file.suffix == ".safetensors" or (start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**27)


# ---- reading -----------------------------------------------------------------------------------------------


def _damaged(file, kind, reason):
    return CheckpointError(f"{file} is damaged, or no {kind} ({reason}); {_AGAIN}")


def _load(torch, file):
    """The content of a file of torch.save, loaded without running code: tensors and plain containers only."""
    if Version(torch.__version__) < Version(SAFE):
        raise InputError(
            f"torch {torch.__version__} may run code of a file that it loads (CVE-2025-32434, CVE-2026-24747); "
            f"pip install 'torch>={SAFE}', or give {file} as .safetensors"
        )
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                _check_members(file, archive)
        return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if not found:
            raise _damaged(file, "file of torch.save", "not to be unpickled") from None
        raise CheckpointError(
            f"{file} holds more than tensors ({found[1]}), which to load would run code of whoever made it: refused. "
            f"Where it is trusted, save the weights alone: torch.save(network.state_dict(), FILE)"
        ) from None
    except Exception as error:  # a damaged file makes zip, pickle and torch raise what they like
        raise _damaged(file, "file of torch.save", _reason(error)) from None


def _check_members(file, archive):
    """Reads every member completely, which compares its CRC; torch.load does not compare them."""
    members, wrong = archive.infolist(), []
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):  # it could grow without bounds
        raise CheckpointError(f"{file} is compressed, as torch.save writes none; load it, and save it with torch.save")
    if not any(member.CRC for member in members):  # saved after torch.serialization.set_crc32_options(False)
        return
    for member in members:
        try:
            with archive.open(member) as handle:
                while handle.read(2**20):
                    pass
        except zipfile.BadZipFile:
            wrong.append(member.filename)
    if wrong:
        others = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{file} is damaged: of its {len(members)} members {wrong[0]}{others} has a wrong checksum; {_AGAIN}"
        )


def _load_safetensors(file):
    """(tensors, the metadata of our export) of a safetensors file."""
    from safetensors import safe_open

    try:
        with safe_open(file, framework="pt") as handle:  # pyright: ignore[reportArgumentType]
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            said = (handle.metadata() or {}).get(METADATA)
        metadata = {} if said is None else json.loads(said)
    except Exception as error:  # SafetensorError, and what a damaged header makes of sizes and names
        raise _damaged(file, "safetensors file", _reason(error)) from None
    if said is not None:
        sound = isinstance(metadata, dict) and isinstance(metadata.get("model"), dict)
        if not sound or metadata.get("digest") != digest_of(file, tensors):
            raise CheckpointError(f"{file} is damaged: its tensors are not those that were exported; {_AGAIN}")
    return tensors, metadata


def digest_of(where: Path, tensors: Mapping[str, Any]) -> str:
    """SHA-256 of named tensors: names, shapes and values in float32."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = array(where, name, tensors[name])
        total.update(f"{name}:{value.shape};".encode() + value.tobytes())
    return total.hexdigest()


def _nodes(torch, content: Any, key: str = "", above: tuple[int, ...] = ()) -> Iterator[Node]:
    """The mappings of a checkpoint that hold tensors, outer ones first; keys that are not strings are skipped.

    So is a container within itself; `above` identifies those around `content`.
    """
    if id(content) in above:
        return
    above = (*above, id(content))
    if isinstance(content, list) and all(
        isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str) for p in content
    ):
        content = dict(content)  # a list of pairs, such as list(network.named_parameters())
    if not isinstance(content, Mapping):
        return
    named = {name: value for name, value in content.items() if isinstance(name, str)}
    tensors = {name: value for name, value in named.items() if torch.is_tensor(value)}
    if tensors:
        yield Node(key, tensors)
    for name, value in named.items():
        yield from _nodes(torch, value, f"{key}.{name}" if key else name, above)


def _reason(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:120] or type(error).__name__
