"""TFDS data sets made from official archives, without TensorFlow: uint8 `Tensor` features in ArrayRecord files.

Each module has one family of data sets. A `Recipe` names the archives and the function that reads them; `write` makes
the data set. Images keep the archive's order, so "the first 1,000 test images" are the same as in papers.
"""

import contextlib
import hashlib
import io
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ibjax.data.archives import Archive
from ibjax.errors import DataError

VERSION = "1.0.0"  # version of the format that `write` produces


class Contents(NamedTuple):
    """The content of a data set's archives; each split is iterated once, in order."""

    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    splits: dict[str, Iterable[tuple[np.ndarray, int]]]  # (image uint8 of `shape`, label)


class Recipe(NamedTuple):
    """How a data set is made from archives."""

    label: str  # name of the data in results
    archives: tuple[Archive, ...]
    read: Callable[[list[Path]], Contents]  # the archives' paths, in their order


def folder(name: str, data_dir: Path) -> Path:
    """The folder in which `write` puts a data set, in TFDS's layout."""
    return data_dir / name / VERSION


def label(metadata: Any, classes: tuple[str, ...], own: bool) -> str:
    """The name of a data set in results, from the metadata.json of `write`; "" for data sets that `write` did not make.

    Raises ValueError if the file of a data set made by `write` (`own`) is missing or damaged, as a copy of other data
    would otherwise count as the official data.
    """
    recorded = dict(metadata or {})
    digest, name = recorded.pop("digest", None), recorded.get("label", "")  # earlier versions wrote no digest
    nameless = own and digest is None and not name
    if nameless or digest not in (None, _digest(recorded, classes)) or not isinstance(name, str):
        raise ValueError("metadata.json or the names of the classes are not as they were written")
    return name


def _digest(metadata, classes):
    text = json.dumps([metadata, classes], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def write(name: str, contents: Contents, data_dir: Path, metadata: dict[str, Any]) -> Path:
    """Writes the data set atomically and returns its folder. `metadata` goes to metadata.json, with a digest.

    Raises DataError if an image or a label is not as `contents` declares.
    """
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
        """A TFDS builder that yields `contents`."""

        VERSION = tfds.core.Version(VERSION)

        def _info(self):
            image = tfds.features.Tensor(shape=contents.shape, dtype=np.uint8, encoding="bytes")
            label = tfds.features.ClassLabel(names=list(contents.classes))
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict({"image": image, "label": label}),
                supervised_keys=("image", "label"),
                disable_shuffling=True,  # keeps the archive's order
                metadata=tfds.core.MetadataDict({**metadata, "digest": _digest(metadata, contents.classes)}),
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in contents.splits}

        def _generate_examples(self, split):
            progress = tqdm(contents.splits[split], desc=f"{name} {split}", unit="image", disable=not _terminal())
            for i, (image, label) in enumerate(progress):
                if image.shape != contents.shape or image.dtype != np.uint8:
                    raise DataError(
                        f"{name} {split}: image {i} is {image.dtype} {image.shape}, not uint8 {contents.shape}"
                    )
                if not 0 <= int(label) < len(contents.classes):
                    raise DataError(f"{name} {split}: image {i} has label {label} of {len(contents.classes)} classes")
                yield i, {"image": np.ascontiguousarray(image), "label": int(label)}

    Builder.name = name
    _sweep(data_dir / name)
    with contextlib.redirect_stdout(io.StringIO()), _quiet(tfds):  # TFDS announces a download of unknown size
        builder = Builder(data_dir=str(data_dir), file_format="array_record")
        with tempfile.TemporaryDirectory() as unused:
            builder.download_and_prepare(download_dir=unused)
    return folder(name, data_dir)


@contextlib.contextmanager
def _quiet(tfds):
    """A context without TFDS's own progress bars."""
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        tfds.enable_progress_bar()


def _terminal():
    return sys.stderr.isatty()


def _sweep(parent):
    """Removes incomplete folders of killed runs, at least a day old; TFDS renames a folder only when it is complete."""
    for leftover in parent.glob("*incomplete*"):
        if time.time() - leftover.stat().st_mtime > 86_400:  # a younger one may belong to a running process
            shutil.rmtree(leftover, ignore_errors=True)
