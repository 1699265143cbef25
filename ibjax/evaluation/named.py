"""The attacks of an evaluation by name, with the settings that its records state.

| name                         | attack                                                                              |
|------------------------------|-------------------------------------------------------------------------------------|
| pgd-STEPS, margin-STEPS      | PGD on cross-entropy, on the margin (`cw-STEPS` is its old name)                    |
| pgd-scaled-STEPS             | PGD in steps of 2.3·eps/STEPS, as IB-RAR's authors evaluate                         |
| bim-STEPS, mim-STEPS, nifgsm-STEPS, spsa-STEPS, cw-l2-STEPS | see pgd.py, mim.py, nifgsm.py, spsa.py and cw.py in  |
|                              | ibjax/attacks                                                                       |
| fgsm, noise, noise-sign      |                                                                                     |
| pgd-t-STEPS                  | targeted PGD, see targeted.py                                                       |
| deepfool-STEPS               | DeepFool, see deepfool.py: broken if it finds a misclassified image within eps      |
| sparse-rs                    | Sparse-RS, see sparse_rs.py: in l0 alone, where eps is a number of pixels           |
| autoattack, autoattack-plus, autoattack-rand | AutoAttack's versions; parts alone: `apgd-ce`, `fab-t`, `square`, …  |
| ara-STEPS                    | the representation attack, guided by images of other classes                        |
| ib_rar-STEPS                 | IB-RAR's adaptive attack, with the run's own α and β or the defaults                |
| siriib-STEPS, siriib-TERMS-STEPS | SiRIIB's adaptive attack on CE, L_svd and L_info or some: `siriib-ce-svd-20`    |
| an attack of your own        | an entry point of the group ibjax.attacks, `my_pkg.my_attack` or                    |
|                              | `./my_attack.py:my_attack`, each with -STEPS if it takes steps                      |

Options are given in parentheses, as in `cw-l2-200(c=0.1,lr=0.1)`; records state them in the same form:

| name                              | options, with their defaults                                                   |
|-----------------------------------|--------------------------------------------------------------------------------|
| pgd, margin, bim, pgd-scaled, fgsm| loss, init, restarts=1; pgd, margin and bim also step_size                     |
| mim, nifgsm                       | loss=ce, decay=1, init=none, step_size                                         |
| spsa                              | loss=margin, samples=128, delta=0.01, lr=0.01                                  |
| cw-l2                             | c=1, kappa=0, lr=0.01, torchattacks_compat=False                               |
| apgd-ce, apgd-dlr, fab            | steps=100, restarts=1                                                          |
| apgd-t, fab-t; square             | steps=100, targets=9; queries=5000, restarts=1, p_init=0.8                     |
| pgd-t                             | towards=least_likely, or most_likely, random, next or the number of a class;   |
|                                   | loss=ce or margin, init=uniform, restarts=1, step_size                         |
| deepfool                          | overshoot=0.02                                                                 |
| sparse-rs                         | queries=10000, p_init=0.3, restarts=1                                          |
| ib_rar                            | alpha, beta, layers=all, y_kernel=gaussian, init=uniform, group=100            |
| siriib                            | lam=1, the weight λ₁ of L_svd and L_info; restarts=1, step_size                |
| AutoAttack and its parts          | search_dtype=float32, or bfloat16: see autoattack.py                           |
| all                               | count=both or attacked, see below                                              |

With count=both an image counts as robust if it is classified correctly both clean and under attack. With
count=attacked, as some papers count, only the prediction under attack matters. AutoAttack as a whole has no option that
changes its steps, since it is a standard. With search_dtype=bfloat16 it is not the standard attack, and its name in
records shows this. In l1 the defaults of its parts are those of AutoAttack for l1.
"""

import functools
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import Array

from ibjax import extensions, information
from ibjax.attacks import Attack, autocast, geometry
from ibjax.attacks.autoattack import DRAWS, digest_of, sub_attacks
from ibjax.attacks.cw import cw
from ibjax.attacks.deepfool import deepfool
from ibjax.attacks.iterative import Iterative
from ibjax.attacks.mim import mim
from ibjax.attacks.names import counted, parse
from ibjax.attacks.nifgsm import nifgsm
from ibjax.attacks.noise import noise
from ibjax.attacks.pgd import pgd
from ibjax.attacks.representation import ara
from ibjax.attacks.spsa import spsa
from ibjax.attacks.targeted import targeted
from ibjax.calls import THREAT, factory, fits, signature
from ibjax.errors import InputError, check_range, nearest
from ibjax.information import linalg
from ibjax.objectives import ib_rar, siriib

COUNTS = ("both", "attacked")


