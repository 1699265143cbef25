"""Does each term do what its paper claims? Compares every method with its base at equal epochs, seeds and networks.

    python benchmarks/effects.py --workdir=runs/effects-digits [--data=digits] [--epochs=20] [--seeds=3] [--out=PATH]
    python benchmarks/effects.py --workdir=runs/mnist --out=PATH --data=mnist:FILE.npz --fraction=0.1 --n=1000
    python benchmarks/effects.py --workdir=runs/long --out=PATH --epochs=60 --runs='PGD-AT;IBD;IBD, stronger teacher'
    python benchmarks/effects.py --workdir=runs/added --out=PATH --runs=ingredients --data=mnist:FILE.npz --fraction=0.1

| method             | base                            | claim, on test images                                  |
|--------------------|---------------------------------|--------------------------------------------------------|
| IB-RAR             | PGD-AT                          | nHSIC(X, T) is lower, nHSIC(Y, T) higher               |
| its X term, β = 0  | PGD-AT                          | nHSIC(X, T) is lower                                   |
| shared information | itself with β = 0               | the symmetrised KL of p(z|x) and p(z|x') is lower      |
| SiRIIB             | PGD-AT of its network           | L_svd is lower                                         |
| IBD, three times   | PGD-AT; TRADES                  | PGD-20 accuracy is higher                              |

The value of a term is what the method's own loss reports after the last epoch, in evaluation mode, on test images and
their PGD-20 images. It is a mean over full batches of the training's batch size, on which nHSIC depends. IB-RAR is run
with the weights of the authors' code, with the paper's weights for VGG16 (β = 1), and with the X term of the latter
alone, also at a tenth of its weight. IBD has three teachers, all TRADES networks: one of the student's size and
training time; one with three times the channels ("wider"); and the wider one trained five times as long ("stronger"),
which is closest to the paper's. Networks (half as wide on MNIST and CIFAR-10), optimiser and attacks are those of
`comparison.py`; all other weights are those of the papers.

--runs=ingredients compares what docs/stronger.md adds to PGD-AT with PGD-AT alone: an average of the weights (0.995
with warm-up), CutMix, smoothed labels (0.1), and 70 % generated images, for which training images stand in that
--fraction leaves out. The claim is a higher PGD-20 accuracy. No other run takes part unless it is named.

Runs of one seed share their initial weights and the order of their images, so differences are taken seed by seed. A
claim "appears" if the mean difference over seeds has the claimed sign and is significant in a one-sided t-test at
5 %. PATH.json and PATH.md are written after every run; files of another command are refused. The same command
continues where it was stopped; where code has changed since, networks are measured again, and the page says which ones
older code has trained.
"""

import argparse
import json
import logging
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import comparison
import jax
import jax.numpy as jnp
import measuring
import numpy as np
from comparison import Results, cell
from ml_collections import ConfigDict
from parts import ROOT, bare, refuse_other
from scipy import stats

from ibjax import config, files
from ibjax.attacks.pgd import pgd
from ibjax.data import stratified
from ibjax.errors import DivergedError, InputError
from ibjax.evaluation.results import attack_label
from ibjax.net import linen_net, to_float
from ibjax.runs import provenance, run
from ibjax.step import Objective

log = logging.getLogger(__name__)
LEVEL = 0.05  # of the test


class Training(NamedTuple):
    """A column's worth of runs: an objective with options, on the network of `network` ("": its own)."""

    objective: str
    options: tuple[tuple[str, float], ...] = ()
    network: str = ""
    terms_of: str = ""  # the objective whose loss measures it; "": only attacks do
    teacher: int = 1  # its teacher's channels over its own
    longer: int = 1  # its teacher's epochs over its own
    ingredient: str = ""  # a key of INGREDIENTS that is added to the recipe


