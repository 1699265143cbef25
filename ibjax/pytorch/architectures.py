"""Maps the weights of our networks to the parameter names of published PyTorch networks, and back.

| --arch                   | our network                          | files of                              |
|--------------------------|--------------------------------------|---------------------------------------|
| wide_resnet              | wide_resnet                          | TRADES, MART, AWP, RobustBench        |
| dm_wide_resnet           | wide_resnet, variant="deepmind"      | Gowal et al., Rebuffi et al.          |
| ib_rar_wide_resnet       | wide_resnet, variant="ib_rar"        | IB-RAR                                |
| preact_resnet            | preact_resnet                        | Rice et al.                           |
| preact_resnet_raw        | preact_resnet, projection="raw"      | Wong et al., Andriushchenko et al.    |
| dm_preact_resnet         | preact_resnet, projection="deepmind" | Rebuffi et al., Rade et al.           |
| resnet                   | resnet                               | pytorch-cifar                         |
| torchvision_cifar_resnet | resnet                               | torchvision's with a 3×3 stem         |
|                          |                                      | and without max-pooling               |
| imagenet_resnet          | resnet, stem="imagenet"              | torchvision, timm, Salman et al.      |
| vgg                      | vgg                                  | IB-RAR                                |
| torchvision_vgg          | vgg, variant="torchvision"           | torchvision's vggN_bn                 |
| small_cnn                | cnn                                  | TRADES's network for MNIST            |
| cnn                      | cnn                                  | ibjax only, such as the quickstart's  |
| convnext                 | convnext                             | timm, Liu et al. (ARES)               |
| convnext_convstem        | convnext, stem="convstem"            | Singh et al.                          |
| vit                      | vit                                  | timm's ViT and DeiT                   |
| vit_convstem             | vit, stem="convstem"                 | Singh et al.                          |
| xcit                     | xcit                                 | timm, Debenedetti et al. (ImageNet)   |
| cifar_xcit               | xcit, patch=4                        | Debenedetti et al. (CIFAR)            |
| swin                     | swin                                 | timm, Liu et al. 2021 and 2023 (ARES) |
| mimir_swin               | swin, epsilon=1e-6                   | Xu et al. (MIMIR)                     |

Depth, width and classes follow from the shapes in a file (`ibjax.pytorch.sizes`). The layouts differ:

| layer                           | PyTorch                               | ours                                   |
|---------------------------------|---------------------------------------|----------------------------------------|
| convolution                     | weight (out, in, height, width)       | kernel (height, width, in, out)        |
| linear layer                    | weight (out, in)                      | kernel (in, out)                       |
| linear layer on a flattened map | inputs ordered (channel, row, column) | inputs ordered (row, column, channel)  |
| batch-norm, layer norm          | weight                                | scale                                  |
| Swin's table of relative biases | (positions, heads)                    | (heads, positions)                     |

All other parameters, such as tokens, positions and layer scales, have equal shapes.
"""

import functools
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from ibjax.devices import cluster
from ibjax.models import convnext, preact_resnet, resnet, stages, swin, vgg, vit, xcit
from ibjax.runs import run
from ibjax.runs.trees import flatten

