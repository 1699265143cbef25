"""Class folders: train/<class>/*.jpg and test/<class>/*.jpg; labels follow the sorted names, numeric names by value.

    data=dict(name="folder", path="DIR", size=64, fit="crop")    # images of different sizes: centre crops of 64×64

A class consists of the images in and below its folder. The test folder is `test` or, if that has no labels, `val` or
`validation`. Instead of class folders there may be a table of labels, as Tiny-ImageNet's val/val_annotations.txt.
Hidden files and folders are ignored, and so are files that are not images of a class, with a warning that names them.
Images are rotated according to their EXIF orientation. Decoded images are kept for the next run (`ibjax.data.decoded`).
"""

import collections
import io
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, features

from ibjax import files
from ibjax.data import Arrays, Split, decoded, listed, require_classes, stamps
from ibjax.errors import DataError, InputError, check_range, nearest

log = logging.getLogger(__name__)

# Formats that Pillow decodes by itself; for some others it runs a program, such as Ghostscript for EPS.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "PPM", "GIF", "TIFF", "JPEG2000", "AVIF")
TEST_FOLDERS = ("test", "val", "validation")
FITS = {"crop": "centre crops of", "stretch": "stretched to"}  # option -> description in results
_LITTER = ("Thumbs.db", "desktop.ini", "__MACOSX")
_ORIENTATION = 0x0112  # EXIF tag; 1: upright
# a file of a known archive -> the data set that `ibjax.data.prepare` makes from that archive
_KNOWN = {
    "data_batch_1*": "cifar10",
    "train.bin": "cifar100",
    "*-idx3-ubyte*": "mnist",
    "train_32x32.mat": "svhn_cropped",
    "train_X.bin": "stl10",
    "cifar10.1_v6_*.npy": "cifar10_1",
}


def load(
    *,
    path: str,
    label: str = "",
    grey: bool = False,
    size: int | None = None,
    fit: str = "crop",
    cache: str | None = None,
) -> Arrays:
    """Reads every image under `path` into memory.

    Args:
      path: the folder that holds train/ and test/.
      label: name of the data in results; empty: the folder's name. With `size`, `fit` is added to the name.
      grey: read images with one channel instead of RGB.
      size: side of the images in pixels; None: all images already have the same size.
      fit: how an image becomes a square: "crop" takes the largest central square, "stretch" rescales the whole image.
      cache: folder in which decoded images are kept; None: ibjax's own, see `files.cache_folder`; empty: they are not.

    Raises DataError with the file or folder, what is wrong with it, and what is expected.
    """
    if size is not None:
        check_range("data.size", size, 1)
    if fit not in FITS:
        raise InputError(f"data.fit='{fit}' is unknown; {nearest(fit, FITS)}")
    root = files.path(path)
    trees, splits = _splits(root)
    classes = _numbered(splits[0])
    if unknown := sorted(set(splits[1]) - set(classes)):
        raise DataError(f"{trees[1].root} has classes that train/ lacks: {listed(unknown)}; there: {listed(classes)}")
    chosen = [[(file, i) for i, c in enumerate(classes) for file in split.get(c, ())] for split in splits]
    pictures = stamps(image for tree in trees for image in tree.images)
    read = (*stamps([root, *(folder for tree in trees for folder in tree.folders)]), *pictures)
    _say_what_is_left_out(root, trees)
    for tree, split in zip(trees, chosen, strict=True):
        if not split:
            raise DataError(f"{tree.root} has no images; allowed: {', '.join(sorted(_suffixes()))}")
    require_classes(root, np.array([i for _, i in chosen[0]]), len(classes), "fill their folders, or remove them")
    name = label or root.name
    if size is not None:
        name += f", {FITS[fit]} {size}×{size}"
    options = (grey, size, fit)

    def decode():
        return {name: _read(split, *options) for name, split in zip(("train", "test"), chosen, strict=True)}

    shown = [[str(file) for file, _ in split] for split in chosen]
    images = decoded.kept(cache, (str(root.absolute()), options), pictures, (shown, options, _decoders()), decode)
    train, test = (
        Split(images[name], np.array([label for _, label in split]))
        for name, split in zip(("train", "test"), chosen, strict=True)
    )
    return Arrays(train, test, len(classes), label=name, classes=tuple(classes), read=read)


def _decoders():
    """What decides how a file is decoded: this module, Pillow and its libraries."""
    libraries = [features.version(name) for name in ("jpg", "libjpeg_turbo", "webp", "jpg_2000")]
    return files.digest(Path(__file__).read_bytes()), Image.__version__, libraries


def _numbered(names):
    """Class names in the order of their labels."""
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names)


# ---- which files -------------------------------------------------------------------------------------------


class _Tree(NamedTuple):
    """The content of a folder and its subfolders, sorted by path; hidden files and folders are listed separately."""

    root: Path
    folders: list[Path]
    images: list[Path]
    others: list[Path]
    hidden: list[Path]


def _walk(root):
    def fail(error):
        raise DataError(f"{error.filename} cannot be read ({error.strerror}); mend it, or remove it")

    tree, suffixes = _Tree(root, [], [], [], []), _suffixes()
    for parent, folders, names in os.walk(root, onerror=fail, followlinks=True):
        at = Path(parent)
        tree.folders.append(at)
        tree.hidden.extend(at / name for name in sorted((*folders, *names)) if _hidden(name))
        folders[:] = sorted(name for name in folders if not _hidden(name))
        for name in sorted(name for name in names if not _hidden(name)):
            (tree.images if Path(name).suffix.lower() in suffixes else tree.others).append(at / name)
    return tree


def _hidden(name):
    return name.startswith(".") or name in _LITTER


def _suffixes():
    Image.init()
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS and kind in Image.OPEN}


