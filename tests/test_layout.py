"""The layout of the package: imports run from a higher floor to a lower one, and never in a circle.

The imports are read from the source with `ast`, those inside functions too; nothing is imported here. What a
configuration names, as "trades", is imported by `ibjax.calls` with `importlib` and does not count.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
GROUND = ("errors", "calls", "extensions", "sources", "losses", "files", "cli", "places", "lazy")
CORE = ("step", "net", "config", "optim", "perturb", "threat")
COMMANDS = ("main", "evaluate", "attack", "report", "convert", "aot", "doctor")
# from the ground up; modules and wings of one floor may import one another, but not in a circle
FLOORS = (
    GROUND,
    ("devices",),
    ("attacks", "information"),
    CORE,
    ("objectives", "models", "data", "wrap"),
    ("runs",),
    ("pytorch",),
    ("evaluation",),
    ("training",),
    ("analysis",),
    COMMANDS,
    ("ibjax", "__main__"),  # the package itself, which offers `ibjax.load`, and its console command
)
MODULES = ("__main__", *COMMANDS, *CORE, *GROUND)  # that stand at the top level
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}


class Import(NamedTuple):
    """An import statement's target, as far as it is a module, and where it stands."""

    module: str
    target: str
    line: int
    types_only: bool  # within `if TYPE_CHECKING:`

    def __str__(self):
        return f"{self.module}, line {self.line}: imports {self.target}"


def modules() -> dict[str, Path]:
    """{dotted name: file} of all modules of the package; a package is its __init__.py."""
    found = {}
    for file in sorted((ROOT / "ibjax").rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(module: str, file: Path, known: dict[str, Path]) -> Iterator[Import]:
    """Every import of a module, wherever it stands."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    guarded = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).rpartition(".")[2] == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            named = [f"{source}.{alias.name}" for alias in node.names]
            targets = sorted({name if name in known else source for name in named})
        else:
            continue
        for target in targets:
            yield Import(module, target, node.lineno, node in guarded)


def wing(module: str) -> str:
    """The wing of a module, or the top-level module itself: what stands below `ibjax.`."""
    return ".".join(module.split(".")[1:2]) or module


@functools.cache
def drawn() -> list[Import]:
    """All imports of all modules."""
    known = modules()
    return [found for module, file in known.items() for found in imports(module, file, known)]


def inside(found: Import) -> bool:
    """Whether an import is one of the package itself."""
    return found.target.split(".")[0] == "ibjax"


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Some names each of which imports the next one, the last one the first; empty where there are none."""
    state: dict[str, bool] = {}  # name -> whether all that it reaches has been seen

    def visit(name, path):
        if name in path:
            return path[path.index(name) :]
        if state.get(name):
            return []
        for target in sorted(edges.get(name, ())):
            if found := visit(target, [*path, name]):
                return found
        state[name] = True
        return []

    return next((found for name in sorted(edges) if (found := visit(name, []))), [])


def test_imports_are_found_at_the_top_of_a_module_and_inside_functions():
    found = {(one.module, one.target, one.types_only) for one in drawn()}
    assert ("ibjax.runs.checkpoint", "orbax.checkpoint", False) in found
    assert ("ibjax", "ibjax.runs.run", True) in found
    assert ("ibjax.data.tfds", "ibjax.data.prepare", False) in found  # inside a function
    assert set(FLOOR) <= {wing(module) for module in modules()}  # none of them is gone


def test_every_top_level_module_is_a_command_or_core_or_ground_and_every_wing_has_a_floor():
    wrong = []
    for module, file in modules().items():
        alone = file.parent == ROOT / "ibjax" and module != "ibjax"
        if alone and wing(module) not in MODULES:
            wrong.append(f"{module}, line 1: a top-level module is a command, core or ground; put others into a wing")
        elif not alone and (wing(module) not in FLOOR or wing(module) in MODULES):
            wrong.append(f"{module}, line 1: the wing {wing(module)} has no floor; give it one in FLOORS")
    assert not wrong, "\n".join(wrong)


def test_no_import_runs_from_a_lower_floor_to_a_higher_one():
    wrong = []
    for one in filter(inside, drawn()):
        here, there = wing(one.module), wing(one.target)
        if FLOOR.get(there, -1) > FLOOR.get(here, len(FLOORS)):
            wrong.append(f"{one}; {there} is above {here}, and imports run downwards only: see FLOORS")
    assert not wrong, "\n".join(wrong)


def test_no_modules_and_no_wings_import_one_another_in_a_circle():
    found = [one for one in drawn() if inside(one) and not one.types_only]
    for level in (lambda module: module, wing):
        edges: dict[str, set[str]] = {}
        for one in found:
            if level is not wing or wing(one.module) != wing(one.target):
                edges.setdefault(level(one.module), set()).add(level(one.target))
        around = circle(edges)
        steps = set(zip(around, around[1:] + around[:1], strict=True))
        lines = [str(one) for one in found if (level(one.module), level(one.target)) in steps]
        assert not around, "\n".join([f"{' -> '.join([*around, around[0]])} is a circle; break one of these:", *lines])


def test_only_the_modules_of_runs_import_orbax():
    wrong = [
        f"{one}; only ibjax.runs imports Orbax, call what ibjax.runs.checkpoint offers"
        for one in drawn()
        if one.target.split(".")[0] == "orbax" and wing(one.module) != "runs"
    ]
    assert not wrong, "\n".join(wrong)


def test_attacks_and_information_do_not_import_one_another():
    wings = {"attacks", "information"}
    wrong = [
        f"{one}; {' and '.join(sorted(wings))} stand beside each other, what both need lies below them"
        for one in filter(inside, drawn())
        if {wing(one.module), wing(one.target)} == wings
    ]
    assert not wrong, "\n".join(wrong)
