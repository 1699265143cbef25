"""Writes docs/recipes.md: the settings of every row of every recipe beside those of the paper or code that it names.

    python docs/recipes.py             writes the page
    python docs/recipes.py --check     ends with 1 where the page is not what it would write

What recipes do is read from `configs/`; what papers and their code say stands in docs/papers.toml, in the notation of
the page. Where the two differ there must be a reason, and no reason without a difference: else nothing is written.
This lies beside the page it writes, since nothing else needs it; the package knows no paper's tables.
"""

import fnmatch
import importlib.util
import re
import sys
import tomllib
from typing import Any

from generated import DOCS, command
from ml_collections import ConfigDict

from ibjax import config, optim
from ibjax.errors import InputError

CONFIGS, PAPERS = DOCS.parent / "configs", DOCS / "papers.toml"
# what the papers say of an aspect, where it is no text of theirs
UNSTATED, THE_ROW = "?", "row"
# options of a call that the page does not show there: shown elsewhere, or without effect on values
HIDDEN = ("dtype", "remat", "bn_groups", "mean", "std", "standardize", "passes", "forwards", "clean_forward")
SIZES = ("depth", "width", "latent")  # options of a network that are shown though they are the default
NORMALISATIONS = {
    ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)): "mean and deviation of CIFAR-10",
    ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)): "mean and deviation of CIFAR-10",
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)): "mean and deviation of ImageNet",
    ((0.5,), (0.5,)): "to [−1, 1]",
}
ASPECTS = {
    "data": "data",
    "augment": "augmentation",
    "model": "network",
    "normalise": "normalisation",
    "teachers": "teachers",
    "objective": "objective",
    "passes": "training-mode passes",
    "attack": "training attack",
    "threat": "its eps and step",
    "mode": "its batch-norm",
    "length": "batch and epochs",
    "optimizer": "optimiser",
    "schedule": "learning rate",
    "weights": "perturbed, averaged weights",
    "best": "`best` by",
    "evaluate": "evaluation",
}


# ---- a recipe's row --------------------------------------------------------------------------------------------


def aspects(made: ConfigDict) -> dict[str, str]:
    """What the page says of a configuration: aspect -> text."""
    made = config.effective(config.complete(made.copy_and_resolve_references()))
    objective = config.build("objectives", made.objective, "objective")
    own = "the objective's own" if objective.attack else "none"
    return {
        "data": _data(made),
        "augment": _augment(made),
        "model": call("models", made.model),
        "normalise": _normalise(made.model),
        "teachers": "; ".join(_teacher(made[role]) for role in objective.teachers) or "none",
        "objective": call("objectives", made.objective),
        "passes": passes(config.plain(made.objective)),
        "attack": own if made.attack is None else _attack(made.attack),
        "threat": "" if made.attack is None else _threat(made.attack),
        "mode": "" if made.attack is None else _mode(made),
        "length": f"{made.batch_size}, {made.epochs}",
        "optimizer": _optimizer(made),
        "schedule": _schedule(made),
        "weights": _weights(made),
        "best": _best(made, made.attack is not None or objective.attack is not None),
        "evaluate": _evaluate(made.evaluate),
    }


def call(kind: str, section: Any) -> str:
    """name(option=value, …): of a network what is not the default, of anything else all that is set."""
    factory = config.factory(kind, section["name"])
    parameters, _ = config.signature(factory)
    shown = []
    for key, parameter in parameters.items():
        value = config.plain(section.get(key, parameter.default))
        default = value == config.plain(parameter.default) and key not in SIZES
        if key in HIDDEN or value is None or value is parameter.empty or (default and kind == "models"):
            continue
        nested = isinstance(value, dict) and "name" in value
        shown.append(f"{key}={call(kind, value) if nested else _text(value)}")
    return f"{section['name']}({', '.join(shown)})"


