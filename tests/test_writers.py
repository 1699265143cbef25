"""Writers: TensorBoard, Weights & Biases and MLflow, or fakes of them where they are not installed."""

import importlib.machinery
import json
import sys
import threading
import types
from pathlib import Path

import pytest
from conftest import clean_recipe

from ibjax import calls, config
from ibjax.errors import CodeError, InputError
from ibjax.runs import checkpoint, metrics, recipe_files, writers
from ibjax.training import jobs

ROWS = [
    ("train", 2, {"steps": 2, "loss": 0.5, "clean_acc": 40.0}),
    ("val", 2, {"robust_acc": 30.0}),
    ("diverged", 3, {"reason": "loss became NaN"}),
]


def started(folder, step=0):
    return writers.Started(folder, "student", {"seed": 3, "model": {"name": "cnn", "widths": (1, 2)}}, step)


def logged(folder, names, step=0, rows=ROWS):
    """Writes rows as training does."""
    log = metrics.MetricsLog(folder, step, writers.start(names, started(folder, step)))
    for kind, at, values in rows:
        log.write(kind, at, **values)
    log.close()
    return [row["kind"] for row in metrics.read(folder / "metrics.jsonl")]


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "ibjax.runs.writers"]


def module(monkeypatch, name, **content):
    """Installs a fake module."""
    made = types.ModuleType(name)
    made.__dict__.update(content, __spec__=importlib.machinery.ModuleSpec(name, None))
    monkeypatch.setitem(sys.modules, name, made)


# ---- what a failing writer does ----------------------------------------------------------------------------


class Faulty:
    """Fails where it is told to."""

    def __init__(self, run, where, error):
        self.where, self.error, self.calls = where, error, []
        self._call("init")

    def _call(self, name):
        self.calls.append(name)
        if name == self.where:
            raise self.error

    def write(self, kind, step, values):
        self._call("write")

    def close(self):
        self._call("close")


@pytest.mark.parametrize("where", ["init", "write", "close"])
@pytest.mark.parametrize("error", [OSError("no route to host"), SystemExit("no key")])
def test_a_writer_that_fails_is_told_of_once_and_dropped_and_the_run_goes_on(
    tmp_path, monkeypatch, caplog, where, error
):
    other = []

    class Other:
        def __init__(self, run):
            pass

        def write(self, kind, step, values):
            other.append(kind)

        def close(self):
            other.append("closed")

    monkeypatch.setitem(writers.WRITERS, "faulty", lambda run: Faulty(run, where, error))
    monkeypatch.setitem(writers.WRITERS, "other", Other)
    kinds = ["train", "val", "diverged"]
    assert logged(tmp_path, ("faulty", "other")) == kinds and other == [*kinds, "closed"]
    (message,) = said(caplog)
    assert "'faulty' failed and is dropped" in message and str(error) in message


def test_a_writer_that_hangs_holds_up_neither_the_rows_nor_the_end(tmp_path, monkeypatch, caplog):
    free = threading.Event()

    class Hanging:
        def __init__(self, run):
            pass

        def write(self, kind, step, values):
            free.wait(60)

        def close(self):
            pass

    monkeypatch.setitem(writers.WRITERS, "hanging", Hanging)
    monkeypatch.setattr(writers, "_PATIENCE", 0.05)
    assert len(logged(tmp_path, ("hanging",))) == 3
    free.set()
    assert "'hanging' has not finished" in said(caplog)[0]


def test_unknown_writers_and_missing_packages_are_refused_before_training(monkeypatch):
    writers.check(None)
    writers.check(())
    with pytest.raises(InputError, match=r"'wandbb' is unknown; allowed: mlflow, tensorboard, wandb; did you mean"):
        writers.check(("wandbb",))
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"'mlflow' needs mlflow: pip install 'ibjax\[mlflow\]', or leave it out"):
        writers.check(("mlflow",))
    assert writers.start(None, None) == []  # the default is no error


