"""The names that published PyTorch networks give the weights of ours.

| --arch             | network of ours                      | whose files                        |
|--------------------|--------------------------------------|------------------------------------|
| wide_resnet        | wide_resnet                          | TRADES, MART, AWP, RobustBench     |
| dm_wide_resnet     | wide_resnet, variant="deepmind"      | Gowal et al., Rebuffi et al.       |
| ib_rar_wide_resnet | wide_resnet, variant="ib_rar"        | IB-RAR                             |
| preact_resnet      | preact_resnet                        | Rice et al.                        |
| preact_resnet_raw  | preact_resnet, projection="raw"      | Wong et al., Andriushchenko et al. |
| dm_preact_resnet   | preact_resnet, projection="deepmind" | Rebuffi et al., Rade et al.        |
| resnet             | resnet                               | pytorch-cifar                      |
| imagenet_resnet    | resnet, stem="imagenet"              | torchvision, Salman et al.         |
| vgg                | vgg                                  | IB-RAR                             |

Depth, width and classes are read off a file's shapes. A convolution's weight (out, in, height, width) is our kernel
(height, width, in, out), a linear layer's (out, in) our (in, out); batch-norm's weight is our scale.
"""

import functools
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from ibjax import cluster, run
from ibjax.checkpoint import flatten
from ibjax.errors import CheckpointError
from ibjax.models import preact_resnet, resnet, vgg