class Named(NamedTuple):
    """The attack that a name denotes."""

    settings: dict[str, Any]  # as the record states them
    make: Callable[..., Attack] | None  # (norm=, eps=, step_size=) -> attack; None: autoattack(**settings) runs it
    step: float | None = None  # the step as a share of eps; overrides `evaluate.step_size`
    length: str | float | None = None  # the step at the main eps; overrides `evaluate.step_size`
    bounded: bool = True  # False: it minimises the perturbation, without a budget
    features: tuple[str, ...] | None = None  # features it needs: the network returns (logits, features); None: logits
    guided: bool = False  # its target is (labels, guides): one guide image of another class for each image
    group: int = 1  # number of consecutive images that it couples
    count: str = "both"  # robust images are correct "both" clean and under attack, or only when "attacked"
    objective: str | None = None  # the module of `ibjax.objectives` whose terms it maximises

    def code(self) -> str | None:
        """A digest of the source files that it depends on beside those of `ibjax.attacks`; None: of none."""
        return None if self.objective is None else _digest_of(self.objective)

    def step_size(self, eps: Any, otherwise: Any) -> Any:
        """The step at `eps`: the attack's own `step` or `length`, else `otherwise`. A `length` is for the main eps."""
        if self.step is None:
            return otherwise if self.length is None else self.length
        return eps if self.step == 1 else self.step * geometry.fraction(eps)

    def of_autoattack(self) -> dict[str, Any]:
        """The settings as arguments of `autoattack`."""
        return {key: value for key, value in self.settings.items() if key != "count"}

    def parts(self, norm: str, eps: Any, num_classes: int) -> tuple[dict[str, Iterative], list[str]]:
        """(the attacks that AutoAttack, or the named part of it, runs in turn; warnings)."""
        made = {key: self.settings[key] for key in ("version", "attacks", "options") if key in self.settings}
        return sub_attacks(norm=norm, eps=eps, num_classes=num_classes, **made)


class _Form(NamedTuple):
    """A family of attack names that share a factory and its options."""

    make: Callable[..., Named]  # takes the settings as keywords
    settings: dict[str, Any]  # with their defaults
    more: dict[str, Any] = {}  # noqa: RUF012 - options whose defaults a record does not state
    hints: dict[str, Any] = {}  # noqa: RUF012 - types of the options of an own attack; otherwise those of the defaults

    def options(self) -> dict[str, Any]:
        """The options that a name may have, with example values of their types."""
        fixed = ("kind", "terms", "version", "attacks")  # set by the name itself
        return {key: value for key, value in {**self.settings, **self.more}.items() if key not in fixed}


_LENGTH = {"step_size": "2/255"}  # an option of forms whose step is otherwise `evaluate.step_size`
_TYPES = {"step_size": (int, float, str), "towards": (int, str)}  # of options whose default does not tell them all


def _own(factory, **settings):
    return Named(settings, partial(factory, **settings))


def _sized(factory, **settings):
    """An attack without a step size."""
    return Named(settings, lambda *, norm, eps, step_size: factory(norm=norm, eps=eps, **settings))


def _unbounded(factory, **settings):
    return Named(settings, lambda *, norm, eps, step_size: factory(**settings), bounded=False)


def _auto(*, version, attacks, draws=None, search_dtype=None, **options):
    if search_dtype is not None and search_dtype not in autocast.DTYPES:
        raise InputError(f"search_dtype={search_dtype} is unknown; {nearest(search_dtype, autocast.DTYPES)}")
    search_dtype = None if search_dtype == autocast.DTYPES[0] else search_dtype
    given = {"draws": draws, "search_dtype": search_dtype, "options": options}
    return Named(
        dict(version=version, attacks=attacks, **{name: value for name, value in given.items() if value}), None
    )


def _targeted(towards, **settings):
    if towards == "given":
        raise InputError("attack 'pgd-t': towards=given is for calls in Python; give a class or least_likely")
    return _own(targeted, towards=towards, **settings)


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


def _ib_rar(steps, group, **settings):
    """Attacks groups of images jointly with a step of 2.3·eps/steps; the authors' code uses groups of 100."""
    check_range("group", group, 2)  # HSIC needs several images

    def make(*, norm, eps, step_size):
        geometry.check_norm(norm, ("linf",))
        return in_groups(ib_rar.adaptive_attack(eps=eps, step_size=step_size, steps=steps, **settings), group)

    made = {**settings, "steps": steps, "group": group}
    return Named(made, make, step=2.3 / steps, features=(), group=group, objective="ib_rar")


