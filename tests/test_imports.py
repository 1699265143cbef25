"""Files as public repositories write them: each imports as the network that wrote it, or a line says what to give."""

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from ibjax.errors import InputError
from ibjax.models import vit, xcit
from ibjax.pytorch import architectures, gate, imports
from ibjax.pytorch import twins as definitions
from ibjax.pytorch.normalisation import Said

torch = pytest.importorskip("torch", reason="conversion needs PyTorch (pip install 'ibjax[torch]')")
pytest.importorskip("safetensors", reason="conversion needs safetensors (pip install 'ibjax[torch]')")
import torch_twins as twins  # noqa: E402
from public_networks import BasicBlock, Bottleneck, Named, Normalize, TorchvisionResNet, TorchvisionVGG  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402

from ibjax.pytorch.networks import dm_wide_resnet, preact_resnet, resnet, small_cnn, wide_resnet  # noqa: E402

PAGE = Path(__file__).parent.parent / "docs" / "imports.md"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
IMAGENET = architectures.IMAGENET
CIFAR10 = Said(mean=MEAN, std=STD)
NONE = Said(no_normalisation=True)


def network(make, *args, seed=0, **options):
    """A network with random weights that hide no mistake."""
    torch.manual_seed(seed)
    return twins.randomize(make(*args, **options))


def trades(seed=0):
    return network(wide_resnet.Model, 10, 10, 1, seed=seed)


def cifar_resnet(seed=0):
    return network(resnet.Model, 10, width=4, blocks=(1, 1), seed=seed)


def rice():
    return network(preact_resnet.Model, 10, width=4, blocks=(1, 1))


def deepmind(seed=0, **options):
    return network(dm_wide_resnet.Model, 10, 10, 1, seed=seed, **options)


def mnist_cnn():
    return network(small_cnn.Model, 10, ((4, 4), (6, 6)), (8, 7))


def after(normalize, net):
    return nn.Sequential(normalize, net)


def unkept(net):
    """A normalisation that the state dict does not have, then the network."""
    return after(Normalize(MEAN, STD, kept=False), net)


def state(net):
    return net.state_dict()


def prefixed(prefix, net):
    return {prefix + name: value for name, value in net.state_dict().items()}


def inside(net, before, wrapper):
    """Names with a wrapper within: behind `before`."""
    return {name.replace(before, f"{before}{wrapper}", 1): value for name, value in net.state_dict().items()}


def floats(net):
    """Counters as floats, as `network.half()` followed by hand-made averaging leaves them."""
    return {name: value.float() for name, value in net.state_dict().items()}


def robustness(net, norm):
    """MadryLab's library: a normaliser, the network, and both again for the attacker, below DataParallel."""
    constants = {"normalizer.new_mean": norm[0], "normalizer.new_std": norm[1]}
    constants = {name: torch.tensor(value).view(3, 1, 1) for name, value in constants.items()}
    model = prefixed("model.", net)
    again = {f"attacker.{name.replace('normalizer', 'normalize')}": value for name, value in constants.items()}
    again |= {f"attacker.{name}": value for name, value in model.items()}
    return {"model": {f"module.{name}": value for name, value in (constants | model | again).items()}, "epoch": 3}


def with_sub_block(net):
    """TRADES's constructor makes stage 1 twice, the second one unused."""
    return state(net) | {f"sub_{name}": value + 1 for name, value in state(net).items() if name.startswith("block1")}


class Row(NamedTuple):
    """One situation."""

    what: str  # the file, as docs/imports.md says it
    make: Callable[[], nn.Module]  # the network that writes it
    content: Callable[[Any], Any]  # of the network, what is written
    arch: str
    said: Said = Said()
    refused: str = ""  # what the refusal says; "" where the import equals the network
    page: str = ""  # the same as docs/imports.md says it
    expect: Callable[[Any], nn.Module] = lambda net: net  # the network that must come out
    write: Callable[[Any, Path], Any] = torch.save
    suffix: str = ".pt"


def average(net=None):
    """The running average of `cifar_resnet`: other weights."""
    return cifar_resnet(seed=1)


def timm(net):
    return {"epoch": 9, "state_dict": state(net), "state_dict_ema": state(average()), "metric": 0.1}


def gowal(net):
    return {"model_state_dict": state(net[-1]), "unaveraged_model_state_dict": state(deepmind(seed=1))}


