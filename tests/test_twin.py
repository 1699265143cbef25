"""The PyTorch twins of the benchmarks compute what ibjax computes; without that their time would say nothing."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the twin of the benchmarks is PyTorch (pip install 'ibjax[torch]')")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import methods  # noqa: E402
import twin  # noqa: E402
import twin_methods  # noqa: E402
import twin_step  # noqa: E402

from ibjax import optim, step  # noqa: E402
from ibjax.attacks import geometry  # noqa: E402
from ibjax.attacks.pgd import pgd  # noqa: E402
from ibjax.models import resnet, stochastic  # noqa: E402
from ibjax.net import linen_net  # noqa: E402
from ibjax.objectives.pgd_at import pgd_at  # noqa: E402

LR = 0.05
torch.set_num_threads(1)  # threads of several test processes would wait for each other


def batch(size, side=32):
    rng = np.random.default_rng(0)
    return rng.random((size, side, side, 3), np.float32), rng.integers(0, 10, size).astype(np.int32)


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def moved(variables):
    """The network after some training, as far as batch-norm is concerned: no statistic and no scale is trivial."""
    leaves, structure = jax.tree.flatten(variables["batch_stats"])
    rng = np.random.default_rng(1)
    stats = [jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32) for leaf in leaves]
    return {**variables, "batch_stats": jax.tree.unflatten(structure, stats)}


def copy(module):
    """All weights and buffers as they are now."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_moved_alike(before, module, variables, tolerance):
    after = module.state_dict()
    for name, value in twin.torch_entries(variables):
        ours, theirs = value - before[name].numpy(), (after[name] - before[name]).numpy()
        allowed = tolerance * np.linalg.norm(ours) + 1e-9  # some have no gradient but rounding
        assert np.linalg.norm(ours - theirs) <= allowed, f"{name} moved differently"


def test_the_same_weights_give_the_same_logits():
    x, _ = batch(4)
    model = resnet.Model(num_classes=10, depth=18)
    variables = moved(jax.jit(model.init)(jax.random.key(0), x))
    logits = jax.jit(model.apply)(variables, x)[0]

    torch_model = twin.ResNet()
    twin.copy_weights(torch_model, variables)
    assert sum(p.numel() for p in torch_model.parameters()) == 11_173_962
    assert sum(p.size for p in jax.tree.leaves(variables["params"])) == 11_173_962
    with torch.no_grad():
        np.testing.assert_allclose(torch_model.eval()(nchw(x)).numpy(), logits, atol=1e-4)


def test_another_architecture_is_refused():
    model = resnet.Model(num_classes=10, blocks=(1, 1), width=8)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch(2)[0])
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    with pytest.raises(KeyError, match="not the same architecture"):
        twin.copy_weights(twin.ResNet(blocks=(1, 2), width=8), variables)


# Not to the last bit, and less closely later: a ReLU at 0 may close, a pixel with a gradient of 0 step the other way.
@pytest.mark.parametrize(
    ("eps", "channels_last", "steps", "tolerance"),
    [(8 / 255, False, 1, 0.03), (0.0, True, 1, 0.03), (0.0, False, 2, 0.03)],
)  # a ReLU whose input is within rounding of zero goes either way, which depends on PyTorch's threads
def test_one_step_from_the_same_weights_gives_the_same_loss_weights_and_running_statistics(
    eps, channels_last, steps, tolerance
):
    x, y = batch(16)
    blocks, width = (1, 1, 1, 1), 16
    model = resnet.Model(num_classes=10, blocks=blocks, width=width)
    optimizer = optim.sgd(lr=LR)
    attack = pgd(eps=eps, steps=4, init="none", unroll=False)
    train_step = step.make_train_step(step.Problem(lambda _: linen_net(model), pgd_at(), attack), optimizer)
    net = linen_net(model)
    state = step.init_state(jax.random.key(0), net, model, None, optimizer, x[:1], ema=False)

    torch_model = twin.ResNet(blocks=blocks, width=width)
    twin.copy_weights(torch_model, state.variables)
    image = nchw(x)
    if channels_last:
        torch_model, image = (part.to(memory_format=torch.channels_last) for part in (torch_model, image))
    torch_step = twin_step.make_step(
        twin_methods.pgd_at(), torch_model, twin.sgd(torch_model, lr=LR), eps=eps, steps=4, start=lambda x, eps: x
    )
    before, label = copy(torch_model), torch.from_numpy(y.astype(np.int64))

    jitted, arrays = jax.jit(train_step), {"image": jnp.asarray(x), "label": y}
    for _ in range(steps):  # the second has momentum
        torch_loss = torch_step(image, label)
        state, metrics = jitted(state, arrays, jax.random.key(1))
        np.testing.assert_allclose(torch_loss.item(), metrics["loss"], atol=1e-3)
    assert_moved_alike(before, torch_model, state.variables, tolerance)


