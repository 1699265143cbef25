"""A run on disk: its folder, its configuration, and loading it again.

workdir/  config.json env.json metrics.jsonl checkpoints/<step>/ eval/<checkpoint>/<attack>.json report.html
"""

import argparse
import contextlib
import fcntl
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from ibjax import checkpoint as checkpoints
from ibjax import cluster, config, threat
from ibjax.attacks.names import split
from ibjax.data import Arrays, Split, load_splits, stratified, subset
from ibjax.errors import CheckpointError, InputError
from ibjax.step import Variables, linen_net

# Keys that change neither the training nor its result, and so may differ when a run is continued. The teacher is
# compared by its weights, the data by its content: where they lie may change. The threat model is compared in the
# attacks that take it.
_FREE_KEYS = (
    *("title", "threat", "evaluate", "contrast", "log_every", "checkpoint_every", "steps_per_dispatch"),
    *config.TEACHERS,
)


class Run(NamedTuple):
    """A restored network."""

    model: nn.Module
    variables: Variables  # {"params", "batch_stats"}
    logits_fn: Callable[[Array], Array]  # (B, H, W, C) in [0, 1] -> (B, num_classes), evaluation mode
    config: ConfigDict
    facts: dict[str, Any]  # of the data: label, input_shape, num_classes, sizes
    step: int
    workdir: Path

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
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--checkpoint", default="best", help="best, last or a step")
    return parser


def bare_command_line(module: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of any module, without arguments yet."""
    return argparse.ArgumentParser(
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


def load(workdir: str | os.PathLike, checkpoint: str | int = "best") -> Run:
    """Restores a trained network: `checkpoint` is "best" (on validation), "last" or a step.

    Raises CheckpointError when there is none, it is damaged, or it is of another network.
    """
    saved, facts = read_config(Path(workdir))
    model = build_model(saved.model, facts["num_classes"], "model")
    mesh = cluster.mesh()
    abstract = abstract_variables(model, facts["input_shape"], mesh)
    with checkpoints.manager(Path(workdir), read_only=True) as orbax:
        step, variables = checkpoints.restore_variables(orbax, checkpoint, abstract)
    predict = jax.jit(linen_net(model).predict)
    return Run(model, variables, lambda x: predict(variables, x)[0], saved, facts, step, Path(workdir))


def build_model(section: Any, num_classes: int, where: str) -> nn.Module:
    """The network of a `model` section; the data, not the configuration, says how many classes it has."""
    return config.build("models", section, where, num_classes=num_classes)


def load_data(settings: ConfigDict) -> Arrays:
    """The checked splits of a configuration; read once for all runs of a process that use them."""
    return _load_data(json.dumps(config.plain(settings.data), sort_keys=True))


@functools.lru_cache(maxsize=2)
def _load_data(section_text):
    section = json.loads(section_text)
    split = dict(val_size=section.pop("val_size"), split_seed=section.pop("split_seed"))
    split["fraction"] = section.pop("fraction", 1.0)
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
    """What config.json says of the data: its name, shape, sizes, and a digest of each split."""
    splits = {name: split for name in ("train", "val", "test") if (split := getattr(data, name)) is not None}
    return {
        "label": data.label,
        "input_shape": list(data.train.images.shape[1:]),
        "num_classes": data.num_classes,
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
    """Holds the workdir for this run, all its processes together; a second run in it is refused with InputError."""
    handle, problem = None, ""
    if jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            handle = (workdir / ".lock").open("w")
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = f"another run is using {workdir}; wait for it, or give another --workdir"
        except OSError as error:
            problem = f"--workdir={workdir} cannot be written or locked ({error.strerror}); give another folder"
    try:
        if not cluster.all_agree(not problem):
            raise InputError(problem or f"process 0 cannot use {workdir}")
        yield
    finally:
        if handle:
            handle.close()


def has_checkpoint(workdir: Path) -> bool:
    """Whether the folder holds a configuration and at least one committed checkpoint."""
    folder = workdir / "checkpoints"
    return (workdir / "config.json").is_file() and folder.is_dir() and any(p.name.isdigit() for p in folder.iterdir())


def write_config(workdir: Path, given: ConfigDict, facts: dict[str, Any]) -> None:
    """Writes config.json and env.json, or checks that the run which is already there is the same one.

    Before its first checkpoint a run has nothing to protect, and another configuration may take its place.
    """
    if has_checkpoint(workdir):
        saved, saved_facts = read_config(workdir)
        refuse_other_run(workdir, saved, given)
        for name, value in config.plain(facts).items():
            if config.plain(saved_facts).get(name) != value:
                raise InputError(
                    f"{workdir} was trained with another {name} ({saved_facts.get(name)}, now {value}); "
                    f"give another --workdir, or what it was trained with"
                )
    if jax.process_index() == 0:
        write_json(workdir / "config.json", {"config": config.plain(config.effective(given)), "data": facts})
        write_json(workdir / "env.json", environment())


def refuse_other_run(
    workdir: Path, saved: ConfigDict, given: ConfigDict, sections: tuple[str, ...] | None = None
) -> None:
    """Raises InputError where two configurations differ in one of the `sections`; None: in what makes a training."""
    parts = (config.complete(config.effective(part)) for part in (saved, given))
    old, new = (dict(config.leaves(config.plain(part))) for part in parts)
    for path in {**new, **old}:
        section = path.split(".")[0]
        compared = section not in _FREE_KEYS if sections is None else section in sections
        if compared and not config.same(path, old.get(path), new.get(path)):
            raise InputError(
                f"{workdir} holds a run with {path}={old.get(path)!r}, now {new.get(path)!r} is asked for; "
                f"give another --workdir, or the configuration that it was made with"
            )


def read_config(workdir: Path) -> tuple[ConfigDict, dict[str, Any]]:
    """(configuration, facts of the data) of a run; raises CheckpointError where there is none."""
    file = workdir / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{workdir} holds no run (no config.json); train there first, or give another folder")
    try:
        content = json.loads(file.read_text())
        saved, facts = config.upgrade(ConfigDict(content["config"])), content["data"]
        config.check(saved)
        saved = config.effective(saved)
        if type(facts["num_classes"]) is not int or not all(type(size) is int for size in facts["input_shape"]):
            raise ValueError("its data section is not that of a run")
        return saved, facts
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged or of another version ({error}); restore it from a copy") from None


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary path that becomes `file` when the block ends well: `file` is there whole or not at all."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(file: Path, content: Any) -> None:
    """Writes indented JSON, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


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
    }


def versions() -> dict[str, str]:
    """Of everything that can change a number; a source tree that is not installed says so."""
    found = {"python": platform.python_version()}
    for name in ("ibjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def hardware() -> str:
    """As "8 × NVIDIA H100 (2 processes)" or "1 × cpu, 2 cores"."""
    device = jax.devices()[0]
    text = f"{jax.device_count()} × {device.device_kind}"
    if device.platform == "cpu":
        text += f", {os.cpu_count()} cores"
    return text + (f" ({jax.process_count()} processes)" if jax.process_count() > 1 else "")


def commit() -> str | None:
    """The commit of the source tree, with "+" where it has changes; None for an installed package."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10)
        dirty = subprocess.run([*git, "status", "--porcelain", str(folder)], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") if head.returncode == 0 else None


def environment() -> dict[str, Any]:
    """What env.json says."""
    where = {"hardware": hardware(), "platform": platform.platform()}
    return {"command": sys.argv, "versions": versions(), "commit": commit(), **where}
