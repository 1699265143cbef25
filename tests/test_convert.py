"""PyTorch networks become runs and runs PyTorch networks, with equal logits and equal bits, or nothing is written."""

import hashlib
import json
import os
import pickle
import runpy
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Bomb, smoke_config

from ibjax import config, convert, files
from ibjax.devices import cluster
from ibjax.errors import CheckpointError, InputError
from ibjax.evaluation import report
from ibjax.evaluation.evaluate import evaluate
from ibjax.models import cnn, convnext, preact_resnet, resnet, vit, wide_resnet, xcit
from ibjax.pytorch import architectures, exports, fit, gate, imports, torch_file
from ibjax.pytorch import twins as definitions
from ibjax.runs import checkpoint as checkpoints
from ibjax.runs import run, rundir, trees
from ibjax.step import TrainState
from ibjax.training import loop

torch = pytest.importorskip("torch", reason="conversion needs PyTorch (pip install 'ibjax[torch]')")
pytest.importorskip("safetensors", reason="conversion needs safetensors (pip install 'ibjax[torch]')")
import torch_twins as twins  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from test_twins import DM, FLAGS, PAIRS  # noqa: E402

RESNET_SECTION = dict(name="resnet", blocks=(1, 1, 1), width=4)


def twin(name="wrn_trades"):
    torch.manual_seed(0)
    return twins.make(*PAIRS[name])


@pytest.fixture(scope="module")
def images():
    """96 crops of real photographs."""
    return gate.crops(32, 96)


@pytest.fixture(scope="module")
def data(images, tmp_path_factory):
    """--config flags of a data set of real images; `wrn_trades` classifies three quarters of its 40 test images."""
    file = tmp_path_factory.mktemp("data") / "crops.npz"
    answers = twins.logits(twin(), images[:40].astype(np.float32) / 255).argmax(1)
    answers[::4] = (answers[::4] + 1) % 10
    labels = np.arange(56) % 10
    np.savez(file, x_train=images[40:], y_train=labels, x_test=images[:40], y_test=answers)
    return ["--config.data.name=npz", f"--config.data.path={file}", "--config.data.val_size=16"]


