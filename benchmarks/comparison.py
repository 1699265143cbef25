"""Compares all objectives of the package on the digits, with equal networks, epochs and seeds; runs unattended.

    python benchmarks/comparison.py --workdir=runs/comparison [--out=PATH] [--epochs=20] [--seeds=3]

Trains the convolutional network of configs/digits.py with each objective (`--only=mart,te --out=PATH` selects some),
attacks the checkpoint that is best on validation with PGD-20, margin PGD-20 and AutoAttack, and writes PATH.json and
PATH.md after every run; files of another command are refused. At the end it times the steps of all objectives in turn;
the machine should be idle then. The same command continues where it was stopped, and says which networks older code has
trained. An objective that rejects these settings, or diverges, is listed on the page with the reason and does not stop
the others.

Every method has the defaults of its paper, except options that depend on the length of training, the learning rate or
eps (OPTIONS). The teachers of distillation methods are a TRADES network and an undefended one of the same architecture,
which are trained first; HAT's is the undefended one.
"""

import argparse
import importlib
import inspect
import logging
import pkgutil
import statistics
from pathlib import Path
from typing import Any

import jax
import measuring
import numpy as np
from ml_collections import ConfigDict
from parts import ROOT, bare, refuse_other

from ibjax import config, errors, files, main, objectives
from ibjax.errors import DivergedError, InputError
from ibjax.evaluation.results import attack_label
from ibjax.runs import checkpoint, recipe_files, run
from ibjax.training import feed, jobs
from ibjax.training.experiment import build, initial_state

log = logging.getLogger(__name__)
Results = dict[str, Any]

# objective -> epochs -> options that its paper ties to its number of epochs, its learning rate, or eps 8/255
OPTIONS = {
    "shared_information": lambda epochs: dict(warmup=round(epochs / 12), ramp=max(1, round(0.75 * epochs))),
    "te": lambda epochs: dict(start=max(1, round(0.45 * epochs)), end=max(2, round(0.75 * epochs))),
    # the authors' mean over classes too divides the loss, and so the learning rate of equal runs, by ten
    "ard": lambda epochs: dict(reduction="sum"),
    "rslad": lambda epochs: dict(reduction="sum"),
    "mma": lambda epochs: dict(max_eps="3/16", min_eps=0.02),  # 12/255 and 0.005 at eps 8/255
}


TEACHERS = {"teacher": "trades", "assistant": "standard"}  # role, and folder -> objective of its network
ATTACKS = ("pgd-20", "margin-20", "autoattack")  # from the weakest to the strongest
# what a method puts in place of the digits' network, or around it
NETWORKS = {
    **dict.fromkeys(("vib", "shared_information"), lambda cnn: dict(name="stochastic", backbone=cnn, latent=32)),
    "ceb": lambda cnn: dict(name="stochastic", backbone=cnn, latent=32, sigma="unit", class_means=True),
    "siriib": lambda cnn: dict(
        name="siriib",
        backbone=dict(name="resnet", blocks=(1, 1), width=32),
        scales=(8, 4),
        widths=(16,),
        fourier="amp_phase",  # the default needs colours
    ),
}


def names() -> list[str]:
    """The objectives of the package: modules with a factory of their own name, which needs no other objective."""
    found = [module.name for module in pkgutil.iter_modules(objectives.__path__)]
    factories = {name: getattr(importlib.import_module(f"ibjax.objectives.{name}"), name, None) for name in found}
    return [name for name, call in factories.items() if call and not _needs(call)]


def _needs(call):
    return [p for p in inspect.signature(call).parameters.values() if p.default is inspect.Parameter.empty]


def settings(name: str, epochs: int, seed: int, workdir: Path, network: str = "", **options: Any) -> ConfigDict:
    """The quickstart's recipe with another objective, its `options`, and the attack that it asks for.

    `network` names the objective whose network it trains; "": its own.
    """
    made = recipe(name, epochs, given_length(name, epochs) | options, network)
    made.seed = seed
    for role in config.build("objectives", made.objective, "objective").teachers:
        network = "assistant" if name == "hat" else role  # which labels as a network without a defence does
        made[role].workdir = str(workdir / network)
        made[role].recipe = recipe(TEACHERS[network], epochs, {})
    return made


def given_length(name: str, epochs: int) -> dict[str, Any]:
    """The options of OPTIONS for an objective and so many epochs."""
    return OPTIONS.get(name, lambda epochs: {})(epochs)


