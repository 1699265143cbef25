"""Tiny-ImageNet-200 (Stanford CS231n) from its zip: 200 classes, 64×64; grey images are converted to RGB.

The labels of its test set are not public, so the splits are `train` and `validation`; papers test on the latter.
Labels follow the sorted WordNet ids, as with class folders. JPEGs are decoded once, by Pillow.
"""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ibjax.data.archives import Archive, damage, opened_zip
from ibjax.data.builders import Contents, Recipe
from ibjax.errors import DataError

_ROOT = "tiny-imagenet-200"


def _read(paths: list[Path]) -> Contents:
    path = paths[0]
    with opened_zip(path) as archive:
        try:
            ids = archive.read(f"{_ROOT}/wnids.txt").decode("ascii").split()
            words = archive.read(f"{_ROOT}/words.txt").decode("utf-8").splitlines()
            rows = archive.read(f"{_ROOT}/val/val_annotations.txt").decode("ascii").splitlines()
        except KeyError as error:
            raise DataError(f"{path}: {error.args[0]}; it is not the official archive") from None
        label = {wordnet_id: i for i, wordnet_id in enumerate(sorted(ids))}
        train = []
        for name in archive.namelist():
            parts = name.split("/")  # root/train/<id>/images/<id>_<number>.JPEG
            if len(parts) == 5 and parts[1] == "train" and name.endswith(".JPEG"):
                if parts[2] not in label:
                    raise DataError(f"{path}: '{name}' is of a class that wnids.txt lacks; it is not official")
                train.append((label[parts[2]], int(parts[4].split("_")[1].removesuffix(".JPEG")), name))
        test = [(row.split("\t")[0], label[row.split("\t")[1]]) for row in rows if row]
    first_word = {line.split("\t")[0]: line.split("\t")[1].split(",")[0] for line in words if "\t" in line}
    splits = {
        "train": _images(path, [(name, label) for label, _, name in sorted(train)]),
        "validation": _images(path, [(f"{_ROOT}/val/images/{name}", label) for name, label in test]),
    }
    classes = tuple(f"{wordnet_id} {first_word.get(wordnet_id, '')}".strip() for wordnet_id in sorted(ids))
    return Contents((64, 64, 3), classes, splits)


def _images(path: Path, files: list[tuple[str, int]]) -> Iterator[tuple[np.ndarray, int]]:
    with damage(path), zipfile.ZipFile(path) as archive:
        for name, label in files:
            try:
                with Image.open(io.BytesIO(archive.read(name)), formats=("JPEG",)) as image:
                    yield np.asarray(image.convert("RGB")), label
            except Exception as error:  # zipfile and Pillow raise many types on damaged files
                reason = " ".join(str(error).split())[:120]
                raise DataError(f"{path}: '{name}' is missing or no image ({reason}); download it again") from None


TINY_IMAGENET = Recipe(
    "Tiny-ImageNet",
    (
        Archive(
            f"{_ROOT}.zip",
            f"http://cs231n.stanford.edu/{_ROOT}.zip",
            "md5:90528d7ca1a48142e341f4ef8d21d0de",
        ),
    ),
    _read,
)
