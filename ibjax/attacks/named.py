"""The attacks of an evaluation by name, with the settings that its records state. A line in a table adds one.

| name                         | attack                                                                              |
|------------------------------|-------------------------------------------------------------------------------------|
| pgd-STEPS, cw-STEPS          | PGD on cross-entropy, on the margin                                                 |
| pgd-scaled-STEPS             | PGD in steps of 2.3·eps/STEPS, as IB-RAR's authors evaluate                         |
| bim-, mim-, nifgsm-, spsa-   | with STEPS behind, as `cw-l2-STEPS`; see the files of these names                   |
| fgsm, noise, noise-sign      |                                                                                     |
| autoattack, -plus, -rand     | and its parts, as `apgd-ce`, `fab-t`, `square`                                      |
| ara-STEPS                    | the representation attack, guided by images of other classes                        |
| ib_rar-STEPS                 | IB-RAR's adaptive attack, on the run's own α and β or the defaults                  |
| siriib-STEPS, siriib-TERMS-STEPS | SiRIIB's, on CE, L_svd and L_info or some of them, as `siriib-ce-svd-20`        |
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array

from ibjax.attacks import Attack, geometry
from ibjax.attacks.autoattack import DRAWS, sub_attacks
from ibjax.attacks.cw import cw
from ibjax.attacks.mim import mim
from ibjax.attacks.nifgsm import nifgsm
from ibjax.attacks.noise import noise
from ibjax.attacks.pgd import pgd
from ibjax.attacks.representation import ara
from ibjax.attacks.spsa import spsa
from ibjax.errors import InputError, nearest
from ibjax.objectives import ib_rar, siriib


class Named(NamedTuple):
    """What a name stands for."""

    settings: dict[str, Any]  # as the record states them
    make: Callable[..., Attack] | None  # (norm=, eps=, step_size=) -> attack; None: autoattack(**settings) runs it
    step: float | None = None  # the step as a share of eps, whatever `evaluate.step_size` says
    bounded: bool = True  # False: it looks for the smallest perturbation, of whatever size
    features: tuple[str, ...] | None = None  # it is shown (logits, features) and needs these; None: the logits alone
    guided: bool = False  # its target is (labels, for each image another one, of another class)
    group: int = 1  # images that it couples: the first so many, then the next

    def step_size(self, eps: Any, otherwise: Any) -> Any:
        """The step at this eps, `otherwise` where the attack leaves it open."""
        if self.step is None:
            return otherwise
        return eps if self.step == 1 else self.step * geometry.fraction(eps)


def _own(factory, **settings):
    return Named(settings, partial(factory, **settings))


def _sized(factory, **settings):
    """An attack that has no step size."""
    return Named(settings, lambda *, norm, eps, step_size: factory(norm=norm, eps=eps, **settings))


def _unbounded(factory, **settings):
    return Named(settings, lambda *, norm, eps, step_size: factory(**settings), bounded=False)


def _auto(version, attacks=None, **options):
    return Named(dict(version=version, attacks=attacks, **options), None)


def _ara(steps):
    def make(*, norm, eps, step_size):
        geometry.check_norm(norm, ("linf",))
        climb = ara(eps=eps, steps=steps)

        def attack(key, network, x, target):
            def representation(x):
                _, features = network(x)
                return features.get("mu", features["pre_logits"])

            return climb(key, representation, x, target[1])

        return attack

    return Named(dict(steps=steps), make, features=("pre_logits",), guided=True)


def _ib_rar(steps, *, alpha=0.008, beta=0.08):
    """Groups of 100 images and a step of 2.3·eps/steps, as the authors' code."""
    size, settings = 100, dict(alpha=alpha, beta=beta, layers="all", y_kernel="gaussian", steps=steps)

    def make(*, norm, eps, step_size):
        geometry.check_norm(norm, ("linf",))
        return in_groups(ib_rar.adaptive_attack(eps=eps, step_size=step_size, **settings), size)

    return Named({**settings, "group": size}, make, step=2.3 / steps, features=(), group=size)


