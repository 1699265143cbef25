"""Writes docs/leaderboard.md: what the recipes of configs/leaderboard.py cost, beside what their papers reach.

    python docs/leaderboard.py             writes the page
    python docs/leaderboard.py --check     ends with 1 where the page is not what it would write

The costs are computed from the recipes: forward passes of a step (`ibjax.analysis.flops`), multiply-adds of the network
(`ibjax.analysis.complexity`), images of the data set, and the throughput that was measured on a card.
"""

import functools
import importlib.util
import json
import re

from generated import DOCS, command
from ml_collections import ConfigDict

from ibjax import config
from ibjax.analysis.complexity import complexity
from ibjax.analysis.flops import expected_forwards
from ibjax.data import IMAGES
from ibjax.runs import run
from ibjax.training.ahead import CHIPS

RECIPE = DOCS.parent / "configs" / "leaderboard.py"
TRAIN = {"cifar10": 50_000, "imagenet2012": 1_281_167}  # images of the whole training set
# measured: one NVIDIA H200, jax 0.11.2, commit 7d910cc, bfloat16, batch 256, PGD-10 training of WRN-28-10 on noise
MEASURED = dict(images_per_s=1814, forwards=23, network=dict(name="wide_resnet", depth=28, width=10))
PEAK = CHIPS["NVIDIA H200 141GB HBM3e"].flops  # dense bfloat16, which is the H100 SXM's too, by NVIDIA's data sheets
HEAD = """# What the leaderboard's recipes cost

This page lists what it costs to train each row of [configs/leaderboard.py](../configs/leaderboard.py). It is generated
by `python docs/leaderboard.py`; a test keeps it current. *clean* and *AutoAttack* are the published accuracies in
percent.

*passes*: forward passes that a step takes for each image, an input gradient counting as two and an update as three. A
teacher's passes are counted in units of the student's. *EFLOP*: steps · batch · passes · two FLOP for each multiply-add
of the network, without validation and evaluation. *H100 hours*: these FLOP at {share:.1f} % of {peak:.0f} TFLOP/s, the
share that PGD-10 training of WRN-28-10 reached ({rate:,} images/s; one H200, jax 0.11.2, commit 7d910cc, bfloat16,
batch 256; [record](../results/train-step-h200-2026-11-26.md)): an H100 has the H200's peak but less bandwidth. For
ConvNeXt, ViT and Swin nothing has been measured: *≥* stands before the hours at 100 % of the peak, a lower bound. *–*:
the passes of this method are not tabulated.

| row | network | clean | AutoAttack | epochs | batch | passes | EFLOP | H100 hours |
|---|---|---|---|---|---|---|---|---|
"""
OF_TEACHERS = {"wang2023-28_10-1m,ibd": dict(name="wide_resnet", depth=70, width=16, variant="deepmind")}


def module():
    """The module of the recipe."""
    spec = importlib.util.spec_from_file_location("configs_leaderboard", RECIPE)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def published(text: str) -> dict[str, tuple[str, str]]:
    """{row: (clean, AutoAttack)} from the table of the recipe's docstring."""
    lines = re.findall(r"^\| (\S+) +\|[^|]*\| *([\d.]*) *\| *([\d.]*) *\|$", text, re.MULTILINE)
    return {row: (clean, robust) for row, clean, robust in lines}


def multiply_adds(network: dict, shape: tuple[int, int, int], classes: int) -> int:
    """Of one forward pass for one image."""
    return _traced(json.dumps(network, sort_keys=True), tuple(shape), classes)


@functools.cache
def _traced(network, shape, classes):
    return complexity(run.build_model(ConfigDict(json.loads(network)), classes, "model"), shape).operations.total()


def cost(row: str, settings: ConfigDict) -> tuple[float | None, float | None]:
    """(forward passes of a step for each image, EFLOP of the training); None where they are not tabulated."""
    dataset = settings.data.dataset
    (shape, classes), size = IMAGES[dataset], settings.data.get("size")
    shape = (size, size, 3) if size else shape
    one = multiply_adds(config.plain(settings.model), shape, classes)
    teacher = OF_TEACHERS.get(row)
    passes = expected_forwards(settings, multiply_adds(teacher, shape, classes) / one if teacher else 0.0)
    if passes is None:
        return None, None
    images = (TRAIN[dataset] - settings.data.val_size) // settings.batch_size * settings.batch_size
    return passes, settings.epochs * images * passes * 2 * one / 1e18


def page() -> str:
    """The text of docs/leaderboard.md."""
    recipe = module()
    numbers = published(recipe.__doc__)
    passes, network = MEASURED["forwards"], MEASURED["network"]
    reached = MEASURED["images_per_s"] * passes * 2 * multiply_adds(network, *IMAGES["cifar10"])
    parts = [HEAD.format(share=100 * reached / PEAK, peak=PEAK / 1e12, rate=MEASURED["images_per_s"])]
    for row in recipe.ROWS:
        settings = config.effective(config.complete(recipe.get_config(row)))
        clean, robust = numbers[row]
        passes, eflop = cost(row, settings)
        known = "wide_resnet" in str(settings.model)
        hours = "" if eflop is None else f"{eflop * 1e18 / (reached if known else PEAK) / 3600:,.1f}"
        cells = [f"`{row}`", _network(settings.model), clean, robust, settings.epochs, settings.batch_size]
        cells += ["–"] * 3 if eflop is None else [f"{passes:.3g}", f"{eflop:,.1f}", ("" if known else "≥ ") + hours]
        parts.append(f"| {' | '.join(map(str, cells))} |\n")
    return "".join(parts)


def _network(section):
    section = section.get("backbone", section)
    name = {"wide_resnet": "WRN", "convnext": "ConvNeXt", "vit": "ViT", "swin": "Swin"}[section.name]
    return f"{name}-{section.depth}-{section.width}"


if __name__ == "__main__":
    command("leaderboard", page())
