"""Model cards: a folder in the layout of Hugging Face, which is written from a run and can be turned into a run again.

| file              | content                                                                                          |
|-------------------|--------------------------------------------------------------------------------------------------|
| README.md         | metadata of the Hub (YAML), the evaluation with attack, eps and n, how to load it, the recipe    |
| model.safetensors | the variables, named as in checkpoints: params/conv/kernel, batch_stats/…                        |
| config.json       | the run's configuration and facts of its data, and the digests of the weights                    |

Paths of the machine on which the card is written are left out.

Guarantees (tests of the same names): a network that comes back from its card has the same bits; any changed byte of
its weights or of its configuration is found; nothing is unpickled; whatever a title holds is text in the card.
"""

import hashlib
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ibjax import config, files, threat
from ibjax.devices import cluster
from ibjax.errors import CheckpointError, InputError
from ibjax.evaluation import report, results
from ibjax.evaluation.report import grids, provenance, self_checks, tables
from ibjax.evaluation.results import Record, attack_label
from ibjax.pytorch import folders
from ibjax.runs import own_code, recipe_files, run, rundir, trees
from ibjax.runs import provenance as versions

_WEIGHTS = "model.safetensors"


def to_card(workdir: Path, to: Path, checkpoint: str | int = "best") -> Path:
    """Writes the card of a run's network to the folder `to`, which must be new or empty; returns it.

    The evaluation is that of the run's records of exactly these weights.

    Raises InputError or CheckpointError; nothing is written then.
    """
    from safetensors.numpy import save

    to = files.path(to)
    folders.refuse_existing(to)
    trained = run.load(workdir, checkpoint)
    flat = {name: np.asarray(leaf) for name, leaf in trees.flatten(jax.device_get(trained.variables)).items()}
    weights = save(flat, metadata={"format": "flax"})
    about = {
        "checkpoint": str(checkpoint),
        "step": trained.step,
        "validation": trained.validation,
        "weights": trees.digest(trained.variables),
        "sha256": hashlib.sha256(weights).hexdigest(),
        "versions": versions.versions(),
    }
    settings, classes = _published(trained), trained.facts.get("classes") or []
    content = {
        "model_type": "ibjax",
        "architectures": [trained.config.model.name],
        "id2label": {str(i): name for i, name in enumerate(classes)},
        "card": about,
        **_of_run(trained.workdir, settings),
    }
    (found,) = (each for each in report.read([workdir]) if each.folder.resolve() == trained.workdir.resolve())
    records = [record for record in found.records if results.weights_of(record) == about["weights"]]
    text = _readme(trained, about, settings, tables.sources_told_apart(records))
    with folders.whole(to) as folder:
        (folder / _WEIGHTS).write_bytes(weights)
        files.write_json(folder / "config.json", content)
        (folder / "README.md").write_text(text, encoding="utf-8", errors="replace")
    return to


