"""PyTorch networks become runs, and runs PyTorch networks; logits must agree, or nothing is written.

    python -m ibjax.convert --torch FILE --arch NAME --workdir DIR [--clean_acc=84.92] [--config.KEY=VALUE …]
    python -m ibjax.convert --workdir DIR --to FOLDER [--checkpoint=best|last|STEP]

FILE is .pt, .pth, .t7 or .safetensors. The data set is that of the configuration, as --config.data.data_dir=…; an
import compares on its test images, or where it is not at hand, with --photographs=SIDE, on crops of photographs.
The run that an import makes is evaluated and taught from like any other; how its network was trained nobody knows:
the configuration's other sections are defaults that say nothing of it.

Guarantees (tests of the same names): nothing in a file is ever unpickled; every tensor is used exactly once and every
weight is filled; the gate, 1e-4 on the logits of real images, sees every single weight; import, export and import again
end in the same bits; a folder that holds something is refused and one that is made is whole.

PyTorch's file says nothing of how pixels are normalised unless its network keeps mean and std. Where it does not, the
architecture's usual values hold, else --config.model.mean and std; --clean_acc, the published accuracy, shows whether
they are right.
"""

import argparse
import contextlib
import hashlib
import importlib
import inspect
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ibjax import architectures, cluster, config, disk, errors, run, torch_file
from ibjax import checkpoint as checkpoints
from ibjax.architectures import ARCHITECTURES
from ibjax.data import Split, stratified
from ibjax.errors import CheckpointError, InputError, nearest
from ibjax.step import TrainState, linen_net, to_float

TOLERANCE = 1e-4  # of logits
_BATCH = 64  # images at a time


# ---- import ------------------------------------------------------------------------------------------------


def from_torch(
    file: Path,
    arch: str,
    workdir: Path,
    *,
    overrides: list[str] | None = None,
    clean_acc: float | None = None,
    n: int = 256,
    photographs: int | None = None,
) -> dict[str, Any]:
    """Writes `workdir` with the network of a PyTorch file; returns what config.json says of the import.

    Args:
      file: of a state dict, alone or within a checkpoint.
      arch: which network it is, a key of `ARCHITECTURES`.
      workdir: must not exist, or be empty.
      overrides: of the configuration, as ["--config.data.data_dir=…"].
      clean_acc: in percent; the network must have it on the `n` images, to three standard errors.
      n: how many test images are compared, each class in proportion.
      photographs: side of the crops that are compared in place of a data set's images; the run can then teach, but
        not be evaluated.

    Raises InputError, CheckpointError or DataError; then nothing is written.
    """
    torch = torch_file.modules()
    _refuse_existing(workdir)
    if photographs and clean_acc is not None:
        raise InputError("--clean_acc needs the data set's test images; --photographs have no labels")
    state, normalization = torch_file.read(file)
    if arch not in ARCHITECTURES:
        raise InputError(f"--arch={arch} is unknown; {nearest(arch, ARCHITECTURES)}; {architectures.closest(state)}")
    known = ARCHITECTURES[arch]
    used = {key: value for key, value in state.items() if not re.fullmatch(known.unused, key)}
    options = architectures.sizes(arch, used)
    classes = options.pop("num_classes")
    usual = {**known.defaults, **known.normalized.get(classes, {})}
    if normalization:
        usual |= dict(zip(("mean", "std"), normalization, strict=True))
    settings = _configuration(file, {**usual, **options, "name": known.model, **known.fixed}, classes, overrides or [])
    model = run.build_model(settings.model, classes, "model")
    if architectures.architecture_of(model) != arch:
        raise InputError(f"--config.model… makes it another network than --arch={arch}: {known.model}, {known.fixed}")
    architectures.check(str(file), arch, model, used)

    split, facts, images = _images(settings, classes, n, photographs)
    variables = architectures.to_ours(arch, model, used)
    twin = _twin(known, model, used, normalization)
    logits, theirs = _logits(model, variables, split.images), _torch_logits(twin, split.images)
    delta = _gate(logits, theirs, images, f"in the file mean and std are {normalization or 'not kept'}")
    imported = {
        "file": file.name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "arch": arch,
        "normalization_kept_in_file": normalization is not None,
        "left_out": len(state) - len(used),
        "images": images,
        "max_delta_logit": delta,
        "torch": torch.__version__,
    }
    if not photographs:
        imported["clean_acc"] = _clean_accuracy(logits, split.labels, clean_acc)
    with _whole_folder(workdir) as folder:
        identity = run.write_config(folder, settings, {**facts, "imported": imported})
        with checkpoints.manager(folder, run=identity) as orbax:
            arrays = jax.tree.map(jnp.asarray, variables)
            checkpoints.save(orbax, TrainState(jnp.zeros((), jnp.int32), arrays, (), None), {"selection": 0.0})
    return imported


