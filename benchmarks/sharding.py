"""Networks larger than a chip, on paper: WRN-94-16, ViT-L/16 and ConvNeXt-L at batch 4,096, replicated and with
`sharding=fsdp`.

    pip install -e '.[tpu]'
    python benchmarks/sharding.py [--topology=v5e:16x16] [--only=vit_l …] [--minutes=9] [--whole] [--out=FILE]

The train step (NETWORKS says of which recipe) is compiled for the slice in both ways, at three depths that are far
below that of the network. Memory, and the bytes of the collectives, grow by the same amount with every block, so those
of the whole network follow from the first two; the third shows by how much that is off. --whole compiles the network
itself, which takes about half an hour on two cores for each way.

"In the attack" counts collectives inside a loop of the step, where the weights must not be gathered. Each compilation
has its own process; the same command continues, with exit code 75 after --minutes. Writes a JSON file,
results/sharding-TOPOLOGY.json, and the table beside it.
"""

import datetime
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from measuring import compiled_line, markdown
from parts import ROOT, bare, compiled_before, done, from_child, made_by, update

from ibjax import errors, files
from ibjax.training.ahead import CHIPS, GIB

WAYS, BATCH = ("replicated", "fsdp"), 4096


class Network(NamedTuple):
    """A network whose depth is a number of blocks, in the train step of a recipe."""

    text: str
    recipe: str  # of configs/
    model: Callable[[int], dict[str, Any]]  # blocks -> settings that differ from the recipe's
    blocks: tuple[int, int, int]  # that are compiled
    whole: int
    shape: tuple[int, int, int]
    images: int | None  # on every device; None: they are streamed
    classes: int


IMAGENET: dict[str, Any] = dict(shape=(224, 224, 3), images=None, classes=1000)
NETWORKS = {
    "wrn": Network(
        "WRN-94-16, TRADES", "trades_wrn.py", lambda n: dict(depth=6 * n + 4, width=16), (1, 2, 3), 15, (32, 32, 3),
        50_000, 10,
    ),
    "vit_l": Network(
        "ViT-L/16, PGD-AT", "leaderboard.py:singh2023-vit_b",
        lambda n: dict(depth=n, width=1024, stem="patch"), (2, 4, 6), 24, **IMAGENET,
    ),
    "convnext_l": Network(  # the depth of its third stage
        "ConvNeXt-L, PGD-AT", "leaderboard.py:singh2023-convnext_l", lambda n: dict(blocks=(3, 3, n, 3)), (3, 6, 9), 27,
        **IMAGENET,
    ),
}  # fmt: skip


def compiled(name: str, way: str, blocks: int, topology: str) -> dict[str, Any]:
    """The figures of one program; for a process of its own."""
    import jax

    from ibjax.runs import recipe_files
    from ibjax.training import ahead

    jax.config.update("jax_platforms", "cpu")
    network = NETWORKS[name]
    settings = recipe_files.load(f"{ROOT / 'configs' / network.recipe}")
    with settings.unlocked():
        settings.model.update(network.model(blocks))
    settings.update(batch_size=BATCH, sharding=way)
    settings = ahead.prepare(settings, network.shape, network.classes, {})
    found = ahead.compile_step(settings, ahead.slice_mesh(topology), network.images)
    return {**found, "collectives": [item._asdict() for item in found["collectives"]]}


def in_new_process(*arguments: Any) -> dict[str, Any]:
    """`compiled` in a process of its own; {"error": …} where it fails."""
    from ibjax.training import ahead

    return from_child(__file__, f"--child={json.dumps(arguments)}", environment=ahead.WITHOUT_CHIPS)


def compile_all(
    out: Path, wanted: list[tuple[str, str, int]], topology: str, minutes: float
) -> tuple[dict[str, Any], int]:
    """Compiles what `out` does not hold yet, (network, way, blocks) of each; (content, how many are left)."""
    deadline, source, left = time.monotonic() + 60 * minutes, made_by(), 0
    known = files.read_json(out)
    for network, way, blocks in wanted:
        name = f"{network} {way} {blocks}"
        row = known.get(name, {})
        if done(row or None, source | {"commit": row.get("commit")}):
            continue
        if time.monotonic() > deadline:
            left += 1
            continue
        update(out, name, **{"error": "", **in_new_process(network, way, blocks, topology), **source})
        update(out, "run", date=datetime.date.today().isoformat())
        row = files.read_json(out)[name]
        print(name, row["error"] or f"{row['compile_seconds']:.0f} s, {row['memory'] / GIB:.2f} GiB", flush=True)
    return files.read_json(out), left


