"""The attacks of an evaluation by name, with the settings that its records state. A line in a table adds one."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from ibjax.attacks import Attack
from ibjax.attacks.autoattack import sub_attacks
from ibjax.attacks.cw import cw
from ibjax.attacks.mim import mim
from ibjax.attacks.nifgsm import nifgsm
from ibjax.attacks.noise import noise
from ibjax.attacks.pgd import pgd
from ibjax.attacks.spsa import spsa
from ibjax.errors import InputError, nearest


class Named(NamedTuple):
    """What a name stands for."""

    settings: dict[str, Any]  # as the record states them
    make: Callable[..., Attack] | None  # (norm=, eps=, step_size=) -> attack; None: autoattack(**settings) runs it
    full_step: bool = False  # one step of eps, whatever `evaluate.step_size` says
    bounded: bool = True  # False: it looks for the smallest perturbation, of whatever size


def _own(factory, **settings):
    return Named(settings, partial(factory, **settings))


def _sized(factory, **settings):
    """An attack that has no step size."""
    return Named(settings, lambda *, norm, eps, step_size: factory(norm=norm, eps=eps, **settings))


def _unbounded(factory, **settings):
    return Named(settings, lambda *, norm, eps, step_size: factory(**settings), bounded=False)


def _auto(version, attacks=None):
    return Named(dict(version=version, attacks=attacks), None)


# family -> (steps -> Named), for names as "pgd-20"
FAMILIES = {
    "pgd": lambda steps: _own(pgd, loss="ce", init="uniform", steps=steps, restarts=1),
    "cw": lambda steps: _own(pgd, loss="margin", init="uniform", steps=steps, restarts=1),
    "cw-l2": lambda steps: _unbounded(cw, c=1.0, kappa=0.0, lr=0.01, steps=steps),
    "bim": lambda steps: _own(pgd, loss="ce", init="none", steps=steps, restarts=1),
    "mim": lambda steps: _own(mim, loss="ce", decay=1.0, steps=steps),
    "nifgsm": lambda steps: _own(nifgsm, loss="ce", decay=1.0, steps=steps),
    "spsa": lambda steps: _sized(spsa, loss="margin", samples=128, delta=0.01, lr=0.01, steps=steps),
}
ATTACKS = {
    "fgsm": _own(pgd, loss="ce", init="none", steps=1, restarts=1)._replace(full_step=True),
    "noise": _sized(noise, kind="uniform"),
    "noise-sign": _sized(noise, kind="sign"),
    "autoattack": _auto("standard"),
    "autoattack-plus": _auto("plus"),
    "autoattack-rand": _auto("rand"),
    **{name: _auto("standard", [name]) for name in ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")},
}


def named(name: str) -> Named:
    """The attack of a name as "fgsm", "pgd-20" or "autoattack"; raises InputError on others."""
    if name in ATTACKS:
        return ATTACKS[name]
    family, _, steps = name.rpartition("-")
    if family in FAMILIES and steps.isascii() and steps.isdecimal() and int(steps) > 0:
        return FAMILIES[family](int(steps))
    examples = (*ATTACKS, *(f"{family}-20" for family in FAMILIES))
    raise InputError(f"attack '{name}' is unknown; {nearest(name, examples)}")


def check(name: str, norm: str, eps: Any, step_size: Any) -> None:
    """Raises InputError where a name's attack cannot be made for this norm and these lengths."""
    attack = named(name)
    if attack.make is None:
        sub_attacks(attack.settings["version"], norm, eps, 10, attack.settings["attacks"])
    else:
        attack.make(norm=norm, eps=eps, step_size=eps if attack.full_step else step_size)
