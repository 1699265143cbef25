"""A committed checkpoint as it lies on disk, read without Orbax: see `ibjax.runs.checkpoint`.

First the bytes of every file are read, which tells a failing disk from damaged content. Then the OCDBT database that
these bytes form is opened in memory; its own checksums detect changed bits. Finally the digest of each leaf is compared
with the saved one.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import tensorstore

from ibjax import config, files
from ibjax.errors import CheckpointError, UnreadableError
from ibjax.runs import trees

_DATABASE = "manifest.ocdbt"  # the root of an item's database


class Place(Protocol):
    """What is read of `ibjax.runs.checkpoint.Store`."""

    directory: Path
    run: Mapping[str, Any] | None


class DamagedError(CheckpointError):
    """What is on disk is not what was saved, by a digest or by its format."""


class GoneError(CheckpointError):
    """The step was deleted while it was read."""


def manifest(store: Place, step: int) -> dict[str, Any]:
    """The manifest of a step; CheckpointError where it is of another run than the store's."""
    folder = store.directory / str(step)
    try:
        found = files.read_json(folder / "manifest" / "metadata", sealed=True)
    except UnreadableError:
        raise
    except FileNotFoundError:
        if not folder.is_dir():
            raise GoneError(f"checkpoint {step} is no longer in {store.directory}") from None
        raise DamagedError(f"checkpoint {step}: manifest is missing") from None
    except (ValueError, IsADirectoryError) as error:
        raise DamagedError(f"checkpoint {step}: manifest is damaged ({_first_line(error)})") from None
    if found["step"] != step:
        raise CheckpointError(f"{folder} holds the checkpoint of step {found['step']}; give the folder that name")
    _refuse_other_run(store, step, found.get("run"))
    return found


def _refuse_other_run(store, step, saved):
    if store.run is None or saved is None:  # older versions did not save the identity
        return
    now = json.loads(json.dumps(dict(store.run)))
    differing = [
        f"{path}={value!r}, now {now.get(path)!r}"
        for path, value in saved.items()
        if not config.same(path, value, now.get(path))
    ]
    if added := [path for path in now if path not in saved]:
        known = (*saved, *(path for path, _ in config.leaves(config.plain(config.base()))))
        for path in added:  # of a section that the run did not have, such as perturb; no option of a later version
            section = path.rpartition(".")[0]
            if section and not any(other.startswith(f"{section}.") for other in known):
                differing.append(f"no {section}, now {path}={now[path]!r}")
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise CheckpointError(
            f"checkpoint {step} in {store.directory} is of a run with {'; '.join(differing[:3])}{more}; give another "
            f"--workdir, or the configuration and the data that it was trained with"
        )


def arrays(store: Place, step: int, item: str, wanted: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """{path of a leaf: array} of an item of a step, as its manifest describes them.

    They are read once more before they are called damaged: the wrong byte may come from the transfer. `wanted` has the
    leaves of the network that is asked for; None where any will do. Raises `DamagedError`, `GoneError`, CheckpointError
    where the step is of another run or network, and UnreadableError where it temporarily cannot be read.
    """
    try:
        return _arrays(store, step, item, wanted)
    except DamagedError:
        return _arrays(store, step, item, wanted)


def _arrays(store, step, item, wanted):
    saved = manifest(store, step)[item]
    if wanted is not None:
        _refuse_other_network(step, saved, wanted)
    return files.patiently(lambda: _read_item(store.directory / str(step), item, saved), f"checkpoint {step}")


def _read_item(folder, item, saved):
    """{path of a leaf: array} of an item of a step, as its manifest describes them."""
    context = tensorstore.Context()
    content = tensorstore.KvStore.open({"driver": "memory"}, context=context).result()
    try:
        names = files.files_below(folder / item)
        for name in names:
            content.write(name, files.read_bytes(folder / item / name)).result()
    except FileNotFoundError:
        if not folder.is_dir():
            raise GoneError(f"checkpoint {folder.name} is no longer in {folder.parent}") from None
        raise DamagedError(f"checkpoint {folder.name}: {item} is missing") from None
    if _DATABASE not in names:
        raise DamagedError(f"checkpoint {folder.name}: {item}/{_DATABASE} is missing")
    arrays = {}
    for path, description in saved.items():
        where = f"checkpoint {folder.name}: {item}/{path}"
        base = {"driver": "ocdbt", "base": {"driver": "memory"}, "path": path.replace("/", ".") + "/"}
        spec = {"driver": "zarr", "kvstore": base, "fill_missing_data_reads": False}
        try:
            array = tensorstore.open(spec, context=context, open=True, read=True).result().read().result()
        except MemoryError:
            raise
        except Exception as error:  # only memory was read, so the content is damaged, not the disk
            raise DamagedError(f"{where} is damaged ({_first_line(error)})") from None
        if trees.describe(array) != description:
            raise DamagedError(f"{where} is damaged (its digest differs from the saved one)")
        arrays[path] = array
    return arrays


def _refuse_other_network(step, saved, wanted):
    differing = [
        f"{path}: saved {trees.kind(saved.get(path))}, wanted {trees.kind(trees.shape_and_type(wanted.get(path)))}"
        for path in {**wanted, **saved}
        if path not in saved
        or path not in wanted
        or trees.kind(saved[path]) != trees.kind(trees.shape_and_type(wanted[path]))
    ]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise CheckpointError(f"checkpoint {step} is of another network or optimiser: {'; '.join(differing[:3])}{more}")


def _first_line(error):
    text = str(error).partition(" [tensorstore_spec")[0].strip()
    return (text or type(error).__name__).splitlines()[0][:200]
