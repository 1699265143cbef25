"""The folder of a run: its lock, its configuration, and the check that an existing folder holds the same run.

workdir/  config.json env.json metrics.jsonl checkpoints/<step>/ eval/<checkpoint>/<attack>.json report.html
"""

import contextlib
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np
from ml_collections import ConfigDict

from ibjax import config, extensions, files
from ibjax.devices import cluster, peers
from ibjax.errors import CheckpointError, CodeError, InputError, UnreadableError
from ibjax.files import write_json
from ibjax.net import Variables
from ibjax.runs import checkpoint as checkpoints
from ibjax.runs import metrics, own_code, provenance
from ibjax.step import TrainState

log = logging.getLogger(__name__)


# Keys that change neither the training nor its result, and so may differ when a run is continued. The teacher is
# compared by its weights and the data by its content, so the paths of both may change. The threat model is compared
# through the attacks that use it.
_FREE_KEYS = (*config.WITHOUT_EFFECT, "threat", *config.TEACHERS)


# what config.json says of the data that is not part of its content and has no digest; earlier versions did not save it
DESCRIPTIONS = ("classes", "warnings")


BENCHMARK = "ibjax.benchmark"  # says that a network was given to it, in the section "imported"


_FREE_PATHS = ("data.path", "data.data_dir", "data.cache", "data.extra.path", "data.threads")


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Locks the workdir for this run, for all its processes together.

    Raises InputError where another run holds the lock, and where the processes do not all share the folder.
    """
    held, mark = filelock.FileLock(workdir / ".lock", timeout=0), workdir / ".lock-holder"
    problem, token = "", secrets.token_hex(8)
    if jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            held.acquire()
            mark.write_text(token, encoding="utf-8")
        except filelock.Timeout:
            problem = f"another run is using {workdir}; wait for it, or give another --workdir"
        except OSError as error:
            problem = f"--workdir={workdir} cannot be written or locked ({error.strerror}); give another folder"
    try:
        if problem := cluster.word_of_first("the lock of the workdir", problem):
            raise InputError(problem)
        token = cluster.word_of_first("the mark in the workdir", token)
        there = {"what process 0 has written is there": peers.sees(mark, token)}
        cluster.agree("workdirs", there, f"give a --workdir that all processes share, not {workdir}")
        yield
    finally:
        held.release()


def check_writable(*folders: Path) -> None:
    """Raises InputError, on every process, where the first process cannot write into one of the folders.

    A missing folder is created.
    """
    problem = ""
    for folder in folders if jax.process_index() == 0 else ():
        probe = folder / f".writable-{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.write_text("", encoding="utf-8")
            probe.unlink()
        except OSError as error:
            problem = f"{folder} cannot be written ({error.strerror}), and the result would be lost; make it writable"
            break
    if problem := cluster.word_of_first("whether results can be written", problem):
        raise InputError(problem)


def has_checkpoint(workdir: Path) -> bool:
    """Whether the folder holds a configuration and at least one committed checkpoint."""
    return (workdir / "config.json").is_file() and bool(checkpoints.steps_in(workdir / "checkpoints"))


def doubts(workdir: Path) -> list[str]:
    """Warnings about the run's checkpoints that every record must carry."""
    steps = _damaged_steps(workdir)
    if not steps:
        return []
    return [f"checkpoints of steps {', '.join(steps)} were damaged or lost; 'best' is the best of the others"]


def _damaged_steps(workdir):
    """The names in `damaged/`."""
    folder = workdir / "damaged"
    if not folder.is_dir():
        return []
    return files.patiently(lambda: sorted(p.name for p in folder.iterdir() if p.is_dir()), folder)


