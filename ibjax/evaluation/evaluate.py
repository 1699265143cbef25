"""Attacks the test set of a trained run and writes one result record per attack.

An image counts as robust if it is classified correctly both clean and under attack. AutoAttack runs at the main eps
only, and continues where it was interrupted. A stochastic network is evaluated at the mean of its latent variable; with
`samples`, its prediction is the mean of that many sampled softmaxes, and every attack differentiates through this mean
(`scoring.sampling`).

Guarantee (tested in `tests/test_evaluate.py`): a record that is there is not computed again.
"""

import base64
import datetime
import functools
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ibjax import config, files, threat
from ibjax.attacks import autoattack, checks, names
from ibjax.data import Split, check, first_of_each, subset
from ibjax.devices import cluster, precision
from ibjax.errors import InputError, UnreadableError
from ibjax.evaluation import results
from ibjax.evaluation.named import Named, named
from ibjax.evaluation.scoring import Scorer, auto_attack, draw_keys, nan_warnings, percent, sampling
from ibjax.evaluation.settings import check_network, replaced, scaled_step
from ibjax.net import float_on_host, linen_net
from ibjax.runs import own_code, run, rundir, trees

# the fields that must agree for a record to be reused
_IDENTITY = ("weights", "images", "dtype", "attack", "attack_settings", "eps", "step_size", "norm", "seed", "samples")
# "code" is that of the attacks, "attack_code" what one has beside it; the fingerprint covers the network's code
_IDENTITY += ("code", "attack_code", "precision")
log = logging.getLogger(__name__)


def evaluate(
    workdir: Path,
    checkpoint: str | int = "best",
    *,
    settings: Any = None,
    attacks: Sequence[str] | None = None,
    n: int | None = None,
    samples: int | None = None,
    norm: str | None = None,
    eps: str | float | None = None,
    step_size: str | float | None = None,
    batch_size: int | None = None,
    precision: str | None = None,
    surrogate: Path | None = None,
    surrogate_checkpoint: str | int = "best",
    keep: int = 10,
    trust: str | None = None,
) -> list[dict[str, Any]]:
    """Attacks a trained run's test set and writes `eval/<checkpoint>/<attack>.json`; returns the records.

    Networks trained in bfloat16 are attacked and scored in float32.

    Args:
      workdir: of the run.
      checkpoint: "best", "last" or a step.
      settings: an `evaluate` section; None uses the run's own.
      attacks, n, samples, norm, eps, step_size, batch_size, precision: replace the section's values. Another norm needs
        its own eps. With another eps and no `step_size`, the step keeps its ratio to eps. Another norm or eps has no
        ladder.
      surrogate: workdir of a run for transfer attacks: its network, at `surrogate_checkpoint`, is attacked, and the
        adversarial images are evaluated on this run.
      keep: number of adversarial images of each attack at the main eps to keep for the report, from as many classes.
      trust: whether code that the run or the surrogate names may run, as in `ibjax.load`.

    A record on disk is reused if everything that it depends on is the same: weights, images, attack with its settings
    and code, eps, norm, seed, precision, and on a few images the logits and gradients of the network and of the
    surrogate. Records of transfer attacks by earlier versions, which say less about the surrogate, are computed again.
    """
    workdir = files.path(workdir)
    trained = run.load(workdir, checkpoint, trust=trust)
    if settings is None and attacks is None:  # they come from the run's folder, not from the caller
        own_code.permit_attacks(trained.config.evaluate.attacks, workdir / "config.json", trust)
    given = dict(attacks=attacks, n=n, samples=samples, batch_size=batch_size, precision=precision)
    given |= dict(norm=norm, eps=eps, step_size=step_size)
    settings = replaced(trained.config.evaluate if settings is None else settings, **given)
    source = None if surrogate is None else _surrogate(surrogate, surrogate_checkpoint, trained, settings, trust)
    split = run.test_split(trained, settings["n"])
    which = str(trained.step) if str(checkpoint).isdecimal() else str(checkpoint)
    examined = examine(trained, split, which, settings, source)
    return write_records(examined, workdir / "eval" / which, keep)


