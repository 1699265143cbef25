"""The version of the package, and where it has what it brings beside its modules.

A wheel holds the recipes as `ibjax/recipes/` and the scripts for clusters as `ibjax/launch/`. In a source tree, from
which an editable install runs too, they are `configs/` and `launch/`.
"""

import contextlib
import importlib.metadata
import tomllib
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
SOURCE = _PACKAGE.parent  # the source tree, where the package runs from one


def recipes() -> Path:
    """The folder of the recipes."""
    return _first(_PACKAGE / "recipes", SOURCE / "configs")


def launchers() -> Path:
    """The folder of the scripts that start runs on clusters."""
    return _first(_PACKAGE / "launch", SOURCE / "launch")


def _first(installed, of_source):
    return installed if installed.is_dir() else of_source


def version() -> str:
    """The version of the running code: that of its source tree, if it runs from one, else of the installed package."""
    if (project := _project()) is not None:
        return project["version"]
    try:
        return importlib.metadata.version("ibjax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def requirements() -> list[str]:
    """What the running code needs, as "jax>=0.7"; extras are left out."""
    if (project := _project()) is not None:
        return project["dependencies"]
    try:
        lines = importlib.metadata.requires("ibjax") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [line for line in lines if "extra ==" not in line]


def _project():
    """The section [project] of the source tree's pyproject.toml; None where the package is installed."""
    with contextlib.suppress(OSError, KeyError, ValueError):
        project = tomllib.loads((SOURCE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        if project["name"] == "ibjax":
            return project
    return None
