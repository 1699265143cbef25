"""The notebooks run, the quickstart's on a finished workdir, and the committed ones show what they should."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from ibjax.attacks import geometry

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "quickstart.ipynb"
PICTURES = {
    "02_ibd": 2,
    "03_singular_values": 3,
    "04_information_plane": 2,
    "05_own_network": 1,
}  # in the notebooks that train what they show
ALSO = {"05_own_network": ["equinox"]}  # what they install beside ibjax


def execute(monkeypatch, workdir, file=NOTEBOOK, images=None):
    """The notebook's cells after a run in a new kernel, which is on the CPU wherever the tests are.

    With `images`, it takes no more test images than that.
    """
    monkeypatch.setenv("IBJAX_WORKDIR" if file == NOTEBOOK else "IBJAX_RUNS", str(workdir))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = nbformat.read(file, as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
            if images is not None:
                cell.source = re.sub(
                    r"run\.test\((\d+)\)", lambda n: f"run.test({min(int(n[1]), images)})", cell.source
                )
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(file.parent)}}).execute()
    return notebook.cells


def outputs(cells):
    return [output for cell in cells for output in cell.get("outputs", [])]


def pictures(cells):
    return [output for output in outputs(cells) if "image/png" in output.get("data", {})]


def printed(cells):
    return "".join(output["text"] for output in outputs(cells) if output["output_type"] == "stream")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of the Jupyter client are not ours
def test_the_notebook_runs_and_draws(digits_run, monkeypatch):
    cells = execute(monkeypatch, digits_run, images=16)
    assert not [output for output in outputs(cells) if output["output_type"] == "error"]
    assert len(pictures(cells)) == 2
    text = printed(cells)
    assert len(re.findall(r"^ +\d+ +\d +\d +\d  ", text, re.MULTILINE)) == 10
    eps = json.loads((digits_run / "config.json").read_text())["config"]["evaluate"]["eps"]
    assert 0 < float(re.search(r"largest perturbation: ([\d.]+)", text)[1]) <= geometry.fraction(eps) + 1e-6
    curves = re.findall(r"^(IBD student|undefended)((?: +[\d.]+){7})$", text, re.MULTILINE)
    assert [name for name, _ in curves] == ["IBD student", "undefended"]
    assert all(0 <= float(value) <= 100 for _, values in curves for value in values.split())
    clean, *after = re.findall(r"^(clean|apgd-ce|apgd-t|fab-t|square) +([\d.]+)", text, re.MULTILINE)
    assert [name for name, _ in after] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    accuracies = [float(value) for _, value in (clean, *after)]
    assert accuracies == sorted(accuracies, reverse=True)
    assert re.search(r"^nearest mean +given / unknown +16 ", text, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_without_a_run_it_names_the_command_that_makes_one(tmp_path, monkeypatch):
    with pytest.raises(CellExecutionError, match=r"ibjax train --config=digits --workdir="):
        execute(monkeypatch, tmp_path)


def test_the_committed_notebook_shows_its_figures_and_no_path():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert len(pictures(cells)) == 2
    assert NOTEBOOK.stat().st_size < 300_000
    shown = printed(cells)
    assert "wrong already" in shown or "fooled" in shown
    assert not re.search(r"(^|[\s'\"=])/\w+/", shown)
    assert "WARNING" not in shown and "Traceback" not in shown


def colab(monkeypatch, install, said=None, file=NOTEBOOK):
    """The commands of a notebook's first cell on Colab, of which pip says `said` and fails; none is run."""
    commands = []

    def run(command, **options):
        commands.append(command[2:])
        return subprocess.CompletedProcess(command, int(said is not None), stderr=said or "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("IBJAX_WORKDIR", "")
    first = next(cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code")
    assert 'INSTALL = "ibjax"' in first.source
    exec(first.source.replace('INSTALL = "ibjax"', f"INSTALL = {install!r}"), {})
    return commands


def test_only_colab_installs_what_one_variable_says(monkeypatch):
    assert colab(monkeypatch, "ibjax") == []
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    pip, train = colab(monkeypatch, "ibjax-0.1.0-py3-none-any.whl")
    assert pip == ["pip", "install", "-q", "ibjax-0.1.0-py3-none-any.whl"]
    assert train == ["ibjax", "train", "--config=digits", "--workdir=runs/digits"]
    assert os.environ["IBJAX_WORKDIR"] == "runs/digits"


@pytest.mark.parametrize("name", PICTURES)
def test_the_notebooks_that_train_install_on_colab_alone(monkeypatch, name):
    file = NOTEBOOK.with_name(f"{name}.ipynb")
    assert colab(monkeypatch, "ibjax", file=file) == []
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    assert colab(monkeypatch, "ibjax", file=file) == [["pip", "install", "-q", "ibjax", *ALSO.get(name, [])]]


@pytest.mark.parametrize("name", ["quickstart", *PICTURES])
def test_on_colab_a_wrong_install_stops_the_notebook_with_one_line(monkeypatch, name):
    file = NOTEBOOK.with_name(f"{name}.ipynb")
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    with pytest.raises(
        SystemExit, match=r"^INSTALL is empty; give the name on PyPI, a wheel, or git\+https://ADDRESS$"
    ):
        colab(monkeypatch, " ", file=file)
    packages = " ".join(["git.", *ALSO.get(name, [])])
    with pytest.raises(SystemExit, match=f"^pip install -q {packages} failed: ERROR: Invalid requirement: 'git.'$"):
        colab(monkeypatch, "git+", "a warning\nERROR: Invalid requirement: 'git+'\n", file=file)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", PICTURES)
def test_the_notebooks_that_train_run_and_draw(name, tmp_path, monkeypatch):
    for library in ALSO.get(name, []):
        pytest.importorskip(library, reason="pip install 'ibjax[wrap]'")
    cells = execute(monkeypatch, tmp_path, NOTEBOOK.with_name(f"{name}.ipynb"))
    assert not [output for output in outputs(cells) if output["output_type"] == "error"]
    assert len(pictures(cells)) == PICTURES[name]
    assert (tmp_path / "notebooks" / name).is_dir() or name == "05_own_network"  # which keeps nothing
    values = [float(value) for value in re.findall(r"(\d+\.\d+) %", printed(cells))]
    assert all(0 <= value <= 100 for value in values)
    if name == "02_ibd":
        assert "rows sum to 1.0000" in printed(cells)
    if name == "03_singular_values":  # PGD fools the undefended network, and less often the other
        undefended, trades = (
            [float(value) for value in re.findall(rf"^{network} .*image +([\d.]+) %", printed(cells), re.MULTILINE)]
            for network in ("undefended", "TRADES")
        )
        assert undefended[0] < 20 < trades[0]


@pytest.mark.parametrize("name", PICTURES)
def test_the_committed_notebooks_show_their_figures_and_no_path(name):
    file = NOTEBOOK.with_name(f"{name}.ipynb")
    cells = nbformat.read(file, as_version=4).cells
    assert len(pictures(cells)) == PICTURES[name] and file.stat().st_size < 500_000
    assert not re.search(r"(^|[\s'\"=])/\w+/", printed(cells))
    assert "WARNING" not in printed(cells) and "Traceback" not in printed(cells)
