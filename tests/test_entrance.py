"""What every public attack takes and refuses: one table of bad inputs, norms and keys in all their forms."""

from inspect import signature

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import keys_of

from ibjax.attacks import entrance, geometry
from ibjax.attacks.apgd import apgd
from ibjax.attacks.cw import cw
from ibjax.attacks.deepfool import deepfool
from ibjax.attacks.eot import eot
from ibjax.attacks.fab import fab
from ibjax.attacks.fgsm import fgsm
from ibjax.attacks.mim import mim
from ibjax.attacks.nifgsm import nifgsm
from ibjax.attacks.noise import noise
from ibjax.attacks.pgd import pgd, stateful_pgd
from ibjax.attacks.pgd_adam import pgd_adam
from ibjax.attacks.representation import ara
from ibjax.attacks.sparse_rs import sparse_rs
from ibjax.attacks.spsa import spsa
from ibjax.attacks.square import square
from ibjax.attacks.targeted import targeted
from ibjax.attacks.transfer import transfer
from ibjax.devices import precision
from ibjax.errors import InputError

RNG = np.random.default_rng(0)
N, CLASSES = 6, 5
X = np.float32(RNG.uniform(size=(N, 4, 4, 3)))
Y = RNG.integers(0, CLASSES, N)
WEIGHTS = np.float32(RNG.normal(size=(48, CLASSES)))
KEY = jax.random.key(0)
EPS = {"linf": 0.1, "l2": 0.5, "l1": 2.0}


def linear(x):
    return x.reshape(x.shape[0], -1) @ WEIGHTS


def stateful(**options):
    """`stateful_pgd` called as the other attacks are."""
    attack = stateful_pgd(**options)

    def run(key, logits_fn, x, y):
        wrapped = (lambda x, state: (logits_fn(x), state)) if callable(logits_fn) else logits_fn
        return attack(key, wrapped, x, y, ())[0]

    return run


def randomised(samples=2, **options):
    """`eot` on a network that ignores its key."""
    attack = eot(attack=pgd, samples=samples, **options)
    return lambda key, logits_fn, x, y: attack(key, lambda key, x: logits_fn(x), x, y)


def on_surrogate(**options):
    """`transfer` with the network that is attacked as its surrogate."""
    attack = pgd(**options)
    return lambda key, logits_fn, x, y: transfer(attack=attack, surrogate=logits_fn)(key, None, x, y)


FEW = dict(steps=2, unroll=False)
# name -> (factory, the norms that it offers, arguments)
ATTACKS = {
    "fgsm": (fgsm, ("linf", "l2"), {}),
    "pgd": (pgd, ("linf", "l2"), FEW),
    "pgd-restarts": (pgd, ("linf", "l2"), FEW | dict(restarts=2)),
    "stateful_pgd": (stateful, ("linf", "l2"), FEW),
    "pgd_adam": (pgd_adam, ("linf",), FEW | dict(loss="ce")),
    "mim": (mim, ("linf", "l2"), FEW),
    "nifgsm": (nifgsm, ("linf",), FEW),
    "spsa": (spsa, ("linf", "l2"), dict(steps=2, samples=2)),
    "apgd": (apgd, ("linf", "l2", "l1"), dict(steps=2)),
    "apgd-t": (apgd, ("linf", "l2", "l1"), dict(loss="dlr_targeted", steps=2, targets=2)),
    "fab": (fab, ("linf", "l2", "l1"), dict(steps=2)),
    "square": (square, ("linf", "l2", "l1"), dict(queries=2)),
    "cw": (cw, (), dict(steps=2)),
    "targeted": (targeted, ("linf", "l2"), FEW),
    "deepfool": (deepfool, ("linf", "l2"), dict(steps=2)),
    "sparse_rs": (sparse_rs, (), dict(eps=3, queries=2)),
    "ara": (ara, (), dict(steps=2)),
    "noise": (noise, ("linf", "l2"), {}),
    "eot": (randomised, ("linf", "l2"), FEW),
    "transfer": (on_surrogate, ("linf", "l2"), FEW),
}
NO_LABELS, NO_NETWORK, NO_KEY = ("ara", "noise"), ("noise",), ("ara", "cw", "deepfool")
OWN_EPS = ("cw", "sparse_rs")  # without a bound; a number of pixels


