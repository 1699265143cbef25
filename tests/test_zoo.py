"""The zoo: its table, the page that is made of it, and files that are, or are not, the named network."""

import functools
import hashlib
import http.server
import importlib.util
import sys
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ibjax import convert, files, zoo
from ibjax.attacks import geometry
from ibjax.errors import CheckpointError, InputError
from ibjax.pytorch import published, verified
from ibjax.pytorch.architectures import ARCHITECTURES

DOCS = Path(__file__).parent.parent / "docs"
sys.path.insert(0, str(DOCS))
SPEC = importlib.util.spec_from_file_location("docs_zoo", DOCS / "zoo.py")
page = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(page)
OTHER = importlib.util.spec_from_file_location("docs_robustbench", DOCS / "robustbench.py")
robustbench = importlib.util.module_from_spec(OTHER)
OTHER.loader.exec_module(robustbench)


def test_the_page_is_current():
    """Else: python docs/zoo.py."""
    assert (DOCS / "zoo.md").read_text(encoding="utf-8") == page.page()


def test_the_page_of_all_leaderboards_is_current_and_complete():
    """Else: python docs/robustbench.py. Every entry is covered or says why not."""
    assert (DOCS / "robustbench.md").read_text(encoding="utf-8") == robustbench.page()
    rows = published.entries()
    assert len(rows) - len(zoo.names("mnist")) == 236  # entries of model_info at commit 78fcc9e that can be read
    for path, row in rows.items():
        assert bool(row.uncovered) == (not row.arch) == (path not in published.table()), path
        assert row.data == "mnist" or row.robust is not None, path
        assert row.external is None or row.external < row.autoattack, path


def test_every_row_says_what_its_file_needs():
    rows = published.table()
    assert len(rows) == len({(row.data, row.norm, row.name) for row in rows.values()}) > 100
    for path, row in rows.items():
        assert row.arch in ARCHITECTURES or row.arch in verified.NETWORKS, path
        assert (row.mean is None) == (row.std is None)
        numbers = [value for value in (row.clean, row.autoattack, row.pgd, row.exact) if value is not None]
        assert numbers == sorted(numbers, key=lambda value: -value) or row.pgd, path  # no attack helps
        if row.norm != "corruptions":
            assert 0 < geometry.fraction(row.eps) < 1 and (row.autoattack is None) == (row.exact is not None)
            assert row.data == "mnist" or row.depth, path
        else:
            assert row.autoattack is None, path  # that board has none
        if row.sha256:
            assert published.expected(row.file) == (row.sha256, "the published one") and len(row.sha256) == 64
    known = published.find("Gowal2020Uncovering_34_20")
    assert (known.clean, known.autoattack, known.arch, known.width) == (85.64, 56.86, "dm_wide_resnet", 20)
    assert published.find("cifar10/l2/Rice2020Overfitting").arch == "preact_resnet"


def test_unknown_and_ambiguous_names_say_what_there_is():
    for name, words in (
        ("Engstrom2019Robustness", "give cifar10/linf/Engstrom2019Robustness or cifar10/l2/Engstrom2019"),
        ("Carmon2019Unlabelled", "did you mean 'Carmon2019Unlabeled'"),
        ("Ding2020", "no published network of the zoo; allowed: cifar10/corruptions/…"),
        ("Ding2020MMA", "'Ding2020MMA' cannot be imported: WideResNet-28-4: normalises each image"),
    ):
        with pytest.raises(InputError, match=words):
            zoo.find(name)
    with pytest.raises(InputError, match="data='cifar' is unknown to the zoo; allowed: cifar10, cifar100"):
        zoo.names("cifar")
    assert zoo.find("Standard_R50").norm == "linf"  # one file on two leaderboards
    assert zoo.find("Standard").data == "cifar10"
    with pytest.raises(InputError, match=r"give cifar10/linf/Deb.* or cifar100/linf/Deb.* or imagenet/linf/Deb"):
        zoo.find("Debenedetti2022Light_XCiT-S12")  # three files of one release
    assert zoo.names("mnist")[-1] == "mnist/linf/WK17a"
    with pytest.raises(InputError, match=r"x\.pt is no file; download that of cifar10/linf/Carmon2019Unlabeled.*http"):
        zoo.load("Carmon2019Unlabeled", "x.pt")


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """(a file of a WRN-10-1, its network in PyTorch, which normalises, its row): "Tiny" of the zoo."""
    pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    import torch
    import torch_twins
    from test_twins import NORM, PAIRS

    torch.manual_seed(0)
    arch, model = PAIRS["wrn_trades"]
    twin = torch_twins.make(arch, model.clone(**NORM))
    weights = {name: value for name, value in twin.state_dict().items() if name not in ("mean", "std")}
    torch.save(weights, file := tmp_path / "Tiny.pt")
    row = published.find("Carmon2019Unlabeled")
    row = row._replace(name="Tiny", file="Tiny.pt", depth=10, width=1, sha256=None, **NORM)
    monkeypatch.setitem(published.table(), row.path, row)
    return file, twin, row


