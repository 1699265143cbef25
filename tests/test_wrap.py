"""Networks of other libraries: one network in all of them has the same logits, gradients and flags under AutoAttack."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import in_programs, once
from flax import linen, nnx

from ibjax import losses, wrap
from ibjax.attacks.apgd import iterative_apgd
from ibjax.attacks.autoattack import autoattack
from ibjax.attacks.fab import iterative_fab
from ibjax.attacks.pgd import pgd
from ibjax.attacks.square import iterative_square
from ibjax.errors import InputError
from ibjax.net import linen_net
from ibjax.objectives.pgd_at import pgd_at
from ibjax.step import Problem, evaluation_variables, init_state, make_train_step

RNG = np.random.default_rng(0)
N, SIDE, CLASSES, WIDTH = 24, 6, 4, 5
X = RNG.uniform(size=(N, SIDE, SIDE, 2)).astype(np.float32)
KERNEL = RNG.normal(size=(3, 3, 2, WIDTH)).astype(np.float32)
SCALE, BIAS, MEAN = (RNG.normal(size=WIDTH).astype(np.float32) for _ in range(3))
VAR = RNG.uniform(0.5, 2, WIDTH).astype(np.float32)
DENSE = 2 * RNG.normal(size=(WIDTH, CLASSES)).astype(np.float32)


@pytest.fixture(autouse=True)
def lenient():
    """Haiku's dropout and Equinox's batch-norm rely on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# ---- one network in every library: convolution, batch-norm, relu, dropout, mean, dense ------------------------------


def plain(x):
    x = jax.lax.conv_general_dilated(x, KERNEL, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    wide = lambda v: jnp.asarray(v)[None, None, None]  # noqa: E731
    x = (x - wide(MEAN)) * wide(SCALE / np.sqrt(VAR + 1e-5)) + wide(BIAS)
    hidden = jax.nn.relu(x)
    return hidden.mean((1, 2)) @ DENSE, {"hidden": hidden}


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x, train=True):  # another default than evaluation's
        x = linen.Conv(WIDTH, (3, 3), use_bias=False)(x)
        x = linen.relu(linen.BatchNorm(use_running_average=not train)(x))
        self.sow("intermediates", "hidden", x)
        x = linen.Dropout(0.5, deterministic=not train)(x)
        return linen.Dense(CLASSES, use_bias=False)(x.mean((1, 2)))


VARIABLES = {
    "params": {
        "Conv_0": {"kernel": KERNEL},
        "BatchNorm_0": {"scale": SCALE, "bias": BIAS},
        "Dense_0": {"kernel": DENSE},
    },
    "batch_stats": {"BatchNorm_0": {"mean": MEAN, "var": VAR}},
}


