"""Writes a run's network as files that need only PyTorch: weights with published names, a definition, a check."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from ibjax import config, files
from ibjax.errors import InputError, UnreadableError
from ibjax.pytorch import architectures, folders, gate, torch_file, twins
from ibjax.pytorch.architectures import ARCHITECTURES
from ibjax.runs import run, trees

IMAGENET = 5000  # images of ImageNet on which RobustBench evaluates
log = logging.getLogger(__name__)


def to_torch(
    workdir: Path, to: Path, checkpoint: str | int = "best", *, arch: str | None = None, n: int = 256
) -> float:
    """Writes model.safetensors, model.py, model_info.json, check.py and check.npz to `to`; returns max |Δlogit|.

    Args:
      workdir: of the run.
      to: a folder that does not exist or is empty.
      checkpoint: "best", "last" or a step.
      arch: the architecture whose parameter names are used; None: that of the file from which the run was imported,
        else the first of `ARCHITECTURES` that fits.
      n: number of test images that are compared and stored in check.npz.

    Raises InputError, CheckpointError or DataError; nothing is written then.
    """
    torch_file.modules()
    to = files.path(to)
    folders.refuse_existing(to)
    trained = run.load(workdir, checkpoint)
    name = _names(trained, arch)
    classes, shape = trained.facts["num_classes"], trained.facts["input_shape"]
    side = shape[0] if trained.facts["digests"]["test"] is None else None
    images = gate.images(trained.config, classes, shape[2], n, side)
    weights = architectures.to_theirs(name, trained.model, trained.variables, images.shape)
    twin = twins.make(name, trained.model, images.shape, weights)
    logits = gate.of_ours(trained.model, trained.variables, images.split.images)
    delta = gate.compare(logits, gate.of_torch(twin, images.split.images), images.words, f"exported as {name}")
    with folders.whole(to) as folder:
        (folder / "model.safetensors").write_bytes(_safetensors(to, twin, name, trained.model, images.shape))
        (folder / "model.py").write_text(twins.source(name, trained.model, images.shape), encoding="utf-8")
        files.write_json(folder / "model_info.json", model_info(trained, str(checkpoint)))
        check = (twins.DEFINITIONS / "check.py").read_text(encoding="utf-8")
        (folder / "check.py").write_text(check, encoding="utf-8")
        labels = logits.argmax(1) if side else images.split.labels  # photographs have no labels
        np.savez_compressed(folder / "check.npz", x_test=images.split.images, y_test=labels, logits=logits)
    return delta


def _names(trained, arch):
    """The architecture whose names an export uses; InputError where the network matches none, or not the given one."""
    fitting = architectures.matching(trained.model)
    if not fitting:
        raise InputError(
            f"the network of {trained.workdir} ({trained.config.model.name}) has no definition in PyTorch; "
            f"those that have: {', '.join(ARCHITECTURES)}"
        )
    if arch is not None and arch not in fitting:
        raise InputError(f"--arch={arch} is not what {trained.workdir} holds; give {' or '.join(fitting)}, or none")
    imported = trained.facts.get("imported", {}).get("arch")
    return arch or (imported if imported in fitting else fitting[0])


def _safetensors(to, twin, name, model, shape):
    """The weights as safetensors; the metadata hold the architecture, its options and a digest of all tensors."""
    from safetensors.torch import save

    tensors = {key: value.contiguous() for key, value in twin.state_dict().items() if value.is_floating_point()}
    seen = {option: getattr(model, option) for option in twins.options(name, model, shape) if option in vars(model)}
    del seen["num_classes"]  # follows from the shapes
    said = {"arch": name, "model": seen, "digest": torch_file.digest_of(to, tensors)}
    return save(tensors, metadata={torch_file.METADATA: json.dumps(said, sort_keys=True)})


def model_info(
    trained: run.Run, checkpoint: str, norm: str | None = None, eps: str | float | None = None
) -> dict[str, Any]:
    """RobustBench's description of a network; a field that the run does not know is None.

    Accuracies come from records of exactly these weights on the whole test set (for ImageNet also on 5,000 images), for
    one norm and eps: by default those of the run's evaluation.
    """
    own = config.effective(trained.config).evaluate
    norm, eps = norm or own.norm, eps or own.eps
    weights, records = trees.digest(trained.variables), {}
    dataset = trained.config.data.get("dataset", trained.facts["label"])
    whole = [trained.facts.get("n_test"), *([IMAGENET] if str(dataset).startswith("imagenet") else [])]
    folder = trained.workdir / "eval" / checkpoint
    for name in files.files_below(folder) if folder.is_dir() else ():
        if not name.endswith(".json"):
            continue
        try:
            record = files.read_json(folder / name)
            same = record["norm"] == norm and config.same_length(record["eps"], eps) and not record.get("samples")
            if record["weights"] == weights and record["n"] in whole and record["main"] and same:
                records[record["attack"]] = record
        except UnreadableError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s is damaged (%s); what is exported does not tell of it", folder / name, error)
    attacked = records.get("autoattack")
    first = attacked or next(iter(records.values()), None)
    robust = f"{attacked['robust_acc']:.2f}" if attacked else None
    return {
        "link": None,
        "name": trained.config.title or trained.workdir.resolve().name,
        "authors": None,
        "additional_data": None if "imported" in trained.facts else False,
        "number_forward_passes": 1,
        "dataset": dataset,
        "venue": None,
        "architecture": _readable(trained.model),
        "eps": str(first["eps"]) if first else None,
        "clean_acc": f"{first['clean_acc']:.2f}" if first else None,
        "reported": robust,
        "autoattack_acc": robust,
    }


_STEMS = {"patch": "", "convstem": " + ConvStem"}
_STAGED = {"convnext": ("ConvNeXt", 18, 36), "swin": ("Swin", 12, 24)}  # name, depth of T, and of S, B and L


def _readable(model):
    """The architecture in RobustBench's notation, such as WideResNet-34-10; blocks that its depth does not say, too."""
    family, blocks = type(model).__module__.rpartition(".")[2], getattr(model, "blocks", None)
    if family == "cnn":
        return f"CNN-{sum(map(len, model.widths))}"
    depth, own = model.depth, f" (blocks {', '.join(map(str, blocks))})" if blocks else ""
    if family in _STAGED:
        written, shallow, deep = _STAGED[family]
        sizes = {(shallow, 96): "T", (deep, 96): "S", (deep, 128): "B", (deep, 192): "L"}
        size = f"{sum(blocks)}-{model.width}" if blocks else sizes.get((depth, model.width)) or f"{depth}-{model.width}"
        return f"{written}-{size}{_STEMS[getattr(model, 'stem', 'patch')]}{own}"
    if family in ("vit", "xcit"):
        size = {384: "S", 512: "M", 768: "B" if family == "vit" else "L"}.get(model.width)
        if family == "vit":
            return f"ViT-{size or model.width}{_STEMS[model.stem]}"
        return f"XCiT-{size or f'{model.width}-'}{depth}"
    written = {"wide_resnet": "WideResNet", "preact_resnet": "PreActResNet", "resnet": "ResNet", "vgg": "VGG"}[family]
    if blocks:
        depth = (3 if depth >= 50 else 2) * sum(blocks) + 2  # layers of a block, the first one and the last
    if getattr(model, "inner_width", 1) > 1:
        return f"Wide{written}-{depth}-{model.inner_width}{own}"
    return f"{written}-{depth}" + (f"-{model.width}" if family == "wide_resnet" else "") + own