HELD_OUT = "held-out.npz"  # in --workdir: what --fraction leaves of the training images, in place of generated ones
# name -> keys of the configuration and their values
INGREDIENTS = {
    "average": {"ema_decay": 0.995, "averaging.warmup": True},
    "CutMix": {"mix": dict(name="cutmix")},
    "smoothing": {"smoothing.delta": 0.1},
    "held-out images": {"data.extra": dict(path=HELD_OUT, fraction=0.7)},
}
RUNS = {
    "PGD-AT": Training("pgd_at", terms_of="ib_rar"),
    "TRADES": Training("trades"),
    "IB-RAR": Training("ib_rar", terms_of="ib_rar"),
    "IB-RAR, β = 1": Training("ib_rar", (("alpha", 0.1), ("beta", 1.0)), terms_of="ib_rar"),
    "IB-RAR, X term alone": Training("ib_rar", (("alpha", 0.1), ("beta", 0.0)), terms_of="ib_rar"),
    "IB-RAR, X term alone, α = 0.01": Training("ib_rar", (("alpha", 0.01), ("beta", 0.0)), terms_of="ib_rar"),
    "shared information, β = 0": Training("shared_information", (("beta", 0.0),), terms_of="shared_information"),
    "shared information": Training("shared_information", terms_of="shared_information"),
    "PGD-AT, SiRIIB's network": Training("pgd_at", network="siriib", terms_of="siriib"),
    "SiRIIB": Training("siriib", terms_of="siriib"),
    "IBD": Training("ibd"),
    "IBD, wider teacher": Training("ibd", teacher=3),
    "IBD, stronger teacher": Training("ibd", teacher=3, longer=5),
    **{f"PGD-AT + {name}": Training("pgd_at", ingredient=name) for name in INGREDIENTS},
}
TERMS_ALONE = [name for name, training in RUNS.items() if not training.ingredient]  # what runs by default
ADDED = ["PGD-AT", *(name for name, training in RUNS.items() if training.ingredient)]  # --runs=ingredients
# objective -> {metric of its loss: how the page calls it}
TERMS = {
    "ib_rar": {"nhsic_x": "nHSIC(X, T)", "nhsic_y": "nHSIC(Y, T)"},
    "shared_information": {"skl": "symmetrised KL"},
    "siriib": {"svd": "L_svd", "info": "L_info"},
}
LABELS = {name: label for terms in TERMS.values() for name, label in terms.items()} | {"pgd-20": "PGD-20 accuracy"}
DECIMALS = {"nhsic_x": 2, "nhsic_y": 2, "skl": 3, "svd": 4, "info": 4}  # of accuracies 1


class Effect(NamedTuple):
    """A claim: `column` of `method` minus that of `base` has `sign`."""

    method: str
    base: str
    column: str
    sign: int


EFFECTS = (
    *(Effect(method, "PGD-AT", "nhsic_x", -1) for method in RUNS if "IB-RAR" in method),
    *(Effect(method, "PGD-AT", "nhsic_y", +1) for method in ("IB-RAR", "IB-RAR, β = 1")),
    Effect("shared information", "shared information, β = 0", "skl", -1),
    Effect("SiRIIB", "PGD-AT, SiRIIB's network", "svd", -1),
    *(Effect(method, base, "pgd-20", +1) for method in RUNS if "IBD" in method for base in ("PGD-AT", "TRADES")),
    *(Effect(method, "PGD-AT", "pgd-20", +1) for method in ADDED[1:]),
)

# --data -> what it changes in the digits' recipe; `path` is given on the command line
DATA = {
    "digits": dict(),
    "mnist": dict(
        data=dict(name="npz", label="MNIST", val_size=1000, split_seed=0),
        augment=dict(pad=2),
        eps="0.2",
        scales=(28, 20, 14, 8),
    ),
    "cifar10": dict(
        data=dict(name="folder", label="CIFAR-10 (JPEG)", val_size=1000, split_seed=0),
        augment=dict(pad=4, flip=True),
        eps="8/255",
        scales=(32, 24, 16, 8),
    ),
}


# ---- one run -----------------------------------------------------------------------------------------------


def settings(name: str, seed: int, given: argparse.Namespace) -> ConfigDict:
    """The configuration of one run, and of its teacher: `comparison`'s with other data."""
    training = RUNS[name]
    made = comparison.settings(
        training.objective, given.epochs, seed, given.workdir, training.network, **dict(training.options)
    )
    kind, _, path = given.data.partition(":")
    changes = DATA[kind]
    for part in (made, *(recipe for _, recipe in config.recipes(made))):
        if "data" in changes:
            part.data = dict(**changes["data"], path=path)
            part.augment.update(changes["augment"])
            part.threat.eps = changes["eps"]
        part.data.update(fraction=given.fraction)
        part.validate.every = given.epochs  # so that `best` is the last epoch: equal epochs for all
        part.evaluate.update(attacks=("pgd-20",), n=given.n)
        if "scales" in changes:  # half the digits' width, on images with twelve or sixteen times their pixels
            network = part.model.get("backbone", part.model)
            network.update(dict(width=16) if network.name == "resnet" else dict(widths=((16, 16), (32, 32))))
            if part.model.name == "siriib":
                part.model.scales = changes["scales"]
    for key, value in INGREDIENTS.get(training.ingredient, {}).items():
        if key == "data.extra":
            value = dict(value, path=str(given.workdir / HELD_OUT))
        section, _, option = key.rpartition(".")
        with made.unlocked():
            (made[section] if section else made)[option] = value
    if training.teacher > 1:
        strengthen(made.teacher, training.teacher, training.longer)
    made.title = name
    return made


