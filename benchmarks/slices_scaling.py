"""Strong and weak scaling of three recipes over TPU slices, on paper: what the compiler counts, and what follows.

    pip install -e '.[tpu]'
    python benchmarks/slices_scaling.py [--minutes=9] [--out=FILE]

No slice is needed. The train step of the WideResNets is compiled for four v5e chips at two batches and two depths; from
these a slice's figures follow, for one chip with b images:

    FLOPs(n, b), bytes(n, b) = (1, n, b, n·b) · c        n residual blocks in each of the three stages
    S(n, b)                                              bytes that chips exchange in a step, from the same terms
    T_chip                   = max(FLOPs / peak, bytes / bandwidth)
    T_link                   = f·(N − 1)/N·S / (L·w)     f = 2 for an all-reduce, 1 for the others; L links of w bytes/s

The last line is that of the chip with the fewest links: L is 4 where both axes of the slice are rings (16 chips long),
else 2, as in a corner. Most of S are gradients, which are as large as the weights. FAST-IBD's figures are those of the
whole recipe in results/slices-v5e-2x2.json, its FLOPs and bytes in proportion to b. The efficiency of a slice of N
chips lies between T_chip / (T_chip + T_link), if nothing overlaps, and T_chip / max(T_chip, T_link). A step takes
longer: latency, and kernels that reach neither peak, are left out.

Strong scaling keeps the batch of the recipe's row in CASES for all chips together, weak scaling the images of a chip.
"Wang et al." is TRADES on WRN-70-16 at batch 1,024 (Wang et al., "Better Diffusion Models Further Improve Adversarial
Training", ICML 2023), whose generated images change no figure here.

Each compilation has its own process and takes minutes; the same command continues, with exit code 75 after --minutes.
Writes results/slices-scaling.json, a page for each slice (results/slices-v5e-16.md …) and the figure
results/slices-scaling.svg.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measuring import markdown
from parts import ROOT, bare, done, made_by, reason, update

from ibjax import errors, files
from ibjax.training.ahead import CHIPS, GIB

RESULTS, TOPOLOGY = ROOT / "results", "v5e:2x2"


class Case(NamedTuple):
    """A recipe, and how it is compiled."""

    title: str
    config: str
    changes: tuple[str, ...]  # overrides of the recipe
    teacher: str  # recipe of the teacher; "": none
    blocks: int | None  # residual blocks in each stage of the real network; None: the program of slices.py is taken
    batch: int  # of all chips together, in strong scaling
    weak: int  # images of a chip in weak scaling
    compiled: tuple[int, ...]  # images of a chip in the compiled programs


_WANG = ("--config.objective.beta=5.0", "--config.model.width=16", "--config.model.activation=silu",
         "--config.ema_decay=0.995", "--config.smoothing.delta=0.1")  # fmt: skip
CASES = {
    "ibd_wrn": Case("IBD, WRN-34-10", "ibd_wrn:ibd", (), "trades_wrn:ibd", 5, 1024, 32, (8, 32)),
    "wang": Case("Wang et al., WRN-70-16", "trades_wrn:ibd", _WANG, "", 11, 1024, 32, (8, 32)),
    "fast_ibd": Case("FAST-IBD, ResNet-50 on ImageNet", "ibd_imagenet:fast_ibd-2", (), "", None, 2048, 32, (128,)),
}
KNOWN = RESULTS / "slices-v5e-2x2.json"  # of slices.py, which compiles whole recipes for the same chips
DEPTHS = (1, 2)  # blocks in each stage of the compiled WideResNets


class Slice(NamedTuple):
    """A slice of a TPU; sources: Cloud TPU's documentation, and for the links "How to Scale Your Model", 2025."""

    title: str
    kind: str  # JAX's device_kind
    chips: int
    links: int  # of the chip that has the fewest
    link: float  # bytes per second of a link in one direction


SLICES = {
    "v5e-16": Slice("v5e, 4 × 4", "TPU v5 lite", 16, 2, 45e9),
    "v5e-64": Slice("v5e, 8 × 8", "TPU v5 lite", 64, 2, 45e9),
    "v5e-256": Slice("v5e, 16 × 16", "TPU v5 lite", 256, 4, 45e9),
    "v6e-256": Slice("v6e, 16 × 16", "TPU v6 lite", 256, 4, 90e9),
}
_TWICE = ("all-reduce",)  # sends every byte twice: a reduce-scatter and an all-gather


# ---- compiling ---------------------------------------------------------------------------------------------


def programs() -> dict[str, tuple[str, int | None, int]]:
    """{name: (case, blocks, images of a chip)} of all that is compiled."""
    found = {}
    for name, case in CASES.items():
        for blocks, images in itertools.product(DEPTHS if case.blocks else (None,), case.compiled):
            found[f"{name} {blocks or 'whole'} {images}"] = (name, blocks, images)
    return found


