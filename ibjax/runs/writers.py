"""Where the rows of metrics.jsonl go beside the file: TensorBoard, Weights & Biases, MLflow, a writer of your own.

`config.writers` names them. None means TensorBoard where tensorboardX is installed; () means none.

| name        | extra         | where its rows are                        | what it reads from the environment        |
|-------------|---------------|-------------------------------------------|-------------------------------------------|
| tensorboard | [tensorboard] | workdir/tensorboard/                      |                                           |
| wandb       | [wandb]       | wandb.ai, or workdir/wandb/ when offline  | WANDB_PROJECT (else ibjax), WANDB_ENTITY, |
|             |               |                                           | WANDB_MODE=offline, WANDB_DIR …           |
| mlflow      | [mlflow]      | MLflow's tracking store                   | MLFLOW_TRACKING_URI,                      |
|             |               |                                           | MLFLOW_EXPERIMENT_NAME (else ibjax) …     |

A writer of your own is a class, or a function that returns an object with the methods of `Writer`, and takes `run`:

    class MyWriter:
        def __init__(self, run): self.file = open(run.workdir / "my.csv", "a")
        def write(self, kind, step, values): print(kind, step, values.get("loss"), file=self.file)
        def close(self): self.file.close()

Only process 0 writes. Each writer has a thread of its own, so that a slow one does not hold up training.

Guarantees (tests of the same names): a writer that fails is told of once and dropped, and the run goes on; a run that
is continued continues its run in W&B and in MLflow.
"""

import contextlib
import importlib.util
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ibjax import calls, files
from ibjax.errors import CodeError, InputError

_PATIENCE = 60.0  # seconds that a writer has to finish when its run ends
_ANY = (Exception, SystemExit)  # whatever a writer raises
log = logging.getLogger(__name__)


class Started(NamedTuple):
    """A run that begins or is continued, as a writer sees it."""

    workdir: Path
    title: str
    config: dict[str, Any]  # the configuration, as plain data
    step: int  # that it continues from; rows after it are written again
    part: bool = False  # whether it is a teacher of another run of this command, or trained for contrast with it


class Writer(Protocol):
    """Receives the rows of one run."""

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Takes a row: its kind ("train", "val", "diverged", "preempted"), step and values, as in metrics.jsonl."""
        ...

    def close(self) -> None:
        """Is called once, at the end of the run, whatever ended it."""
        ...


def check(names: Iterable[str] | None) -> None:
    """Raises InputError unless all of these writers exist and their packages are installed; nothing is imported."""
    for name in each(names):
        calls.factory("writers", name)
        if (package := _PACKAGES.get(name)) and importlib.util.find_spec(package) is None:
            raise InputError(f"the writer '{name}' needs {package}: pip install 'ibjax[{name}]', or leave it out")


def start(names: Iterable[str] | None, run: Started) -> list["Background"]:
    """The writers of a run. One that cannot be made is told of and left out."""
    if names is None:
        names = ("tensorboard",) if importlib.util.find_spec("tensorboardX") else ()
    made = []
    for name in each(names):
        try:
            made.append(Background(name, calls.factory("writers", name)(run=run)))
        except _ANY as error:
            _tell(name, error)
    return made


def each(names: Iterable[str] | None) -> dict[str, None]:
    """The names of writers, each once; --config.writers=wandb,mlflow gives both in one text."""
    return dict.fromkeys(part.strip() for name in names or () for part in name.split(","))


class Background:
    """A writer whose rows are written in a thread of its own; it is dropped at its first error."""

    def __init__(self, name: str, writer: Writer):
        self.name, self.writer, self.dropped = name, writer, False
        self.rows: queue.SimpleQueue = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name=f"writer {name}", daemon=True)
        self.thread.start()

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Hands a row over, without waiting."""
        if not self.dropped:
            self.rows.put((kind, step, values))

    def close(self) -> None:
        """Waits until the writer has finished, but not for ever."""
        self.rows.put(None)
        self.thread.join(_PATIENCE)
        if self.thread.is_alive():
            log.warning(
                "the writer '%s' has not finished within %.0f s; it may lack the last rows, which metrics.jsonl has",
                self.name,
                _PATIENCE,
            )

    def _work(self):
        try:
            while (row := self.rows.get()) is not None:
                self.writer.write(*row)
            self.writer.close()
        except _ANY as error:
            self.dropped = True
            _tell(self.name, error)
            with contextlib.suppress(*_ANY):
                self.writer.close()


