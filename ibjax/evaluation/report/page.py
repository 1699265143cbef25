"""The HTML page of a report: one file with its style and pictures inside, for screens light and dark and for paper.

This module decides what the page says; `page.html.jinja`, with `parts.html.jinja`, says it in HTML and escapes every
text; `page.css` styles it.
"""

import datetime
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from ibjax.evaluation.report import commands, figures, progress, provenance, self_checks, tables
from ibjax.evaluation.report.self_checks import Check


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
        facts=provenance.facts(records),
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


def _config(run):
    """The configuration of a run, and where the run is from."""
    trained = f"Trained on {run.env['hardware']}. " if run.env.get("hardware") else ""
    if (source := commands.origin_of(run)) is not None:
        known = "" if "masked" in run.facts else "; how it was trained is not known, and stands nowhere below"
        trained = f"{source[0].upper()}{source[1:]}{known}. "
    text = json.dumps(run.config, indent=1, ensure_ascii=False)
    return {"title": run.title, "said": trained, "folder": run.folder, "text": text}