def passes(objective: dict[str, Any]) -> str:
    """The training-mode passes of an objective, in order, as "x, x'": tests/test_passes.py has them run."""
    name, base = objective["name"], objective.get("base")
    if name in ("pgd_at", "trades", "label_smoothing", "score", "dkl"):
        default = {"pgd_at": "adv", "trades": "clean,adv", "dkl": "adv,clean"}.get(name)
        if name == "score":
            default = "adv" if base == "pgd_at" else "clean,adv"
        default = default or ("clean" if base == "standard" else "adv")
        order = objective.get("passes") or default
        order += ",clean" * (bool(objective.get("clean_forward")) or objective.get("forwards") == 3)
        return ", ".join({"clean": "x", "adv": "x'"}[one] for one in order.split(","))
    if name == "iad" and objective.get("passes") == "code":
        first = objective.get("variant", "I") == "I"
        return "x', x', x, from epoch `begin` on x" if first else "x', from epoch `begin` on x"
    if name == "siriib":
        return {"trades": "x, x'", "te_trades": "x, x'"}.get(base or "", "x', x for the added parts alone")
    if name == "ara":
        return passes(objective["base"])
    if name in ("te", "hbar", "ib_rar"):
        default = {"te": "pgd_at", "hbar": "trades", "ib_rar": "pgd_at"}[name]
        order = {"standard": "x", "pgd_at": "x', x" if name == "hbar" else "x'"}
        return order.get(base or default, "x, x'")
    adversarial = objective.get("adversarial", name != "vib")
    return {
        "standard": "x",
        "mart": "x, x'",
        "alp": "x and x' at once",
        "infoat_r": "x, x'",
        "ibd": "x, x'" if adversarial else "x",
        "vib": "x'" if adversarial else "x",
        "ceb": "x'" if adversarial else "x",
        "hat": "x, x', x̃",
        "mma": "x, x', one for each bisection, the mixed batch",
    }.get(name, "x', x")  # ard, iad, rslad, shared_information


def _data(made):
    parts = [made.data.get("dataset", made.data.name)]
    if made.data.get("fraction", 1.0) != 1.0:
        parts.append(f"{100 * made.data.fraction:g} % of its training images")
    if "size" in made.data and made.data.size:
        parts.append(f"{made.data.size} pixels")
    if made.data.get("extra"):
        parts.append(f"{100 * made.data.extra.get('fraction', 0.7):g} % generated images")
    return ", ".join(parts)


def _mode(made):
    text = {"eval": "evaluation", "train": "training", "batch": "that of its batch"}[made.attack_bn]
    return text + ("; statistics of x' alone" if made.bn_statistics == "adv" else "")


def _augment(made):
    if "name" in made.augment:
        parts = [call("augmentations", made.augment)]
    else:
        parts = [f"crop of {made.augment.pad} {made.augment.padding}"] * bool(made.augment.pad)
        parts += ["random resized crop and flip"] * (made.data.name == "stream")
        parts += ["flip"] * made.augment.flip
    parts += [] if made.mix is None else [call("mixes", made.mix)]
    if made.smoothing.delta:
        parts.append(
            f"labels of {made.smoothing.images} images smoothed by {made.smoothing.delta:g} ({made.smoothing.form})"
        )
    return ", ".join(parts) or "none"


def _normalise(model):
    model = model.get("backbone", model)
    if model.get("standardize"):
        return "each image to mean 0, deviation 1"
    return "none" if model.get("mean") is None else NORMALISATIONS[tuple(model.mean), tuple(model.std)]


def _teacher(section):
    return section.workdir.removeprefix("runs/") or "trained with it"


def _attack(section):
    shown = {"loss": section.loss, "steps": section.get("steps", 1), "init": section.get("init", "none")}
    shown |= {"restarts": section.restarts} if section.get("restarts", 1) != 1 else {}
    shown |= {"clip_input": True} if section.get("clip_input") else {}
    shown |= {"decay": config.plain(section.decay)} if section.get("decay") else {}
    return f"{section.name}({', '.join(f'{key}={_text(value)}' for key, value in shown.items())})"


def _threat(section):
    norm = "" if section.norm == "linf" else f"{section.norm} "
    return f"{norm}{section.eps} by {section.step_size}"


def _evaluate(section):
    names = ", ".join(re.sub(r"^cw-(\d+)$", r"margin-\1", name) for name in section.attacks)
    more = f"; also {', '.join(map(str, section.ladder))}" if section.ladder else ""
    return f"{names} at {_threat(section)}{more}"