def saved(network, file):
    torch.save(network.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def imported(data, tmp_path_factory):
    """(the file of `wrn_trades`, the workdir that was made of it)."""
    folder = tmp_path_factory.mktemp("imported")
    file = saved(twin(), folder / "wrn.pt")
    convert.from_torch(file, "wide_resnet", folder / "run", overrides=[*data, "--config.model.dtype=bfloat16"])
    return file, folder / "run"


# ---- there and back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_import_export_and_import_give_the_same_bits(name, data, tmp_path):
    arch, model = PAIRS[name]
    network = twin(name)
    flags = [*data, *FLAGS.get(name, ())]
    found = convert.from_torch(saved(network, tmp_path / "a.pt"), arch, tmp_path / "a", overrides=flags)
    assert found["max_delta_logit"] <= 1e-4
    assert convert.to_torch(tmp_path / "a", tmp_path / "exported") <= 1e-4
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    given = {key: value for key, value in network.state_dict().items() if value.is_floating_point()}
    assert set(exported) == set(given)
    assert all(torch.equal(exported[key], value) for key, value in given.items())

    (tmp_path / "b").mkdir()
    convert.from_torch(tmp_path / "exported" / "model.safetensors", arch, tmp_path / "b", overrides=data)
    first, second = (run.load(tmp_path / folder) for folder in "ab")
    assert trees.digest(first.variables) == trees.digest(second.variables)
    assert first.model == second.model == model


def test_an_export_is_read_as_the_architecture_that_it_was_exported_as(tmp_path):
    """Another one of equal shapes would be another network; a normalisation of any number of channels is kept."""
    norm = dict(mean=(0.1, 0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7, 0.8))
    model = preact_resnet.Model(10, width=4, blocks=(1, 1), projection="raw", **norm)
    weights = twins.state(twins.make("preact_resnet_raw", model, shape := (8, 8, 4)))
    twin = definitions.make("preact_resnet_raw", model, shape, weights)
    file = tmp_path / "model.safetensors"
    file.write_bytes(exports._safetensors(file, twin, "preact_resnet_raw", model, shape))
    with pytest.raises(InputError, match=r"was exported as --arch=preact_resnet_raw, not preact_resnet; give --arch="):
        imports.read(file, "preact_resnet")
    assert imports.read(file, "preact_resnet_raw").model == model


def test_a_network_is_traced_once_whatever_its_normalisation_and_precision(monkeypatch):
    plain, traced = preact_resnet.Model(7, width=4, blocks=(1,)), []
    original = run.abstract_variables
    monkeypatch.setattr(run, "abstract_variables", lambda *given: traced.append(given) or original(*given))
    others = plain.clone(mean=(0.5,) * 3, std=(0.5,) * 3), plain.clone(dtype="bfloat16")
    names = [architectures.key_map("preact_resnet", model) for model in (plain, *others)]
    assert names[0] == names[1] == names[2] and len(traced) == 1


@pytest.mark.slow
def test_a_full_size_wide_resnet_converts(tmp_path):
    """WRN-28-10, random weights and batch statistics, on real images."""
    torch.manual_seed(0)
    network = twins.make("wide_resnet", wide_resnet.Model(10, 28, 10))
    found = convert.from_torch(saved(network, tmp_path / "a.pt"), "wide_resnet", tmp_path / "a", photographs=32, n=8)
    print(f"max |Δlogit| {found['max_delta_logit']:.1e}")
    assert found["max_delta_logit"] <= 1e-4
    section = json.loads((tmp_path / "a" / "config.json").read_text())["config"]["model"]
    assert (section["depth"], section["width"]) == (28, 10)


def test_the_exported_check_runs_in_plain_torch(imported, data, tmp_path, monkeypatch, capsys):
    """A process of its own, which knows nothing of ibjax, finds the accuracy that ibjax finds; other weights fail."""
    _, workdir = imported
    folder = tmp_path / "exported"
    convert.to_torch(workdir, folder)
    clean = evaluate(workdir, attacks=["fgsm"])[0]["clean_acc"]
    assert clean == 75.0
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    command = [sys.executable, str(folder / "check.py")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "clean accuracy 75.00 % of 40 images\nibjax: 75.00 %, max |Δlogit|" in done.stdout
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "fc.bias": tensors["fc.bias"] + 1e-3}, folder / "model.safetensors")

    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "argv", ["check.py"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(folder / "check.py"), run_name="__main__")
    assert ended.value.code == 1 and "max |Δlogit| 1.0e-03" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["check.py", f"--data={data[1].partition('=')[2]}"])
    runpy.run_path(str(folder / "check.py"), run_name="__main__")
    del sys.modules["model"]
    assert capsys.readouterr().out == "clean accuracy 75.00 % of 40 images\n"


def test_the_definition_that_is_exported_is_short(imported, tmp_path):
    convert.to_torch(imported[1], tmp_path / "exported")
    text = (tmp_path / "exported" / "model.py").read_text()
    assert len(text.splitlines()) < 100
    assert {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import", "from"))} == {
        "torch",
        "safetensors",
    }


def test_model_info_has_robustbenchs_keys_and_the_records_accuracies(imported):
    _, workdir = imported
    record = evaluate(workdir, attacks=["fgsm"])[0] | {"attack": "autoattack", "robust_acc": 12.345}
    file = workdir / "eval/best/autoattack.json"
    files.write_json(file, record)
    info = exports.model_info(run.load(workdir), "best")
    keys = "link name authors additional_data number_forward_passes dataset venue architecture eps clean_acc reported"
    assert [*info] == [*keys.split(), "autoattack_acc"]
    assert (info["architecture"], info["eps"], info["clean_acc"]) == ("WideResNet-10-1", "8/255", "75.00")
    assert info["autoattack_acc"] == info["reported"] == "12.35"
    for other in ({"weights": "another network's"}, {"n": 20}, {"main": False}, {"eps": "4/255"}, {"samples": 12}):
        files.write_json(file, record | other)
        assert exports.model_info(run.load(workdir), "best")["autoattack_acc"] is None
    file.unlink()


