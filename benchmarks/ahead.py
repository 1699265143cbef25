"""Compiles every compiled part of the package for a GPU or a TPU that this machine lacks; counts what it costs.

    pip install -e '.[cuda13]'      or '.[tpu]'
    python benchmarks/ahead.py [--topology=h200] [--programs='attack *'] [--out=FILE]
    python benchmarks/ahead.py --topology=v5e:2x2             its first chip

The programs are those of `programs.py`: each objective's train step and each perturbation (ResNet-18, batch 512,
bfloat16, teachers WRN-34-10), each attack of an evaluation by name and each analysis (float32, a batch of 500), and
PGD-AT's train step of each architecture on images of 32 and of 224 pixels. Nothing is run, and neither card, chip nor
driver is needed.

For a GPU, "in loops" counts the kernels in the bodies of loops, such as PGD's step; each body counts once. GB are the
bytes that kernels read and write. Nothing is autotuned, so a real card may need more temporary memory.

For a TPU, the milliseconds are what its compiler expects by its own cost model, and no measurement: of the body of the
loop that takes longest, such as PGD's step, and of the rest, in which the body of any other loop counts once. Kernels
over three times their bound (`ibjax.training.hlo`) are counted, and the slowest of them is named. Sorts and
factorisations have no estimate, and are counted.

Each program has its own process, so that a crash of the compiler affects that program only. The same command continues
where it was stopped, and retries programs that did not compile. A program is compiled again if the code or a version
has changed since, or with --keep only if a version has. Writes a JSON file and the table beside it.
"""

import argparse
import fnmatch
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import measuring
from jax.sharding import Mesh, NamedSharding
from parts import ROOT, bare, compile_rows, from_child

from ibjax import errors, files
from ibjax.devices import cluster, cores
from ibjax.training import ahead, hlo


def table_of_programs() -> dict[str, Any]:
    """name -> what builds it."""
    import programs

    return {**programs.TABLE, **programs.ARCHITECTURES}


def compiled(name: str, topology: str, texts: Path | None = None) -> dict[str, Any]:
    """The numbers of one program; for a process of its own."""
    import programs

    mesh = ahead.slice_mesh(topology)
    mesh = Mesh(mesh.devices.ravel()[:1], mesh.axis_names, axis_types=mesh.axis_types)
    replicated = NamedSharding(mesh, cluster.REPLICATED)
    with cores.elsewhere("cuda" if topology in ahead.GPUS else "tpu"):
        program = table_of_programs()[name](programs.FULL, mesh)
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), jax.eval_shape(program.make)
        )
        began = time.perf_counter()
        lowered = program.call.lower(*shapes)
        traced = time.perf_counter()
        made = lowered.compile()
    compiled_at = time.perf_counter()
    if texts is not None:
        texts.mkdir(parents=True, exist_ok=True)
        (texts / f"{name.replace(' ', '_')}.txt").write_text(made.as_text(), encoding="utf-8")
    memory = made.memory_analysis()
    assert memory is not None
    if topology in ahead.GPUS:
        counted = ahead.kernels(made.as_text())._asdict()
    else:
        expected = hlo.estimate(made.as_text(), ahead.CHIPS[mesh.devices.flat[0].device_kind], attack_steps=2)
        assert expected is not None
        slow = [kernel._asdict() for kernel in expected.kernels if kernel.slow()]
        counted = {"loop_ms": expected.attack_step_ms, "rest_ms": expected.rest_ms, "slow_kernels": slow}
        counted["unpriced"] = expected.unpriced
    return {
        "trace_seconds": round(traced - began, 1),
        "compile_seconds": round(compiled_at - traced, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        **counted,
    }


def in_new_process(name: str, topology: str, texts: Path | None = None) -> dict[str, Any]:
    """The numbers of one program, or {"error": …}; its text goes to the folder `texts`."""
    unfiltered = dict(JAX_TRACEBACK_FILTERING="off")  # the last line is the error
    words = [f"--topology={topology}", f"--child={name}", *([f"--hlo={texts}"] if texts else [])]
    return from_child(__file__, *words, environment=unfiltered)


def table(content: dict[str, Any]) -> str:
    """All programs so far, in Markdown."""
    gpu = content["run"]["topology"] in ahead.GPUS
    counts = ("kernels in loops", "GB", "kernels outside", "GB")
    expected = (
        "loop, estimated ms",
        "rest, estimated ms",
        "kernels over 3 × bound",
        "the slowest: ms, bound, operation",
        "without estimate",
    )
    sizes = ("GiB of arguments", "of temporaries", "trace, s", "compile, s")
    heads, lines = ("program", *(counts if gpu else expected), *sizes), []
    for name, found in content.items():
        if name == "run":
            continue
        if found["error"]:
            lines.append((name, found["error"], *[""] * (len(heads) - 2)))
            continue
        if gpu:
            loops = (found["in_loops"], f"{found['bytes_in_loops'] / 1e9:.2f}")
            what = (*loops, found["outside"], f"{found['bytes_outside'] / 1e9:.2f}")
        else:
            slow = found["slow_kernels"]
            unpriced = ", ".join(f"{count} {kind}" for kind, count in found.get("unpriced", {}).items())
            first = f"{slow[0]['ms']:.2f}, {slow[0]['bound_ms']:.2f}, {slow[0]['operation'][-50:]}" if slow else ""
            what = (f"{found['loop_ms']:.2f}", f"{found['rest_ms']:.2f}", len(slow), first, unpriced)
        sizes = (f"{found[part] / ahead.GIB:.2f}" for part in ("argument_bytes", "temporary_bytes"))
        lines.append((name, *what, *sizes, found["trace_seconds"], found["compile_seconds"]))
    return measuring.markdown(heads, lines)


def page(content: dict[str, Any]) -> str:
    """The table, and what made its rows, as Markdown."""
    ordered = {each: content[each] for each in ("run", *table_of_programs()) if each in content}
    return f"{table(ordered)}\n\n{measuring.compiled_line('ahead.py', content)}\n"


def main() -> None:
    """The command line."""
    parser = bare(__file__, __doc__)
    parser.add_argument("--topology", default="h200", help="h200, h100, or a TPU slice as v5e:2x2")
    parser.add_argument("--programs", default="*", help="a pattern of names, as 'objective *'")
    parser.add_argument("--out", type=files.path, help="default: results/ahead-TOPOLOGY.json")
    parser.add_argument("--keep", action="store_true", help="leave rows of other commits as they are")
    parser.add_argument("--hlo", type=files.path, help="folder for the texts of the compiled programs")
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
    print(json.dumps(compiled(given.child, given.topology, given.hlo)))


def parent(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """All programs, one after the other."""
    known = table_of_programs()
    ahead.slice_mesh(given.topology)  # says at once where there is no compiler
    chosen = fnmatch.filter(known, given.programs)
    if not chosen:
        parser.error(f"--programs={given.programs} matches none of {', '.join(known)}")
    out = given.out or ROOT / "results" / f"ahead-{given.topology.replace(':', '-')}.json"
    compile_one = lambda name: in_new_process(name, given.topology, given.hlo)  # noqa: E731
    compile_rows(parser, out, given.topology, chosen, compile_one, page, given.keep)


if __name__ == "__main__":
    errors.exit_with(main)
