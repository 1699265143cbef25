"""A run on disk: its folder, its configuration, and loading it again.

workdir/  config.json env.json metrics.jsonl checkpoints/<step>/ eval/<checkpoint>/<attack>.json report.html
"""

import json
import logging
import os
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from ibjax import config, extensions, files, threat
from ibjax.data import Arrays, Split, load_splits, sample, unchanged
from ibjax.devices import cluster
from ibjax.errors import InputError
from ibjax.net import Variables, checked_logits, linen_net, to_float
from ibjax.runs import checkpoint as checkpoints
from ibjax.runs import own_code, provenance, rundir, trees

PATHS = ("path", "data_dir")  # of a data section: `~` and $VARIABLES are expanded


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

    def test(self, n: int | None = None) -> tuple[Array, Array]:
        """(images (n, H, W, C) float32 in [0, 1], labels (n,) int32) of the run's test set, each class in proportion.

        None: all of them. Raises InputError where there are fewer, and DataError where the data set is missing, or is
        not the one that the run was made with. If several processes run, all of them must call this.
        """
        split = test_split(self, n)
        return to_float(jnp.asarray(split.images[:])), jnp.asarray(split.labels)

    def __repr__(self) -> str:
        """A summary on one screen: the network, how it was trained, what can be done with it."""
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
        fields = ", ".join([*(f".{field}" for field in self._fields), ".test(n)"])
        return "\n".join(
            [f"Run: {title}", *(f"  {key:8} {text}" for key, text in lines.items()), f"  fields   {fields}"]
        )


def _in_words(section):
    """A section of a configuration as "trades(beta=3.0)", shortened where it is long."""
    options = ", ".join(f"{key}={value}" for key, value in config.plain(section).items() if key != "name")
    return textwrap.shorten(f"{section.name}({options})", 80, placeholder=" …)")


def load(workdir: str | os.PathLike, checkpoint: str | int = "best", *, trust: str | None = None) -> Run:
    """Restores a trained network: `checkpoint` is "best" (on validation), "last" or a step.

    trust: whether modules and files that the run names, and that are no part of ibjax or of an installed package's
      entry points, may be imported: "code" if they are what the run was made with, "changed" also if they have changed
      since. None: only those that this process uses anyway.

    Its `logits_fn` checks its images as the attacks do: the values of concrete arrays; inside a trace, where there are
    no values, shape and type only.

    Raises CheckpointError where the checkpoint is missing, damaged, or of another network, run or data set, and
    CodeError where the run names code that is missing, has changed, or may not run. If several
    processes run, all of them must call this; InputError is raised unless they see the same checkpoint.
    """
    workdir = files.path(workdir)
    with extensions.trusting(trust):
        saved, facts = rundir.read_config(workdir)
    model = build_model(saved.model, facts["num_classes"], "model")
    mesh = cluster.mesh()
    abstract = abstract_variables(model, facts["input_shape"], mesh)
    with checkpoints.manager(workdir, read_only=True, run=rundir.identity(saved, facts)) as store:
        step, variables, validation = checkpoints.restore_variables(store, checkpoint, abstract)
    seen = {"step": step, "weights": trees.digest(variables), "configuration": files.json_digest(facts)}
    cluster.agree(f"checkpoint '{checkpoint}' of {workdir.name}", seen, "give a --workdir that all processes share")
    logits_fn = checked_logits(linen_net(in_float32(model)).predict, variables)  # as evaluation has it
    return Run(model, variables, logits_fn, saved, facts, step, workdir, validation)


def build_model(section: Any, num_classes: int, where: str) -> nn.Module:
    """The network of a `model` section; the number of classes comes from the data, not from the configuration."""
    return config.build("models", section, where, num_classes=num_classes)


_KEPT = 2  # data sets in memory


_loaded: dict[tuple, tuple[Arrays, dict[str, Any]]] = {}