def script(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch's own; the files are there
        return torch.jit.trace(net, torch.zeros(1, 3, 32, 32))


def student_and_teacher(net):
    return {"state_dict": prefixed("student.", net) | prefixed("teacher.", average())}


def torchvision_cifar():
    return network(TorchvisionResNet, BasicBlock, (1, 2), 10, cifar=True)


def wide_resnet50_2():
    return network(TorchvisionResNet, Bottleneck, (1, 2), 1000, factor=2)


def torchvision_vgg():
    return network(TorchvisionVGG, 10)


def of_bytes():
    """Pixels from 0 to 255."""
    return Normalize((125.3, 123.0, 113.9), (63.0, 62.1, 66.7), names=("pixel_mean", "pixel_std"))


TWO = "holds 2 networks: {}; say with --key=… which is meant"
WHICH = "refused: names both; say with `--key` which"
HOW = "refused: give `--mean --std` or `--no-normalisation`"
ROWS = [
    Row("TRADES: a state dict alone, with the unused `sub_block1`", trades, with_sub_block, "wide_resnet"),
    Row("DataParallel: `module.`", trades, lambda net: prefixed("module.", net), "wide_resnet"),
    Row(
        "`state_dict` beside optimiser, epoch and arguments",
        trades,
        lambda net: {
            "state_dict": state(net),
            "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}},
            "args": {"lr": 1},
        },
        "wide_resnet",
    ),
    Row(
        "pytorch-cifar: `net` with `module.`, and the accuracy",
        cifar_resnet,
        lambda net: {"net": prefixed("module.", net), "acc": 91.2, "epoch": 199},
        "resnet",
    ),
    Row(
        "timm: `state_dict` and `state_dict_ema`",
        cifar_resnet,
        timm,
        "resnet",
        refused=TWO.format("state_dict, state_dict_ema"),
        page=WHICH,
    ),
    Row(
        "the same with `--key=state_dict_ema`", cifar_resnet, timm, "resnet", Said(key="state_dict_ema"), expect=average
    ),
    Row(
        "DeepMind: `model_state_dict` and `unaveraged_model_state_dict`",
        lambda: unkept(deepmind()),
        gowal,
        "dm_wide_resnet",
        refused=TWO.format("model_state_dict, unaveraged_model_state_dict"),
        page=WHICH,
    ),
    Row(
        "the same with `--key=model_state_dict`, CIFAR-10's mean and std as DeepMind has them",
        lambda: unkept(deepmind()),
        gowal,
        "dm_wide_resnet",
        Said(key="model_state_dict"),
    ),
    Row(
        "torchvision's references: `model`, and `model_ema` with `module.`; `--key=model_ema`",
        cifar_resnet,
        lambda net: {
            "model": state(net),
            "model_ema": {"n_averaged": torch.tensor(7), **prefixed("module.", average())},
        },
        "resnet",
        Said(key="model_ema"),
        expect=average,
    ),
    Row(
        "the same, `--key=emma`",
        cifar_resnet,
        lambda net: {"model": state(net), "model_ema": prefixed("module.", average())},
        "resnet",
        Said(key="emma"),
        refused=r"nothing at --key=emma; give one of model, model_ema\.module",
        page="refused: names both",
    ),
    Row(
        "`best` and `last` with equal weights",
        cifar_resnet,
        lambda net: {"best": state(net), "last": {name: value.clone() for name, value in state(net).items()}},
        "resnet",
    ),
    Row(
        "`Sequential(normalisation, network)` that does not keep its normalisation: `1.`",
        lambda: unkept(cifar_resnet()),
        state,
        "resnet",
        refused=r"names begin with 1\., so that something stood before.*give --mean=… --std=….*or --no-normalisation",
        page=HOW,
    ),
    Row("the same with `--mean --std`", lambda: unkept(cifar_resnet()), state, "resnet", CIFAR10),
    Row(
        "`Sequential(nothing, network)` below DataParallel, `module.1.`, with `--no-normalisation`",
        lambda: after(nn.Identity(), cifar_resnet()),
        lambda net: prefixed("module.", net),
        "resnet",
        NONE,
    ),
    Row(
        "`Sequential(normalisation, network)` that keeps `mu` and `sigma`",
        lambda: after(Normalize(MEAN, STD, names=("mu", "sigma")), cifar_resnet()),
        state,
        "resnet",
    ),
    Row(
        "the same with other `--mean --std`",
        lambda: after(Normalize(MEAN, STD, names=("mu", "sigma")), cifar_resnet()),
        state,
        "resnet",
        Said(mean=(0.5,), std=(0.5,)),
        refused=r"keeps its normalisation, mean \(0\.4914.*; leave --mean and --std out",
        page="refused: the file has its own normalisation",
    ),
    Row(
        "RobustBench: `normalize.mean`, `normalize.std`, `model.`",
        lambda: Named("model", cifar_resnet(), Normalize(MEAN, STD)),
        state,
        "resnet",
    ),
    Row(
        "MadryLab's robustness: normaliser and network, both twice",
        lambda: after(Normalize(MEAN, STD), cifar_resnet()),
        lambda net: robustness(net[1], (MEAN, STD)),
        "resnet",
    ),
    Row(
        "`Sequential(network)`: `module.0.`",
        lambda: nn.Sequential(cifar_resnet()),
        lambda net: prefixed("module.", net),
        "resnet",
    ),
    *(
        Row(f"a wrapper's name before all others: `{name}.`", lambda n=name: Named(n, cifar_resnet()), state, "resnet")
        for name in ("backbone", "encoder", "student", "_model", "basic_net")
    ),
    *(
        Row(f"DataParallel and compilation: `{name}`", cifar_resnet, lambda net, p=name: prefixed(p, net), "resnet")
        for name in ("_orig_mod.module.", "module._orig_mod.")
    ),
    Row(
        "compiled stages: `layer1._orig_mod.0.`",
        cifar_resnet,
        lambda net: inside(net, "layer1.", "_orig_mod."),
        "resnet",
    ),
    Row(
        "student and teacher in one state dict",
        cifar_resnet,
        student_and_teacher,
        "resnet",
        refused=TWO.format(r"state_dict\.student, state_dict\.teacher"),
        page=WHICH,
    ),
    Row(
        "the same with `--key=state_dict.teacher`",
        cifar_resnet,
        student_and_teacher,
        "resnet",
        Said(key="state_dict.teacher"),
        expect=average,
    ),
    Row(
        "Lightning: `model.` beside a loss that has weights",
        cifar_resnet,
        lambda net: {"state_dict": prefixed("model.", net) | {"loss_fn.weight": torch.ones(10)}},
        "resnet",
        refused=r"more than the network below model\.: it has loss_fn\.weight; --key=state_dict\.model takes that",
        page="refused: names what is left over, and the `--key` that leaves it out",
    ),
    Row("`num_batches_tracked` as a float", cifar_resnet, floats, "resnet"),
    Row(
        "SWA's AveragedModel, `n_averaged` as a float",
        cifar_resnet,
        lambda net: prefixed("module.", net) | {"n_averaged": torch.tensor(12.0)},
        "resnet",
    ),
    Row("`state_dict(keep_vars=True)`", cifar_resnet, lambda net: net.state_dict(keep_vars=True), "resnet"),
    Row(
        "`dict(named_parameters())` of TRADES's SmallCNN",
        mnist_cnn,
        lambda net: dict(net.named_parameters()),
        "small_cnn",
    ),
    Row("`list(named_parameters())` of it", mnist_cnn, lambda net: list(net.named_parameters()), "small_cnn"),
    Row(
        "`dict(named_parameters())` of a network with batch-norm",
        cifar_resnet,
        lambda net: dict(net.named_parameters()),
        "resnet",
        refused=r"is no resnet: it lacks layer1\.0\.bn1\.running_mean.*save network\.state_dict\(\), which has them",
        page="refused: the statistics are missing; save `state_dict()`",
    ),
    Row(
        "weights in float16",
        cifar_resnet,
        lambda net: {name: value.half() for name, value in state(net).items()},
        "resnet",
        expect=lambda net: net.half().float(),
    ),
    Row(
        "Rice et al.: CIFAR-10's `--mean --std`",
        lambda: unkept(rice()),
        lambda net: state(net[1]),
        "preact_resnet",
        CIFAR10,
    ),
    Row(
        "DeepMind on MNIST: mean and std 0.5, two zeros around the image",
        lambda: deepmind(mean=(0.5,), std=(0.5,), border=2, channels=1),
        lambda net: {name: value for name, value in state(net).items() if name not in ("mean", "std")},
        "dm_wide_resnet",
    ),
    Row(
        "DeepMind's network on SVHN",
        deepmind,
        state,
        "dm_wide_resnet",
        Said(overrides=("--config.data.dataset=svhn_cropped",)),
        refused=r"dm_wide_resnet normalise their pixels, and .* does not keep how; give --mean=… --std=…",
        page=HOW,
    ),
    Row(
        "torchvision's ResNet with a 3×3 stem and no max-pooling, `--mean --std`",
        lambda: unkept(torchvision_cifar()),
        lambda net: state(net[1]),
        "torchvision_cifar_resnet",
        CIFAR10,
    ),
    Row(
        "the same, nothing said",
        torchvision_cifar,
        state,
        "torchvision_cifar_resnet",
        refused=r"normalise their pixels, and .* does not keep how; give --mean=… --std=….*imagenet",
        page=HOW,
    ),
    Row(
        "the same as another architecture",
        torchvision_cifar,
        state,
        "imagenet_resnet",
        NONE,
        refused=r"conv1\.weight is \(4, 3, 3, 3\).*closest: --arch=torchvision_cifar_resnet \(100 %",
        page="refused: names the shapes, and the architecture that agrees",
    ),
    Row("torchvision's `vgg11_bn`, `--no-normalisation`", torchvision_vgg, state, "torchvision_vgg", NONE),
    Row(
        "the same with `features` below DataParallel, as torchvision's ImageNet example writes it",
        torchvision_vgg,
        lambda net: inside(net, "features.", "module."),
        "torchvision_vgg",
        NONE,
    ),
    Row(
        "timm's and torchvision's `wide_resnet50_2`, 1000 classes: ImageNet's mean and std",
        lambda: after(Normalize(*IMAGENET.values(), kept=False), wide_resnet50_2()),
        lambda net: state(net[1]),
        "imagenet_resnet",
    ),
    Row(
        "mean and std of pixels from 0 to 255 (`pixel_mean`)",
        lambda: Named("model", cifar_resnet(), of_bytes()),
        state,
        "resnet",
        refused="not those of pixels from 0 to 1",
        page="refused: names them",
    ),
    Row(
        "two normalisations one after the other",
        lambda: Named("model", after(Normalize(MEAN, STD), after(Normalize((0.5,) * 3, (0.5,) * 3), cifar_resnet()))),
        state,
        "resnet",
        refused=r"keeps several normalisations: model\.0\.mean, model\.0\.std, model\.1\.0\.mean",
        page="refused: names them",
    ),
    Row(
        "the same normalisation twice",
        lambda: Named("model", cifar_resnet(), Normalize(MEAN, STD)),
        lambda net: state(net) | {"model.mean": net.normalize.mean, "model.std": net.normalize.std},
        "resnet",
        refused="keeps several normalisations",
        page="refused: names them",
    ),
    Row("safetensors in a file called .pt", cifar_resnet, floats, "resnet", write=save_file),
    Row(
        "the format of torch.save before 1.6 (.t7)",
        cifar_resnet,
        state,
        "resnet",
        write=lambda content, file: torch.save(content, file, _use_new_zipfile_serialization=False),
        suffix=".t7",
    ),
    Row(
        "a whole module, pickled",
        cifar_resnet,
        lambda net: net,
        "resnet",
        refused=r"holds more than tensors \(ibjax\.pytorch\.networks\.resnet\.Model\).*refused.*network\.state_dict",
        page="refused, nothing is run; save `state_dict()`",
    ),
    Row(
        "pruned: `weight_orig` and `weight_mask`",
        cifar_resnet,
        lambda net: {name.replace("linear.weight", "linear.weight_orig"): v for name, v in state(net).items()},
        "resnet",
        refused=r"it lacks linear\.weight; it has linear\.weight_orig",
        page="refused: names both",
    ),
    Row(
        "another network's names",
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 10)),
        lambda net: {f"blocks.0.attn.{name}": value for name, value in state(net).items()},
        "resnet",
        refused=r"its names are of no architecture that is known here; allowed: cifar_xcit, cnn, convnext",
        page="refused: of no known architecture",
    ),
    Row(
        "TorchScript",
        cifar_resnet,
        script,
        "resnet",
        refused=r"a program of TorchScript \(torch\.jit\.save\).*torch\.jit\.load",
        page="refused: says what it is and how its weights are saved",
        write=lambda content, file: content.save(file),
    ),
    *(
        Row(
            what,
            cifar_resnet,
            lambda net: None,
            "resnet",
            refused=said,
            page="refused: says what it is",
            write=lambda _, file, write=write: write(file),
            suffix=suffix,
        )
        for what, said, suffix, write in (
            (
                "JAX's parameters, pickled",
                r"a pickle that torch\.save has not written, as JAX's",
                ".pkl",
                lambda file: file.write_bytes(pickle.dumps({"params": {"w": np.ones(3)}})),
            ),
            ("NumPy's .npz", r"an archive of NumPy \(\.npz\) with w\.npy", ".npz", lambda f: np.savez(f, w=np.ones(3))),
            ("NumPy's .npy", r"an array of NumPy \(\.npy\)", ".npy", lambda file: np.save(file, np.ones(3))),
            (
                "Flax's msgpack",
                "a msgpack file, as Flax writes",
                ".msgpack",
                lambda file: file.write_bytes(b"\x81\xa6params\x81\xa1w\xc0"),
            ),
            (
                "the web page that a failed download leaves",
                "a web page, as a server sends",
                ".pt",
                lambda file: file.write_text("<!DOCTYPE html><html>the file is too large to be scanned"),
            ),
            (
                "a pointer of Git LFS",
                "a pointer of Git LFS",
                ".pt",
                lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
            ),
        )
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=[row.what for row in ROWS])
def test_a_file_imports_as_the_network_that_wrote_it_or_is_refused_with_what_to_give(row, tmp_path):
    net, file = row.make().eval(), tmp_path / f"file{row.suffix}"
    row.write(row.content(net), file)
    if row.refused:
        with pytest.raises(InputError, match=row.refused) as error:
            imports.read(file, row.arch, row.said)
        assert "\n" not in str(error.value)
        return
    read = imports.read(file, row.arch, row.said)
    images = gate.crops(read.shape[0], 3, read.shape[2])
    variables = architectures.to_ours(read.arch, read.model, read.state, images.shape[1:])
    expected = gate.of_torch(row.expect(net).eval(), images)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(gate.of_ours(read.model, variables, images), expected, atol=1e-5, rtol=0)


