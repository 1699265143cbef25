"""One call makes the records and the report for a network that was trained elsewhere.

    import ibjax
    from ibjax import wrap

    records = ibjax.benchmark(wrap.nnx(model), "cifar10", threat=("linf", "8/255"), attacks=("autoattack",),
                              workdir="runs/mine")

The folder gets eval/given/<attack>.json, report.html, and a config.json that says which network was attacked. A second
call computes only what is missing, and AutoAttack continues where it was stopped. Networks whose programs call back
into Python, as PyTorch's do, run on one device.
"""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from ml_collections import ConfigDict

from ibjax import config, files, wrap
from ibjax.attacks import entrance
from ibjax.data import IMAGES, Split, check, npz, sample, streamed
from ibjax.devices import cluster
from ibjax.errors import InputError, check_count
from ibjax.evaluation import report
from ibjax.evaluation.evaluate import attack_images, examine, write_records
from ibjax.evaluation.settings import replaced
from ibjax.net import to_float
from ibjax.runs import run, rundir, trees
from ibjax.wrap import training
from ibjax.wrap.networks import Network

_CHECKPOINT = "given"  # in place of best or last, in records and in eval/
_PROBED = 64  # images whose logits identify a network without arrays


def benchmark(
    network: Network | run.Run | Callable,
    data: Any,
    *,
    threat: tuple[str, str | float] = ("linf", "8/255"),
    attacks: Sequence[str] = ("autoattack",),
    workdir: str | os.PathLike | None = None,
    n: int | None = None,
    batch_size: int = 500,
    precision: str = "high",
    seed: int = 0,
    title: str = "",
) -> list[dict[str, Any]]:
    """Attacks a network on test images: one record per attack, with the keys of `ibjax.evaluate`.

    Args:
      network: a wrapped network (`ibjax.wrap`), one of `ibjax.zoo.load`, a run of `ibjax.load`, or a function from
        images (B, H, W, C) in [0, 1] to logits (B, classes) that JAX can trace.
      data: (x, y), images (N, H, W, C), uint8 or float in [0, 1], and labels (N,); the name of a data set of TFDS, as
        "cifar10", or "digits"; an .npz file with x and y, or x_test and y_test; or a `data` section, as
        dict(name="folder", path=DIR), whose test images are taken.
      threat: (norm, eps): eps as "8/255" or a number, in units of [0, 1] images.
      attacks: their names, as in `ibjax evaluate --attacks` (`evaluation.named`).
      workdir: folder for records and report; None: nothing is written.
      n: number of test images, each class in proportion; None: all.
      batch_size: images at a time.
      precision: of float32 products while attacking: "default", "high" or "highest" (`ibjax.devices.precision`).
      seed: of the attacks' random draws.
      title: the network's name in records and report; default: that of its class.

    Raises InputError, before anything runs, on a network that does not take these images, labels that it does not have,
    unknown attacks, an invalid threat model, or a folder that holds something else.
    """
    given = _network(network)
    settings, section = _settings(threat, attacks, n, batch_size, precision, seed)
    split, facts = _images(data)
    split, classes = _checked(split, f"{facts['label']}:", given)
    facts |= {"input_shape": list(split.images.shape[1:]), "num_classes": classes, "n_test": len(split.labels)}
    facts |= {"digests": {"test": trees.digest(split)}, "imported": _says(given, split)}
    settings.title = title or given.says.get("title") or str(given.says.get("network", "network")).rpartition(".")[2]
    settings.model = {key: value for key, value in given.says.items() if key not in ("title", "weights")}
    settings.data = config.plain(facts.pop("section"))
    folder = Path(settings.title) if workdir is None else files.path(workdir)
    split, before = sample(split, section["n"]), None if workdir is None else _before(folder, facts)
    if before is not None:  # its threat model decides which records have the usual file names
        settings = ConfigDict({**config.plain(settings), "threat": before["threat"], "evaluate": before["evaluate"]})
    variables = {"params": training.arrays(given), "batch_stats": {}}
    made = run.Run(training.linen_from_network(given), variables, given.logits_fn, settings, facts, 0, folder, {})
    with _devices(given, split):
        if workdir is None:
            return attack_images(made, split, facts["label"], _CHECKPOINT, section)[0]
        examined = examine(made, split, _CHECKPOINT, section)
        rundir.check_writable(folder)
        rundir.describe(folder, settings, facts)
        records = write_records(examined, folder / "eval" / _CHECKPOINT)
    if jax.process_index() == 0:
        report.write([folder], folder / "report.html")
    return records


# ---- what is given -------------------------------------------------------------------------------------------


def _network(network):
    """The network, wrapped."""
    if isinstance(network, Network):
        return network
    if isinstance(network, run.Run):
        wrapped = wrap.linen(run.in_float32(network.model), network.variables)
        return wrapped._replace(says={**wrapped.says, "title": network.config.title or network.workdir.name})
    family = {base.__module__.partition(".")[0] for base in type(network).__mro__}
    for library, name in (("torch", "pytorch(module)"), ("equinox", "equinox(model)"), ("haiku", "haiku(…)")):
        if library in family:
            raise InputError(f"the network is a {type(network).__name__} of {library}; give ibjax.wrap.{name}")
    if "flax" in family:
        kind = "linen(model, variables)" if hasattr(network, "apply") else "nnx(model)"
        raise InputError(f"the network is a {type(network).__name__} of flax; give ibjax.wrap.{kind}")
    return wrap.function(network)


