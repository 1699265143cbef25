"""IB-RAR's choice of robust layers (Xu et al., 2023), section 2.2 and Table 3: which taps are worth regularising.

    python -m ibjax.analysis.layers --config=configs/ib_rar.py:vgg16-l --workdir=DIR [--gain=1] [--config.epochs=20 …]

Trains one network per tap with the information terms of this tap alone, in DIR/TAP, and one without terms, in DIR/none.
Attacks the last checkpoint of each with the recipe's first PGD (or PGD-10), on the validation images, or with
--config.select_on=test on the test set, on which the paper reports accuracies. A tap is robust if its network gains at
least `gain` points over the one without terms. The paper only asks for an "obviously higher" accuracy; its own robust
layers reach 3.27 % or more, the others 0.05 % or less.

Prints the table and the flag for the recipe, and writes DIR/layers.json; both state on which images the layers were
selected. The same command continues where it was stopped.
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ibjax import config, errors
from ibjax.analysis import commands, output
from ibjax.analysis.attacked import attack
from ibjax.errors import InputError
from ibjax.evaluation.results import is_pgd, threat_label
from ibjax.evaluation.scoring import percent
from ibjax.net import linen_net, taps
from ibjax.objectives.ib_rar import layers_of
from ibjax.runs import command_line, provenance, run, rundir
from ibjax.training import loop
from ibjax.training.experiment import build


def candidates(settings: ConfigDict) -> dict[str, ConfigDict]:
    """{tap: the recipe with the information terms of this tap alone}; "none" is the recipe without terms."""
    if settings.objective.name != "ib_rar":
        raise InputError(f"objective '{settings.objective.name}' has no layers to choose; give a recipe of ib_rar")
    data = run.load_data(settings)
    model = run.build_model(settings.model, data.num_classes, "model")
    found = layers_of({name: name for name in taps(model, data.train.images.shape[1:])})

    def changed(name, **options):
        part = settings.copy_and_resolve_references()
        part.title = f"{part.title}, {name}"
        part.objective.update(options)
        return part

    recipes = {"none": changed("none", layers="all", alpha=0.0, beta=0.0)}
    return {**recipes, **{str(tap): changed(tap, layers=tap) for tap in found}}


def choose(settings: ConfigDict, workdir: Path, gain: float = 1.0) -> dict[str, Any]:
    """{"accuracy": {tap: {"clean", "robust", "gain"}}, "layers", …}, with the attack and the origin; also on disk.

    "layers" are the robust taps, as measured on `n` images of the split `selected_on`, "val" or "test".
    """
    settings = config.effective(config.complete(settings))
    errors.check_range("--gain", gain, 0)
    pgd = next((name for name in settings.evaluate.attacks if is_pgd(name)), "pgd-10")
    recipes = candidates(settings)
    checked = {name: loop.check(recipe) for name, recipe in recipes.items()}
    data = run.load_data(settings)
    split = data.val if settings.select_on == "val" else data.test
    assert split is not None  # loop.check saw to it
    accuracy: dict[str, dict[str, float]] = {}
    for name, recipe in recipes.items():
        with rundir.lock(workdir / name):
            loop.train(build(recipe), workdir / name, checked=checked[name])
            trained = run.load(workdir / name, "last")
        predict = linen_net(run.in_float32(trained.model)).predict
        flags, _ = attack(pgd, predict, trained, split, config.plain(recipe.evaluate))
        accuracy[name] = dict(clean=percent(flags.clean), robust=percent(flags.robust))
    for row in accuracy.values():
        row["gain"] = round(row["robust"] - accuracy["none"]["robust"], 4)
    robust = [name for name, row in accuracy.items() if name != "none" and row["gain"] >= gain]
    found: dict[str, Any] = dict(dataset=trained.facts["label"], seed=settings.seed, attack=pgd)
    found |= {name: settings.evaluate[name] for name in ("norm", "eps", "step_size")}
    found |= dict(selected_on=settings.select_on, n=len(split.labels), gain=gain, accuracy=accuracy, layers=robust)
    found |= dict(versions=provenance.versions(), commit=provenance.commit(), hardware=provenance.hardware())
    output.record(workdir, "layers", found)
    return found


def table(found: dict[str, Any]) -> str:
    """The result as a Markdown table, and the flag that makes a recipe use the robust layers."""
    images = {"val": "validation", "test": "test"}[found["selected_on"]]
    lines = [f"percent of {found['n']} {images} images, last checkpoint", ""]
    lines += [f"| terms of | clean | {threat_label(found)} | gain | robust |", "|---|---|---|---|---|"]
    for name, row in found["accuracy"].items():
        mark = "yes" if name in found["layers"] else ""
        lines.append(f"| {name} | {row['clean']:.2f} | {row['robust']:.2f} | {row['gain']:+.2f} | {mark} |")
    flag = f"--config.objective.layers={','.join(found['layers'])}"
    return "\n".join([*lines, flag if found["layers"] else f"no layer gains {found['gain']:g} points or more"])


def main() -> None:
    """The command line of this module."""
    parser = command_line.of_training("ibjax.analysis.layers", __doc__)
    parser.add_argument("--gain", type=float, default=1.0, help="points of accuracy that make a layer robust")
    given, recipe = command_line.parse_recipe(parser)

    def measure():
        return choose(given.settings, given.workdir, given.gain)

    commands.conduct(given, measure, lambda found: [table(found)], recipe=recipe)


if __name__ == "__main__":
    main()