def write_config(workdir: Path, given: ConfigDict, facts: dict[str, Any], *, restart: bool = False) -> dict[str, Any]:
    """Writes config.json and env.json, or checks that the run which is already there is the same one.

    Returns the run's `identity`, for `checkpoint.manager`. Before its first checkpoint a run has nothing to protect,
    and another configuration may take its place. Raises InputError where the folder holds another run, where its
    checkpoints were lost and `restart` is False, and where processes see different configurations or folders.
    """
    own, found = identity(given, facts), checkpoints.steps_in(workdir / "checkpoints")
    advice = "start all processes with one command and a --workdir that all of them share"
    cluster.agree("configurations or data", own, advice)
    cluster.agree("workdirs", {"steps in checkpoints/": found}, advice)
    if found:
        _refuse_other_run(workdir, given, facts, own)
    else:
        _refuse_records(workdir)
        _refuse_lost_checkpoints(workdir, restart)
    code = own_code.record(given)
    cluster.agree("own modules", {path: entry["sha256"] for path, entry in code.items()}, advice)
    if code and found:
        code = own_code.continued(code, recorded_code(workdir))
    describe(workdir, given, facts, {"own_code": code} if code else {})
    return own


def describe(workdir: Path, given: ConfigDict, facts: dict[str, Any], more: Mapping[str, Any] | None = None) -> None:
    """Writes config.json and env.json without any check; `more` stands in both."""
    more = more or {}
    if jax.process_index() == 0:
        written = config.plain(own_code.anchor(config.effective(given), Path.cwd()))
        write_json(workdir / "config.json", {"config": written, "data": facts, **more})
        write_json(workdir / "env.json", {**provenance.environment(), **more})


def recorded_code(workdir: Path) -> dict[str, Any]:
    """What a run's config.json, or else its env.json, says about code of the user's own; {} where they say nothing."""
    for name in ("config.json", "env.json"):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError, ValueError):
            if isinstance(found := files.read_json(workdir / name).get("own_code"), dict):
                return found
    return {}


def benchmarked(facts: Mapping[str, Any]) -> bool:
    """Whether the data section of a config.json is of `ibjax.benchmark`, so that the network is not in the folder."""
    return facts.get("imported", {}).get("by") == BENCHMARK


def write_network(
    workdir: Path,
    settings: ConfigDict,
    facts: dict[str, Any],
    variables: Variables,
    *,
    step: int = 0,
    validation: Mapping[str, Any] | None = None,
) -> None:
    """Makes `workdir` a run with one checkpoint of a network that was trained elsewhere; training cannot continue it.

    Args:
      workdir: the caller must have locked it, if another process could write into it.
      settings, facts: as in `write_config`, whose errors are raised.
      variables: {"params", "batch_stats"}.
      step: of the checkpoint.
      validation: its validation metrics; even without them it is the "best" checkpoint.
    """
    own = write_config(workdir, settings, facts)
    with checkpoints.manager(workdir, run=own) as store:
        state = TrainState(cluster.replicate(np.int32(step), cluster.mesh()), variables, (), None)
        checkpoints.save(store, state, {"selection": 0.0, **(validation or {})})


def identity(settings: ConfigDict, facts: Mapping[str, Any]) -> dict[str, Any]:
    """{path: value} of what identifies a run: the options that change its result, and the facts of its data."""
    found = {path: value for path, value in _options(settings).items() if not _is_free(path)}
    about = {key: value for key, value in config.plain(facts).items() if key not in DESCRIPTIONS}
    return {**found, **{f"its {path}": value for path, value in config.leaves(about)}}


def _options(settings):
    """{path: value} of all options, with the defaults of every section and the eps and step size of every attack."""
    found = config.leaves(config.plain(config.complete(config.effective(settings))))
    # a file of the user's own is compared by its content, as a teacher is by its weights: its folder may change
    return {path: extensions.unanchored(value) if path.endswith(".name") else value for path, value in found}


def _is_free(path):
    return path.split(".")[0] in _FREE_KEYS or path in _FREE_PATHS


def _refuse_other_run(workdir, given, facts, own):
    """Refuses to continue the checkpoints of another configuration or of other data."""
    try:
        saved, saved_facts = read_config(workdir, given)
    except UnreadableError:
        raise
    except CheckpointError as error:  # absent or damaged, but the checkpoints hold the run's identity
        own_code.permit(
            own_code.anchor(config.effective(given), Path.cwd()), recorded_code(workdir), workdir / "env.json"
        )
        with checkpoints.manager(workdir, read_only=True, run=own) as store:
            checkpoints.check_run(store)
        log.warning("%s; its checkpoints are of this configuration: it is written anew", error)
        return
    refuse_other_options(workdir, saved, given)
    before, now = ({k: v for k, v in config.plain(f).items() if k not in DESCRIPTIONS} for f in (saved_facts, facts))
    for name in {**now, **before}:
        if name not in now:  # such as "imported": a network that was not trained here
            raise InputError(
                f"{workdir} holds a network with {name}={before[name]}, which training cannot continue; "
                f"give another --workdir"
            )
        if before.get(name) != now[name]:
            raise InputError(
                f"{workdir} was trained with another {name} ({before.get(name)}, now {now[name]}); "
                f"give another --workdir, or what it was trained with"
            )


