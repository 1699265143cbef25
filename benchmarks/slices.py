"""The memory and cost of the large recipes on a TPU slice: `ibjax.aot` on every WideResNet and ImageNet row.

    pip install -e '.[tpu]'
    python benchmarks/slices.py [--topology=v5e:2x2] [--rows='ibd_*'] [--batch=N] [--out=FILE]

No slice is needed. Each row is compiled with its own batch size (or --batch), in bfloat16, with the generated images of
the published file that it names. Memory is that of one chip. The images/s are the upper bounds that follow from FLOPs
and from bytes, which no run reaches. "≥" marks programs with loops other than the attack's, whose bodies count only
once in FLOPs and bytes. "Collectives" counts the communication of one step; "in loops" counts those inside an attack or
another loop: there are none, except in attacks whose batch-norm uses the statistics of the batch (`attack_bn`).
"Estimated" is what the compiler's own cost model expects of one chip, without communication, and no measurement.

Each row has its own process, which takes minutes on two cores. The same command continues where it was stopped; a row
is compiled again if the code or a version has changed since. Writes a JSON file and the table beside it.
"""

import fnmatch
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import measuring
from parts import ROOT, bare, compile_rows, reason

from ibjax import errors, files
from ibjax.runs import recipe_files
from ibjax.training.ahead import CHIPS, GIB

IMAGENET_TEACHER = "configs/ibd_imagenet.py:fast_at-2"  # a ResNet-50 too; the real one is imported
WANG_TEACHER = "configs/leaderboard.py:wang2023-70_16"  # likewise
MILLIONS = {"1m": 1, "20m": 20, "50m": 50, "ddpm_100m": 100, "pfgmpp_edm_500m": 500}  # of images, by the file's name


def rows() -> dict[str, list[str]]:
    """FILE:ROW -> further options, of every row on a WideResNet or on ImageNet."""
    found = {}
    for file in sorted((ROOT / "configs").glob("*.py")):
        for row in runpy.run_path(str(file)).get("ROWS", ()):
            settings = recipe_files.load(f"{file}:{row}")
            imagenet = settings.data.get("dataset") == "imagenet2012"
            if not imagenet and "wide_resnet" not in str(settings.model) and "wrn" not in row:
                continue
            options = [f"--teacher={IMAGENET_TEACHER}"] if imagenet and settings.teacher.made_by else []
            if row.endswith(",ibd"):
                options = [f"--teacher={WANG_TEACHER}"]
            if extra := settings.data.get("extra"):
                options.append(f"--generated={MILLIONS.get(Path(extra.path).stem, 1)}000000")
            found[f"{file.stem}:{row}"] = options
    return found


def compile_row(name: str, options: list[str], topology: str) -> dict[str, Any]:
    """The numbers of one row, or {"error": …}."""
    file, _, row = name.partition(":")
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, "-m", "ibjax.aot", f"--config=configs/{file}.py:{row}", f"--topology={topology}"]
        command += [*options, f"--json={found}"]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace")
        if process.returncode:
            return {"error": reason(process.returncode, process.stderr)}
        return files.read_json(found)


def table(content: dict[str, Any]) -> str:
    """All rows so far, in Markdown."""
    heads = ("recipe", "batch", "GiB of a chip", "TFLOP of a step and chip", "images/s, FLOPs", "images/s, bytes",
             "collectives of a step", "in loops", "estimated: ms of an attack step", "of the rest", "of a step",
             "% of peak", "images/s", "kernels over 3 × bound")  # fmt: skip
    lines = []
    for name, found in content.items():
        if name == "run":
            continue
        if found["error"]:
            lines.append((name, found["error"], *[""] * 12))
            continue
        chip = CHIPS[found["kind"]]
        full = " (does not fit)" if found["memory"] > chip.hbm else ""
        each = sum(item["count"] for item in found["collectives"] if item["depth"] == 0)
        peaks = (chip.flops / found["flops"], chip.bandwidth / found["bytes"])
        bounds = (f"{found['batch_size'] * peak:,.0f}" for peak in peaks)
        size = (
            found["batch_size"],
            f"{found['memory'] / GIB:.2f}{full}",
            f"{'≥ ' * bool(found['other_loops'])}{found['flops'] / 1e12:.2f}",
        )
        lines.append((name, *size, *bounds, each, _in_loops(found), *_expected(found)))
    filled = [column for column in range(len(heads)) if any(line[column] != "" for line in lines)]
    return measuring.markdown([heads[column] for column in filled], [[line[i] for i in filled] for line in lines])


def _expected(found):
    """The columns on the time that the compiler expects; empty for a row of before they were there."""
    expected = found.get("estimated")
    if expected is None:
        return [""] * 6
    times = (f"{expected[part]:.2f}" for part in ("attack_step_ms", "rest_ms", "step_ms"))
    share, rate = f"{100 * expected['share_of_peak']:.0f}", f"{expected['images_per_s']:,.0f}"
    return *times, share, rate, len(found["slow_kernels"])


def caption(content: dict[str, Any]) -> str:
    """What stands below the table."""
    made = content["run"]
    text = f"{made['topology']}, {made['date']}. Compiled, not run."
    rows = [row for name, row in content.items() if name != "run" and not row["error"]]
    if old := [row for row in rows if "estimated" not in row]:
        which = "The rows" if len(old) == len(rows) else "Rows without an estimate"
        text += f" {which} are of the code of 2026-11-22, before batch-norm read its input once: since then an IBD "
        text += "step of that depth has 73 collectives in place of 135."
    looping = [name for name, row in content.items() if name != "run" and not row["error"] and _in_loops(row)]
    if looping and all(_recipe(name).attack_bn == "batch" for name in looping):
        text += " The collectives in loops are those of batch-norm, which uses the statistics of the batch in these "
        text += "attacks (`attack_bn`), as in the authors' code."
    return text


def _in_loops(found):
    """The number of a row's collectives that are in loops."""
    return sum(item["count"] for item in found["collectives"] if item["depth"] > 0)


def _recipe(name):
    """The configuration of FILE:ROW."""
    return recipe_files.load(str(ROOT / "configs" / name.replace(":", ".py:")))


def main() -> None:
    """The command line."""
    parser = bare(__file__, __doc__)
    parser.add_argument("--topology", default="v5e:2x2", help="KIND:SHAPE; every batch must divide among its chips")
    parser.add_argument("--rows", default="*", help="a pattern of FILE:ROW")
    parser.add_argument("--batch", type=int, help="in place of the rows' own")
    parser.add_argument("--out", type=files.path, help="default: results/slices-TOPOLOGY[-batch-N].json")
    given = parser.parse_args()
    batch = "" if given.batch is None else f"-batch-{given.batch}"
    out = given.out or ROOT / "results" / f"slices-{given.topology.replace(':', '-')}{batch}.json"
    chosen = {name: options for name, options in rows().items() if fnmatch.fnmatch(name, given.rows)}
    if given.batch is not None:
        chosen = {name: [*options, f"--config.batch_size={given.batch}"] for name, options in chosen.items()}
    if not chosen:
        parser.error(f"--rows={given.rows} matches none of {', '.join(rows())}")
    page = lambda content: f"{table(content)}\n\n{caption(content)}\n"  # noqa: E731
    compile_rows(
        parser, out, given.topology, chosen, lambda name: compile_row(name, chosen[name], given.topology), page
    )


if __name__ == "__main__":
    errors.exit_with(main)
