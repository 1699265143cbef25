"""Writes folders completely or not at all, and never overwrites anything."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ibjax.errors import InputError


def refuse_existing(folder: Path) -> None:
    """Raises InputError unless `folder` does not exist or is an empty folder, and has a name to be renamed to."""
    if not folder.name:
        raise InputError(f"{folder} cannot be replaced as a whole; name a new folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder; give another, or delete it")


@contextlib.contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `folder` if the block succeeds, and deleted otherwise."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error.strerror}); give another folder") from None
    try:
        yield temporary
        refuse_existing(folder)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