def test_the_key_is_checked_inherited_and_free_to_change(tmp_path):
    for wrong in ("wandb", (3,), {"name": "wandb"}):
        with pytest.raises(InputError, match="writers="):
            config.check(config.ConfigDict({**config.plain(clean_recipe()), "writers": wrong}))
    recipe = clean_recipe()
    recipe.writers = ("wandb", "mlflow")
    recipe.contrast = {"a": clean_recipe(), "b": {**clean_recipe(), "writers": ()}}
    named = {job.workdir.name: job.settings.writers for job in jobs.jobs(recipe, tmp_path / "run")}
    assert named == {"a": ("wandb", "mlflow"), "b": (), "run": ("wandb", "mlflow")}
    saved = config.plain(clean_recipe())
    del saved["writers"]  # of a run that an earlier version made
    assert config.upgrade(config.ConfigDict(saved)).writers is None


def test_a_writer_of_one_s_own_is_named_by_its_file(tmp_path):
    """It is checked before training, and a configuration from elsewhere needs permission to run it."""
    page = (Path(__file__).parent.parent / "docs" / "train.md").read_text()
    file = tmp_path / "my_writer.py"
    file.write_text(page.partition("# my_writer.py\n")[2].partition("```")[0])  # the one of the guide
    name = f"{file}:MyWriter"
    writers.check((name,))
    logged(tmp_path, (name,))
    assert (tmp_path / "losses.csv").read_text().splitlines() == ["2,0.5"]
    for text, said in (
        ("def make(run):\n    return 3\n", "has no method 'write'"),
        ("def make():\n    return 3\n", "takes no argument 'run'"),
    ):
        other = tmp_path / f"w{len(text)}.py"
        other.write_text(text)
        with pytest.raises(InputError, match=said):
            writers.check((f"{other}:make",))
            calls.factory("writers", f"{other}:make")(run=started(tmp_path))
    foreign = tmp_path / "elsewhere.py"
    foreign.write_text("raise AssertionError('it ran')")
    for named, said in ((f"{foreign}:W", r".*elsewhere\.py:W"), ("tensorboard, os.system", r"os\.system")):
        content = {"config": {**config.plain(clean_recipe()), "writers": (named,)}, "data": {}}
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(CodeError, match=rf"writers '{said}'; read it, then give --trust=code"):
            recipe_files.load(str(tmp_path / "config.json"))


# ---- TensorBoard -------------------------------------------------------------------------------------------


def test_tensorboard_gets_the_numbers_and_forgets_the_steps_that_are_taken_again(tmp_path, monkeypatch):
    made = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            made.append([folder, purge_step])

        def add_scalar(self, name, value, step):
            made[-1].append((name, value, step))

        def close(self):
            made[-1].append("closed")

    module(monkeypatch, "tensorboardX", SummaryWriter=SummaryWriter)
    logged(tmp_path, None)  # the default, where the package is installed
    logged(tmp_path, ("tensorboard",), step=2, rows=[])
    scalars = [("train/steps", 2, 2), ("train/loss", 0.5, 2), ("train/clean_acc", 40.0, 2), ("val/robust_acc", 30.0, 2)]
    folder = str(tmp_path / "tensorboard")
    assert made == [[folder, None, *scalars, "closed"], [folder, 3, "closed"]]


# ---- Weights & Biases --------------------------------------------------------------------------------------


class FakeRun:
    def __init__(self, **given):
        self.given, self.rows, self.summary, self.metrics, self.ended = given, [], {}, [], None

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, row):
        self.rows.append(row)

    def finish(self, exit_code):
        self.ended = exit_code


