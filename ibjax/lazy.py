"""The public names of a package that are imported on first use (PEP 562), so that `import ibjax` imports no library."""

import importlib
from collections.abc import Callable, Iterable
from typing import Any


def attach(package: str, names: Iterable[str], of_module: dict[str, str] | None = None) -> tuple[Callable, Callable]:
    """`__getattr__` and `__dir__` of a package.

    Args:
      package: its `__name__`.
      names: its `__all__`; those that it does not define itself are its submodules.
      of_module: {name: dotted module that defines it} of the other names.
    """
    names, of_module = frozenset(names), of_module or {}

    def find(name: str) -> Any:
        if name in of_module:
            return getattr(importlib.import_module(of_module[name]), name)
        if name in names:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module '{package}' has no attribute '{name}'")

    def listed() -> list[str]:
        return sorted({*vars(importlib.import_module(package)), *names})

    return find, listed