def _optimizer(made):
    head = made.head_optimizer
    own = f"; of the head {head.name or made.optimizer.name} at {head.lr:g}" if head.lr is not None else ""
    options = {key: value for key, value in config.plain(made.optimizer).items() if key not in ("name", "lr")}
    defaults, _ = config.signature(optim.OPTIMIZERS[made.optimizer.name], ("lr",))
    always = ("momentum", "weight_decay")
    shown = [f"{key}={_text(v)}" for key, v in options.items() if key in always or v != defaults[key].default]
    return f"{made.optimizer.name}({', '.join([f'lr={made.optimizer.lr:g}', *sorted(shown)])}){own}"


def _schedule(made):
    defaults, _ = config.signature(optim.SCHEDULES[made.schedule.name], ("lr", "epochs", "step_in_epochs"))
    options = {key: v for key, v in config.plain(made.schedule).items() if key in defaults}
    stepping = made.schedule.get("stepping") or optim.default_stepping(made.schedule.name)
    by = {"epoch": "by epoch", "step": "by step", "next_step": "by step, one ahead"}[stepping]
    shown = ", ".join(f"{key}={_text(v)}" for key, v in options.items() if v)  # what is zero is not there
    return "constant" if made.schedule.name == "constant" else f"{made.schedule.name}({shown}) {by}"


def _weights(made):
    parts = [] if made.perturb is None else [call("perturbations", made.perturb)]
    if made.ema_decay is not None:
        usual, given = config.base().averaging, made.averaging
        more = "".join(f", {key}={_text(value)}" for key, value in given.items() if value != usual[key])
        parts.append(f"averaged, {made.ema_decay:g}{more}")
    return ", ".join(parts) or "none"


def _best(made, attacked):
    validate = made.validate
    select = validate.select or ("robust" if attacked else "clean")
    every = "each epoch" if validate.every == 1 else f"every {validate.every} epochs"
    dense = "" if validate.dense_from is None else f", each from {validate.dense_from} on"
    stop = ", stops on overfitting" if validate.stop_on_overfitting else ""
    robust = f"{_attack(validate.attack)} at {_threat(validate.attack)}"
    by = {"robust": robust, "clean": "clean accuracy", "mean": f"the mean of clean accuracy and {robust}"}[select]
    return f"{by}; {every}{dense}{stop}"


def _text(value):
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))}{',' * (len(value) == 1)})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_text(item)}' for key, item in value.items())}}}"
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---- the papers ------------------------------------------------------------------------------------------------