def make(name, **options):
    """The attack of this name, with an eps of its norm."""
    factory, norms, settings = ATTACKS[name]
    norm = options.get("norm", "linf")
    eps = dict(eps=EPS[geometry.check_norm(norm)]) if name not in OWN_EPS else {}
    return factory(**settings | eps | (options if norms else {k: v for k, v in options.items() if k != "norm"}))


def call(name, key=KEY, logits_fn=linear, x=X, y=Y, **options):
    target = X[::-1] if name == "ara" else y  # guides, in place of labels
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes a float with its integer count
        return make(name, **options)(key, logits_fn, x, target)


def program(name, key=KEY, **options):
    """What is compiled, as text."""
    target = X if name == "ara" else np.int32(Y)
    with jax.numpy_dtype_promotion("standard"):
        return str(jax.make_jaxpr(lambda x, y: make(name, **options)(key, linear, x, y))(X, target))


# ---- what is refused -----------------------------------------------------------------------------------------


class Convolution:
    """A network of PyTorch, as far as one can tell without PyTorch."""

    __module__ = "torch.nn.modules.conv"

    def __call__(self, x):
        raise AssertionError("it must not be called")


IMAGES = {
    "grey levels": (X * 255, r"reach from \S+ to 25\S+; give pixels in \[0, 1\], divide by 255"),
    "normalised": (X - 0.5, "reach from -0.49.* normalise inside logits_fn"),
    "a little above 1": (X * np.float32(1.000002 / X.max()), r"to 1\.00000[0-9]+;"),
    "NaN": (np.where(X.max() == X, np.float32(np.nan), X), "1 of 6 images hold NaN"),
    "bytes": (np.uint8(X * 255), r"uint8; give float32 in \[0, 1\]; divide by 255"),
    "float64": (np.float64(X), "float64; give float32"),
    "channels first": (np.moveaxis(X, -1, 1), "channels first; transpose"),
    "one image": (X[0], "at least one image"),
    "no image": (X[:0], "at least one image"),
    "a list": (X.tolist(), "images are a list; give an array"),
}
LABELS = {
    "beyond the classes": (Y + 100, "the network has 5 classes"),
    "negative": (Y - 100, "the network has 5 classes"),
    "one-hot": (np.eye(CLASSES, dtype=np.float32)[Y], r"labels\.argmax"),
    "one-hot integers": (np.eye(CLASSES, dtype=np.int32)[Y], r"labels\.argmax"),
    "floats": (np.float32(Y), r"integers of shape \(6,\)"),
    "too few": (Y[:3], r"integers of shape \(6,\)"),
    "a list": (Y.tolist(), "labels are a list; give an array"),
}
NETWORKS = {
    "PyTorch": (Convolution(), "PyTorch module (.*convert|.*trace)|cannot trace"),
    "NumPy": (lambda x: np.asarray(x).reshape(N, -1) @ WEIGHTS, "cannot trace .* jax.numpy"),
    "variables": (dict(params={}), "logits_fn is a dict; give a function|cannot trace"),
}
KEYS = {
    "a fraction": (0.5, r"key is 0\.5; give one JAX key"),
    "nothing": (None, "key is None; give one JAX key"),
    "too few": (keys_of(3), r"key<fry>\[3\]; give"),
    "huge": (2**70, "64 bits"),
    "signed words": (np.zeros(2, np.int32), r"int32\[2\]; give"),
}
BAD = [
    *((name, dict(x=value), words) for name in ATTACKS for value, words in IMAGES.values()),
    *((name, dict(y=value), words) for name in ATTACKS if name not in NO_LABELS for value, words in LABELS.values()),
    *((n, dict(logits_fn=value), words) for n in ATTACKS if n not in NO_NETWORK for value, words in NETWORKS.values()),
    *((name, dict(key=value), words) for name in ATTACKS if name not in NO_KEY for value, words in KEYS.values()),
]


