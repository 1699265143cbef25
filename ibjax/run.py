"""A run on disk: its folder, its configuration, and loading it again.

workdir/  config.json env.json metrics.jsonl checkpoints/<step>/ eval/<checkpoint>/<attack>.json report.html
"""

import argparse
import contextlib
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import secrets
import subprocess
import sys
import textwrap
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from ibjax import checkpoint as checkpoints
from ibjax import cluster, config, disk, errors, metrics, threat
from ibjax.attacks import entrance
from ibjax.attacks.names import split
from ibjax.data import Arrays, Split, load_splits, stratified, subset, unchanged
from ibjax.disk import replacing, write_json
from ibjax.errors import CheckpointError, InputError, UnreadableError
from ibjax.step import Variables, linen_net

__all__ = ["replacing", "write_json"]  # of ibjax.disk, for the modules that write into a run's folder

# Keys that change neither the training nor its result, and so may differ when a run is continued. The teacher is
# compared by its weights, the data by its content: where they lie may change. The threat model is compared in the
# attacks that take it.
_FREE_KEYS = (
    *("title", "threat", "evaluate", "contrast", "log_every", "checkpoint_every", "steps_per_dispatch"),
    *config.TEACHERS,
)

# what config.json says of the data beside its content, which the digests are of; runs of earlier versions lack it
DESCRIPTIONS = ("classes", "warnings")


_FREE_PATHS = ("data.path", "data.data_dir")
_SOURCE = Path(__file__).resolve().parent.parent  # of ibjax, where it is not installed
_PATHS = ("path", "data_dir")  # of a data section: `~` and $VARIABLES are expanded
log = logging.getLogger(__name__)


class Run(NamedTuple):
    """A restored network."""

    model: nn.Module
    variables: Variables  # {"params", "batch_stats"}
    logits_fn: Callable[[Array], Array]  # (B, H, W, C) in [0, 1] -> (B, num_classes), evaluation mode
    config: ConfigDict
    facts: dict[str, Any]  # of the data: label, input_shape, num_classes, sizes
    step: int
    workdir: Path
    validation: dict[str, float]  # the metrics that the checkpoint was saved with; empty where it was not validated

    # ---- command lines -----------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        """On one screen: what it is, how it was trained, what can be done with it."""
        shape, classes = tuple(self.facts["input_shape"]), self.facts["num_classes"]
        weights = sum(leaf.size for leaf in jax.tree.leaves(self.variables["params"]))
        model, objective = (_in_words(self.config[section]) for section in ("model", "objective"))
        seen = threat.trained(self.config)
        trained = "clean images" if seen is None else f"adversarial images in {seen['norm']} at eps {seen['eps']}"
        lines = {
            "workdir": f"{self.workdir}, step {self.step}",
            "model": f"{model}, {weights:,} parameters",
            "data": f"{self.facts['label']}, images {shape}, {classes} classes",
            "trained": "elsewhere, imported" if "imported" in self.facts else f"{objective} on {trained}",
        }
        title = self.config.title or self.workdir.resolve().name
        fields = ", ".join(f".{field}" for field in self._fields)
        return "\n".join(
            [f"Run: {title}", *(f"  {key:8} {text}" for key, text in lines.items()), f"  fields   {fields}"]
        )


def _in_words(section):
    """A section of a configuration as "trades(beta=3.0)", shortened where it is long."""
    options = ", ".join(f"{key}={value}" for key, value in config.plain(section).items() if key != "name")
    return textwrap.shorten(f"{section.name}({options})", 80, placeholder=" …)")