def hold_out(made: ConfigDict, file: Path) -> None:
    """Writes the training images that a configuration's `fraction` leaves out, as an .npz of generated images."""
    if made.data.fraction >= 1:
        raise InputError("held-out images are those that --fraction leaves out; give one below 1")
    whole = made.copy_and_resolve_references()
    with whole.unlocked():
        whole.data.fraction, whole.data.extra = 1.0, None
    part, full = made.copy_and_resolve_references(), run.load_data(whole).train
    with part.unlocked():
        part.data.extra = None
    used = len(run.load_data(part).train.labels)
    kept = stratified(full.labels, used, made.data.split_seed)
    rest = np.setdiff1d(np.arange(len(full.labels)), kept)
    images = full.images[rest]
    if images.dtype != np.uint8:
        images = np.rint(255 * images).astype(np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, image=images, label=full.labels[rest])


def strengthen(teacher: ConfigDict, wider: int, longer: int) -> None:
    """Gives a teacher so many times the channels and the epochs, and a folder of its own."""
    model = teacher.recipe.model
    model.widths = tuple(tuple(wider * width for width in stage) for stage in model.widths)
    teacher.recipe.epochs *= longer
    teacher.recipe.validate.every *= longer
    teacher.workdir += f"-{wider}-{longer}"


def measure(name: str, seed: int, given: argparse.Namespace) -> Results:
    """Trains, attacks and measures one network, or reads what was measured with the same settings and code."""
    made, folder = settings(name, seed, given), given.workdir / name / str(seed)
    identity = {"config": config.plain(made), "commit": provenance.commit(), "versions": provenance.versions()}
    identity, file = json.loads(json.dumps(identity)), folder / "effects.json"
    if file.is_file():
        known = files.read_json(file)
        if {key: known[key] for key in identity} == identity:
            return known["found"]
    if made.data.get("extra") and not (given.workdir / HELD_OUT).is_file():
        hold_out(made, given.workdir / HELD_OUT)
    found = comparison.measure(made, folder)
    objective = RUNS[name].terms_of
    if objective:
        built = config.build("objectives", dict(name=objective), "objective")
        found |= terms(run.load(folder, "last"), built, tuple(TERMS[objective]), given.n)
    files.write_json(file, {**identity, "found": found})
    return found


def terms(trained: run.Run, objective: Objective, names: tuple[str, ...], n: int | None) -> dict[str, float]:
    """Metrics of an objective's loss on `n` test images, in evaluation mode: means over full batches."""
    net, settings = linen_net(trained.model), trained.config
    still = net._replace(forward=lambda variables, x, key, edits=None: (net.predict(variables, x, edits), variables))
    lengths = {key: settings.evaluate[key] for key in ("eps", "step_size")}
    attack = pgd(loss="ce", norm="linf", steps=20, init="uniform", **lengths)

    @jax.jit
    def metrics(variables, images, labels, key):
        x = to_float(images)
        x_adv = attack(key, lambda x: net.predict(variables, x)[0], x, labels)
        index, zero = jnp.arange(len(labels)), jnp.int32(0)
        batch = {"image": x, "label": labels, "index": index}
        batch |= {"step": zero, "epoch_step": zero, "epoch": jnp.float32(0)}
        return objective.loss(still, variables, batch, x_adv, key)[1][1]

    test = run.load_data(settings).test
    order = np.random.default_rng(0).permutation(len(test.labels))[:n]
    batches = [order[i : i + settings.batch_size] for i in range(0, len(order), settings.batch_size)]
    rows = [
        metrics(trained.variables, test.images[chosen], test.labels[chosen], jax.random.key(i))
        for i, chosen in enumerate(batches)
        if len(chosen) == settings.batch_size
    ]
    return {name: statistics.mean(float(row[name]) for row in rows) for name in names}


# ---- the page ----------------------------------------------------------------------------------------------


