"""TFDS data sets made from official archives, without TensorFlow: uint8 `Tensor` features in ArrayRecord files.

One family a file. A `Recipe` says which archives and how to read them; `write` makes the data set. Images are in the
archive's order, so that "the first 1,000 test images" are those of every paper.
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

VERSION = "1.0.0"  # of our own format


class Contents(NamedTuple):
    """What archives hold; the splits are iterated once, in order."""

    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    splits: dict[str, Iterable[tuple[np.ndarray, int]]]  # (image uint8 of `shape`, label)


class Recipe(NamedTuple):
    """How a data set is made."""

    label: str  # how results on it are called
    archives: tuple[Archive, ...]
    read: Callable[[list[Path]], Contents]  # the archives' paths, in their order


def folder(name: str, data_dir: Path) -> Path:
    """Where `write` puts a data set: TFDS's own layout."""
    return data_dir / name / VERSION


def label(metadata: Any, classes: tuple[str, ...], own: bool) -> str:
    """How results on a data set are called, by the metadata.json that `write` made; "" where it made none.

    Raises ValueError where that of a data set of our `own` is missing or damaged: without it a copy would count as the
    official data.
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
    """Writes the data set whole or not at all, and returns its folder. `metadata` goes to metadata.json, with a digest.

    Raises DataError where an image or label is not what the contents promise.
    """
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
        """`contents` as TFDS sees it."""

        VERSION = tfds.core.Version(VERSION)

        def _info(self):
            image = tfds.features.Tensor(shape=contents.shape, dtype=np.uint8, encoding="bytes")
            label = tfds.features.ClassLabel(names=list(contents.classes))
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict({"image": image, "label": label}),
                supervised_keys=("image", "label"),
                disable_shuffling=True,  # the archive's order
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
    """Without TFDS's own progress bars."""
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        tfds.enable_progress_bar()


def _terminal():
    return sys.stderr.isatty()


def _sweep(parent):
    """Removes what a run killed a day ago has left; TFDS renames its folder only when it is whole."""
    for leftover in parent.glob("*incomplete*"):
        if time.time() - leftover.stat().st_mtime > 86_400:  # a younger one may be another's work
            shutil.rmtree(leftover, ignore_errors=True)
