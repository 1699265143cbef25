"""Checkpoints: the only file that calls Orbax.

On disk, `checkpoints/<step>/` holds three items:

    variables   what is evaluated: {"params", "batch_stats"}, averaged parameters where the run has them
    training    the rest of the train state
    manifest    shape, type and digest of every leaf of both, and the validation metrics of that step

Guarantees (tests of the same names): a save that is killed leaves the previous step restorable; a flipped byte is
found and its leaf named; damaged steps are set aside and the newest good one is used; another architecture, class count
or type is refused with the first differing leaves; restoring works on any number of devices; nothing is unpickled.
Orbax commits a step by renaming its folder, so a step is there whole or not at all.
"""

import contextlib
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ibjax.errors import CheckpointError
from ibjax.step import TrainState, evaluation_variables

ITEMS = ("variables", "training")
KEEP_LATEST = 2  # so that a damaged newest step has one to fall back on
log = logging.getLogger(__name__)


@contextlib.contextmanager
def manager(workdir: Path, *, read_only: bool = False, asynchronous: bool | None = None) -> Iterator[Any]:
    """Orbax's manager of `workdir/checkpoints`; on leaving, pending saves are finished.

    `asynchronous=None` saves in the background on accelerators only: on CPU the arrays are the ones that the next
    step overwrites. Opening for writing sweeps what a killed save has left.
    """
    folder = Path(workdir).absolute() / "checkpoints"
    if asynchronous is None:
        asynchronous = jax.default_backend() != "cpu"
    options = ocp.CheckpointManagerOptions(
        create=not read_only,
        read_only=read_only,
        save_interval_steps=0 if read_only else 1,
        enable_async_checkpointing=asynchronous and not read_only,
        cleanup_tmp_directories=not read_only,
    )
    if read_only and not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist; train first, or give the workdir of a trained run")
    level = logging.getLogger("absl").level
    logging.getLogger("absl").setLevel(logging.ERROR)  # it comments on every opening of a folder for reading
    try:
        orbax = ocp.CheckpointManager(folder, options=options)
    finally:
        logging.getLogger("absl").setLevel(level)
    try:
        with orbax:
            yield orbax
    except Exception as error:  # a save in the background reports its failure at the next call, or here
        raise _disk_full(error, orbax) or error from None


# ---- saving ------------------------------------------------------------------------------------------------


def save(orbax: Any, state: TrainState, metrics: dict[str, Any] | None = None) -> None:
    """Saves the state as its step's checkpoint, then deletes all but the two latest and the best.

    `metrics` are the step's validation metrics, of which "selection" ranks it and "select" says what that is. A state
    with a NaN is never saved.
    Raises CheckpointError when the disk is full; earlier checkpoints stay.
    """
    step = int(state.step)
    if step in orbax.all_steps():
        return
    trees = dict(zip(ITEMS, split(state), strict=True))
    manifest: dict[str, Any] = {"step": step, "metrics": metrics or {}}
    for item, tree in trees.items():
        host = jax.device_get(tree)
        manifest[item] = {path: _describe(leaf) for path, leaf in flatten(host).items()}
        bad = [path for path, leaf in flatten(host).items() if not _finite(leaf)]
        if bad:
            raise CheckpointError(f"step {step} has NaN or Inf in {item}/{bad[0]} and {len(bad) - 1} more; not saved")
    manifest["digest"] = _manifest_digest(manifest)
    args = {item: ocp.args.StandardSave(_nest(flatten(tree))) for item, tree in trees.items()}
    try:
        orbax.save(step, args=ocp.args.Composite(**args, manifest=ocp.args.JsonSave(manifest)))
        _delete_superseded(orbax)
    except Exception as error:
        raise _disk_full(error, orbax) or error from None


def _disk_full(error, orbax):
    """The CheckpointError to raise where `error` says that the disk is full; None for any other."""
    if isinstance(error, CheckpointError) or not ("No space left" in str(error) or getattr(error, "errno", 0) == 28):
        return None
    latest = latest_step(orbax)
    kept = "there is no earlier checkpoint" if latest is None else f"the last good checkpoint is step {latest}"
    return CheckpointError(f"disk full while saving in {orbax.directory}; {kept}; free space, run the same command")


