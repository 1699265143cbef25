"""Makes a TFDS data set from its official archives, without TensorFlow.

    python -m ibjax.data.prepare --dataset=cifar10 --archives=DIR --data_dir=DIR [--download] [--unverified]

Data sets: cifar10 cifar100 svhn_cropped mnist fashion_mnist stl10 tiny_imagenet cifar10_c cifar100_c cifar10_1
cifar10_1_v4. The archives' digests are checked and recorded. The data set is written completely or not at all; an
existing one is not changed.
"""

import json
import logging
from pathlib import Path

from ibjax import cli, errors, files
from ibjax.data import archives, builders
from ibjax.data.builders import Recipe, cifar, cifar10_1, cifar_c, mnist, stl10, svhn, tiny_imagenet
from ibjax.errors import DataError, nearest

log = logging.getLogger(__name__)

RECIPES: dict[str, Recipe] = {
    "cifar10": cifar.CIFAR10,
    "cifar100": cifar.CIFAR100,
    "svhn_cropped": svhn.SVHN,
    "mnist": mnist.MNIST,
    "fashion_mnist": mnist.FASHION_MNIST,
    "stl10": stl10.STL10,
    "tiny_imagenet": tiny_imagenet.TINY_IMAGENET,
    "cifar10_c": cifar_c.CIFAR10_C,
    "cifar100_c": cifar_c.CIFAR100_C,
    "cifar10_1": cifar10_1.CIFAR10_1,
    "cifar10_1_v4": cifar10_1.CIFAR10_1_V4,
}


def prepare(
    dataset: str,
    data_dir: Path,
    archives_dir: Path | None = None,
    *,
    download: bool = False,
    unverified: bool = False,
    label: str = "",
) -> Path:
    """Makes `dataset` in `data_dir` and returns its folder.

    Args:
      dataset: one of the names above.
      data_dir: TFDS's folder of data sets.
      archives_dir: folder of the archives, to which they are also downloaded; None: `data_dir`/downloads.
      download: download missing archives.
      unverified: accept archives that are not the official ones; the label then says so.
      label: name of the data in results; empty: its usual name.

    Raises DataError naming the archive that is missing, damaged or not the official one.
    """
    if dataset == "imagenet2012":
        raise DataError(
            "imagenet2012 needs TFDS's own builder and TensorFlow: pip install 'ibjax[prepare]', then "
            f"tfds build imagenet2012 --file_format=array_record --data_dir={data_dir}"
        )
    if dataset not in RECIPES:
        raise DataError(f"--dataset={dataset} is unknown; {nearest(dataset, RECIPES)}")
    recipe, folder = RECIPES[dataset], builders.folder(dataset, data_dir)
    if folder.is_dir():
        log.info("%s: already prepared; delete it to make it again", folder)
        return folder
    source = archives_dir or data_dir / "downloads"
    paths = [archives.find(archive, source, download) for archive in recipe.archives]
    checked = [archives.verify(archive, path, unverified) for archive, path in zip(recipe.archives, paths, strict=True)]
    official = all(is_official for _, is_official in checked)
    metadata = {
        "label": label or recipe.label + ("" if official else " (unofficial archive)"),
        "archives": {path.name: digest for path, (digest, _) in zip(paths, checked, strict=True)},
    }
    made = builders.write(dataset, recipe.read(paths), data_dir, metadata)
    counts = {split["name"]: sum(map(int, split["shardLengths"])) for split in _info(made)["splits"]}
    log.info("%s: %s, %s", made, metadata["label"], ", ".join(f"{n} {split}" for split, n in counts.items()))
    return made


def _info(folder):
    return json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))


def parser() -> cli.Parser:
    """The arguments of this module."""
    parser = cli.parser("ibjax.data.prepare", __doc__)
    parser.add_argument("--dataset", required=True, help=", ".join(RECIPES))
    parser.add_argument("--data_dir", type=files.path, required=True, help="TFDS's folder of data sets")
    parser.add_argument("--archives", type=files.path, help="folder of the archives; default: DATA_DIR/downloads")
    parser.add_argument("--download", action="store_true", help="fetch the archives that are missing")
    parser.add_argument("--unverified", action="store_true", help="accept archives that are not the official ones")
    parser.add_argument("--label", default="", help="the data set's name in results; default: its usual name")
    return parser


def main() -> None:
    """The command line of this module."""
    given = parser().parse_args()
    errors.exit_with(
        lambda: prepare(
            given.dataset,
            given.data_dir,
            given.archives,
            download=given.download,
            unverified=given.unverified,
            label=given.label,
        )
    )


if __name__ == "__main__":
    main()