def _siriib(terms, steps, lam=1.0, **options):
    weights = tuple(1.0 if term == "ce" else lam for term in terms)
    settings = dict(terms=terms, steps=steps, **({} if lam == 1.0 else {"lam": lam}), **options)

    def make(*, norm, eps, step_size):
        geometry.check_norm(norm, ("linf",))
        return siriib.adaptive_attack(
            terms=terms, weights=weights, eps=eps, step_size=step_size, steps=steps, **options
        )

    return Named(settings, make, features=("x_avg",), objective="siriib")


@functools.cache
def _digest_of(objective):
    root = Path(information.__file__).parent
    return digest_of((root.parent / "objectives" / f"{objective}.py", *sorted(root.glob("*.py"))))


def _pgd(loss="ce", init="uniform"):
    return _Form(partial(_own, pgd), dict(loss=loss, init=init, restarts=1), _LENGTH)


def _scaled(steps, **settings):
    return _own(pgd, steps=steps, **settings)._replace(step=2.3 / steps)


def _fgsm(**settings):
    return _own(pgd, steps=1, **settings)._replace(step=1.0)


# family -> its form, for names that end with the number of steps, such as "pgd-20"
FAMILIES: dict[str, _Form] = {
    "pgd": _pgd(),
    "pgd-scaled": _Form(_scaled, _pgd().settings),
    "margin": _pgd(loss="margin"),
    "pgd-t": _Form(_targeted, dict(towards="least_likely", loss="ce", init="uniform", restarts=1), _LENGTH),
    "deepfool": _Form(partial(_sized, deepfool), dict(overshoot=0.02)),
    "cw-l2": _Form(partial(_unbounded, cw), dict(c=1.0, kappa=0.0, lr=0.01), dict(torchattacks_compat=False)),
    "bim": _pgd(init="none"),
    "mim": _Form(partial(_own, mim), dict(loss="ce", decay=1.0), dict(init="none", **_LENGTH)),
    "nifgsm": _Form(partial(_own, nifgsm), dict(loss="ce", decay=1.0), dict(init="none", **_LENGTH)),
    "spsa": _Form(partial(_sized, spsa), dict(loss="margin", samples=128, delta=0.01, lr=0.01)),
    "ara": _Form(_ara, {}),
    "ib_rar": _Form(
        _ib_rar, dict(alpha=0.008, beta=0.08, layers="all", y_kernel="gaussian", group=100), dict(init="uniform")
    ),
    **{
        "-".join(("siriib", *named)): _Form(
            _siriib, dict(terms=named or ("ce", "svd", "info")), dict(lam=1.0, restarts=1, **_LENGTH)
        )
        for named in ((), ("ce",), ("svd",), ("info",), ("ce", "svd"), ("ce", "info"))
    },
}
_PARTS = {
    **{name: dict(steps=100, restarts=1) for name in ("apgd-ce", "apgd-dlr", "fab")},
    **{name: dict(steps=100, targets=9) for name in ("apgd-t", "fab-t")},
    "square": dict(queries=5000, restarts=1, p_init=0.8),
    "sparse-rs": dict(queries=10_000, restarts=1, p_init=0.3),
}
_SEARCH = {"search_dtype": "float32"}
ATTACKS: dict[str, _Form] = {
    "fgsm": _Form(_fgsm, dict(loss="ce", init="none", restarts=1)),
    "noise": _Form(partial(_sized, noise), dict(kind="uniform")),
    "noise-sign": _Form(partial(_sized, noise), dict(kind="sign")),
    "autoattack": _Form(_auto, dict(version="standard", attacks=None), _SEARCH),
    "autoattack-plus": _Form(_auto, dict(version="plus", attacks=None), _SEARCH),
    "autoattack-rand": _Form(_auto, dict(version="rand", attacks=None, draws=DRAWS), _SEARCH),
    **{name: _Form(_auto, dict(version="standard", attacks=[name]), more | _SEARCH) for name, more in _PARTS.items()},
}


def named(name: str, objective: Mapping[str, Any] | None = None) -> Named:
    """The attack of a name such as "fgsm", "pgd-20(restarts=5)" or "autoattack"; InputError if there is none.

    `objective` is the section of the attacked run, from which adaptive attacks take their weights.
    """
    base, given = parse(name)
    form, family, steps = _form(name, base, given)
    _check_options(name, family, given, form, bool(steps))
    count, length = given.pop("count", COUNTS[0]), given.pop("step_size", None)
    own = {}
    if objective is not None and objective["name"] == family == "ib_rar":
        own = {key: objective[key] for key in ("alpha", "beta") if key in objective}
    made = form.make(**{**form.settings, **(own if any(own.values()) else {}), **steps, **given})
    said = {key: value for key, value in dict(step_size=length, count=count).items() if value not in (None, COUNTS[0])}
    return made._replace(settings={**made.settings, **said}, length=length, count=count)


