"""Strong and weak scaling of three recipes over TPU slices, on paper: what the compiler has counted, and what follows.

    python benchmarks/slices_scaling.py [--out=FOLDER]

Needs no slice and compiles nothing: it reads what slices.py has compiled for four v5e chips
(results/slices-v5e-2x2.json). For one chip of a slice of N chips, with b images:

    FLOPs(b), bytes(b) = (b / b') · those of the compiled program, which has b' images on a chip
    S                  = bytes of its collectives in a step: gradients, as large as the weights, for any b and N
    T_chip             = max(FLOPs / peak, bytes / bandwidth)
    T_link             = f·(N − 1)/N·S / (L·w)     f = 2 for an all-reduce, 1 for the others; L links of w bytes/s

T_link is what the chip with the fewest links needs at least: L is 4 where both axes of the slice are rings (16 chips
long), else 2, as in a corner. The efficiency of a slice lies between T_chip / (T_chip + T_link), if nothing overlaps,
and T_chip / max(T_chip, T_link). A step takes longer than both: latency, kernels that reach neither peak, and the
traffic of the weights, which does not shrink with b, are left out.

WRN-70-16 (Wang et al., "Better Diffusion Models Further Improve Adversarial Training", ICML 2023: TRADES at batch
1,024) is not compiled. Its FLOPs are those of TRADES on WRN-34-10 times the quotient of the multiply-adds of both
networks, its S times that of the parameters, its bytes times that of (depth − 4)·width, as activations are.

Strong scaling has one batch for all chips, weak scaling 32 images on each. Writes a page for each slice
(results/slices-v5e-16.md, slices-v5e-64.md, slices-v5e-256.md, slices-v6e-256.md) and results/slices-scaling.svg.
"""

from pathlib import Path
from typing import Any, NamedTuple

from measuring import markdown
from parts import ROOT, bare

from ibjax import errors, files
from ibjax.analysis.complexity import complexity
from ibjax.models import wide_resnet
from ibjax.training.ahead import CHIPS

RESULTS = ROOT / "results"
WEAK = 32  # images of a chip


class Case(NamedTuple):
    """A recipe."""

    title: str
    row: str  # of the compiled programs
    batch: int  # of all chips together, in strong scaling
    network: tuple[int, int] | None = None  # depth and width of the WideResNet in place of the row's
    compiled: tuple[int, int] = (34, 10)  # those of the row's


CASES = (
    Case("IBD, WRN-34-10", "ibd_wrn:ibd", 1024),
    Case("Wang et al., WRN-70-16", "trades_wrn:ibd", 1024, (70, 16)),
    Case("FAST-IBD, ResNet-50 on ImageNet", "ibd_imagenet:fast_ibd-2", 2048),
)


class Slice(NamedTuple):
    """A slice of a TPU; sources: Cloud TPU's documentation; of the links: "How to Scale Your Model", Austin et al."""

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


class Figures(NamedTuple):
    """Of one chip and one step."""

    flops: float
    bytes: float
    exchanged: float  # bytes that it sends, but for the factor (N − 1)/N


def figures(case: Case, content: dict[str, Any], images: float) -> Figures:
    """The figures of a recipe with so many images on a chip."""
    found = content[case.row]
    part = images / (found["batch_size"] / found["chips"])
    sent = sum((2 if c["kind"] in _TWICE else 1) * c["bytes"] for c in found["collectives"] if c["depth"] == 0)
    of = Figures(found["flops"] * part, found["bytes"] * part, sent)
    return of if case.network is None else Figures(*(a * b for a, b in zip(of, quotients(case), strict=True)))


def quotients(case: Case) -> Figures:
    """Of a case's network to the compiled one: multiply-adds, activations, parameters."""
    assert case.network is not None
    large, small = (
        complexity(wide_resnet.Model(num_classes=10, depth=depth, width=width), (32, 32, 3))
        for depth, width in (case.network, case.compiled)
    )
    activations = [(depth - 4) * width for depth, width in (case.network, case.compiled)]
    return Figures(
        large.operations.total() / small.operations.total(),
        activations[0] / activations[1],
        large.parameters.total() / small.parameters.total(),
    )


class Bound(NamedTuple):
    """The least seconds of a step on a slice, and the efficiencies that they bound."""

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