# ---- every objective -------------------------------------------------------------------------------------------

# options that make every term count in the first step
OPTIONS = {
    "te": dict(start=1, end=2),
    "iad": dict(begin=0, beta=1.0),
    "ard": dict(alpha=0.6, temperature=2.0),
    "shared_information": dict(beta_start=0.5, lam=10.0, neighbours=3),
    "ib_rar": dict(alpha=0.05, beta=0.1),
    "hbar": dict(lambda_x=0.05, lambda_y=0.1),
    "mma": dict(search_steps=3),
    "vib": dict(beta=0.1),
    "ceb": dict(rho=1.0),
    "infoat_r": dict(tau=0.5),
}
STEPS, SIDE = 2, 8
SHAPE = dict(blocks=(1, 1), width=4)


def offset(shape):
    """The same start for both, not too near to x; NHWC."""
    return 0.01 * np.cos(np.arange(np.prod(shape), dtype=np.float32)).reshape(shape)


def pretend_noise(shape):
    return np.cos(7 * np.arange(np.prod(shape), dtype=np.float32)).reshape(shape)


@pytest.fixture
def no_chance(monkeypatch):
    """Attacks of ours start at a given point, the stochastic layer draws a given ξ."""
    for name in ("uniform", "gaussian"):
        monkeypatch.setitem(geometry.STARTS, name, lambda key, x, norm, eps: x + jnp.asarray(offset(x.shape)))
    monkeypatch.setattr(stochastic.Model, "noise", lambda self, mu: jnp.asarray(pretend_noise(mu.shape)))


def test_every_objective_but_siriib_has_a_twin():
    assert set(twin_methods.TWINS) == set(methods.NAMES) - {"siriib"}


@pytest.mark.parametrize("name", twin_methods.TWINS)
def test_each_twins_step_has_the_loss_and_moves_the_weights_of_its_objective(name, no_chance):
    options = OPTIONS.get(name, {})
    given = methods.settings(name, dict(name="resnet", **SHAPE), STEPS, **options)
    case = methods.build(given, dict(name="resnet", **SHAPE), unroll=False)
    made = methods.program(case, images=16, shape=(SIDE, SIDE, 3))
    state, frozen = jax.jit(made.init)()
    frozen = {role: moved(variables) for role, variables in frozen.items()}
    state = state._replace(variables=moved(state.variables))
    method = twin_methods.TWINS[name](**options, **(dict(steps=STEPS) if name == "mma" else {}))
    memory = method.memory(16, 10) if method.memory else None
    if name == "mma":  # as visited before
        memory = torch.linspace(0.0, 0.06, 16)
        state.variables["memory"] = jnp.asarray(memory.numpy())

    parts = twin_step_parts(name, case, state.variables, frozen)
    student, head = parts["student"], parts["head"]
    if hasattr(student, "noise"):
        student.noise = lambda mu: torch.from_numpy(pretend_noise(mu.shape))
    torch_step = twin_step.make_step(
        method,
        optimizer=twin.sgd(student, head, lr=0.01),
        steps=STEPS,
        start=lambda x, eps: x + nchw(offset((len(x), SIDE, SIDE, 3))),
        memory=memory,
        **parts,
    )
    x, y = batch(16, SIDE)
    before = copy(student), head and copy(head)
    loss = torch_step(nchw(x), torch.from_numpy(y.astype(np.int64)))
    arrays = {"image": jnp.asarray(x), "label": y, "index": jnp.arange(16, dtype="int32")}
    state, metrics = jax.jit(made.train_step)(state, arrays, jax.random.key(1), frozen)
    np.testing.assert_allclose(loss.item(), metrics["loss"], rtol=1e-4, atol=1e-4)
    assert_moved_alike(before[0], student, state.variables, 0.03)
    if head is not None:
        assert_moved_alike(before[1], head, state.variables["head"], 0.03)


def twin_step_parts(name, case, variables, frozen):
    """Student, teacher and head of a twin with ibjax's weights."""
    student = twin.student(name, **SHAPE)
    twin.copy_weights(student, variables)
    teacher = head = None
    if case.teachers:
        teacher = twin.ResNet(**SHAPE)
        twin.copy_weights(teacher, frozen["teacher"])
    if case.objective.head is not None:
        head = twin.Attention(student.block_widths, teacher.block_widths)
        twin.copy_weights(head, variables["head"])
    return dict(student=student, teacher=teacher, head=head)
