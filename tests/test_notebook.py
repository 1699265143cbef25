"""The notebooks run, the quickstart's on a finished workdir, and the committed ones show what they should."""

import json
import re
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
}  # in the notebooks that train what they show


def execute(monkeypatch, workdir, file=NOTEBOOK):
    """The notebook's cells after a run in a new kernel, which is on the CPU wherever the tests are."""
    monkeypatch.setenv("IBJAX_WORKDIR" if file == NOTEBOOK else "IBJAX_RUNS", str(workdir))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = nbformat.read(file, as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(file.parent)}}).execute()
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
    cells = execute(monkeypatch, digits_run)
    assert not [output for output in outputs(cells) if output["output_type"] == "error"]
    assert len(pictures(cells)) == 2
    text = printed(cells)
    assert len(re.findall(r"^ +\d+ +\d +\d +\d  ", text, re.MULTILINE)) == 10
    eps = json.loads((digits_run / "config.json").read_text())["config"]["evaluate"]["eps"]
    assert 0 < float(re.search(r"largest perturbation: ([\d.]+)", text)[1]) <= geometry.fraction(eps) + 1e-6
    curves = re.findall(r"^(IBD student|undefended)((?: +[\d.]+){7})$", text, re.MULTILINE)
    assert [name for name, _ in curves] == ["IBD student", "undefended"]
    assert all(0 <= float(value) <= 100 for _, values in curves for value in values.split())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_without_a_run_it_names_the_command_that_makes_one(tmp_path, monkeypatch):
    with pytest.raises(CellExecutionError, match=r"python -m ibjax\.main --config=configs/digits\.py --workdir="):
        execute(monkeypatch, tmp_path)


def test_the_committed_notebook_shows_its_figures_and_no_path():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert len(pictures(cells)) == 2
    assert NOTEBOOK.stat().st_size < 300_000
    shown = printed(cells)
    assert "wrong already" in shown or "fooled" in shown
    assert not re.search(r"(^|[\s'\"=])/\w+/", shown)
    assert "WARNING" not in shown and "Traceback" not in shown


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", PICTURES)
def test_the_notebooks_that_train_run_and_draw(name, tmp_path, monkeypatch):
    cells = execute(monkeypatch, tmp_path, NOTEBOOK.with_name(f"{name}.ipynb"))
    assert not [output for output in outputs(cells) if output["output_type"] == "error"]
    assert len(pictures(cells)) == PICTURES[name]
    assert (tmp_path / "notebooks" / name).is_dir()
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


@pytest.mark.parametrize("name", ["quickstart", *PICTURES])
def test_only_colab_installs(name):
    file = NOTEBOOK.with_name(f"{name}.ipynb")
    first = next(cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code")
    before, _, guarded = first.source.partition('if "google.colab" in sys.modules:\n')
    assert "pip" not in before and "%pip install" in guarded
    assert all(line.startswith("    ") for line in guarded.splitlines())