def at_depth(known: dict[int, float], blocks: int) -> float:
    """What grows by the same amount with every block: at `blocks` of them, from {blocks: value} at two depths."""
    (one, first), (two, second) = known.items()
    return first + (second - first) * (blocks - one) / (two - one)


def row(network: str, way: str, depth: str, memory: float, collectives: dict, hbm: float) -> tuple:
    """A line of the table; `collectives` are bytes by kind and by whether they stand in a loop of the step."""
    full = " (does not fit)" if memory > hbm else ""
    kinds = [f"{kind} {size / 1e6:,.0f}" for (kind, inside), size in sorted(collectives.items()) if not inside]
    inside = sum(size for (_, inside), size in collectives.items() if inside)
    return network, way, depth, f"{memory / GIB:.2f}{full}", ", ".join(kinds), f"{inside / 1e6:,.0f}"


def sizes(found: dict[str, Any]) -> dict[tuple[str, bool], float]:
    """{(kind, whether in a loop of the step): bytes} of a program."""
    made: dict[tuple[str, bool], float] = {}
    for item in found["collectives"]:
        if item["depth"] >= 0:
            key = item["kind"], item["depth"] > 0
            made[key] = made.get(key, 0) + item["bytes"]
    return made


def table(content: dict[str, Any]) -> str:
    """All programs so far, and what follows for the whole networks."""
    rows = []
    for name, network in NETWORKS.items():
        *first_two, third = network.blocks
        for way in WAYS:
            found = {n: content.get(f"{name} {way} {n}") for n in (*network.blocks, network.whole)}
            found = {n: made for n, made in found.items() if made and not made["error"]}
            for n, made in found.items():
                which = "whole" if n == network.whole else f"{n} blocks"
                rows.append(row(network.text, way, which, made["memory"], sizes(made), CHIPS[made["kind"]].hbm))
            if not {*first_two} <= {*found}:
                continue
            kinds = {kind for n in first_two for kind in sizes(found[n])}
            for n in dict.fromkeys((third, network.whole)):
                memory = at_depth({m: found[m]["memory"] for m in first_two}, n)
                moved = {k: at_depth({m: sizes(found[m]).get(k, 0.0) for m in first_two}, n) for k in sorted(kinds)}
                which = f"{'whole' if n == network.whole else f'{n} blocks'}, from {first_two[0]} and {first_two[1]}"
                rows.append(row(network.text, way, which, memory, moved, CHIPS[found[first_two[0]]["kind"]].hbm))
    heads = (
        "network",
        "sharding",
        "depth",
        "GiB of a chip",
        "MB of a chip and step, by collective",
        "MB in the attack",
    )
    return markdown(heads, rows)


def page(content: dict[str, Any]) -> str:
    """The table, and what made its rows, as Markdown."""
    text = f"Batch {BATCH:,} on {content['run']['topology']}, bfloat16, compiled and not run; "
    return f"{table(content)}\n\n{text}{compiled_line('sharding.py', content)}\n"


def main() -> None:
    """The command line."""
    parser = bare(__file__, __doc__)
    parser.add_argument("--topology", default="v5e:16x16", help="KIND:SHAPE; the batch must divide among its chips")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no compilation after so long")
    parser.add_argument("--whole", action="store_true", help="compile the whole networks too")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="default: all")
    parser.add_argument("--out", type=files.path, help="default: results/sharding-TOPOLOGY.json")
    parser.add_argument("--child", type=json.loads, help="one program, printed")
    given = parser.parse_args()
    if given.child:
        print(json.dumps(compiled(*given.child)))
        return
    out = given.out or ROOT / "results" / f"sharding-{given.topology.replace(':', '-')}.json"
    wanted = [
        (name, way, n)
        for name in given.only
        for n in (*NETWORKS[name].blocks, *((NETWORKS[name].whole,) if given.whole else ()))
        for way in WAYS
    ]
    compiled_before(parser, out, given.topology)
    update(out, "run", topology=given.topology)
    content, left = compile_all(out, wanted, given.topology, given.minutes)
    out.with_suffix(".md").write_text(page(content), encoding="utf-8")
    print(out.with_suffix(".md"))
    if left:
        print(f"{left} programs are left; the same command goes on")
        sys.exit(errors.EXIT_PREEMPTED)


if __name__ == "__main__":
    errors.exit_with(main)