def _splits(root):
    """((train tree, test tree), (train, test)), the last two as {class: images}."""
    candidates = [root / name for name in TEST_FOLDERS if (root / name).is_dir()]
    if not (root / "train").is_dir() or not candidates:
        raise DataError(f"data.path={root} has no folders train/ and test/ with one folder per class{_hint(root)}")
    tree = _walk(root / "train")
    train = _by_class(tree)
    if train is None:
        raise DataError(_wanted(root / "train"))
    for folder in candidates:
        other = _walk(folder)
        test = _by_class(other)
        if test is not None:
            return (tree, other), (train, test)
    raise DataError(_wanted(candidates[0]))


def _by_class(tree):
    """{class: images}; None if the classes of the images are not given."""
    table = tree.root / f"{tree.root.name}_annotations.txt"
    if table.is_file():
        return _from_table(table, tree)
    classes = {folder.name: [] for folder in tree.folders if folder.parent == tree.root}
    if not classes or set(classes) == {"images"}:  # Tiny-ImageNet's test/images: its labels are not public
        return None
    for image in tree.images:
        if image.parent == tree.root:
            tree.others.append(image)
        else:
            classes[image.relative_to(tree.root).parts[0]].append(image)
    return classes


def _from_table(table, tree):
    """{class: images} from the lines FILE<TAB>CLASS<TAB>… of a table; the files may be anywhere below its folder."""
    try:
        lines = table.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{table} cannot be read ({error}); copy it again") from None
    images, classes = {image.name: image for image in tree.images}, collections.defaultdict(list)
    if len(images) < len(tree.images):
        twice = [name for name, count in collections.Counter(image.name for image in tree.images).items() if count > 1]
        raise DataError(f"{table}: below {tree.root} more than one file is called {listed(twice)}; keep one of each")
    for number, line in enumerate(lines, 1):
        name, _, rest = line.partition("\t")
        label = rest.partition("\t")[0].strip()
        if not label or name not in images:
            raise DataError(
                f"{table}, line {number}: '{line[:60]}' is not FILE<TAB>CLASS of another file below {tree.root}"
            )
        classes[label].append(images.pop(name))
    tree.folders.append(table)  # a change of the table is a change of the data
    tree.others.extend(images.values())
    return dict(classes)


def _say_what_is_left_out(root, trees):
    others, hidden = ([str(file.relative_to(root)) for tree in trees for file in tree[i]] for i in (3, 4))
    if others:
        log.warning("%s: %d files are left out, no images of a class: %s", root, len(others), listed(others, 3))
    if hidden:
        log.info("%s: hidden, and left out: %s", root, listed(hidden, 3))


def _wanted(folder):
    name = folder.name
    imagenet = "; ImageNet itself is read as data.name='stream'" if any(folder.glob("ILSVRC2012_*")) else ""
    return (
        f"{folder} has no class folders; give {name}/<class>/*.jpg, or {name}/{name}_annotations.txt with a line "
        f"FILE<TAB>CLASS for each image{imagenet}"
    )


def _hint(root):
    for pattern, dataset in _KNOWN.items():
        if root.is_dir() and any(root.glob(pattern)):
            return f"; of its archive, python -m ibjax.data.prepare --dataset={dataset} makes data.name='tfds'"
    return ""


# ---- images ------------------------------------------------------------------------------------------------


def _read(files: Sequence[tuple[Path, int]], grey, size, fit) -> np.ndarray:
    """The images of (file, label) pairs, in their order."""
    turned = []
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda pair: _image(pair[0], grey, size, fit), files)
        for i, ((file, _), (image, was_turned)) in enumerate(zip(files, found, strict=True)):
            if i == 0:
                images = np.empty((len(files), *image.shape), np.uint8)
            elif image.shape != images.shape[1:]:
                pool.shutdown(wait=False, cancel_futures=True)
                raise DataError(
                    f"{file} is {image.shape[:2]}, {files[0][0]} is {images.shape[1:3]}; give data.size=PIXELS to make "
                    f"them one size, or resize them"
                )
            images[i] = image
            turned += [file] * was_turned
    if turned:
        log.info("%d images are turned as their EXIF orientation says, as %s", len(turned), turned[0])
    return images


def _image(file, grey, size, fit):
    """(an image (H, W) or (H, W, 3) uint8, whether it was rotated); raises DataError naming the file."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); mend it, or remove it") from None
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.format == "PNG":  # its checksums are not compared by decoding alone
                image.verify()
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if problem := _unfit(image):
                raise DataError(f"{file} {problem}")
            upright = _upright(image)
            pixels = upright.convert("L" if grey else "RGB")
            return np.asarray(pixels if size is None else _fitted(pixels, size, fit)), upright is not image
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(f"{file} is not a readable image ({reason}); remove it or copy it again") from None


def _unfit(image):
    """Why a file cannot be used as one image of a class, such as an animation; empty if it can."""
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or np.inf):
        return f"has {image.width}×{image.height} pixels, more than {Image.MAX_IMAGE_PIXELS:,}; make it smaller"
    if image.mode.startswith(("I", "F")):
        return f"has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits"
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # MPO: a camera's JPEG, followed by a preview
        return f"has {frames} frames; keep one of them"
    return ""


def _upright(image):
    """The image rotated according to its EXIF orientation; unchanged if there is none, or none that can be read."""
    try:
        turned = image.getexif().get(_ORIENTATION, 1) in range(2, 9)
    except Exception:  # damaged EXIF data are common; viewers then ignore them
        turned = False
    return ImageOps.exif_transpose(image) if turned else image


def _fitted(image, size, fit):
    """The image as a square of side `size` pixels."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side) if fit == "crop" else (0, 0, width, height)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)