def _configuration(file, section, classes, overrides):
    """The defaults, with the network's section, the data set that goes with its classes, and what the caller says."""
    from ibjax import main  # which trains and evaluates, and needs a moment to load

    settings = config.base()
    settings.title = file.stem
    settings.data.dataset = "cifar100" if classes == 100 else "cifar10"
    settings.model = section
    main.override(settings, overrides)
    config.check(settings)
    return settings


def _images(settings, classes, n, side):
    """(`n` images, what config.json says of the data, what they are): test images, or with a side, photographs."""
    if side:
        facts = {"label": "photographs", "input_shape": [side, side, 3], "num_classes": classes}
        words = f"{n} crops of scikit-learn's two photographs"
        return Split(_crops(side, n), np.zeros(n, np.int32)), {**facts, "digests": {"test": None}}, words
    data = run.load_data(settings)
    if data.num_classes != classes:
        raise InputError(
            f"the network has {classes} classes, {data.label} has {data.num_classes}; "
            f"give its data set with --config.data.dataset=… or --config.data.name=…"
        )
    if data.test.images.shape[-1] != 3:
        raise InputError(f"the network takes RGB images, those of {data.label} are {data.test.images.shape[1:]}")
    n = min(n, len(data.test.labels))
    chosen = stratified(data.test.labels, n, seed=0)
    split = Split(data.test.images[chosen], data.test.labels[chosen])
    return split, run.facts(data), f"{n} test images of {data.label}"


def _crops(side, n):
    """Random crops (n, side, side, 3) uint8 of the photographs that scikit-learn ships, the same in every call."""
    from sklearn.datasets import load_sample_images

    photographs: Any = load_sample_images()
    height, width, _ = np.minimum(*(image.shape for image in photographs.images))
    if not 8 <= side <= min(height, width):
        raise InputError(f"--photographs={side} is not allowed; give a side of 8 to {min(height, width)} pixels")
    rng, crops = np.random.default_rng(0), []
    for i in range(n):
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        crops.append(photographs.images[i % 2][top : top + side, left : left + side])
    return np.stack(crops)


def _clean_accuracy(logits, labels, published):
    """In percent; raises CheckpointError where it is more than three standard errors from the published one."""
    found = 100 * float(np.mean(logits.argmax(1) == labels))
    if published is not None:
        errors.check_range("--clean_acc", published, 0, 100)
        allowed = 300 * math.sqrt(published / 100 * (1 - published / 100) / len(labels)) + 0.01
        if abs(found - published) > allowed:
            raise CheckpointError(
                f"clean accuracy is {found:.2f} % of {len(labels)} test images, published {published:.2f} %: the data, "
                f"the normalisation (--config.model.mean, std) or the activation is another one; nothing is written"
            )
    return round(found, 4)


# ---- logits ------------------------------------------------------------------------------------------------


def _twin(known, model, state, normalization=None):
    """The PyTorch network with these weights, normalising by (mean, std), or else as the model does."""
    torch = torch_file.modules()
    make = importlib.import_module(f"ibjax.torch_models.{known.torch}").Model
    options = {name: getattr(model, name) for name in inspect.signature(make).parameters}
    if normalization:
        options |= dict(zip(("mean", "std"), normalization, strict=True))
    twin = make(**options)
    weights = {key: torch.from_numpy(np.array(value)) for key, value in state.items()}
    buffers = {key: value for key, value in twin.state_dict().items() if key in ("mean", "std")}
    twin.load_state_dict({**weights, **buffers})
    return twin.eval()


def _torch_logits(twin, images):
    torch = torch_file.modules()
    x = torch.from_numpy(np.array(to_float(jnp.asarray(images)))).permute(0, 3, 1, 2)
    with torch.no_grad():
        return torch.cat([twin(part) for part in x.split(_BATCH)]).numpy()


