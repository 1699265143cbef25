"""The threat model of a run: norm and eps, stated once for training attack, validation attack and evaluation.

    threat = dict(norm, eps)

A section of the configuration whose norm or eps is None uses those of `threat`; a step size that is None is a quarter
of the section's eps. The recipe of a teacher or a contrast without a threat model uses that of the configuration that
contains it.

Guarantees (tests of the same names): the threat model of the command line is that of every attack and every run; what a
section states itself is kept, and the rest follows `threat`.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ibjax.attacks import geometry
from ibjax.calls import ATTACKS, THREAT, factory, lengths, lookup, recipes, signature
from ibjax.errors import InputError


def own() -> dict[str, Any]:
    """Norm, eps and step size for a section that takes all three from `threat`: each is None."""
    return {key: placeholder(str) for key in (*THREAT, "step_size")}


def held(recipe: ConfigDict) -> ConfigDict:
    """Removes the threat model of a teacher's or contrast's recipe, which then takes the enclosing configuration's."""
    recipe.threat = {key: placeholder(str) for key in THREAT}
    return recipe


def effective(config: ConfigDict) -> ConfigDict:
    """A copy in which every attack states the norm, the eps and the step size that it runs with; nothing else changes.

    Raises InputError if these values do not form a valid threat model.
    """
    made = config.copy_and_resolve_references()
    with made.unlocked():
        _say_all(made)
    return made


def _say_all(config):
    say(config)
    in_each_recipe(config, _say_all)


def in_each_recipe(config: ConfigDict, act: Callable[[ConfigDict], None]) -> None:
    """Calls `act` on each recipe that a configuration contains, after it has inherited the threat model.

    The message of an InputError is prefixed with the place of the recipe.
    """
    for name, recipe in recipes(config):
        try:
            inherit(recipe, config)
            act(recipe)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None


def inherit(recipe: ConfigDict, holder: ConfigDict) -> None:
    """Fills norm and eps that a recipe leaves open from the configuration that contains the recipe."""
    for key in THREAT:
        if lookup(recipe, f"threat.{key}") is None:
            recipe.threat[key] = holder.threat[key]


def say(config: ConfigDict) -> None:
    """Writes norm, eps and step size, in place, into the sections that take them and leave them None; see `effective`.

    The recipes that the configuration contains are not changed.
    """
    for key in THREAT:
        if lookup(config, f"threat.{key}") is None:
            raise InputError(f"threat.{key} is missing; give threat=dict(norm='linf', eps='8/255')")
    check_length(config.threat.eps, config.threat.norm, "threat.eps")
    for path in ATTACKS:
        section = lookup(config, path)
        if section is None or not (takes := lengths(path, section)).keys() >= set(THREAT):
            continue
        norm = section.get("norm")
        if section.get("eps") is None:
            if norm not in (None, config.threat.norm):
                raise InputError(
                    f"{path}.norm={norm} with the eps of threat.norm={config.threat.norm} says nothing; set {path}.eps "
                    f"too, or threat.norm and threat.eps for all"
                )
            section.eps = config.threat.eps
        section.norm = config.threat.norm if norm is None else norm
        check_length(section.eps, section.norm, f"{path}.eps")
        if takes.get("step_size") and section.get("step_size") is None:
            section.step_size = quarter(section.eps)
        if section.get("step_size") is not None:
            check_length(section.step_size, section.norm, f"{path}.step_size")


def check_length(value: Any, norm: str, name: str) -> None:
    """Raises InputError unless a value is a length above 0 in units of [0, 1] images: "8/255", or a number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(f"{name}={value!r} is not allowed; give a length above 0, as '8/255'")
    if not geometry.radius(value, norm, name) > 0:
        raise InputError(f"{name}={value} is not allowed; give a length above 0, as '8/255'")


def quarter(eps: str | float) -> str | float:
    """The default step size for a radius, a quarter of it: "2/255" for "8/255"."""
    if not isinstance(eps, str):
        return eps / 4
    numerator, slash, denominator = eps.partition("/")
    return f"{float(numerator) / 4:.12g}{slash}{denominator}"


def follow(config: ConfigDict) -> ConfigDict:
    """Undoes `effective`: a norm, eps or step size that equals what `threat` implies becomes None again.

    So it follows later changes of `threat`.
    """
    for path in ATTACKS:
        section = lookup(config, path)
        if section is None or not set(THREAT) <= set(section) or section.eps is None:
            continue
        if "step_size" in section and same_length(section.step_size, quarter(section.eps)):
            section.step_size = None
        if section.norm == config.threat.norm and same_length(section.eps, config.threat.eps):
            section.update(norm=None, eps=None)
    for _, recipe in recipes(config):
        follow(recipe)
        if recipe.threat == config.threat:
            recipe.threat.update(dict.fromkeys(THREAT))
    return config


def same_length(one: Any, other: Any) -> bool:
    """Whether two lengths are equal as numbers; None equals only None."""
    if one is None or other is None:
        return one is other
    return bool(geometry.fraction(one) == geometry.fraction(other))


# ---- what differs ------------------------------------------------------------------------------------------


def trained(config: ConfigDict) -> dict[str, Any] | None:
    """{"norm", "eps"} of the training attack, from the result of `effective`; None if training uses clean images.

    Objectives that make their own adversarial images call their radius `eps` or `max_eps`; its norm is l_inf.
    """
    if config.attack is not None:
        return _said(config.attack)
    parameters, _ = signature(factory("objectives", config.objective.name))
    for key in ("eps", "max_eps"):
        if key in parameters:
            return {"norm": "linf", "eps": config.objective.get(key, parameters[key].default)}
    return None


def validated(config: ConfigDict) -> dict[str, Any] | None:
    """{"norm", "eps"} of the validation attack; None if that attack has no radius."""
    return _said(config.validate.attack)


def _said(section):
    return None if None in (said := {key: section.get(key) for key in THREAT}).values() else said