class Surrogate(NamedTuple):
    """The network that a transfer attack attacks in place of the evaluated one."""

    predict: Callable  # (variables, x) -> (logits, features)
    variables: Any
    says: dict[str, Any]  # its description in records

    def logits(self, x: Any) -> Any:
        """(B, H, W, C) in [0, 1] -> (B, classes)."""
        return self.predict(self.variables, x)[0]

    def fingerprint(self, x: Any) -> np.ndarray:
        """`checks.fingerprint` on these images; the weights are arguments of its programs, not constants in them."""
        return checks.fingerprint(_program(self.predict, self.variables), x)


class Examined(NamedTuple):
    """A network that has been checked on the images on which it will be attacked."""

    trained: run.Run  # its own `evaluate` section decides which records have the usual file names
    split: Split
    settings: dict[str, Any]  # a checked `evaluate` section (`settings.replaced`); its `n` is that of the split
    source: Surrogate | None
    predict: Callable  # (variables, x, keys) -> (logits, features), in float32
    common: dict[str, Any]  # what all records of this evaluation state


def examine(
    trained: run.Run, split: Split, checkpoint: str, settings: Any, source: Surrogate | None = None
) -> Examined:
    """Checks a network, loaded as `checkpoint`, on checked images of its data set; InputError where it is unusable."""
    shown = settings if source is None else {**settings, "attacks": ()}
    check_network(trained.model, trained.facts["input_shape"], shown)
    victim = _victim(trained, settings["samples"])
    of_surrogate = {}
    with precision.at(settings["precision"]):
        x, asked = _asked(trained, victim, split)
        if source is not None:
            of_surrogate["surrogate_fingerprint"] = source.fingerprint(x).tolist()
    common = _common(trained, checkpoint, settings, split, asked) | of_surrogate
    return Examined(trained, split, settings, source, victim, common)


def write_records(examined: Examined, folder: Path, keep: int = 10) -> list[dict[str, Any]]:
    """Attacks an examined network and writes one record per attack and eps into `folder`; returns the records.

    keep: as in `evaluate`. Records that are there are not computed again.
    """
    trained, split, settings, source = examined[:4]
    main, plan, records = settings["eps"], list(_plan(settings, trained, source)), []
    answer = _program(examined.predict, trained.variables)  # one for the pictures of all records

    @functools.lru_cache(maxsize=1)  # keeps one attack's compiled program for its whole ladder of eps
    def executor(name):
        return _executor(named(name, trained.config.objective), examined)

    for number, (name, attack, eps) in enumerate(plan, 1):
        identity = _identity(examined, name, attack, eps)
        file = folder / _file_name(name, eps, settings, source, trained.config.evaluate)
        record = _existing(file, identity)
        cluster.agree(
            "records", {f"{file.name} is there": record is not None}, "give a --workdir that all processes share"
        )
        if record is None:
            rundir.check_writable(folder)
            pictured = keep > 0 and eps == main and source is None and not settings["samples"]
            wanted = first_of_each(split.labels, keep) if pictured else 0
            state = file.with_name(f".{file.stem}-{_state_digest(identity, settings['batch_size'])}.npz")
            title = _title(identity, number, len(plan))
            flags, x_adv, more = executor(name)(eps, identity["step_size"], title, wanted, state)
            record = _record(identity, more, flags)
            if pictured:
                _save_examples(file.with_suffix(".examples.npz"), subset(split, wanted), x_adv, answer)
            if jax.process_index() == 0:
                if not pictured:  # existing examples belong to another evaluation
                    file.with_suffix(".examples.npz").unlink(missing_ok=True)
                files.write_json(file, record)
                state.unlink(missing_ok=True)
        records.append(record)
    return records


