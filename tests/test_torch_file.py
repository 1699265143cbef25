"""Weight files that are damaged, cut or not the published ones: one line, and never other weights."""

import zipfile

import numpy as np
import pytest

from ibjax.errors import CheckpointError, InputError
from ibjax.pytorch import exports, imports, published, torch_file
from ibjax.pytorch.normalisation import Said

torch = pytest.importorskip("torch", reason="conversion needs PyTorch (pip install 'ibjax[torch]')")
pytest.importorskip("safetensors", reason="conversion needs safetensors (pip install 'ibjax[torch]')")
import torch_twins as twins  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from ibjax.models import resnet  # noqa: E402
from ibjax.pytorch import twins as definitions  # noqa: E402

MODEL, SHAPE = resnet.Model(10, width=2, blocks=(1, 1)), (32, 32, 3)
FLIPS = 80


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return twins.make("resnet", MODEL)


def pt(network, file):
    torch.save({"state_dict": network.state_dict(), "epoch": 3}, file)


def legacy(network, file):
    torch.save(network.state_dict(), file, _use_new_zipfile_serialization=False)


def safetensors(network, file):
    save_file({name: value for name, value in network.state_dict().items() if value.is_floating_point()}, file)


def exported(network, file):
    """As our export writes it."""
    weights = {name: value.numpy() for name, value in network.state_dict().items() if value.is_floating_point()}
    twin = definitions.make("resnet", MODEL, SHAPE, weights)
    file.write_bytes(exports._safetensors(file, twin, "resnet", MODEL, SHAPE))


def outcome(file, expected, sha256=None):
    """refused (in one line), the same weights, or other weights."""
    try:
        state = imports.read(file, "resnet", Said(sha256=sha256)).state
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) > 20
        return "refused"
    same = state.keys() == expected.keys() and all(np.array_equal(state[name], expected[name]) for name in expected)
    return "same" if same else "other"