def command_line(module: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of a module that reads a run: --workdir and --checkpoint, for it to add to."""
    parser = bare_command_line(module, description)
    parser.add_argument("--workdir", type=disk.path, required=True)
    parser.add_argument("--checkpoint", default="best", help="best, last or a step")
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line on stderr, as for every other wrong input."""
        self.exit(errors.EXIT_INPUT, f"error: {message}; {self.prog} --help says what there is\n")


def bare_command_line(module: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of any module, without arguments yet."""
    errors.prepare_streams()  # help texts are not ASCII
    return _Parser(
        prog=f"python -m {module}",
        allow_abbrev=False,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_attacks(parser: argparse.ArgumentParser) -> None:
    """Adds --attacks, in place of those of the run's `evaluate` section."""
    parser.add_argument(
        "--attacks",
        type=names,
        help='names, separated by commas, as "fgsm, pgd-20(restarts=5)"; default: those of the run\'s configuration',
    )


def names(text: str) -> list[str]:
    """The type of an argument that lists names, separated by commas; those within parentheses belong to a name."""
    return split(text)


# ---- a trained network -------------------------------------------------------------------------------------


def load(workdir: str | os.PathLike, checkpoint: str | int = "best") -> Run:
    """Restores a trained network: `checkpoint` is "best" (on validation), "last" or a step.

    Its `logits_fn` takes images as the attacks do: values are looked at where there are some, inside a trace shape and
    type.

    Raises CheckpointError when there is none, it is damaged, or it is of another network, run or data set. Where a run
    has several processes, all of them call this, and InputError is raised unless they see the same.
    """
    workdir = disk.path(workdir)
    saved, facts = read_config(workdir)
    model = build_model(saved.model, facts["num_classes"], "model")
    mesh = cluster.mesh()
    abstract = abstract_variables(model, facts["input_shape"], mesh)
    with checkpoints.manager(workdir, read_only=True, run=identity(saved, facts)) as store:
        step, variables = checkpoints.restore_variables(store, checkpoint, abstract)
        validation = checkpoints.metrics(store, step)
    seen = {"step": step, "weights": checkpoints.tree_digest(variables), "configuration": disk.json_digest(facts)}
    cluster.agree(f"checkpoint '{checkpoint}' of {workdir.name}", seen, "give a --workdir that all processes share")
    predict = jax.jit(linen_net(model).predict)

    def logits_fn(x: Array) -> Array:
        if isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.floating):
            x = x.astype(np.float32)  # as JAX does
        return predict(variables, entrance.images(x))[0]

    return Run(model, variables, logits_fn, saved, facts, step, workdir, validation)


def build_model(section: Any, num_classes: int, where: str) -> nn.Module:
    """The network of a `model` section; the data, not the configuration, says how many classes it has."""
    return config.build("models", section, where, num_classes=num_classes)


_KEPT = 2  # data sets in memory
_loaded: dict[tuple, Arrays] = {}


def load_data(settings: ConfigDict) -> Arrays:
    """The checked splits of a configuration, read once for all runs of a process that use them.

    They are read again where a file that they were read from has changed since.
    """
    section = json.dumps(config.plain(settings.data), sort_keys=True)
    key = (
        section,
        os.getcwd(),
        *(os.environ.get(name) for name in ("HOME", "TFDS_DATA_DIR")),
    )  # what a path depends on
    found = _loaded.pop(key, None)
    _loaded[key] = found if found is not None and unchanged(found) else _read_data(json.loads(section))
    for oldest in list(_loaded)[:-_KEPT]:
        del _loaded[oldest]
    return _loaded[key]


def _read_data(section):
    split = dict(val_size=section.pop("val_size"), split_seed=section.pop("split_seed"))
    split["fraction"] = section.pop("fraction", 1.0)
    for name in _PATHS:
        if section.get(name):
            section[name] = str(disk.path(section[name]))
    options = config.arguments("data", section, "data")
    return load_splits(config.factory("data", section["name"]), **split, **options)


def test_split(trained: Run, n: int | None = None) -> Split:
    """The test images that a run was made with, or `n` of them, each class in proportion."""
    if trained.facts["digests"]["test"] is None:
        raise InputError(f"{trained.workdir} was imported with photographs; import it again with its data set")
    data = load_data(trained.config)
    if facts(data)["digests"]["test"] != trained.facts["digests"]["test"]:
        raise InputError(
            f"the test set of {trained.facts['label']} is not the one that {trained.workdir} was made with; "
            f"restore it, or train again"
        )
    if n is None or n == len(data.test.labels):
        return data.test
    if n > len(data.test.labels):
        raise InputError(f"n={n} is not allowed; the test set has {len(data.test.labels)} images")
    return subset(data.test, stratified(data.test.labels, n, seed=0))


def in_float32(model: nn.Module) -> nn.Module:
    """The network, and the ones inside it if there are any, computing in float32: as it is attacked and scored."""
    changes: dict[str, Any] = {"dtype": "float32"} if hasattr(model, "dtype") else {}
    if hasattr(model, "backbone"):
        changes["backbone"] = _section_in_float32(model.backbone)
    return model.clone(**changes)


def _section_in_float32(section):
    inner = {name: _section_in_float32(part) for name, part in section.items() if isinstance(part, Mapping)}
    takes = "dtype" in config.signature(config.factory("models", section["name"]))[0]
    return {**section, **inner, **({"dtype": "float32"} if takes else {})}


def facts(data: Arrays) -> dict[str, Any]:
    """What config.json says of the data: its name, shape, classes, sizes, warnings, and a digest of each split."""
    splits = {name: split for name in ("train", "val", "test") if (split := getattr(data, name)) is not None}
    return {
        "label": data.label,
        "input_shape": list(data.train.images.shape[1:]),
        "num_classes": data.num_classes,
        **{name: list(value) for name in DESCRIPTIONS if (value := getattr(data, name))},
        **{f"n_{name}": len(split.labels) for name, split in splits.items()},
        "digests": {name: checkpoints.tree_digest(split) for name, split in splits.items()},
    }


def abstract_variables(model: nn.Module, input_shape: tuple[int, ...], mesh: Any) -> Any:
    """Shapes and types of the network's variables, replicated over the mesh; nothing is computed."""
    x = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    shapes = {"batch_stats": {}, **jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)}
    sharding = jax.sharding.NamedSharding(mesh, cluster.REPLICATED)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


