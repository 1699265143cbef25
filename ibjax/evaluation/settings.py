"""The `evaluate` section of a configuration: checks that run before training or attacking, and changes to it."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ibjax import config, threat
from ibjax.attacks import geometry, names
from ibjax.data import Split
from ibjax.devices import precision
from ibjax.errors import InputError
from ibjax.evaluation.named import check, named, takes_step_size
from ibjax.net import linen_net, taps


def check_settings(settings: Any) -> None:
    """Raises InputError where an `evaluate` section names an unknown attack or has an invalid value."""
    if not settings["attacks"]:
        raise InputError("evaluate.attacks is empty; give names as ('fgsm', 'pgd-20', 'margin-20')")
    for name in settings["attacks"]:
        named(name)
    for name in ("eps", "step_size"):
        threat.check_length(settings[name], settings["norm"], f"evaluate.{name}")
    for name in settings["attacks"]:
        check(name, settings["norm"], settings["eps"], settings["step_size"])
    for eps in settings["ladder"]:
        geometry.radius(eps, settings["norm"], "evaluate.ladder eps")
    precision.check(settings["precision"], "evaluate.precision")
    for name in ("n", "samples", "batch_size"):
        value = settings[name]
        if value is not None and (type(value) is not int or value < 1):
            raise InputError(f"evaluate.{name}={value!r} is not allowed; give a whole number of at least 1, or None")
    for name in settings["attacks"] if settings["samples"] else ():
        attack = named(name)
        if attack.make is None and attack.settings["version"] != "rand":
            raise InputError(f"attack '{name}' expects a deterministic network; with samples give 'autoattack-rand'")
        if attack.features is not None:
            raise InputError(f"attack '{name}' is on features of a deterministic network; give it without samples")


def check_images(test: Split, label: str, settings: Any) -> None:
    """Raises InputError where an `evaluate` section asks for more test images than the data set has."""
    if settings["n"] is not None and settings["n"] > len(test.labels):
        raise InputError(
            f"evaluate.n={settings['n']} is not allowed; the test set of {label} has {len(test.labels)} images, None "
            f"takes them all"
        )


def check_network(model: nn.Module, input_shape: Sequence[int], settings: Any) -> None:
    """Raises InputError where `samples` is set for a deterministic network, or an attack needs a missing feature."""
    if settings["samples"] and not hasattr(model, "sample_at_test"):
        raise InputError(
            f"evaluate.samples={settings['samples']}: this network draws nothing; give a model=dict(name='stochastic', "
            f"…), or None"
        )
    on_features = [name for name in settings["attacks"] if named(name).features is not None]
    if not on_features:
        return
    features = taps(model, input_shape)
    for name in on_features:
        for feature in named(name).features or ():
            if feature not in features:
                raise InputError(f"attack '{name}' needs the feature '{feature}', which this network does not have")
        _trace(name, model, input_shape, settings)


def _trace(name, model, input_shape, settings):
    """Traces an attack that uses features, to find whether the network has all of them; nothing is computed."""
    attack, predict = named(name), linen_net(model).predict
    assert attack.make is not None
    lengths = dict(eps=settings["eps"], step_size=attack.step_size(settings["eps"], settings["step_size"]))
    climb = attack.make(norm=settings["norm"], **lengths)

    def attacked(x, labels, guide):
        variables = model.init(jax.random.key(0), x[:1])
        variables = {"batch_stats": {}, **variables}
        target = (labels, guide) if attack.guided else labels
        return climb(jax.random.split(jax.random.key(0), len(x)), lambda x: predict(variables, x), x, target)

    x = jax.ShapeDtypeStruct((max(attack.group, 2), *input_shape), jnp.float32)
    try:
        jax.eval_shape(attacked, x, jax.ShapeDtypeStruct(x.shape[:1], jnp.int32), x)
    except InputError as error:
        raise InputError(f"attack '{name}' is not for this network: {error}") from None


def replaced(section: Any, *, norm: Any = None, eps: Any = None, step_size: Any = None, **given: Any) -> dict[str, Any]:
    """An `evaluate` section with the values that are given, not None, in place of its own; checked.

    Attack names are canonical, each once. Another norm or eps drops the ladder. A step other than the usual one becomes
    an option in the names of the attacks whose step is `evaluate.step_size`, so that different attacks have different
    names.

    given: attacks, n, samples, batch_size or precision.
    """
    given = {name: tuple(value) if name == "attacks" else value for name, value in given.items() if value is not None}
    settings = _changed(config.plain(section) | given, norm, eps, step_size)
    check_settings(settings)
    return settings


def _changed(settings, norm, eps, step_size):
    for name in settings["attacks"]:
        named(name)  # reports an unknown name as it was given, not in its canonical form
    attacks = tuple(dict.fromkeys(map(names.canonical, settings["attacks"])))
    if (norm, eps, step_size) == (None, None, None):
        return settings | {"attacks": attacks}
    if norm not in (None, settings["norm"]) and eps is None:
        raise InputError(f"norm={norm} needs its own eps: {settings['eps']} is one of {settings['norm']}; give --eps")
    eps = settings["eps"] if eps is None else eps
    threat.check_length(eps, norm or settings["norm"], "eps")
    usual = threat.quarter(eps) if norm not in (None, settings["norm"]) else scaled_step(settings, eps)
    norm = norm or settings["norm"]
    if step_size is not None and not threat.same_length(step_size, usual):
        threat.check_length(step_size, norm, "step_size")
        attacks = tuple(names.add(name, step_size=step_size) if takes_step_size(name) else name for name in attacks)
    ladder = settings["ladder"] if (norm, eps) == (settings["norm"], settings["eps"]) else ()
    return settings | dict(norm=norm, eps=eps, step_size=usual, ladder=ladder, attacks=attacks)


def scaled_step(settings, eps):
    """The step for another eps, scaled in proportion so that the attack can reach every eps, unless it is fixed."""
    if eps == settings["eps"] or settings["fixed_step"]:
        return settings["step_size"]
    if threat.same_length(settings["step_size"], threat.quarter(settings["eps"])):
        return threat.quarter(eps)
    main, step = geometry.fraction(settings["eps"]), geometry.fraction(settings["step_size"])
    return float(step * geometry.fraction(eps) / main)