@pytest.mark.parametrize("name", list(ATTACKS))
def test_bad_input_is_refused_in_one_line(name):
    cases = [(given, words) for attack, given, words in BAD if attack == name]
    for given, words in cases:
        with pytest.raises(InputError, match=words) as caught:
            call(name, **given)
        assert "\n" not in str(caught.value)
    assert len(cases) >= 13


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in NO_LABELS])
def test_in_a_trace_shapes_and_types_are_refused(name):
    for x, y, words in (
        (np.uint8(X), Y, "divide by 255"),
        (np.moveaxis(X, -1, 1), Y, "channels first"),
        (X, np.eye(CLASSES, dtype=np.int32)[Y], "argmax"),
        (X, Y[:3], "integers of shape"),
    ):
        with pytest.raises(InputError, match=words), jax.numpy_dtype_promotion("standard"):
            jax.eval_shape(lambda x, y: make(name)(KEY, linear, x, y), x, y)


def test_logits_of_another_shape_are_refused():
    for name in ("pgd", "apgd", "fab", "square", "cw", "mim", "spsa"):
        with pytest.raises(InputError, match=r"logits have shape \(6,\); give \(6, classes\)"):
            call(name, logits_fn=lambda x: linear(x)[:, 0])


def test_distributions_are_taken_where_the_loss_takes_them():
    soft = np.asarray(jax.nn.softmax(linear(X)))
    hot = np.eye(CLASSES, dtype=np.float32)[Y]
    for loss in ("ce", "kl", "margin"):
        assert call("pgd", y=soft, loss=loss).shape == X.shape
    np.testing.assert_array_equal(call("pgd", y=hot, loss="kl"), call("pgd", y=Y, loss="kl"))
    for y, words in ((linear(X), "at least 0 and sum to 1"), (soft[:, :3], r"give \(6, 5\)")):
        with pytest.raises(InputError, match=words):
            call("pgd", y=y)
    with pytest.raises(InputError, match="argmax"):
        call("apgd", y=soft)  # labels only


@pytest.mark.parametrize("name", ["pgd", "pgd-restarts", "stateful_pgd", "mim", "nifgsm", "eot", "transfer"])
def test_a_step_of_zero_is_refused_unless_eps_is_zero(name):
    for zero in (0, 0.0, "0/255", np.zeros(())):
        with pytest.raises(InputError, match=r"step_size=.* is not allowed; give a length above 0, as '2/255'"):
            call(name, step_size=zero)
    unmoved = jax.jit(lambda x: call(name, x=x, step_size=0, eps=0))
    np.testing.assert_array_equal(unmoved(X), X)


# ---- what is taken -------------------------------------------------------------------------------------------


SPELLINGS = {
    "linf": ("linf", "Linf", "L_inf", "l_inf", "inf", np.inf, float("inf")),
    "l2": ("l2", "L2", "2", 2, 2.0, np.int64(2)),
    "l1": ("l1", "L1", "1", 1, 1.0),
}


@pytest.mark.parametrize("name", [name for name, (_, norms, _) in ATTACKS.items() if norms])
def test_every_norm_is_taken_in_all_its_spellings(name):
    """The compiled program is the same."""
    norms = ATTACKS[name][1]
    for norm in norms:
        assert len({program(name, norm=spelling) for spelling in SPELLINGS[norm]}) == 1
    assert len({program(name, norm=norm) for norm in norms}) == len(norms)
    for other in {*EPS} - {*norms}:
        with pytest.raises(InputError, match="norm"):
            make(name, norm=other)


def test_geometry_takes_every_spelling():
    """The compiled programs are the same."""

    def programs(norm):
        functions = (lambda x: geometry.project(x, X, norm, EPS["linf"]), lambda x: geometry.distance(x, X, norm))
        return [str(jax.make_jaxpr(function)(X)) for function in functions]

    for norm, spellings in SPELLINGS.items():
        wanted = programs(norm)
        assert all(programs(other) == wanted for other in spellings)
        assert {geometry.radius("1/10", other) for other in spellings} == {0.1}
    assert len({tuple(programs(norm)) for norm in SPELLINGS}) == len(SPELLINGS)
    for bad in ("l3", 0, None, "l", "linf2", [2]):
        with pytest.raises(InputError, match="allowed: l1, l2, linf"):
            geometry.check_norm(bad)


@pytest.mark.parametrize("name", list(ATTACKS))
def test_old_keys_and_seeds_are_taken(name):
    """That all forms of a key end as the same one is the next test; here, that every attack takes each of them."""
    for key in (jax.random.PRNGKey(0), 0, jax.random.split(jax.random.PRNGKey(3), N)):
        assert f"f32[{N},4,4,3]" in program(name, key=key)


