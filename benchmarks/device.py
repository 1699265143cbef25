"""A complete check on an accelerator: one command, under ten minutes, one JSON file.

    python benchmarks/device.py --out=results/device.json [--data=FOLDER|FILE.npz] [--minutes=2.5] [--total-minutes=9.5]
    python benchmarks/device.py --out=results/methods.json --parts=methods --total-minutes=15      every method once
    python benchmarks/device.py --quick            the same in a few minutes on a CPU, at tiny sizes

| part       | what                                                                                                  |
|------------|-------------------------------------------------------------------------------------------------------|
| step       | PGD-10 and IBD-10 of ResNet-18 in bf16 against their PyTorch twins (benchmarks/train_step.py)         |
| throughput | images/s and share of peak: PGD-10 PreActResNet-18 and WRN-28-10, TRADES-10, IBD-10 (ResNet-18)       |
| training   | PGD-AT of PreActResNet-18 on --data, as many epochs as fit in --minutes; FGSM, PGD-20, CW-20          |
| autoattack | a shortened AutoAttack against torchattacks', on a small CNN trained on --data                        |
| methods    | two steps of every objective, perturbation, attack by name and analysis: finite, seconds, memory      |
| tests      | the quick tests with JAX on the accelerator                                                           |

Every part runs in its own process with a share of the time. Results are written as soon as they are available. A part
that fails or runs out of time is recorded with its last lines and does not stop the others. The same command writes its
file anew; that of another command is refused.
"""

import argparse
import datetime
import importlib.util
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from parts import ROOT, bare, refuse_other, started, update

from ibjax import errors, files
from ibjax.runs import recipe_files

SHARES = {
    "step": 5,
    "throughput": 4,
    "autoattack": 3,
    "methods": 5,
    "tests": 3,
}  # of what training leaves; unused time passes on
PARTS = ("step", "throughput", "training", "autoattack", "methods", "tests")
NEED_DATA = ("training", "autoattack")
RESERVE_S = 75  # of the training part: reading, compiling, evaluating


# ---- the parts, each in a process of its own -----------------------------------------------------------------


def step(given: argparse.Namespace) -> None:
    """Against the PyTorch twins; `torch.compile` comes last because it may take longest."""
    import jax
    import methods
    import train_step

    small = given.quick or jax.default_backend() == "cpu"
    plan = [("pgd_at", 512, False), ("pgd_at", 128, False), ("ibd", 512, False), ("pgd_at", 512, True)]
    if small:
        plan = [("pgd_at", 8, False), ("ibd", 8, False)]
    size = dict(network=methods.TINY, attack_steps=1) if given.quick else {}
    timing = ("float32", 2, 1) if small else ("bfloat16", 5, 10)
    records = []
    for name, batch_size, compiled in plan:
        options = dict(peak=given.peak_tflops, compiled_twin=compiled, **size)
        records.append(train_step.measure(name, batch_size, *timing, **options))
        update(given.out, "step", records=records, table=train_step.table(records))


