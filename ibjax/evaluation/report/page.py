"""The HTML page of a report: one file with its style and pictures inside, for screens light and dark and for paper.

All text that does not come from this file is passed through `escape`.
"""

import datetime
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ibjax.evaluation import results
from ibjax.evaluation.report import commands, figures, self_checks, tables
from ibjax.evaluation.report.commands import Block
from ibjax.evaluation.report.figures import escape
from ibjax.evaluation.report.self_checks import Check
from ibjax.evaluation.report.tables import Table
from ibjax.evaluation.results import attack_label


def page(runs: Sequence[Any], out: Path, each: bool = False) -> str:
    """The page on some `report.RunResults`, to be written to `out`; `each`: a line for every seed of a recipe."""
    records = tables.sources_told_apart(record for run in runs for record in run.records)
    problems = [f"{run.title}: {problem}" for run in runs for problem in run.problems]
    checks = self_checks.checks(records, problems)
    datasets = dict.fromkeys(str(run.facts.get("label", "")) for run in runs if run.facts.get("label"))
    title = ", ".join(run.title for run in runs) if len(runs) < 4 else f"{len(runs)} runs"
    title += f" on {', '.join(datasets)}" if datasets else ""
    sections = [
        _problems(problems),
        *_tables(records, each),
        _provenance(records),
        figures.curves(tables.families(records, each)),
        figures.training(runs),
        figures.examples(runs),
        _checks(checks),
        _configs(runs),
        _commands(commands.blocks(runs, out, each)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # forbids scripts and network access, in case a file has smuggled something in
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        f'<header><p class="kind">ibjax robustness report, {datetime.date.today().isoformat()}</p>\n'
        f"<h1>{escape(title)}</h1>\n{_verdict(checks)}</header>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


# ---- text --------------------------------------------------------------------------------------------------

_SYMBOLS = {"fail": "✗", "warn": "!", "pass": "✓", "not checked": "–"}


def _badge(status, text=None):
    kind = status.replace(" ", "-")
    return f'<span class="badge {kind}">{_SYMBOLS[status]} {escape(text or status)}</span>'


def _verdict(checks: Sequence[Check]) -> str:
    """The summary of the checks, for the top of the page."""
    counts = {status: sum(check.status == status for check in checks) for status in _SYMBOLS}
    one = {"fail": "check fails", "warn": "with a warning", "pass": "check passes", "not checked": "not checked"}
    many = {**one, "fail": "checks fail", "pass": "checks pass"}
    badges = (
        _badge(status, f"{count} {(one if count == 1 else many)[status]}") for status, count in counts.items() if count
    )
    return f'<p><a class="plain" href="#checks">{" ".join(badges)}</a></p>\n'


def _problems(problems):
    if not problems:
        return ""
    items = "".join(f"<li>{escape(problem)}</li>" for problem in problems)
    return f'<section class="problems" role="note"><strong>Missing or damaged</strong><ul>{items}</ul></section>'


def _tables(records, each):
    """The tables, each followed by the stages of AutoAttack; means over seeds can be unfolded into the single seeds."""
    single = {table[:3]: table for table in tables.tables(records, each=True)}  # by data set, norm, eps
    for table in tables.tables(records, each):
        caption = f"{escape(table.dataset)}, {_norm(table.norm)}, eps {escape(table.eps)}: accuracy in percent"
        meant = any(line.clean.of > 1 for line in table.lines)
        unfolded = f"<details><summary>Every seed</summary>{_grid(single[table[:3]])}</details>" if meant else ""
        words = ["An image counts under an attack when it is classified correctly both as it is and attacked."]
        words += ["Worst case: images that withstand all of these attacks."] * (len(table.bounded) > 1)
        stages = "".join(map(_stages, tables.stages(table, records, each)))
        note = escape(" ".join([*words, *tables.notes(table)]))
        yield f'<section>{_grid(table, caption)}<p class="note">{note}</p>{unfolded}{stages}</section>'


def _grid(table: Table, caption: str = "") -> str:
    """One table as HTML; a checkpoint that was selected on the test set carries a red label."""
    head, *body = tables.cells(table)
    columns = "".join(f'<th scope="col">{" ".join(map(_word, cell.split()))}</th>' for cell in head)
    lines = []
    for line, (label, selection, *numbers) in zip(table.lines, body, strict=True):
        if line.selected_on == "test":
            selection = f'{escape(line.checkpoint)} <span class="test">selected on test</span>'
        else:
            selection = escape(selection)
        numbers = "".join(f"<td>{escape(number)}</td>" for number in numbers)
        lines.append(f'<tr><th scope="row">{escape(label)}</th><td class="word">{selection}</td>{numbers}</tr>')
    above = f"<caption>{caption}</caption>" if caption else ""
    kind = "results worst" if head[-1] == "worst case" else "results"
    return (
        f'<div class="scroll"><table class="{kind}">{above}'
        f"<thead><tr>{columns}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _word(word):
    """A word of a heading, in which only the slashes of a path allow a line break."""
    return f"<span>{escape(word).replace('/', '/<wbr>')}</span>"


def _stages(grid):
    head, *body = grid
    columns = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    lines = (
        f'<tr><th scope="row">{escape(label)}</th>{"".join(f"<td>{escape(number)}</td>" for number in numbers)}</tr>'
        for label, *numbers in body
    )
    return (
        '<div class="scroll"><table class="results"><caption>Robust accuracy after each attack, in percent</caption>'
        f"<thead><tr>{columns}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _norm(norm):
    return {"linf": "l<sub>∞</sub>", "l2": "l<sub>2</sub>"}.get(norm, escape(norm))


def _provenance(records):
    """Attacks, n, seeds, selection, hardware, versions and commits from which the tables result."""
    if not records:
        return ""

    def distinct(values: Iterable) -> str:
        return escape("; ".join(dict.fromkeys(str(value) for value in values)))

    mains = [record for record in records if results.is_main(record)] or records
    ordered = sorted(mains, key=lambda record: results.strength(record["attack"]))
    sizes = sorted({record["n"] for record in records})
    interval = 98 / min(sizes) ** 0.5  # 1.96 standard errors where they are largest, at 50 %
    versions = [" ".join(f"{k} {v}" for k, v in dict(record.get("versions") or {}).items()) for record in records]
    facts = {
        "Attacks": "<br>".join(dict.fromkeys(escape(_describe(record)) for record in ordered))
        + f"<br>On the ladder, step sizes {_on_ladder(records)}",
        "Images": f"n = {distinct(sizes)} of the test set; their sampling leaves each accuracy uncertain by up to "
        f"±{interval:.1f} points (95 %)",
        "Seeds": distinct(record.get("seed") for record in records)
        + "; a line is one training run, or as many as it says",
        "Checkpoints": "<br>".join(
            dict.fromkeys(
                escape(f"{results.run_label(record)}: {record['checkpoint']} at step {record.get('step')}")
                + escape(_selected(record) + _weights(record))
                for record in records
            )
        ),
        "Evaluated on": distinct(record.get("hardware") for record in records)
        + f", {sum(_number(record.get('seconds')) for record in records):.0f} s in all",
        "Versions": distinct(versions),
        "Commit": distinct(record.get("commit") or "none, an installed package" for record in records),
    }
    items = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in facts.items())
    return f'<section><h2>How these numbers were made</h2><dl class="facts">{items}</dl></section>'


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
        settings = {name: value for name, value in made.items() if name not in ("surrogate", "code")}
        text = ", ".join(f"{name} {value}" for name, value in settings.items())
    if source := results.surrogate_of(record):
        text += f"; on the network of {source.get('title')}, step {source.get('step')}{_weights(source)}"
    return f"{label}: {text}"


def _checks(checks):
    items = []
    for check in checks:
        details = "".join(f"<li>{escape(text)}</li>" for text in check.details)
        items.append(
            f"<tr><td>{_badge(check.status)}</td><td><strong>{escape(check.name)}</strong><ul>{details}</ul></td></tr>"
        )
    return (
        '<section id="checks"><h2>Self-checks</h2><p class="note">Computed from the records of this page, in percent; '
        f"{self_checks.TOLERANCE} points are allowed between two attacks and between two eps.</p>"
        f'<table class="checks"><tbody>{"".join(items)}</tbody></table></section>'
    )


def _configs(runs):
    parts = []
    for run in runs:
        trained = f"Trained on {run.env['hardware']}. " if run.env.get("hardware") else ""
        if "imported" in run.facts:
            source = commands.imported_from(run)
            trained = f"{source[0].upper()}{source[1:]}; how it was trained is not known, and stands nowhere below. "
        text = json.dumps(run.config, indent=1, ensure_ascii=False)
        parts.append(
            f"<details><summary>{escape(run.title)}</summary><p class=note>{escape(trained)}Folder: "
            f"<code>{escape(run.folder)}</code></p><pre>{escape(text)}</pre></details>"
        )
    return f"<section><h2>Configurations</h2>{''.join(parts)}</section>"


def _commands(blocks: Sequence[Block]) -> str:
    """HTML of the blocks: the commands can be copied, the headings are not part of the copied text."""
    parts = []
    for block in blocks:
        lines = f"<pre>{escape(chr(10).join(block.commands))}</pre>" if block.commands else ""
        parts.append(f'<p class="what">{escape(block.heading)}</p>{lines}')
    return f"<section><h2>Commands</h2>{''.join(parts)}</section>"


_CSS = """
:root { color-scheme: light; --bg: #fff; --fg: #1c1f24; --muted: #5a626e; --line: #d9dde3; --soft: #f4f6f8;
  --red: #b3261e; --amber: #8a5300; --green: #1a6b3c;
  --s0: #0068ad; --s1: #c44e00; --s2: #00805c; --s3: #a8407d; --s4: #946b00; --s5: #4a57c4; --s6: #5a626e; }
@media screen and (prefers-color-scheme: dark) {
  :root { color-scheme: dark; --bg: #15181d; --fg: #e4e7eb; --muted: #a0a8b4; --line: #363c46; --soft: #1e2229;
    --red: #ff8a80; --amber: #f0b355; --green: #6fd39a;
    --s0: #5eb1ef; --s1: #ff9457; --s2: #43cc9e; --s3: #e893c6; --s4: #e0b64c; --s5: #9aa5ff; --s6: #a0a8b4; }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--bg); color: var(--fg);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif }
main { max-width: 72rem; margin: 0 auto; padding: 2rem 1.25rem 4rem }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .1rem 0 .6rem; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem; padding-top: .6rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.4rem 0 .2rem; overflow-wrap: anywhere }
.what { margin: 1rem 0 .2rem; font-size: .875rem; font-weight: 500; overflow-wrap: anywhere }
p { margin: .4rem 0 } .kind, .note, figcaption { color: var(--muted) } .kind { margin: 0 }
.note, figcaption { font-size: .875rem; max-width: 46rem }
a.plain { color: inherit; text-decoration: none }
a:focus-visible, summary:focus-visible { outline: 2px solid var(--s0) }
code, pre { font: .8125rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace }
pre { background: var(--soft); padding: .75rem 1rem; overflow-x: auto; border-radius: 6px; margin: .5rem 0 }
.scroll { overflow-x: auto }
table { border-collapse: collapse }
.results { width: 100%; margin-top: 1.4rem; font-size: .9375rem; font-variant-numeric: tabular-nums }
.results caption { text-align: left; font-weight: 600; padding-bottom: .4rem }
.results th, .results td { padding: .38rem .55rem; text-align: right; border-bottom: 1px solid var(--line) }
.results thead th { border-bottom: 2px solid var(--fg); font-weight: 600; vertical-align: bottom }
.results th[scope=row], .results th:first-child { text-align: left; padding-left: 0 }
.results th[scope=row] { font-weight: 500; min-width: 8rem; position: sticky; left: 0; background: var(--bg) }
.results thead span { white-space: nowrap } .results td { white-space: nowrap }
.results .word, .results th:nth-child(2) { text-align: left }
.results td:last-child, .results th:last-child { padding-right: 0 }
.badge, .test { display: inline-block; white-space: nowrap; font-size: .8125rem; font-weight: 600; line-height: 1.4;
  padding: .05rem .5rem; border: 1px solid currentColor; border-radius: 1rem }
.pass { color: var(--green) } .warn { color: var(--amber) } .not-checked { color: var(--muted) }
.fail { color: #fff; background: #b3261e; border-color: #b3261e }
.results .test { display: block; width: max-content }
.test { color: #fff; background: #b3261e; border-color: #b3261e }
.problems { border-left: 4px solid var(--amber); background: var(--soft); padding: .6rem 1rem; margin: 1rem 0 }
.problems ul { margin: .3rem 0 0; padding-left: 1.2rem; overflow-wrap: anywhere }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; margin: .6rem 0;
  font-size: .875rem }
.facts dt { font-weight: 600 } .facts dd { margin: 0; overflow-wrap: anywhere }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.3rem; list-style: none; margin: .5rem 0; padding: 0;
  font-size: .875rem }
figure { margin: 0 0 1.2rem } svg { display: block; width: 100%; min-width: 40rem; height: auto }
svg * { stroke-linejoin: round } svg text { font-family: inherit !important }
.strip { font-size: .8125rem; font-variant-numeric: tabular-nums; margin: .4rem 0 }
.strip th, .strip td { padding: .15rem .2rem; text-align: center; font-weight: 500 }
.strip th { max-width: 4.6rem; overflow-wrap: anywhere }
.strip th[scope=row] { max-width: none; text-align: left; padding-right: .8rem; white-space: nowrap;
  color: var(--muted) }
.strip img { display: block; width: 4.6rem; max-width: none; image-rendering: pixelated; border: 1px solid var(--line) }
.wrong { color: var(--red); font-weight: 700 }
.checks { width: 100%; margin-top: .6rem } .checks td:first-child { width: 8rem }
.checks td { padding: .5rem .8rem .5rem 0; vertical-align: top; border-bottom: 1px solid var(--line) }
.checks strong { font-weight: 600 } .checks ul { margin: .1rem 0 0; padding: 0; list-style: none; font-size: .875rem;
  color: var(--muted); overflow-wrap: anywhere }
summary { cursor: pointer; padding: .3rem 0; font-weight: 500 }
@media (max-width: 40rem) { .facts { grid-template-columns: 1fr; gap: 0 } .facts dd { margin-bottom: .5rem }
  .checks td:first-child { width: 5.5rem } }
@media (min-width: 60rem) { .worst tr > :last-child { position: sticky; right: 0; background: var(--bg) } }
@media print {
  body { font-size: 10.5pt } main { max-width: none; padding: 0 } svg { min-width: 0 }
  h2, h3 { break-after: avoid } figure, .results, .checks tr { break-inside: avoid } .scroll { overflow: visible }
  .badge, .test, .strip img, svg { print-color-adjust: exact; -webkit-print-color-adjust: exact }
  .strip img { width: 3.4rem } pre { white-space: pre-wrap }
}
"""
