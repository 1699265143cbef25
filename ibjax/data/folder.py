"""Class folders: train/<class>/*.png|jpg and test/<class>/*; classes are numbered in sorted order."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ibjax.data import Arrays, Split
from ibjax.errors import DataError

SUFFIXES = {".png", ".jpg", ".jpeg"}


def load(*, path: str, label: str = "", grey: bool = False) -> Arrays:
    """Reads every image under `path`, as RGB or, with `grey`, as one channel."""
    root = Path(path).expanduser()
    if not (root / "train").is_dir() or not (root / "test").is_dir():
        raise DataError(f"data.path={path} has no folders train/ and test/ with one folder per class")
    classes = _folders(root / "train")
    if not classes or classes != _folders(root / "test"):
        raise DataError(f"{path}: train/ and test/ must have the same class folders, and at least one")
    train, test = (_read(root / split, classes, grey) for split in ("train", "test"))
    return Arrays(train, test, len(classes), label=label or root.name)


def _folders(folder):
    return sorted(child.name for child in folder.iterdir() if child.is_dir())


def _read(folder, classes, grey):
    files = [
        (file, index)
        for index, name in enumerate(classes)
        for file in sorted((folder / name).iterdir())
        if file.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise DataError(f"{folder} has no images; allowed: {', '.join(sorted(SUFFIXES))}")
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(lambda pair: _image(pair[0], grey), files))
    for (file, _), image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            raise DataError(f"{file} is {image.shape[:2]}, {files[0][0]} is {images[0].shape[:2]}; resize to one size")
    return Split(np.stack(images), np.array([index for _, index in files]))


def _image(file, grey):
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{file} has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits")
            return np.asarray(image.convert("L" if grey else "RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise DataError(f"{file} is not a readable image ({error}); remove it or copy it again") from None