def test_an_architecture_is_named_by_its_own_blocks_where_its_depth_does_not_say_them():
    for model, said in (
        (resnet.Model(10, 50, blocks=(3, 4, 23, 3)), "ResNet-101 (blocks 3, 4, 23, 3)"),
        (resnet.Model(10, 50, inner_width=2), "WideResNet-50-2"),
        (preact_resnet.Model(10, 18), "PreActResNet-18"),
        (convnext.Model(10, 18, 96), "ConvNeXt-T"),
        (convnext.Model(10, 18, 96, blocks=(3, 3, 27, 3)), "ConvNeXt-36-96 (blocks 3, 3, 27, 3)"),
        (vit.Model(10, 12, 192), "ViT-192"),
        (xcit.Model(10, 12, 192), "XCiT-192-12"),
        (xcit.Model(10, 12, 384), "XCiT-S12"),
    ):
        assert exports._readable(model) == said


# ---- what an import makes is a run -------------------------------------------------------------------------


def test_the_command_line_makes_a_run_that_is_evaluated_and_taught_from(imported, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    file, workdir = imported[0], tmp_path / "run"
    command = ["convert", "--torch", str(file), "--arch=wide_resnet", f"--workdir={workdir}", "--clean_acc=76", *data]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        convert.main()
    assert ended.value.code == 0
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    read, compared = capsys.readouterr().out.splitlines()
    assert read == (
        f"{file}: architecture wide_resnet (--arch); size depth 10, width 1, 10 classes (names and shapes); key none "
        f"(a state dict alone); prefix none (the names); normalisation none (usual of wide_resnet); activation relu "
        f"(usual of wide_resnet); padding symmetric (the architecture); parameters 77,850 (the file); SHA-256 {digest} "
        f"(compared with none)"
    )
    assert "on 40 test images of crops, clean accuracy 75.00 %" in compared

    record = evaluate(workdir, attacks=["fgsm"], n=20)[0]
    assert record["selected_on"] == "unknown" and record["imported"]["arch"] == "wide_resnet"
    assert record["imported"]["sha256"] == digest
    assert record["imported"]["network"]["normalisation"] == {"is": "none", "from": "usual of wide_resnet"}
    report.write([workdir], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "Imported by ibjax.convert from wrn.pt" in text and "not finished" not in text and "train again" not in text

    student = config.base()
    student.model = dict(name="preact_resnet", blocks=(1, 1), width=4)
    student.objective = dict(name="ibd")
    student.attack.update(loss="kl", init="gaussian")
    student.batch_size = 8
    student.data = dict(name="npz", path=data[1].partition("=")[2], val_size=16, split_seed=0)
    student.teacher.workdir = str(workdir)
    loop.check(student)


def test_without_a_data_set_photographs_are_compared_and_the_run_can_teach(imported, tmp_path):
    convert.from_torch(imported[0], "wide_resnet", tmp_path / "run", photographs=32, n=16)
    loaded = run.load(tmp_path / "run")
    with pytest.raises(InputError, match=r"holds a network with imported=.*which training cannot continue"):
        rundir.write_config(tmp_path / "run", loaded.config, {k: v for k, v in loaded.facts.items() if k != "imported"})
    loaded = run.load(tmp_path / "run")
    assert "scikit-learn" in loaded.facts["imported"]["images"] and loaded.facts["input_shape"] == [32, 32, 3]
    with pytest.raises(InputError, match="imported with photographs"):
        evaluate(tmp_path / "run")
    convert.to_torch(tmp_path / "run", tmp_path / "exported", n=16)
    with pytest.raises(InputError, match="--photographs=0 is not allowed; give a side of 8 to"):
        convert.from_torch(imported[0], "wide_resnet", tmp_path / "b", photographs=0)
    with pytest.raises(InputError, match="--clean_acc needs"):
        convert.from_torch(imported[0], "wide_resnet", tmp_path / "b", photographs=32, clean_acc=80.0)


def test_a_folder_that_is_not_empty_is_refused_and_a_new_one_is_written_whole_or_not_at_all(
    imported, data, tmp_path, monkeypatch
):
    file, workdir = imported
    with pytest.raises(InputError, match="not an empty folder"):
        convert.from_torch(file, "wide_resnet", workdir, overrides=data)
    with pytest.raises(InputError, match="not an empty folder"):
        convert.to_torch(workdir, workdir)

    def fails(*_):
        raise CheckpointError("disk full")

    monkeypatch.setattr(checkpoints, "save", fails)
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(sleep=lambda seconds: None))  # for threads of a true save
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "absent"):
        with pytest.raises(CheckpointError, match="disk full"):
            convert.from_torch(file, "wide_resnet", tmp_path / folder, overrides=data)
        monkeypatch.setattr(exports, "model_info", fails)
        with pytest.raises(CheckpointError, match="disk full"):
            convert.to_torch(workdir, tmp_path / folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


@pytest.mark.parametrize(
    "section",
    [
        dict(name="stochastic", backbone=RESNET_SECTION, latent=4),
        dict(name="siriib", backbone=RESNET_SECTION, widths=(4, 4)),
    ],
)
def test_networks_without_a_definition_in_pytorch_are_refused(section, tmp_path):
    random_run(tmp_path / "run", section, dict(name="synthetic", shape=(32, 32, 3), num_classes=10))
    with pytest.raises(InputError, match=rf"\({section['name']}\) has no definition in PyTorch; those that have: "):
        convert.to_torch(tmp_path / "run", tmp_path / "exported")


def random_run(folder, section, data):
    """A run whose network has random weights and statistics that hide no mistake."""
    settings, random = config.base(), np.random.default_rng(0)
    settings.model, settings.data = section, dict(data, val_size=0, split_seed=0)
    arrays = run.load_data(settings)
    model = run.build_model(section, arrays.num_classes, "model")
    shapes = run.abstract_variables(model, arrays.test.images.shape[1:], cluster.mesh())

    def fill(path, leaf):
        low = 0.5 if path[-1].key in ("scale", "var") else -0.3
        return random.uniform(low, low + 0.7, leaf.shape).astype(leaf.dtype)

    variables = jax.device_put(jax.tree_util.tree_map_with_path(fill, shapes))
    rundir.write_config(folder, settings, run.facts(arrays))
    with checkpoints.manager(folder) as orbax:
        checkpoints.save(orbax, TrainState(jnp.int32(0), variables, (), None), {"selection": 0.0})


@pytest.mark.parametrize("change", [{}, dict(pool="flatten", hidden=(6,))])
def test_the_quickstarts_network_goes_to_pytorch_and_comes_back_with_every_option(change, tmp_path):
    section = config.plain(smoke_config("digits").model) | change
    random_run(tmp_path / "a", section, dict(name="digits"))
    assert convert.to_torch(tmp_path / "a", tmp_path / "exported", n=20) <= 1e-5
    network = runpy.run_path(str(tmp_path / "exported/model.py"))["load"](tmp_path / "exported")
    with np.load(tmp_path / "exported/check.npz") as kept:
        logits, images = kept["logits"], kept["x_test"].astype(np.float32) / 255
    assert np.abs(logits).max() > 0.1
    np.testing.assert_allclose(twins.logits(network, images), logits, atol=1e-5)

    file, flags = tmp_path / "exported/model.safetensors", ["--config.data.name=digits", "--config.data.val_size=0"]
    found = convert.from_torch(file, "cnn", tmp_path / "b", overrides=flags, n=20)["network"]
    assert found["padding"] == {"is": "1 at each convolution", "from": "ibjax's export"}
    assert found["normalisation"] == {"is": "none", "from": "ibjax's export"}
    first, second = (run.load(tmp_path / folder) for folder in "ab")
    assert first.model == second.model and first.model.padding == 1
    assert trees.digest(first.variables) == trees.digest(second.variables)
    convert.from_torch(file, "cnn", tmp_path / "c", photographs=8, n=4)  # grey ones
    with pytest.raises(InputError, match=r"takes images of 1 channels, those of synthetic are \(8, 8, 3\)"):
        other = [
            "--config.data.name=synthetic",
            "--config.data.shape=(8, 8, 3)",
            "--config.data.num_classes=10",
            flags[1],
        ]
        convert.from_torch(file, "cnn", tmp_path / "d", overrides=other)


def test_images_of_another_size_than_a_flattened_map_has_are_refused(tmp_path):
    torch.manual_seed(0)
    file = saved(twins.make("small_cnn", cnn.Model(10, ((4, 4),), (8,)), (12, 12, 1)), tmp_path / "a.pt")
    convert.from_torch(file, "small_cnn", tmp_path / "a", photographs=13, n=4)  # a border that pooling drops
    with pytest.raises(InputError, match=r"takes images of \(12, 12\) pixels, 4 crops .* have \(16, 16, 1\)"):
        convert.from_torch(file, "small_cnn", tmp_path / "b", photographs=16, n=4)


def test_an_export_has_the_names_of_the_file_that_was_imported_or_those_that_are_asked_for(tmp_path):
    torch.manual_seed(0)
    network = twins.make(*PAIRS["resnet_torchvision_cifar"])
    file = saved(network, tmp_path / "a.pt")
    convert.from_torch(file, "torchvision_cifar_resnet", tmp_path / "run", photographs=32, n=4)
    convert.to_torch(tmp_path / "run", tmp_path / "same", n=4)
    assert "fc.weight" in load_file(tmp_path / "same/model.safetensors")
    convert.to_torch(tmp_path / "run", tmp_path / "other", n=4, arch="resnet")
    assert "linear.weight" in load_file(tmp_path / "other/model.safetensors")
    with pytest.raises(InputError, match=r"--arch=vgg is not what .* holds; give resnet or torchvision_cifar_resnet"):
        convert.to_torch(tmp_path / "run", tmp_path / "third", arch="vgg")


# ---- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_a_file_can_run_code(legacy, tmp_path):
    file, proof = tmp_path / "a.pt", tmp_path / "executed"
    content = {"state_dict": twin().state_dict(), "args": Bomb(proof)}
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"holds more than tensors \(\w+\.mkdir\).* refused"):
        convert.from_torch(file, "wide_resnet", tmp_path / "run", photographs=32)
    file.write_bytes(pickle.dumps(content["args"]))
    with pytest.raises(CheckpointError):
        torch_file.read(file)
    assert not proof.exists() and not (tmp_path / "run").exists()
    torch.load(saved_again(content, file), weights_only=False)
    assert proof.exists()  # the bomb is one