def test_what_a_file_does_not_determine_and_has_no_usual_value_is_refused(tmp_path):
    """A ViT normalises as ImageNet or by 0.5; an XCiT of width 128 is timm's nano, which has another layer norm."""
    for arch, model, said in (
        (
            "vit",
            vit.Model(1000, depth=1, width=64),
            r"--mean=0\.485,.* or by --mean=0\.5 --std=0\.5.*does not keep how",
        ),
        ("xcit", xcit.Model(1000, depth=1, width=128), r"width 128, as timm's xcit_nano"),
    ):
        net = network(lambda: definitions.make(arch, model, (32, 32, 3)))  # noqa: B023
        torch.save(state(net), file := tmp_path / "a.pt")
        with pytest.raises(InputError, match=said) as error:
            imports.read(file, arch)
        assert "\n" not in str(error.value)


def test_the_border_of_a_network_is_there_whoever_says_mean_and_std(tmp_path):
    """DeepMind's on MNIST: two zeros around the image, also where the file or the caller has mean and std."""
    net = deepmind(mean=(0.5,), std=(0.5,), channels=1)
    torch.save(state(net), file := tmp_path / "a.pt")
    assert imports.read(file, "dm_wide_resnet").model.border == 2
    none = Said(overrides=("--config.model.border=0",))
    assert imports.read(file, "dm_wide_resnet", none).model.border == 0
    torch.save({name: value for name, value in state(net).items() if name not in ("mean", "std")}, file)
    assert imports.read(file, "dm_wide_resnet", Said(mean=(0.1,), std=(0.3,))).model.border == 2


def test_the_page_has_every_row_and_its_outcome():
    """`python tests/test_imports.py` prints the rows."""
    assert "\n".join(table()) in PAGE.read_text(encoding="utf-8")


def table():
    yield "| the file | `--arch` | outcome |"
    yield "|---|---|---|"
    for row in ROWS:
        yield f"| {row.what} | `{row.arch}` | {row.page or 'equal logits'} |"


if __name__ == "__main__":
    print("\n".join(table()))
