"""The HTML page of a report: one file with its style and pictures inside, for screens light and dark and for paper.

This module decides what the page says; `page.html.jinja`, with `parts.html.jinja`, says it in HTML and escapes every
text; `page.css` styles it.
"""

import datetime
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from ibjax.evaluation import results
from ibjax.evaluation.report import commands, figures, progress, self_checks, tables
from ibjax.evaluation.report.self_checks import Check
from ibjax.evaluation.results import attack_label


def page(runs: Sequence[Any], out: Path, each: bool = False) -> str:
    """The page on some `report.RunResults`, to be written to `out`; `each`: a line for every seed of a recipe."""
    records = tables.sources_told_apart(record for run in runs for record in run.records)
    problems = [f"{run.title}: {problem}" for run in runs for problem in run.problems]
    checks = self_checks.checks(records, problems)
    datasets = dict.fromkeys(str(run.facts.get("label", "")) for run in runs if run.facts.get("label"))
    title = ", ".join(run.title for run in runs) if len(runs) < 4 else f"{len(runs)} runs"
    return _template("page").render(
        title=title + (f" on {', '.join(datasets)}" if datasets else ""),
        today=datetime.date.today().isoformat(),
        verdict=_verdict(checks),
        problems=problems,
        tables=_tables(records, each),
        facts=_provenance(records),
        curves=figures.curves(tables.families(records, each)),
        training=figures.training(runs),
        examples=figures.examples(runs),
        checks=checks,
        tolerance=self_checks.TOLERANCE,
        configs=list(map(_config, runs)),
        commands=commands.blocks(runs, out, each),
    )


def live(runs: Sequence[Any], refresh: int) -> str:
    """A page on runs that train, which a browser loads again every `refresh` seconds."""
    records = tables.sources_told_apart(record for run in runs for record in run.records)
    return _template("page").render(
        title=", ".join(run.title for run in runs) if len(runs) < 4 else f"{len(runs)} runs",
        today=f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}",
        refresh=refresh,
        verdict=[],
        problems=[f"{run.title}: {problem}" for run in runs for problem in run.problems],
        progress=progress.grid(runs),
        tables=_tables(records, False),
        facts={},
        curves=None,
        training=figures.training(runs),
        examples=[],
        checks=[],
        configs=[],
        commands=[],
    )


def figure(plot: figures.Plot) -> str:
    """The HTML of one plot."""
    return _template("parts").module.plot(plot)  # pyright: ignore[reportAttributeAccessIssue]


@functools.cache
def _template(name):
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["png"] = figures.png
    return environment.get_template(f"{name}.html.jinja")


def _verdict(checks: Sequence[Check]) -> list[tuple[str, str]]:
    """[(status, text)]: the summary of the checks, for the top of the page."""
    one = {"fail": "check fails", "warn": "with a warning", "pass": "check passes", "not checked": "not checked"}
    many = {**one, "fail": "checks fail", "pass": "checks pass"}
    counts = {status: sum(check.status == status for check in checks) for status in one}
    return [(status, f"{count} {(one if count == 1 else many)[status]}") for status, count in counts.items() if count]


def _tables(records, each):
    """The tables, each with the stages of AutoAttack; means over seeds can be unfolded into the single seeds."""
    single = {table[:3]: table for table in tables.tables(records, each=True)}  # by data set, norm, eps
    for table in tables.tables(records, each):
        grid, every = tables.grid(table), single[table[:3]]
        words = ["An image counts under an attack when it is classified correctly both as it is and attacked."]
        words += ["Worst case: images that withstand all of these attacks."] * (len(table.bounded) > 1)
        yield {
            "table": table,
            "grid": grid,
            "notes": [*words, *grid.notes],
            "single": {"grid": tables.grid(every), "lines": every.lines} if tables.has_seeds(table) else None,
            "stages": tables.stages(table, records, each),
        }