def saved_again(content, file):
    torch.save(content, file)
    return file


# ---- what does not fit is refused, and nothing written -----------------------------------------------------


def refused(tmp_path, state, match, arch="wide_resnet", **options):
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(InputError, match=match) as error:
        convert.from_torch(tmp_path / "a.pt", arch, tmp_path / "run", **{"photographs": 32, "n": 8, **options})
    assert not (tmp_path / "run").exists() and "\n" not in str(error.value)


def test_another_architecture_is_refused_with_the_closest_and_the_first_differing_keys(tmp_path):
    state = twin("wrn_deepmind").state_dict()
    refused(
        tmp_path,
        state,
        r"is no wide_resnet: it lacks \S+ .*and \d+ more; it has init_conv\.weight, layer\.0\.block\.0\.batchnorm_0"
        r".*; closest: --arch=dm_wide_resnet \(100 % of its names agree\)",
    )
    refused(tmp_path, state, r"--arch=dm_wrn is unknown; allowed: .*; did you mean 'dm_wide_resnet'\?", arch="dm_wrn")
    refused(tmp_path, state, r"is no vgg: .*closest: --arch=dm_wide_resnet", arch="vgg")
    raw = twin("preact_rice").state_dict()
    refused(tmp_path, raw, r"closest: --arch=preact_resnet or preact_resnet_raw", arch="resnet")


