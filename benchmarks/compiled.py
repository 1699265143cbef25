"""Measures compiled train steps, objective by objective: FLOPs relative to the expected count, and memory.

    python benchmarks/compiled.py --what=flops    [--objective=all] [--batch 8]
    python benchmarks/compiled.py --what=memory   [--objective=all] [--batch 128] [--microbatches 1 2 4]

| flops  | FLOPs of the compiled step with unrolled attack, divided by what its method needs (`ibjax.analysis.flops`), |
|        | both in compiled forward passes; IBD also with a WRN-34-10 teacher. The quotient should be at most 1.05     |
| memory | temporary buffers and arguments (state, batch, teachers) as planned by the compiler; on an accelerator also |
|        | the peak memory of a process that takes one step, including everything that it holds                        |

Networks and teachers are ResNet-18 on 32×32 images; the attack has ten steps. Nothing is timed. Every row of `memory`
runs in its own process, so that one which runs out of memory does not affect the others. Writes a JSON file and the
table beside it as Markdown.
"""

import itertools
import json
from functools import partial
from typing import Any

import jax
import measuring
import methods
from methods import Section

from ibjax.analysis import flops

MIB = 2**20
SHAPE = (32, 32, 3)


def count(name: str, network: Section, teacher: Section, attack_steps: int, batch_size: int) -> dict[str, Any]:
    """The record of one objective's FLOPs."""
    given = methods.settings(name, network, attack_steps)
    made = methods.program(methods.build(given, teacher, unroll=True), batch_size)
    state, batch, _, frozen = made.shapes(batch_size, SHAPE)
    cost = flops.step_cost(made.train_step, made.bind_net, state, batch, frozen)
    ratio, *taught = (cost[part] / cost["forward"] for part in ("step", "teacher", "assistant"))
    expected = flops.expected_forwards(given, *taught)
    return {
        "objective": name,
        "teacher": dict(teacher) if frozen else None,
        "batch": batch_size,
        "attack_steps": attack_steps,
        "flops": cost,
        "ratio": ratio,
        "expected": expected,
        "quotient": ratio / expected if expected else None,
    }


def flops_table(records: list[dict]) -> str:
    """The records as Markdown."""
    heads = ("objective", "teacher", "compiled, in forward passes", "needed", "quotient")
    rows = []
    for record in records:
        if "error" in record:
            rows.append((record["objective"], "", record["error"], "", ""))
            continue
        needed = (f"{record['expected']:.2f}", f"{record['quotient']:.3f}") if record["expected"] else ("", "")
        rows.append((record["objective"], label(record["teacher"]), f"{record['ratio']:.2f}", *needed))
    return measuring.markdown(heads, rows)


def label(section: Section | None) -> str:
    """A network in a table."""
    return "" if section is None else " ".join(str(value) for value in section.values())


def memory(
    name: str, network: Section, attack_steps: int, batch_size: int, dtype: str, microbatches: int
) -> dict[str, Any]:
    """The record of one objective's memory, in a fresh process."""
    case = methods.build(methods.settings(name, network, attack_steps), network, dtype=dtype)
    made = methods.program(case, batch_size, SHAPE, microbatches)
    lowered = jax.jit(made.train_step, donate_argnums=0).lower(*made.shapes(batch_size, SHAPE))
    planned = lowered.compile().memory_analysis()
    peak = None
    if jax.default_backend() != "cpu":
        methods.ibjax_steps(case, batch_size, SHAPE, microbatches)(1)
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "temporary_bytes": planned.temp_size_in_bytes,
        "argument_bytes": planned.argument_size_in_bytes,
        "peak_bytes_in_use": peak,
    }


def memory_table(records: list[dict]) -> str:
    """The records as Markdown."""
    kinds = ("temporary_bytes", "argument_bytes", "peak_bytes_in_use")
    heads = ("objective", "batch", "dtype", "microbatches", "temporary, MiB", "arguments, MiB", "peak in use, MiB")
    rows = []
    for record in records:
        cells = [f"{record[kind] / MIB:,.0f}" if record.get(kind) is not None else "" for kind in kinds]
        if "error" in record:
            cells[0] = record["error"]
        rows.append((*(record[key] for key in ("objective", "batch", "dtype", "microbatches")), *cells))
    return measuring.markdown(heads, rows)


def main() -> None:
    """The command line."""
    parser = measuring.command_line(__doc__, batches=((), ()), timed=False)
    parser.add_argument("--what", choices=("flops", "memory"), default="flops")
    parser.add_argument("--objective", default="all", help=f"all, or some of {','.join(methods.NAMES)}")
    parser.add_argument("--microbatches", type=int, nargs="+", default=(1, 2, 4))
    parser.add_argument("--child", type=json.loads, help="of --what=memory: one row, printed")
    given = measuring.parse(parser)
    if given.child:
        print(json.dumps(memory(**given.child)))
        return
    names = methods.chosen(parser, given.objective)
    network, attack_steps = (methods.TINY, 1) if given.quick else (methods.RESNET18, 10)
    table = {"flops": flops_table, "memory": memory_table}[given.what]
    page = measuring.Page(given.what, given.out, table, quick=given.quick)
    if given.what == "flops":
        for name in names:
            teachers = [network] + ([methods.WRN34] if name == "ibd" and not given.quick else [])
            for teacher, batch_size in itertools.product(teachers, given.batch or (8,)):
                work = (name, network, teacher, attack_steps, batch_size)
                page.attempt(dict(objective=name, batch=batch_size), partial(count, *work))
    else:
        default = (128,) if jax.default_backend() == "cpu" else (512,)
        for name, batch_size, parts in itertools.product(names, given.batch or default, given.microbatches):
            work = dict(name=name, batch_size=batch_size, dtype=given.dtype, microbatches=parts)
            found = measuring.in_new_process(__file__, {**work, "network": network, "attack_steps": attack_steps})
            about = dict(objective=name, batch=batch_size, dtype=given.dtype, microbatches=parts)
            page.add({**about, **found})
    page.finish()


if __name__ == "__main__":
    measuring.run(main)
