"""Checkpoints: the only file that uses Orbax.

`checkpoints/<step>/` holds three items:

    variables   what is evaluated: {"params", "batch_stats"}, with averaged parameters if the run averages them
    training    the rest of the train state
    manifest    shape, type and digest of every leaf of both, the validation metrics of that step, the run's identity

Orbax writes a step and commits it by renaming its folder, so a step is there whole or not at all. It is read without
Orbax, by `ibjax.runs.stored`.

Guarantees (tests of the same names): a save that is killed leaves the previous step restorable; a flipped byte is
found and its leaf named; damaged steps are set aside and the newest good one is used, but a step that temporarily
cannot be read is left where it is; a changed manifest does not silently make another step the best; another run,
architecture, class count or type is refused with the first differences; restoring works on any number of devices;
nothing is unpickled.
"""

import contextlib
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from ibjax import errors, files
from ibjax.devices import cluster
from ibjax.errors import CheckpointError, UnreadableError
from ibjax.runs import stored, trees, writers
from ibjax.runs.stored import DamagedError, GoneError
from ibjax.step import TrainState, evaluation_variables

ITEMS = ("variables", "training")


_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder that Orbax has not committed, or that is being deleted


KEEP_LATEST = 2  # so that training can fall back on the second where the newest is damaged


