"""Flips random bits in all files that a result depends on, one at a time, and records what a user would see.

    python benchmarks/flips.py [--trials=1000] [--processes=20] [--seed=0] [--out=results/flips-DATE.json]

The script first creates the files: a run of configs/digits.py:smoke on an npz file, with its teacher and the undefended
network; a data set of TFDS with cached labels; and a cache of compiled programs.

A trial draws a file, flips one of its bits, and runs every operation that reads it: load a network and attack test
images; evaluate with the existing records; read the report; start training again; read the streamed images and their
labels; compile. Odd trials draw uniformly from all files, even trials draw a kind of file first. In the cache of
compiled programs a bit of every program is flipped, since few of them are used. Afterwards all files are restored. The
outcome is one of

    nothing             all numbers are right, and nothing was logged
    computed again      all numbers are right, and a line named what was damaged
    refused             one line named what was damaged, and no number was shown
    traceback           an exception that was not reported as one line
    wrong               a number differed from the right one, and nothing was logged

--processes is the number of additional trials that start `ibjax.main` again in a new process, as a user would.
"""

import contextlib
import datetime
import functools
import io
import itertools
import json
import logging
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measuring
import numpy as np
from parts import ROOT, bare

from ibjax import errors, files, main
from ibjax.attacks.pgd import pgd
from ibjax.data import stream
from ibjax.devices import compiled
from ibjax.evaluation import evaluate
from ibjax.evaluation.report import runs
from ibjax.net import linen_net, to_float
from ibjax.runs import checkpoint, metrics, run, rundir, trees
from ibjax.training import experiment, jobs

OUTCOMES = ("nothing", "computed again", "refused", "traceback", "wrong")


class Wrong(Exception):
    """A number is another one, and nothing was said."""


# ---- what is flipped -----------------------------------------------------------------------------------------


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


# ---- trials --------------------------------------------------------------------------------------------------


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


def trial(reader: Reader, file: Path, bit: int, right: dict[str, dict]) -> tuple[str, str]:
    """The worst outcome of all uses of a file with one bit flipped; everything is as before afterwards."""
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    found = []
    for use in reader.uses(file):
        file.write_bytes(content)
        if file.name.endswith("-cache"):
            _flip_others(file, bit)
        with _unchanged(reader.root, file):
            found.append(outcome(use, right[key(use)]))
    return max(found, key=lambda pair: OUTCOMES.index(pair[0]))


def _flip_others(file, bit):
    """Flips a bit of every other compiled program too."""
    for other in file.parent.glob("*-cache"):
        if other != file:
            content = bytearray(other.read_bytes())
            content[bit // 8 % len(content)] ^= 1 << bit % 8
            other.write_bytes(content)


def plain(numbers: dict[str, Any]) -> dict[str, Any]:
    """Numbers as JSON keeps them, for comparison."""
    return json.loads(json.dumps(numbers))


def key(use: Callable[[], dict[str, Any]]) -> str:
    """The name of a use."""
    return repr((use.func.__name__, str(use.args[0]))) if isinstance(use, functools.partial) else use.__name__


@contextlib.contextmanager
def _unchanged(root, file):
    """The folder that the file belongs to is put back."""
    top = root / file.relative_to(root).parts[0]
    kept = root.parent / "kept" / top.name
    try:
        yield
    finally:
        if top.is_dir():
            shutil.rmtree(top)
            shutil.copytree(kept, top)
        else:
            shutil.copy(kept, top)


def command_trial(root: Path, file: Path, bit: int, table: str) -> tuple[str, str]:
    """The outcome of the whole command, started anew."""
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    config = root.parent / "config.py"
    config.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\nimport pathlib, flips\n"
        f"def get_config(): return flips.settings(pathlib.Path({str(root)!r}))\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "ibjax.main", f"--config={config}", f"--workdir={root / 'run'}"]
    with _unchanged(root, file):
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", cwd=ROOT)
    lines = [line for line in done.stderr.splitlines() if "damaged" in line or line.startswith("error")]
    text = "; ".join(lines)
    if "Traceback" in done.stderr or done.returncode not in (0, 2):
        return "traceback", f"exit code {done.returncode}: {done.stderr[-500:]}"
    if done.returncode == 2:
        return "refused", text
    if done.stdout != table and "moved to damaged/" not in text:
        return "wrong", f"{done.stdout} {text}"
    return ("computed again" if lines else "nothing"), text


def kind(root: Path, file: Path) -> str:
    """What the table calls a file."""
    name = file.relative_to(root).as_posix()
    if name == "data.npz":
        return "the data set, .npz"
    if name.startswith("tfds/"):
        return "the streamed data set"
    if file.suffix == ".labels":
        return "labels that are kept"
    if name.startswith("cache/"):
        return "compiled programs"
    if "checkpoints" in file.parts:
        return "checkpoints: manifests" if file.parent.name == "manifest" else "checkpoints: the rest"
    if "eval" in file.parts:
        return "records" if file.suffix == ".json" else "adversarial images"
    return file.name


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


def page(content: dict[str, Any]) -> str:
    """The table, and what made it, as Markdown."""
    seeds = f"One wrong bit each; seeds {', '.join(map(str, content['seeds']))}. The last call: "
    return f"{table(('file', 'flips'), content['kinds'], OUTCOMES)}\n\n{seeds}{origin_line(content['run'])}\n"


_SAME = ("commit", "versions", "hardware", "compression")


def continued(out: Path, about: dict[str, Any], seed: int) -> dict[str, Any]:
    """What `out` holds, to be added to; raises InputError where another code has made it, or where it has the seed."""
    before = files.read_json(out) if out.is_file() else {"kinds": {}, "bad": [], "seeds": []}
    if "kinds" not in before:
        raise errors.InputError(f"--out={out} holds no flips; give another --out")
    if changed := [key for key in _SAME if "run" in before and before["run"].get(key) != about[key]]:
        raise errors.InputError(f"--out={out} has flips of other {', '.join(changed)}; give another --out")
    if seed in before["seeds"]:
        known = ", ".join(map(str, before["seeds"]))
        raise errors.InputError(f"--out={out} has the flips of --seed={seed} already; give one that is not in {known}")
    return before


def command_line() -> None:
    """The command line of this script."""
    parser = bare(__file__, __doc__)
    parser.add_argument("--trials", type=int, default=1000, help="flips in this process")
    parser.add_argument("--processes", type=int, default=20, help="flips with the command started anew")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=files.path, help="default: results/flips-DATE.json; what it holds is added to")
    given = parser.parse_args()
    out = given.out or ROOT / "results" / f"flips-{datetime.date.today()}.json"
    about = origin()
    before = continued(out, about, given.seed)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        found = flip(Path(folder) / "root", given.trials, given.processes, given.seed)
    kinds = {
        name: dict(Counter(before["kinds"].get(name, {})) + Counter(found["kinds"].get(name, {})))
        for name in sorted({**before["kinds"], **found["kinds"]})
    }
    both = {"bad": before["bad"] + found["bad"], "seeds": [*before["seeds"], given.seed]}
    content = {"kinds": kinds, **both, "run": about}
    files.write_json(out, content)
    out.with_suffix(".md").write_text(page(content), encoding="utf-8")
    print(page(content))
    for line in found["bad"]:
        print(line)
    sys.exit(1 if found["bad"] else 0)