def test_weights_and_biases_continues_its_run(tmp_path, monkeypatch):
    runs = []
    module(monkeypatch, "wandb", init=lambda **given: runs.append(FakeRun(**given)) or runs[-1])
    logged(tmp_path, ("wandb",), rows=ROWS[:2])
    logged(tmp_path, ("wandb",), step=2)
    first, again = runs
    assert first.given["id"] == again.given["id"] and again.given["resume"] == "allow"
    assert first.given["name"] == "student" and first.given["config"]["seed"] == 3
    assert first.given["dir"] == str(tmp_path)
    assert first.rows == [
        {"step": 2, "train/steps": 2, "train/loss": 0.5, "train/clean_acc": 40.0},
        {"step": 2, "val/robust_acc": 30.0},
    ]
    assert ("*", "step") in first.metrics  # so that steps that are taken again are not refused
    assert (first.ended, again.ended) == (0, 1) and again.summary == {"diverged": "loss became NaN"}
    (tmp_path / "wandb.json").write_text("{")  # damaged
    logged(tmp_path, ("wandb",), step=2)
    assert runs[-1].given["id"] != again.given["id"]
    checkpoint.retire(tmp_path)  # begins at step 0
    logged(tmp_path, ("wandb",))
    assert len({run.given["id"] for run in runs}) == 3
    monkeypatch.setenv("WANDB_RUN_ID", "mine")  # of a command that trains a teacher and its student
    for folder, part in (("teacher", True), ("student", False)):
        (tmp_path / folder).mkdir()
        for writer in writers.start(("wandb",), started(tmp_path / folder)._replace(part=part)):
            writer.close()
    assert [run.given["id"] == "mine" for run in runs[-2:]] == [False, True]


def test_the_real_weights_and_biases_works_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (0, 2):
        logged(tmp_path, ("wandb",), step=step)
    name = json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb"))) >= 1


# ---- MLflow ------------------------------------------------------------------------------------------------


class FakeStore:
    """What a client of MLflow does, in memory."""

    def __init__(self):
        self.runs, self.uris = {}, []

    def client(self, tracking_uri):
        self.uris.append(tracking_uri)
        return self

    def get_experiment_by_name(self, name):
        return types.SimpleNamespace(experiment_id="7") if self.runs else None

    def create_experiment(self, name):
        assert name == "ibjax"
        return "7"

    def create_run(self, experiment, run_name, tags):
        run = f"run{len(self.runs)}"
        self.runs[run] = dict(name=run_name, params={}, metrics=[], status=[], tags={})
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run))

    def update_run(self, run, status):
        self.runs[run]["status"].append(status)

    def log_param(self, run, key, value):
        self.runs[run]["params"][key] = value

    def set_tag(self, run, key, value):
        self.runs[run]["tags"][key] = value

    def log_batch(self, run, metrics):
        self.runs[run]["metrics"] += [(name, value, step) for name, value, _, step in metrics]

    def set_terminated(self, run, status):
        self.runs[run]["status"].append(status)


def test_mlflow_continues_its_run(tmp_path, monkeypatch):
    store = FakeStore()
    module(monkeypatch, "mlflow", MlflowClient=store.client, get_tracking_uri=lambda: "sqlite:////here/mlflow.db")
    module(monkeypatch, "mlflow.entities", Metric=lambda *values: values)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    logged(tmp_path, ("mlflow",), rows=ROWS[:2])
    logged(tmp_path, ("mlflow",), step=2)
    (run,) = store.runs.values()
    assert run["status"] == ["RUNNING", "FINISHED", "RUNNING", "FAILED"] and run["name"] == "student"
    assert run["params"] == {"seed": "3", "model.name": "cnn", "model.widths": "(1, 2)"}
    assert run["metrics"][:4] == [
        ("train/steps", 2.0, 2), ("train/loss", 0.5, 2), ("train/clean_acc", 40.0, 2), ("val/robust_acc", 30.0, 2),
    ]  # fmt: skip
    assert run["tags"] == {"diverged": "loss became NaN"}
    assert json.loads((tmp_path / "mlflow.json").read_text())["tracking_uri"] == "sqlite:////here/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@tracker.example")
    logged(tmp_path, ("mlflow",), step=2)
    assert store.uris[-1] == "https://me:secret@tracker.example" and len(store.runs) == 1
    assert "secret" not in (tmp_path / "mlflow.json").read_text()


def test_the_real_mlflow_works_without_a_network(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/store")
    for step in (0, 2):
        logged(tmp_path, ("mlflow",), step=step)
    client = mlflow.MlflowClient(tracking_uri=f"file://{tmp_path}/store")
    (run,) = client.search_runs([client.get_experiment_by_name("ibjax").experiment_id])
    assert run.data.metrics["val/robust_acc"] == 30.0 and run.data.params["model.name"] == "cnn"
    assert run.info.status == "FAILED" and run.data.tags["diverged"] == "loss became NaN"
    assert [each.step for each in client.get_metric_history(run.info.run_id, "train/loss")] == [2, 2]
