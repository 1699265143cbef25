"""JAX's compilation cache, with a digest for each entry that is verified before the entry is used.

JAX writes no checksum. With zstd compression, which it uses if Python has it, a flipped bit reaches the program, which
then computes wrong numbers or is killed by a signal. Therefore every entry `KEY-cache` has a file `KEY-digest` beside
it; an entry without a matching digest is removed and compiled again. The format of the entries is unchanged.
"""

import hashlib
import importlib.util
import logging
import os
import platform
import secrets
from pathlib import Path

import jax

from ibjax import files
from ibjax.devices import peers
from ibjax.errors import UnreadableError

log = logging.getLogger(__name__)


def keep() -> None:
    """Enables the compilation cache in `files.cache_folder`, which only its user can read.

    JAX_COMPILATION_CACHE_DIR in the environment names another folder, or a store as gs://bucket/folder; if it is empty,
    there is no cache. Each CPU instruction set has a subfolder, since machines of several kinds may share a home.
    """
    verify()
    if (given := os.environ.get("JAX_COMPILATION_CACHE_DIR")) is not None:
        if given and not files.in_store(given) and str(files.path(given)) != given:  # of ~/x, JAX makes a folder ~
            jax.config.update("jax_compilation_cache_dir", str(files.path(given)))
        return
    _keep_in(folder)


def _keep_in(named):
    try:
        kept = named()
        kept.mkdir(mode=0o700, parents=True, exist_ok=True)
        kept.parent.chmod(0o700)
    except (OSError, RuntimeError) as error:
        log.info("nothing compiled is kept: there is no folder for it (%s)", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(kept))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def folder() -> Path:
    """Where this machine's programs are kept if JAX_COMPILATION_CACHE_DIR is not set; RuntimeError without a home."""
    return files.cache_folder() / hashlib.sha256(_instruction_set().encode()).hexdigest()[:16]


def share() -> None:
    """For several processes with GPUs, which all call it: leaves the cache on where it is one folder for all of them.

    JAX writes entries in process 0 alone, and the path of the folder is part of their keys. Of a program that is not in
    the cache, each process measures the kernels of a part and waits up to 24 h for the parts of the others
    (xla_gpu_shard_autotuning). If process 0 found a program that the others do not see, they would wait in vain.

    Programs for GPUs do not depend on the CPU, so their folder is the same on machines of several kinds.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR") is None:
        _keep_in(lambda: files.cache_folder() / "gpu")
    kept = jax.config.jax_compilation_cache_dir or ""  # pyright: ignore[reportAttributeAccessIssue]
    if not jax.config.jax_enable_compilation_cache:  # pyright: ignore[reportAttributeAccessIssue]
        kept = ""
    first = jax.process_index() == 0
    token = peers.word_of_first("the mark in the cache of compiled programs", _mark(kept) if first else "")
    mark = Path(kept) / f".seen-{token}"
    seen = bool(kept and token) and (files.in_store(kept) or peers.sees(mark, token))
    problem = peers.difference("caches of compiled programs", {"the folder": kept, "what process 0 wrote there": seen})
    if first:
        mark.unlink(missing_ok=True)
    if problem or not seen:
        jax.config.update("jax_enable_compilation_cache", False)
        if first and kept:
            reason = problem or f"process 0 cannot write into {kept}"
            log.info("nothing compiled is kept: %s; JAX_COMPILATION_CACHE_DIR can name a folder that all share", reason)


def _mark(kept):
    """Writes a token into the cache and returns it; "" where there is no cache, or none that can be written."""
    token = secrets.token_hex(8)
    if kept and not files.in_store(kept):
        try:
            Path(kept).mkdir(parents=True, exist_ok=True)
            (Path(kept) / f".seen-{token}").write_text(token, encoding="utf-8")
        except OSError:
            return ""
    return token if kept else ""


def _instruction_set():
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.machine() + platform.processor()


def verify() -> None:
    """Makes this process verify the digest of each cache entry before its use, in whatever folder JAX has its cache."""
    try:
        from jax._src import compilation_cache
        from jax._src.compilation_cache_interface import CacheInterface

        opened, before = compilation_cache.get_file_cache, compilation_cache._cache
    except (ImportError, AttributeError):  # another version of JAX: these names are private
        if any(importlib.util.find_spec(name) for name in ("zstandard", "compression")):  # else zlib, with a checksum
            log.info("nothing compiled is kept: this version of JAX does not let its entries be verified")
            jax.config.update("jax_enable_compilation_cache", False)
        return
    if hasattr(opened, "verified"):
        return
    Checked = _checked(CacheInterface)

    def open_checked(path):
        found = opened(path)
        return found and (Checked(found[0]), found[1])

    open_checked.verified = True
    compilation_cache.get_file_cache = open_checked
    if before is not None:  # a program was compiled before this was called
        compilation_cache._cache = Checked(before)


def _checked(interface):
    class Checked(interface):
        """JAX's file cache, with a digest beside each entry."""

        def __init__(self, cache):
            self._cache, self._path = cache, cache._path

        def get(self, key):
            entry = self._cache.get(key)
            if entry is None:
                return None
            try:
                expected = files.read_bytes(self._digest(key)).decode(errors="replace")
            except (FileNotFoundError, UnreadableError):
                expected = ""  # written without ibjax, or by a process that was killed
            if expected == files.digest(entry):
                return entry
            if expected:
                log.warning("%s holds a damaged compiled program; it is removed and compiled again", self._path)
            self._remove(key)
            return None

        def put(self, key, value):
            if self.get(key) is not None:  # another process was faster
                return
            # the digest comes first and the entry at once, as whoever reads one without the other removes it
            with files.replacing(self._digest(key)) as temporary:
                temporary.write_text(files.digest(value), encoding="utf-8")
            if getattr(self._cache, "eviction_enabled", True):  # it has a lock, and may remove older entries
                self._cache.put(key, value)
            else:
                with files.replacing(self._entry(key)) as temporary:
                    temporary.write_bytes(value)

        def _entry(self, key):
            return self._path / f"{key}-cache"

        def _digest(self, key):
            return self._path / f"{key}-digest"

        def _remove(self, key):
            for file in (self._entry(key), self._digest(key)):
                file.unlink(missing_ok=True)

    return Checked