def prepare(root: Path) -> Reader:
    """Makes the run, its data and its caches below `root`, which is made; returns what reads them."""
    root.mkdir(parents=True)
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    compiled.keep()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    make(root)
    return Reader(root)


def flip(root: Path, trials: int, processes: int, seed: int) -> dict[str, Any]:
    """{"kinds": {kind of file: {outcome: how often}}, "bad": lines}."""
    reader = prepare(root)
    files = sorted(file for file in root.rglob("*") if file.is_file() and file.stat().st_size and file.name != ".lock")
    uses = {key(use): use for file in files for use in reader.uses(file)}
    right = {name: plain(use()) for name, use in uses.items()}
    files = sorted(file for file in root.rglob("*") if file.is_file() and file.stat().st_size and file.name != ".lock")
    shutil.copytree(root, root.parent / "kept", dirs_exist_ok=True)
    of_kind: dict[str, list[Path]] = {}
    for file in files:
        of_kind.setdefault(kind(root, file), []).append(file)
    names, rng, kinds, bad = sorted(of_kind), np.random.default_rng(seed), {}, []
    tries = [functools.partial(trial, reader, right=right)] * trials
    if processes:
        table = subprocess.run(
            [sys.executable, "-c", _PRINT.format(root=str(root), benchmarks=str(ROOT / "benchmarks"))],
            capture_output=True, encoding="utf-8", check=True, cwd=ROOT,
        ).stdout  # fmt: skip
        tries += [functools.partial(command_trial, root, table=table)] * processes
    for number, attempt in zip(itertools.count(1), tries, strict=False):
        among = files if number % 2 else of_kind[names[rng.integers(len(names))]]
        file = among[rng.integers(len(among))]
        bit = int(rng.integers(8 * file.stat().st_size))
        ended, text = attempt(file=file, bit=bit)
        name = kind(root, file)
        kinds.setdefault(name, Counter())[ended] += 1
        if ended in ("traceback", "wrong"):
            bad.append(f"{ended}: bit {bit} of {file.relative_to(root)}: {text[:600]}")
        if number % 100 == 0:
            print(number, dict(sum(kinds.values(), Counter())), flush=True)
    return {"kinds": {name: dict(row) for name, row in sorted(kinds.items())}, "bad": bad}


_PRINT = """
import sys; sys.path.insert(0, {benchmarks!r})
import pathlib, flips
root = pathlib.Path({root!r})
from ibjax import report
from ibjax.devices import cluster
cluster.initialize()
records = flips.main.execute(flips.settings(root), root / "run")
print(report.table(records))
print(f"report: {{root / 'run' / 'report.html'}}")
"""

if __name__ == "__main__":
    measuring.run(command_line)