def recipe(name: str, epochs: int, options: dict[str, Any], network: str = "") -> ConfigDict:
    """One network on the digits; seed 0."""
    digits = recipe_files.load(f"{ROOT / 'configs' / 'digits.py'}")
    made = digits.contrast.undefended.copy_and_resolve_references()
    made.title = name
    made.threat = digits.threat.copy_and_resolve_references()
    made.objective = dict(name=name, **options)
    if (network or name) in NETWORKS:
        made.model = NETWORKS[network or name](config.plain(made.model))
    losses = config.build("objectives", made.objective, "objective").attack_losses
    if losses:
        made.attack = digits.attack.copy_and_resolve_references()
        made.attack.update(loss=losses[0], init="uniform" if losses[0] == "ce" else "gaussian")
    made.epochs = epochs
    made.evaluate.update(attacks=ATTACKS, ladder=())
    return made


def measure(made: ConfigDict, folder: Path) -> Results:
    """Trains, or continues, and attacks one network; accuracies in percent."""
    folders = [job.workdir for job in jobs.jobs(config.complete(made), folder)]
    for each in folders:
        trained_by(each)
    records = [record for record in main.execute(made, folder) if record["title"] == made.title]
    weights = jax.tree.leaves(run.load(folder).variables["params"])
    return {
        "clean": records[0]["clean_acc"],
        **{record["attack"]: record["robust_acc"] for record in records},
        "parameters": int(sum(np.size(leaf) for leaf in weights)),
        "n": records[0]["n"],
        "warnings": records[0]["warnings"],
        "commits": list(dict.fromkeys(commit for each in folders for commit in trained_by(each))),
    }


def trained_by(workdir: Path) -> list[str]:
    """The commits of the code that has trained a network, in order; to be asked before and after each training.

    env.json is of the last start, which may have found a finished network: its commit counts if checkpoints are new.
    """
    file, steps = workdir / "trained_by.json", checkpoint.steps_in(workdir / "checkpoints")
    known = files.read_json(file) if file.is_file() else {"commits": [], "steps": []}
    if steps != known["steps"]:
        commits = [*known["commits"], files.read_json(workdir / "env.json")["commit"]]
        known = {"commits": list(dict.fromkeys(commits)), "steps": steps}
        files.write_json(file, known)
    return known["commits"]


def step_times(recipes: dict[str, ConfigDict], repeats: int = 5, n: int = 19) -> dict[str, list[float]]:
    """Seconds per step of every objective, a list of rounds that go through all of them in turn."""
    runners = {}
    for name, made in recipes.items():
        experiment = build(made, {role: Path(made[role].workdir) for role in config.TEACHERS})
        runners[name] = _steps(experiment)
    measuring.warm_up(runners, [])
    return measuring.alternate(runners, repeats, n).seconds


def _steps(experiment):
    state, dispatch = initial_state(experiment), feed.feed(experiment, jax.random.key(0), 0).dispatch

    def steps(n):
        nonlocal state
        for _ in range(n):
            state, _ = dispatch(state, 1)
        jax.block_until_ready(state)

    return steps


# ---- the page ----------------------------------------------------------------------------------------------


def page(results: Results) -> str:
    """The comparison in Markdown: mean ± standard deviation over seeds, the most robust first."""
    columns = ["clean", *results["attacks"]]
    methods = {name: list(runs.values()) for name, runs in results["methods"].items() if runs}
    ranked = sorted(methods, key=lambda name: -min(mean(methods[name], attack) for attack in results["attacks"]))
    heads = ("objective", "seeds", *map(attack_label, columns), "ms per step", "parameters")
    lines = []
    for name in ranked:
        runs = methods[name]
        cells = [cell(runs, column) for column in columns]
        times = results["seconds_per_step"].get(name)
        step = f"{1000 * statistics.median(times):.1f}" if times else "not yet"
        lines.append([name, str(len(runs)), *cells, step, f"{runs[0]['parameters']:,}"])
    table = measuring.markdown(heads, lines)
    failed = "".join(f"- {name}: {reason}\n" for name, reason in sorted(results["failed"].items()))
    what = "Every objective" if set(results["methods"]) >= set(names()) else "Some objectives"
    made = f"{measuring.provenance_line(results)}{older(results['commit'], results['methods'])}"
    return f"# {what} on the digits\n\n{made}\n\n{table}\n\n{_reading(results, methods)}\n" + (
        f"\nNot on the page:\n\n{failed}" if failed else ""
    )


