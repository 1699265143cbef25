"""A run with all files that a result depends on, and every operation that reads them, for `flips.py` and `failures.py`.

The run is configs/digits.py:smoke on an npz file, with its teacher and the undefended network; beside it are a data set
of TFDS with cached labels, and a cache of compiled programs. What an operation returns is compared with what it
returned while everything was whole: its `outcome` is what a user would see.
"""

import contextlib
import functools
import io
import json
import logging
import os
import runpy
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measuring
import numpy as np
from parts import ROOT

from ibjax import errors, main
from ibjax.attacks.pgd import pgd
from ibjax.data import stream
from ibjax.devices import compiled
from ibjax.evaluation import evaluate
from ibjax.evaluation.report import runs
from ibjax.net import linen_net, to_float
from ibjax.runs import checkpoint, metrics, run, rundir, trees
from ibjax.training import experiment, jobs

OUTCOMES = ("nothing", "computed again", "refused", "traceback", "wrong")

# ---- the files -----------------------------------------------------------------------------------------------


def make(root: Path) -> None:
    """The run, its data and its caches, below `root`."""
    rng = np.random.default_rng(0)
    images = {split: rng.integers(0, 256, (n, 8, 8, 1), dtype=np.uint8) for split, n in (("train", 64), ("test", 16))}
    labels = {f"y_{split}": np.arange(len(x), dtype=np.int64) % 10 for split, x in images.items()}
    np.savez_compressed(root / "data.npz", **{f"x_{split}": x for split, x in images.items()}, **labels)
    main.execute(settings(root), root / "run")
    _make_stream(root / "tfds", rng)
    stream.load(dataset="tiny", data_dir=str(root / "tfds"), size=8, threads=2)


def settings(root: Path) -> Any:
    """The configuration of the run."""
    made = runpy.run_path(str(ROOT / "configs" / "digits.py"))["get_config"]("smoke")
    for part in (made, made.teacher.recipe, made.contrast.undefended):
        part.data = dict(name="npz", path=str(root / "data.npz"), num_classes=10, val_size=8, split_seed=0)
        part.evaluate.attacks = ("fgsm", "pgd-2")
    return made


def _make_stream(folder, rng):
    """Encoded images of different sizes, as TFDS stores them."""
    import tensorflow_datasets as catalogue
    from PIL import Image

    def encoded(i):
        file, size = io.BytesIO(), (10 + i % 5, 12)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, "PNG")
        return file.getvalue()

    class Tiny(catalogue.core.GeneratorBasedBuilder, skip_registration=True):
        name, VERSION = "tiny", catalogue.core.Version("1.0.0")

        def _info(self):
            parts = {"image": catalogue.features.Image(shape=(None, None, 3), encoding_format="png")}
            parts["label"] = catalogue.features.ClassLabel(num_classes=10)
            return catalogue.core.DatasetInfo(builder=self, features=catalogue.features.FeaturesDict(parts))

        def _split_generators(self, manager):
            return {split: self._generate_examples(n) for split, n in (("train", 20), ("validation", 10))}

        def _generate_examples(self, n):
            for i in range(n):
                yield str(i), {"image": io.BytesIO(encoded(i)), "label": i % 10}

    with contextlib.redirect_stderr(io.StringIO()):
        Tiny(data_dir=str(folder), file_format="array_record").download_and_prepare()


# ---- what reads it -------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _attacked(model, variables, x, y, key):
    """Logits of the images, and under an attack; compiled once for all trials."""

    def logits_fn(x):
        return linen_net(model).predict(variables, x)[0]

    return logits_fn(x), logits_fn(pgd(eps=0.1, step_size=0.05, steps=2)(key, logits_fn, x, y))


