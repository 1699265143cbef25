"""Runs all benchmarks that fit this machine, one after another; writes a dated JSON file and its tables beside it.

    python benchmarks/all.py [--quick] [--quiet] [--parts=pgd,flops,…] [--workdir=runs/small_cnn] [--out=FILE]

| part        | script               | what                                                                            |
|-------------|----------------------|---------------------------------------------------------------------------------|
| pgd         | train_step.py        | the PGD-10 step against PyTorch, at two batch sizes                             |
| two_devices | train_step.py        | the same with a CPU divided into two devices; on CPUs only                      |
| objectives  | train_step.py        | the step of every objective but SiRIIB against PyTorch                          |
| information | information.py       | time of the nHSIC, mask and SVD terms, next to the step that contains them      |
| cost        | cost.py              | the cost that each of the four methods adds to PGD-AT                           |
| scaling     | scaling.py           | cost against batch, image, layers of HSIC, devices                              |
| startup     | startup.py           | compile time and time to the first step, cold and cached                        |
| flops       | compiled.py          | compiled FLOPs over their count, all but SiRIIB; always compiled for a CPU      |
| memory      | compiled.py          | memory of every objective, in 1, 2 and 4 microbatches                           |
| attacks     | attacks_vs_torch.py  | robust accuracy and time against torchattacks, on the network of --workdir      |
| autoattack  | autoattack.py        | AutoAttack's parts against torchattacks', on the network of --workdir           |
| invariance  | invariance.py        | AutoAttack's flags against batch size, devices, interruptions; of --workdir     |

Problem sizes depend on the backend, CPU or accelerator. Every part runs in its own process. A part that fails is
reported and does not stop the others; a part whose requirements are missing is skipped with a message. The same command
continues where it was stopped and keeps finished parts. On an idle machine with 2 cores all parts take hours; --quick
tries everything at tiny sizes.
"""

import argparse
import datetime
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from parts import ROOT, bare, in_line, started, update

from ibjax import errors, files
from ibjax.errors import InputError
from ibjax.runs import provenance

HERE = Path(__file__).resolve().parent


class Part(NamedTuple):
    """A script with its options."""

    script: str
    cpu: str = ""  # options on a CPU
    accelerator: str = ""
    quick: str = "--quick"  # added by --quick
    timed: bool = True  # takes --quiet
    needs: tuple[str, ...] = ()  # modules, "workdir" or "cpu"
    environment: tuple[str, ...] = ()  # NAME=VALUE


TORCHATTACKS = ("torch", "torchattacks")
PARTS = {
    "pgd": Part("train_step.py", "--batch 32 128", "--batch 128 512"),
    "two_devices": Part("train_step.py", "--batch 32 128 --devices=2", needs=("cpu",),
                        environment=("JAX_NUM_CPU_DEVICES=2",)),
    "objectives": Part("train_step.py", "--objective=all --batch 32 --repeats=3", "--objective=all --repeats=3",
                       "--quick --objective=trades,ibd,shared_information"),
    "information": Part("information.py"),
    "cost": Part("cost.py"),
    "scaling": Part("scaling.py"),
    "startup": Part("startup.py", timed=False),
    "flops": Part("compiled.py", "--what=flops", "--what=flops", "--quick --objective=mart,ibd", timed=False,
                  environment=("JAX_PLATFORMS=cpu",)),
    "memory": Part("compiled.py", "--what=memory", "--what=memory", "--quick --objective=ibd --microbatches 1 2",
                   timed=False),
    "attacks": Part("attacks_vs_torch.py", quick="--n=16 --repeats=1 --only=pgd", timed=False,
                    needs=(*TORCHATTACKS, "workdir")),
    "autoattack": Part("autoattack.py", "--rounds=2", "--n=1024 --rounds=2", "--n=16 --steps=2 --queries=5",
                       timed=False, needs=(*TORCHATTACKS, "workdir")),
    "invariance": Part("invariance.py", "", "--n=1024", "--n=4", timed=False, needs=("workdir",)),
}  # fmt: skip


def missing(part: Part, workdir: Path | None, backend: str) -> str:
    """Why a part cannot run here, or ""."""
    for need in part.needs:
        if need == "workdir":
            if workdir is None:
                return "needs --workdir, of a run of configs/small_cnn.py"
        elif need == "cpu":
            if backend != "cpu":
                return "is for CPUs"
        elif importlib.util.find_spec(need) is None:
            return f"needs {need}, which is not installed"
    return ""


def command(name: str, given: argparse.Namespace, backend: str, out: Path) -> list[str]:
    """The command line of a part."""
    part = PARTS[name]
    options = (part.cpu if backend == "cpu" else part.accelerator).split()
    if given.quick:
        options += part.quick.split()
    options += ["--quiet"] * (given.quiet and part.timed and not given.quick)
    options += [f"--workdir={given.workdir}"] if "workdir" in part.needs else []
    return [sys.executable, str(HERE / part.script), *options, f"--out={out}"]


