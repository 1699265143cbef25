"""The same attacks written step by step in PyTorch, on the same weights, end at the same images.

`benchmarks/attacks_vs_torch.py` compares robust accuracy with torchattacks itself.
"""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle is PyTorch (pip install 'ibjax[torch]')")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import twin as twins  # noqa: E402

from ibjax.attacks.cw import cw  # noqa: E402
from ibjax.attacks.mim import mim  # noqa: E402
from ibjax.attacks.nifgsm import nifgsm  # noqa: E402
from ibjax.attacks.pgd import pgd  # noqa: E402
from ibjax.models import cnn  # noqa: E402

torch.set_num_threads(1)  # of tiny convolutions; busy neighbours would make more of them slower
WIDTHS = ((4,), (6,))
EPS, STEP = 0.1, 0.03
RNG = np.random.default_rng(0)
X = RNG.random((8, 12, 10, 3)).astype(np.float32)
X[:, 0, 0] = 0.0


@pytest.fixture(scope="module")
def networks():
    """(logits_fn, its twin, labels): an untrained network whose head is not zero, and what it predicts."""
    model = cnn.Model(num_classes=5, widths=WIDTHS, hidden=(), padding=1, batch_norm=True, pool="average")
    variables = jax.device_get(jax.jit(model.init)(jax.random.key(0), X))
    head = variables["params"]["head"]["dense"]
    head["kernel"] = np.float32(RNG.normal(size=head["kernel"].shape))
    z = np.asarray(jax.jit(lambda x: model.apply(variables, x)[0])(X))
    head["bias"] = head["bias"] - z.mean(axis=0)  # otherwise all images are of one class
    scale = np.float32(1 / np.std(z - z.mean(axis=0)))
    cnn_twin = twins.cnn_like(model, variables)
    logits_fn = jax.jit(lambda x: scale * model.apply(variables, x)[0])
    labels = np.asarray(logits_fn(X)).argmax(axis=1).astype(np.int32)
    assert len(np.unique(labels)) > 2
    return logits_fn, lambda x: float(scale) * cnn_twin(x), labels


def images(x_adv):
    return np.moveaxis(x_adv.detach().numpy(), 1, -1)


def ours(attack, logits_fn, labels):
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes a float with its integer count
        return jax.jit(lambda x, y: attack(jax.random.key(0), logits_fn, x, y))(X, labels)


def gradient(twin, x, labels):
    x = x.detach().requires_grad_()
    loss = torch.nn.functional.cross_entropy(twin(x), labels, reduction="sum")
    return torch.autograd.grad(loss, x)[0]


def projected(x_adv, x):
    return (x + (x_adv - x).clamp(-EPS, EPS)).clamp(0, 1)


def test_the_twin_has_the_same_logits(networks):
    logits_fn, twin, _ = networks
    np.testing.assert_allclose(twin(twins.nchw(X)).numpy(), logits_fn(X), atol=1e-4)


@pytest.mark.parametrize("name", ["bim", "mim", "nifgsm"])
def test_signed_attacks_end_at_pytorchs_images(networks, name):
    """A pixel whose g is 0 up to rounding may step the other way, and a ReLU then close: nearly all agree."""
    logits_fn, twin, y = networks
    decay, steps = (0.0 if name == "bim" else 0.9), 5
    x, labels = twins.nchw(X), torch.tensor(y.astype(np.int64))
    x_adv, g = x.clone(), torch.zeros_like(x)
    for _ in range(steps):
        ahead = decay * STEP * g if name == "nifgsm" else 0.0
        slope = gradient(twin, x_adv + ahead, labels)
        g = decay * g + slope / slope.abs().mean(dim=(1, 2, 3), keepdim=True)
        x_adv = projected(x_adv + STEP * g.sign(), x)
    options = dict(eps=EPS, step_size=STEP, steps=steps, unroll=False)
    factories = {
        "bim": lambda: pgd(init="none", **options),
        "mim": lambda: mim(decay=decay, **options),
        "nifgsm": lambda: nifgsm(decay=decay, **options),
    }
    found = ours(factories[name](), logits_fn, y)
    assert np.mean(np.abs(found - images(x_adv)) < 1e-5) > 0.995


@pytest.mark.parametrize(
    ("compat", "c", "kappa", "steps", "lr"),
    [(True, 5.0, 1.0, 40, 0.002), (True, 5.0, 0.5, 40, 0.5), (False, 5.0, 0.0, 40, 0.02), (False, 10.0, 0.5, 40, 0.05)],
)
def test_cw_ends_at_pytorchs_images(networks, compat, c, kappa, steps, lr):
    logits_fn, twin, y = networks
    x, labels = twins.nchw(X), torch.tensor(y.astype(np.int64))
    limit, is_true = (1.0 if compat else 1 - 1e-6), torch.nn.functional.one_hot(labels, 5).bool()
    w = torch.atanh((2 * x - 1).clamp(-limit, limit)).requires_grad_()
    m, v, best, smallest = torch.zeros_like(x), torch.zeros_like(x), x.clone(), torch.full((len(x),), torch.inf)
    before, stopped_at = torch.inf, steps
    for step in range(steps):
        x_adv = (torch.tanh(w) + 1) / 2
        z, squared = twin(x_adv), ((x_adv - x) ** 2).flatten(1).sum(1)
        hidden = 0.0 if compat else -torch.inf
        lead = z.masked_fill(~is_true, hidden).amax(1) - z.masked_fill(is_true, hidden).amax(1)
        cost = squared.sum() + c * lead.clamp(min=-kappa).sum()
        (slope,) = torch.autograd.grad(cost, w)
        m, v = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope**2  # Adam; torch.optim would import its compiler
        adam = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        w = (w - lr * adam).detach().requires_grad_()
        better = (z.argmax(1) != labels) & (squared < smallest)
        best = torch.where(better[:, None, None, None], x_adv, best).detach()
        smallest = torch.where(better, squared, smallest).detach()
        if compat and step % (steps // 10) == 0:
            if cost.item() > before:
                stopped_at = step
                break
            before = cost.item()
    assert (stopped_at < steps) == (compat and lr == 0.5)  # one of the cases stops early
    found = ours(cw(c=c, kappa=kappa, steps=steps, lr=lr, torchattacks_compat=compat), logits_fn, y)
    expected = images(best)
    assert np.any(expected != X, axis=(1, 2, 3)).sum() > 2
    np.testing.assert_allclose(found, expected, atol=2e-3)