def _delete_superseded(orbax):
    steps = sorted(orbax.all_steps())
    keep = {*steps[-KEEP_LATEST:], best_step(orbax)}
    if superseded := [step for step in steps if step not in keep]:
        orbax.wait_until_finished()
        for step in superseded:
            orbax.delete(step)


_OWN = ("head", "memory")  # what an objective adds to the network's variables


def split(state: TrainState) -> tuple[Any, Any]:
    """(what is evaluated, the rest): the two items on disk."""
    rest = {"step": state.step, "opt_state": state.opt_state}
    rest |= {name: state.variables[name] for name in _OWN if name in state.variables}
    if state.ema_params is not None:
        rest["params"] = state.variables["params"]
    return evaluation_variables(state), rest


def join(evaluated: Any, rest: Any) -> TrainState:
    """The inverse of `split`."""
    variables = {**evaluated, "params": rest.get("params", evaluated["params"])}
    variables |= {name: rest[name] for name in _OWN if name in rest}
    ema_params = evaluated["params"] if "params" in rest else None
    return TrainState(rest["step"], variables, rest["opt_state"], ema_params)


# ---- restoring ---------------------------------------------------------------------------------------------


def restore_latest(orbax: Any, like: TrainState) -> TrainState | None:
    """The newest good state, placed as `like` (arrays or ShapeDtypeStructs with shardings); None if there is none.

    Damaged steps are moved to `damaged/`, with one line each. Raises CheckpointError when a step belongs to another
    network, or when steps exist and none is good.
    """
    steps = sorted(orbax.all_steps(), reverse=True)
    for step in steps:
        try:
            return join(
                *(_restore_item(orbax, step, item, tree) for item, tree in zip(ITEMS, split(like), strict=True))
            )
        except _DamagedError as error:
            log.warning("%s; set aside, trying the step before", error)
            _set_aside(orbax, step)
    if steps:
        raise CheckpointError(f"none of the checkpoints {sorted(steps)} in {orbax.directory} is whole; see damaged/")
    return None


def restore_variables(orbax: Any, which: str | int, like: Any) -> tuple[int, Any]:
    """(step, variables) of the checkpoint "best", "last" or a step, without the optimiser; placed as `like`."""
    return restore_part(orbax, which, "variables", like)


def restore_part(orbax: Any, which: str | int, item: str, like: Any) -> tuple[int, Any]:
    """(step, one of `ITEMS`) of the checkpoint "best", "last" or a step; placed as `like`, that item of `split`."""
    step = find_step(orbax, which)
    try:
        return step, _restore_item(orbax, step, item, like)
    except _DamagedError as error:
        others = sorted(set(orbax.all_steps()) - {step})
        raise CheckpointError(f"{error}; other checkpoints: {others or 'none'}") from None


def find_step(orbax: Any, which: str | int) -> int:
    """The step that "best", "last" or a number means; raises CheckpointError naming the steps there are."""
    steps = sorted(orbax.all_steps())
    if not steps:
        raise CheckpointError(f"{orbax.directory} has no checkpoint; train first")
    if which == "last":
        return steps[-1]
    if which == "best":
        best = best_step(orbax)
        if best is None:
            raise CheckpointError(f"no checkpoint in {orbax.directory} was validated; use last, or one of {steps}")
        return best
    if not str(which).isdigit() or int(which) not in steps:
        raise CheckpointError(f"checkpoint '{which}' is not in {orbax.directory}; allowed: best, last, {steps}")
    return int(which)


def best_step(orbax: Any) -> int | None:
    """The step of highest validation "selection"; among equals that of higher clean accuracy, then the latest.

    None where none was validated.
    """
    scores = {}
    for step in orbax.all_steps():
        with contextlib.suppress(_DamagedError):
            scored = _manifest(orbax, step)["metrics"]
            if scored.get("selection") is not None:
                scores[step] = (scored["selection"], scored.get("clean_acc", 0.0), step)
    return max(scores, key=scores.__getitem__) if scores else None


