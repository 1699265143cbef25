"""Turns a network of a PyTorch file into a run: reads it, checks every name, compares logits, then writes the run.

Each property of the network is taken from the file, else from the caller, else from the architecture's usual value; its
source is reported and stored in the run. Where the architecture has several usual values, or the file shows that its
normalisation was lost, the caller must give the value.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from ibjax import config, errors, files
from ibjax.data import Split, check
from ibjax.errors import CheckpointError, InputError, nearest
from ibjax.net import checked_logits, linen_net
from ibjax.pytorch import architectures, fit, folders, gate, normalisation, sizes, state_dicts, torch_file, twins
from ibjax.pytorch.architectures import ARCHITECTURES, Shape
from ibjax.pytorch.normalisation import Said
from ibjax.pytorch.published import Published
from ibjax.runs import recipe_files, run, rundir

_NANO = 128  # width of timm's xcit_nano, the only XCiT that this architecture cannot hold
_CROPS = 16  # crops of photographs on which logits are compared where there are no other images


class Network(NamedTuple):
    """A network of a file, with every name and shape checked; nothing has been computed or written."""

    arch: str
    model: nn.Module
    classes: int
    shape: Shape  # (H, W, C) of its input images
    state: dict[str, np.ndarray]  # its weights and statistics, by their names in PyTorch
    found: state_dicts.Found
    settings: ConfigDict
    sha256: str
    origins: dict[str, tuple[str, str]]  # property -> (its value in words, the source of this value)


def from_torch(
    file: Path,
    arch: str,
    workdir: Path,
    *,
    key: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    no_normalisation: bool = False,
    sha256: str | None = None,
    overrides: Sequence[str] | None = None,
    published: Published | None = None,
    clean_acc: float | None = None,
    n: int = 256,
    photographs: int | None = None,
) -> dict[str, Any]:
    """Writes `workdir` with the network of a PyTorch file; returns the import's section of config.json.

    Args:
      file: a state dict, alone or within a checkpoint.
      arch: the architecture, a key of `ARCHITECTURES`.
      workdir: a folder that does not exist or is empty.
      key: the path of the requested network, where the file holds several; `state_dicts` describes the notation.
      mean, std: of pixels in [0, 1], with which the network normalises, where the file does not hold them.
      no_normalisation: True states that the network does not normalise.
      sha256: the required digest of the file, or its first digits.
      overrides: of the configuration, such as ["--config.data.data_dir=…"].
      published: the row of `ibjax.zoo` that the file must be, in place of key, mean, std and no_normalisation.
      clean_acc: published clean accuracy in percent; that on the `n` images must agree to three standard errors.
      n: number of test images that are compared, stratified by class.
      photographs: side of crops of photographs that replace the data set's images in the comparison; the run can then
        serve as a teacher, but not be evaluated.

    Raises InputError, CheckpointError or DataError; nothing is written then.
    """
    file, workdir = files.path(file), files.path(workdir)
    folders.refuse_existing(workdir)
    _check_clean_acc(clean_acc, photographs)
    said = Said(key, mean, std, no_normalisation, sha256, tuple(overrides or ()), published)
    network = read(file, arch, said)
    images = gate.images(network.settings, network.classes, network.shape[2], n, photographs)
    variables, logits, delta = _compared(network, images)
    imported = _imported(file, network, images, delta)
    if photographs is None:
        imported["clean_acc"] = _clean_accuracy(logits, images.split.labels, clean_acc)
    with folders.whole(workdir) as folder:
        facts = {**images.facts, "imported": imported}
        rundir.write_network(folder, network.settings, facts, jax.device_put(variables))
    return imported


def load(
    file: Path,
    arch: str,
    split: Split | None = None,
    label: str = "",
    said: Said = Said(),  # noqa: B008
) -> run.Run:
    """A file's network as `ibjax.load` returns that of a run; nothing is written.

    Its configuration holds defaults that do not describe the training, as in `from_torch`, whose errors are raised.

    Args:
      file, arch, said: as in `read`.
      split: (N, H, W, C) uint8, or float32 in [0, 1]: images on which the logits must agree with those of PyTorch.
        None: crops of photographs.
      label: name of these images.
    """
    network = read(file, arch, said)
    if split is None:
        images = gate.images(network.settings, network.classes, network.shape[-1], _CROPS, network.shape[0])
    else:
        split = check(split, f"{label}:", network.classes)
        facts = {"label": label, "input_shape": list(split.images.shape[1:]), "num_classes": network.classes}
        images = gate.Images(split, facts, f"{len(split.labels)} images of {label}")
    if images.shape[-1] != network.shape[-1]:
        raise InputError(
            f"the network takes images of {network.shape[-1]} channels, {images.words} have {images.shape}"
        )
    variables, _, delta = _compared(network, images)
    facts = {**images.facts, "imported": _imported(file, network, images, delta)}
    variables = jax.device_put(variables)
    logits_fn = checked_logits(linen_net(network.model).predict, variables)
    return run.Run(network.model, variables, logits_fn, config.effective(network.settings), facts, 0, file, {})


def _imported(file, network, images, delta):
    """The import's section of config.json."""
    return {
        "file": file.name,
        "sha256": network.sha256,
        "arch": network.arch,
        "network": {what: {"is": value, "from": source} for what, (value, source) in network.origins.items()},
        "left_out": network.found.left_out,
        "images": images.words,
        "max_delta_logit": delta,
        "torch": torch_file.modules().__version__,
    }


