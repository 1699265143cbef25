"""Checks the installation: versions, devices, caches, data folders, disk; says what is wrong and how to mend it.

    python -m ibjax.doctor

Exit code 0 when all is well, 1 when something needs mending: each problem is one line, followed by a line that says how
to mend it. Nothing is changed and nothing is trained. What cannot be found out is reported as a problem too, never as a
traceback.
"""

import importlib.metadata
import os
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ibjax import cli, errors, files, places

SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")
EXTRAS = {  # package -> what it brings, and the extra that installs it
    "torch": ("import and export of PyTorch networks", "torch"),
    "grain": ("data sets too large for memory", "imagenet"),
    "tensorflow-cpu": ("stock builders of TFDS", "prepare"),
    "tensorboardX": ("logs for TensorBoard", "tensorboard"),
    "shtab": ("shell completion", "completion"),
}
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "jax-cuda12-pjrt", "jax-cuda13-pjrt")
LEAST = 1  # GiB of free disk space below which a run may not be able to save
DRIVER = "/proc/driver/nvidia/version"
CUDA13 = 580  # the first version of NVIDIA's driver that runs CUDA 13


class Finding(NamedTuple):
    """One line of the output; with `mend`, a command or a sentence, it is a problem."""

    name: str
    text: str
    mend: str = ""


def findings() -> Iterator[Finding]:
    """Everything that is found, in the order of the output."""
    for probe in (_machine, _versions, _requirements, _extras, _devices, _cache, _data, _disk, _own_files):
        yield from _guarded(probe)


def _guarded(probe: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from probe()
    except Exception as error:  # whatever is broken here is what a user wants to know
        reason = (str(error).strip() or "no reason is given").splitlines()[-1][:200]
        name = probe.__name__.strip("_").replace("_", " ")
        mend = str(error) if isinstance(error, errors.InputError) else "pip install --force-reinstall ibjax"
        yield Finding(name, f"cannot be found out ({type(error).__name__}: {reason})", mend)


# ---- the probes --------------------------------------------------------------------------------------------


def _machine():
    memory = ""
    if hasattr(os, "sysconf"):
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB memory"
    yield Finding("machine", f"{platform.platform()}, {os.cpu_count()} cores{memory}")
    yield Finding("python", f"{platform.python_version()} at {sys.executable}")


def _versions():
    from ibjax.runs import provenance

    yield Finding("ibjax", f"{places.version()} in {Path(__file__).parent}, commit {provenance.commit()}")
    yield Finding("packages", ", ".join(f"{name} {version_of(name) or 'missing'}" for name in SHOWN))


def _requirements():
    from packaging.requirements import Requirement

    for need in map(Requirement, places.requirements()):
        found = version_of(need.name)
        if found is None:
            yield Finding(need.name, "is not installed", f"pip install '{need}'")
        elif not need.specifier.contains(found, prereleases=True):
            yield Finding(need.name, f"{found} is installed, needed is {need}", f"pip install --upgrade '{need}'")
    own = version_of("jaxlib")
    for name in PLUGINS:  # JAX leaves out a plugin of another version, and computes on the CPU
        if (found := version_of(name)) not in (None, own):
            cuda = name.split("-")[1]
            yield Finding(name, f"{found} is not for jaxlib {own}", f"pip install --upgrade 'jax[{cuda}]'")


def _extras():
    for name, (brings, extra) in EXTRAS.items():
        found = version_of(name) or (version_of("tensorflow") if name == "tensorflow-cpu" else None)
        yield Finding(name, found or f"not installed; brings {brings}: pip install 'ibjax[{extra}]'")


def _devices():
    from ibjax.devices import cluster

    backend = cluster.backend()
    import jax
    import numpy as np

    from ibjax.devices import machine, precision

    yield Finding("devices", f"{machine.hardware()}, platform {backend}")
    for kind, wanted in machine.unused():
        yield Finding("devices", f"a {kind} is here, but JAX computes on the CPU", _mend_of_platform(wanted))
    rounded = {"gpu": "as TensorFloat-32", "tpu": "to bfloat16 in one pass and in three"}.get(backend)
    meaning = f"'default' and 'high' round operands {rounded}, 'highest' does not" if rounded else "all names are exact"
    given = precision.asked()
    own = "" if given is None else f"; runs name their own in place of JAX's default, '{given}'"
    yield Finding("precision", f"of float32 products on {backend}: {meaning}{own}")
    square = np.arange(9, dtype=np.float32).reshape(3, 3)
    found = np.asarray(jax.jit(lambda x: jax.numpy.matmul(x, x, precision="highest"))(square))
    if not np.allclose(found, square @ square):
        yield Finding("devices", f"a product of matrices on {backend} is wrong", "set JAX_PLATFORMS=cpu, or mend it")


def _mend_of_platform(wanted):
    """The line after which JAX finds its GPU or TPU."""
    if os.environ.get("JAX_PLATFORMS"):
        return "unset JAX_PLATFORMS"
    if wanted == "tpu":
        installed, extra = version_of("libtpu"), "tpu"
    else:
        installed, extra = any(map(version_of, PLUGINS)), f"cuda{13 if _driver() >= CUDA13 else 12}"
    if not installed:
        return f"pip install 'jax[{extra}]'"
    return f"JAX_PLATFORMS={wanted} {shlex.quote(sys.executable)} -c 'import jax; jax.devices()'  # says why"


def _driver():
    """The major version of NVIDIA's driver; that which runs CUDA 13 where it is not known."""
    try:
        words = Path(DRIVER).read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return CUDA13
    return next((int(word.split(".")[0]) for word in words if word.count(".") == 2 and word[0].isdigit()), CUDA13)


def _cache():
    from ibjax.devices import compiled

    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if given == "":
        yield Finding("cache", "of compiled programs: off, as JAX_COMPILATION_CACHE_DIR is empty")
        return
    if given and files.in_store(given):
        yield Finding("cache", f"of compiled programs: {given}")
        return
    folder = files.path(given) if given else compiled.folder()
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()] if folder.is_dir() else []
    text = f"of compiled programs: {folder}, {len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB"
    problem = _why_not_writable(folder)
    mend = "export JAX_COMPILATION_CACHE_DIR=FOLDER  # one that you can write, or empty for no cache"
    yield Finding("cache", f"{text}; it cannot be written ({problem})", mend) if problem else Finding("cache", text)


