"""Checkpoints: the only file that uses Orbax and knows its format on disk.

`checkpoints/<step>/` holds three items:

    variables   what is evaluated: {"params", "batch_stats"}, with averaged parameters if the run averages them
    training    the rest of the train state
    manifest    shape, type and digest of every leaf of both, the validation metrics of that step, the run's identity

Orbax writes a step and commits it by renaming its folder, so a step is there whole or not at all. This module reads it
without Orbax, in three stages. First it reads the bytes of every file, which tells a failing disk from damaged
content. Then it opens, in memory, the OCDBT database that these bytes form; its own checksums detect changed bits.
Finally it compares the digest of each leaf.

Guarantees (tests of the same names): a save that is killed leaves the previous step restorable; a flipped byte is
found and its leaf named; damaged steps are set aside and the newest good one is used, but a step that temporarily
cannot be read is left where it is; a changed manifest does not silently make another step the best; another run,
architecture, class count or type is refused with the first differences; restoring works on any number of devices;
nothing is unpickled.
"""

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tensorstore

from ibjax import config, files
from ibjax.devices import cluster
from ibjax.errors import CheckpointError, UnreadableError
from ibjax.runs import trees, writers
from ibjax.step import TrainState, evaluation_variables

ITEMS = ("variables", "training")


_DATABASE = "manifest.ocdbt"  # the root of an item's database


_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder that Orbax has not committed, or that is being deleted


KEEP_LATEST = 2  # so that training can fall back on the second where the newest is damaged


log = logging.getLogger(__name__)


class Store:
    """The checkpoints of a workdir; `manager` opens it.

    Attributes:
      directory: `workdir/checkpoints`.
      run: what identifies the run ({path in the configuration: value}, see `rundir.identity`). It is saved with every
        step, and compared when a step is read; with None nothing is compared.
    """

    def __init__(self, directory: Path, run: Mapping[str, Any] | None, orbax: ocp.CheckpointManager | None):
        self.directory, self.run, self.orbax = directory, run, orbax

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
    orbax = files.patiently(lambda: ocp.CheckpointManager(folder, options=options), folder)
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
    parts = {item: cluster.on_host(tree) for item, tree in zip(ITEMS, split(state), strict=True)}
    manifest: dict[str, Any] = {"step": step, "metrics": metrics or {}}
    if store.run is not None:
        manifest["run"] = dict(store.run)
    for item, tree in parts.items():
        host = jax.device_get(tree)
        manifest[item] = {path: trees.describe(leaf) for path, leaf in trees.flatten(host).items()}
        bad = [path for path, leaf in trees.flatten(host).items() if not trees.finite(leaf)]
        if bad:
            raise CheckpointError(f"step {step} has NaN or Inf in {item}/{bad[0]} and {len(bad) - 1} more; not saved")
    args = {item: ocp.args.StandardSave(trees.nest(trees.flatten(tree))) for item, tree in parts.items()}
    manifest_args = ocp.args.JsonSave(files.seal(manifest))
    try:
        if not orbax.save(step, args=ocp.args.Composite(**args, manifest=manifest_args)):
            raise CheckpointError(
                f"step {step} was not saved in {store.directory}: it holds later ones, {_text(store)}"
            )
        _delete_superseded(store)
    except Exception as error:
        raise _disk_full(error, store) or error from None


def _disk_full(error, store):
    """The CheckpointError to raise where `error` says that the disk is full; None for any other."""
    if isinstance(error, CheckpointError) or not ("No space left" in str(error) or getattr(error, "errno", 0) == 28):
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
            else:
                _manifest(store, step)  # must be sound, since it decides which step is the best
        except _DamagedError as error:
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
        assert store.orbax is not None, "opened for reading"
        store.orbax.reload()
    return found


def restore_variables(store: Store, which: str | int, like: Any) -> tuple[int, Any]:
    """(step, variables) of the checkpoint "best", "last" or a step, without the optimiser; placed as `like`."""
    return restore_part(store, which, "variables", like)


def restore_part(store: Store, which: str | int, item: str, like: Any) -> tuple[int, Any]:
    """(step, one of `ITEMS`) of the checkpoint "best", "last" or a step; placed as `like`, that item of `split`."""
    for _ in range(10):  # a run that is still training may delete the step meanwhile
        step = find_step(store, which)
        try:
            return step, _restore_item(store, step, item, like)
        except _DamagedError as error:
            others = sorted(set(store.all_steps()) - {step})
            raise CheckpointError(f"{error}; other checkpoints: {others or 'none'}") from None
        except _GoneError:
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
            scored = _manifest(store, step)["metrics"]
        except _GoneError:
            continue
        except _DamagedError as error:
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
    return _manifest(store, step)["metrics"]