def read(file: Path, arch: str, said: Said = Said()) -> Network:  # noqa: B008
    """The network of a file; raises InputError or CheckpointError unless it is exactly of the architecture."""
    content = torch_file.read(file, said.sha256)
    if arch not in ARCHITECTURES:
        raise InputError(f"--arch={arch} is unknown; {nearest(arch, ARCHITECTURES)}; {hint(content)}")
    exported = _exported(file, content, arch)
    known, found = ARCHITECTURES[arch], state_dicts.find(file, content, arch, said.key)
    state = architectures.of_today(arch, found.state)
    measured = sizes.sizes(arch, state)
    if known.model == "xcit" and measured["width"] == _NANO and not exported:
        raise CheckpointError(
            f"{file} is an XCiT of width {_NANO}, as timm's xcit_nano, whose last layer norm is of the class token "
            f"alone (tokens_norm=False), not of all tokens as in --arch={arch}; give an XCiT of another width"
        )
    classes = measured.pop("num_classes")
    section = {**known.defaults, **measured, **exported, "name": known.model, **known.fixed}
    channels = sizes.channels(arch, state)
    settings = _configuration(file, section, classes, channels, list(said.overrides))
    model = run.build_model(settings.model, classes, "model")
    if arch not in architectures.matching(model):
        raise InputError(f"--config.model… makes it another network than --arch={arch}: {known.model}, {known.fixed}")
    shape = sizes.input_shape(arch, model, state)
    fit.check(file, arch, model.clone(mean=None, std=None), state, shape)  # the normalisation is decided next
    if said.published is not None:
        _check_published(file, said.published, model, classes)
    values, source = normalisation.decide(file, arch, channels, found, exported, said, settings.data.get("dataset"))
    settings.model.update(values)
    model = run.build_model(settings.model, classes, "model")
    found = found._replace(left_out=found.left_out + len(found.state) - len(state))
    network = Network(arch, model, classes, shape, state, found, settings, content.sha256, {})
    return network._replace(origins=_origins(network, content, measured, exported, source, said))


def _exported(file, content, arch):
    """The options of a network that ibjax exported, {} for any other file; InputError where it is no `arch`."""
    if not content.metadata:
        return {}
    if (named := content.metadata.get("arch")) != arch:
        raise InputError(f"{file} was exported as --arch={named}, not {arch}; give --arch={named}")
    return config.plain(content.metadata["model"])


def _check_published(file, row, model, classes):
    """Raises CheckpointError where a network has another size than the published one that its file should be."""
    width = getattr(model, "inner_width", getattr(model, "width", None))  # of a ResNet, that of its bottlenecks
    depth = getattr(model, "blocks", None) or getattr(model, "depth", None)  # with blocks, depth says their kind alone
    found = {"depth": depth, "width": width, "classes": classes}
    for what, wanted in {"depth": row.depth, "width": row.width, "classes": row.classes}.items():
        if wanted not in (None, found[what]):
            raise CheckpointError(f"{file} has {what} {found[what]}, {row.path} has {wanted}: it is another network")


