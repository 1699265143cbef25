"""Data sets too large for memory, as ImageNet: read lazily, decoded, cropped and resized by Grain's worker threads.

    stored = tfds.find("imagenet2012", data_dir)          # a stock copy, made with --file_format=array_record
    for batch in stream.batches(stored, "train", batch_size=256, train=True, seed=0, step=1000): …

Needs the extra `imagenet`. It is a reader on its own: `ibjax.train` holds its data in device memory and does not take
it.

Guarantees (tests of the same names): a batch is a function of seed and step, so that reading can begin at any step with
the same batches; an epoch shows every image once, but for a last incomplete batch.
"""

import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from ibjax.data import tfds
from ibjax.errors import DataError, InputError

_RESIZED = 256 / 224  # the shorter side of a test image, over the side of the crop that is shown


def batches(
    stored: tfds.Stored,
    split: str,
    *,
    batch_size: int,
    train: bool,
    size: int = 224,
    seed: int = 0,
    step: int = 0,
    threads: int = 16,
) -> Iterator[dict[str, np.ndarray]]:
    """{"image": (B, size, size, 3) uint8, "label": (B,) int32, "index": (B,) int64 in the split}, from `step` on.

    Args:
      stored: from `tfds.find`.
      split: as "train" or "validation".
      batch_size: images in a batch.
      train: random resized crops, flips and a new order in each epoch, without end and without incomplete batches; else
        centre crops, in order, once, and the last batch may be smaller.
      size: side of the images that are returned.
      seed: of order and crops.
      step: number of the first batch, counted over all epochs.
      threads: that read and decode.

    Raises DataError when the files cannot be read at random or are damaged, InputError on impossible arguments.
    """
    try:
        import grain
    except ModuleNotFoundError:
        raise InputError("ibjax.data.stream needs Grain: pip install 'ibjax[imagenet]'") from None
    count = stored.counts.get(split, 0)
    if not 0 < batch_size <= count:
        raise InputError(f"batch_size={batch_size} of {count} images of split '{split}'; give 1 to their number")
    source = _Encoded(stored, split)
    indices = grain.MapDataset.source(range(count)).seed(seed)
    if train:
        data = indices.shuffle().random_map(lambda index, rng: source.image(index, size, rng))
        data = data.batch(batch_size, drop_remainder=True).repeat()
    else:
        data = indices.map(lambda index: source.image(index, size, None)).batch(batch_size)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(data[step:].to_iter_dataset(options))


class _Encoded:
    """The records of a split with their images as they are stored."""

    def __init__(self, stored: tfds.Stored, split: str):
        import tensorflow_datasets

        self.stored, self.split, self.keys = stored, split, stored.keys
        decoders: Any = {self.keys[0]: tensorflow_datasets.decode.SkipDecoding()}
        try:
            self.source = stored.builder.as_data_source(split=split, decoders=decoders)
        except NotImplementedError:
            kind = stored.builder.info.file_format.value
            raise DataError(
                f"{stored.folder} holds {kind} files, which cannot be read at random; where TensorFlow is installed: "
                f"tfds convert_format --dataset_version_dir={stored.folder} --out_file_format=array_record"
            ) from None

    def image(self, index: int, size: int, rng: np.random.Generator | None) -> dict[str, Any]:
        """One example; a random crop with `rng`, else the centre."""
        try:
            record = self.source[index]
            with Image.open(io.BytesIO(record[self.keys[0]])) as encoded:
                image = encoded.convert("RGB")
        except Exception as error:
            raise tfds.damaged(self.stored, self.split, error) from None
        width, height = image.size
        box = _centre(width, height) if rng is None else _random_box(width, height, rng)
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=3.0))
        if rng is not None and rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        return {"image": pixels, "label": np.int32(record[self.keys[1]]), "index": np.int64(index)}


def _centre(width, height):
    """The square that resizing the shorter side to 256 and cutting 224 out of the middle would show."""
    side = min(width, height) / _RESIZED
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


def _random_box(width, height, rng):
    """A box of 8 to 100 % of the area, its ratio log-uniform in 3:4 to 4:3; after ten misfits, the largest square."""
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side
