"""ibjax doctor: exit code 0 where all is well; each problem is found with the line that mends it; no traceback."""

import sys

import pytest

from ibjax import doctor, places
from ibjax.devices import compiled, machine
from ibjax.errors import InputError


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home folder in which all is well, on a machine without a GPU or a TPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setattr(machine, "GPUS", (str(tmp_path / "nvidia[0-9]"),))
    monkeypatch.setattr(machine, "TPUS", (str(tmp_path / "accel[0-9]"),))
    monkeypatch.setattr(machine, "VFIO", str(tmp_path / "vfio[0-9]"))
    monkeypatch.setattr(machine, "VENDORS", str(tmp_path / "*.vendor"))
    monkeypatch.setattr(doctor, "DRIVER", str(tmp_path / "driver"))
    monkeypatch.setattr(doctor, "LEAST", 0)
    monkeypatch.setattr(places, "requirements", lambda: ["jax>=0.7"])
    return tmp_path


def run(monkeypatch, capsys):
    """(exit code, output) of `python -m ibjax.doctor`."""
    monkeypatch.setattr(sys, "argv", ["doctor"])
    with pytest.raises(SystemExit) as stopped:
        doctor.main()
    printed = capsys.readouterr()
    assert not printed.err
    return stopped.value.code or 0, printed.out


def test_where_all_is_well_it_says_what_there_is_and_exits_with_0(home, monkeypatch, capsys):
    compiled.folder().mkdir(parents=True)
    (compiled.folder() / "program").write_bytes(bytes(3 << 20))
    (home / "cache/ibjax/zoo").mkdir()
    (home / "cache/ibjax/zoo/network.pt").write_bytes(bytes(5 << 20))  # no program
    (home / "data/cifar10/1.0.0").mkdir(parents=True)
    (home / "data/cifar10/1.0.0/dataset_info.json").touch()
    monkeypatch.setenv("TFDS_DATA_DIR", str(home / "data"))
    code, text = run(monkeypatch, capsys)
    assert code == 0 and text.rstrip().endswith("all is well") and "\n!" not in text
    for said in (
        f"python               {sys.version.split()[0]}",
        f"ibjax                {places.version()}",
        f"of compiled programs: {compiled.folder()}, 1 files, 3.0 MiB",
        f"{home}/data (TFDS_DATA_DIR): cifar10",
        "× cpu",
        "GiB free",
        str(places.recipes()),
    ):
        assert said in text, text


def test_each_problem_comes_with_the_line_that_mends_it(home, monkeypatch, capsys):
    (home / "nvidia0").touch()
    (home / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("TFDS_DATA_DIR", str(home / "none"))
    monkeypatch.setattr(doctor, "LEAST", 1e9)
    monkeypatch.setattr(places, "requirements", lambda: ["jax>=99", "a-package-that-is-not-there>=1"])
    monkeypatch.setattr(places, "recipes", lambda: home)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(
        doctor, "version_of", lambda name, real=doctor.version_of: None if "cuda" in name else real(name)
    )
    code, text = run(monkeypatch, capsys)
    assert code == 1 and "Traceback" not in text
    mends = [line.strip() for line in text.splitlines() if line.startswith("   ")]
    assert mends == [
        "pip install --upgrade 'jax>=99'",
        "pip install 'a-package-that-is-not-there>=1'",
        "pip install 'jax[cuda13]'",
        "export JAX_COMPILATION_CACHE_DIR=FOLDER  # one that you can write, or empty for no cache",
        f"mkdir -p {home / 'none'}",
        *[line.strip() for line in text.splitlines() if line.startswith("   df -h ")],
        "pip install --force-reinstall ibjax",
    ]
    assert sum(mend.startswith("df -h") for mend in mends) >= 1
    assert f"{len(mends)} to mend" in text


@pytest.mark.parametrize(
    ("device", "vendor", "found"),
    [("accel0", "0x8086", True), ("vfio0", "0x1ae0", True), ("vfio0", "0x8086", False), ("none", "0x1ae0", False)],
)
def test_a_tpu_is_told_from_other_devices(home, device, vendor, found):
    (home / device).touch()
    (home / "0.vendor").write_text(f"{vendor}\n")
    assert machine._has_tpu() == found
    (home / "class").write_text("0x020000\n")  # a network card, which Google's cloud has too
    assert machine._has_tpu() == (found and device == "accel0")


def test_a_gpu_that_jax_does_not_use(home, monkeypatch):
    (home / "nvidia0").touch()
    there = {"jaxlib": "0.9.0"}
    monkeypatch.setattr(doctor, "version_of", there.get)
    (home / "driver").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n")
    assert doctor._mend_of_platform("cuda") == "pip install 'jax[cuda12]'"
    (home / "driver").write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build\n")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert doctor._mend_of_platform("cuda") == "pip install 'jax[cuda13]'"
    assert doctor._mend_of_platform("tpu") == "pip install 'jax[tpu]'"
    there["jax-cuda12-plugin"] = "0.8.1"
    assert doctor._mend_of_platform("cuda").endswith("-c 'import jax; jax.devices()'  # says why")
    monkeypatch.setattr(places, "requirements", list)
    (found,) = doctor._requirements()
    assert found.text == "0.8.1 is not for jaxlib 0.9.0" and found.mend == "pip install --upgrade 'jax[cuda12]'"
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert doctor._mend_of_platform("cuda") == "unset JAX_PLATFORMS"


def test_what_cannot_be_found_out_is_a_problem_and_the_rest_is_still_said(home, monkeypatch, capsys):
    def broken():
        raise OSError(5, "Input/output error")

    def unavailable():
        raise InputError("JAX_PLATFORMS=cuda cannot be used here; unset it")

    from ibjax.devices import cluster

    monkeypatch.setattr(doctor.tempfile, "gettempdir", broken)
    monkeypatch.setattr(cluster, "backend", unavailable)
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    code, text = run(monkeypatch, capsys)
    assert code == 1 and "Input/output error" in text and "JAX_PLATFORMS=cuda cannot be used here; unset it" in text
    assert "requirements" in text and "recipes" in text


def test_the_cache_can_be_off_and_a_folder_that_is_not_writable_is_found(home, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    assert [found.mend for found in doctor._cache()] == [""]
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/proc/none")  # nobody can write there
    (found,) = doctor._cache()
    assert "cannot be written" in found.text and found.mend
    monkeypatch.chdir("/proc")
    assert any("--workdir" in found.mend for found in doctor._disk() if "cannot be written" in found.text)


def test_its_requirements_are_those_of_the_project_or_of_the_installed_package(tmp_path, monkeypatch):
    assert "jax>=0.7" in places.requirements()
    monkeypatch.setattr(places, "SOURCE", tmp_path)
    lines = ["jax>=0.7", "torch>=2.4; extra == 'torch'"]
    monkeypatch.setattr(places.importlib.metadata, "requires", lambda name: lines)
    assert places.requirements() == ["jax>=0.7"]