def _siriib(steps, *terms):
    settings = dict(terms=terms or ("ce", "svd", "info"), steps=steps)

    def make(*, norm, eps, step_size):
        geometry.check_norm(norm, ("linf",))
        return siriib.adaptive_attack(eps=eps, step_size=step_size, **settings)

    return Named(settings, make, features=("x_avg",))


# family -> (steps -> Named), for names as "pgd-20"
FAMILIES: dict[str, Callable[..., Named]] = {
    "pgd": lambda steps: _own(pgd, loss="ce", init="uniform", steps=steps, restarts=1),
    "pgd-scaled": lambda steps: FAMILIES["pgd"](steps)._replace(step=2.3 / steps),
    "cw": lambda steps: _own(pgd, loss="margin", init="uniform", steps=steps, restarts=1),
    "cw-l2": lambda steps: _unbounded(cw, c=1.0, kappa=0.0, lr=0.01, steps=steps),
    "bim": lambda steps: _own(pgd, loss="ce", init="none", steps=steps, restarts=1),
    "mim": lambda steps: _own(mim, loss="ce", decay=1.0, steps=steps),
    "nifgsm": lambda steps: _own(nifgsm, loss="ce", decay=1.0, steps=steps),
    "spsa": lambda steps: _sized(spsa, loss="margin", samples=128, delta=0.01, lr=0.01, steps=steps),
    "ara": _ara,
    "ib_rar": _ib_rar,
    "siriib": _siriib,
    **{
        f"siriib-{'-'.join(terms)}": lambda steps, terms=terms: _siriib(steps, *terms)
        for terms in (("ce",), ("svd",), ("info",), ("ce", "svd"), ("ce", "info"))
    },
}
ATTACKS = {
    "fgsm": _own(pgd, loss="ce", init="none", steps=1, restarts=1)._replace(step=1.0),
    "noise": _sized(noise, kind="uniform"),
    "noise-sign": _sized(noise, kind="sign"),
    "autoattack": _auto("standard"),
    "autoattack-plus": _auto("plus"),
    "autoattack-rand": _auto("rand", draws=DRAWS),
    **{name: _auto("standard", [name]) for name in ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")},
}


def named(name: str, objective: Mapping[str, Any] | None = None) -> Named:
    """The attack of a name as "fgsm", "pgd-20" or "autoattack"; raises InputError on others.

    `objective`, the section of the run that is attacked, has the values that an adaptive attack takes from it.
    """
    if name in ATTACKS:
        return ATTACKS[name]
    family, _, steps = name.rpartition("-")
    if family in FAMILIES and steps.isascii() and steps.isdecimal() and int(steps) > 0:
        own = {}
        if objective is not None and objective["name"] == family == "ib_rar":
            own = {key: objective[key] for key in ("alpha", "beta") if key in objective}
        return FAMILIES[family](int(steps), **(own if any(own.values()) else {}))
    examples = (*ATTACKS, *(f"{family}-20" for family in FAMILIES))
    raise InputError(f"attack '{name}' is unknown; {nearest(name, examples)}")


def check(name: str, norm: str, eps: Any, step_size: Any) -> None:
    """Raises InputError where a name's attack cannot be made for this norm and these lengths."""
    attack = named(name)
    if attack.make is None:
        sub_attacks(attack.settings["version"], norm, eps, 10, attack.settings["attacks"])
    else:
        attack.make(norm=norm, eps=eps, step_size=attack.step_size(eps, step_size))


def in_groups(attack: Attack, size: int) -> Attack:
    """`attack` on each `size` neighbouring images by themselves, of which a batch has a multiple."""

    def grouped(key: Array, logits_fn: Callable, x: Array, target: Array) -> Array:
        if len(x) % size:
            raise InputError(f"a batch of {len(x)} images does not divide into groups of {size}")
        keys = geometry.keys_per_image(key, x)
        parts = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), (keys, x, target))
        return jax.vmap(lambda key, x, y: attack(key, logits_fn, x, y))(*parts).reshape(x.shape)

    return grouped