log = logging.getLogger(__name__)


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which leaves notices of preemption to the training loop.

    XLA keeps one counter of them in a process. Orbax sets it to the number of the step whenever it saves; the loop,
    which counts its dispatches, would then never meet the count at which a notice takes effect.
    """

    def reached_preemption(self, step: int) -> bool:
        """Never: `ibjax.devices.cluster.preempted` asks."""
        return False


class Store:
    """The checkpoints of a workdir; `manager` opens it.

    Attributes:
      directory: `workdir/checkpoints`.
      run: what identifies the run ({path in the configuration: value}, see `rundir.identity`). It is saved with every
        step, and compared when a step is read; with None nothing is compared.
    """

    def __init__(self, directory: Path, run: Mapping[str, Any] | None, orbax: ocp.CheckpointManager | None):
        self.directory, self.run, self.orbax = directory, run, orbax
        self.kept: int | None = None  # the newest step that this process knows to be on disk
        self.saving: int | None = None  # a newer one that may not be there yet

    def all_steps(self) -> list[int]:
        """The committed steps, in ascending order."""
        return steps_in(self.directory)

    def wait_until_finished(self) -> None:
        """Returns once a save in the background is on disk; raises CheckpointError where the disk was full."""
        if self.orbax is None:
            return
        try:
            self.orbax.wait_until_finished()
        except Exception as error:
            raise _disk_full(error, self) or error from None


def steps_in(folder: Path) -> list[int]:
    """The committed steps in a folder of checkpoints, in ascending order; empty where there is no such folder."""
    try:
        return files.patiently(lambda: sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()), folder)
    except FileNotFoundError:
        return []


@contextlib.contextmanager
def manager(
    workdir: Path,
    *,
    read_only: bool = False,
    asynchronous: bool | None = None,
    run: Mapping[str, Any] | None = None,
) -> Iterator[Store]:
    """The store of `workdir`; leaving the context waits for pending saves.

    `asynchronous=None` saves in the background on accelerators only: on a CPU the next training step overwrites the
    very arrays that are being saved. Opening for writing removes what a killed save has left. `run`: see `Store`.
    """
    folder = Path(workdir).absolute() / "checkpoints"
    if read_only:
        if not folder.is_dir():
            raise CheckpointError(f"{folder} does not exist; train first, or give the workdir of a trained run")
        yield Store(folder, run, None)
        return
    options = ocp.CheckpointManagerOptions(
        create=True,
        save_interval_steps=1,
        enable_async_checkpointing=jax.default_backend() != "cpu" if asynchronous is None else asynchronous,
    )
    _sweep(folder)
    orbax = files.patiently(lambda: _Manager(folder, options=options), folder)
    store = Store(folder, run, orbax)
    if sorted(orbax.all_steps()) != store.all_steps():
        raise UnreadableError(f"{folder} cannot be listed twice with the same result; run the same command again")
    try:
        with orbax:
            yield store
    except Exception as error:  # a save in the background reports its failure at the next call, or here
        for _ in range(10):  # other threads of the failed save may still write for a moment
            _sweep(folder)
            time.sleep(0.1)
        raise _disk_full(error, store) or error from None


def _sweep(folder):
    """Removes the uncommitted folders that killed or failed saves have left."""
    if jax.process_index() == 0 and folder.is_dir():
        for leftover in files.patiently(lambda: [p for p in folder.iterdir() if _UNFINISHED in p.name], folder):
            shutil.rmtree(leftover, ignore_errors=True)


def save(store: Store, state: TrainState, metrics: dict[str, Any] | None = None) -> None:
    """Saves the state as its step's checkpoint, then deletes all but the two latest and the best.

    `metrics` are the step's validation metrics: "selection" is the value that ranks the step, "select" the name of the
    accuracy that this value is. Raises CheckpointError where the state has a NaN or Inf, and where the disk is full;
    earlier checkpoints stay.
    """
    step, orbax = int(state.step), store.orbax
    assert orbax is not None, "opened for reading"
    if step in orbax.all_steps():
        return
    trees_of = zip(ITEMS, split(state), strict=True)
    parts = {item: trees.flatten(jax.device_get(cluster.on_host(tree))) for item, tree in trees_of}
    manifest: dict[str, Any] = {"step": step, "metrics": metrics or {}}
    if store.run is not None:
        manifest["run"] = dict(store.run)
    for item, leaves in parts.items():
        manifest[item] = {path: trees.describe(leaf) for path, leaf in leaves.items()}
        bad = [path for path, leaf in leaves.items() if not trees.finite(leaf)]
        if bad:
            raise CheckpointError(f"step {step} has NaN or Inf in {item}/{bad[0]} and {len(bad) - 1} more; not saved")
    # of NumPy arrays: of those on devices, orbax would fetch each once more, by programs that slice it for each device
    args = {item: ocp.args.StandardSave(trees.nest(leaves)) for item, leaves in parts.items()}
    manifest_args = ocp.args.JsonSave(files.seal(manifest))
    try:
        if not orbax.save(step, args=ocp.args.Composite(**args, manifest=manifest_args)):
            raise CheckpointError(
                f"step {step} was not saved in {store.directory}: it holds later ones, {_text(store)}"
            )
        store.saving = step
        _delete_superseded(store)
    except Exception as error:
        raise _disk_full(error, store) or error from None


def _disk_full(error, store):
    """The CheckpointError to raise where `error` says that the disk is full; None for any other."""
    if isinstance(error, CheckpointError) or not errors.disk_full(error):
        return None
    latest = latest_step(store)
    kept = "there is no earlier checkpoint" if latest is None else f"the last good checkpoint is step {latest}"
    return CheckpointError(f"disk full while saving in {store.directory}; {kept}; free space, run the same command")


def _delete_superseded(store):
    """Deletes superseded steps; only committed steps supersede others, not one that is still being saved."""
    if jax.process_index() != 0:
        return
    steps = store.all_steps()
    try:
        keep = {*steps[-KEEP_LATEST:], best_step(store)}
    except (CheckpointError, UnreadableError) as error:
        log.warning("no superseded checkpoint is deleted: %s", error)
        return
    for step in steps:
        if step not in keep:  # renamed first, so that a step is whole or gone; the next start sweeps leftovers
            going = store.directory / f"{step}.superseded{_UNFINISHED}"
            with contextlib.suppress(OSError):  # a superseded step that stays does no harm
                (store.directory / str(step)).rename(going)
            shutil.rmtree(going, ignore_errors=True)


def _text(store):
    return ", ".join(map(str, store.all_steps())) or "none"


_OWN = ("head", "memory")  # what an objective adds to the network's variables


def split(state: TrainState) -> tuple[Any, Any]:
    """(what is evaluated, the rest of the state): the two items of `ITEMS`."""
    rest = {"step": state.step, "opt_state": state.opt_state}
    rest |= {name: state.variables[name] for name in _OWN if name in state.variables}
    if state.ema_params is not None:
        rest["params"] = state.variables["params"]
    if state.ema_stats is not None:
        rest["batch_stats"] = state.variables["batch_stats"]
    return evaluation_variables(state), rest


def join(evaluated: Any, rest: Any) -> TrainState:
    """The inverse of `split`."""
    variables = {**evaluated, **{name: rest[name] for name in ("params", "batch_stats") if name in rest}}
    variables |= {name: rest[name] for name in _OWN if name in rest}
    ema_params = evaluated["params"] if "params" in rest else None
    ema_stats = evaluated["batch_stats"] if "batch_stats" in rest else None
    return TrainState(rest["step"], variables, rest["opt_state"], ema_params, ema_stats)


def restore_latest(store: Store, like: TrainState, *, restart: bool = False) -> TrainState | None:
    """The newest good state, placed as `like` (arrays or ShapeDtypeStructs with shardings); None if there is none.

    Once a good step is found, the steps that a digest or the format proves damaged are moved to `damaged/` and logged
    with one line each. Where no step is good, CheckpointError is raised and nothing is moved; with `restart` all steps
    are moved to `restarted-N/` instead, and None is returned.

    Raises CheckpointError also where a step belongs to another network or run, or where the processes of a run see
    different checkpoints, and UnreadableError where a step temporarily cannot be read. Nothing is moved then.
    """
    found, damaged = None, {}
    for step in reversed(store.all_steps()):
        try:
            if found is None:
                items = (_restore_item(store, step, item, tree) for item, tree in zip(ITEMS, split(like), strict=True))
                found = join(*items)
            else:  # it may be the best, which is evaluated in the end
                stored.arrays(store, step, "variables")
        except DamagedError as error:
            damaged[step] = str(error)
    cluster.agree(
        "checkpoints",
        {"newest whole step": None if found is None else int(found.step), "damaged steps": sorted(damaged)},
        "give a --workdir that all processes share",
    )
    if found is None and damaged and not restart:
        raise CheckpointError(
            f"none of the checkpoints {sorted(damaged)} in {store.directory} is whole ({damaged[max(damaged)]}); "
            f"nothing was moved; restore them from a copy, or give --restart to set them aside and begin at step 0"
        )
    for step, reason in damaged.items():
        log.warning("%s; moved to damaged/", reason)
        if jax.process_index() == 0:
            _set_aside(store, step)
    if found is None and damaged and jax.process_index() == 0:
        retire(store.directory.parent)
    if damaged:
        cluster.agree("damaged checkpoints set aside", {})  # all wait for process 0
        for _ in range(100):  # until this host's view of a shared disk is the present one
            if damaged.keys().isdisjoint(store.all_steps()):
                break
            time.sleep(0.1)
        assert store.orbax is not None, "opened for reading"
        store.orbax.reload()
    store.kept = None if found is None else int(found.step)
    return found


def restore_variables(store: Store, which: str | int, like: Any) -> tuple[int, Any, dict[str, Any]]:
    """(step, variables, validation metrics) of the checkpoint "best", "last" or a step, without the optimiser.

    The variables are placed as `like`.
    """

    def read(step):
        return step, _restore_item(store, step, "variables", like), metrics(store, step)

    return _read_kept(store, which, read)


def restore_part(store: Store, which: str | int, item: str, like: Any) -> tuple[int, Any]:
    """(step, one of `ITEMS`) of the checkpoint "best", "last" or a step; placed as `like`, that item of `split`."""
    return _read_kept(store, which, lambda step: (step, _restore_item(store, step, item, like)))


def _read_kept(store, which, read):
    """`read(step)` of the checkpoint "best", "last" or a step; a run that is training may delete it meanwhile."""
    for _ in range(10):
        step = find_step(store, which)
        try:
            return read(step)
        except DamagedError as error:
            others = sorted(set(store.all_steps()) - {step})
            raise CheckpointError(f"{error}; other checkpoints: {others or 'none'}") from None
        except GoneError:
            log.info("checkpoint %s was superseded while it was read; trying the present one", step)
    raise CheckpointError(f"checkpoint '{which}' in {store.directory} is superseded again and again; give a step")


def find_step(store: Store, which: str | int) -> int:
    """The step that "best", "last" or a number means; CheckpointError, which names the existing steps, if none."""
    steps = store.all_steps()
    if not steps:
        raise CheckpointError(f"{store.directory} has no checkpoint; train first")
    if which == "last":
        return steps[-1]
    if which == "best":
        best = best_step(store)
        if best is None:
            raise CheckpointError(f"no checkpoint in {store.directory} was validated; use last, or one of {steps}")
        return best
    if not str(which).isdigit() or int(which) not in steps:
        raise CheckpointError(f"checkpoint '{which}' is not in {store.directory}; allowed: best, last, {steps}")
    return int(which)


def best_step(store: Store) -> int | None:
    """The step of highest validation "selection"; ties go to the higher clean accuracy, then to the later step.

    None where no step was validated. Raises CheckpointError where a step is damaged, since it may have been the best.
    """
    scores = {}
    for step in store.all_steps():
        try:
            scored = stored.manifest(store, step)["metrics"]
        except GoneError:
            continue
        except DamagedError as error:
            raise CheckpointError(
                f"{error}, so that it cannot be told which checkpoint is the best; give --checkpoint=last or a step of "
                f"{store.all_steps()}, or run the training command again, which sets it aside"
            ) from None
        if scored.get("selection") is not None:
            scores[step] = (scored["selection"], scored.get("clean_acc", 0.0), step)
    return max(scores, key=scores.__getitem__) if scores else None


def latest_step(store: Store) -> int | None:
    """The newest committed step; None where there is none."""
    return max(store.all_steps(), default=None)


def metrics(store: Store, step: int) -> dict[str, Any]:
    """The validation metrics saved with a step; empty where it was not validated."""
    return stored.manifest(store, step)["metrics"]


def saved(store: Store) -> dict[str, int]:
    """{"saved": the newest step that is on disk}, as far as this process has restored or saved one; else {}.

    At most one folder is looked for: this is asked for in every row of the metrics.
    """
    if store.saving is not None and (store.directory / str(store.saving)).is_dir():
        store.kept, store.saving = store.saving, None
    return {} if store.kept is None else {"saved": store.kept}


def check_run(store: Store) -> None:
    """Raises CheckpointError unless every undamaged step was saved with an identity equal to `store.run`.

    This identifies a run whose config.json is missing. Older versions saved no identity; their steps raise as well.
    """
    for step in store.all_steps():
        with contextlib.suppress(DamagedError, GoneError):
            if "run" not in stored.manifest(store, step):
                raise CheckpointError(
                    f"{store.directory} has no config.json beside it, and step {step} does not say of which run it is; "
                    f"restore config.json from a copy, or give another --workdir"
                )


def _restore_item(store, step, item, like):
    wanted = trees.flatten(like)
    arrays = stored.arrays(store, step, item, wanted)
    return jax.tree.unflatten(jax.tree.structure(like), [_placed(arrays[path], leaf) for path, leaf in wanted.items()])


def _placed(array, leaf):
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def _set_aside(store, step):
    """Moves a step to `damaged/`; steps that were moved there before stay."""
    above = store.directory.parent / "damaged"
    names = (str(step), *(f"{step}-{n}" for n in range(2, 1000)))
    target = next(above / name for name in names if not (above / name).exists())
    above.mkdir(exist_ok=True)
    shutil.move(store.directory / str(step), target)


def retire(workdir: Path) -> Path:
    """Moves `damaged/`, metrics.jsonl and what writers remember to a new folder `restarted-N/`, which is returned."""
    target = next(folder for n in range(1, 10**6) if not (folder := workdir / f"restarted-{n}").exists())
    target.mkdir()
    for name in ("damaged", "metrics.jsonl", *writers.MEMORIES):
        with contextlib.suppress(FileNotFoundError):
            shutil.move(workdir / name, target / name)
    return target