def papers(table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """name -> the settings of a paper or its code, with what `like` takes over from another one."""

    def settings(name):
        own = dict(table["paper"][name])
        inherited = settings(own.pop("like")) if "like" in own else {}
        return {**inherited, **own, "why": {**inherited.get("why", {}), **own.get("why", {})}}

    return {name: settings(name) for name in table["paper"]}


def recipes() -> dict[str, dict[str, ConfigDict]]:
    """recipe -> row -> configuration; a recipe of one row calls it ""."""
    found = {}
    for file in sorted(CONFIGS.glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"configs_{file.stem}", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[file.stem] = {row: module.get_config(row or None) for row in getattr(module, "ROWS", ("",))}
    return found


def entries(table: dict[str, Any], rows: dict[str, dict[str, ConfigDict]]) -> dict[str, list[tuple[dict, list[str]]]]:
    """recipe -> [(entry of the table, its rows)]; raises InputError unless every row has exactly one."""
    found: dict[str, list[tuple[dict, list[str]]]] = {name: [] for name in rows}
    for name, of_recipe in rows.items():
        taken: dict[str, int] = dict.fromkeys(of_recipe, 0)
        for entry in (entry for entry in table["row"] if entry["recipe"] == name):
            own = [row for row in of_recipe if any(fnmatch.fnmatchcase(row, p) for p in entry.get("rows", ["*"]))]
            own = [row for row in own if not any(fnmatch.fnmatchcase(row, p) for p in entry.get("but", []))]
            if not own:
                raise InputError(f"docs/papers.toml: {name} has no row {', '.join(entry.get('rows', []))}")
            found[name].append((entry, own))
            for row in own:
                taken[row] += 1
        wrong = [row for row, times in taken.items() if times != 1]
        if wrong:
            raise InputError(f"docs/papers.toml: {name} needs one entry for each of {', '.join(wrong)}")
    return found


def compare(entry: dict[str, Any], paper: dict[str, Any], ours: dict[str, dict[str, str]], where: str) -> list[tuple]:
    """[(aspect, our text by row, theirs, why)]; raises InputError on a difference without a reason, or the reverse."""
    theirs = {**paper, **entry.get("paper_says", {})}
    reasons, own = {**paper["why"], **entry.get("why", {})}, entry.get("why", {})
    lines, problems = [], []
    for aspect in ASPECTS:
        if aspect not in theirs:
            problems.append(f"the paper's {aspect} is missing")
            continue
        said = {row: texts[aspect] if theirs[aspect] == THE_ROW else theirs[aspect] for row, texts in ours.items()}
        mine = {row: texts[aspect] for row, texts in ours.items()}
        differ = [row for row in mine if said[row] not in (mine[row], UNSTATED)]
        if differ and aspect not in reasons:
            problems.append(f"{aspect} of {', '.join(differ)}: '{mine[differ[0]]}' here, '{said[differ[0]]}' there")
        if not differ and aspect in own and UNSTATED not in said.values():
            problems.append(f"a reason for {aspect}, which does not differ")
        needed = differ or UNSTATED in said.values()
        lines.append((aspect, mine, said, reasons.get(aspect, "") if needed else ""))
    if problems:
        raise InputError(f"docs/papers.toml, {where}: " + "; ".join(problems))
    return lines


# ---- the page --------------------------------------------------------------------------------------------------


def page() -> str:
    """The text of docs/recipes.md."""
    table = tomllib.loads(PAPERS.read_text(encoding="utf-8"))
    known, rows, problems = papers(table), recipes(), []
    parts = [table["head"]["text"].strip()]
    for name, of_recipe in entries(table, rows).items():
        parts.append(f"## `configs/{name}.py`")
        for entry, own in of_recipe:
            where = f"{name}.py: {', '.join(own)}"
            paper = known[entry["paper"]]
            try:
                lines = compare(entry, paper, {row: aspects(rows[name][row]) for row in own}, where)
            except InputError as error:
                problems.append(str(error))
                continue
            parts.append(_block(own, paper, entry, lines))
    if problems:
        raise InputError("\n".join(problems))
    return "\n\n".join(parts) + "\n"


def _block(own, paper, entry, lines):
    title = ", ".join(f"`{row}`" for row in own if row) or "its only row"
    heads = ("", "here", paper.get("column", "paper"), "why")
    table = [heads, ("---",) * 4]
    for aspect, mine, said, why in lines:
        same = mine == said
        there = "the same" if same else _cell(said, "not stated")
        table.append((ASPECTS[aspect], _cell(mine) or "–", there, why))
    text = [f"### {title}", paper["title"] + entry.get("also", "")]
    text.append("\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in table))
    beyond = [*paper.get("beyond", []), *entry.get("beyond", [])]
    if beyond:
        text.append("\n".join(f"- {line}" for line in beyond))
    return "\n\n".join(text)


def _cell(texts, unstated=""):
    """One text where all rows agree; else each with its rows, and of a call after the first what differs from it."""
    by_text: dict[str, list[str]] = {}
    for row, text in texts.items():
        by_text.setdefault(unstated if text == UNSTATED else text, []).append(row)
    if len(by_text) == 1:
        return next(iter(by_text))
    first = _parts(next(iter(by_text)))
    lines = []
    for text, own in by_text.items():
        name, *options = parts = _parts(text)
        if parts != first and name == first[0] and first[1:] != [""]:
            named = {option.partition("=")[0] for option in options}
            gone = [key for option in first[1:] if (key := option.partition("=")[0]) not in named]
            text = ", ".join([*(o for o in options if o not in first), *(f"no {key}" for key in gone)])
        lines.append(f"{', '.join(own)}: {text}")
    return "<br>".join(lines)


def _parts(text):
    """A call's name and options, split at the commas of its outermost parentheses; [text] where it is no call."""
    name, bracket, rest = text.partition("(")
    if not bracket or not rest.endswith(")"):
        return [text]
    parts, depth = [""], 0
    for character in rest[:-1]:
        depth += (character in "({") - (character in ")}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [name, *(part.strip() for part in parts)]


if __name__ == "__main__":
    try:
        command("recipes", page())
    except InputError as error:
        sys.exit(str(error))