def throughput(given: argparse.Namespace) -> None:
    """Images/s of whole train steps, the network's data on the device."""
    import jax
    import measuring
    from methods import Case, ibjax_steps

    from ibjax.attacks.pgd import pgd
    from ibjax.models import preact_resnet, resnet, wide_resnet
    from ibjax.objectives.ibd import ibd
    from ibjax.objectives.pgd_at import pgd_at
    from ibjax.objectives.trades import trades

    options = {"num_classes": 10, "dtype": "bfloat16"}
    small = {"num_classes": 10, "blocks": (1, 1), "width": 4} if given.quick else options
    wide = {"num_classes": 10, "depth": 10, "width": 1} if given.quick else options | {"width": 10}
    deep = wide if given.quick else wide | {"depth": 34}
    ce, kl = (pgd(steps=10), pgd(steps=10, loss="kl", init="gaussian"))
    preact, basic = preact_resnet.Model(**small), resnet.Model(**small)
    wrn28 = wide_resnet.Model(**(wide if given.quick else wide | {"depth": 28}))
    plan = {  # name: network, objective, attack, teacher, nominal GFLOP per image
        "PGD-10 PreActResNet-18": (preact, pgd_at(), ce, None, 23 * 1.11),
        "IBD-10 ResNet-18 from WRN-34-10": (basic, ibd(), kl, wide_resnet.Model(**deep), 26 * 1.11 + 2 * 13.3),
        "PGD-10 WRN-28-10": (wrn28, pgd_at(), ce, None, 23 * 10.5),
        "TRADES-10 ResNet-18": (basic, trades(), kl, None, 27 * 1.11),
    }
    batch_size, n = (8, 1) if given.quick else (512, 10)
    rows, peak = {}, measuring.peak_tflops("bfloat16", given.peak_tflops)
    for name, (model, objective, attack, teacher, gflop) in plan.items():
        try:
            teachers = {} if teacher is None else {"teacher": teacher}
            steps = {name: ibjax_steps(Case(model, objective, attack, teachers), batch_size)}
            first = measuring.warm_up(steps, [])[name]
            seconds = measuring.alternate(steps, 3, n).seconds[name]
            rate = batch_size / sorted(seconds)[1]
            share = rate * gflop / (peak * 1e3) if peak else None
            memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
            rows[name] = {
                "images_per_s": rate,
                "share_of_peak": share,
                "batch": batch_size,
                "seconds_per_step": seconds,
                "first_two_steps_s": first,
                "peak_bytes_so_far": memory,
                "gflop_per_image": gflop,
            }
        except Exception as error:  # whatever it is, the other rows are still wanted
            rows[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
        update(given.out, "throughput", rows=rows)


def training(given: argparse.Namespace) -> None:
    """A short PGD-AT run through `experiment.build`, its epochs chosen from the measured rate, and its evaluation."""
    from ibjax import config
    from ibjax.evaluation.evaluate import evaluate
    from ibjax.runs import run
    from ibjax.training import loop
    from ibjax.training.experiment import build

    settings = config.base()
    settings.title = "PGD-AT PreActResNet-18, short"
    settings.data = data_section(given)
    small, full = dict(blocks=(1, 1), width=4), dict(depth=18, dtype="bfloat16")
    settings.model = dict(name="preact_resnet", **(small if given.quick else full))
    settings.batch_size = 32 if given.quick else 512
    settings.optimizer.lr = 0.05 if given.quick else 0.3
    settings.schedule = dict(name="one_cycle")
    n = len(run.load_data(settings).train.labels) if not given.quick else 128
    settings.epochs = 2 if given.quick else max(1, int(affordable_images(given) / n))
    settings.validate.update(every=settings.epochs, batch_size=min(1000, settings.batch_size * 2))
    settings.evaluate.update(attacks=("fgsm", "pgd-20", "margin-20"), batch_size=min(1000, settings.batch_size * 2))
    update(given.out, "training", epochs=settings.epochs, n_train=n, config=config.plain(settings))

    begun = time.perf_counter()
    loop.train(build(settings), given.workdir)
    update(given.out, "training", training_s=round(time.perf_counter() - begun, 1))
    evaluate(given.workdir, "last")


def data_section(given: argparse.Namespace) -> dict:
    """The configuration of the data to train on."""
    if given.quick:
        return dict(name="synthetic", shape=(32, 32, 3), num_classes=10, n_train=136, val_size=8, split_seed=0)
    name = "npz" if given.data.suffix == ".npz" else "folder"
    return dict(name=name, path=str(given.data), val_size=1000, split_seed=0)


def autoattack(given: argparse.Namespace) -> None:
    """Trains the network of configs/small_cnn.py and attacks it from both sides, twice: the first round compiles."""
    import autoattack as comparison

    from ibjax.training import loop
    from ibjax.training.experiment import build

    settings = recipe_files.load(str(ROOT / "configs" / "small_cnn.py") + (":smoke" if given.quick else ""))
    settings.data = data_section(given)
    settings.validate.every = settings.epochs
    workdir = given.workdir.with_name("small_cnn")
    loop.train(build(settings), workdir)
    size = dict(n=16, steps=2, queries=5) if given.quick else dict(n=1000, steps=20, queries=500)
    found = dict(eps="4/255", parts={}, **size)

    def save():
        finished = {name: rounds for name, rounds in found["parts"].items() if all(len(each) == 2 for each in rounds)}
        text = comparison.table({**found, "parts": finished}) if finished else ""
        update(given.out, "autoattack", **found, table=text)

    comparison.compare(workdir, found, 2, save)


def methods(given: argparse.Namespace) -> None:
    """Two steps of every program of `programs.py`; those that come are compiled while one runs."""
    import concurrent.futures as futures

    import jax
    import numpy as np
    import programs
    from jax.sharding import AxisType, Mesh

    small = given.quick or jax.default_backend() == "cpu"
    scale = programs.SMALL if small else programs.TRIED
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))

    # where the sizes are small, compiling is all the time
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True} if small else None

    def compiled(name):
        program, began = programs.TABLE[name](scale, mesh), time.perf_counter()
        made = program.call.lower(*jax.eval_shape(program.make)).compile(options)
        return program, made, time.perf_counter() - began

    def two_steps(program, made, compile_s):
        arguments, seconds = jax.jit(program.make)(), []
        for _ in range(2):
            began = time.perf_counter()
            result = jax.block_until_ready(made(*arguments))
            seconds.append(time.perf_counter() - began)
            arguments = program.again(arguments, result)
        planned, stats = made.memory_analysis(), jax.devices()[0].memory_stats() or {}
        return {
            "finite": programs.finite(result),
            "seconds": seconds,
            "compile_s": round(compile_s, 1),
            "planned_bytes": planned.argument_size_in_bytes + planned.temp_size_in_bytes,
            "peak_bytes_so_far": stats.get("peak_bytes_in_use"),
        }

    rows = {}
    with futures.ThreadPoolExecutor(1 if small else 6) as pool:
        made = {name: pool.submit(compiled, name) for name in programs.TABLE}
        for name in list(made):
            try:
                rows[name] = two_steps(*made.pop(name).result())
            except Exception as error:  # whatever it is, the other rows are still wanted
                rows[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
            failed = [each for each, row in rows.items() if not row.get("finite")]
            update(given.out, "methods", rows=rows, failed=failed, left=list(made))


def affordable_images(given: argparse.Namespace) -> float:
    """How many images may pass through training in the time, at 0.85 of the rate of the bare step."""
    rows = files.read_json(given.out).get("throughput", {}).get("rows", {})
    rate = rows.get("PGD-10 PreActResNet-18", {}).get("images_per_s")
    if rate is None:
        import measuring
        import methods

        network = dict(name="preact_resnet", depth=18)
        case = methods.build(methods.settings("pgd_at", network), network, dtype="bfloat16")
        steps = {"": methods.ibjax_steps(case, 512)}
        measuring.warm_up(steps, [])
        rate = 512 / measuring.alternate(steps, 1, 3).seconds[""][0]
    return 0.85 * rate * max(60 * given.minutes - RESERVE_S, 15)


def collect_training(out: Path, workdir: Path) -> None:
    """What the training part has left in its folder, also where it was stopped."""
    from ibjax.runs import metrics

    records = {file.stem: files.read_json(file) for file in sorted(workdir.glob("eval/*/*.json"))}
    for record in records.values():
        del record["config"]  # stands beside the records already
    update(out, "training", records=records, metrics=metrics.read(workdir / "metrics.jsonl"))


def collect_tests(out: Path, log: str) -> None:
    """Counts and failures from pytest's verbose lines, also where it was stopped."""
    outcomes = re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)", log, re.MULTILINE)
    counts = {word.lower(): sum(outcome == word for _, outcome in outcomes) for word in ("PASSED", "FAILED", "ERROR")}
    failures = [test for test, outcome in outcomes if outcome in ("FAILED", "ERROR")]
    update(out, "tests", **counts, skipped=len(outcomes) - sum(counts.values()), failures=failures, tail=log[-4000:])