def _data():
    from ibjax.data.tfds import DEFAULT_DIR

    named = os.environ.get("TFDS_DATA_DIR")
    folder = files.path(named or DEFAULT_DIR)
    source = "TFDS_DATA_DIR" if named else "the default"
    if named and not folder.is_dir():
        yield Finding("data", f"TFDS_DATA_DIR={named} is no folder", f"mkdir -p {shlex.quote(str(folder))}")
        return
    sets = sorted({info.parent.parent.name for info in folder.glob("*/*/dataset_info.json")})
    has = ", ".join(sets) if sets else "no data set yet; ibjax prepare makes one"
    yield Finding("data", f"{folder} ({source}): {has}")


def _disk():
    seen: dict[int, list[str]] = {}
    for name, folder in {"here": Path.cwd(), "temporary": Path(tempfile.gettempdir()), "home": Path.home()}.items():
        there = _existing(folder)
        seen.setdefault(there.stat().st_dev, []).append(f"{name} {there}")
        if problem := _why_not_writable(folder):
            yield Finding("disk", f"{there} cannot be written ({problem})", _ELSEWHERE[name])
    for places_of_disk in seen.values():
        folder = places_of_disk[0].partition(" ")[2]
        free = shutil.disk_usage(folder).free / 2**30
        mend = "" if free >= LEAST else f"df -h {shlex.quote(folder)}  # then free some space"
        yield Finding("disk", f"{free:.1f} GiB free ({', '.join(places_of_disk)})", mend)


_ELSEWHERE = {
    "here": "cd FOLDER  # one that you can write, or give another --workdir",
    "temporary": "export TMPDIR=FOLDER  # one that you can write",
    "home": "export HOME=FOLDER  # one that you can write",
}


def _own_files():
    for name, folder, pattern in (
        ("recipes", places.recipes(), "*.py"),
        ("launchers", places.launchers(), "*.s*"),
    ):
        found = sum(1 for _ in folder.glob(pattern))
        mend = "" if found else "pip install --force-reinstall ibjax"
        yield Finding(name, f"{found} in {folder}", mend)


# ---- their parts -------------------------------------------------------------------------------------------


def version_of(package: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _existing(folder):
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _why_not_writable(folder):
    """Why nothing can be written in a folder, or in the one in which it would be made; "" where it can."""
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            return ""
    except OSError as error:
        return error.strerror or type(error).__name__


def parser() -> cli.Parser:
    """This module has no arguments."""
    return cli.parser("ibjax.doctor", __doc__)


def main() -> None:
    """The command line of this module."""
    parser().parse_args()

    def command():
        problems = []
        for found in findings():
            print(f"{'!' if found.mend else ' '} {found.name:20} {found.text}", flush=True)
            problems += [found] if found.mend else []
        for number, found in enumerate(problems, 1):
            print(f"\n{number}. {found.name}: {found.text}\n   {found.mend}")
        print("\nall is well" if not problems else f"\n{len(problems)} to mend, each with its line above")
        if problems:
            sys.exit(1)

    errors.exit_with(command)


if __name__ == "__main__":
    main()