class NNX(nnx.Module):
    def __init__(self, classes=CLASSES, *, rngs):
        self.conv = nnx.Conv(2, WIDTH, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(WIDTH, classes, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.norm(self.conv(x)))
        return self.dense(self.drop(x).mean((1, 2))), {"hidden": x}


def of_nnx():
    model = NNX(rngs=nnx.Rngs(0))
    for variable, value in (
        (model.conv.kernel, KERNEL), (model.norm.scale, SCALE), (model.norm.bias, BIAS), (model.norm.mean, MEAN),
        (model.norm.var, VAR), (model.dense.kernel, DENSE),
    ):  # fmt: skip
        variable[...] = jnp.asarray(value)
    model.train()
    return model


def equinox_class():
    eqx = pytest.importorskip("equinox", reason="needs pip install equinox")

    class Equinox(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.BatchNorm
        drop: eqx.nn.Dropout
        dense: eqx.nn.Linear

        def __init__(self, classes=CLASSES, *, key):
            self.conv = eqx.nn.Conv2d(2, WIDTH, 3, padding=1, use_bias=False, key=key)
            self.norm = eqx.nn.BatchNorm(WIDTH, "batch", mode="batch")
            self.drop = eqx.nn.Dropout(0.5)
            self.dense = eqx.nn.Linear(WIDTH, classes, use_bias=False, key=key)

        def __call__(self, x, state, *, key):
            x, state = self.norm(self.conv(x), state)
            x = jax.nn.relu(x)
            return (self.dense(self.drop(x, key=key).mean((1, 2))), {"hidden": jnp.moveaxis(x, 0, -1)}), state

    return eqx, Equinox


def of_equinox():
    eqx, kind = equinox_class()
    model, state = eqx.nn.make_with_state(kind)(key=jax.random.key(0))
    weights = lambda m: (m.conv.weight, m.norm.weight, m.norm.bias, m.dense.weight)  # noqa: E731
    model = eqx.tree_at(weights, model, (jnp.asarray(KERNEL.transpose(3, 2, 0, 1)), SCALE, BIAS, DENSE.T))
    counted = model.norm.batch_counter, model.norm.batch_state_index
    state = state.set(counted[0], jnp.asarray(10**6)).set(counted[1], (jnp.asarray(MEAN), jnp.asarray(VAR)))
    return model, state


def of_haiku():
    hk = pytest.importorskip("haiku", reason="needs pip install dm-haiku")

    def forward(x, is_training):
        x = hk.Conv2D(WIDTH, 3, with_bias=False, name="conv")(x)
        hidden = jax.nn.relu(hk.BatchNorm(True, True, 0.9, name="norm")(x, is_training))
        kept = hk.dropout(hk.next_rng_key(), 0.5, hidden) if is_training else hidden
        return hk.Linear(CLASSES, with_bias=False, name="dense")(kept.mean((1, 2))), {"hidden": hidden}

    made = hk.transform_with_state(forward)
    params, state = made.init(jax.random.key(0), X, is_training=True)
    wide = lambda v: v.reshape(1, 1, 1, -1)  # noqa: E731
    params = {"conv": {"w": KERNEL}, "norm": {"scale": wide(SCALE), "offset": wide(BIAS)}, "dense": {"w": DENSE}}
    for name, value in (("mean", MEAN), ("var", VAR)):
        state[f"norm/~/{name}_ema"]["average"] = jnp.asarray(wide(value))
    return made, params, state


def of_torch():
    torch = pytest.importorskip("torch", reason="needs pip install torch")

    class Torch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(2, WIDTH, 3, padding=1, bias=False)
            self.norm, self.relu = torch.nn.BatchNorm2d(WIDTH), torch.nn.ReLU()
            self.drop, self.dense = torch.nn.Dropout(0.5), torch.nn.Linear(WIDTH, CLASSES, bias=False)

        def forward(self, x):
            return self.dense(self.drop(self.relu(self.norm(self.conv(x)))).mean((2, 3)))

    module, tensor = Torch(), lambda a: torch.from_numpy(np.ascontiguousarray(a))
    weights = {"conv.weight": KERNEL.transpose(3, 2, 0, 1), "dense.weight": DENSE.T, "norm.weight": SCALE}
    weights |= {"norm.bias": BIAS, "norm.running_mean": MEAN, "norm.running_var": VAR}
    module.load_state_dict({**module.state_dict(), **{name: tensor(value) for name, value in weights.items()}})
    return module.train()


LIBRARIES = {
    "linen": lambda: wrap.linen(Linen(), VARIABLES),
    "nnx": lambda: wrap.nnx(of_nnx()),
    "equinox": lambda: wrap.equinox(*of_equinox()),
    "haiku": lambda: wrap.haiku(*of_haiku(), is_training=False),
    "pytorch": lambda: wrap.pytorch(of_torch(), taps=("relu",)),
}
TAPS = {"linen": "hidden", "pytorch": "relu"}
answers = once(lambda: jax.device_get(jax.jit(plain)(X)))
Y = once(lambda: np.asarray(answers()[0].argmax(1), np.int32))


def attacked(logits_fn):
    """A short AutoAttack."""
    norm, eps = "linf", 0.04
    parts = {
        "apgd-ce": iterative_apgd("ce", norm, eps, steps=4),
        "apgd-t": iterative_apgd("dlr_targeted", norm, eps, steps=4, targets=2),
        "fab": iterative_fab(norm, eps, steps=2),
        "square": iterative_square(norm, eps, queries=20),
    }
    return autoattack(jax.random.key(0), logits_fn, X, Y(), norm=norm, eps=eps, attacks=parts)


expected = once(lambda: attacked(wrap.function(plain).logits_fn))


@pytest.mark.parametrize("library", LIBRARIES)
def test_one_network_in_every_library_has_the_same_logits_gradients_and_taps(library):
    network = LIBRARIES[library]()
    logits, features = answers()
    np.testing.assert_allclose(network.logits_fn(X), logits, rtol=1e-4, atol=1e-5)
    _, taps = jax.jit(network.predict)(network.variables, X)
    np.testing.assert_allclose(taps[TAPS.get(library, "hidden")], features["hidden"], rtol=1e-4, atol=1e-5)

    ours = gradient_of(lambda x: network.predict(network.variables, x))
    np.testing.assert_allclose(ours, plain_gradient(), rtol=1e-3, atol=1e-4)


def gradient_of(predict):
    """Of a loss on logits and taps."""

    def loss(x):
        logits, features = predict(x)
        (hidden,) = features.values()
        return losses.cross_entropy(logits, Y()).sum() + jnp.sum(hidden**2)

    return jax.jit(jax.grad(loss))(X)


plain_gradient = once(lambda: jax.device_get(gradient_of(plain)))


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_one_network_in_every_library_has_the_same_flags_under_autoattack(library):
    result, wanted = attacked(LIBRARIES[library]().logits_fn), expected()
    assert 0 < wanted.robust.sum() < N and wanted.clean.all()
    for name, flags in wanted.robust_after.items():
        np.testing.assert_array_equal(result.robust_after[name], flags)
    assert not [text for text in result.warnings if text not in wanted.warnings]


def test_what_is_wrapped_stays_as_it_is_and_may_be_trained_further():
    model = of_nnx()
    network = wrap.nnx(model)
    before = np.asarray(network.logits_fn(X))
    assert not model.norm.use_running_average and not model.drop.deterministic  # still in training mode
    model.dense.kernel[...] = 0 * model.dense.kernel[...]
    np.testing.assert_array_equal(network.logits_fn(X), before)


def test_records_say_which_network_it_is():
    says = LIBRARIES["nnx"]().says
    assert says["library"] == "flax" and says["network"].endswith("NNX")
    assert says["parameters"] == KERNEL.size + SCALE.size + BIAS.size + DENSE.size
    assert wrap.function(plain).says["network"] == "plain"


# ---- PyTorch alone -------------------------------------------------------------------------------------------------


def of_plain(x):
    return plain(x)[0]


def test_a_pytorch_module_under_vmap_is_asked_once_for_many_directions():
    module = of_torch()
    network = wrap.pytorch(module)
    x, rows = X[:3], np.repeat(np.eye(CLASSES, dtype=np.float32)[:, None], 3, 1)

    def pulled(logits_fn):
        logits, pull = jax.vjp(logits_fn, x)
        return logits, jax.vmap(lambda row: pull(row)[0])(rows)

    (_, with_one), (logits, expected) = (jax.jit(pulled, static_argnums=0)(f) for f in (network.logits_fn, of_plain))
    np.testing.assert_allclose(with_one, expected, rtol=1e-3, atol=1e-5)
    each = jax.jit(jax.vmap(lambda x: network.predict((), x[None])[0][0]))(x)
    np.testing.assert_allclose(each, logits, rtol=1e-4, atol=1e-5)
    assert module.training


def test_a_pytorch_module_is_copied_in_evaluation_mode():
    module = of_torch()
    network = wrap.pytorch(module)
    before = np.asarray(network.logits_fn(X))
    with pytest.importorskip("torch").no_grad():
        module.dense.weight.zero_()
    np.testing.assert_array_equal(network.logits_fn(X), before)
    other = wrap.pytorch(module)
    assert other.says["weights"] != network.says["weights"] and other.says["network"] == network.says["network"]


def test_a_pytorch_module_that_writes_into_its_input_has_the_same_gradient():
    torch = pytest.importorskip("torch")

    class InPlace(torch.nn.Module):
        def forward(self, x):
            return x.mul_(2).mean((2, 3))

    gradient = jax.grad(lambda x: wrap.pytorch(InPlace()).logits_fn(x).sum())(jnp.asarray(X))
    np.testing.assert_allclose(gradient, np.full(X.shape, 2 / SIDE**2), rtol=1e-6)


def test_a_tap_that_is_never_called_or_returns_no_tensor_is_named():
    torch = pytest.importorskip("torch")

    class Pair(torch.nn.Module):
        def forward(self, x):
            return x, x

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.unused = Pair(), torch.nn.ReLU()

        def forward(self, x):
            return self.pair(x)[0].mean((2, 3))

    for tap, words in (("unused", "never calls its submodule 'unused'"), ("pair", "'pair' returns a tuple; name a")):
        with pytest.raises(InputError, match=words):
            wrap.pytorch(Two(), taps=(tap,)).logits_fn(X)


# ---- what is refused -----------------------------------------------------------------------------------------------


def refusals():
    made, params, _ = of_haiku()
    model, equinox_state = of_equinox()
    return [
        (lambda: wrap.nnx(plain), "wrap.nnx was given a function; give a flax.nnx.Module"),
        (lambda: wrap.linen(plain, {}), "wrap.linen was given a function"),
        (lambda: wrap.linen(Linen(), VARIABLES, trian=False), "takes no 'trian'.*did you mean 'train'"),
        (lambda: wrap.equinox(model), "the model keeps a state.*wrap.equinox.model, state."),
        (lambda: wrap.equinox(model, equinox_state, layout="NHWC"), "layout='NHWC' is unknown"),
        (lambda: wrap.haiku(made, params), "was given no state"),
        (lambda: wrap.haiku(plain, params), "give the result of haiku.transform"),
        (lambda: wrap.function(3), "wrap.function was given a int"),
        (lambda: wrap.pytorch(plain), "wrap.pytorch was given a function; give a torch.nn.Module"),
        (lambda: wrap.pytorch(of_torch(), taps=("act",)), "no submodule 'act'; it has conv, norm, relu, drop, dense"),
        (lambda: wrap.function(lambda x: {"logits": x}).logits_fn(X), "the network returns a dict"),
        (lambda: wrap.linen_from_equinox(None, layout="HCW"), "layout='HCW' is unknown"),
    ]


def test_what_cannot_be_wrapped_is_refused_in_one_line():
    for call, words in refusals():
        with pytest.raises(InputError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_network_that_stays_in_training_mode_is_refused_by_the_attacks():
    attack = pgd(eps=0.1, steps=1)
    statistics = wrap.function(lambda x: x.mean((1, 2)) - x.mean())
    with pytest.raises(InputError, match="depend on the other images of its batch; evaluate in evaluation mode"):
        attack(jax.random.key(0), statistics.logits_fn, X, Y() % 2)
    made, params, state = of_haiku()
    with pytest.raises(InputError, match="JAX cannot trace"):  # dropout without a key
        attack(jax.random.key(0), wrap.haiku(made, params, state, is_training=True).logits_fn, X, Y())


# ---- training ------------------------------------------------------------------------------------------------------


def trained(module):
    """Two steps of adversarial training; (state before them, state after them, the network)."""
    objective, optimizer = pgd_at(), optax.sgd(0.05)
    attack = pgd(eps=0.1, step_size=0.05, steps=1, unroll=False)
    net = linen_net(module)
    state = jax.jit(lambda: init_state(jax.random.key(1), net, module, None, optimizer, jnp.asarray(X), ema=False))()
    step = jax.jit(make_train_step(Problem(lambda frozen: net, objective, attack), optimizer))
    batch = {"image": jnp.asarray(X), "label": jnp.asarray(Y()), "index": np.arange(N, dtype=np.int32)}
    first = copy.copy(state)
    for _ in range(2):
        state, metrics = step(state, batch, jax.random.key(2))
    assert np.isfinite(float(metrics["loss"]))
    return first, state, in_programs(net)


CONSTRUCTORS = {
    "nnx": lambda: wrap.linen_from_nnx(NNX, classes=CLASSES),
    "equinox": lambda: wrap.linen_from_equinox(equinox_class()[1], classes=CLASSES),
}


@pytest.mark.parametrize("library", CONSTRUCTORS)
def test_an_objective_trains_the_modules_of_other_libraries(library):
    module = CONSTRUCTORS[library]()
    first, state, net = trained(module)
    assert set(state.variables) == {"params", "batch_stats"}
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), *jax.device_get((first.variables, state.variables)))
    assert all(change > 0 for change in jax.tree.leaves(moved["params"]))
    assert any(change > 0 for change in jax.tree.leaves(moved["batch_stats"]))
    variables = evaluation_variables(state)
    logits = net.predict(variables, jnp.asarray(X))[0]
    halves = [net.predict(variables, jnp.asarray(half))[0] for half in (X[:12], X[12:])]  # no batch statistics
    np.testing.assert_allclose(logits, np.concatenate(halves), rtol=1e-4, atol=1e-5)
    assert not np.allclose(net.forward(variables, jnp.asarray(X), jax.random.key(0))[0][0], logits, atol=1e-3)