# ---- the parent ----------------------------------------------------------------------------------------------


def run_part(name: str, given: argparse.Namespace, limit: float, workdir: Path) -> None:
    """Runs one part within `limit` seconds and records how it ended."""
    paths = [f"--out={given.out}", f"--workdir={workdir}"] + ([f"--data={given.data}"] if given.data else [])
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], f"--part={name}", *paths]
    if name == "tests":
        tests = "tests/test_losses.py" if given.quick else "tests"
        options = ["-v", "--tb=short", "-o", "addopts=--strict-markers", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *options, "-m", "not slow", tests]
    print(f"{name}: at most {limit:.0f} s", flush=True)
    begun, log, status = time.perf_counter(), workdir.with_name(f"{name}.log"), "stopped from outside"
    try:
        with started(command, log) as process:
            code = process.wait(limit)
        status = "done" if code == 0 else f"failed, exit code {code}"
    except subprocess.TimeoutExpired:
        status = f"stopped after {limit:.0f} s"
    finally:
        update(given.out, name, status=status, seconds=round(time.perf_counter() - begun, 1))
        text = log.read_text(encoding="utf-8", errors="replace")
        if name == "tests":
            collect_tests(given.out, text)
        elif name == "training":
            collect_training(given.out, workdir)
        if status != "done":
            update(given.out, name, tail=text[-4000:])
    print(f"{name}: {status}", flush=True)