def _logits(model: nn.Module, variables: Any, images: np.ndarray) -> np.ndarray:
    """Ours, in float32 throughout, whatever the network was trained in."""
    predict = jax.jit(linen_net(model.clone(dtype="float32")).predict)
    x = np.asarray(to_float(jnp.asarray(images)))
    with jax.default_matmul_precision("highest"):  # accelerators round inputs of convolutions otherwise
        return np.concatenate([predict(variables, x[i : i + _BATCH])[0] for i in range(0, len(x), _BATCH)])


def _gate(ours, theirs, images, hint):
    """max |Δlogit|; raises CheckpointError where it is too large, or not a number."""
    delta = float(np.abs(ours - theirs).max())
    if not delta <= TOLERANCE:
        raise CheckpointError(
            f"logits of PyTorch's network and ours differ by up to {delta:.3g} on {images}, allowed {TOLERANCE:g}; "
            f"nothing is written ({hint})"
        )
    return delta


# ---- export ------------------------------------------------------------------------------------------------


def to_torch(workdir: Path, to: Path, checkpoint: str | int = "best", *, n: int = 256) -> float:
    """Writes model.safetensors, model.py, model_info.json, check.py and check.npz to `to`; returns max |Δlogit|.

    Args:
      workdir: of the run.
      to: must not exist, or be empty.
      checkpoint: "best", "last" or a step.
      n: how many test images are compared, and kept in check.npz.

    Raises InputError, CheckpointError or DataError; then nothing is written.
    """
    from safetensors.torch import save

    torch_file.modules()
    _refuse_existing(to)
    trained = run.load(workdir, checkpoint)
    name = architectures.architecture_of(trained.model)
    if name is None or trained.facts["input_shape"][-1] != 3:
        kind, shape = trained.config.model.name, tuple(trained.facts["input_shape"])
        raise InputError(
            f"the network of {workdir} ({kind}, images {shape}) has no definition in PyTorch; "
            f"those of RGB images that have: {', '.join(ARCHITECTURES)}"
        )
    side = trained.facts["input_shape"][0] if trained.facts["digests"]["test"] is None else None
    split, _, images = _images(trained.config, trained.facts["num_classes"], n, side)
    known = ARCHITECTURES[name]
    twin = _twin(known, trained.model, architectures.to_theirs(name, trained.model, trained.variables))
    logits = _logits(trained.model, trained.variables, split.images)
    delta = _gate(logits, _torch_logits(twin, split.images), images, f"exported as {name}")
    with _whole_folder(to) as folder:
        tensors = {key: value.contiguous() for key, value in twin.state_dict().items() if value.is_floating_point()}
        (folder / "model.safetensors").write_bytes(save(tensors))
        (folder / "model.py").write_text(_definition(known, trained), encoding="utf-8")
        run.write_json(folder / "model_info.json", model_info(trained, str(checkpoint)))
        shutil.copyfile(_DEFINITIONS / "check.py", folder / "check.py")
        labels = logits.argmax(1) if side else split.labels  # of photographs what the network says itself
        np.savez_compressed(folder / "check.npz", x_test=split.images, y_test=labels, logits=logits)
    return delta


_DEFINITIONS = Path(__file__).parent / "torch_models"


def _definition(known, trained):
    """The text of model.py: the network's definition, and `load` with the options of this one."""
    make = importlib.import_module(f"ibjax.torch_models.{known.torch}").Model
    options = {key: getattr(trained.model, key) for key in inspect.signature(make).parameters}
    arguments = "".join(f"\n        {key}={value!r}," for key, value in options.items() if value is not None)
    source = (_DEFINITIONS / f"{known.torch}.py").read_text("utf-8").replace("from torch import nn\n", _IMPORTS, 1)
    return f"{source}{_LOAD.format(arguments=arguments)}"


_IMPORTS = "from safetensors.torch import load_file\nfrom torch import nn\n"
_LOAD = '''

def load(folder):
    """The network with the weights of model.safetensors in `folder`, in evaluation mode."""
    network = Model({arguments}
    )
    network.load_state_dict(load_file(f"{{folder}}/model.safetensors"))
    return network.eval()
'''