def latest_step(orbax: Any) -> int | None:
    """The newest committed step; None where there is none."""
    return max(orbax.all_steps(), default=None)


def metrics(orbax: Any, step: int) -> dict[str, Any]:
    """The validation metrics saved with a step; empty where it was not validated."""
    return _manifest(orbax, step)["metrics"]


class _DamagedError(Exception):
    """What is on disk is not what was saved."""


def _manifest(orbax, step):
    try:
        manifest = orbax.restore(step, args=ocp.args.Composite(manifest=ocp.args.JsonRestore()))["manifest"]
        if manifest.pop("digest") != _manifest_digest(manifest):
            raise ValueError("its digest differs from the saved one")
        return manifest
    except Exception as error:  # whatever a damaged file makes JSON, Orbax or the file system say
        raise _DamagedError(f"checkpoint {step}: manifest unreadable ({_first_line(error)})") from None


def _manifest_digest(manifest):
    return hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=16).hexdigest()


def _restore_item(orbax, step, item, like):
    saved = _manifest(orbax, step)[item]
    wanted = flatten(like)
    _refuse_other_network(step, saved, wanted)
    abstract = {path: _abstract(leaf) for path, leaf in wanted.items()}
    try:
        restore_args = ocp.args.Composite(**{item: ocp.args.StandardRestore(_nest(abstract))})
        leaves = flatten(orbax.restore(step, args=restore_args)[item])
    except Exception as error:  # truncated or missing files surface as errors of many libraries
        raise _DamagedError(f"checkpoint {step}: {item} unreadable ({_first_line(error)})") from None
    for path, leaf in leaves.items():
        if _describe(jax.device_get(leaf)) != saved[path]:
            raise _DamagedError(f"checkpoint {step}: {item}/{path} is damaged (its digest differs from the saved one)")
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[path] for path in wanted])


def _refuse_other_network(step, saved, wanted):
    differing = [
        f"{path}: saved {_kind(saved.get(path))}, wanted {_kind(_shape_and_type(wanted.get(path)))}"
        for path in {**wanted, **saved}
        if path not in saved or path not in wanted or _kind(saved[path]) != _kind(_shape_and_type(wanted[path]))
    ]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise CheckpointError(f"checkpoint {step} is of another network or optimiser: {'; '.join(differing[:3])}{more}")


def _abstract(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _set_aside(orbax, step):
    folder = Path(orbax.directory)
    if jax.process_index() == 0:
        target = folder.parent / "damaged" / str(step)
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        shutil.move(folder / str(step), target)
    orbax.reload()


# ---- leaves ------------------------------------------------------------------------------------------------


def flatten(tree: Any) -> dict[str, Any]:
    """{"opt_state/1/trace/params/head/dense/bias": leaf, …} in the tree's own order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _nest(flat):
    """Plain nested dicts, so that what lies on disk does not depend on the classes of optax or of this library."""
    nested: dict[str, Any] = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        node = nested
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return nested


def digest(array: Any) -> str:
    """A 128-bit digest of an array's bytes, or what stands for one in place of an array."""
    if hasattr(array, "digest"):
        return array.digest()
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=16).hexdigest()


def tree_digest(tree: Any) -> str:
    """One digest of all leaves and their names: equal for bit-identical states only."""
    total = hashlib.blake2b(digest_size=16)
    for path, leaf in flatten(jax.device_get(tree)).items():
        total.update(f"{path}:{digest(leaf)};".encode())
    return total.hexdigest()


def _describe(leaf):
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "digest": digest(leaf)}


def _shape_and_type(leaf):
    return None if leaf is None else {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _kind(description):
    return "nothing" if description is None else f"{description['dtype']}{description['shape']}"


def _finite(leaf):
    return not np.issubdtype(leaf.dtype, np.floating) or math.isfinite(float(np.sum(np.abs(leaf), dtype=np.float64)))


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
