"""What a process keeps between runs."""

import jax
import pytest

from ibjax.devices import cluster


@pytest.fixture
def cache_folder():
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    yield lambda: jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


def test_compiled_programs_are_kept_in_a_folder_of_the_users_own(tmp_path, monkeypatch, cache_folder):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cluster.keep_compiled()
    (folder,) = (tmp_path / "ibjax").iterdir()
    assert cache_folder() == str(folder)
    assert (tmp_path / "ibjax").stat().st_mode & 0o077 == 0 and folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("choice", ["", "/somewhere/else"])
def test_the_environments_choice_of_a_cache_counts(tmp_path, monkeypatch, cache_folder, choice):
    before = cache_folder()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", choice)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cluster.keep_compiled()
    assert cache_folder() == before and not list(tmp_path.iterdir())


def test_a_home_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch, cache_folder):
    before = cache_folder()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    cluster.keep_compiled()
    assert cache_folder() == before