def refuse_other_options(
    workdir: Path, saved: ConfigDict, given: ConfigDict, sections: tuple[str, ...] | None = None
) -> None:
    """Raises InputError where two configurations differ in `sections`; None compares all that affects training."""
    old, new = _options(saved), _options(given)
    for path in {**new, **old}:
        asked = sections is None or path.split(".")[0] in sections
        if asked and not _is_free(path) and not config.same(path, old.get(path), new.get(path)):
            raise InputError(
                f"{workdir} holds a run with {path}={old.get(path)!r}, now {new.get(path)!r} is asked for; "
                f"give another --workdir, or the configuration that it was made with"
            )


def _refuse_records(workdir):
    """Refuses a folder in which `ibjax.benchmark` keeps its records."""
    try:
        found = benchmarked(files.read_json(workdir / "config.json")["data"])
    except UnreadableError:
        raise
    except (FileNotFoundError, IsADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return
    if found:
        raise InputError(f"{workdir} holds the records of ibjax.benchmark; give another --workdir")


def _refuse_lost_checkpoints(workdir, restart):
    """Raises InputError where a run once had a checkpoint, so that it does not silently begin at step 0."""
    aside = _damaged_steps(workdir)
    saved = metrics.saved_step(workdir / "metrics.jsonl")
    if not aside and saved is None:
        return
    traces = [f"damaged/ holds steps {', '.join(aside)}"] if aside else []
    traces += [f"metrics.jsonl tells of step {saved}"] if saved is not None else []
    text = f"{workdir} has no checkpoint any more, but {' and '.join(traces)}"
    if not restart:
        raise InputError(
            f"{text}; put the checkpoints back into checkpoints/, or give --restart to begin again at step 0"
        )
    if jax.process_index() == 0:
        log.warning("%s; beginning at step 0, with these in %s", text, checkpoints.retire(workdir))
    cluster.agree("what was left of the run set aside", {})  # all wait for process 0


def read_config(workdir: Path, given: ConfigDict | None = None) -> tuple[ConfigDict, dict[str, Any]]:
    """(configuration, facts of the data) of a run; `given` is the user's configuration of it: see `own_code.permit`.

    Raises CheckpointError where config.json is missing or damaged, UnreadableError where it temporarily cannot be read,
    CodeError where it names code of the user's own that is missing, has changed, or may not run: `ibjax.extensions`.
    """
    file = workdir / "config.json"
    try:
        content = files.read_json(file)
        if benchmarked(content["data"]):
            raise CodeError(
                f"{workdir} holds the records of ibjax.benchmark, not the network; benchmark it again there"
            )
        saved, facts = config.upgrade(ConfigDict(content["config"])), content["data"]
        own_code.permit(saved, content.get("own_code"), file, given)
        config.check(saved)
        saved = config.effective(saved)
        if type(facts["num_classes"]) is not int or not all(type(size) is int for size in facts["input_shape"]):
            raise ValueError("its data section is not that of a run")
        return saved, facts
    except FileNotFoundError:
        if checkpoints.steps_in(workdir / "checkpoints"):
            raise CheckpointError(
                f"{file} is missing beside checkpoints; the training command writes it again, or restore it from a copy"
            ) from None
        raise CheckpointError(
            f"{workdir} holds no run (no config.json); train there first, or give another folder"
        ) from None
    except (UnreadableError, CodeError):
        raise
    except InputError as error:  # it was read, but names something that does not exist
        raise CheckpointError(
            f"{file} cannot be used: {error}; it names code that is not installed here, is of another version, or was "
            f"changed: the training command writes it again, or restore it from a copy"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, IsADirectoryError) as error:
        raise CheckpointError(
            f"{file} is damaged or of another version ({error}); the training command writes it again, or restore it "
            f"from a copy"
        ) from None
