"""benchmarks/published.py: its networks are PyTorch's of the same files, and what cannot be is a fault."""

import hashlib
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle is PyTorch (pip install 'ibjax[torch]')")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import published  # noqa: E402

from ibjax import files  # noqa: E402
from ibjax.errors import InputError  # noqa: E402

nn = torch.nn


class SmallCNN(nn.Module):
    """As TRADES' file names its layers."""

    def __init__(self):
        super().__init__()
        sizes = (1, 32, 32, 64, 64)
        self.feature_extractor = nn.ModuleDict({f"conv{i}": nn.Conv2d(sizes[i - 1], sizes[i], 3) for i in (1, 2, 3, 4)})
        self.classifier = nn.ModuleDict(
            {"fc1": nn.Linear(1024, 200), "fc2": nn.Linear(200, 200), "fc3": nn.Linear(200, 10)}
        )

    def forward(self, x):
        for i in (1, 2, 3, 4):
            x = torch.relu(self.feature_extractor[f"conv{i}"](x))
            x = nn.functional.max_pool2d(x, 2) if i % 2 == 0 else x
        x = x.flatten(1)
        for i in (1, 2):
            x = torch.relu(self.classifier[f"fc{i}"](x))
        return self.classifier["fc3"](x)


def made(name):
    """PyTorch's network of a name, with random weights."""
    torch.manual_seed(0)
    if name == "TRADES":
        return SmallCNN()
    if name == "WK17a":
        convs = nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten()
        return nn.Sequential(*convs, nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10))
    hidden = nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU()
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(100, 10))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All networks with random weights in place of the published ones, and data of MNIST's shape."""
    folder = tmp_path_factory.mktemp("published")
    rng = np.random.default_rng(0)
    for name, about in published.NETWORKS.items():
        file = folder / name / about.file
        file.parent.mkdir()
        torch.save(made(name).state_dict(), file)
    x, y = rng.integers(0, 256, (10_000, 28, 28), dtype=np.uint8), rng.integers(0, 10, 10_000, dtype=np.uint8)
    np.savez(folder / "mnist.npz", x_test=x, y_test=y)
    return folder


def expected(folder, name):
    """A network's row with the digest of the file that stands in for the published one."""
    about = published.NETWORKS[name]
    return about._replace(sha256=hashlib.sha256((folder / name / about.file).read_bytes()).hexdigest())


@pytest.mark.parametrize("name", ["WK17a", "LPD_MLP_B_0.3", "TRADES"])
def test_each_network_has_the_logits_of_pytorch(folder, name):
    network = published.load(folder, expected(folder, name))
    x, _ = published.images(folder / "mnist.npz", 5)
    with torch.no_grad():
        wanted = made(name)(torch.tensor(x.transpose(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(jax.jit(network)(x), wanted, atol=1e-5)


def test_the_table_has_what_is_published():
    exact = {name: about.exact for name, about in published.NETWORKS.items() if about.exact}
    errors = {
        "WK17a": 4.38,
        "LPD_MLP_B_0.1": 14.45,
        "LPD_MLP_B_0.2": 36.33,
        "LPD_MLP_B_0.3": 59.85,
        "LPD_MLP_B_0.4": 83.17,
    }
    assert exact == pytest.approx({name: 100 - error for name, error in errors.items()})
    for about in published.NETWORKS.values():
        assert about.clean > about.pgd > (about.exact or about.autoattack)


def test_numbers_below_the_exact_one_or_a_point_above_are_faults():
    about = published.NETWORKS["LPD_MLP_B_0.1"]
    fine = {"clean": 95.91, "pgd-40": 86.61, "autoattack": 85.70}
    assert published.faults({"ours": fine}, about) == []
    for attack, accuracy, words in (
        ("clean", 95.8, "clean accuracy is 95.80"),
        ("pgd-40", 85.5, "pgd-40 leaves 85.50, exactly 85.55"),
        ("autoattack", 85.5, "autoattack leaves 85.50"),
        ("autoattack", 86.6, "autoattack leaves 86.60"),
    ):
        (fault,) = published.faults({"ours": {**fine, attack: accuracy}}, about)
        assert words in fault


@pytest.mark.parametrize("name", list(published.NETWORKS))
def test_another_file_of_a_published_name_is_refused(folder, name):
    with pytest.raises(InputError, match="SHA-256"):
        published.load(folder, published.NETWORKS[name])


def test_the_command_line_keeps_records_of_other_networks(folder, tmp_path, monkeypatch):
    out = tmp_path / "found.json"
    for name, n in (("LPD_MLP_B_0.2", 4), ("LPD_MLP_B_0.1", 5)):
        monkeypatch.setitem(published.NETWORKS, name, expected(folder, name))
        arguments = [f"--folder={folder}", f"--data={folder / 'mnist.npz'}", f"--only={name}", f"--n={n}"]
        arguments += [f"--out={out}"]
        monkeypatch.setattr(sys, "argv", ["published.py", *arguments, "--attacks=clean,pgd-40"])
        monkeypatch.setattr(published.cluster, "keep_compiled", lambda: None)
        published.main()  # exits where a number contradicts a published one
    records = files.read_json(out)["records"]
    assert [(record["network"], record["n"]) for record in records] == [("LPD_MLP_B_0.1", 5), ("LPD_MLP_B_0.2", 4)]
    for record in records:
        assert record["ours"].keys() == {"clean", "pgd-40"} and record["ours"]["pgd-40"] <= record["ours"]["clean"]
    assert "85.55" in out.with_suffix(".md").read_text()


def test_what_is_not_there_is_named(folder, tmp_path):
    with pytest.raises(InputError, match=r"has no WK17a_linf0\.1\.pth"):
        published.load(tmp_path, published.NETWORKS["WK17a"])
    np.savez(tmp_path / "small.npz", x_test=np.zeros((5, 28, 28), np.uint8), y_test=np.zeros(5, np.uint8))
    with pytest.raises(InputError, match="is not MNIST"):
        published.images(tmp_path / "small.npz", None)
    with pytest.raises(InputError, match="--n=0 is not allowed"):
        published.images(folder / "mnist.npz", 0)
