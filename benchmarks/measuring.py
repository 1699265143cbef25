"""Shared by the benchmarks: alternating timing, the machine's load and peak FLOP/s, subprocesses, and files."""

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ibjax.runs import provenance

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory of the same GPU

import jax
import numpy as np
from parts import ROOT, added_to, bare, from_child, in_line, refuse_other

from ibjax import errors, files
from ibjax.devices import cluster

BUSY = 0.1  # processors: more than that elsewhere disturbs a round
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "v5 lite": 197, "v5e": 197, "v6 lite": 918, "v6e": 918}  # bf16

Steps = Callable[[int], Any]  # runs so many steps and waits for them; returns the last loss


def noise(batch_size: int, shape: tuple[int, int, int] = (32, 32, 3)) -> tuple[np.ndarray, np.ndarray]:
    """Images (B, H, W, C) float32 in [0, 1] and labels (B,) int32."""
    rng = np.random.default_rng(0)
    return rng.random((batch_size, *shape), np.float32), rng.integers(0, 10, batch_size).astype(np.int32)


# ---- time ----------------------------------------------------------------------------------------------------


class Times(NamedTuple):
    """Of each runner, one entry per round."""

    seconds: dict[str, list[float]]  # per step
    elsewhere: dict[str, list[float]]  # processors that other processes kept busy meanwhile, on average
    disturbed: int  # rounds left out because others were busy

    def record(self) -> dict[str, Any]:
        """As the JSON files have it."""
        return {
            "seconds_per_step": self.seconds,
            "processors_busy_elsewhere": self.elsewhere,
            "disturbed_rounds_left_out": self.disturbed,
        }


def alternate(runners: dict[str, Steps], repeats: int, n: int, quiet: bool = False) -> Times:
    """Times n steps of each runner in each round, one runner after the other in every round.

    With `quiet` a round waits for other processes to rest, and is repeated (50 times at most in all) where they then
    keep a tenth of a processor busy: on two cores one busy neighbour makes OpenMP, and so PyTorch, eight times slower.
    """
    times = Times({name: [] for name in runners}, {name: [] for name in runners}, 0)
    for _ in range(repeats + 50):
        if quiet:
            while busy_elsewhere(lambda: time.sleep(2))[1] > BUSY:
                time.sleep(5)
        row = {name: busy_elsewhere(partial(steps, n)) for name, steps in runners.items()}
        if quiet and max(elsewhere for _, elsewhere in row.values()) > BUSY:
            times = times._replace(disturbed=times.disturbed + 1)
            continue
        for name, (seconds, elsewhere) in row.items():
            times.seconds[name].append(seconds / n)
            times.elsewhere[name].append(round(elsewhere, 2))
        if len(times.seconds[name]) == repeats:
            return times
    raise RuntimeError(f"other processes were busy in {times.disturbed} rounds; measure when the machine is idle")


def busy_elsewhere(call: Callable[[], Any]) -> tuple[float, float]:
    """(seconds that a call takes, processors that other processes keep busy meanwhile)."""
    started, others = time.perf_counter(), others_seconds()
    call()
    seconds = time.perf_counter() - started
    rounding = 3 / os.sysconf("SC_CLK_TCK")  # the kernel counts in ticks of 10 ms, for them and for us
    return seconds, max(others_seconds() - others - rounding, 0.0) / seconds


def others_seconds() -> float:
    """Processor seconds that all other processes have used so far; 0 where Linux's /proc/stat is not there."""
    file = Path("/proc/stat")
    if not file.is_file():
        return 0.0
    user, nice, system = map(int, file.read_text(encoding="utf-8").split()[1:4])
    mine = os.times()
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - mine.user - mine.system


def warm_up(runners: dict[str, Steps], warnings: list[str]) -> dict[str, float]:
    """Compiles every runner with two steps; drops a compiled twin that fails. Returns the seconds each took."""
    took = {}
    for name, steps in list(runners.items()):
        started = time.perf_counter()
        try:
            steps(2)
        except Exception as error:  # torch.compile raises errors of many kinds; eager PyTorch still stands
            if "compiled" not in name:
                raise
            del runners[name]
            warnings.append(f"{name} failed: {' '.join(str(error).split())[:300]}")
            continue
        took[name] = round(time.perf_counter() - started, 2)
    return took


