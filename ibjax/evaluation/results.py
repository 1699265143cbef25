"""What a result record says. No file is read or written here.

A record is what evaluate.py writes for one network under one attack at one eps.
"""

import base64
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ibjax.attacks.geometry import fraction
from ibjax.attacks.names import parse, with_options

Record = dict[str, Any]  # accuracies in percent
_NAMES = {
    "fgsm": "FGSM",
    "pgd": "PGD",
    "margin": "margin PGD",
    "square": "Square",
    "fab": "FAB",
    "apgd": "APGD",
    "autoattack": "AutoAttack",
    "noise": "noise",
    "bim": "BIM",
    "mim": "MIM",
    "nifgsm": "NI-FGSM",
    "spsa": "SPSA",
    "ara": "ARA",
    "ib_rar": "adaptive PGD (IB-RAR)",
    "siriib": "adaptive PGD (SiRIIB)",
}


def robust_flags(record: Record) -> np.ndarray:
    """The (n,) bool flags of a record: classified correctly both as it is and under the attack."""
    packed = np.frombuffer(base64.b64decode(record["robust_flags"]), np.uint8)
    return np.unpackbits(packed, count=record["n"]).astype(bool)


def validate(record: Record) -> None:
    """Raises ValueError, TypeError, KeyError or AttributeError unless a record has what the functions below need."""
    for name in ("attack", "norm", "dataset", "checkpoint", "selected_on", "robust_flags"):
        if not isinstance(record[name], str):
            raise TypeError(f"{name} is {record[name]!r}")
    if type(record["n"]) is not int or record["n"] < 1:
        raise TypeError(f"n is {record['n']!r}")
    for name, high in (("clean_acc", 100), ("robust_acc", 100), ("max_distance", np.inf)):
        if not 0 <= record[name] <= high:  # NaN fails too
            raise ValueError(f"{name} is {record[name]!r}")
    if not 0 <= fraction(record["eps"]) < np.inf:
        raise ValueError(f"eps is {record['eps']!r}")
    if len(base64.b64decode(record["robust_flags"], validate=True)) != -(-record["n"] // 8):
        raise ValueError("robust_flags do not hold n flags")
    for name, accuracy in record.get("robust_after", {}).items():
        if not 0 <= accuracy <= 100:
            raise ValueError(f"robust_after {name} is {accuracy!r}")
    evaluated = record.get("config", {}).get("evaluate", {})
    for name, value, kind in (
        ("warnings", record.get("warnings", []), list),
        ("versions", record.get("versions", {}), dict),
        ("config.evaluate", evaluated, dict),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name} is {value!r}")


def is_main(record: Record) -> bool:
    """Whether a record is at the eps of the table; the others are the ladder of the curve."""
    if "main" in record:
        return record["main"]
    return record["eps"] == record.get("config", {}).get("evaluate", {}).get("eps")


def is_bounded(record: Record) -> bool:
    """Whether its attack stays within eps; one that looks for the smallest perturbation does not."""
    return record.get("bounded", True)


def weights_of(says: Mapping[str, Any]) -> str | None:
    """The digest of the weights that a record, or what it says of a surrogate, is of; None where it says none."""
    weights = says.get("weights")
    return weights if isinstance(weights, str) else None


def surrogate_of(record: Record) -> dict[str, Any] | None:
    """What a record says of the network that was attacked in place of its own; None where there was none."""
    made = record.get("attack_settings")
    source = made.get("surrogate") if isinstance(made, dict) else None
    return source if isinstance(source, dict) and weights_of(source) else None


def is_transfer(attack: str) -> bool:
    """Whether its images were made on another network, as those of "pgd-100 from teacher"."""
    return " from " in attack


def attack_label(name: str) -> str:
    """As "PGD-20 (restarts 5)" for "pgd-20(restarts=5)", "PGD-9, transfer from teacher" for "pgd-9 from teacher"."""
    name, _, source = name.partition(" from ")
    base, options = parse(name)
    count = options.pop("count", "both")
    family, dash, steps = base.partition("-")
    label = _NAMES.get(family, family) + dash + steps
    said = [f"{option} {value}" for option, value in options.items()]
    if base.startswith("cw-l2-"):
        label, said = f"C&W l2-{base.removeprefix('cw-l2-')}", ["any size", *said]
    if count == "attacked":
        said.append("counts images wrong as they are")
    label += f" ({', '.join(said)})" if said else ""
    return f"{label}, transfer from {source}" if source else label


def departures(record: Record) -> list[str]:
    """Where training, validation and evaluation of a record's network had different threat models, as sentences.

    Training on clean images has none, and of an imported network it is not known: neither is a difference.
    """
    evaluated = {"norm": record["norm"], "eps": record["eps"]}
    found = []
    for what, key in (("trained", "train_threat"), ("validated", "validate_threat")):
        other = record.get(key)
        if isinstance(other, dict) and not _same_threat(other, evaluated):
            found.append(f"{what} in {_threat_in_words(other)}, evaluated in {_threat_in_words(evaluated)}")
    return found


def _same_threat(one, other):
    return one["norm"] == other["norm"] and fraction(one["eps"]) == fraction(other["eps"])


def _threat_in_words(threat):
    norm = {"linf": "l_inf"}.get(threat["norm"], threat["norm"])
    return f"{norm} at eps {threat['eps']}"


def departed(records: Iterable[Record]) -> list[str]:
    """The departures of all records at their main eps, each once and behind the title of its network."""
    mains = [record for record in records if is_main(record)]
    return list(dict.fromkeys(f"{record['title']}: {text}" for record in mains for text in departures(record)))


def strength(attack: str) -> tuple:
    """Sorts one-step attacks before iterative ones, fewer steps before more, and transfer attacks after all others."""
    name, _, source = attack.partition(" from ")
    base, options = parse(name)
    family, _, steps = base.partition("-")
    known = list(_NAMES)
    rank = known.index(family) if family in known else len(known)
    return bool(source), rank, family, int(steps) if steps.isdigit() else 0, steps, with_options("", options), source


def network_label(record: Record) -> str:
    """The run's title; where its predictions were drawn, with "(sampled, 12)": that is another classifier."""
    samples = record.get("samples")
    return f"{record['title']} (sampled, {samples})" if samples else record["title"]


def run_label(record: Record) -> str:
    """The name of a run that is unique where several are read together (`report.read`); else its title."""
    return record.get("run", record["title"])