def older(commit: str, runs: dict[str, dict[str, Results]]) -> str:
    """The networks, teachers among them, that code of other commits than the page's has trained; "" if there are none.

    Of records of before, which do not know, nothing is said.
    """
    others: dict[str, list[str]] = {}
    for name, seeds in runs.items():
        for seed, found in seeds.items():
            if (commits := found.get("commits", [commit])) != [commit]:
                others.setdefault(", ".join(commits), []).append(f"{name} (seed {seed})")
    listed = (f"by commit {commits}: {', '.join(whose)}" for commits, whose in others.items())
    return f"\n\nTrained {'; '.join(listed)}." if others else ""


def mean(runs: list[Results], column: str) -> float:
    """Of a column over seeds."""
    return statistics.mean(single[column] for single in runs)


def cell(runs: list[Results], column: str, digits: int = 1) -> str:
    """Mean ± standard deviation over seeds."""
    spread = f" ± {statistics.stdev(single[column] for single in runs):.{digits}f}" if len(runs) > 1 else ""
    return f"{mean(runs, column):.{digits}f}{spread}"


def _reading(results, methods):
    """What the ranking shows and what it does not."""
    if not methods:
        return "No run has finished yet."
    several = [runs for runs in methods.values() if len(runs) > 1]
    n = next(iter(methods.values()))[0]["n"]
    sampling = 196 * (0.25 / n) ** 0.5  # 95 %, of a proportion at one half, in percent
    text = (
        f"In percent of {n} test images at eps {results['eps']}, mean ± standard deviation over seeds, sorted by "
        f"the attack that is the worst for each; {results['epochs']} epochs each. The images alone leave each accuracy "
        f"uncertain by up to ±{sampling:.1f} points. "
    )
    if not several:
        return text + "With one seed each, this is no ranking."
    spreads = [statistics.stdev(single[attack] for single in runs) for runs in several for attack in results["attacks"]]
    typical = statistics.median(spreads)
    least = min(len(runs) for runs in several)
    gap = 2 * typical * (2 / least) ** 0.5
    return text + (
        f"Two means of {least} seeds with the median standard deviation of {typical:.1f} differ by chance by up to "
        f"{gap:.1f} points: smaller gaps rank nothing, and what ranks here on 8×8 digits need not on CIFAR-10."
    )


def compare(given: argparse.Namespace) -> None:
    """All runs, one seed of every objective before the next seed; the page is up to date after each."""
    chosen = given.only.split(",") if given.only else names()
    if unknown := set(chosen) - set(names()):
        raise InputError(f"--only={','.join(sorted(unknown))} is unknown; {errors.nearest('', names())}")
    refuse_other(given.out.with_suffix(".json"))
    results = {
        **measuring.environment(),
        "epochs": given.epochs,
        "eps": recipe("pgd_at", given.epochs, {}).threat.eps,
        "attacks": list(ATTACKS),
        "methods": {name: {} for name in chosen},
        "seconds_per_step": {},
        "failed": {},
    }
    for seed in range(given.seeds):
        for name in chosen:
            if name in results["failed"]:
                continue
            try:
                made = settings(name, given.epochs, seed, given.workdir)
                results["methods"][name][str(seed)] = measure(made, given.workdir / name / str(seed))
            except (InputError, DivergedError) as error:
                results["failed"][name] = f"seed {seed}: {error}"
                log.warning("%s: %s", name, error)
            files.write_json(given.out.with_suffix(".json"), results)
            given.out.with_suffix(".md").write_text(page(results), encoding="utf-8")
    finished = {
        name: settings(name, given.epochs, 0, given.workdir) for name, runs in results["methods"].items() if runs
    }
    results["seconds_per_step"] = step_times(finished)
    files.write_json(given.out.with_suffix(".json"), results)
    given.out.with_suffix(".md").write_text(page(results), encoding="utf-8")
    print(page(results))


def command_line() -> None:
    """The command line of this script."""
    parser = bare(__file__, __doc__)
    parser.add_argument("--workdir", type=files.path, required=True, help="folder of all runs")
    parser.add_argument("--out", type=files.path, default=ROOT / "results" / "comparison-digits", help="without suffix")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, …")
    parser.add_argument("--only", default="", help="names of objectives, separated by commas; default: all")
    arguments = parser.parse_args()
    compare(arguments)


if __name__ == "__main__":
    measuring.run(command_line)