def peak_tflops(dtype: str, given: float | None = None) -> float | None:
    """Dense peak of one device: the given one, or in bfloat16 what is known of this kind of device; else None."""
    if given or dtype != "bfloat16":
        return given
    kind = jax.devices()[0].device_kind
    return next((value for name, value in PEAK_TFLOPS.items() if name in kind), None)


# ---- processes -----------------------------------------------------------------------------------------------


def in_new_process(script: str, work: dict[str, Any], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """What `python script --child=WORK` prints as its last line, a JSON record; {"error": …} where it fails.

    For what only a fresh process shows: its start, its peak of memory, another number of devices. Not on a TPU, which
    serves one process at a time.
    """

    def why(code, log):
        lines = log.strip().splitlines() or [f"ended with {code}, without a word"]
        return lines[-1][:300]

    return from_child(script, f"--child={json.dumps(work)}", environment=environment, why=why)


# ---- files ---------------------------------------------------------------------------------------------------


DEFAULT_OUT = "default: results/SCRIPT-BACKEND-DATE.json, with --quick SCRIPT-quick-BACKEND-DATE.json"


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a script that computes in its own process; what its user can mend ends in one line, as a missing device."""

    def command():
        cluster.backend()
        main()

    errors.exit_with(command)


def command_line(
    description: str, batches: tuple[Sequence[int], Sequence[int]], *, timed: bool = True
) -> argparse.ArgumentParser:
    """A parser with what every script takes; `batches` are the default ones of a CPU and of an accelerator."""
    cpu = jax.default_backend() == "cpu"
    parser = bare(sys.argv[0], description)
    parser.add_argument("--batch", type=int, nargs="+", default=batches[0 if cpu else 1], help="one or more sizes")
    default = "float32" if cpu else "bfloat16"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=default, help="of the networks")
    if timed:
        parser.add_argument("--repeats", type=int, default=5, help="rounds; every contestant runs once in each")
        parser.add_argument("--steps", type=int, default=1 if cpu else 10, help="steps per contestant and round")
        parser.add_argument("--quiet", action="store_true", help="wait for other processes to rest, repeat such rounds")
    parser.add_argument("--out", type=files.path, help=DEFAULT_OUT)
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one round, to try the script")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with the sizes of --quick where it is given."""
    given = parser.parse_args()
    if given.quick:
        given.batch, given.repeats, given.steps = [8], 1, 1
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads wait for each other on a busy machine
    return given


class Page:
    """A JSON file of records with the Markdown table beside it, both whole at any time.

    A file that another command has made is refused, unless the page `adds` to what several calls have found.
    """

    def __init__(
        self,
        benchmark: str,
        out: Path | None,
        table: Callable[[list[dict]], str],
        note: str = "",
        *,
        quick: bool = False,
        adds: bool = False,
    ):
        self.found, self.records, self.table, self.adds = environment(), [], table, adds
        self.about = {"benchmark": benchmark, **({"note": note} if note else {}), **self.found}
        self.out = default_out(benchmark, quick) if out is None else out
        if adds:
            self.records = added_to(self.out, benchmark).get("records", [])
        else:
            refuse_other(self.out)

    def add(self, record: dict[str, Any]) -> None:
        """Writes one more record, and its table to the terminal."""
        self.records.append(record)
        content = {**self.about, "records": self.records}
        files.write_json(self.out, content)
        self.out.with_suffix(".md").write_text(page(content, self.table, self.adds), encoding="utf-8")
        print(*self.table([record]).splitlines()[2:], sep="\n", flush=True)

    def attempt(self, about: dict[str, Any], call: Callable[[], dict[str, Any]]) -> None:
        """Adds what `call` returns; where it fails, as for want of memory, `about` with the error."""
        try:
            record = call()
        except Exception as error:  # whatever it is, the other records are still wanted
            record = {**about, "error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        self.add(record)

    def finish(self) -> None:
        """Says where the table is, and ends the process with 1 where a record has an error."""
        print(self.out.with_suffix(".md"))
        if any("error" in record for record in self.records):
            sys.exit(1)


def default_out(benchmark: str, quick: bool = False) -> Path:
    """The JSON file of a benchmark for which none is given: never the same for a trial at tiny sizes."""
    date = datetime.datetime.now(datetime.UTC).date()
    return ROOT / "results" / f"{benchmark}{'-quick' * quick}-{jax.default_backend()}-{date}.json"


def page(content: dict[str, Any], table: Callable[[list[dict]], str], adds: bool = False) -> str:
    """The table of a JSON file's records with its note, what made it and its warnings; of the last call where it
    `adds`."""
    records = content["records"]
    warnings = dict.fromkeys(warning for record in records for warning in record.get("warnings", ()))
    made = f"{'last call: ' * adds}{provenance_line(content)}"
    about = "; ".join(part for part in (content.get("note"), made) if part)
    return f"{table(records)}\n\n{about}\n" + "".join(f"\n- {warning}" for warning in warnings) + "\n"


def report(benchmark: str, out: Path | None, table: Callable[[list[dict]], str], records: list[dict[str, Any]]) -> None:
    """Prints the page of records that were made before JAX was used here, or writes it; ends with 1 after an error."""
    if out is not None:
        made = Page(benchmark, out, table)
        for record in records:
            made.add(record)
        made.finish()
        return
    print(page({**environment(), "records": records}, table))
    if any("error" in record for record in records):
        sys.exit(1)


def environment() -> dict[str, Any]:
    """Date, hardware and versions, PyTorch's among them."""
    found = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **provenance.environment()}
    found["runtime"] = jax.devices()[0].client.platform_version.splitlines()[0]  # with CUDA's version on GPUs
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.+)", cpuinfo.read_text(encoding="utf-8")) if cpuinfo.is_file() else []
    found["processor"] = models[0] if models else platform.processor()
    try:
        import torch
    except ImportError:
        return found
    found["versions"] = {**found["versions"], "torch": torch.__version__}
    return found