def from_card(folder: Path, workdir: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Makes a run in `workdir`, which must be new or empty, with the network of a card; returns what the card says.

    overrides: of the configuration, where the data lies elsewhere: ["--config.data.data_dir=…"].

    Raises InputError or CheckpointError; nothing is written then.
    """
    folder, workdir = files.path(folder), files.path(workdir)
    folders.refuse_existing(workdir)
    about = _read_about(folder)
    saved, facts = rundir.read_config(folder)
    settings = recipe_files.override(config.loosen(saved.copy_and_resolve_references()), list(overrides))
    config.check(settings)
    rundir.refuse_other_options(folder, saved, settings)
    variables = _read_weights(folder / _WEIGHTS, about, settings, facts)
    facts = {**facts, "card": {"checkpoint": about["checkpoint"], "sha256": about["sha256"]}}
    with folders.whole(workdir) as temporary:
        step, validation = about["step"], about["validation"]
        rundir.write_network(temporary, settings, facts, variables, step=step, validation=validation)
    return about


def _of_run(workdir, settings):
    """The run's own config.json, with the published configuration: what more it says is kept too."""
    content = files.read_json(workdir / "config.json")
    if code := content.get("own_code"):
        where = ({"file": Path(entry["file"]).name} if "file" in entry else {} for entry in code.values())
        content["own_code"] = {path: {**code[path], **file} for path, file in zip(code, where, strict=True)}
    return {**content, "config": config.plain(settings)}


def _published(trained) -> ConfigDict:
    """The configuration without paths of this machine, and with a title."""
    settings = trained.config.copy_and_resolve_references()
    with settings.unlocked():
        settings.title = settings.title or trained.workdir.resolve().name
        _without_paths(own_code.unanchor(settings))
    return settings


def _without_paths(settings):
    settings.writers = None
    for key, value in settings.data.items():
        if key in run.PATHS and value:
            settings.data[key] = Path(value).name
    if settings.data.get("extra"):
        settings.data.extra.path = Path(settings.data.extra.path).name
    for role in config.TEACHERS:
        settings[role].workdir = ""
    for _, recipe in config.recipes(settings):
        _without_paths(recipe)


# ---- reading -----------------------------------------------------------------------------------------------


def _read_about(folder):
    """The section `card` of config.json."""
    file = folder / "config.json"
    try:
        about = files.read_json(file, sealed=True)["card"]
        kinds = {"checkpoint": str, "step": int, "validation": dict, "weights": str, "sha256": str}
        if wrong := [key for key, kind in kinds.items() if type(about[key]) is not kind]:
            raise ValueError(f"card.{wrong[0]} is {about[wrong[0]]!r}")
        return about
    except FileNotFoundError:
        raise InputError(f"--card={folder} has no config.json; give a folder that --to=card has written") from None
    except KeyError as error:
        raise InputError(f"{file} is not that of a card of ibjax (it has no {error})") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); download it again") from None