def _provenance(records) -> dict[str, list[str]]:
    """{what: lines} of the attacks, n, seeds, selection, hardware, versions and commits of which the tables result."""
    if not records:
        return {}

    def distinct(values: Iterable) -> str:
        return "; ".join(dict.fromkeys(str(value) for value in values))

    mains = [record for record in records if results.is_main(record)] or records
    ordered = sorted(mains, key=lambda record: results.strength(record["attack"]))
    sizes = sorted({record["n"] for record in records})
    interval = 98 / min(sizes) ** 0.5  # 1.96 standard errors where they are largest, at 50 %
    versions = [" ".join(f"{k} {v}" for k, v in dict(record.get("versions") or {}).items()) for record in records]
    seconds = sum(_number(record.get("seconds")) for record in records)
    facts = {
        "Attacks": [*map(_describe, ordered), f"On the ladder, step sizes {_on_ladder(records)}"],
        "Images": [
            f"n = {distinct(sizes)} of the test set; their sampling leaves each accuracy uncertain by up to "
            f"±{interval:.1f} points (95 %)"
        ],
        "Seeds": [
            f"{distinct(record.get('seed') for record in records)}; a line is one training run, or as many as it says"
        ],
        "Checkpoints": [
            f"{results.run_label(record)}: {record['checkpoint']} at step {record.get('step')}{_selected(record)}"
            f"{_weights(record)}"
            for record in records
        ],
        "Evaluated on": [f"{distinct(record.get('hardware') for record in records)}, {seconds:.0f} s in all"],
        "Versions": [distinct(versions)],
        "Commit": [distinct(record.get("commit") or "none, an installed package" for record in records)],
    }
    return {what: list(dict.fromkeys(lines)) for what, lines in facts.items()}


def _on_ladder(records):
    kinds = {bool(record.get("fixed_step")) for record in records if not results.is_main(record)} or {False}
    return ", or ".join({False: "scale with eps", True: "stay as they are"}[kind] for kind in sorted(kinds))


def _selected(record):
    """How a checkpoint was selected: on which images, and by which accuracy, if the record states it."""
    if record["selected_on"] == "last":
        return ""
    return f", selected on {record['selected_on']}" + (f" by {by} accuracy" if (by := record.get("select")) else "")


def _weights(record):
    return f", weights {weights[:8]}" if (weights := results.weights_of(record)) else ""


def _number(value):
    return value if isinstance(value, int | float) and np.isfinite(value) else 0.0


def _describe(record):
    """An attack's settings, as its record states them."""
    made, label = record.get("attack_settings"), attack_label(record["attack"])
    if not isinstance(made, dict) or not made:
        return label
    if record.get("samples"):
        label += f", on the mean of {record['samples']} drawn predictions"
    if "version" in made:
        parts = ", ".join(map(str, made.get("attacks") or record.get("robust_after", {})))
        return f"{label}: AutoAttack {made['version']}, {parts}"
    if made.keys() >= {"loss", "init", "steps", "restarts"}:
        loss = {"ce": "cross-entropy", "margin": "margin loss"}.get(str(made["loss"]), made["loss"])
        start = "no random start" if made["init"] == "none" else f"{made['init']} random start"
        steps = "1 step" if made["steps"] == 1 else f"{made['steps']} steps"
        text = f"{steps} of {record.get('step_size')} on the {loss}, {start}, {made['restarts']} restart(s)"
    else:
        settings = {name: value for name, value in made.items() if name != "surrogate"}
        text = ", ".join(f"{name} {value}" for name, value in settings.items())
    if source := results.surrogate_of(record):
        text += f"; on the network of {source.get('title')}, step {source.get('step')}{_weights(source)}"
    return f"{label}: {text}"


def _config(run):
    """The configuration of a run, and where the run is from."""
    trained = f"Trained on {run.env['hardware']}. " if run.env.get("hardware") else ""
    if "imported" in run.facts:
        source = commands.imported_from(run)
        trained = f"{source[0].upper()}{source[1:]}; how it was trained is not known, and stands nowhere below. "
    text = json.dumps(run.config, indent=1, ensure_ascii=False)
    return {"title": run.title, "said": trained, "folder": run.folder, "text": text}