def _form(name, base, given):
    """(form, family, {"steps": number} where the name has one) of an attack's name without its options."""
    family, steps = counted(base)
    taken = {} if steps is None else {"steps": steps}
    if base in ATTACKS:
        return ATTACKS[base], base, {}
    if family in FAMILIES and taken:
        return FAMILIES[family], family, taken
    if family not in FAMILIES and (source := extensions.locate("attacks", family)) is not None:
        return _own_form(name, family, taken, given, source), family, taken
    examples = (*ATTACKS, *(f"{family}-20" for family in FAMILIES), *extensions.entry_points("attacks"))
    raise InputError(f"attack '{name}' is unknown; {nearest(base, examples)}")


def _own_form(name, family, taken, given, source):
    """The form of an attack of the user's own: its options are those of its factory."""
    parameters, hints = signature(factory("attacks", family), THREAT)
    if taken and "steps" not in parameters:
        raise InputError(f"attack '{name}': '{family}' takes no steps; write {family}")
    options = {key: parameter for key, parameter in parameters.items() if key not in (*taken, "step_size")}
    defaults = {
        key: parameter.default for key, parameter in options.items() if parameter.default is not parameter.empty
    }
    if missing := [key for key in options if key not in defaults and key not in given]:
        how = f"write {family}-20" if missing[0] == "steps" else f"write {family}({missing[0]}=VALUE)"
        raise InputError(f"attack '{name}': '{family}' needs {missing[0]}; {how}")
    code = {key: value for key, value in extensions.record(source).items() if key in ("version", "sha256")}
    code = {"name": extensions.unanchored(family), **code}

    def make(**settings):
        return Named({**settings, "code": code}, _as_called(factory("attacks", family), parameters, settings))

    sized = _LENGTH if "step_size" in parameters else {}
    return _Form(
        make, defaults, dict.fromkeys(options.keys() - defaults) | sized, {key: hints.get(key) for key in options}
    )


def _as_called(make, parameters, settings):
    """A factory as `Named.make` is called: it gets a step size only if it takes one."""

    def attack(*, norm, eps, step_size):
        sized = {"step_size": step_size} if "step_size" in parameters else {}
        return make(norm=norm, eps=eps, **settings, **sized)

    return attack


def _check_options(name, family, given, form, has_steps):
    allowed = {**form.options(), "count": COUNTS[0]}
    for key, value in given.items():
        if key == "steps" and has_steps:
            raise InputError(f"attack '{name}' has its steps in its name; write {family}-{value}")
        if key not in allowed:
            raise InputError(f"attack '{name}' has no option '{key}'; {nearest(key, allowed)}")
        default = allowed[key]
        kinds = {float: (int, float), int: (int,)}.get(type(default), (type(default),))
        kinds = _TYPES.get(key, kinds)
        if (
            not fits(value, form.hints[key])
            if form.hints.get(key)
            else type(value) not in kinds and default is not None
        ):
            example = f"{key}={default}" if key not in form.hints else str(form.hints[key] or type(default).__name__)
            raise InputError(f"attack '{name}': {key}={value} is not allowed; give it as {example}")
    if given.get("count", COUNTS[0]) not in COUNTS:
        raise InputError(f"attack '{name}': count={given['count']} is unknown; {nearest(given['count'], COUNTS)}")


def takes_step_size(name: str) -> bool:
    """Whether a name's attack uses `evaluate.step_size`: it has the option step_size, and the name does not set it."""
    base, given = parse(name)
    form, _, _ = _form(name, base, given)
    return "step_size" in form.options() and "step_size" not in given


def check(name: str, norm: str, eps: Any, step_size: Any) -> None:
    """Raises InputError where a name's attack does not support this norm, eps or step size."""
    attack = named(name)
    if attack.make is None:
        attack.parts(norm, eps, 10)
        return
    step = attack.step_size(eps, step_size)
    if not geometry.radius(step, norm, f"{name}: step_size") > 0:
        raise InputError(f"attack '{name}': step_size={step} is not allowed; give a length above 0, as '2/255'")
    attack.make(norm=norm, eps=eps, step_size=step)


def in_groups(attack: Attack, size: int) -> Attack:
    """`attack`, applied separately to every `size` consecutive images; the batch size must be a multiple of `size`."""

    def grouped(key: Array, logits_fn: Callable, x: Array, target: Array) -> Array:
        if len(x) % size:
            raise InputError(f"a batch of {len(x)} images does not divide into groups of {size}")
        keys = geometry.keys_per_image(key, x)
        parts = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), (keys, x, target))
        of_group = lambda group: attack(group[0], logits_fn, group[1], group[2])  # noqa: E731
        return linalg.each(of_group, parts).reshape(x.shape)  # HSIC factorises matrices

    return grouped