def check_run(store: Store) -> None:
    """Raises CheckpointError unless every undamaged step was saved with an identity equal to `store.run`.

    This identifies a run whose config.json is missing. Older versions saved no identity; their steps raise as well.
    """
    for step in store.all_steps():
        with contextlib.suppress(_DamagedError, _GoneError):
            if "run" not in _manifest(store, step):
                raise CheckpointError(
                    f"{store.directory} has no config.json beside it, and step {step} does not say of which run it is; "
                    f"restore config.json from a copy, or give another --workdir"
                )


class _DamagedError(CheckpointError):
    """What is on disk is not what was saved, by a digest or by its format."""


class _GoneError(CheckpointError):
    """The step was deleted while it was read."""


def _manifest(store, step):
    """The manifest of a step; CheckpointError where it is of another run than the store's."""
    folder = store.directory / str(step)
    try:
        manifest = files.read_json(folder / "manifest" / "metadata", sealed=True)
    except UnreadableError:
        raise
    except FileNotFoundError:
        if not folder.is_dir():
            raise _GoneError(f"checkpoint {step} is no longer in {store.directory}") from None
        raise _DamagedError(f"checkpoint {step}: manifest is missing") from None
    except (ValueError, IsADirectoryError) as error:
        raise _DamagedError(f"checkpoint {step}: manifest is damaged ({_first_line(error)})") from None
    if manifest["step"] != step:
        raise CheckpointError(f"{folder} holds the checkpoint of step {manifest['step']}; give the folder that name")
    _refuse_other_run(store, step, manifest.get("run"))
    return manifest


def _refuse_other_run(store, step, saved):
    if store.run is None or saved is None:  # older versions did not save the identity
        return
    now = json.loads(json.dumps(dict(store.run)))
    differing = [
        f"{path}={value!r}, now {now.get(path)!r}"
        for path, value in saved.items()
        if not config.same(path, value, now.get(path))
    ]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise CheckpointError(
            f"checkpoint {step} in {store.directory} is of a run with {'; '.join(differing[:3])}{more}; give another "
            f"--workdir, or the configuration and the data that it was trained with"
        )


def _restore_item(store, step, item, like):
    try:
        return _restore_once(store, step, item, like)
    except _DamagedError:  # read once more before it is called damaged: the wrong byte may come from the transfer
        return _restore_once(store, step, item, like)


def _restore_once(store, step, item, like):
    saved = _manifest(store, step)[item]
    wanted = trees.flatten(like)
    _refuse_other_network(step, saved, wanted)
    arrays = files.patiently(lambda: _read_item(store.directory / str(step), item, saved), f"checkpoint {step}")
    leaves = [_placed(arrays[path], leaf) for path, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _read_item(folder, item, saved):
    """{path of a leaf: array} of an item of a step, as its manifest describes them."""
    context = tensorstore.Context()
    content = tensorstore.KvStore.open({"driver": "memory"}, context=context).result()
    try:
        names = files.files_below(folder / item)
        for name in names:
            content.write(name, files.read_bytes(folder / item / name)).result()
    except FileNotFoundError:
        if not folder.is_dir():
            raise _GoneError(f"checkpoint {folder.name} is no longer in {folder.parent}") from None
        raise _DamagedError(f"checkpoint {folder.name}: {item} is missing") from None
    if _DATABASE not in names:
        raise _DamagedError(f"checkpoint {folder.name}: {item}/{_DATABASE} is missing")
    arrays = {}
    for path, description in saved.items():
        where = f"checkpoint {folder.name}: {item}/{path}"
        base = {"driver": "ocdbt", "base": {"driver": "memory"}, "path": path.replace("/", ".") + "/"}
        spec = {"driver": "zarr", "kvstore": base, "fill_missing_data_reads": False}
        try:
            array = tensorstore.open(spec, context=context, open=True, read=True).result().read().result()
        except MemoryError:
            raise
        except Exception as error:  # only memory was read, so the content is damaged, not the disk
            raise _DamagedError(f"{where} is damaged ({_first_line(error)})") from None
        if trees.describe(array) != description:
            raise _DamagedError(f"{where} is damaged (its digest differs from the saved one)")
        arrays[path] = array
    return arrays


def _placed(array, leaf):
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def _refuse_other_network(step, saved, wanted):
    differing = [
        f"{path}: saved {trees.kind(saved.get(path))}, wanted {trees.kind(trees.shape_and_type(wanted.get(path)))}"
        for path in {**wanted, **saved}
        if path not in saved
        or path not in wanted
        or trees.kind(saved[path]) != trees.kind(trees.shape_and_type(wanted[path]))
    ]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise CheckpointError(f"checkpoint {step} is of another network or optimiser: {'; '.join(differing[:3])}{more}")


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


def _first_line(error):
    text = str(error).partition(" [tensorstore_spec")[0].strip()
    return (text or type(error).__name__).splitlines()[0][:200]