class Reader:
    """Does what a user would do, below `root`, as cheaply as it can be done a thousand times."""

    def __init__(self, root: Path):
        self.root = root
        self.jobs = {job.workdir: job for job in jobs.jobs(settings(root), root / "run")}
        self.experiments = {}
        for workdir, job in self.jobs.items():
            made = experiment.build(rundir.read_config(workdir)[0], job.teachers)
            self.experiments[workdir] = made, jax.eval_shape(lambda made=made: experiment.initial_state(made))

    def loaded(self, workdir: Path) -> dict[str, Any]:
        trained = run.load(workdir)
        test = run.test_split(trained)
        x = to_float(jnp.asarray(test.images))
        logits = _attacked(trained.model, trained.variables, x, jnp.asarray(test.labels), jax.random.key(0))
        evaluated = trained.config.evaluate.to_dict()
        return {"logits": [np.asarray(part).tolist() for part in logits], "settings": evaluated, "step": trained.step}

    def evaluated(self, workdir: Path) -> dict[str, Any]:
        records = evaluate.evaluate(workdir)
        return {f"{r['attack']} {r['eps']}": _result(r) for r in records}

    def reported(self, workdir: Path) -> dict[str, Any]:
        found, *_ = runs.read([workdir])
        for problem in found.problems:
            logging.getLogger("ibjax").warning("%s", problem)
        shown = {f"{r['attack']} {r['eps']} {r['main']}": _result(r) for r in found.records}
        rows = {f"{row['kind']} {row['step']}": row for row in found.metrics}
        parts = {"config": found.config, "facts": found.facts, "env": found.env}
        pictures = {name: np.asarray(value).tolist() for name, value in (found.examples or {}).items()}
        return shown | rows | {name: part for name, part in parts.items() if part} | pictures

    def continued(self, workdir: Path) -> dict[str, Any]:
        """What training does before its first step."""
        made, like = self.experiments[workdir]
        identity = rundir.write_config(workdir, made.config, {**made.facts, **run.facts(run.load_data(made.config))})
        with checkpoint.manager(workdir, run=identity) as store:
            state = checkpoint.restore_latest(store, like)
            best = checkpoint.best_step(store)
        step = 0 if state is None else int(state.step)
        metrics.MetricsLog(workdir, step).close()
        return {"step": step, "best": best, "state": state and trees.digest(state)}

    def trained_on(self) -> dict[str, Any]:
        return self.loaded(self.root / "run") | self.continued(self.root / "run")

    def streamed(self) -> dict[str, Any]:
        data = stream.load(dataset="tiny", data_dir=str(self.root / "tfds"), size=8, threads=2)
        return {
            name: [split.labels.tolist(), trees.array_digest(split.images[:])]
            for name, split in (("train", data.train), ("test", data.test))
        } | {"classes": data.num_classes}

    def compiled_again(self) -> dict[str, Any]:
        from jax._src import compilation_cache

        jax.clear_caches()
        compilation_cache.reset_cache()
        return {workdir.name: self.loaded(workdir) for workdir in self.jobs}

    def uses(self, file: Path) -> list[Callable[[], dict[str, Any]]]:
        """What reads a file."""
        name = file.relative_to(self.root).as_posix()
        if name == "data.npz":
            return [self.trained_on]
        if name.startswith("tfds/") or file.suffix == ".labels":
            return [self.streamed]
        if name.startswith("cache/"):
            return [self.compiled_again]
        return self.of_run(
            max((folder for folder in self.jobs if folder in file.parents), key=lambda folder: len(folder.parts))
        )

    def of_run(self, workdir: Path) -> list[Callable[[], dict[str, Any]]]:
        """What reads a run."""
        return [functools.partial(use, workdir) for use in (self.loaded, self.evaluated, self.reported, self.continued)]


def _result(record):
    names = ("clean_acc", "robust_acc", "selected_on", "robust_flags", "step", "n", "eps", "seed", "weights")
    return {name: record[name] for name in names}


def prepare(root: Path) -> Reader:
    """Makes the run, its data and its caches below `root`, which is made; returns what reads them."""
    root.mkdir(parents=True)
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    compiled.keep()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    make(root)
    return Reader(root)


# ---- what a user would see -----------------------------------------------------------------------------------


@contextlib.contextmanager
def said() -> Iterator[list[str]]:
    """The lines of warnings that ibjax logs meanwhile."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    handler, log = Keep(logging.WARNING), logging.getLogger("ibjax")
    log.addHandler(handler)
    log.propagate = False
    try:
        yield lines
    finally:
        log.removeHandler(handler)


def outcome(use: Callable[[], dict], right: dict[str, Any]) -> tuple[str, str]:
    """(one of OUTCOMES, what was said) of one use."""
    with said() as lines:
        try:
            found = plain(use())
        except Exception as error:
            _, line = errors._ending(error)
            if line:
                return ("traceback" if "\n" in line else "refused"), line
            return "traceback", f"{type(error).__name__}: {error}"
    missing, differing = set(right) - set(found), [name for name in found if found[name] != right.get(name)]
    text = "; ".join(lines)
    if (differing or missing) and not lines:
        return "wrong", f"missing {sorted(missing)}, another {differing}"
    if differing and not _told(differing, text):
        return "wrong", f"another {differing}, though: {text}"
    return ("computed again" if lines else "nothing"), text


def _told(differing, text):
    """Whether what was said explains what is shown in place of what is damaged.

    A step that was set aside makes another one the newest or best; of the attacks whose images are whole, the next one
    is pictured, under its own name.
    """
    moved = set(differing) <= {"step", "best", "state", "logits"} and "moved to damaged/" in text
    pictured = set(differing) <= {"attack", "x_adv", "predicted_adv"} and ".examples.npz cannot be read" in text
    return moved or (pictured and "attack" in differing)


def plain(numbers: dict[str, Any]) -> dict[str, Any]:
    """Numbers as JSON keeps them, for comparison."""
    return json.loads(json.dumps(numbers))


def key(use: Callable[[], dict[str, Any]]) -> str:
    """The name of a use."""
    return repr((use.func.__name__, str(use.args[0]))) if isinstance(use, functools.partial) else use.__name__


# ---- the page ------------------------------------------------------------------------------------------------


def table(first: tuple[str, str], rows: dict[str, dict[str, int]], outcomes: tuple[str, ...]) -> str:
    """The Markdown table of {what: {outcome: how often}}, with its two first heads."""
    total = sum(map(Counter, rows.values()), Counter())
    grid = [
        (name, sum(row.values()), *(row.get(outcome, 0) for outcome in outcomes))
        for name, row in {**rows, "**all**": total}.items()
    ]
    return measuring.markdown((*first, *outcomes), grid)


def compression() -> str:
    """How JAX compresses the programs that it keeps: zlib has a checksum, zstd as JAX calls it has none."""
    from jax._src import compilation_cache

    with_zstd = any(getattr(compilation_cache, name, None) for name in ("zstd", "zstandard"))
    return "zstd" if with_zstd else "zlib"


def origin() -> dict[str, Any]:
    """Where and with what trials are made."""
    return {**measuring.environment(), "compression": compression()}


def origin_line(about: dict[str, Any]) -> str:
    """The same in a line."""
    return f"{measuring.provenance_line(about)}; compiled programs under {about['compression']}."
