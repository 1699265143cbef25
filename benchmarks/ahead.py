"""Compiles every compiled part of the package for a GPU that this machine lacks, and counts kernels, bytes and memory.

    pip install -e '.[cuda13]'
    python benchmarks/ahead.py [--topology=h200] [--programs='attack *'] [--out=FILE]

The programs are those of `programs.py`: each objective's train step and each perturbation (ResNet-18, batch 512,
bfloat16, teachers WRN-34-10), each attack of an evaluation by name and each analysis (float32, a batch of 500). Nothing
is run, and no card or driver is needed. "In loops" counts the kernels in the bodies of loops, such as PGD's step; each
body counts once. GB are the bytes that kernels read and write. Nothing is autotuned, so a real card may need more
temporary memory.

Each program has its own process, so that a crash of the compiler affects that program only. The same command continues
where it was stopped, and retries programs that did not compile. Writes a JSON file and the table beside it.
"""

import argparse
import datetime
import fnmatch
import json
import os
import subprocess
import sys
import time
from typing import Any

import jax
import measuring
from jax.sharding import NamedSharding
from parts import ROOT, bare, compile_rows, reason

from ibjax import errors, files
from ibjax.devices import cluster, cores
from ibjax.runs import provenance
from ibjax.training import ahead


def compiled(name: str, topology: str) -> dict[str, Any]:
    """The numbers of one program; for a process of its own."""
    import programs

    mesh = ahead.slice_mesh(topology)
    replicated = NamedSharding(mesh, cluster.REPLICATED)
    with cores.elsewhere("cuda"):
        program = programs.TABLE[name](programs.FULL, mesh)
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), jax.eval_shape(program.make)
        )
        began = time.perf_counter()
        lowered = program.call.lower(*shapes)
        traced = time.perf_counter()
        made = lowered.compile()
    memory = made.memory_analysis()
    assert memory is not None
    return {
        "trace_seconds": round(traced - began, 1),
        "compile_seconds": round(time.perf_counter() - traced, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        **ahead.kernels(made.as_text())._asdict(),
    }


def in_new_process(name: str, topology: str) -> dict[str, Any]:
    """The numbers of one program, or {"error": …}."""
    command = [sys.executable, __file__, f"--topology={topology}", f"--child={name}"]
    environment = {**os.environ, "JAX_TRACEBACK_FILTERING": "off"}  # the last line is the error
    options = dict(cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace", env=environment)
    process = subprocess.run(command, **options)
    if process.returncode:
        return {"error": reason(process.returncode, process.stderr)}
    return json.loads(process.stdout.strip().splitlines()[-1])


def table(content: dict[str, Any]) -> str:
    """All programs so far, in Markdown."""
    heads = ("program", "kernels in loops", "GB", "kernels outside", "GB", "GiB of arguments", "of temporaries",
             "trace, s", "compile, s")  # fmt: skip
    lines = []
    for name, found in content.items():
        if name == "run":
            continue
        if found["error"]:
            lines.append((name, found["error"], *[""] * 7))
            continue
        sizes = (f"{found[part] / ahead.GIB:.2f}" for part in ("argument_bytes", "temporary_bytes"))
        loops = (found["in_loops"], f"{found['bytes_in_loops'] / 1e9:.2f}")
        rest = (found["outside"], f"{found['bytes_outside'] / 1e9:.2f}")
        lines.append((name, *loops, *rest, *sizes, found["trace_seconds"], found["compile_seconds"]))
    return measuring.markdown(heads, lines)


def main() -> None:
    """The command line."""
    parser = bare(__file__, __doc__)
    parser.add_argument("--topology", default="h200", choices=sorted(ahead.GPUS))
    parser.add_argument("--programs", default="*", help="a pattern of names, as 'objective *'")
    parser.add_argument("--out", type=files.path, help="default: results/ahead-TOPOLOGY-DATE.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ.update(ahead.WITHOUT_CHIPS)
    jax.config.update("jax_platforms", "cpu")
    if given.child:
        child(given)
    else:
        parent(parser, given)


def child(given: argparse.Namespace) -> None:
    """One program, printed."""
    print(json.dumps(compiled(given.child, given.topology)))


def parent(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """All programs, one after the other."""
    import programs

    ahead.slice_mesh(given.topology)  # says at once where there is no compiler
    chosen = fnmatch.filter(programs.TABLE, given.programs)
    if not chosen:
        parser.error(f"--programs={given.programs} matches none of {', '.join(programs.TABLE)}")
    out = given.out or ROOT / "results" / f"ahead-{given.topology}-{datetime.date.today()}.json"
    versions = ", ".join(" ".join(item) for item in provenance.versions().items())

    def page(content):
        ordered = {each: content[each] for each in programs.TABLE if each in content}
        return f"{table(ordered)}\n\n{given.topology}; {versions}; {content['run']['date']}\n"

    compile_rows(parser, out, given.topology, chosen, lambda name: in_new_process(name, given.topology), page)


if __name__ == "__main__":
    errors.exit_with(main)
