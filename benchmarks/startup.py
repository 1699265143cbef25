"""Measures the time to the first step of a run, by part, with an empty and with a filled compilation cache.

    python benchmarks/startup.py [--batch 32] [--dtype=float32|bfloat16]

The step is one of PGD-10 on ResNet-18, or of IBD-10 with a WRN-34-10 teacher. Each runs twice, in a fresh process with
a private cache, which is empty at first and filled by the first run for the second. The table shows seconds to import
and find the devices, to trace, to compile (or load) the step, and from the start of the process to the end of the first
step, including the programs that initialise the weights. Writes a JSON file and the table beside it as Markdown.
"""

import json
import tempfile
import time
from typing import Any

import jax
import measuring
import methods
from methods import Section

PARTS = ("import_s", "trace_s", "compile_s", "first_step_s", "total_s")


def measure(
    name: str, network: Section, teacher: Section, attack_steps: int, batch_size: int, dtype: str, launched: float
) -> dict[str, float]:
    """Seconds by part, in a fresh process that was launched at the given time."""
    imported = time.time()
    case = methods.build(methods.settings(name, network, attack_steps), teacher, dtype=dtype)
    made = methods.program(case, batch_size)
    state, frozen = jax.block_until_ready(jax.jit(made.init)())
    x, y = measuring.noise(batch_size)
    batch, key = {"image": x, "label": y}, jax.random.key(1)

    begun = time.time()
    lowered = jax.jit(made.train_step, donate_argnums=0).lower(state, batch, key, frozen)
    traced = time.time()
    compiled = lowered.compile()
    ready = time.time()
    jax.block_until_ready(compiled(state, batch, key, frozen))
    done = time.time()
    return dict(
        zip(
            PARTS,
            (imported - launched, traced - begun, ready - traced, done - ready, done - launched),
            strict=True,
        )
    )


def table(records: list[dict]) -> str:
    """The records as Markdown."""
    heads = (
        "objective",
        "batch",
        "dtype",
        "cache",
        *(part.removesuffix("_s").replace("_", " ") + ", s" for part in PARTS),
    )
    rows = []
    for record in records:
        cells = [record["error"], "", "", "", ""] if "error" in record else [f"{record[part]:.1f}" for part in PARTS]
        rows.append((*(record[key] for key in ("objective", "batch", "dtype", "cache")), *cells))
    return measuring.markdown(heads, rows)


def main() -> None:
    """The command line."""
    parser = measuring.command_line(__doc__, batches=((32,), (512,)), timed=False)
    parser.add_argument("--child", type=json.loads, help="one row, printed")
    given = measuring.parse(parser)
    if given.child:
        print(json.dumps(measure(**given.child)))
        return
    sizes = dict(network=methods.RESNET18, teacher=methods.WRN34, attack_steps=10)
    if given.quick:
        sizes = dict(network=methods.TINY, teacher=methods.TINY, attack_steps=1)
    page = measuring.Page("startup", given.out, table, quick=given.quick)
    for name, batch_size in ((n, b) for n in ("pgd_at", "ibd") for b in given.batch):
        with tempfile.TemporaryDirectory() as folder:
            cache = dict(JAX_COMPILATION_CACHE_DIR=folder, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
            for state in ("cold", "cached"):
                work = dict(name=name, batch_size=batch_size, dtype=given.dtype, launched=time.time(), **sizes)
                found: dict[str, Any] = measuring.in_new_process(__file__, work, cache)
                page.add(dict(objective=name, batch=batch_size, dtype=given.dtype, cache=state, **found))
    page.finish()


if __name__ == "__main__":
    measuring.run(main)