def _settings(threat, attacks, n, batch_size, precision, seed):
    """(a configuration whose sections on training describe nothing, its checked `evaluate` section for this call)."""
    if not isinstance(threat, tuple | list) or len(threat) != 2:
        raise InputError(f"threat={threat!r} is not allowed; give norm and eps, as ('linf', '8/255')")
    if isinstance(attacks, str) or not isinstance(attacks, Sequence):
        raise InputError(f"attacks={attacks!r} is not allowed; give names, as ('fgsm', 'pgd-20', 'autoattack')")
    check_count("seed", seed, 0, config.LARGEST_SEED)
    settings = config.base()
    settings.threat = dict(norm=threat[0], eps=threat[1])
    settings.seed = seed
    settings = config.effective(settings)
    settings.evaluate.attacks = tuple(attacks)
    given = replaced({**config.plain(settings.evaluate), "n": n, "batch_size": batch_size, "precision": precision})
    settings.evaluate.update(attacks=given["attacks"], batch_size=batch_size, precision=precision)
    return settings, given


def _images(data):
    """(the test images, facts of them with their `section` of a configuration)."""
    if isinstance(data, tuple) and len(data) == 2:
        return Split(*map(np.asarray, data)), {"label": "given images", "section": {"label": "given images"}}
    if isinstance(data, str | os.PathLike) and str(data).endswith(".npz"):
        file = files.path(data)
        return npz.images(file), {"label": file.stem, "section": {"path": str(file)}}
    if isinstance(data, str):
        data = dict(name="digits") if data == "digits" else dict(name="tfds", dataset=data)
    if not isinstance(data, Mapping) or "name" not in data:
        given = f"a {type(data).__name__}" if not isinstance(data, Mapping) else repr(data)
        raise InputError(
            f"data is {given}; give (x, y), a file.npz, a section as dict(name='folder', path=…), or a name as "
            f"'cifar10': {', '.join(IMAGES)}"
        )
    section = {"val_size": 0, "split_seed": 0, **data}
    loaded = run.load_data(ConfigDict({"data": section}))
    descriptions = {name: list(value) for name in rundir.DESCRIPTIONS if (value := getattr(loaded, name))}
    return loaded.test, {"label": loaded.label, "section": section, **descriptions}


def _checked(split, name, given):
    """(the split, checked, the number of classes of the network); InputError unless the network takes the images."""
    images = split.images if streamed(split) else check(split._replace(labels=0 * split.labels), name, 1).images
    classes = entrance.classes_of(given.logits_fn, to_float(jnp.asarray(images[:2])))
    assert classes is not None  # as the images have values
    return check(split, name, classes), classes


def _says(given, split):
    """What records state of the network; a digest of its logits stands for that of arrays that it does not show."""
    if "weights" in given.says:  # their digest
        return {"by": rundir.BENCHMARK, **given.says}
    hidden = not jax.tree.leaves(given.variables)
    arrays = given.logits_fn(to_float(jnp.asarray(split.images[:_PROBED]))) if hidden else given.variables
    return {"by": rundir.BENCHMARK, **given.says, "weights": trees.digest(arrays)}


# ---- where it goes -------------------------------------------------------------------------------------------


def _before(workdir, facts):
    """The configuration under which the folder holds records of this network on this data; None where it is new.

    Raises InputError where it holds something else.
    """
    file = workdir / "config.json"
    if not file.is_file():
        if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
            raise InputError(f"workdir={workdir} holds something else than a benchmark; give another folder")
        return None
    content = files.read_json(file)
    if not rundir.benchmarked(content.get("data", {})):
        raise InputError(f"workdir={workdir} holds a run that ibjax has trained or imported; give another folder")
    for what, section, key in (("data", "digests", "test"), ("network", "imported", "weights")):
        if content["data"][section][key] != facts[section][key]:
            raise InputError(f"workdir={workdir} holds the benchmark of another {what}; give another folder")
    return content["config"]


def _devices(given, split):
    """The context in which the network's programs run."""
    x = jax.ShapeDtypeStruct((2, *split.images.shape[1:]), jnp.float32)
    if not _calls_back(jax.make_jaxpr(given.predict)(given.variables, x).jaxpr):
        return contextlib.nullcontext()
    if jax.process_count() > 1:
        raise InputError("the network calls back into Python, as PyTorch's do, and runs in one process alone")
    return cluster.on_one_device()


def _calls_back(program: Jaxpr) -> bool:
    """Whether a program, or one inside it, calls a Python function when it runs."""
    for equation in program.eqns:
        if equation.primitive.name.endswith("callback"):
            return True
        for part in jax.tree.leaves(equation.params, is_leaf=lambda node: isinstance(node, Jaxpr | ClosedJaxpr)):
            inner = part.jaxpr if isinstance(part, ClosedJaxpr) else part
            if isinstance(inner, Jaxpr) and _calls_back(inner):
                return True
    return False