# what numbers depend on; the last two are there only where they are not the defaults
_MADE_BY = ("commit", "versions", "hardware", "jax_settings", "xla_flags")


def kept(out: Path, found: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call has written into `out`, to be continued; empty where there is nothing.

    Empty too, and said so, where other code, versions, hardware or settings than those of `found`, our `environment()`,
    have made it: their numbers are not ours.
    """
    before = files.read_json(out) if out.is_file() else {}
    changed = [key for key in _MADE_BY if before and before.get(key) != found.get(key)]
    if changed:
        print(f"{out} is of other {', '.join(changed)}: measured again", file=sys.stderr, flush=True)
    return {} if changed else before


def in_words(versions: Mapping[str, str]) -> str:
    """Versions on one line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def provenance_line(found: Mapping[str, Any]) -> str:
    """The command, commit, hardware, versions and date of an `environment()` on one line."""
    command = f"{in_line(found['command'], found.get('xla_flags', ''))}, commit {found['commit']}"
    parts = (command, found["hardware"], in_words(found["versions"]), found.get("date", "")[:10])
    return "; ".join(part for part in parts if part)


def compiled_line(script: str, content: Mapping[str, Any]) -> str:
    """What made the rows of a file of compiled programs, which several calls may have filled."""
    commits: dict[str, set[str]] = {}  # of each set of versions
    for name, row in content.items():
        if name != "run":
            versions = in_words(row.get("versions") or content["run"].get("versions", {}))
            commits.setdefault(versions, set()).add(row.get("commit", "unknown"))
    run = content["run"]
    command = f"`python benchmarks/{script} --topology={run['topology']}`"
    made = (f"commits: {', '.join(sorted(of))}{'; ' * bool(versions)}{versions}" for versions, of in commits.items())
    return "; ".join((command, *made, f"last compiled: {run.get('date', 'unknown')}"))


def markdown(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join('' if cell is None else str(cell) for cell in line)} |" for line in lines)


def spread(times: Sequence[float], digits: str = ".4g", unit: float = 1.0) -> str:
    """As "median (min – max)"."""
    middle, low, high = (format(unit * f(times), digits) for f in (statistics.median, min, max))
    return f"{middle} ({low} – {high})"


def ratio(times: Sequence[float], base: Sequence[float]) -> str:
    """The quotients of the same rounds as "min – median – max"."""
    return "{min:.2f} – {median:.2f} – {max:.2f}".format(**quotients(times, base))


def ratio_of_medians(times: Sequence[float], base: Sequence[float], digits: str = ".2f") -> str:
    """The quotient of medians, for what was timed one after the other and not in the same rounds."""
    return format(statistics.median(times) / statistics.median(base), digits)


def quotients(times: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Of the same rounds: {"min", "median", "max"}."""
    ratios = [one / other for one, other in zip(times, base, strict=True)]
    return {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)}