def hint(content: torch_file.Content) -> str:
    """Says which architecture is closest to the file in names and shapes."""
    return fit.closest(*state_dicts.all_of(content))


def _configuration(file, section, classes, channels, overrides):
    """The default configuration with the network's section, the data set suggested by its classes, and `overrides`."""

    settings = config.base()
    settings.title = file.stem
    usual = "mnist" if channels == 1 else "cifar10"
    settings.data.dataset = {100: "cifar100", 1000: "imagenet2012"}.get(classes, usual)
    settings.model = section
    recipe_files.override(settings, overrides)
    config.check(settings)
    return settings


def _compared(network, images):
    """(our variables, our logits, max |Δlogit|) on images; raises CheckpointError where the logits differ."""
    arch, model = network.arch, network.model
    takes, has = (architectures.key_map(arch, model, shape) for shape in (network.shape, images.shape))
    if any(has[path].shape != leaf.shape for path, leaf in takes.items()):
        raise InputError(f"the network takes images of {network.shape[:2]} pixels, {images.words} have {images.shape}")
    variables = architectures.to_ours(arch, model, network.state, images.shape)
    kept = network.found.normalization
    twin = twins.make(arch, model, images.shape, network.state, kept)
    logits, theirs = gate.of_ours(model, variables, images.split.images), gate.of_torch(twin, images.split.images)
    delta = gate.compare(logits, theirs, images.words, f"in the file mean and std are {kept or 'not kept'}")
    return variables, logits, delta


# ---- what is said of an import -----------------------------------------------------------------------------


def _origins(network, content, measured, exported, normalised, said):
    """{property: (its value in words, the source of this value)} of all properties that define the network."""
    model, found = network.model, network.found

    def where(option):
        if f"model.{option}" in said.paths():
            return f"--config.model.{option}"
        if option in exported:
            return "ibjax's export"
        return f"usual of {network.arch}" if hasattr(model, option) else "the architecture"

    size = [f"{option} {value}" for option, value in measured.items() if value is not None]
    key = found.chosen if found.key or found.chosen == "--key" else "a state dict alone"
    mean, std = model.mean, model.std
    count = sum(leaf.size for leaf in network.state.values()) - sum(
        value.size for name, value in network.state.items() if name.endswith(("running_mean", "running_var"))
    )
    return {
        "architecture": (network.arch, "--arch"),
        "size": (", ".join([*size, f"{network.classes} classes"]), "names and shapes"),
        "key": (found.key or "none", key),
        "prefix": (found.prefix or "none", "the names"),
        "normalisation": ("none" if mean is None else f"mean {mean} std {std}", normalised),
        "activation": (getattr(model, "activation", "relu"), where("activation")),
        "padding": (_padding(model), where("padding")),
        "parameters": (f"{count:,}", "the file"),
        "SHA-256": (network.sha256, content.compared),
    }


def _padding(model):
    """The padding of convolutions and of the image, in words."""
    strided = "deepmind" in (getattr(model, "variant", ""), getattr(model, "projection", ""))
    words = "of strided convolutions TensorFlow's SAME" if strided else "symmetric"
    if hasattr(model, "padding"):
        words = f"{model.padding} at each convolution"
    border = getattr(model, "border", 0)
    return words + (f", {border} zeros around the image" if border else "")


def _check_clean_acc(published, photographs):
    if published is None:
        return
    if photographs is not None:
        raise InputError("--clean_acc needs the data set's test images; --photographs have no labels")
    errors.check_range("--clean_acc", published, 0, 100)
    if 0 < published <= 1:
        raise InputError(
            f"--clean_acc={published:g} would be {published:g} %; is {100 * published:g} % meant? "
            f"Then give --clean_acc={100 * published:g}"
        )


def _clean_accuracy(logits, labels, published):
    """Clean accuracy in percent; CheckpointError where it is over three standard errors from the published one."""
    found = 100 * float(np.mean(logits.argmax(1) == labels))
    if published is not None:
        allowed = 300 * math.sqrt(published / 100 * (1 - published / 100) / len(labels)) + 0.01
        if abs(found - published) > allowed:
            raise CheckpointError(
                f"clean accuracy is {found:.2f} % of {len(labels)} test images, published {published:.2f} %: the data, "
                f"the normalisation (--mean, --std) or the activation is another one; nothing is written"
            )
    return round(found, 4)
