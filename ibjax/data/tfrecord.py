"""Reads TFRecord files, the default format of TFDS's own builders, without TensorFlow.

A record consists of its length n (uint64), the masked CRC-32C of the length (uint32), n bytes, and the masked CRC-32C
of these (uint32); all little-endian. Every checksum is compared. A whole file is read at once, so this is for data sets
that fit in memory.
"""

from pathlib import Path

import numpy as np

from ibjax.errors import DataError

_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), reflected
_HEAD, _TAIL = 12, 4


def read(path: Path) -> list[bytes]:
    """The records of a file; raises DataError if it is truncated or a checksum is wrong."""
    content = np.frombuffer(path.read_bytes(), np.uint8)
    starts, lengths, at = [], [], 0
    while at < len(content):
        length = int(content[at : at + 8].view("<u8")[0]) if at + _HEAD <= len(content) else len(content)
        if at + _HEAD + length + _TAIL > len(content):
            raise DataError(f"{path} is truncated or damaged at byte {at} of {len(content)}")
        starts.append(at)
        lengths.append(length)
        at += _HEAD + length + _TAIL
    starts, lengths = np.array(starts, np.int64), np.array(lengths, np.int64)
    for what, first, size in (("length", starts, np.full_like(lengths, 8)), ("record", starts + _HEAD, lengths)):
        stored = content[(first + size)[:, None] + np.arange(4)].reshape(-1).view("<u4")
        wrong = np.flatnonzero(masked(crc32c(content, first, size)) != stored)
        if wrong.size:
            raise DataError(f"{path}: the checksum of the {what} at byte {starts[wrong[0]]} is wrong; it is damaged")
    return [content[start + _HEAD :][:length].tobytes() for start, length in zip(starts, lengths, strict=True)]


def crc32c(content: np.ndarray, first: np.ndarray, size: np.ndarray) -> np.ndarray:
    """CRC-32C (uint32) of the slices content[first : first + size], a byte at a time for all slices together."""
    order = np.argsort(-size, kind="stable")  # longest first, so that the unfinished slices are a prefix
    first, size = first[order], size[order]
    crc = np.full(len(first), 0xFFFFFFFF, np.uint32)
    running = len(first)
    for i in range(int(size[0]) if len(size) else 0):
        while size[running - 1] <= i:
            running -= 1
        state = crc[:running]
        crc[:running] = _TABLE[(state ^ content[first[:running] + i]) & 0xFF] ^ (state >> np.uint32(8))
    result = np.empty_like(crc)
    result[order] = ~crc
    return result


def masked(crc: np.ndarray) -> np.ndarray:
    """The masked CRC as stored in a file: rotated right by 15 bits, plus a constant, modulo 2³²."""
    rotated = (crc.astype(np.uint64) >> 15 | crc.astype(np.uint64) << 17) & 0xFFFFFFFF
    return ((rotated + 0xA282EAD8) & 0xFFFFFFFF).astype(np.uint32)


def _table():
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(_POLYNOMIAL), table >> 1)
    return table.astype(np.uint32)


_TABLE = _table()
