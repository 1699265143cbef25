"""IB-RAR's choice of robust layers (Xu et al., 2023), section 2.2 and Table 3: which taps are worth regularising.

    python -m ibjax.analysis.layers --config=configs/ib_rar.py:vgg16-l --workdir=DIR [--gain=1] [--config.epochs=20 …]

Trains a network for each tap with the terms of this tap alone, and one without any, in DIR/TAP and DIR/none; attacks
the last checkpoint of each with the recipe's first PGD (or PGD-10). Robust are the taps that gain at least `gain`
points over none: the paper asks for an "obviously higher" accuracy; its own robust layers keep 3.27 % or more, the
others 0.05 % or less. Prints the table and the flag for the recipe, and writes DIR/layers.json. Run again, it continues
where it stopped.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ibjax import cluster, config, errors, run, train
from ibjax import main as command_line
from ibjax.errors import InputError
from ibjax.evaluate import evaluate
from ibjax.objectives.ib_rar import layers_of


def candidates(settings: ConfigDict) -> dict[str, ConfigDict]:
    """{tap: the recipe with the terms of this tap alone}, and under "none" the recipe without any."""
    if settings.objective.name != "ib_rar":
        raise InputError(f"objective '{settings.objective.name}' has no layers to choose; give a recipe of ib_rar")
    data = run.load_data(settings)
    model = run.build_model(settings.model, data.num_classes, "model")
    shapes = run.abstract_variables(model, data.train.images.shape[1:], cluster.mesh())
    x = jax.ShapeDtypeStruct((1, *data.train.images.shape[1:]), "float32")
    features = jax.eval_shape(lambda variables, x: model.apply(variables, x, train=False)[1], shapes, x)
    taps = layers_of({name: name for name in features})

    def changed(name, **options):
        part = settings.copy_and_resolve_references()
        part.title = f"{part.title}, {name}"
        part.objective.update(options)
        return part

    recipes = {"none": changed("none", layers="all", alpha=0.0, beta=0.0)}
    return {**recipes, **{str(tap): changed(tap, layers=tap) for tap in taps}}


def choose(settings: ConfigDict, workdir: Path, gain: float = 1.0) -> dict[str, Any]:
    """{"attack", "gain", "accuracy": {tap: {"clean", "robust", "gain"}}, "layers": the robust ones}; also on disk."""
    config.complete(settings)
    pgd = next((name for name in settings.evaluate.attacks if name.startswith("pgd-")), "pgd-10")
    recipes = candidates(settings)
    for recipe in recipes.values():
        train.check(recipe)
    accuracy: dict[str, dict[str, float]] = {}
    for name, recipe in recipes.items():
        recipe.evaluate.update(attacks=(pgd,), ladder=())
        with run.lock(workdir / name):
            train.train(train.build(recipe), workdir / name)
            record = evaluate(workdir / name, "last", settings=recipe.evaluate)[0]
        accuracy[name] = dict(clean=record["clean_acc"], robust=record["robust_acc"])
    for row in accuracy.values():
        row["gain"] = round(row["robust"] - accuracy["none"]["robust"], 4)
    robust = [name for name, row in accuracy.items() if name != "none" and row["gain"] >= gain]
    found = dict(attack=pgd, gain=gain, accuracy=accuracy, layers=robust)
    if jax.process_index() == 0:
        run.write_json(workdir / "layers.json", found)
    return found


def table(found: dict[str, Any]) -> str:
    """What was found as a Markdown table, and the flag that uses it."""
    lines = [f"| terms of | clean | {found['attack']} | gain | robust |", "|---|---|---|---|---|"]
    for name, row in found["accuracy"].items():
        mark = "yes" if name in found["layers"] else ""
        lines.append(f"| {name} | {row['clean']:.2f} | {row['robust']:.2f} | {row['gain']:+.2f} | {mark} |")
    flag = f"--config.objective.layers={','.join(found['layers'])}"
    return "\n".join([*lines, flag if found["layers"] else f"no layer gains {found['gain']:g} points or more"])


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m ibjax.analysis.layers", allow_abbrev=False, description=__doc__)
    parser.add_argument("--gain", type=float, default=1.0, help="points of accuracy that make a layer robust")
    given, rest = parser.parse_known_args()

    def command():
        asked = command_line.parse([sys.argv[0], *rest])
        cluster.initialize()
        found = choose(asked.settings, asked.workdir, given.gain)
        if jax.process_index() == 0:
            print(table(found))

    errors.exit_with(command)


if __name__ == "__main__":
    main()