# ---- the folder --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Holds the workdir for this run, all its processes together.

    A second run in it is refused with InputError, and so is a folder that not all processes share.
    """
    handle, problem, token = None, "", secrets.token_hex(8)
    if jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            handle = (workdir / ".lock").open("a+", encoding="utf-8")
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            handle.truncate(0)
            handle.write(token)
            handle.flush()
        except BlockingIOError:
            problem = f"another run is using {workdir}; wait for it, or give another --workdir"
        except OSError as error:
            problem = f"--workdir={workdir} cannot be written or locked ({error.strerror}); give another folder"
    try:
        if problem := cluster.word_of_first("the lock of the workdir", problem):
            raise InputError(problem)
        token = cluster.word_of_first("the mark in the workdir", token)
        there = {"what process 0 has written is there": _sees(workdir / ".lock", token)}
        cluster.agree("workdirs", there, f"give a --workdir that all processes share, not {workdir}")
        yield
    finally:
        if handle:
            handle.close()


def _sees(file, token):
    """Whether this process reads the token in the file; folders of a network may take a moment."""
    for wait in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0):
        time.sleep(wait)
        with contextlib.suppress(OSError):
            if file.read_text(encoding="utf-8", errors="replace") == token:
                return True
    return False


def check_writable(*folders: Path) -> None:
    """Raises InputError, on every process, where the first could not write a result into one of the folders.

    A folder that is absent is made.
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
    """What every record must say of the run's checkpoints."""
    steps = _damaged_steps(workdir)
    if not steps:
        return []
    return [f"checkpoints of steps {', '.join(steps)} were damaged or lost; 'best' is the best of the others"]


def _damaged_steps(workdir):
    """The names in `damaged/`."""
    folder = workdir / "damaged"
    if not folder.is_dir():
        return []
    return disk.patiently(lambda: sorted(p.name for p in folder.iterdir() if p.is_dir()), folder)


def write_config(workdir: Path, given: ConfigDict, facts: dict[str, Any], *, restart: bool = False) -> dict[str, Any]:
    """Writes config.json and env.json, or checks that the run which is already there is the same one.

    Returns the run's `identity`, for `checkpoint.manager`. Before its first checkpoint a run has nothing to protect,
    and another configuration may take its place. Raises InputError where another run is there, where checkpoints were
    lost and not `restart`, and where the processes of this run do not see the same.
    """
    own, found = identity(given, facts), checkpoints.steps_in(workdir / "checkpoints")
    advice = "start all processes with one command and a --workdir that all of them share"
    cluster.agree("configurations or data", own, advice)
    cluster.agree("workdirs", {"steps in checkpoints/": found}, advice)
    if found:
        _refuse_other_run(workdir, given, facts, own)
    else:
        _refuse_lost_checkpoints(workdir, restart)
    if jax.process_index() == 0:
        write_json(workdir / "config.json", {"config": config.plain(config.effective(given)), "data": facts})
        write_json(workdir / "env.json", environment())
    return own


def identity(settings: ConfigDict, facts: Mapping[str, Any]) -> dict[str, Any]:
    """{path: value} of what makes a run this run: options that change its result, and the facts of its data."""
    found = {path: value for path, value in _options(settings).items() if not _is_free(path)}
    about = {key: value for key, value in config.plain(facts).items() if key not in DESCRIPTIONS}
    return {**found, **{f"its {path}": value for path, value in config.leaves(about)}}


def _options(settings):
    """{path: value} of all options, those of every call and the lengths of every attack among them."""
    return dict(config.leaves(config.plain(config.complete(config.effective(settings)))))


def _is_free(path):
    return path.split(".")[0] in _FREE_KEYS or path in _FREE_PATHS


def _refuse_other_run(workdir, given, facts, own):
    """Refuses to continue the checkpoints of another configuration or of other data."""
    try:
        saved, saved_facts = read_config(workdir)
    except UnreadableError:
        raise
    except CheckpointError as error:  # absent or damaged: the checkpoints say of which run they are
        with checkpoints.manager(workdir, read_only=True, run=own) as store:
            checkpoints.check_run(store)
        log.warning("%s; its checkpoints are of this configuration: it is written anew", error)
        return
    refuse_other_options(workdir, saved, given)
    for name, value in config.plain({k: v for k, v in facts.items() if k not in DESCRIPTIONS}).items():
        if config.plain(saved_facts).get(name) != value:
            raise InputError(
                f"{workdir} was trained with another {name} ({saved_facts.get(name)}, now {value}); "
                f"give another --workdir, or what it was trained with"
            )


