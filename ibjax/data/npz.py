"""One `.npz` file in Keras's layout: x_train, y_train, x_test, y_test. Objects in it are never unpickled."""

import zipfile
from pathlib import Path

import numpy as np

from ibjax.data import Arrays, Split
from ibjax.errors import DataError

KEYS = ("x_train", "y_train", "x_test", "y_test")


def load(*, path: str, label: str = "", num_classes: int | None = None) -> Arrays:
    """Reads `path`; without `num_classes` there are as many classes as the largest training label says."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"data.path={path} is no file; give an .npz with {', '.join(KEYS)}")
    try:
        with file.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
            missing = [key for key in KEYS if key not in archive]
            if missing:
                raise DataError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(archive.files) or 'nothing'}")
            x_train, y_train, x_test, y_test = (archive[key] for key in KEYS)
    except DataError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}); it is damaged or no .npz: copy it again") from None
    if not np.issubdtype(y_train.dtype, np.integer) or y_train.size == 0:
        raise DataError(f"{path}: y_train has type {y_train.dtype} and {y_train.size} values; expected integer labels")
    classes = int(y_train.max()) + 1 if num_classes is None else num_classes
    return Arrays(Split(x_train, y_train), Split(x_test, y_test), classes, label=label or file.stem)