def test_the_closest_architecture_is_found_without_building_those_of_other_blocks(monkeypatch):
    built, build = [], fit.build
    monkeypatch.setattr(fit, "build", lambda name, options: built.append(name) or build(name, options))
    assert "--arch=wide_resnet (100 %" in fit.closest(twins.state(twin()))
    assert built == ["wide_resnet"]  # although the first or last layers of six others have the same names


def test_every_weight_is_filled_and_no_weight_of_the_file_is_left_over(tmp_path):
    state = twin().state_dict()
    missing = {key: value for key, value in state.items() if key != "block2.layer.0.bn2.running_var"}
    refused(tmp_path, missing, r"it lacks block2\.layer\.0\.bn2\.running_var; closest: --arch=wide_resnet \(9\d %")
    refused(tmp_path, state | {"fc2.weight": torch.zeros(3, 3)}, r"it has fc2\.weight; closest: --arch=wide_resnet")
    wide = state | {"block3.layer.0.conv2.weight": torch.zeros(64, 32, 3, 3)}
    refused(
        tmp_path, wide, r"block3\.layer\.0\.conv2\.weight is \(64, 32, 3, 3\), in wide_resnet of these sizes \(64, 64"
    )
    for key, value in (("fc.bias", torch.full((10,), torch.nan)), ("bn1.running_var", -torch.ones(64))):
        refused(tmp_path, state | {key: value}, rf"{key} holds NaN, Inf or a negative variance")


