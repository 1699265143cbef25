"""Writes the files of an analysis, and logs where they are."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ibjax import files

log = logging.getLogger(__name__)


@contextmanager
def writing(file: Path) -> Iterator[Path]:
    """A temporary path that becomes `file` if the block succeeds; creates the folder and reports the file's path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(file) as temporary:
        yield temporary
    log.info("written: %s", file)


def record(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    """Writes `folder`/`name`.json, by the first process; a "/" in the name, as of an attack's options, becomes "_"."""
    if jax.process_index() == 0:
        files.write_json(file := _file(folder, name, "json"), content)
        log.info("written: %s", file)


def arrays(folder: Path, name: str, content: Mapping[str, np.ndarray]) -> None:
    """Writes `folder`/`name`.npz, by the first process."""
    if jax.process_index() == 0:
        with writing(_file(folder, name, "npz")) as temporary, temporary.open("wb") as handle:
            np.savez_compressed(handle, **content)


def _file(folder, name, suffix):
    return folder / f"{name.replace('/', '_')}.{suffix}"