def load_data(settings: ConfigDict) -> Arrays:
    """The checked splits of a configuration, cached for all runs of a process that use them.

    They are read again if one of their files has changed since. If several processes run, all of them must call this,
    and all raise InputError if one of them lacks a file, cannot use it, or has another version of the data.
    """
    section = json.dumps(config.plain(settings.data), sort_keys=True)
    key = (
        section,
        os.getcwd(),
        *(os.environ.get(name) for name in ("HOME", "TFDS_DATA_DIR")),
    )  # what a path depends on
    with cluster.together("data"):
        found = _loaded.pop(key, None)
        if found is None or not unchanged(found[0]):
            data = _read_data(json.loads(section))
            found = data, _identified(data) if cluster.several() else {}
        _loaded[key] = found
        for oldest in list(_loaded)[:-_KEPT]:
            del _loaded[oldest]
    cluster.agree("data", found[1], f"give all hosts the same files of {found[0].label or settings.data.name}")
    return found[0]


def _identified(data):
    """{what: its identity} by which processes compare their data: of each split its size and digest."""
    found = facts(data)
    digests = {name: f"{found[f'n_{name}']} images, digest {digest}" for name, digest in found["digests"].items()}
    generated = {"extra": "{n} images, digest {digest}".format(**found["extra"])} if "extra" in found else {}
    return {"classes": found["num_classes"], **digests, **generated}


def _read_data(section):
    split = dict(val_size=section.pop("val_size"), split_seed=section.pop("split_seed"))
    split["fraction"], split["extra"] = section.pop("fraction", 1.0), section.pop("extra", None)
    if split["extra"] is not None:
        split["extra"]["path"] = str(files.path(split["extra"]["path"]))
    for name in PATHS:
        if section.get(name):
            section[name] = str(files.path(section[name]))
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
    return sample(data.test, n)


def in_float32(model: nn.Module) -> nn.Module:
    """The network, and any network inside it, with dtype float32: networks are attacked and scored in float32."""
    changes: dict[str, Any] = {"dtype": "float32"} if hasattr(model, "dtype") else {}
    if hasattr(model, "backbone"):
        changes["backbone"] = _section_in_float32(model.backbone)
    return model.clone(**changes)


def _section_in_float32(section):
    inner = {name: _section_in_float32(part) for name, part in section.items() if isinstance(part, Mapping)}
    takes = "dtype" in config.signature(config.factory("models", section["name"]))[0]
    return {**section, **inner, **({"dtype": "float32"} if takes else {})}


def facts(data: Arrays) -> dict[str, Any]:
    """The data's description in config.json: name, shape, classes, sizes, warnings, and a digest of each split."""
    splits = {name: split for name in ("train", "val", "test") if (split := getattr(data, name)) is not None}
    return {
        "label": data.label,
        "input_shape": list(data.train.images.shape[1:]),
        "num_classes": data.num_classes,
        **{name: list(value) for name in rundir.DESCRIPTIONS if (value := getattr(data, name))},
        **{f"n_{name}": len(split.labels) for name, split in splits.items()},
        "digests": {name: trees.digest(split) for name, split in splits.items()},
        **({} if data.extra is None else {"extra": {"n": len(data.extra.labels), "digest": data.extra.digest}}),
    }


def abstract_variables(model: nn.Module, input_shape: tuple[int, ...], mesh: Any) -> Any:
    """Shapes and types of the network's variables, replicated over the mesh; nothing is computed."""
    x = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    shapes = {"batch_stats": {}, **jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)}
    sharding = jax.sharding.NamedSharding(mesh, cluster.REPLICATED)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def origin(trained: Run, checkpoint: str) -> dict[str, Any]:
    """What every record states about its run, and about where and with what it was made."""
    return {
        "title": trained.config.title or trained.workdir.resolve().name,
        "checkpoint": checkpoint,
        "step": trained.step,
        "weights": trained.facts.get("imported", {}).get("weights") or trees.digest(trained.variables),
        "seed": trained.config.seed,
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "hardware": provenance.hardware(),
        **provenance.jax_settings(),
        **({"own_code": code} if (code := own_code.record(trained.config)) else {}),
    }
