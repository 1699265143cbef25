"""Reads TFRecord files, the default format of TFDS's own builders, without TensorFlow.

A record consists of its length n (uint64), the masked CRC-32C of the length (uint32), n bytes, and the masked CRC-32C
of these (uint32); all little-endian. Every checksum is compared. A whole file is read at once, so this is for data sets
that fit in memory.
"""

from pathlib import Path

import google_crc32c

from ibjax.errors import DataError

_LENGTH, _CRC = 8, 4  # bytes


def read(path: Path) -> list[bytes]:
    """The records of a file; raises DataError if it is truncated or a checksum is wrong."""
    content, records, at = path.read_bytes(), [], 0

    def part(what, size):
        """The next `size` bytes, after a comparison with their checksum."""
        nonlocal at
        end = at + size + _CRC
        if end > len(content):
            raise DataError(f"{path} is truncated or damaged at byte {at} of {len(content)}")
        found = content[at : at + size]
        if masked_crc(found) != int.from_bytes(content[at + size : end], "little"):
            raise DataError(f"{path}: the checksum of the {what} at byte {at} is wrong; it is damaged")
        at = end
        return found

    while at < len(content):
        length = int.from_bytes(part("length", _LENGTH), "little")
        records.append(part("record", length))
    return records


def masked_crc(content: bytes) -> int:
    """The CRC-32C as stored in a file: rotated right by 15 bits, plus a constant, modulo 2³²."""
    crc = google_crc32c.value(content)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
