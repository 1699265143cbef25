"""The PyTorch twin of the benchmarks computes what ibjax computes; without that its time would say nothing."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the twin of the benchmarks is PyTorch (pip install 'ibjax[torch]')")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import twin  # noqa: E402

from ibjax import optim, step  # noqa: E402
from ibjax.attacks.pgd import pgd  # noqa: E402
from ibjax.models import resnet  # noqa: E402
from ibjax.objectives.pgd_at import pgd_at  # noqa: E402

LR = 0.05


def batch(size):
    rng = np.random.default_rng(0)
    return rng.random((size, 32, 32, 3), np.float32), rng.integers(0, 10, size).astype(np.int32)


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def moved(variables):
    """The network after some training, as far as batch-norm is concerned: no statistic and no scale is trivial."""
    leaves, structure = jax.tree.flatten(variables["batch_stats"])
    rng = np.random.default_rng(1)
    stats = [jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32) for leaf in leaves]
    return {**variables, "batch_stats": jax.tree.unflatten(structure, stats)}


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
    variables = model.init(jax.random.key(0), batch(2)[0])
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
    train_step = step.make_train_step(lambda _: step.linen_net(model), pgd_at(), optimizer, attack)
    net = step.linen_net(model)
    state = step.init_state(jax.random.key(0), net, model, None, optimizer, x[:1], ema=False)

    torch_model = twin.ResNet(blocks=blocks, width=width)
    twin.copy_weights(torch_model, state.variables)
    image = nchw(x)
    if channels_last:
        torch_model, image = (part.to(memory_format=torch.channels_last) for part in (torch_model, image))
    torch_step = twin.make_step(torch_model, twin.sgd(torch_model, LR), eps=eps, steps=4, init="none")
    before, label = torch_model.state_dict(), torch.from_numpy(y.astype(np.int64))
    before = {name: value.clone() for name, value in before.items()}

    jitted, arrays = jax.jit(train_step), {"image": jnp.asarray(x), "label": y}
    for _ in range(steps):  # the second has momentum
        torch_loss = torch_step(image, label)
        state, metrics = jitted(state, arrays, jax.random.key(1))
        np.testing.assert_allclose(torch_loss.item(), metrics["loss"], atol=1e-3)

    after = torch_model.state_dict()
    for module, entry, value in twin.torch_entries(state.variables):
        name = f"{module}.{entry}"
        ours, theirs = value - before[name].numpy(), (after[name] - before[name]).numpy()
        assert np.linalg.norm(ours - theirs) < tolerance * np.linalg.norm(ours), f"{name} moved differently"