def known() -> dict[str, Any]:
    """What slices.py has compiled of `programs`."""
    rows = files.read_json(KNOWN)
    return {name: rows[CASES[case].config] for name, (case, blocks, _) in programs().items() if blocks is None}


def compiled(
    config: str, changes: list[str], teacher: str, blocks: int | None, images: int, topology: str
) -> dict[str, Any]:
    """The figures of one program; for a process of its own. `changes` are overrides, `images` those of a chip."""
    import jax

    from ibjax.runs import recipe_files
    from ibjax.training import ahead

    jax.config.update("jax_platforms", "cpu")
    mesh = ahead.slice_mesh(topology)

    def load(recipe, changes=()):
        made = recipe_files.override(recipe_files.load(f"{ROOT}/configs/{recipe.replace(':', '.py:')}"), list(changes))
        if blocks is not None:
            made.model.depth = 6 * blocks + 4
        return made

    settings = load(config, changes)
    settings.batch_size = images * mesh.size
    shape, classes = ahead.images_of(settings.data, None, None)
    streamed = settings.data.name == "stream"
    teachers = {"teacher": load(teacher)} if teacher else {}
    settings = ahead.prepare(settings, shape, classes, teachers)
    found = ahead.compile_step(settings, mesh, None if streamed else 50_000)
    return {**found, "collectives": [item._asdict() for item in found["collectives"]]}


def in_new_process(*arguments: Any) -> dict[str, Any]:
    """`compiled` in a process of its own; {"error": …} where it fails."""
    from ibjax.training import ahead

    command = [sys.executable, __file__, f"--child={json.dumps(arguments)}"]
    environment = {**os.environ, **ahead.WITHOUT_CHIPS}
    process = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", errors="replace")
    if process.returncode:
        return {"error": reason(process.returncode, process.stderr)}
    return json.loads(process.stdout.splitlines()[-1])


def compile_all(out: Path, wanted: dict[str, tuple], minutes: float) -> tuple[dict[str, Any], int]:
    """Compiles what `out` does not hold yet: {name: arguments of `compiled`}; (content, how many are left)."""
    deadline, source, left = time.monotonic() + 60 * minutes, made_by(), 0
    known = files.read_json(out) if out.is_file() else {}
    update(out, "run", versions=", ".join(f"{name} {version}" for name, version in source["versions"].items()))
    for name, arguments in wanted.items():
        row = known.get(name, {})
        if done(row or None, source | {"commit": row.get("commit")}):
            continue
        if time.monotonic() > deadline:
            left += 1
            continue
        update(out, name, **{"error": "", **in_new_process(*arguments), **source})
        row = files.read_json(out)[name]
        print(name, row["error"] or f"{row['compile_seconds']:.0f} s, {row['memory'] / GIB:.2f} GiB", flush=True)
    return files.read_json(out), left


# ---- what follows ------------------------------------------------------------------------------------------


def exchanged(found: dict[str, Any]) -> float:
    """The bytes that a chip sends in a step, but for the factor (N − 1)/N."""
    return sum((2 if c["kind"] in _TWICE else 1) * c["bytes"] for c in found["collectives"] if c["depth"] == 0)


class Figures(NamedTuple):
    """Of one chip and one step."""

    flops: float
    bytes: float
    exchanged: float


def figures(case: str, content: dict[str, Any], images: float) -> Figures | None:
    """The figures of the real network with so many images on a chip; None while programs are missing."""
    chosen = CASES[case]
    points = [(blocks, at, content.get(name)) for name, (own, blocks, at) in programs().items() if own == case]
    if any(found is None or found["error"] for *_, found in points):
        return None
    n = chosen.blocks

    def at(field):
        values = np.array([found[field] if isinstance(field, str) else field(found) for *_, found in points])
        if n is None:  # one program: in proportion to the images
            return float(values[0]) * (images / points[0][1] if isinstance(field, str) else 1.0)
        terms = np.array([[1, blocks, b, blocks * b] for blocks, b, _ in points], float)
        weights = np.linalg.solve(terms, values)
        return float(np.array([1, n, images, n * images]) @ weights)

    def constant(found):
        return exchanged(found)

    return Figures(at("flops"), at("bytes"), at(constant))


class Bound(NamedTuple):
    """Of one step on a slice, in seconds, and the efficiencies that it bounds."""

    chip: float
    link: float

    @property
    def least(self) -> float:
        """The efficiency if nothing overlaps."""
        return self.chip / (self.chip + self.link)

    @property
    def most(self) -> float:
        """The efficiency if all communication overlaps with computation."""
        return self.chip / max(self.chip, self.link)


def bound(found: Figures, place: Slice) -> Bound:
    """The least times of a step."""
    chip = CHIPS[place.kind]
    link = found.exchanged * (place.chips - 1) / place.chips / (place.links * place.link)
    return Bound(max(found.flops / chip.flops, found.bytes / chip.bandwidth), link)