def _tell(name, error):
    reason = " ".join(str(error).split())[:300] or "no message"
    log.warning(
        "the writer '%s' failed and is dropped (%s: %s); the run goes on, and metrics.jsonl has all rows",
        name,
        type(error).__name__,
        reason,
    )


# ---- the writers -------------------------------------------------------------------------------------------


class TensorBoard:
    """Event files in workdir/tensorboard/."""

    def __init__(self, run: Started):
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

        again = run.step + 1 if run.step else None  # of these steps TensorBoard shows the new rows alone
        self.board = SummaryWriter(str(run.workdir / "tensorboard"), purge_step=again)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """As of `Writer`."""
        for name, value in _numbers(kind, values).items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """As of `Writer`."""
        self.board.close()


class WeightsAndBiases:
    """A run of Weights & Biases, online or offline as its own settings say."""

    def __init__(self, run: Started):
        import wandb  # pyright: ignore[reportMissingImports]

        saved = _remembered(run, "wandb")
        given = None if run.part else os.environ.get("WANDB_RUN_ID")  # it cannot be that of all runs of a command
        name = saved.get("id") or given or secrets.token_hex(4)
        self.code = 0
        self.run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ibjax"),
            id=name,
            resume="allow",
            name=run.title,
            config=run.config,
            dir=os.environ.get("WANDB_DIR", str(run.workdir)),
        )
        _remember(run, "wandb", {"id": name})
        # W&B's own step only grows; a continued run takes the steps after its checkpoint again
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """As of `Writer`."""
        if kind == "diverged":
            self.code, self.run.summary["diverged"] = 1, values.get("reason")
        if numbers := _numbers(kind, values):
            self.run.log({"step": step, **numbers})

    def close(self) -> None:
        """As of `Writer`."""
        self.run.finish(exit_code=self.code)


class MLflow:
    """A run in MLflow's tracking store."""

    def __init__(self, run: Started):
        import mlflow  # pyright: ignore[reportMissingImports]

        saved, given = _remembered(run, "mlflow"), os.environ.get("MLFLOW_TRACKING_URI")
        uri = given or saved.get("tracking_uri") or mlflow.get_tracking_uri()
        self.client: Any = mlflow.MlflowClient(tracking_uri=uri)
        self.status = "FINISHED"
        self.id = saved.get("run_id") or self._create(run)
        self.client.update_run(self.id, "RUNNING")
        # MLflow's default depends on the current folder; an address that was given may hold a password
        _remember(run, "mlflow", {"run_id": self.id, **({} if given else {"tracking_uri": uri})})

    def _create(self, run):
        """A new run, with the options of the configuration as its parameters; returns its id."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "ibjax")
        known = self.client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self.client.create_experiment(name)
        made = self.client.create_run(experiment, run_name=run.title, tags={"workdir": str(run.workdir)}).info.run_id
        for key, value in calls.leaves(run.config):
            self.client.log_param(made, key, str(value)[:500])
        return made

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """As of `Writer`."""
        if kind == "diverged":
            self.status = "FAILED"
            self.client.set_tag(self.id, "diverged", str(values.get("reason"))[:500])
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now = int(1000 * time.time())
        if metrics := [Metric(name, float(value), now, step) for name, value in _numbers(kind, values).items()]:
            self.client.log_batch(self.id, metrics=metrics)

    def close(self) -> None:
        """As of `Writer`."""
        self.client.set_terminated(self.id, self.status)


def own_writer(source: Any, made: Any, options: Any) -> Writer:
    """A writer of the user's own; raises CodeError unless it has the methods of `Writer`."""
    for method in ("write", "close"):
        if not callable(getattr(made, method, None)):
            raise CodeError(f"{source} has no method '{method}'; ibjax.runs.writers.Writer describes what it needs")
    return made


WRITERS: dict[str, Callable[..., Writer]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
MEMORIES = ("wandb.json", "mlflow.json")  # files of a workdir that say which run of a service continues it


def _numbers(kind, values):
    """{"train/loss": …} of a row; {} for rows that tell of an event."""
    if kind not in ("train", "val"):
        return {}
    return {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)}


def _remembered(run, name):
    """What `_remember` has saved; {} where there is nothing that can be used."""
    try:
        return files.read_json(run.workdir / f"{name}.json", sealed=True)
    except FileNotFoundError:
        return {}
    except ValueError as error:  # an InputError is one
        log.warning("%s: %s; a new run begins in %s", run.workdir / f"{name}.json", error, name)
        return {}


def _remember(run, name, content):
    files.write_json(run.workdir / f"{name}.json", content)
