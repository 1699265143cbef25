"""How the numbers of a report were made, in words."""

from collections.abc import Iterable, Sequence

import numpy as np

from ibjax.devices import precision
from ibjax.evaluation import results
from ibjax.evaluation.results import Record, attack_label


def facts(records: Sequence[Record]) -> dict[str, list[str]]:
    """{what: lines} of the attacks, n, seeds, selection, hardware, versions and commits that produced the tables."""
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
    found = {
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
        "Precision": [_precision(records)],
        "Evaluated on": [f"{distinct(record.get('hardware') for record in records)}, {seconds:.0f} s in all"],
        "Versions": [distinct(versions)],
        "Commit": [distinct(record.get("commit") or "none, an installed package" for record in records)],
    }
    return {what: list(dict.fromkeys(lines)) for what, lines in found.items()}


def _on_ladder(records):
    kinds = {bool(record.get("fixed_step")) for record in records if not results.is_main(record)} or {False}
    return ", or ".join({False: "scale with eps", True: "stay as they are"}[kind] for kind in sorted(kinds))


def _precision(records):
    """The precisions of float32 products, and how many flags the judgement at another one than the attack's changed."""
    names = "; ".join(
        dict.fromkeys(
            f"attacks at {precision.of_record(record)}, flags judged at "
            f"{record.get('judged_in') or precision.of_record(record)}"
            for record in records
        )
    )
    counted = [record for record in records if "changed_by_judgement" in record]
    changed, flags = (sum(_number(record.get(key)) for record in counted) for key in ("changed_by_judgement", "n"))
    return f"{names}; {changed:.0f} of {flags:.0f} flags were changed by this judgement" if counted else names


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