def test_all_forms_of_a_key_are_the_same_key():
    wanted, old = jax.random.key_data(KEY), jax.random.PRNGKey(0)
    for key in (KEY, old, np.asarray(old), 0, np.int64(0), jnp.int32(0), np.array(0)):
        np.testing.assert_array_equal(jax.random.key_data(entrance.as_key(key, X)), wanted)
        traced = jax.jit(lambda key: jax.random.key_data(entrance.as_key(key, X)))
        np.testing.assert_array_equal(traced(key), wanted)
    several, wanted = (jax.random.split(key, N) for key in (jax.random.PRNGKey(3), jax.random.key(3)))
    np.testing.assert_array_equal(jax.random.key_data(entrance.as_key(several, X)), jax.random.key_data(wanted))


def test_a_key_of_two_words_is_one_key_for_two_images():
    assert entrance.as_key(jax.random.PRNGKey(0), X[:2]).shape == ()
    assert entrance.as_key(jax.random.split(jax.random.PRNGKey(0), 2), X[:2]).shape == (2,)


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in OWN_EPS])
def test_eps_may_be_a_text_a_number_or_a_0_d_array(name):
    same = [0.1, "1/10", np.array(0.1), np.float64(0.1)]
    assert len({program(name, eps=eps) for eps in same}) == 1
    program(name, eps=jnp.float32(0.1))
    for eps in (None, [0.1], [0.1] * N, (0.1,), {}, True, "abc", np.nan, np.full((N, 1), 0.1), np.zeros(0)):
        if name == "deepfool" and eps is None:  # no bound
            continue
        with pytest.raises(InputError, match=r"eps|abc") as caught:
            make(name, eps=eps)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"4 lengths are given for 6 images|takes one number"):
        call(name, eps=np.full(4, 0.1))


NUMBERS = ("steps", "queries", "samples", "restarts", "targets")
COUNTS = [
    (name, option)
    for name, (factory, _, given) in ATTACKS.items()
    for option in NUMBERS
    if option in {*signature(factory).parameters, *given}
]


@pytest.mark.parametrize("name, option", COUNTS)
def test_counts_are_whole_numbers(name, option):
    """Where the attack is made."""
    for value in (2.5, "3", None, True, 0 if option != "targets" else -1):
        with pytest.raises(InputError, match=f"{option}={value!r} is not allowed; give a whole number"):
            make(name, **{option: value})


def test_every_count_of_an_attack_is_among_those_that_are_tried():
    assert {option for _, option in COUNTS} == {*NUMBERS}
    assert {name for name, _ in COUNTS} == {*ATTACKS} - {"fgsm", "noise"}


def test_what_rounding_left_outside_the_box_is_clipped():
    x = X.copy()
    x[0, 0, 0], x[1, 1, 1] = 1 + 9e-7, -9e-7
    assert x.max() > 1 and x.min() < 0
    unmoved = entrance.checked(lambda key, logits_fn, x, y: x)
    np.testing.assert_array_equal(unmoved(KEY, linear, x, Y), np.clip(x, 0, 1))
    np.testing.assert_array_equal(call("noise", x=x), call("noise", x=np.clip(x, 0, 1)))
    with pytest.raises(InputError, match=r"reach from -9e-07 to 1\.000002;"):
        call("pgd", x=np.where(x > 1, np.float32(1.000002), x))


# ---- what it costs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pgd", "mim", "spsa", "apgd", "fab", "square", "cw", "ara", "noise"])
def test_inside_a_trace_it_costs_nothing(name):
    """The compiled program is that of the attack without its entrance, at the precision that is the entrance's."""
    attack, target = make(name), X if name == "ara" else np.int32(Y)
    with jax.numpy_dtype_promotion("standard"), precision.evaluating():
        programs = [
            str(jax.make_jaxpr(lambda key, x, y, run=run: run(key, linear, x, y))(KEY, X, target))
            for run in (attack, attack.__wrapped__)
        ]
    assert programs[0] == programs[1]


def test_images_on_the_device_stay_there():
    x = jax.device_put(X, jax.devices()[3])
    assert entrance.images(x) is x


def test_networks_are_traced_once_and_not_run():
    traced = []

    def network(x):
        traced.append(isinstance(x, jax.core.Tracer))
        return linear(x)

    assert entrance.classes_of(network, X) == CLASSES
    assert traced == [True]