def refuse_other_options(
    workdir: Path, saved: ConfigDict, given: ConfigDict, sections: tuple[str, ...] | None = None
) -> None:
    """Raises InputError where two configurations differ in one of the `sections`; None: in what makes a training."""
    old, new = _options(saved), _options(given)
    for path in {**new, **old}:
        compared = not _is_free(path) if sections is None else path.split(".")[0] in sections
        if compared and not config.same(path, old.get(path), new.get(path)):
            raise InputError(
                f"{workdir} holds a run with {path}={old.get(path)!r}, now {new.get(path)!r} is asked for; "
                f"give another --workdir, or the configuration that it was made with"
            )


def _refuse_lost_checkpoints(workdir, restart):
    """Refuses to begin at step 0 in silence where there was a checkpoint once."""
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


def read_config(workdir: Path) -> tuple[ConfigDict, dict[str, Any]]:
    """(configuration, facts of the data) of a run.

    Raises CheckpointError where there is none or it is damaged, UnreadableError where it cannot be read just now.
    """
    file = workdir / "config.json"
    try:
        content = disk.read_json(file)
        saved, facts = config.upgrade(ConfigDict(content["config"])), content["data"]
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
    except UnreadableError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IsADirectoryError) as error:
        raise CheckpointError(
            f"{file} is damaged or of another version ({error}); the training command writes it again, or restore it "
            f"from a copy"
        ) from None


# ---- where numbers come from -------------------------------------------------------------------------------


def provenance(trained: Run, checkpoint: str) -> dict[str, Any]:
    """What every record says of the run that it is of, and of where it was made."""
    return {
        "title": trained.config.title or trained.workdir.resolve().name,
        "checkpoint": checkpoint,
        "step": trained.step,
        "weights": checkpoints.tree_digest(trained.variables),
        "seed": trained.config.seed,
        "versions": versions(),
        "commit": commit(),
        "hardware": hardware(),
        **jax_settings(),
    }


def versions() -> dict[str, str]:
    """Of everything that can change a number."""
    found = {"python": platform.python_version(), "ibjax": own_version()}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def own_version() -> str:
    """Of the code that runs: that of its source tree where it lies in one, else of the installed package."""
    with contextlib.suppress(OSError, KeyError, ValueError):
        project = tomllib.loads((_SOURCE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        if project["name"] == "ibjax":
            return project["version"]
    try:
        return importlib.metadata.version("ibjax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def jax_settings() -> dict[str, Any]:
    """{"jax_settings": those settings of JAX that change a number and are not its defaults}; empty where all are."""
    usual = dict(default_matmul_precision=None, default_prng_impl="threefry2x32", threefry_partitionable=True)
    found = {name: getattr(jax.config, f"jax_{name}") for name in (*usual, "enable_x64", "disable_jit")}
    changed = {name: value for name, value in found.items() if value != usual.get(name, False)}
    return {"jax_settings": changed} if changed else {}


def hardware() -> str:
    """As "8 × NVIDIA H100 (2 processes)" or "1 × cpu, 2 cores"."""
    device = jax.devices()[0]
    text = f"{jax.device_count()} × {device.device_kind}"
    if device.platform == "cpu":
        text += f", {os.cpu_count()} cores"
    return text + (f" ({jax.process_count()} processes)" if jax.process_count() > 1 else "")


def commit() -> str:
    """The commit of ibjax's own repository, with "+" where it has changes; else its version, as "version 0.1.0".

    A repository that merely encloses the package, as that of a project with a virtual environment in it, says nothing
    of ibjax.
    """
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if Path(_git("rev-parse", "--show-toplevel")).resolve() == _SOURCE:
            return _git("rev-parse", "--short", "HEAD") + "+" * bool(_git("status", "--porcelain", "ibjax"))
    return f"version {own_version()}"


def _git(*arguments):
    """What git prints of the repository that ibjax lies in; raises SubprocessError where there is none."""
    command = ["git", "-C", str(_SOURCE), *arguments]
    done = subprocess.run(command, capture_output=True, check=True, encoding="utf-8", errors="replace", timeout=10)
    return done.stdout.strip()


def environment() -> dict[str, Any]:
    """What env.json says."""
    where = {"hardware": hardware(), "platform": platform.platform(), **jax_settings()}
    return {"command": sys.argv, "versions": versions(), "commit": commit(), **where}