def _read_weights(file, about, settings, facts):
    """The variables, each of the shape that the network has; raises CheckpointError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        content = files.read_bytes(file)
    except FileNotFoundError:
        raise InputError(f"{file} is missing; download it, with git lfs pull if it was cloned") from None
    if (found := hashlib.sha256(content).hexdigest()) != about["sha256"]:
        raise CheckpointError(f"{file} has SHA-256 {found}, config.json says {about['sha256']}; download it again")
    try:
        flat = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is no safetensors file of arrays ({error})") from None
    model = run.build_model(settings.model, facts["num_classes"], "model")
    wanted = trees.flatten(run.abstract_variables(model, tuple(facts["input_shape"]), cluster.mesh()))
    shapes = [{name: trees.shape_and_type(leaf) for name, leaf in tree.items()} for tree in (flat, wanted)]
    if wrong := sorted(name for name in {*flat, *wanted} if shapes[0].get(name) != shapes[1].get(name)):
        is_, want = (trees.kind(each.get(wrong[0])) for each in shapes)
        raise CheckpointError(f"{file} is of another network: {wrong[0]} is {is_}, the configuration makes it {want}")
    variables = {"params": {}, "batch_stats": {}, **trees.nest({name: jnp.asarray(flat[name]) for name in wanted})}
    if trees.digest(variables) != about["weights"]:
        raise CheckpointError(f"{file} does not hold the weights of config.json; download both again")
    return variables


# ---- the text ----------------------------------------------------------------------------------------------


def _readme(trained, about, settings, records: Sequence[Record]) -> str:
    name = settings.title
    sections = [
        f"# {grids.in_markdown(name)}",
        _description(trained, about),
        "## Evaluation\n\n" + _evaluation(records),
        _loading(trained),
        f"## Recipe\n\n{_again(trained)}\n\n"
        f"```json\n{json.dumps(config.plain(settings), indent=1, ensure_ascii=False)}\n```",
    ]
    return f"---\n{_front_matter(trained, name, records)}---\n\n" + "\n\n".join(sections) + "\n"


def _again(trained):
    """How the network is made again; the recipe of an imported or masked one does not train it."""
    if "masked" in trained.facts:
        return "It is a trained network that `ibjax.analysis.mask` has masked since; this recipe does not train it."
    if "imported" in trained.facts:
        return "It was imported; this recipe does not train it."
    return (
        "`python -m ibjax.main --config=CARD/config.json --workdir=…` trains it again, with the data and the teachers "
        "in place."
    )


def _front_matter(trained, name, records):
    """The metadata; the value of each key is JSON, which YAML contains."""
    dataset = str(trained.config.data.get("dataset", trained.facts["label"]))
    objective = [] if "imported" in trained.facts else [trained.config.objective.name]
    found: dict[str, Any] = {
        "library_name": "ibjax",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "adversarial-robustness", "jax", "flax", "ibjax", *objective],
        "datasets": [dataset],
        "metrics": ["accuracy"],
    }
    if mains := [record for record in records if results.is_main(record)]:
        sizes = [f"n = {r['n']}" + (f", mean of {r['samples']} samples" if r.get("samples") else "") for r in mains]
        measured = {f"clean accuracy, {size}": r["clean_acc"] for r, size in zip(mains, sizes, strict=True)}
        measured |= {
            f"accuracy under {attack_label(r['attack'])}, {r['norm']}, eps {r['eps']}, {size}": r["robust_acc"]
            for r, size in zip(mains, sizes, strict=True)
        }
        result = {
            "task": {"type": "image-classification", "name": "image classification"},
            "dataset": {"type": dataset, "name": trained.facts["label"], "split": "test"},
            "metrics": [
                {"type": "accuracy", "name": text, "value": round(value, 4)} for text, value in measured.items()
            ],
        }
        found["model-index"] = [{"name": name, "results": [result]}]
    return "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in found.items())


def _description(trained, about):
    shape, classes = tuple(trained.facts["input_shape"]), trained.facts["num_classes"]
    count = sum(leaf.size for leaf in jax.tree.leaves(trained.variables["params"]))
    seen = threat.trained(trained.config)
    if "imported" in trained.facts:
        how = "It was imported; how it was trained is not known to ibjax, and the recipe below does not say."
    else:
        images = "clean images" if seen is None else f"adversarial images in {seen['norm']} at eps {seen['eps']}"
        how = f"It was trained with `{trained.config.objective.name}` on {images}, seed {trained.config.seed}"
        how += ", and masked afterwards by `ibjax.analysis.mask`." if "masked" in trained.facts else "."
    names = {"best": f"best on {trained.config.select_on}", "last": "the last"}
    chosen = names.get(about["checkpoint"], "as asked for")
    text = (
        f"An image classifier of ibjax: `{trained.config.model.name}` with {count:,} parameters, for images {shape} in "
        f"[0, 1], which it normalises itself, and {classes} classes of "
        f"{grids.in_markdown(trained.facts['label'])}. {how} Checkpoint: step {about['step']}, {chosen}."
    )
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _evaluation(records):
    if not records:
        return "It has not been evaluated."
    parts = []
    for table in tables.tables(records):
        parts += [grids.markdown(grid).rstrip() for grid in (tables.grid(table), *tables.stages(table, records))]
    parts.append("An image counts under an attack when it is classified correctly both as it is and attacked.")
    facts = provenance.facts(records)
    parts.append("\n".join(f"- {what}: {grids.in_markdown('; '.join(lines))}" for what, lines in facts.items()))
    doubts = [check for check in self_checks.checks(records) if check.status in ("fail", "warn")]
    if doubts:
        parts.append("Checks of these numbers that fail or warn:")
        said = [f"{check.name}: {'; '.join(check.details)}" for check in doubts]
        parts.append("\n".join(f"- {grids.in_markdown(text)}" for text in said))
    return "\n\n".join(parts)


def _loading(trained):
    height, width, channels = trained.facts["input_shape"]
    return f"""## Use

```sh
pip install ibjax                                                # and JAX for your hardware
hf download USER/NAME --local-dir=CARD                           # or copy the folder
python -m ibjax.convert --card=CARD --workdir=RUN
```

```python
import ibjax

run = ibjax.load("RUN")
logits = run.logits_fn(x)  # x (B, {height}, {width}, {channels}) in [0, 1] -> (B, {trained.facts["num_classes"]})
```

`python -m ibjax.evaluate --workdir=RUN` attacks it; `--config.teacher.workdir=RUN` makes it a teacher. Nothing in this
folder is code, and nothing is unpickled."""


def summary(about: Mapping[str, Any]) -> str:
    """What a card says of its network, in words."""
    return f"checkpoint {about['checkpoint']} at step {about['step']}, weights {about['weights'][:8]}"
