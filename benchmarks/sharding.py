"""A network larger than a chip, on paper: WRN-94-16 at batch 4,096, replicated and with `sharding=fsdp`.

    pip install -e '.[tpu]'
    python benchmarks/sharding.py [--topology=v5e:16x16] [--minutes=9] [--whole] [--out=FILE]

The TRADES train step is compiled for the slice at depths 10, 16 and 22 of width 16 in both ways. Memory, and the bytes
of the collectives, grow by the same amount with every residual block of each stage, so those of depth 94 follow from
the first two; the third shows by how much that is off. --whole compiles depth 94 itself, which takes about half an hour
on two cores for each way.

"In the attack" counts collectives inside a loop of the step, where the weights must not be gathered. Each compilation
has its own process; the same command continues, with exit code 75 after --minutes. Writes a JSON file,
results/sharding-TOPOLOGY.json, and the table beside it.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from measuring import in_words, markdown
from parts import ROOT, bare, done, from_child, made_by, update

from ibjax import errors, files
from ibjax.training.ahead import CHIPS, GIB

WAYS, BATCH, DEPTHS, WHOLE = ("replicated", "fsdp"), 4096, (1, 2, 3), 15


def compiled(way: str, blocks: int, topology: str) -> dict[str, Any]:
    """The figures of one program; for a process of its own."""
    import jax

    from ibjax.runs import recipe_files
    from ibjax.training import ahead

    jax.config.update("jax_platforms", "cpu")
    settings = recipe_files.load(f"{ROOT / 'configs' / 'trades_wrn.py'}")
    settings.model.update(depth=6 * blocks + 4, width=16)
    settings.update(batch_size=BATCH, sharding=way)
    settings = ahead.prepare(settings, (32, 32, 3), 10, {})
    found = ahead.compile_step(settings, ahead.slice_mesh(topology), 50_000)
    return {**found, "collectives": [item._asdict() for item in found["collectives"]]}


def in_new_process(*arguments: Any) -> dict[str, Any]:
    """`compiled` in a process of its own; {"error": …} where it fails."""
    from ibjax.training import ahead

    return from_child(__file__, f"--child={json.dumps(arguments)}", environment=ahead.WITHOUT_CHIPS)


def compile_all(out: Path, wanted: list[tuple[str, int]], topology: str, minutes: float) -> tuple[dict[str, Any], int]:
    """Compiles what `out` does not hold yet, (way, blocks) of each; (content, how many are left)."""
    deadline, source, left = time.monotonic() + 60 * minutes, made_by(), 0
    known = files.read_json(out) if out.is_file() else {}
    update(out, "run", versions=in_words(source["versions"]))
    for way, blocks in wanted:
        name = f"{way} {blocks}"
        row = known.get(name, {})
        if done(row or None, source | {"commit": row.get("commit")}):
            continue
        if time.monotonic() > deadline:
            left += 1
            continue
        update(out, name, **{"error": "", **in_new_process(way, blocks, topology), **source})
        row = files.read_json(out)[name]
        print(name, row["error"] or f"{row['compile_seconds']:.0f} s, {row['memory'] / GIB:.2f} GiB", flush=True)
    return files.read_json(out), left


def of_whole(values: tuple[float, float], blocks: int) -> float:
    """What grows by the same amount with every block: at `blocks` of them, from the values at the first two DEPTHS."""
    return values[0] + (values[1] - values[0]) * (blocks - DEPTHS[0])


def row(way: str, depth: str, memory: float, collectives: dict[tuple[str, bool], float], hbm: float) -> tuple:
    """A line of the table; `collectives` are bytes by kind and by whether they stand in a loop of the step."""
    full = " (does not fit)" if memory > hbm else ""
    kinds = [f"{kind} {size / 1e6:,.0f}" for (kind, inside), size in sorted(collectives.items()) if not inside]
    inside = sum(size for (_, inside), size in collectives.items() if inside)
    return way, depth, f"{memory / GIB:.2f}{full}", ", ".join(kinds), f"{inside / 1e6:,.0f}"


def sizes(found: dict[str, Any]) -> dict[tuple[str, bool], float]:
    """{(kind, whether in a loop of the step): bytes} of a program."""
    made: dict[tuple[str, bool], float] = {}
    for item in found["collectives"]:
        if item["depth"] >= 0:
            key = item["kind"], item["depth"] > 0
            made[key] = made.get(key, 0) + item["bytes"]
    return made


def table(content: dict[str, Any]) -> str:
    """All programs so far, and what follows for depth 94."""
    rows = []
    for way in WAYS:
        found = {n: content.get(f"{way} {n}") for n in (*DEPTHS, WHOLE)}
        found = {n: made for n, made in found.items() if made and not made["error"]}
        for n, made in found.items():
            rows.append(row(way, f"{6 * n + 4}", made["memory"], sizes(made), CHIPS[made["kind"]].hbm))
        if not {*DEPTHS[:2]} <= {*found}:
            continue
        first, second = (found[n] for n in DEPTHS[:2])
        for n in [n for n in (DEPTHS[2], WHOLE) if n not in found or n == DEPTHS[2]]:
            memory = of_whole((first["memory"], second["memory"]), n)
            kinds = {**sizes(first), **sizes(second)}
            moved = {key: of_whole((sizes(first).get(key, 0), sizes(second).get(key, 0)), n) for key in kinds}
            rows.append(row(way, f"{6 * n + 4}, from 10 and 16", memory, moved, CHIPS[first["kind"]].hbm))
    heads = ("sharding", "depth", "GiB of a chip", "MB of a chip and step, by collective", "MB in the attack")
    return markdown(heads, rows)


def main() -> None:
    """The command line."""
    parser = bare(__file__, __doc__)
    parser.add_argument("--topology", default="v5e:16x16", help="KIND:SHAPE; the batch must divide among its chips")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no compilation after so long")
    parser.add_argument("--whole", action="store_true", help="compile depth 94 too")
    parser.add_argument("--out", type=files.path, help="default: results/sharding-TOPOLOGY.json")
    parser.add_argument("--child", type=json.loads, help="one program, printed")
    given = parser.parse_args()
    if given.child:
        print(json.dumps(compiled(*given.child)))
        return
    out = given.out or ROOT / "results" / f"sharding-{given.topology.replace(':', '-')}.json"
    counts = (*DEPTHS, *((WHOLE,) if given.whole else ()))
    wanted = [(way, n) for n in counts for way in WAYS]
    content, left = compile_all(out, wanted, given.topology, given.minutes)
    text = f"TRADES, WRN-depth-16, batch {BATCH:,} on {given.topology}, bfloat16, compiled and not run; "
    text += content["run"]["versions"]
    out.with_suffix(".md").write_text(f"{table(content)}\n\n{text}\n", encoding="utf-8")
    print(out.with_suffix(".md"))
    if left:
        print(f"{left} programs are left; the same command goes on")
        sys.exit(errors.EXIT_PREEMPTED)


if __name__ == "__main__":
    errors.exit_with(main)