def test_another_normalisation_is_refused(data, tmp_path):
    """Where the file keeps mean and std, with its own; where it does not, by the published accuracy."""
    state, wrong = twin("wrn_deepmind").state_dict(), "--config.model.mean=(0.5, 0.4822, 0.4465)"
    match = r"keeps its normalisation, mean \(0\.4914, .*; leave --config\.model\.mean and std out"
    refused(tmp_path, state, match, arch="dm_wide_resnet", overrides=[wrong])
    refused(tmp_path, state, r"leave --no-normalisation out", arch="dm_wide_resnet", no_normalisation=True)
    state = twin().state_dict()
    for said, match in (
        (dict(mean=(0.5,)), "--mean says one half of a normalisation; give both"),
        (dict(mean=(127.5,), std=(63.0,)), "are not those of pixels from 0 to 1; divide those"),
        (dict(mean=(0.5, 0.5), std=(0.5,)), "--mean=0.5,0.5 has 2 numbers, the network takes 3 channels"),
        (dict(mean=(0.5,), std=(0.0,)), "are not those of pixels from 0 to 1"),
        (dict(mean=(0.5,), std=(0.5,), no_normalisation=True), "as well as --no-normalisation say how"),
    ):
        refused(tmp_path, state, match, **said)
    shift = ["--config.model.mean=(5.0, -5.0, 5.0)", "--config.model.std=(0.01, 0.01, 0.01)"]
    options = dict(photographs=None, n=40, clean_acc=75.0)
    refused(tmp_path, state, r"published 75\.00 %.*normalisation", overrides=[*data, *shift], **options)
    asks = r"--clean_acc=0\.1 would be 0\.1 %; is 10 % meant\? Then give --clean_acc=10$"
    refused(tmp_path, state, asks, overrides=data, **{**options, "clean_acc": 0.10})


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--torch=a.pt", "--arch is missing; allowed: cifar_xcit, cnn, convnext"),
        ("", "give --torch FILE --arch NAME (or --zoo NAME) or --card FOLDER for an import"),
        (
            "--to=x --torch=a.pt --arch=vgg",
            "give --torch FILE --arch NAME (or --zoo NAME) or --card FOLDER for an import",
        ),
        ("--to=x --key=model", "--photographs go with --torch, --config.KEY=VALUE with"),
        ("--to=x --no-normalisation", "--photographs go with --torch, --config.KEY=VALUE with"),
        ("--to=x --config.seed=1", "--photographs go with --torch, --config.KEY=VALUE with"),
        ("--torch=a.pt --arch=vgg --mean=a,b --std=1", "--mean=a,b are no numbers; give them as 0.4914,"),
        ("--torch=a.pt --arch=vgg --checkpoint=last", "--checkpoint with --to"),
        ("--torch=a.pt --arch=vgg --n=0", "--n=0 is not allowed"),
        ("--to=x --photographs=0", "--photographs go with --torch"),
        ("--to=card --n=9", "--n=9 images are compared with PyTorch; a card needs none, leave it out"),
        ("--card=x --n=9", "--n=9 images are compared with PyTorch; a card needs none, leave it out"),
        ("--torch=a.pt --arch=vgg --nn=0", "'--nn' is no option"),
        ("--torch=a.pt --arch=vgg", "--torch=a.pt is no file"),
        ("--to=x", "absent holds no run"),
    ],
)
def test_a_command_line_that_means_nothing_ends_in_one_line(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["convert", "--workdir=absent", *flags.split()])
    with pytest.raises(SystemExit) as ended:
        convert.main()
    text = capsys.readouterr().err
    assert ended.value.code == 2 and said in text and text.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_an_architecture_the_file_says_which_it_may_be(imported, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["convert", f"--torch={imported[0]}", f"--workdir={tmp_path / 'run'}"])
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    with pytest.raises(SystemExit):
        convert.main()
    assert "--arch is missing; allowed: cifar_xcit, cnn, " in (text := capsys.readouterr().err)
    assert text.endswith("; closest: --arch=wide_resnet (100 % of its names agree)\n")