def run_part(name: str, given: argparse.Namespace, backend: str) -> str:
    """Runs one part, records it and returns how it ended."""
    folder = given.out.with_suffix(".parts")  # what is half done, and the logs
    folder.mkdir(parents=True, exist_ok=True)
    log, found = folder / f"{name}.log", folder / f"{name}.json"
    line, environment = command(name, given, backend, found), PARTS[name].environment
    begun = time.perf_counter()
    with started(line, log, dict(pair.split("=") for pair in environment)) as process:
        code = process.wait()
    status = "done" if code == 0 else f"failed, exit code {code}"
    record = files.read_json(found) if found.is_file() else {}
    table = found.with_suffix(".md")
    record |= {"table": table.read_text(encoding="utf-8")} if table.is_file() else {}
    tail = {} if code == 0 else {"tail": log.read_text(encoding="utf-8", errors="replace")[-2000:]}
    seconds = round(time.perf_counter() - begun, 1)
    about = {"status": status, "command": line[1:], "environment": environment, "seconds": seconds}
    update(given.out, name, **{**record, **about, **tail})
    return status


def page(content: dict) -> str:
    """The results in Markdown: where they come from, a section for each part, and what is not there."""
    run = content["run"]
    lines = [f"# Benchmarks, {run['backend']}, {run['date'][:10]}", ""]
    if commands := [in_line(call) for call in run.get("commands", ())]:
        lines += [f"{'; '.join(commands)}; commit {run.get('commit', 'unknown')}", ""]
    absent = []
    for name, part in content.items():
        if name == "run":
            continue
        if "table" in part:
            script = shlex.join(word for word in part["command"] if not word.startswith("--out="))
            line = " ".join([*part["environment"], "python", script.replace(f"{HERE}/", "benchmarks/")])
            lines += [f"## {name}", "", f"`{line}`", "", part["table"], ""]
        if part["status"] != "done":
            absent.append(f"- {name}: {part['status']}")
    return "\n".join(lines + (["## Not done", "", *absent, ""] if absent else []))


def default_backend() -> str:
    """JAX's, asked in a process of its own: an accelerator must be free for the parts."""
    imports = "from ibjax import errors; from ibjax.devices import cluster"
    code = f"{imports}; errors.exit_with(lambda: print(cluster.backend()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", cwd=ROOT)
    if done.returncode:
        raise InputError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    return done.stdout.strip()


def main() -> None:
    """The command line."""
    parser = bare(__file__, __doc__)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the scripts")
    parser.add_argument("--quiet", action="store_true", help="wait for other processes to rest while timing")
    parser.add_argument("--workdir", type=files.path, help="of a run of configs/small_cnn.py, for the parts on attacks")
    parser.add_argument("--out", type=files.path, help="default: results/benchmarks-BACKEND-DATE.json")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} is unknown; allowed: {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part that runs is ended too
    backend = default_backend()
    kind = "quick-" if given.quick else ""
    default = ROOT / "results" / f"benchmarks-{kind}{backend}-{datetime.date.today()}.json"
    given.out = (given.out or default).resolve()
    given.workdir = given.workdir.resolve() if given.workdir else None
    if given.quick:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads wait for each other on a busy machine
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    known = files.read_json(given.out) if given.out.is_file() else {}
    if known and known["run"]["quick"] != given.quick:
        parser.error(
            f"--out={given.out} holds a run with{'' if known['run']['quick'] else 'out'} --quick; give another"
        )
    commit = provenance.commit()
    if known and known["run"].get("commit", commit) != commit:
        parser.error(f"--out={given.out} holds a run of {known['run']['commit']}, this is {commit}; give another")
    run = {"date": date, "backend": backend, "quick": given.quick, "commit": commit}
    calls = known.get("run", {}).get("commands", [])
    calls = calls if sys.argv in calls else [*calls, sys.argv]
    update(given.out, "run", **(run if not known else {}), commands=calls)

    failed = False
    for name in given.parts:
        if known.get(name, {}).get("status") == "done":
            print(f"{name}: was done before", flush=True)
            continue
        if reason := missing(PARTS[name], given.workdir, backend):
            update(given.out, name, status=f"left out: {reason}")
        else:
            failed |= run_part(name, given, backend) != "done"
        content = files.read_json(given.out)
        given.out.with_suffix(".md").write_text(page(content), encoding="utf-8")
        print(f"{name}: {content[name]['status']}", flush=True)
    print(given.out.with_suffix(".md"))
    sys.exit(failed)


if __name__ == "__main__":
    errors.exit_with(main)
