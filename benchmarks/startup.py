"""How long a run takes to its first step: compile time and all the rest, cold and with the cache of compiled programs.

    python benchmarks/startup.py [--batch 32] [--dtype=float32|bfloat16]

One step of ResNet-18 under PGD-10, and under IBD-10 from a WRN-34-10, each twice in a fresh process with one private
cache: first empty, then with what the first left in it. Seconds to import and find the devices, to trace, to compile
(or load) the step, and from the start of the process to the end of the first step, random weights and their programs
included. Writes a JSON and the table beside it as Markdown.
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
    page = measuring.Page("startup", given.out, table)
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
