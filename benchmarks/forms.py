"""What the forms of `ibjax/devices/forms.py` are worth: programs compiled for an H200 or a TPU, with them and without.

    pip install -e '.[cuda13]' && python benchmarks/forms.py --topology=h200
    pip install -e '.[tpu]' && python benchmarks/forms.py --topology=v5e:2x2 [--rows='loop *'] [--out=FILE]

No card or chip is needed, and nothing is run. Networks are in bfloat16, attacks have ten steps, a distilling method's
teacher is a network like the student. "loop" is PGD alone, "step" a whole train step. For a GPU the table has the
kernels and the GB that they read and write, in the bodies of loops and outside. For a TPU it has the milliseconds that
the compiler itself expects of one chip: its own cost model, by which it chooses tilings, and no measurement.

"Before" is the same program with networks, pooling and crops in the forms of a CPU, as every platform was given them
before there was a table of forms. Each program has its own process. The same command continues where it was stopped.
"""

import argparse
import fnmatch
import json
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import measuring
import methods
from jax.sharding import Mesh, NamedSharding
from parts import ROOT, bare, compile_rows, from_child

from ibjax import errors, files
from ibjax.attacks.pgd import pgd
from ibjax.devices import cluster, cores, forms, precision
from ibjax.net import linen_net
from ibjax.training import ahead, hlo

NETWORKS = {
    "resnet18": methods.RESNET18,
    "preact18": dict(name="preact_resnet", depth=18),
    "vgg16": dict(name="vgg", depth=16),
    "wrn16": dict(name="wide_resnet", depth=16, width=10),
    "wrn34": methods.WRN34,
    "siriib": methods.NETWORKS["siriib"](methods.RESNET18),
}
# of each platform, "loop NETWORK BATCH" or "step OBJECTIVE NETWORK BATCH"
ROWS = {
    "cuda": (
        "loop resnet18 512",
        "loop preact18 512",
        "loop vgg16 512",
        "step pgd_at resnet18 512",
        "step trades resnet18 512",
        "step ibd resnet18 512",
    ),
    "tpu": (
        "loop resnet18 512",
        "loop preact18 512",
        "loop vgg16 512",
        "loop wrn16 128",
        "loop wrn16 512",
        "loop wrn34 128",
        "loop siriib 512",
        "step pgd_at resnet18 512",
    ),
}
PLAIN = forms.TABLE["cpu"]
BEFORE = {name: getattr(PLAIN, name) for name in forms.SINCE_THE_TABLE}


def lowered(row: str, mesh: Mesh) -> Any:
    """The program of a row, lowered for the first device of `mesh`."""
    alone = Mesh(mesh.devices.ravel()[:1], mesh.axis_names, axis_types=mesh.axis_types)
    replicated = NamedSharding(alone, cluster.REPLICATED)
    shaped = lambda tree: jax.tree.map(  # noqa: E731
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), tree
    )
    kind, *objective, network, batch = row.split()
    images = (int(batch), 32, 32, 3)
    if kind == "step":
        case = methods.build(methods.settings(*objective, NETWORKS[network], 10), NETWORKS[network], dtype="bfloat16")
        program = methods.program(case, images[0], images[1:])
        return jax.jit(program.train_step, donate_argnums=0).lower(*shaped(program.shapes(images[0], images[1:])))
    model = methods.network(NETWORKS[network], "bfloat16")
    net, climb = linen_net(model), pgd()
    x, y = jax.ShapeDtypeStruct(images, jnp.float32), jax.ShapeDtypeStruct(images[:1], jnp.int32)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *images[1:])), train=False))

    @precision.at(precision.TRAINING)
    def attack(variables, x, y):
        return climb(jax.random.key(0), lambda x: net.predict(variables, x)[0], x, y)

    return jax.jit(attack).lower(*shaped((variables, x, y)))


def compiled(row: str, topology: str, before: bool) -> dict[str, Any]:
    """The numbers of one program; for a process of its own."""
    mesh = ahead.slice_mesh(topology)
    target = "cuda" if topology in ahead.GPUS else "tpu"
    if before:
        forms.TABLE[target] = forms.TABLE[target]._replace(**BEFORE)
    began = time.perf_counter()
    with cores.elsewhere(target):
        made = lowered(row, mesh).compile()
    found = {"compile_seconds": round(time.perf_counter() - began, 1)}
    if target == "cuda":
        return found | ahead.kernels(made.as_text())._asdict()
    expected = hlo.estimate(made.as_text(), ahead.CHIPS[mesh.devices.flat[0].device_kind], attack_steps=10)
    assert expected is not None
    slow = sum(kernel.slow() for kernel in expected.kernels)
    return found | {"in_loops": expected.attack_step_ms, "outside": expected.rest_ms, "slow_kernels": slow}


def in_new_process(row: str, topology: str) -> dict[str, Any]:
    """The numbers of a row, with these forms and without, or {"error": …}."""
    found: dict[str, Any] = {"compile_seconds": 0}
    for name in ("before", "now"):
        found[name] = from_child(__file__, f"--topology={topology}", f"--child={row}", f"--forms={name}")
        if "error" in found[name]:
            return found[name]
        found["compile_seconds"] += found[name]["compile_seconds"]
    return found


def table(content: dict[str, Any], gpu: bool) -> str:
    """All rows so far, in Markdown."""
    if gpu:
        heads = ("program", "in loops: kernels, GB before", "now", "outside: kernels, GB before", "now")
    else:
        heads = ("program", "loop: estimated ms before", "now", "outside: estimated ms before", "now")
    lines = []
    for row, found in content.items():
        if found["error"]:
            lines.append((row, found["error"], "", "", ""))
            continue
        cells = []
        for place in ("in_loops", "outside"):
            for name in ("before", "now"):
                each = found[name]
                if gpu:
                    cells.append(f"{each[place]}, {each[f'bytes_{place}'] / 1e9:.2f}")
                else:
                    cells.append(f"{each[place]:.2f}")
        lines.append((row, *cells))
    return measuring.markdown(heads, lines)


def page(content: dict[str, Any]) -> str:
    """The table, and what made its rows, as Markdown."""
    topology = content["run"]["topology"]
    gpu = topology in ahead.GPUS
    ordered = {row: content[row] for row in ROWS["cuda" if gpu else "tpu"] if row in content}
    return f"{table(ordered, gpu)}\n\n{measuring.compiled_line('forms.py', content)}\n"


def main() -> None:
    """The command line."""
    parser = bare(__file__, __doc__)
    parser.add_argument("--topology", default="h200", help="h200, or a TPU slice as v5e:2x2; its first chip counts")
    parser.add_argument("--rows", default="*", help="a pattern, as 'loop *'")
    parser.add_argument("--out", type=files.path, help="default: results/forms-TOPOLOGY.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--forms", choices=("before", "now"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ.update(ahead.WITHOUT_CHIPS)
    jax.config.update("jax_platforms", "cpu")
    if given.child:
        print(json.dumps(compiled(given.child, given.topology, given.forms == "before")))
        return
    ahead.slice_mesh(given.topology)  # says at once where there is no compiler
    rows = ROWS["cuda" if given.topology in ahead.GPUS else "tpu"]
    chosen = fnmatch.filter(rows, given.rows)
    if not chosen:
        parser.error(f"--rows={given.rows} matches none of {', '.join(rows)}")
    out = given.out or ROOT / "results" / f"forms-{given.topology.replace(':', '-')}.json"
    compile_rows(parser, out, given.topology, chosen, lambda row: in_new_process(row, given.topology), page)


if __name__ == "__main__":
    errors.exit_with(main)
