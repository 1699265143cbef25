"""The user's own code in a configuration: what a run records about it, and whether a run's folder may have it run.

A run's config.json has an entry for each section that names such code (`ibjax.extensions.record`):

    "own_code": {"objective": {"kind", "name", "module" or "file", "version", "sha256": {file: digest}}}
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ibjax import calls, extensions
from ibjax.attacks import names
from ibjax.errors import CodeError
from ibjax.runs import writers

_HELD = (*calls.TEACHERS, "contrast")  # what they name is that of other runs


def named(section: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, section) of every section with a name, those inside others and inside recipes too."""
    if isinstance(section.get("name"), str):
        yield path, section
    for key, value in section.items():
        if isinstance(value, Mapping | ConfigDict):
            yield from named(value, f"{path}.{key}".lstrip("."))


def anchor(settings: ConfigDict, folder: Path) -> ConfigDict:
    """Gives each file that is named by a relative path its absolute one, in place, which begins with `folder`."""
    return _rename(settings, lambda path, name: extensions.anchored(name, folder))


def unanchor(settings: ConfigDict) -> ConfigDict:
    """Takes the folder away from each file that is named, in place: for a configuration that goes elsewhere."""
    return _rename(settings, lambda path, name: extensions.unanchored(name))


def _rename(settings, change: Callable[[str, str], str]):
    """Applies `change` (path, name) to the name of every section, and to what names of attacks refer to, in place."""
    with settings.unlocked():
        for path, section in named(settings):
            section["name"] = change(path, section["name"])
        for config in _configurations(settings):
            attacks = config.evaluate.attacks
            if any(map(names.own, attacks)):
                renamed = (names.relocated(name, lambda reference: change("", reference)) for name in attacks)
                config.evaluate.attacks = type(attacks)(renamed)
            if config.writers is not None:
                config.writers = tuple(change("", name) for name in writers.each(config.writers))
    return settings


def _configurations(settings):
    yield settings
    for _, recipe in calls.recipes(settings):
        yield from _configurations(recipe)


def record(settings: ConfigDict) -> dict[str, Any]:
    """{section: what is known about its code} of the sections that name code of the user's own; {} where none does."""
    found = {}
    for path, kind, name in calls.named_sections(settings):
        if (source := calls.own_source(kind, name)) is not None:
            found[path] = extensions.record(source)
    return found


def continued(new: dict[str, Any], old: Any) -> dict[str, Any]:
    """`new`, as a run goes on with it that has recorded `old`: changed code keeps the digests that it had before."""
    made = {}
    for path, entry in new.items():
        before = old.get(path, {}) if isinstance(old, Mapping) else {}
        earlier = list(before.get("earlier", ()))
        if before and before.get("sha256") != entry["sha256"]:
            earlier.append(before.get("sha256"))
        made[path] = {**entry, **({"earlier": earlier} if earlier else {})}
    return made


def permit(saved: ConfigDict, recorded: Any, file: Path, given: ConfigDict | None = None) -> None:
    """Raises CodeError unless all code that a run's configuration names may run, and is what the run was made with.

    Nothing is imported. Files that are no longer at their path are looked for in the run's folder and in the current
    one; those that `given`, the user's own configuration of this run, has elsewhere are taken from there. `saved` then
    names them there.
    """
    recorded = recorded if isinstance(recorded, Mapping) else {}
    elsewhere = {path: section["name"] for path, section in named(given or {})}

    def found(path, name):
        own = elsewhere.get(path, "")
        if extensions.is_file(own) and extensions.unanchored(own) == extensions.unanchored(name):
            return own
        return extensions.found_again(name, recorded.get(path), file.parent, Path.cwd())

    _rename(saved, found)
    _refuse_forbidden([(path, section["name"]) for path, section in named(saved)], file)
    for path, section in named(saved):
        entry = recorded.get(path)
        if (extensions.is_reference(section["name"]) or entry is not None) and path.split(".")[0] not in _HELD:
            _refuse_changed(entry, _kind(path, entry), section["name"], file)


def _refuse_forbidden(names_by_path, file):
    if forbidden := [f"{path} '{name}'" for path, name in names_by_path if not extensions.may_run(name)]:
        raise CodeError(
            f"{file} names code that is no part of ibjax, and runs only with your permission: "
            f"{', '.join(forbidden)}; read it, then give --trust=code (in Python trust='code')"
        )


def _refuse_changed(entry, kind, name, file):
    source = extensions.locate(kind, name)
    if source is None:  # a name that was the user's own, and is unknown here
        entry = entry if isinstance(entry, Mapping) else {}
        where = entry.get("version") or entry.get("file") or entry.get("module")
        raise CodeError(
            f"{file} names the {extensions.singular(kind)} '{name}', made by {where}, which is not installed here"
        )
    extensions.refuse_changed(entry, source, file)


def _kind(path, entry):
    """The kind of a section's name: as recorded, else as its place says."""
    if isinstance(entry, Mapping) and entry.get("kind") in calls.CALLS.values():
        return entry["kind"]
    return calls.CALLS.get(path) or calls.CALLS.get(path.split(".")[0], "optimizers")


def permit_writers(saved: ConfigDict, file: Path) -> None:
    """Raises CodeError unless the writers that a run's configuration names may run."""
    given = (name for config in _configurations(saved) for name in writers.each(config.writers))
    _refuse_forbidden([("writers", name) for name in given], file)


def permit_attacks(attacks: Iterable[str], file: Path, trust: str | None = None) -> None:
    """Raises CodeError unless the attacks that a run's `evaluate` section names may run."""
    with extensions.trusting(trust):
        _refuse_forbidden([("evaluate.attacks", names.own(name) or "") for name in attacks], file)


def doubts(settings: ConfigDict, recorded: Any) -> list[str]:
    """Warnings for records: code of a run that has changed while it was trained, or since."""
    recorded = recorded if isinstance(recorded, Mapping) else {}
    found = []
    for path, entry in record(settings).items():
        before = recorded.get(path, {})
        name = f"{path} '{extensions.unanchored(entry['name'])}'"
        if before.get("earlier"):
            found.append(f"the code of {name} was changed while this run was trained")
        if before.get("sha256") != entry["sha256"]:
            found.append(f"the code of {name} is not what this run was trained with")
    return found