def attack_images(
    trained: run.Run,
    split: Split,
    label: str,
    checkpoint: str = "best",
    settings: Any = None,
    trust: str | None = None,
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Attacks any images of a network's shape and classes: (one record per attack, x_adv); writes nothing.

    Args:
      trained: of `ibjax.load`, or `ibjax.pytorch.imports.load`.
      split: (N, H, W, C), or (N, H, W) of grey images, uint8 or float32 in [0, 1], and labels (N,).
      label: name of the images, in place of that of the network's data set.
      checkpoint: as `trained` was loaded with, for the records.
      settings: a checked `evaluate` section (`settings.replaced`); None: the network's own. `n` and `ladder` are not
        used.
      trust: whether attacks of the user's own that the network's own section names may run, as in `ibjax.load`.

    Returns:
      Records as of `evaluate`, and x_adv (attacks, N, H, W, C) float32.
    """
    split = check(split, f"{label}:", trained.facts["num_classes"])
    shape = tuple(trained.facts["input_shape"])
    if split.images.shape[1:] != shape:
        raise InputError(f"the images of {label} have shape {split.images.shape[1:]}, the network takes {shape}")
    if settings is None:
        own_code.permit_attacks(trained.config.evaluate.attacks, trained.workdir / "config.json", trust)
        settings = replaced(trained.config.evaluate)
    trained = trained._replace(facts={**trained.facts, "label": label, "warnings": ()})  # those of its own data
    examined = examine(trained, split, checkpoint, settings)
    eps, records, found = settings["eps"], [], []
    for number, name in enumerate(settings["attacks"], 1):
        attack = named(name, trained.config.objective)
        identity = _identity(examined, name, attack, eps)
        title = _title(identity, number, len(settings["attacks"]))
        flags, x_adv, more = _executor(attack, examined)(eps, identity["step_size"], title, len(split.labels), None)
        records.append(_record(identity, more, flags))
        found.append(x_adv)
    return records, np.stack(found)


def _identity(examined, name, attack, eps):
    """What a record of an attack at a radius states beside its outcome."""
    settings, source = examined.settings, examined.source
    label, made = names.recorded(name), attack.settings
    if source is not None:
        label, made = f"{label} from {source.says['title']}", {**made, "surrogate": source.says}
    own = {"attack": label, "attack_settings": made, "eps": eps, "step_size": _step_size(attack, settings, eps)}
    own["attack_code"] = attack.code()
    return {**examined.common, **own, "main": eps == settings["eps"], "bounded": attack.bounded}


def _title(identity, number, count):
    """The name of an evaluation's progress bar."""
    label = results.attack_label(identity["attack"])
    return f"{identity['title']}: {label}, eps {identity['eps']}, {number} of {count}"


def _warnings(trained, asked):
    """Warnings about the network's data, the network, its checkpoints and its code."""
    code = own_code.doubts(trained.config, rundir.recorded_code(trained.workdir))
    return [*trained.facts.get("warnings", ()), *asked.warnings, *rundir.doubts(trained.workdir), *code]


def _asked(trained, victim, split):
    """(the first images of a split as floats, what `checks.network` finds on them)."""
    keys = draw_keys(trained.config.seed, len(split.labels))
    x = float_on_host(split.images[:256])
    return x, checks.network(_program(victim, trained.variables), x, split.labels, keys[: len(x)])


def _plan(settings, trained, source):
    """(name, attack, eps) of every evaluation: each attack at the main eps, then at each eps of its ladder, if any."""
    main = settings["eps"]
    for name in settings["attacks"]:
        attack = named(name, trained.config.objective)
        ladder = settings["ladder"] if attack.make and attack.bounded and source is None else ()
        for eps in (main, *(eps for eps in ladder if eps != main)):
            yield name, attack, eps


def _surrogate(workdir, checkpoint, trained, settings, trust):
    loaded = run.load(workdir, checkpoint, trust=trust)
    for name in ("input_shape", "num_classes"):
        if loaded.facts[name] != trained.facts[name]:
            raise InputError(
                f"--surrogate={workdir} has {name} {loaded.facts[name]}, the attacked run {trained.facts[name]}; give "
                f"a run on the same data set"
            )
    check_network(loaded.model, loaded.facts["input_shape"], {**settings, "samples": None})
    title = loaded.config.title or loaded.workdir.resolve().name
    says = dict(title=title, step=loaded.step, weights=trees.digest(loaded.variables))
    says["model"] = config.plain(loaded.config.model)
    return Surrogate(linen_net(run.in_float32(loaded.model)).predict, loaded.variables, says)


def _victim(trained, samples):
    """`predict(variables, x, keys)` of the run in float32; stochastic networks use their mean, or `samples` draws."""
    model = run.in_float32(trained.model)
    if samples:
        return sampling(model, samples)
    predict = linen_net(model).predict
    return lambda variables, x, keys: predict(variables, x)


def _executor(attack: Named, examined: Examined):
    """A function (eps, step_size, title, keep, state) -> (flags, `keep` adversarial images, more of the record)."""
    trained, split, settings, source, victim, _ = examined
    norm, batch_size, seed = settings["norm"], settings["batch_size"], trained.config.seed
    attacked = None if source is None else lambda x, keys: source.logits(x)
    if attack.make is None:
        return lambda eps, step_size, title, keep, state: auto_attack(
            lambda x, keys: victim(trained.variables, x, keys)[0], split, seed, attack.of_autoattack(),
            norm=norm, eps=eps, batch_size=batch_size, title=title, keep=keep, state=state,
            attacked=attacked, count=attack.count, attacked_in=settings["precision"],
        )  # fmt: skip
    surrogate = None if source is None else lambda variables, x, keys: source.predict(variables[1], x)
    scorer = make_scorer(
        attack, lambda variables, x, keys: victim(variables[0], x, keys), settings, cluster.mesh(), surrogate
    )
    variables = (trained.variables, None if source is None else source.variables)

    def execute(eps, step_size, title, keep, state):
        started = time.perf_counter()
        flags, x_adv = scorer(variables, split, seed, eps=eps, step_size=step_size, progress=title, keep=keep)
        return flags, x_adv, {"seconds": round(time.perf_counter() - started, 2), "warnings": nan_warnings(flags)}

    return execute


def make_scorer(attack: Named, predict: Callable, settings: Any, mesh: Any, attacked: Callable | None = None) -> Scorer:
    """The scorer of a named attack (not of AutoAttack) under norm, batch size and precision of an `evaluate` section.

    predict, attacked: as of `Scorer`.
    """
    assert attack.make is not None
    unit = math.lcm(attack.group, mesh.size)
    return Scorer(
        predict,
        functools.partial(attack.make, norm=settings["norm"]),
        mesh,
        cluster.rounded_up(settings["batch_size"], unit),
        settings["norm"] if attack.bounded else "l2",
        bounded=attack.bounded,
        features=attack.features is not None,
        guided=attack.guided,
        count=attack.count,
        attacked=attacked,
        own=attack.settings.get("code", {}).get("name"),
        attacked_in=settings["precision"],
    )


def _file_name(attack, eps, settings, source=None, own=None):
    """The file name of a record.

    | record                                                     | name                     |
    |------------------------------------------------------------|--------------------------|
    | usual                                                      | pgd-20.json              |
    | at another eps of the ladder                               | pgd-20@4_255.json        |
    | on a part of the test set                                  | pgd-20.n1000.json        |
    | with sampled predictions                                   | pgd-20.sampled12.json    |
    | transfer attack; digits of the digest of the surrogate     | pgd-20~3fa1c2e4.json     |
    | threat model other than that of `own`, the run's section   | pgd-20.l2.eps0.5.json    |
    """
    surrogate = "" if source is None else f"~{source.says['weights'][:8]}"
    other = "" if own is None or settings["norm"] == own["norm"] else f".{settings['norm']}"
    if own is not None and not threat.same_length(settings["eps"], own["eps"]):
        other += f".eps{names.in_file_name(settings['eps'])}"
    ladder = "" if eps == settings["eps"] else f"@{names.in_file_name(eps)}"
    samples = f".sampled{settings['samples']}" if settings["samples"] else ""
    part = "" if settings["n"] is None else f".n{settings['n']}"
    return f"{names.in_file_name(attack)}{surrogate}{other}{ladder}{samples}{part}.json"


def _step_size(attack, settings, eps):
    """The step size of an attack at `eps` (main or of the ladder); None for AutoAttack, which sets its own."""
    if attack.make is None:
        return None
    main = settings["step_size"] if attack.length is None else attack.length
    scaled = scaled_step({**settings, "step_size": main}, eps)
    return attack._replace(length=None).step_size(eps, scaled)


def _common(trained, checkpoint, settings, split, asked):
    of_card = trained.facts.get("card", {}).get("checkpoint", checkpoint)  # the network of a card is its run's only one
    selected_on = {"best": trained.config.select_on, "last": "last"}.get(of_card, "step")
    imported, classes = ({key: trained.facts[key]} if key in trained.facts else {} for key in ("imported", "classes"))
    return {
        **imported,
        **classes,  # the names of the classes, by label
        **run.origin(trained, checkpoint),
        "dataset": trained.facts["label"],
        "norm": settings["norm"],
        "train_threat": "unknown" if imported else threat.trained(trained.config),
        "validate_threat": "unknown" if imported else threat.validated(trained.config),
        "fixed_step": settings["fixed_step"],
        "samples": settings["samples"],
        "fingerprint": asked.fingerprint.tolist(),
        "code": autoattack.code_digest(),
        "precision": settings["precision"],
        "judged_in": precision.JUDGEMENT,
        "n": len(split.labels),
        "chance_acc": percent(split.labels == np.bincount(split.labels).argmax()),  # of the most frequent class
        "images": trees.digest(split),
        "dtype": "float32",
        "selected_on": "unknown" if imported else selected_on,
        "select": trained.validation.get("select", "robust") if of_card == "best" and not imported else None,
        "validation": trained.validation,
        "config": config.plain(trained.config),
        "warnings": _warnings(trained, asked),
    }


def _state_digest(identity, batch_size):
    """A digest of everything that AutoAttack's progress depends on, for the name of its state file."""
    text = json.dumps({"batch_size": batch_size, **{key: identity[key] for key in _IDENTITY}}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _existing(file, identity):
    """The record in `file`, with the run's current title; None unless it is of the same evaluation and weights.

    The record of a renamed attack is also found under its old name.
    """
    if not file.exists():
        file = file.with_name(names.old(file.name))
    try:
        record = files.read_json(file)
        results.validate(record)
        record["attack"] = names.canonical(record["attack"])
        record["precision"] = precision.of_record(record)
    except FileNotFoundError:
        return None
    except UnreadableError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s is damaged (%s); it is computed again", file, error)
        return None
    wanted = json.loads(json.dumps(identity))
    changed = [key for key in _IDENTITY if not config.same(key, record.get(key), wanted[key])]
    changed += checks.differences(record.get("fingerprint"), wanted["fingerprint"])
    if (of_surrogate := wanted.get("surrogate_fingerprint")) is not None:
        found = checks.differences(record.get("surrogate_fingerprint"), of_surrogate)
        changed += [f"{what} of the surrogate" for what in found]
    if changed:
        log.info("%s is of other %s: computed again", file, ", ".join(changed))
        return None
    return {
        **record,
        **{key: wanted[key] for key in ("title", "config", "main", "train_threat", "validate_threat", "select")},
    }


def _record(identity, more, flags):
    """A record of what is evaluated, with what its attack has found: further fields and flags."""
    warnings = list(dict.fromkeys([*identity["warnings"], *more["warnings"]]))
    finite = flags.loss[np.isfinite(flags.loss)]  # NaN logits have a warning of their own; JSON has no NaN
    return {
        "clean_acc": percent(flags.clean),
        "robust_acc": percent(flags.robust),
        **identity,
        **more,
        "warnings": warnings,
        "changed_by_judgement": int(flags.changed.sum()),
        "max_distance": float(flags.distance.max()),
        "mean_loss": float(np.mean(finite)) if len(finite) else None,
        "date": datetime.date.today().isoformat(),
        "robust_flags": base64.b64encode(np.packbits(flags.robust).tobytes()).decode(),
    }


def _program(predict, variables):
    """(x, …) -> the logits that `predict(variables, x, …)` returns first; the weights are arguments of the program."""
    program = jax.jit(lambda *arguments: predict(*arguments)[0])
    return lambda *arguments: program(variables, *arguments)


def _save_examples(file, split, x_adv, answer):
    """Clean and adversarial images with their predictions, for the report's picture; answer: (x, None) -> logits."""
    x = float_on_host(split.images[:])
    with precision.at(precision.JUDGEMENT):
        logits = [np.asarray(answer(images, None)) for images in (x, x_adv)]
    predicted, predicted_adv = (each.argmax(1) for each in logits)
    if jax.process_index() == 0:  # the other processes only take part in the computation
        file.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(file) as temporary, temporary.open("wb") as handle:
            np.savez_compressed(
                handle, x=x, x_adv=x_adv, label=split.labels, predicted=predicted, predicted_adv=predicted_adv
            )