CIFAR10 = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616))
CIFAR100 = dict(mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
_LEAVES = {"kernel": "weight", "bias": "bias", "scale": "weight", "mean": "running_mean", "var": "running_var"}

State = Mapping[str, np.ndarray]  # the state dict of a PyTorch network: name -> value
Shape = tuple[int, int, int]  # of an image: height, width, channels
_RGB = (32, 32, 3)
_NONE: Mapping[str, Any] = MappingProxyType({})


class Architecture(NamedTuple):
    """A published network."""

    torch: str  # module of its definition in ibjax.pytorch.networks
    model: str  # module of our model in ibjax.models
    fixed: Mapping[str, Any]  # options of our model that make it this architecture
    names: Mapping[str, str]  # our layer name -> the published name, where they differ
    block: str = ""  # template for the name of a block; stages and blocks count from 0
    marks: tuple[str, ...] = ()  # what `anchors` returns, where it does not follow from names and block
    defaults: Mapping[str, Any] = _NONE  # our options unless file or caller say otherwise
    # By data set (or a prefix of its name): the mean, std and border that the authors use. An architecture with entries
    # always normalises; on a data set not listed, the caller must say how. One without entries usually does not.
    normalized: Mapping[str, Mapping[str, Any]] = _NONE
    asks: str = ""  # where its files normalise in several ways, these in words; the caller must say which
    twin: Mapping[str, Any] = _NONE  # further options of its PyTorch definition
    unused: str = "(?!)"  # regular expression of names in its files that the network never uses
    # (a name found only in older files, [(pattern of an old name, the new name), …])
    older: tuple[str, tuple[tuple[str, Callable[[re.Match], str] | str], ...]] = ("", ())

    @property
    def block_pattern(self) -> str:
        """A regular expression of the names of blocks; its groups are the stage, where there are stages, and index."""
        return re.sub(r"\\{\w+\\}", r"(\\d+)", re.escape(self.block))


_DM = dict(
    defaults=dict(activation="silu"),
    normalized={"cifar100": CIFAR100, "cifar10": CIFAR10, "mnist": dict(mean=(0.5,), std=(0.5,), border=2)},
)
_PREACT = dict(stem="conv1", head="linear", shortcut="shortcut.0")
_RESNET = dict(stem="conv1", bn_stem="bn1")
_TORCHVISION = dict(
    names=dict(_RESNET, head="fc", conv_shortcut="downsample.0", bn_shortcut="downsample.1"),
    block="layer{stage1}.{index}",
    normalized={"imagenet": IMAGENET},
    twin=dict(projection="downsample", head="fc"),
)
_CONVNEXT = dict(norm_head="head.norm", head="head.fc", down_norm="0", down="1")
_CONVNEXT_MARKS = ("stages.0.blocks.0.conv_dw.weight", "head.fc.weight")
_VIT_MARKS = ("blocks.0.attn.qkv.weight", "norm.weight", "head.weight")
_XCIT = dict(
    names=dict(stem="patch_embed.proj", position="pos_embed.token_projection", local="local_mp"),
    block="blocks.{index}",
    marks=(
        "patch_embed.proj.0.0.weight",
        "blocks.0.attn.temperature",
        "cls_attn_blocks.0.attn.q.weight",
        "head.weight",
    ),
)
# timm before 0.9, Liu et al. and all who build on them merge patches at the end of a stage, not before the next one
_SWIN_OLDER = (
    "layers.0.downsample.reduction.weight",
    (
        (r"layers\.(\d+)\.downsample\.(.+)", lambda match: f"layers.{int(match[1]) + 1}.downsample.{match[2]}"),
        (r"head\.(weight|bias)", r"head.fc.\1"),
    ),
)
_SWIN = dict(
    names=dict(stem="patch_embed.proj", norm_stem="patch_embed.norm", head="head.fc"),
    block="layers.{stage}.blocks.{index}",
    marks=(  # in older files, too
        "patch_embed.proj.weight",
        "patch_embed.norm.weight",
        "layers.0.blocks.0.attn.relative_position_bias_table",
        "norm.weight",
    ),
    unused=r"layers\.\d+\.blocks\.\d+\.(attn_mask|attn\.relative_position_index)",  # follow from the sizes
    older=_SWIN_OLDER,
)
ARCHITECTURES = {
    "wide_resnet": Architecture(
        "wide_resnet",
        "wide_resnet",
        dict(variant="trades"),
        dict(stem="conv1", bn="bn1", head="fc", shortcut="convShortcut"),
        "block{stage1}.layer.{index}",
        unused=r"sub_block1\..*",  # a second copy of stage 1 that TRADES's constructor creates
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
    "torchvision_cifar_resnet": Architecture("resnet", "resnet", dict(stem="cifar"), **_TORCHVISION),
    "imagenet_resnet": Architecture("resnet", "resnet", dict(stem="imagenet"), **_TORCHVISION),
    "vgg": Architecture("vgg", "vgg", dict(variant="ib_rar"), {}),
    "torchvision_vgg": Architecture(
        "vgg", "vgg", dict(variant="torchvision"), {}, normalized=_TORCHVISION["normalized"]
    ),
    "small_cnn": Architecture("small_cnn", "cnn", dict(padding=0, batch_norm=False, pool="flatten"), {}),
    "cnn": Architecture("cnn", "cnn", {}, {}),
    "convnext": Architecture(
        "convnext",
        "convnext",
        dict(stem="patch"),
        dict(stem="stem.0", norm_stem="stem.1", **_CONVNEXT),
        "stages.{stage}.blocks.{index}",
        ("stem.0.weight", *_CONVNEXT_MARKS),
        normalized={"imagenet": IMAGENET},
    ),
    "convnext_convstem": Architecture(
        "convnext",
        "convnext",
        dict(stem="convstem"),
        dict(stem="stem.stem", **_CONVNEXT),
        "stages.{stage}.blocks.{index}",
        ("stem.stem.0.weight", *_CONVNEXT_MARKS),
    ),
    "vit": Architecture(
        "vit",
        "vit",
        dict(stem="patch"),
        dict(stem="patch_embed.proj"),
        "blocks.{index}",
        ("patch_embed.proj.weight", *_VIT_MARKS),
        asks="in two ways, by ImageNet's --mean=0.485,0.456,0.406 --std=0.229,0.224,0.225 (DeiT) or by --mean=0.5 "
        "--std=0.5 (timm's default for ViT)",
    ),
    "vit_convstem": Architecture(
        "vit",
        "vit",
        dict(stem="convstem", patch=vit.CONVSTEM_PATCH),
        dict(stem="patch_embed.proj.stem"),
        "blocks.{index}",
        ("patch_embed.proj.stem.0.weight", *_VIT_MARKS),
    ),
    "xcit": Architecture("xcit", "xcit", dict(patch=16), **_XCIT, normalized={"imagenet": IMAGENET}),
    "cifar_xcit": Architecture(
        "xcit", "xcit", dict(patch=4), **_XCIT, normalized={"cifar100": CIFAR100, "cifar10": CIFAR10}
    ),
    "swin": Architecture("swin", "swin", dict(epsilon=1e-5), **_SWIN, normalized={"imagenet": IMAGENET}),
    "mimir_swin": Architecture("swin", "swin", dict(epsilon=1e-6), **_SWIN),
}


def matching(model: nn.Module) -> list[str]:
    """The published architectures equal to our model, which differ in parameter names only; [] where there is none."""
    return [
        name
        for name, known in ARCHITECTURES.items()
        if type(model).__module__ == f"ibjax.models.{known.model}"
        and all(getattr(model, option) == value for option, value in known.fixed.items())
    ]


def build(name: str, options: Mapping[str, Any]) -> nn.Module:
    """Our model of an architecture, with the options that `sizes.sizes` returns."""
    known = ARCHITECTURES[name]
    section = {"name": known.model, **options, **known.fixed}
    return run.build_model(section, section.pop("num_classes"), "model")


# ---- names -------------------------------------------------------------------------------------------------


class Leaf(NamedTuple):
    """The PyTorch counterpart of one of our parameters or batch statistics."""

    name: str  # in PyTorch
    shape: tuple[int, ...]  # ours
    flattened: Shape | None  # shape (h, w, c) of the map whose flattened values a linear layer takes

    def theirs(self) -> tuple[int, ...]:
        """Its shape in PyTorch."""
        if len(self.shape) == 4:
            return self.shape[3], self.shape[2], *self.shape[:2]
        return self.shape[::-1] if len(self.shape) == 2 else self.shape


def key_map(name: str, model: nn.Module, shape: Shape = _RGB) -> dict[str, Leaf]:
    """{path of our leaf: its PyTorch counterpart} of all parameters and batch statistics, for images of this shape."""
    known = ARCHITECTURES[name]
    names, flattened = {**known.names, **_numbered(name, model)}, _flattened(model, shape)
    found = {}
    for path, ours in _shapes(model.clone(mean=None, std=None, dtype="float32"), shape).items():
        _, *modules, last = path.split("/")
        seen = flattened[1] if flattened and modules[0] == flattened[0] and last == "kernel" else None
        modules = [names.get(module, module) for module in modules if module not in ("conv", "dense")]
        found[path] = Leaf(".".join([*modules, _LEAVES.get(last, last)]), ours, seen)
    return found


@functools.lru_cache(maxsize=32)
def _shapes(model, shape):
    """{path: shape} of our leaves. The whole network is traced for them, so `model` is without what changes none."""
    return {path: leaf.shape for path, leaf in flatten(run.abstract_variables(model, shape, cluster.mesh())).items()}


def of_today(name: str, state: State) -> dict[str, np.ndarray]:
    """A file's state without what the network never uses, and with the names of today where its are older."""
    known = ARCHITECTURES[name]
    mark, changes = known.older

    def named(key):
        for pattern, replacement in changes if mark in state else ():
            key = re.sub(f"^{pattern}$", replacement, key)
        return key

    return {named(key): value for key, value in state.items() if not re.fullmatch(known.unused, key)}


def anchors(name: str) -> tuple[str, ...]:
    """Names of weights that every file of an architecture has, at any depth and width; the first layer's comes first.

    Only a whole network has all of them.
    """
    known = ARCHITECTURES[name]
    if known.marks:
        return known.marks
    if known.model == "vgg":
        return "features.0.weight", "features.1.weight"
    if known.model == "cnn":
        return ("feature_extractor.conv1.weight",) if name == "small_cnn" else ("stage1.conv1.weight", "head.weight")
    first = known.block.format(stage=0, stage1=1, index=0)
    layers = (known.names["stem"], f"{first}.{known.names.get('conv1', 'conv1')}", known.names["head"])
    return tuple(f"{layer}.weight" for layer in layers)


def has_blocks(name: str, state: State) -> bool:
    """Whether any name is that of a weight in a block; True for architectures without blocks."""
    pattern = ARCHITECTURES[name].block_pattern
    return not pattern or any(re.search(pattern + r"\.", key) for key in state)


def _numbered(name, model):
    """Names of the parts that PyTorch numbers: blocks, stages, or VGG's layers."""
    known = ARCHITECTURES[name]
    if known.model == "vgg":
        return _vgg_names(vgg.DEPTHS[model.depth], len(model.hidden), known.fixed["variant"])
    if known.model == "cnn":
        return _cnn_names(name, model)
    if known.model == "wide_resnet":
        counts: tuple[int, ...] = ((model.depth - 4) // 6,) * 3
    elif known.model in ("vit", "xcit"):
        counts = (model.depth,)
    else:
        families = {"resnet": resnet, "preact_resnet": preact_resnet, "convnext": convnext, "swin": swin}
        counts = stages.block_counts(known.model, model.depth, model.blocks, families[known.model].DEPTHS)
    blocks = [(stage, index) for stage, count in enumerate(counts) for index in range(count)]
    names = {
        f"block{n}": known.block.format(stage=stage, stage1=stage + 1, index=index)
        for n, (stage, index) in enumerate(blocks, 1)
    }
    return names | _stem_names(known.model, model, len(counts))


def _stem_names(family, model, stages):
    """Names of the layers of a ConvStem or of XCiT's stem, of downsamplings and of class blocks."""
    if family == "xcit":
        names = {f"class_block{i + 1}": f"cls_attn_blocks.{i}" for i in range(model.class_depth)}
        for i in range(len(xcit.STRIDES[model.patch])):  # each convolution and batch-norm in a Sequential, then GELU
            names |= {f"embed{i + 1}": f"{2 * i}.0", f"embed_norm{i + 1}": f"{2 * i}.1"}
        return names
    if family not in ("convnext", "vit", "swin"):
        return {}
    above = "layers" if family == "swin" else "stages"
    names = {f"downsample{i + 1}": f"{above}.{i}.downsample" for i in range(1, stages)}
    for i in range(5):  # convolution, layer norm, GELU; at most five convolutions
        names |= {f"embed{i + 1}": f"{3 * i}", f"embed_norm{i + 1}": f"{3 * i + 1}"}
    return names


def _vgg_names(groups, hidden, variant):
    """`features` numbers convolutions, batch-norms, ReLUs and poolings; `classifier` has three numbers per layer."""
    names, place, conv = {}, 0, 0
    for count in groups:
        for _ in range(count):
            conv += 1
            names |= {f"conv{conv}": f"features.{place}", f"bn{conv}": f"features.{place + 1}"}
            place += 3
        place += 1
    for i in range(hidden):
        names[f"fc{i + 1}"] = f"classifier.{3 * i}"
        if variant == "ib_rar":
            names[f"bn_fc{i + 1}"] = f"classifier.{3 * i + 1}"
    return {**names, "head": f"classifier.{3 * hidden}"}


def _cnn_names(name, model):
    stages = [stage for stage, widths in enumerate(model.widths, 1) for _ in widths]
    if name == "cnn":
        return {f"{kind}{i}": f"stage{s}.{kind}{i}" for i, s in enumerate(stages, 1) for kind in ("conv", "bn")}
    names = {f"conv{i}": f"feature_extractor.conv{i}" for i in range(1, len(stages) + 1)}
    names |= {f"fc{i}": f"classifier.fc{i}" for i in range(1, len(model.hidden) + 1)}
    return {**names, "head": f"classifier.fc{len(model.hidden) + 1}"}


def _flattened(model, shape):
    """(our linear layer that takes a flattened map, the map's shape (h, w, c)); None where features are averaged."""
    family = type(model).__module__.rpartition(".")[2]
    layer = "fc1" if getattr(model, "hidden", ()) else "head"
    if family == "vgg" and model.variant == "torchvision":
        return layer, (vgg.POOLED, vgg.POOLED, vgg.WIDTHS[-1] * model.width)
    if family != "cnn" or model.pool != "flatten":
        return None
    height, width = shape[:2]
    for stage in model.widths:
        height, width = ((side + len(stage) * (2 * model.padding - 2)) // 2 for side in (height, width))
    return layer, (height, width, model.widths[-1][-1])


# ---- values ------------------------------------------------------------------------------------------------


def to_ours(name: str, model: nn.Module, state: State, shape: Shape = _RGB) -> dict[str, Any]:
    """Our variables {"params", "batch_stats"} with the values of a state that `fit.check` has accepted."""
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for path, leaf in key_map(name, model, shape).items():
        *above, last = path.split("/")
        node = variables
        for part in above:
            node = node.setdefault(part, {})
        node[last] = np.ascontiguousarray(_value_of_ours(state[leaf.name], leaf))
    return variables


def to_theirs(name: str, model: nn.Module, variables: Any, shape: Shape = _RGB) -> dict[str, np.ndarray]:
    """The inverse of `to_ours`."""
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(variables).items()}
    return {
        leaf.name: np.ascontiguousarray(_value_of_theirs(leaves[path], leaf))
        for path, leaf in key_map(name, model, shape).items()
    }


def _value_of_ours(value, leaf):
    if leaf.flattened:
        h, w, c = leaf.flattened
        return value.reshape(-1, c, h, w).transpose(2, 3, 1, 0).reshape(h * w * c, -1)
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T if value.ndim == 2 else value


def _value_of_theirs(value, leaf):
    if leaf.flattened:
        h, w, c = leaf.flattened
        return value.reshape(h, w, c, -1).transpose(3, 2, 0, 1).reshape(-1, h * w * c)
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T if value.ndim == 2 else value