def page(place: Slice, content: dict[str, Any]) -> str:
    """The table of a slice."""
    rows, chip = [], CHIPS[place.kind]
    for case in CASES:
        for kind, images in (("strong", case.batch / place.chips), ("weak", WEAK)):
            found = figures(case, content, images)
            times = bound(found, place)
            limit = "FLOPs" if found.flops / chip.flops >= found.bytes / chip.bandwidth else "bytes"
            share = found.flops / chip.flops / (times.chip + times.link)
            rows.append((
                case.title, kind, f"{images * place.chips:,.0f}", f"{images:g}", f"{found.flops / 1e12:.3g}",
                f"{found.bytes / 1e9:.3g}", f"{found.exchanged / 1e6:,.0f}", f"{1e3 * times.chip:.3g} ({limit})",
                f"{1e3 * times.link:.2g}", f"{100 * times.least:.1f} to {100 * times.most:.1f}", f"{100 * share:.0f}",
                f"{images * place.chips / times.chip:,.0f}",
            ))  # fmt: skip
    heads = ("recipe", "scaling", "batch", "images of a chip", "TFLOP", "GB of memory traffic", "MB sent",
             "ms of a chip, at least", "ms of its links, at least", "efficiency, %", "% of peak without overlap",
             "images/s, at most")  # fmt: skip
    text = f"{place.chips} chips, {place.title}: {chip.flops / 1e12:.0f} TFLOP/s and {chip.bandwidth / 1e9:.0f} GB/s a "
    text += (
        f"chip, at least {place.links} links of {place.link / 1e9:.0f} GB/s in each direction. Figures of a chip and "
    )
    text += "step, from benchmarks/slices_scaling.py; nothing was measured, and nothing compiled for this slice. They "
    text += "follow from [what the compiler counted for four v5e chips](slices-v5e-2x2.md) on 2026-11-22; those of "
    text += "WRN-70-16 are scaled from TRADES on WRN-34-10.\n\n"
    text += f"![Strong and weak scaling]({FIGURE})"
    return f"{markdown(heads, rows)}\n\n{text}\n"


FIGURE = "slices-scaling.svg"


def draw(content: dict[str, Any], file: Path) -> None:
    """Strong and weak scaling of every case in one figure."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9.0, 3.6), layout="constrained")
    panels = drawn.subplots(1, 2, sharey=True)
    counts = (16, 64, 256)
    for colour, case in enumerate(CASES):
        for style, name in (("-", "v5e-256"), ("--", "v6e-256")):
            for panel, strong in zip(panels, (True, False), strict=True):
                found = [
                    bound(
                        figures(case, content, case.batch / count if strong else WEAK),
                        SLICES[name]._replace(chips=count, links=4 if count == 256 else 2),
                    )
                    for count in counts
                ]
                least, most = ([100 * getattr(times, side) for times in found] for side in ("least", "most"))
                panel.fill_between(counts, least, most, color=f"C{colour}", alpha=0.08)
                label = f"{case.title}, {name.partition('-')[0]}"
                panel.plot(counts, least, style, marker="o", markersize=3, color=f"C{colour}", label=label)
    titles = ("strong: batch 1,024, ImageNet 2,048", f"weak: {WEAK} images on each chip")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_xscale("log", base=2)
        panel.set_xticks(counts, [str(count) for count in counts])
        panel.set_xlabel("chips")
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("efficiency in %: line without overlap,\nband up to full overlap")
    panels[1].legend(fontsize=7, loc="lower left")
    with files.replacing(file) as temporary, rc_context({"svg.hashsalt": "slices"}):  # the same file each time
        drawn.savefig(temporary, format="svg", metadata={"Date": None})


def main() -> None:
    """The command line."""
    parser = bare(__file__, __doc__)
    parser.add_argument("--out", type=files.path, default=RESULTS, help="folder of the pages and the figure")
    given = parser.parse_args()
    content = files.read_json(RESULTS / "slices-v5e-2x2.json")
    for name, place in SLICES.items():
        file = given.out / f"slices-{name}.md"
        file.write_text(page(place, content), encoding="utf-8")
        print(file)
    draw(content, given.out / FIGURE)


if __name__ == "__main__":
    errors.exit_with(main)
