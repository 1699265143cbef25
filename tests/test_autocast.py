"""Search in bfloat16: which products of a network it narrows, and that float32 alone decides what is reported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibjax.attacks import autocast, hoist
from ibjax.attacks.apgd import iterative_apgd
from ibjax.attacks.autoattack import autoattack
from ibjax.attacks.fab import iterative_fab
from ibjax.attacks.square import iterative_square
from ibjax.errors import InputError
from ibjax.evaluation import named
from ibjax.models import resnet

RNG = np.random.default_rng(0)
W = np.float32(RNG.normal(size=(5, 8, 8)) / 3)
X = np.float32(RNG.uniform(size=(6, 8)))


@jax.custom_vjp
def own(x):
    return x @ jnp.asarray(W[2])


own.defvjp(lambda x: (own(x), None), lambda _, g: (g @ jnp.asarray(W[2]).T,))
block = jax.jit(lambda x, w: jax.nn.relu(x @ w))


def dense(*numbers):
    def network(x):
        for number in numbers:
            x = block(x, jnp.asarray(W[number]))
        return x

    return network


def around(inner):
    """A network with `inner` between its first and its last product."""
    return lambda x: jnp.tanh(inner(x @ jnp.asarray(W[0]))) @ jnp.asarray(W[4])


def repeated(x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, jnp.asarray(W[1:4]))[0]


def until(x):
    return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ jnp.asarray(W[1]))), (0, x))[1]


def either(x):
    return jax.lax.cond(x.sum() > 0, lambda x: x @ jnp.asarray(W[1]), lambda x: x @ jnp.asarray(W[2]), x)


def one_by_one(x):
    return jax.lax.map(dense(0, 1, 2), x)


def of_normalised_weights(h):
    """Power iteration, as in spectral normalisation."""
    w = jnp.asarray(W[1])
    v = jax.lax.fori_loop(0, 3, lambda _, v: (u := w.T @ (w @ v)) / jnp.linalg.norm(u), w[0])
    return h @ (w / jnp.linalg.norm(w @ v))


def resized(x):
    """Pixels are resized by two products in a row, which state the highest precision."""
    pixels = jax.image.resize(x.reshape(-1, 2, 4, 1), (len(x), 4, 2, 1), "bilinear", antialias=False)
    return dense(0, 1, 2)(pixels.reshape(-1, 8))


def of_weights(x):
    return x @ (jnp.asarray(W[1]) @ jnp.asarray(W[2]))


LEFT = "products with derivatives of their own stay in float32 (1 in custom_vjp_call)"
NONE = "no product of the network is narrowed"
# network, how its products compute in the order of its program (n: bfloat16), words of its warnings
NETWORKS = {
    "one layer": (dense(0), "f", (NONE,)),
    "two layers": (dense(0, 1), "ff", (NONE,)),
    "four layers": (dense(0, 1, 2, 3), "fnnf", ()),
    "one function jitted, its first and last call": (dense(0, 0, 0), "fnf", ()),
    "a residual sum": (around(lambda h: h + block(h, jnp.asarray(W[1]))), "fnf", ()),
    "a product that states its precision": (
        around(lambda h: jnp.matmul(h, jnp.asarray(W[1]), precision="highest")),
        "fff",
        (NONE,),
    ),
    "remat": (around(jax.checkpoint(lambda h: jnp.sin(h @ jnp.asarray(W[1])))), "fnf", ()),
    "scan": (around(repeated), "fnf", ()),
    "while": (around(until), "fnf", ()),
    "cond": (around(either), "fnnf", ()),
    "a derivative of its own": (around(lambda h: own(h) @ jnp.asarray(W[3])), "ffnf", (LEFT,)),
    "a product of weights": (around(of_weights), "ffnf", ()),
    "a loop of weights": (around(of_normalised_weights), "ffffnf", ()),
    "a loop over images": (one_by_one, "fff", (NONE,)),
    "pixels resized": (resized, "fffnf", ()),
    "bfloat16 already": (
        around(lambda h: (h.astype(jnp.bfloat16) @ jnp.bfloat16(W[1])).astype(jnp.float32)),
        "fbf",
        (NONE,),
    ),
}


def products(program, found):
    """The dtypes of the products of a program, in order, with those of the programs within it."""
    for equation in program.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            found.append({str(v.aval.dtype) for v in (*equation.invars, *equation.outvars)})
        for value in equation.params.values():
            for each in value if isinstance(value, tuple) else (value,):
                inner = getattr(each, "jaxpr", each)
                if hasattr(inner, "eqns"):
                    products(inner, found)
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_products_between_two_others_are_in_bfloat16_and_what_stays_is_said(name):
    network, kinds, words = NETWORKS[name]
    narrow = autocast.narrowed(network)
    found = products(jax.make_jaxpr(narrow)(X).jaxpr, [])
    wanted = [{"f": {"float32"}}.get(kind, {"bfloat16"}) for kind in kinds]
    assert sorted(map(sorted, found)) == sorted(map(sorted, wanted))
    assert (found[0], found[-1]) == (wanted[0], wanted[-1])
    warnings = autocast.told(network, X)
    assert len(warnings) == len(words) and all(word in text for word, text in zip(words, warnings, strict=True))

    def answers(x):
        if name == "while":  # JAX does not differentiate it
            return network(x), narrow(x)
        (exact, pull), (near, pull_near) = jax.vjp(network, x), jax.vjp(narrow, x)
        return exact, near, *pull(jnp.ones_like(exact)), *pull_near(jnp.ones_like(near))

    exact, near, *slopes = map(np.asarray, jax.jit(answers)(X))
    assert near.dtype == exact.dtype
    np.testing.assert_allclose(near, exact, atol=0.02 * np.abs(exact).max())
    assert np.any(near != exact) == ("n" in kinds)
    if slopes:
        np.testing.assert_allclose(slopes[1], slopes[0], atol=0.05 * np.abs(slopes[0]).max())


def test_what_a_product_reads_is_stored_once_for_every_later_reader():
    network, _, _ = NETWORKS["a residual sum"]
    rounded = lambda a: a.astype(jnp.bfloat16).astype(np.float32)  # noqa: E731
    h = rounded(X @ W[0])
    wanted = np.tanh(h + np.maximum(rounded(h @ rounded(W[1])), 0)) @ W[4]
    lowered = jax.jit(autocast.narrowed(network)).lower(X)
    stored = {"xla_allow_excess_precision": False}  # else a CPU keeps float32 where it need not store
    found = lowered.compile(stored)(X)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.abs(np.subtract(found, jax.jit(network)(X))).max() > 1e-4


def test_the_weights_of_a_residual_network_are_narrowed_before_the_loop():
    model = resnet.Model(num_classes=5, blocks=(1, 1), width=4)
    x = np.float32(RNG.uniform(size=(2, 8, 8, 3)))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    variables = jax.tree.map(lambda shape: np.ones(shape.shape, shape.dtype), shapes)
    network = lambda x: model.apply(variables, x, train=False)[0]  # noqa: E731
    assert autocast.told(network, x) == []

    def steps(x):
        ready = hoist.prepared(autocast.narrowed(network), x)
        return jax.lax.fori_loop(0, 3, lambda _, x: x + jax.grad(lambda x: ready(x).sum())(x), x)

    program = jax.make_jaxpr(steps)(x).jaxpr
    (loop,) = (e for e in program.eqns if e.primitive.name == "scan")
    before = [v.aval for v in loop.invars if v.aval.dtype == jnp.bfloat16]
    assert sum(a.ndim == 4 for a in before) == 5  # all kernels but the stem's
    inside = products(loop.params["jaxpr"].jaxpr, [])
    assert sum(kinds == {"bfloat16"} for kinds in inside) == 10 and len(inside) >= 14


# ---- AutoAttack ----------------------------------------------------------------------------------------------

N, EPS = 48, 0.02
IMAGES = np.float32(RNG.uniform(0.25, 0.75, size=(N, 4, 4, 1)))
SIGNS = np.float32(RNG.choice([-1.0, 1.0], size=16))
REACH, SHIFT = EPS * 16, 0.3  # by how much an attack changes the score, and how wrong bfloat16 is about it
IMAGES = np.where((IMAGES - 0.5).reshape(N, 16) @ SIGNS < 0, 1 - IMAGES.T, IMAGES.T).T
SCORE = (IMAGES.reshape(N, 16).astype(np.float64) - 0.5) @ SIGNS
Y = np.ones(N, np.int64)
KEY = jax.random.key(0)


def lying(sign):
    """The sign of a score. Where bfloat16 rounds 1 + 2⁻¹⁰ to 1, SHIFT is added to it, or taken away."""

    def network(x):
        score = (x.reshape(len(x), 16) - 0.5) @ SIGNS[:, None]
        ones = np.ones((1, 1), np.float32)
        rounded = 1 + 1024 * (1 - (0 * score + 1 + 2.0**-10) @ ones)  # 0 in float32, 1 in bfloat16
        return (score + sign * SHIFT * rounded) @ np.array([[-1, 1]], np.float32)

    return jax.jit(network)


PLAN = {
    "apgd-ce": iterative_apgd("margin", "linf", EPS, 8),
    "fab-t": iterative_fab("linf", EPS, 8, targets=1),
    "square": iterative_square("linf", EPS, 80),
}
SQUARE = {"square": PLAN["square"]}


def attack(network, **options):
    given = dict(attacks=PLAN, batch_size=64, search_dtype="bfloat16") | options
    return autoattack(KEY, network, IMAGES, Y, "linf", EPS, **given)


@pytest.mark.parametrize("plan", [["apgd-ce"], [*PLAN]], ids=["apgd-ce", "all"])
def test_what_bfloat16_alone_breaks_is_not_broken_and_does_not_end_a_search(plan):
    """Flags are those of the exact margin, although bfloat16 misclassifies clean images."""
    network = lying(-1)
    near = jax.jit(autocast.narrowed(network))(IMAGES)
    assert 5 < np.sum(np.argmax(near, 1) != Y) < N - 5
    result = attack(network, attacks={name: PLAN[name] for name in plan})
    np.testing.assert_array_equal(result.clean, True)
    np.testing.assert_array_equal(np.argmax(network(result.x_adv), 1) == Y, result.robust)
    np.testing.assert_array_equal(result.robust_after["apgd-ce"], SCORE > REACH)
    assert 5 < result.robust.sum() < N - 5 and result.warnings == []


@pytest.mark.slow
def test_square_finds_in_bfloat16_about_what_it_finds_in_float32():
    network = lying(-1)
    square = {dtype: attack(network, attacks=SQUARE, search_dtype=dtype).robust for dtype in autocast.DTYPES}
    assert abs(square["bfloat16"].sum() - square["float32"].sum()) <= 2


APGD = {"apgd-ce": PLAN["apgd-ce"]}


@pytest.fixture(scope="module")
def optimistic(tmp_path_factory):
    """(result, state file) of APGD on a network of which bfloat16 thinks too well."""
    file = tmp_path_factory.mktemp("autocast") / "state.npz"
    return attack(lying(1), attacks=APGD, state=file), file


@pytest.mark.parametrize("name", ["apgd-ce", "square"])
def test_what_bfloat16_alone_keeps_is_broken_where_its_search_ends(name, optimistic):
    hidden = SCORE > REACH - SHIFT  # bfloat16 never calls these images misclassified
    found = (optimistic[0] if name == "apgd-ce" else attack(lying(1), attacks={name: PLAN[name]})).robust
    without = attack(lying(1), attacks={name: PLAN[name]._replace(ends=None)}).robust
    np.testing.assert_array_equal(without[hidden], True)
    share = 0.9 if name == "apgd-ce" else 0.05
    assert np.sum(hidden & ~found) > share * np.sum(hidden & (SCORE < REACH)) > 0
    np.testing.assert_array_equal(found[SCORE > REACH], True)


def test_the_search_dtype_is_part_of_a_state_and_of_a_name(optimistic):
    with pytest.raises(InputError, match=r"its search_dtype differ"):
        attack(lying(1), attacks=APGD, state=optimistic[1], search_dtype="float32")
    with pytest.raises(InputError, match="did you mean 'bfloat16'"):
        attack(lying(1), search_dtype="bfloat")
    name = "autoattack(search_dtype=bfloat16)"
    assert named.named(name).of_autoattack() == dict(version="standard", attacks=None, search_dtype="bfloat16")
    assert named.named("square(queries=9,search_dtype=bfloat16)").settings["search_dtype"] == "bfloat16"
    assert named.named("autoattack(search_dtype=float32)") == named.named("autoattack")
    with pytest.raises(InputError, match="search_dtype=float16"):
        named.named("apgd-t(search_dtype=float16)")


def test_a_random_network_is_searched_in_bfloat16_and_judged_in_float32():
    def noisy(x, keys):
        return lying(1)(x) + 0.01 * jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys)

    plan = {"apgd-ce": iterative_apgd("ce", "linf", EPS, 4, eot=2)}
    result = attack(noisy, version="rand", attacks=plan, draws=5)
    expected = SCORE > REACH
    assert result.drawn is not None
    assert np.mean(result.drawn.robust.mean(0) != expected) < 0.2


def test_a_network_without_products_is_searched_as_it_is():
    plan = {"apgd-ce": PLAN["apgd-ce"]}
    network = jax.jit(lambda x: jnp.stack([-x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 1], 1))
    result = attack(network, attacks=plan)
    assert any("no product of the network is narrowed" in text for text in result.warnings)
