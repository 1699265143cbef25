"""Shows a data set: a picture with a few images of each class, and the numbers of images.

    python -m ibjax.data.gallery --out=FILE.png name=tfds dataset=mnist data_dir=DIR

The options are those of a configuration's `data` section. The command prints a row of docs/data.md.
"""

import ast

import jax
import numpy as np
from PIL import Image

from ibjax import cli, config, errors, files
from ibjax.data import Arrays, Split, augment, load_splits
from ibjax.errors import InputError
from ibjax.net import to_float

_COLUMNS = 20  # maximum number of classes shown
_EDGE = 1  # pixels between images


def picture(split: Split, *, rows: int = 3, augmented: int = 2, pad: int = 4, padding: str = "edge") -> np.ndarray:
    """(height, width, 3) uint8: a column per class, `rows` rows of images, then `augmented` augmented first rows."""
    classes = np.unique(split.labels)[:_COLUMNS]
    chosen = np.stack([np.flatnonzero(split.labels == c)[np.arange(rows) % (split.labels == c).sum()] for c in classes])
    grid = [np.asarray(to_float(jax.numpy.asarray(split.images[chosen[:, row]]))) for row in range(rows)]
    change = augment.crop_and_flip(pad=pad, padding=padding, flip=split.images.shape[-1] == 3)
    if change is not None:
        grid += [np.asarray(change(jax.random.key(i), grid[0])) for i in range(augmented)]
    framed = [np.pad(row, ((0, 0), (_EDGE, _EDGE), (_EDGE, _EDGE), (0, 0)), constant_values=1.0) for row in grid]
    whole = np.concatenate([np.concatenate(list(row), axis=1) for row in framed], axis=0)
    return np.round(255 * np.broadcast_to(whole, (*whole.shape[:2], 3))).astype(np.uint8)


def counts(data: Arrays) -> str:
    """A row of a Markdown table: label, images of each split, shape, classes, fewest and most images of a class."""
    sizes = [len(split.labels) if split is not None else 0 for split in (data.train, data.val, data.test)]
    balance = []
    for split in (data.train, data.test):
        members = np.bincount(split.labels, minlength=data.num_classes)
        balance.append(f"{members.min()} – {members.max()}")
    shape = "×".join(map(str, data.train.images.shape[1:]))
    cells = [data.label, *(f"{size:,}" for size in sizes), shape, data.num_classes, *balance]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """The command line of this module."""
    parser = cli.parser("ibjax.data.gallery", __doc__)
    parser.add_argument("--out", type=files.path, required=True, help="the picture, a .png")
    parser.add_argument("options", nargs="+", help="KEY=VALUE of a data section; name=… is needed")
    given = parser.parse_args()

    def command():
        section = dict(_option(text) for text in given.options)
        if "name" not in section:
            raise InputError("name=… is missing; it says which source, as name=tfds")
        val_size = section.pop("val_size", 0)
        options = config.arguments("data", section, "data")
        data = load_splits(config.factory("data", section["name"]), val_size=val_size, **options)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        small = min(data.train.images.shape[1:3]) // 8
        Image.fromarray(picture(data.train, pad=small)).save(given.out, optimize=True)
        print(counts(data))

    errors.exit_with(command)


def _option(text):
    key, separator, value = text.partition("=")
    if not separator:
        raise InputError(f"'{text}' is no KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


if __name__ == "__main__":
    main()
