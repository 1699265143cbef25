"""Interprets result records; reads and writes no file.

A record is what evaluate.py writes for one network under one attack at one eps.
"""

import base64
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ibjax.attacks.geometry import fraction
from ibjax.attacks.names import counted, parse, with_options

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
    "pgd-t": "targeted PGD",
    "deepfool": "DeepFool",
    "sparse-rs": "Sparse-RS",
    "bim": "BIM",
    "mim": "MIM",
    "nifgsm": "NI-FGSM",
    "spsa": "SPSA",
    "ara": "ARA",
    "ib_rar": "adaptive PGD (IB-RAR)",
    "siriib": "adaptive PGD (SiRIIB)",
}


def robust_flags(record: Record) -> np.ndarray:
    """The (n,) bool flags of a record: which images count as robust."""
    packed = np.frombuffer(base64.b64decode(record["robust_flags"]), np.uint8)
    return np.unpackbits(packed, count=record["n"]).astype(bool)


def validate(record: Record) -> None:
    """Raises ValueError, TypeError, KeyError or AttributeError unless a record has the fields that are used below."""
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
    """Whether a record is at the main eps, that of the table; the others belong to the ladder of the curve."""
    if "main" in record:
        return record["main"]
    return record["eps"] == record.get("config", {}).get("evaluate", {}).get("eps")


def is_bounded(record: Record) -> bool:
    """Whether its attack is bounded by eps; attacks that minimise the perturbation are not."""
    return record.get("bounded", True)


def weights_of(says: Mapping[str, Any]) -> str | None:
    """The digest of the weights in a record, or in its description of a surrogate; None where it has none."""
    weights = says.get("weights")
    return weights if isinstance(weights, str) else None


def surrogate_of(record: Record) -> dict[str, Any] | None:
    """A record's description of the surrogate of a transfer attack; None for other attacks."""
    made = record.get("attack_settings")
    source = made.get("surrogate") if isinstance(made, dict) else None
    return source if isinstance(source, dict) and weights_of(source) else None


def is_transfer(attack: str) -> bool:
    """Whether an attack is a transfer attack, such as "pgd-100 from teacher"."""
    return " from " in attack


def is_pgd(attack: str) -> bool:
    """Whether an attack is untargeted PGD with the gradients of the network itself."""
    return not is_transfer(attack) and counted(parse(attack)[0])[0] in ("pgd", "pgd-scaled")


def attack_label(name: str) -> str:
    """The printed name: "PGD-20 (restarts 5)" for "pgd-20(restarts=5)", "PGD-9, transfer from X" for "pgd-9 from X"."""
    name, _, source = name.partition(" from ")
    base, options = parse(name)
    count = options.pop("count", "both")
    label = base
    for family in sorted(_NAMES, key=len, reverse=True):
        if base == family or base.startswith(f"{family}-"):
            label = _NAMES[family] + base.removeprefix(family)
            break
    said = [f"{option} {value}" for option, value in options.items()]
    if base.startswith("cw-l2-"):
        label, said = f"C&W l2-{base.removeprefix('cw-l2-')}", ["any size", *said]
    if count == "attacked":
        said.append("judged under attack only")
    label += f" ({', '.join(said)})" if said else ""
    return f"{label}, transfer from {source}" if source else label


def threat_label(record: Record) -> str:
    """The attack of a record with its threat model, as in "PGD-20, linf eps 8/255"."""
    return f"{attack_label(record['attack'])}, {record['norm']} eps {record['eps']}"


def departures(record: Record) -> list[str]:
    """Sentences that say where training, validation and evaluation of a network used different threat models.

    Training on clean images has no threat model, and that of an imported network is unknown: neither is a difference.
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
    """The departures of all records at their main eps, each listed once, after the title of its network."""
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
    """The run's title; for sampled predictions, which are another classifier, with a suffix such as "(sampled, 12)"."""
    samples = record.get("samples")
    return f"{record['title']} (sampled, {samples})" if samples else record["title"]


def run_label(record: Record) -> str:
    """The run's name that is unique among runs read together (`report.read`), if it has one; else its title."""
    return record.get("run", record["title"])
