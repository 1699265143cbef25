"""Files: whatever bit of an archive is wrong, its arrays are the right ones or the reader says so."""

import io
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest

from ibjax import files
from ibjax.attacks import progress
from ibjax.errors import InputError, UnreadableError
from ibjax.files import read_npz

ARRAYS = {
    "images": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "turned": np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
    "words": np.array("as text"),
    "number": np.array(3),
    "nothing": np.zeros((0, 4), bool),
    "big_endian": np.arange(3, dtype=">i4"),
}


def archive(path, members, compression=zipfile.ZIP_STORED):
    """`path`, an archive of these members (bytes), with checksums that fit."""
    with zipfile.ZipFile(path, "w", compression) as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that stands twice
        for name, content in members:
            out.writestr(name, content)
    return path


def npy(array, **options):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_archive_of_numpy_comes_back_as_it_was(tmp_path, save):
    save(tmp_path / "a.npz", **ARRAYS)
    found = read_npz(tmp_path / "a.npz")
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and found[name].flags.writeable
        np.testing.assert_array_equal(found[name], array, strict=True)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_read_that_fails_is_no_damage(tmp_path, monkeypatch, save):
    """zipfile takes one for the end of the archive, and says that the file is none."""
    file, calls, failing = tmp_path / "a.npz", [], range(0)
    save(file, noise=np.frombuffer(np.random.default_rng(0).bytes(9000), np.uint8), **ARRAYS)
    monkeypatch.setattr(files, "_WAITS", (0.0, 0.0))

    class Failing(io.FileIO):
        def readinto(self, buffer):
            calls.append(None)
            if len(calls) - 1 in failing:
                raise OSError(116, "Stale file handle")
            return super().readinto(buffer)

    monkeypatch.setattr(files, "_File", type("_File", (files._File, Failing), {}))
    read_npz(file)
    for first in range(len(calls)):
        calls, failing = [], range(first, first + 1)
        assert set(read_npz(file)) == {"noise", *ARRAYS}
        calls, failing = [], range(first, 10**6)
        with pytest.raises(UnreadableError, match="Stale file handle; tried 3 times"):
            read_npz(file)


def test_a_state_of_autoattack_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def read(path):
        raise UnreadableError("it cannot be read")

    monkeypatch.setattr(progress, "read_npz", read)
    (tmp_path / "state.npz").touch()
    x = np.zeros((2, 1, 1, 1), np.float32)
    with pytest.raises(UnreadableError, match="it cannot be read") as caught:
        progress.Progress(tmp_path / "state.npz", {"version": "standard"}, np.zeros(1), x, np.ones(2, bool))
    assert "restart" not in str(caught.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_no_wrong_bit_changes_a_value_in_silence(tmp_path, save):
    arrays = {name: ARRAYS[name] for name in ("images", "number")}
    file = tmp_path / "a.npz"
    save(file, **arrays)
    content, refused = bytearray(file.read_bytes()), 0
    for place in range(len(content)):
        bit = 1 << place % 8
        content[place] ^= bit
        file.write_bytes(content)
        content[place] ^= bit
        try:
            found = read_npz(file)
        except InputError as error:
            refused += 1
            assert "a.npz" in str(error) and "\n" not in str(error)
            continue
        if set(found) == set(arrays):  # else whoever asks for a name misses it
            for name, array in arrays.items():
                np.testing.assert_array_equal(found[name], array, strict=True)
    assert refused > len(content) / 2
    for place in range(0, len(content), 7):
        file.write_bytes(content[:place])
        with pytest.raises(InputError, match=r"a\.npz"):
            read_npz(file)


def test_the_header_of_a_member_accounts_for_all_of_its_bytes(tmp_path):
    """To NumPy a header that is 4 bytes shorter means the same array, all values of it one place further back."""
    good = bytearray(npy(np.arange(64, dtype=np.float32)))
    length = struct.unpack("<H", good[8:10])[0]
    shifted = good.copy()
    shifted[8:10] = struct.pack("<H", length - 4)
    for name, content in (("a.npy", shifted), ("b.npy", good + b"more"), ("c.npy", good[:-4])):
        file = archive(tmp_path / "a.npz", [(name, bytes(content))])
        if content is shifted:
            assert np.load(file)["a"][1] == 0
        with pytest.raises(InputError, match=rf"a\.npz: its member '{name}' is damaged.*asks for \d+ bytes"):
            read_npz(file)


def test_a_member_with_another_checksum_is_refused(tmp_path):
    file = archive(tmp_path / "a.npz", [("a.npy", npy(np.arange(8)))])
    content = bytearray(file.read_bytes())
    wrong = struct.pack("<L", zlib.crc32(npy(np.arange(8))) ^ 1)
    right = struct.pack("<L", zlib.crc32(npy(np.arange(8))))
    file.write_bytes(content.replace(right, wrong))
    with pytest.raises(InputError, match=r"'a\.npy' is damaged.*CRC"):
        read_npz(file)


REFUSED = {
    "objects": ([("a.npy", npy(np.array([{}, []], object), allow_pickle=True))], "Python objects"),
    "one name twice": ([("a.npy", npy(np.arange(2))), ("a.npy", npy(np.arange(3)))], "stands twice"),
    "another format": ([("a.npy", b"\x93NUMPY\x03\x00" + bytes(80))], "version 3.0"),
    "no array": ([("a.npy", b"words")], r"member 'a\.npy'"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_no_plain_array_is_refused(tmp_path, case):
    members, words = REFUSED[case]
    with pytest.raises(InputError, match=words):
        read_npz(archive(tmp_path / "a.npz", members))


def test_members_that_are_no_arrays_are_left_out(tmp_path):
    assert read_npz(archive(tmp_path / "a.npz", [("README.txt", b"words")])) == {}


def test_a_file_that_is_no_archive_is_refused_and_an_absent_one_is_absent(tmp_path):
    (tmp_path / "a.npz").write_bytes(npy(np.arange(3)))
    with pytest.raises(InputError, match=r"a\.npz is no \.npz file"):
        read_npz(tmp_path / "a.npz")
    with pytest.raises(FileNotFoundError):
        read_npz(tmp_path / "b.npz")