def test_options_that_make_another_architecture_are_refused(tmp_path):
    refused(tmp_path, twin().state_dict(), "another network than --arch", overrides=["--config.model.variant=deepmind"])
    refused(tmp_path, twin().state_dict(), "another network than --arch", overrides=["--config.model.name=resnet"])


def test_another_number_of_classes_is_refused(data, tmp_path):
    torch.manual_seed(0)
    network = twins.make("wide_resnet", wide_resnet.Model(7, 10, 1))
    refused(tmp_path, network.state_dict(), r"has 7 classes, crops has 10", photographs=None, overrides=data)


@pytest.mark.parametrize("name", ["wrn_deepmind", "resnet_bottleneck"])
def test_the_gate_notices_a_change_of_any_single_weight(images, name):
    """Any leaf, changed by a little, moves the logits beyond the tolerance."""
    x = images[:8].astype(np.float32) / 255
    arch, model = PAIRS[name]
    network = twin(name)
    variables = architectures.to_ours(arch, model, twins.state(network))
    leaves, structure = jax.tree.flatten(variables)
    expected, apply = twins.logits(network, x), jax.jit(model.apply)
    for i, leaf in enumerate(leaves):
        changed = jax.tree.unflatten(structure, [*leaves[:i], np.asarray(leaf) * 1.2 + 0.1, *leaves[i + 1 :]])
        with pytest.raises(CheckpointError, match="nothing is written"):
            gate.compare(np.asarray(apply(changed, x)[0]), expected, "8 images", "")
    with pytest.raises(CheckpointError, match="nothing is written"):
        gate.compare(np.full((1, 2), np.nan), np.zeros((1, 2)), "1 image", "")


def test_the_usual_normalisation_holds_where_a_file_keeps_none(tmp_path):
    torch.manual_seed(0)
    state = twins.make("dm_wide_resnet", wide_resnet.Model(10, 10, 1, variant="deepmind", **DM)).state_dict()
    torch.save({key: value for key, value in state.items() if key not in ("mean", "std")}, tmp_path / "a.pt")
    convert.from_torch(tmp_path / "a.pt", "dm_wide_resnet", tmp_path / "run", photographs=32, n=8)
    model = run.load(tmp_path / "run").model
    assert (model.mean, model.std, model.activation) == (DM["mean"], DM["std"], "silu")