def page(results: Results) -> str:
    """The table, then one sentence for each claim."""
    columns = ["clean", *LABELS]
    runs = {name: list(seeds.values()) for name, seeds in results["runs"].items() if seeds}
    heads = ("run", "seeds", *(LABELS.get(column, attack_label(column)) for column in columns))
    lines = []
    for name, seeds in runs.items():
        measured = [cell(seeds, column, DECIMALS.get(column, 1)) if column in seeds[0] else "" for column in columns]
        lines.append([name, str(len(seeds)), *measured])
    table = measuring.markdown(heads, lines)
    asked = [effect for effect in EFFECTS if {effect.method, effect.base} <= results["runs"].keys()]
    sentences = "".join(f"- {sentence(effect, results['runs'])}\n" for effect in asked)
    failed = "".join(f"- {name}: {reason}\n" for name, reason in results["failed"].items())
    made = f"{measuring.provenance_line(results)}{comparison.older(results['commit'], results['runs'])}"
    return (
        f"# What the terms do, on {results['data']}\n\n{made}\n\n{table}\n\n"
        f"Mean ± standard deviation over seeds after {results['epochs']} epochs; eps {results['eps']}; accuracies in "
        f"percent of {results['n']} test images. Differences are of runs of the same seed.\n\n{sentences}"
        + (f"\nNot in the table:\n\n{failed}" if failed else "")
    )


def sentence(effect: Effect, runs: dict[str, dict[str, Results]]) -> str:
    """Whether a claim appears, and by how much."""
    method, base = runs[effect.method], runs[effect.base]
    seeds, decimals = sorted(method.keys() & base.keys()), DECIMALS.get(effect.column, 1)
    direction = "higher" if effect.sign > 0 else "lower"
    what = f"**{effect.method}** against {effect.base}: {direction} {LABELS[effect.column]}"
    if len(seeds) < 2:
        return f"{what}: not decided; seeds: {len(seeds)}."
    differences = [method[seed][effect.column] - base[seed][effect.column] for seed in seeds]
    mean, spread = statistics.mean(differences), statistics.stdev(differences)
    p = p_value([effect.sign * value for value in differences])
    right = sum(effect.sign * value > 0 for value in differences)
    verdict = "appears" if p < LEVEL else "does not appear, the opposite does" if p > 1 - LEVEL else "does not appear"
    return (
        f"{what}: {verdict} ({mean:+.{decimals}f} ± {spread:.{decimals}f}, {right} of {len(seeds)} seeds, p = {p:.2g})."
    )


def p_value(differences: list[float]) -> float:
    """Of a one-sided t-test that the mean is above 0."""
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    if error == 0:
        return float(statistics.mean(differences) <= 0)
    return float(stats.t.sf(statistics.mean(differences) / error, len(differences) - 1))


def study(given: argparse.Namespace) -> None:
    """All runs, one seed of each before the next seed; the page is up to date after each."""
    kind, _, path = given.data.partition(":")
    if kind not in DATA or (kind != "digits") != bool(path):
        raise InputError(f"--data={given.data} is not allowed; give digits, mnist:FILE.npz or cifar10:FOLDER")
    if unknown := [name for name in given.runs if name not in RUNS]:
        raise InputError(f"--runs: {'; '.join(unknown)} is unknown; allowed: {'; '.join(RUNS)}")
    out = given.out or ROOT / "results" / f"effects-{kind}"
    refuse_other(out.with_suffix(".json"))
    first = settings(given.runs[0], 0, given)
    results: dict[str, Any] = {
        **measuring.environment(),
        "data": first.data.get("label", kind),
        "fraction": given.fraction,
        "epochs": given.epochs,
        "eps": first.threat.eps,
        "n": None,
        "runs": {name: {} for name in given.runs},
        "failed": {},
    }
    for seed in range(given.seeds):
        for name in given.runs:
            try:
                results["runs"][name][str(seed)] = found = measure(name, seed, given)
                results["n"] = found["n"]
            except (InputError, DivergedError) as error:
                results["failed"][f"{name}, seed {seed}"] = str(error)
                log.warning("%s, seed %d: %s", name, seed, error)
            files.write_json(out.with_suffix(".json"), results)
            out.with_suffix(".md").write_text(page(results), encoding="utf-8")
    print(page(results))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = bare(__file__, __doc__)
    parser.add_argument("--workdir", type=files.path, required=True, help="folder of all runs")
    parser.add_argument("--data", default="digits", help="digits, mnist:FILE.npz or cifar10:FOLDER")
    parser.add_argument("--out", type=files.path, help="without suffix; default: results/effects-DATA")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument(
        "--runs",
        type=lambda text: ADDED if text == "ingredients" else text.split(";"),
        default=TERMS_ALONE,
        help="some, as named on the page, or `ingredients`; default: all but these",
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, …")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the training images")
    parser.add_argument("--n", type=int, help="test images; default: all")
    return parser.parse_args(argv)


if __name__ == "__main__":
    measuring.run(lambda: study(parse()))
