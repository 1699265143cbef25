"""The cache of compiled programs: a digest per entry, compared before it is used."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import compilation_cache

from ibjax import files
from ibjax.devices import compiled


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache, whose entries have no checksum of their own, as those under zstd."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name in ("compress_executable", "decompress_executable"):
        monkeypatch.setattr(compilation_cache, name, lambda content: content)
    for name, value in zip(names, (str(tmp_path), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    compiled.verify()
    yield tmp_path
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compute():
    """A program's result, compiled or read from the cache: the function is another one at each call."""
    compilation_cache.reset_cache()
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    return np.asarray(jax.jit(lambda x: jnp.tanh(x) @ x.T + 1)(x))


def entries(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_damaged_entry_is_removed_told_of_and_compiled_again(folder, caplog):
    right = compute()
    whole = entries(folder)
    assert whole and {name.rpartition("-")[0] for name in whole if name.endswith("-cache")} == {
        name.rpartition("-")[0] for name in whole if name.endswith("-digest")
    }
    np.testing.assert_array_equal(compute(), right)
    assert not caplog.text and entries(folder) == whole  # read, not compiled
    rng = np.random.default_rng(0)
    for _ in range(4):
        for file in sorted(folder.glob("*-cache")):
            content = bytearray(file.read_bytes())
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
            file.write_bytes(content)
        caplog.clear()
        np.testing.assert_array_equal(compute(), right)
        assert "holds a damaged compiled program" in caplog.text
        caplog.clear()
        np.testing.assert_array_equal(compute(), right)
        assert not caplog.text  # it was written anew


@pytest.mark.parametrize("damage", ["no digest", "a cut digest", "no entry"])
def test_an_entry_without_its_digest_is_not_used(folder, damage):
    right = compute()
    for file in sorted(folder.glob("*-cache" if damage == "no entry" else "*-digest")):
        if damage == "a cut digest":
            file.write_bytes(file.read_bytes()[:7])
        else:
            file.unlink()
    np.testing.assert_array_equal(compute(), right)
    assert all(len(content) > 7 for name, content in entries(folder).items() if name.endswith("-digest"))
    names = {name.rpartition("-")[0] for name in entries(folder)}
    assert all((folder / f"{name}-cache").exists() and (folder / f"{name}-digest").exists() for name in names)


def caches(folder, count=2):
    """The cache of each of several processes."""
    return [compilation_cache.get_file_cache(str(folder))[0] for _ in range(count)]


def test_who_reads_while_an_entry_is_written_does_not_remove_it(folder, caplog, monkeypatch):
    """Another process reads before and after each file is written, and while it is incomplete."""
    (writer, reader), replacing, seen = caches(folder), files.replacing, []

    def read():
        seen.append(reader.get("program"))

    @contextlib.contextmanager
    def watched(file):
        read()
        with replacing(file) as temporary:
            temporary.write_bytes(b"half")
            read()
            yield temporary
            read()
        read()

    monkeypatch.setattr(files, "replacing", watched)
    writer.put("program", b"compiled")
    assert seen[-1] == b"compiled" and set(seen) == {None, b"compiled"}
    assert reader.get("program") == b"compiled" and not caplog.text


def test_a_cache_whose_size_is_limited_removes_the_oldest_entries(folder):
    before = jax.config.jax_compilation_cache_max_size
    jax.config.update("jax_compilation_cache_max_size", 10)
    try:
        writer, reader = caches(folder)
    finally:
        jax.config.update("jax_compilation_cache_max_size", before)
    for name in ("first", "second"):
        writer.put(name, b"compiled")
        assert reader.get(name) == b"compiled"
    assert reader.get("first") is None


def test_an_entry_that_another_process_has_written_meanwhile_stays(folder):
    first, second = caches(folder)
    first.put("program", b"compiled")
    second.put("program", b"compiled elsewhere, in other bytes")
    assert first.get("program") == second.get("program") == b"compiled"


def test_another_version_of_jax_keeps_nothing_that_cannot_be_verified(monkeypatch):
    monkeypatch.delattr(compilation_cache, "get_file_cache")
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: name == "zstandard")
    before = jax.config.jax_enable_compilation_cache
    try:
        compiled.verify()
        assert not jax.config.jax_enable_compilation_cache
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