CIFAR10 = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616))
CIFAR100 = dict(mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
_LEAVES = {"kernel": "weight", "bias": "bias", "scale": "weight", "mean": "running_mean", "var": "running_var"}

State = Mapping[str, np.ndarray]  # a network in PyTorch: name -> value


class Architecture(NamedTuple):
    """A published network."""

    torch: str  # its definition in ibjax.torch_models
    model: str  # ours in ibjax.models
    fixed: dict[str, Any]  # our options that make it this one
    names: dict[str, str]  # our layers that it calls otherwise, in blocks and outside
    block: str = ""  # the name of a block, in the order of ours; stages and blocks count from 0
    defaults: Mapping[str, Any] = MappingProxyType({})  # our options where neither file nor caller says otherwise
    normalized: Mapping[int, Any] = MappingProxyType({})  # mean and std by number of classes, likewise
    unused: str = "(?!)"  # what its files hold beside the network, never called


_DM = dict(defaults=dict(activation="silu"), normalized={10: CIFAR10, 100: CIFAR100})
_PREACT = dict(stem="conv1", head="linear", shortcut="shortcut.0")
_RESNET = dict(stem="conv1", bn_stem="bn1")
ARCHITECTURES = {
    "wide_resnet": Architecture(
        "wide_resnet",
        "wide_resnet",
        dict(variant="trades"),
        dict(stem="conv1", bn="bn1", head="fc", shortcut="convShortcut"),
        "block{stage1}.layer.{index}",
        unused=r"sub_block1\..*",  # a second copy of stage 1 that TRADES's constructor makes
    ),
    "dm_wide_resnet": Architecture(
        "dm_wide_resnet",
        "wide_resnet",
        dict(variant="deepmind"),
        dict(stem="init_conv", bn="batchnorm", head="logits")
        | dict(bn1="batchnorm_0", conv1="conv_0", bn2="batchnorm_1", conv2="conv_1"),
        "layer.{stage}.block.{index}",
        **_DM,
    ),
    "ib_rar_wide_resnet": Architecture(
        "ib_rar_wide_resnet", "wide_resnet", dict(variant="ib_rar"), {**_PREACT, "bn": "bn1"}, "layer{stage1}.{index}"
    ),
    "preact_resnet": Architecture(
        "preact_resnet", "preact_resnet", dict(projection="activated"), _PREACT, "layer{stage1}.{index}"
    ),
    "preact_resnet_raw": Architecture(
        "preact_resnet", "preact_resnet", dict(projection="raw"), _PREACT, "layer{stage1}.{index}"
    ),
    "dm_preact_resnet": Architecture(
        "dm_preact_resnet",
        "preact_resnet",
        dict(projection="deepmind", final_norm=True),
        dict(stem="conv_2d", bn="batchnorm", head="logits")
        | dict(bn1="batchnorm_0", conv1="conv_2d_1", bn2="batchnorm_1", conv2="conv_2d_2"),
        "layer_{stage}.{index}",
        **_DM,
    ),
    "resnet": Architecture(
        "resnet",
        "resnet",
        dict(stem="cifar"),
        dict(_RESNET, head="linear", conv_shortcut="shortcut.0", bn_shortcut="shortcut.1"),
        "layer{stage1}.{index}",
    ),
    "imagenet_resnet": Architecture(
        "resnet",
        "resnet",
        dict(stem="imagenet"),
        dict(_RESNET, head="fc", conv_shortcut="downsample.0", bn_shortcut="downsample.1"),
        "layer{stage1}.{index}",
        normalized={1000: IMAGENET},
    ),
    "vgg": Architecture("vgg", "vgg", {}, {}),
}


def architecture_of(model: nn.Module) -> str | None:
    """The name of the published network that a model of ours is; None where there is none."""
    for name, known in ARCHITECTURES.items():
        own = type(model).__module__ == f"ibjax.models.{known.model}"
        if own and all(getattr(model, option) == value for option, value in known.fixed.items()):
            return name
    return None


def build(name: str, options: Mapping[str, Any]) -> nn.Module:
    """Our model of these `sizes`."""
    known = ARCHITECTURES[name]
    section = {"name": known.model, **options, **known.fixed}
    return run.build_model(section, section.pop("num_classes"), "model")


# ---- names -------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def key_map(name: str, model: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{path of our leaf: (its name in PyTorch, its shape of ours)} of all parameters and batch statistics."""
    known = ARCHITECTURES[name]
    names = {**known.names, **_numbered(known, model)}
    found = {}
    for path, leaf in flatten(run.abstract_variables(model, (32, 32, 3), cluster.mesh())).items():
        _, *modules, last = path.split("/")
        modules = [names.get(module, module) for module in modules if module not in ("conv", "dense")]
        found[path] = ".".join([*modules, _LEAVES[last]]), leaf.shape
    return found


def _numbered(known, model):
    """Names of the parts that PyTorch numbers: blocks, or VGG's layers."""
    if known.model == "vgg":
        return _vgg_names(vgg.DEPTHS[model.depth], len(model.hidden))
    if known.model == "wide_resnet":
        counts = ((model.depth - 4) // 6,) * 3
    else:
        depths = {"resnet": resnet.DEPTHS, "preact_resnet": preact_resnet.DEPTHS}[known.model]
        counts = preact_resnet.block_counts(known.model, model.depth, model.blocks, depths)
    blocks = [(stage, index) for stage, count in enumerate(counts) for index in range(count)]
    return {
        f"block{n}": known.block.format(stage=stage, stage1=stage + 1, index=index)
        for n, (stage, index) in enumerate(blocks, 1)
    }


def _vgg_names(groups, hidden):
    """`features` counts convolution, batch-norm, ReLU and pooling; `classifier` linear layer, batch-norm, ReLU."""
    names, place, conv = {}, 0, 0
    for count in groups:
        for _ in range(count):
            conv += 1
            names |= {f"conv{conv}": f"features.{place}", f"bn{conv}": f"features.{place + 1}"}
            place += 3
        place += 1
    for i in range(hidden):
        names |= {f"fc{i + 1}": f"classifier.{3 * i}", f"bn_fc{i + 1}": f"classifier.{3 * i + 1}"}
    return {**names, "head": f"classifier.{3 * hidden}"}


def sizes(name: str, state: State) -> dict[str, Any]:
    """Our options that names and shapes tell, `num_classes` among them; of another network's file, whatever fits."""
    known = ARCHITECTURES[name]
    if known.model == "vgg":
        return _vgg_sizes(state)
    shapes = {key: value.shape for key, value in state.items()}
    stem, head = (shapes.get(f"{known.names[layer]}.weight", ()) for layer in ("stem", "head"))
    found: dict[str, Any] = {"num_classes": head[0] if head else 10}
    pattern = re.escape(known.block).replace(r"\{stage\}", r"(\d+)").replace(r"\{stage1\}", r"(\d+)")
    matches = [re.match(pattern.replace(r"\{index\}", r"(\d+)") + r"\.(\w+)", key) for key in state]
    blocks = {(int(match[1]), int(match[2])) for match in matches if match}
    stages = sorted({stage for stage, _ in blocks})
    counts = tuple(sum(stage == other for other, _ in blocks) for stage in stages)
    if known.model == "wide_resnet":
        first = known.block.format(stage=0, stage1=1, index=0) + "." + known.names.get("conv1", "conv1")
        width = max(shapes[f"{first}.weight"][0] // 16, 1) if f"{first}.weight" in shapes else 10
        return found | {"depth": 6 * max(counts, default=4) + 4, "width": width}
    if stem:
        found["width"] = stem[0]
    if known.model == "preact_resnet":
        found["final_norm"] = f"{known.names.get('bn', 'bn')}.weight" in state
    depths = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
    if any(match[3] == "conv3" for match in matches if match):
        depths = {50: (3, 4, 6, 3)}
    depth = next((depth for depth, usual in depths.items() if usual == counts), None)
    return found | ({"depth": depth} if depth else {"depth": next(iter(depths)), "blocks": counts or None})


def _vgg_sizes(state):
    convolutions = [value for name, value in state.items() if name.startswith("features.") and value.ndim == 4]
    linear = [value for name, value in state.items() if name.startswith("classifier.") and value.ndim == 2]
    found: dict[str, Any] = {"num_classes": linear[-1].shape[0] if linear else 10}
    depth = len(convolutions) + 3
    if depth in vgg.DEPTHS:
        found |= {"depth": depth, "width": convolutions[0].shape[0]}
    return found | {"hidden": tuple(value.shape[0] for value in linear[:-1])}


# ---- values ------------------------------------------------------------------------------------------------


def check(where: str, name: str, model: nn.Module, state: State) -> None:
    """Raises CheckpointError unless the state is exactly the network's: every name, every shape, sound values."""
    expected = {theirs: _shape(ours) for theirs, ours in key_map(name, model).values()}
    missing = [key for key in expected if key not in state]
    extra = [key for key in state if key not in expected]
    if missing or extra:
        parts = [f"it lacks {_some(missing)}"] * bool(missing) + [f"it has {_some(extra)}"] * bool(extra)
        raise CheckpointError(f"{where} is no {name}: {'; '.join(parts)}; {closest(state)}")
    for key, shape in expected.items():
        value = state[key]
        if value.shape != shape:
            raise CheckpointError(
                f"{where}: {key} is {value.shape}, in {name} of these sizes {shape}; it is another network"
            )
        if not np.isfinite(value).all() or (key.endswith("running_var") and value.min() < 0):
            raise CheckpointError(f"{where}: {key} holds NaN, Inf or a negative variance; the file is damaged")


def closest(state: State) -> str:
    """Says which architecture's names a file's are nearest to."""
    shares = {name: _agreement(name, state) for name in ARCHITECTURES}
    best = max(shares.values())
    names = [name for name, share in shares.items() if share == best]
    return f"closest: --arch={' or '.join(names)} ({100 * best:.0f} % of its names agree)"


def _agreement(name, state):
    model = build(name, sizes(name, state))
    expected = {theirs for theirs, _ in key_map(name, model).values()}
    present = {key for key in state if not re.fullmatch(ARCHITECTURES[name].unused, key)}
    return len(expected & present) / len(expected | present)


def _some(keys):
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def to_ours(name: str, model: nn.Module, state: State) -> dict[str, Any]:
    """Our variables {"params", "batch_stats"} with a checked state's values."""
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for path, (theirs, _) in key_map(name, model).items():
        *above, last = path.split("/")
        node = variables
        for part in above:
            node = node.setdefault(part, {})
        value = state[theirs]
        node[last] = np.ascontiguousarray(value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T)
    return variables


def to_theirs(name: str, model: nn.Module, variables: Any) -> dict[str, np.ndarray]:
    """The inverse of `to_ours`."""
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(variables).items()}
    return {
        theirs: np.ascontiguousarray(leaves[path].transpose(3, 2, 0, 1) if leaves[path].ndim == 4 else leaves[path].T)
        for path, (theirs, _) in key_map(name, model).items()
    }


def _shape(ours):
    return (ours[3], ours[2], *ours[:2]) if len(ours) == 4 else ours[::-1]
