"""Writes the files of an analysis, and logs where they are.

Guarantee (test of the same name): a result made with other settings, or of other weights, is kept beside the new one.
"""

import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ibjax import files

log = logging.getLogger(__name__)
_OF_THE_MACHINE = ("versions", "commit", "hardware", "jax", "seconds")  # in which two records of one result may differ


@contextmanager
def writing(file: Path) -> Iterator[Path]:
    """A temporary path that becomes `file` if the block succeeds; creates the folder and reports the file's path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(file) as temporary:
        yield temporary
    log.info("written: %s", file)


def record(folder: Path, name: str, content: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
    """Writes `folder`/`name`.json, and the arrays into `folder`/`name`.npz, by the first process.

    A "/" in the name, as of an attack's options, becomes "_". Files of another result under this name, as with other
    attacks or another number of images, are renamed to `name`.1 and so on.
    """
    if jax.process_index() != 0:
        return
    file = folder / f"{name.replace('/', '_')}.json"
    if file.is_file() and _result(file) != _plain(content):
        _set_aside(file)
    files.write_json(file, content)
    log.info("written: %s", file)
    if arrays is not None:
        with writing(file.with_suffix(".npz")) as temporary, temporary.open("wb") as handle:
            np.savez_compressed(handle, **arrays)


def _result(file):
    """What a record says of its result; None where it cannot be read."""
    try:
        return _plain(files.read_json(file))
    except ValueError:
        return None


def _plain(content):
    kept = {name: value for name, value in content.items() if name not in _OF_THE_MACHINE}
    return json.loads(json.dumps(kept))


def _set_aside(file):
    """Renames a record, and the arrays beside it, to the first number that is free."""
    name = next(name for i in itertools.count(1) if not file.with_stem(name := f"{file.stem}.{i}").exists())
    for old in (file, file.with_suffix(".npz")):
        if old.exists():
            old.rename(old.with_stem(name))
            log.info("%s, of other settings, is now %s", old, old.with_stem(name).name)