def model_info(trained: run.Run, checkpoint: str) -> dict[str, Any]:
    """RobustBench's description of a network; null is what this run cannot know. Accuracies are those of its records.

    Only records of the whole test set and of these very weights count.
    """
    weights, records = checkpoints.tree_digest(trained.variables), {}
    for file in sorted((trained.workdir / "eval" / checkpoint).glob("*.json")):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = disk.read_json(file)
            if record["weights"] == weights and record["n"] == trained.facts.get("n_test") and record["main"]:
                records[record["attack"]] = record
    attacked = records.get("autoattack")
    first = attacked or next(iter(records.values()), None)
    robust = f"{attacked['robust_acc']:.2f}" if attacked else None
    return {
        "link": None,
        "name": trained.config.title or trained.workdir.resolve().name,
        "authors": None,
        "additional_data": None if "imported" in trained.facts else False,
        "number_forward_passes": 1,
        "dataset": trained.config.data.get("dataset", trained.facts["label"]),
        "venue": None,
        "architecture": _readable(trained.model),
        "eps": str(first["eps"]) if first else None,
        "clean_acc": f"{first['clean_acc']:.2f}" if first else None,
        "reported": robust,
        "autoattack_acc": robust,
    }


def _readable(model):
    """As RobustBench writes it: WideResNet-34-10, PreActResNet-18."""
    family = type(model).__module__.rpartition(".")[2]
    written = {"wide_resnet": "WideResNet", "preact_resnet": "PreActResNet", "resnet": "ResNet", "vgg": "VGG"}[family]
    return f"{written}-{model.depth}" + (f"-{model.width}" if family == "wide_resnet" else "")


# ---- folders -----------------------------------------------------------------------------------------------


def _refuse_existing(folder):
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder; give another, or delete it")


@contextlib.contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well: it is there whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _refuse_existing(folder)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m ibjax.convert", allow_abbrev=False, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--workdir", type=disk.path, required=True, help="of the run: made by an import, read by an export"
    )
    parser.add_argument("--torch", type=disk.path, help="the file to import")
    parser.add_argument("--arch", help=f"which network it is: {', '.join(ARCHITECTURES)}")
    parser.add_argument("--clean_acc", type=float, help="its published clean accuracy in percent, to be checked")
    parser.add_argument("--photographs", type=int, metavar="SIDE", help="compare on photographs, not on a data set")
    parser.add_argument("--to", type=disk.path, help="the folder to export to")
    parser.add_argument("--checkpoint", help="to export: best (the default), last or a step")
    parser.add_argument("--n", type=int, default=256, help="images that are compared")
    given, overrides = parser.parse_known_args()

    def command():
        for flag in overrides:
            if not flag.startswith("--config."):
                raise InputError(f"'{flag}' is no flag; see --help, and --config.KEY=VALUE")
        if (given.torch is None) == (given.to is None):
            raise InputError("give --torch FILE --arch NAME for an import, or --to FOLDER for an export")
        errors.check_range("--n", given.n, 1)
        of_imports = (given.arch, given.clean_acc, given.photographs, overrides or None)
        if any(option is not None for option in (of_imports if given.to else (given.checkpoint,))):
            raise InputError(
                "--arch, --clean_acc, --photographs and --config.KEY=VALUE go with --torch, --checkpoint with --to"
            )
        cluster.keep_compiled()
        if given.to is not None:
            delta = to_torch(given.workdir, given.to, given.checkpoint or "best", n=given.n)
            print(f"{given.to}: max |Δlogit| {delta:.1e}; python {given.to / 'check.py'} checks it in PyTorch")
            return
        if given.arch is None:
            raise InputError(f"--arch is missing; {nearest('', ARCHITECTURES)}")
        options = dict(overrides=overrides, clean_acc=given.clean_acc, n=given.n, photographs=given.photographs)
        found = from_torch(given.torch, given.arch, given.workdir, **options)
        accuracy = f", clean accuracy {found['clean_acc']:.2f} %" if "clean_acc" in found else ""
        print(f"{given.workdir}: max |Δlogit| {found['max_delta_logit']:.1e} on {found['images']}{accuracy}")

    errors.exit_with(command)


if __name__ == "__main__":
    main()
