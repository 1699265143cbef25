"""Digests of the user's own source files, by which a change of code is noticed.

They are the SHA-256 digests of a module's source file, of the `__init__.py` of the packages that contain it, and of
every source file that these import, directly or in turn, from the same folder: that of the file, or of the top-level
package; among installed packages, from the same package only. Imports are read from the source, so one by `importlib`
does not count.
"""

import ast
import functools
import hashlib
import importlib.metadata
import sysconfig
from pathlib import Path

from ibjax import files


@functools.cache
def version(top):
    """The version of the distribution that installs a top-level module, as "my-pkg 1.0"; "" where there is none."""
    if top == "ibjax":
        return ""
    owners = importlib.metadata.packages_distributions().get(top, ())
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in dict.fromkeys(owners))


def digests(file: Path, root: Path, module: str = "") -> dict[str, str]:
    """{path below `root`: SHA-256} of a source file and of all that it imports from there: see above.

    `module` is its dotted name; "" for a file that is imported by its path.
    """
    parents = list(file.relative_to(root).parents)[:-1] if module else []
    wanted = [file, *(root / parent / "__init__.py" for parent in parents)]
    only = module.split(".")[0] if module and _is_installed(root) else None
    found: dict[str, str] = {}
    while wanted:
        file = wanted.pop()
        path = file.relative_to(root).as_posix()
        if path in found or not file.is_file():
            continue
        content = files.read_bytes(file)
        found[path] = hashlib.sha256(content).hexdigest()
        if file.suffix == ".py":
            wanted += _neighbours(content, Path(path), root, only)
    return dict(sorted(found.items()))


def _neighbours(content, path, root, only):
    """The source files below `root` that a source file imports."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):  # its import will say so
        return
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            above = path.parent.parts[: len(path.parent.parts) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{name}".lstrip(".") for name in names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "ibjax" or (only and parts[0] != only):
                continue
            for count in range(1, len(parts) + 1):
                module = root.joinpath(*parts[:count])
                yield from (module.with_name(f"{module.name}.py"), module / "__init__.py")


def _is_installed(folder):
    """Whether a folder holds installed packages, or Python's own modules."""
    known = {Path(path).resolve() for name, path in sysconfig.get_paths().items() if name.endswith(("lib", "stdlib"))}
    return folder.resolve() in known or folder.name in ("site-packages", "dist-packages")