def damaged(file, kind):
    """Versions of a file, each with one bit flipped, or each cut somewhere."""
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    for _ in range(FLIPS):
        if kind == "cut":
            yield whole[: rng.integers(len(whole))]
        else:
            content = bytearray(whole)
            content[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
            yield bytes(content)


@pytest.mark.parametrize("kind", ["flip", "cut"])
@pytest.mark.parametrize("write", [pt, exported, safetensors, legacy])
def test_no_damaged_file_imports_as_another_network_and_none_ends_in_a_traceback(write, kind, network, tmp_path):
    """torch.save's zip has checksums, our exports a digest; the others are judged by --sha256 alone."""
    file = tmp_path / ("a.safetensors" if write in (exported, safetensors) else "a.pt")
    write(network, file)
    expected, digest = twins.state(network), imports.read(file, "resnet").sha256
    found = []
    for content in damaged(file, kind):
        file.write_bytes(content)
        found.append(outcome(file, expected))
        assert outcome(file, expected, digest) == "refused"
    if write in (pt, exported):
        assert "other" not in found and "refused" in found  # what is between members and read by nobody may change
    if kind == "cut":
        assert set(found) == {"refused"}


def test_every_flipped_bit_of_the_weights_in_a_pt_file_is_named(network, tmp_path):
    """Flips within the members: those that torch.load alone would take for weights."""
    file = tmp_path / "a.pt"
    pt(network, file)
    with zipfile.ZipFile(file) as archive:
        members = [member for member in archive.infolist() if "/data/" in member.filename]
        places = [archive.open(member)._orig_compress_start for member in members]  # pyright: ignore
    whole = file.read_bytes()
    for member, place in zip(members, places, strict=True):
        content = bytearray(whole)
        content[place + member.file_size // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"of its \d+ members {member.filename} has a wrong checksum"):
            torch_file.read(file)


def test_a_file_that_was_saved_without_checksums_is_read(network, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        pt(network, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert outcome(tmp_path / "a.pt", twins.state(network)) == "same"


def test_the_digest_is_compared_with_the_callers_and_with_the_published_one(network, tmp_path, monkeypatch):
    file = tmp_path / "wrn.pt"
    pt(network, file)
    digest = torch_file.read(file).sha256
    assert torch_file.read(file).compared == "compared with none"
    assert torch_file.read(file, digest[:16].upper()).compared == "agrees with --sha256"
    with pytest.raises(CheckpointError, match=f"has the SHA-256 {digest}, wanted is {'0' * 64}: download it again"):
        torch_file.read(file, "0" * 64)
    with pytest.raises(InputError, match="--sha256=xyz is no SHA-256; give its 64 hexadecimal digits"):
        torch_file.read(file, "xyz")

    monkeypatch.setitem(published.digests(), "wrn.pt", digest)
    assert torch_file.read(file).compared == "agrees with the published one"
    monkeypatch.setitem(published.digests(), "wrn.pt", "1" * 64)
    with pytest.raises(CheckpointError, match=f"the published one is {'1' * 64}.*if it is another.*--sha256={digest}"):
        torch_file.read(file)
    assert torch_file.read(file, digest).compared == "agrees with --sha256"

    hub = file.rename(tmp_path / f"resnet18-{digest[:8]}.pth")
    assert torch_file.read(hub).compared == "agrees with the one in its name"
    hub = hub.rename(tmp_path / "resnet18-f37072fd.pth")
    with pytest.raises(CheckpointError, match="the one in its name is f37072fd: download it again"):
        torch_file.read(hub)
    assert torch_file.read(hub.rename(tmp_path / "run-20210528.pth")).compared == "compared with none"  # a date


@pytest.mark.parametrize(
    "content, said",
    [
        ({"a.weight": torch.sparse_coo_tensor([[0], [0]], [1.0], (2, 2), check_invariants=True)}, "is no plain tensor"),
        ({"conv1.weight": torch.zeros(2, 3, 3, 3, device="meta")}, "is no plain tensor"),
        ([1, 2], r"holds no state dict; it has list"),
        ({}, r"holds no state dict; it has nothing"),
        ({"loss": [1.0]}, r"holds no state dict; it has loss"),
        (torch.zeros(3), r"holds no state dict; it has Tensor"),
    ],
)
def test_what_is_no_state_dict_of_plain_tensors_ends_in_one_line(content, said, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError, match=said) as error:
        imports.read(tmp_path / "a.pt", "resnet")
    assert "\n" not in str(error.value)


def test_a_version_of_torch_whose_loading_may_run_code_loads_nothing(network, tmp_path, monkeypatch):
    pt(network, tmp_path / "a.pt")
    safetensors(network, tmp_path / "a.safetensors")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(InputError, match=r"torch 2\.9\.1\+cpu may run code .*; pip install 'torch>=2\.10', or give "):
        torch_file.read(tmp_path / "a.pt")
    assert torch_file.read(tmp_path / "a.safetensors").nodes  # torch.load has no part in it


def test_dictionaries_within_themselves_are_read_once_and_too_deep_ones_refused(network, tmp_path, monkeypatch):
    content = {"state_dict": network.state_dict()}
    content["self"] = [("again", content)]
    torch.save(content, tmp_path / "a.pt")
    assert [node.key for node in torch_file.read(tmp_path / "a.pt").nodes] == ["state_dict"]
    for _ in range(5000):
        content = {"inner": content}
    monkeypatch.setattr(torch_file, "_load", lambda *_: content)
    with pytest.raises(CheckpointError, match=r"a\.pt nests its dictionaries too deep; save network\.state_dict\(\)"):
        torch_file.read(tmp_path / "a.pt")


def test_an_archive_that_was_compressed_again_is_refused_before_it_is_inflated(network, tmp_path):
    pt(network, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as stored,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    with pytest.raises(CheckpointError, match=r"b\.pt is compressed, as torch\.save writes none"):
        torch_file.read(tmp_path / "b.pt")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(InputError, match=r"is a folder; give a \.pt"):
        torch_file.read(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="is a folder of ibjax, which needs no import"):
        torch_file.read(tmp_path)
    with pytest.raises(InputError, match=r"is no file; give a \.pt"):
        torch_file.read(tmp_path / "absent.pt")