def test_the_network_of_a_file_has_pytorchs_logits(tiny):
    import torch_twins

    file, twin, row = tiny
    network = zoo.load("Tiny", file)
    x = np.random.default_rng(0).uniform(size=(4, 32, 32, 3)).astype(np.float32)
    np.testing.assert_allclose(network.logits_fn(jnp.asarray(x)), torch_twins.logits(twin, x), atol=1e-4, rtol=1e-4)
    assert network.says["network"] == row.path and len(network.says["sha256"]) == 64


def test_another_network_than_that_of_the_name_is_refused(tiny, monkeypatch):
    import torch

    file, twin, row = tiny
    torch.save(twin.state_dict(), file)  # with its normalisation
    for changes, words in (
        (dict(depth=16), "has depth 10, cifar10/linf/Tiny has 16"),
        (dict(width=2), "has width 1, cifar10/linf/Tiny has 2"),
        (dict(data="cifar100"), "has classes 10, cifar100/linf/Tiny has 100"),
        (dict(mean=None, std=None), "keeps mean .*, cifar10/linf/Tiny has None and None: another network"),
        (dict(mean=(0.5, 0.5, 0.5)), "keeps mean .*: another network"),
        (dict(sha256="0" * 64), "SHA-256"),
        (dict(arch="resnet"), "is no resnet"),
    ):
        changed = row._replace(**changes)
        monkeypatch.setitem(published.table(), changed.path, changed)
        with pytest.raises((CheckpointError, InputError), match=words) as caught:
            zoo.load(changed.path, file)
        assert "\n" not in str(caught.value)


def test_a_network_of_other_blocks_than_those_of_the_published_depth_is_refused(tiny):
    """As ResNet-101, which is our depth 50 with blocks (3, 4, 23, 3)."""
    import torch
    import torch_twins
    from test_twins import PAIRS

    file, _, row = tiny
    arch, model = PAIRS["resnet_bottleneck"]
    torch.save(torch_twins.make(arch, model).state_dict(), file)
    row = row._replace(arch=arch, depth=50, width=None, mean=None, std=None)
    with pytest.raises(CheckpointError, match=r"has depth \(1, 1\), cifar10/linf/Tiny has 50: it is another network"):
        zoo.imports.read(file, arch, zoo.said(row))


def test_a_url_is_downloaded_once(tiny, tmp_path, monkeypatch):
    file, _, row = tiny
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, *given):
            asked.append(self.path)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    serve = functools.partial(Handler, directory=file.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            address = f"http://127.0.0.1:{server.server_address[1]}/Tiny.pt"
            found = [zoo._file(row, address) for _ in range(2)]
        finally:
            server.shutdown()
    assert asked == ["/Tiny.pt"] and found[0] == found[1]
    assert found[0].read_bytes() == file.read_bytes() and (tmp_path / "cache") in found[0].parents


def test_what_was_downloaded_and_is_not_the_network_is_not_kept(tiny, tmp_path, monkeypatch):
    """Else it would be taken for the network whatever URL is given next."""
    file, _, row = tiny
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept = tmp_path / "cache/ibjax/zoo" / row.path / row.file
    kept.parent.mkdir(parents=True)
    kept.write_text("<!DOCTYPE html><html>the file is too large to be scanned")
    with pytest.raises(CheckpointError, match="a web page"):
        zoo.load("Tiny", "http://localhost/Tiny.pt")
    assert not kept.exists()
    file.write_text(page := "<!DOCTYPE html>")
    with pytest.raises(CheckpointError, match="a web page"):
        zoo.load("Tiny", file)
    assert file.read_text() == page  # the caller's own file


def test_convert_takes_architecture_and_normalisation_from_the_zoo(tiny, tmp_path, monkeypatch, capsys):
    file, _, row = tiny

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["convert", f"--torch={file}", f"--workdir={tmp_path / 'run'}", *words])
        with pytest.raises(SystemExit) as ended:
            convert.main()
        return ended.value.code

    assert command("--zoo=Tiny", "--arch=wide_resnet") == 2
    assert command("--zoo=TRADES") == 2
    monkeypatch.setitem(published.table(), row.path, row._replace(sha256="1" * 64))
    assert command("--zoo=Tiny", f"--sha256={hashlib.sha256(file.read_bytes()).hexdigest()}") == 2
    assert "is not that of --zoo=Tiny, 1111" in capsys.readouterr().err
    monkeypatch.setitem(published.table(), row.path, row)
    assert not (tmp_path / "run").exists()
    assert command("--zoo=Tiny", "--photographs=32", "--n=4") == 0
    config = files.read_json(tmp_path / "run/config.json")
    assert config["config"]["model"]["mean"] == list(row.mean)
    said = config["data"]["imported"]["network"]
    assert said["normalisation"]["from"] == "the zoo" and said["architecture"]["is"] == "wide_resnet"