def run_all(given: argparse.Namespace) -> None:
    """All parts one after the other; unused time passes on to those that come later."""
    end = time.perf_counter() + 60 * given.total_minutes
    given.out.unlink(missing_ok=True)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    update(given.out, "run", date=date, command=sys.argv, python=platform.python_version(), quick=given.quick)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/cache")  # the parts share compiled programs
        for i, name in enumerate(given.parts):
            later = given.parts[i:]
            left = end - time.perf_counter() - (60 * given.minutes if "training" in later else 0)
            limit = 60 * given.minutes
            if name != "training":
                limit = left * SHARES[name] / sum(SHARES.get(part, 0) for part in later)
            if name in NEED_DATA and not (given.data or given.quick):
                update(given.out, name, status="left out: no --data")
            elif name == "autoattack" and importlib.util.find_spec("torchattacks") is None:
                update(given.out, name, status="left out: torchattacks is not installed")
            elif limit < 5:
                update(given.out, name, status="left out: no time")
            else:
                run_part(name, given, limit, Path(folder) / "run")
    print(given.out)


def main() -> None:
    """The command line."""
    parser = bare(__file__, __doc__)
    parser.add_argument("--out", type=files.path, help="default: results/device-DATE.json, or device-quick-DATE.json")
    parser.add_argument("--data", type=files.path, help="to train on: class folders, or an .npz in Keras's layout")
    parser.add_argument("--minutes", type=float, help="for training, its compilation and evaluation; default 2.5")
    parser.add_argument("--total-minutes", type=float, default=9.5, help="for everything")
    parser.add_argument("--peak-tflops", type=float, help="of the accelerator in bf16; default: known for some")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=PARTS, help=",".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes and synthetic data, to try the script")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--workdir", type=files.path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"--parts {', '.join(unknown)} is unknown; allowed: {', '.join(PARTS)}")
    if given.minutes is None:
        given.minutes = 1.0 if given.quick else 2.5 if given.data else 0.0
    if given.quick:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads wait for each other on a busy machine
    default = ROOT / "results" / f"device-{'quick-' * given.quick}{datetime.date.today()}.json"
    given.out = (given.out or default).resolve()
    given.data = given.data.resolve() if given.data else None
    if not given.part:
        refuse_other(given.out)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a `finally` stops the part that runs
        run_all(given)
        return
    import measuring

    if "environment" not in files.read_json(given.out):
        update(given.out, "environment", **measuring.environment())
    parts = dict(step=step, throughput=throughput, training=training, autoattack=autoattack, methods=methods)
    parts[given.part](given)


if __name__ == "__main__":
    errors.exit_with(main)