def page(name: str, content: dict[str, Any]) -> str:
    """The table of a slice."""
    place, rows = SLICES[name], []
    for case, chosen in CASES.items():
        for kind, images in (("strong", chosen.batch / place.chips), ("weak", chosen.weak)):
            found = figures(case, content, images)
            if found is None:
                rows.append((chosen.title, kind, f"{images:g}", "not compiled yet", *[""] * 6))
                continue
            times, chip = bound(found, place), CHIPS[place.kind]
            limit = "FLOPs" if found.flops / chip.flops >= found.bytes / chip.bandwidth else "bytes"
            share = found.flops / chip.flops / (times.chip + times.link)
            rows.append((
                chosen.title, kind, f"{images:g}", f"{found.flops / 1e12:.3g}", f"{found.bytes / 1e9:.3g}",
                f"{found.exchanged / 1e6:.3g}", f"{1e3 * times.chip:.3g} ({limit})", f"{1e3 * times.link:.2g}",
                f"{100 * times.least:.1f} to {100 * times.most:.0f}", f"{100 * share:.0f}",
                f"{images * place.chips / (times.chip + times.link):,.0f}",
            ))  # fmt: skip
    heads = ("recipe", "scaling", "images of a chip", "TFLOP", "GB of memory", "MB exchanged", "ms of a chip, at least",
             "ms of its links, at least", "% efficiency", "% of peak, at most", "images/s, at most")  # fmt: skip
    chip, source = CHIPS[place.kind], content.get("run", {})
    text = f"{place.chips} chips, {place.title}: {chip.flops / 1e12:.0f} TFLOP/s and {chip.bandwidth / 1e9:.0f} GB/s a "
    text += (
        f"chip, {place.links} links of {place.link / 1e9:.0f} GB/s in each direction. Figures of one chip and step, "
    )
    text += f"from programs compiled for {TOPOLOGY} (benchmarks/slices_scaling.py); nothing was measured. "
    text += f"{source.get('versions', '')}"
    return f"{markdown(heads, rows)}\n\n{text.strip()}\n"


def draw(content: dict[str, Any], file: Path) -> None:
    """Strong and weak scaling of every case in one figure."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9.0, 3.6), layout="constrained")
    panels = drawn.subplots(1, 2, sharey=True)
    counts = (4, 16, 64, 256)
    shapes = {"TPU v5 lite": (2, 2, 2, 4), "TPU v6 lite": (2, 2, 2, 4)}
    for colour, (case, chosen) in enumerate(CASES.items()):
        for kind, style, speed in (("TPU v5 lite", "-", 45e9), ("TPU v6 lite", "--", 90e9)):
            for panel, strong in zip(panels, (True, False), strict=True):
                least, most = [], []
                for count, links in zip(counts, shapes[kind], strict=True):
                    found = figures(case, content, chosen.batch / count if strong else chosen.weak)
                    if found is None:
                        break
                    times = bound(found, Slice("", kind, count, links, speed))
                    least.append(100 * times.least)
                    most.append(100 * times.most)
                else:
                    label = f"{chosen.title}, {'v5e' if style == '-' else 'v6e'}"
                    panel.fill_between(counts, least, most, color=f"C{colour}", alpha=0.08)
                    panel.plot(counts, least, style, marker="o", markersize=3, color=f"C{colour}", label=label)
    for panel, title in zip(panels, ("strong: one batch for all chips", "weak: 32 images on each chip"), strict=True):
        panel.set_xscale("log", base=2)
        panel.set_xticks(counts, [str(count) for count in counts])
        panel.set_xlabel("chips")
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("efficiency in %, without overlap (line)\nto full overlap (band)")
    panels[1].legend(fontsize=7)
    with files.replacing(file) as temporary:
        drawn.savefig(temporary, format="svg", metadata={"Date": None})


# ---- the command -------------------------------------------------------------------------------------------


def main() -> None:
    """The command line."""
    parser = bare(__file__, __doc__)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no compilation after so long")
    parser.add_argument("--out", type=files.path, default=RESULTS / "slices-scaling.json")
    parser.add_argument("--child", type=json.loads, help="one program, printed")
    given = parser.parse_args()
    if given.child:
        print(json.dumps(compiled(*given.child)))
        return
    wanted = {
        name: (CASES[case].config, CASES[case].changes, CASES[case].teacher, blocks, images, TOPOLOGY)
        for name, (case, blocks, images) in programs().items()
        if blocks is not None
    }
    content, left = compile_all(given.out, wanted, given.minutes)
    content |= known()
    for name in SLICES:
        file = given.out.with_name(f"slices-{name}.md")
        file.write_text(page(name, content), encoding="utf-8")
        print(file)
    draw(content, given.out.with_suffix(".svg"))
    if left:
        print(f"{left} programs are left; the same command goes on")
        sys.exit(errors.EXIT_PREEMPTED)


if __name__ == "__main__":
    errors.exit_with(main)
