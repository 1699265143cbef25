"""The oracles of `attacks_by_norm.py`, and the network and images that both sides attack.

Reference implementations are imported where they are used: fra31/auto-attack, torchattacks and scipy's L-BFGS-B. The
other oracles are their papers' formulas as loops in PyTorch or NumPy.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from ibjax.attacks.representation import guides
from ibjax.attacks.sparse_rs import exchanges

N, SHAPE, HIDDEN, CLASSES, SIGMA = 512, (16, 16, 3), 64, 10, 0.3
_RNG = np.random.default_rng(0)
X = _RNG.uniform(size=(N, *SHAPE)).astype(np.float32)
_D = X[0].size


class Weights(NamedTuple):
    """tanh(x W + b) V; NumPy, JAX and PyTorch compute it alike."""

    w: np.ndarray  # (D, hidden); hidden units have mean 0 and deviation 1.5 before the tanh
    b: np.ndarray
    v: np.ndarray  # (hidden, classes)


def _weights():
    w = _RNG.normal(size=(_D, HIDDEN)) * 1.5 * np.sqrt(12 / _D)
    return Weights(*(a.astype(np.float32) for a in (w, -w.sum(0) / 2, _RNG.normal(size=(HIDDEN, CLASSES)))))


VICTIM = _weights()
SURROGATE = Weights(*(a + 0.3 * b for a, b in zip(VICTIM, _weights(), strict=True)))


def logits_fn(x: Any, net: Weights = VICTIM) -> Any:
    """(B, classes) of NumPy's or JAX's images."""
    return hidden(x, net) @ net.v


def hidden(x: Any, net: Weights = VICTIM) -> Any:
    """The network's hidden layer (B, hidden)."""
    array = np if isinstance(x, np.ndarray) else jnp
    return array.tanh(x.reshape(len(x), -1) @ net.w + net.b[None])


def randomised(key: jax.Array, x: jax.Array) -> jax.Array:
    """The network with noise on its last weights, drawn from one key."""
    return hidden(x) @ (VICTIM.v + SIGMA * jax.random.normal(key, VICTIM.v.shape))


def randomised_each(x: jax.Array, keys: jax.Array) -> jax.Array:
    """The same, with a draw for each image."""
    return jax.vmap(lambda key, x: randomised(key, x[None])[0])(keys, x)


Y = logits_fn(X).argmax(1).astype(np.int32)
GUIDES = X[guides(Y)]


# ---- the oracles ---------------------------------------------------------------------------------------------


def _network(net=VICTIM, sigma=0.0):
    """The network as PyTorch's, for images (B, C, H, W)."""
    import torch

    w = torch.from_numpy(net.w.reshape(*SHAPE, -1).transpose(2, 0, 1, 3).reshape(_D, -1).copy())  # rows by channel
    b, v = (torch.from_numpy(a) for a in (net.b, net.v))

    class Network(torch.nn.Module):
        def forward(self, x):
            noise = sigma * torch.randn(v.shape) if sigma else 0.0
            return torch.tanh(x.flatten(1) @ w + b) @ (v + noise)

    return Network().eval()


def _in_torch(attack, seed, x, y):
    """NumPy's images through an attack of PyTorch's, (x, y) -> x_adv, and back."""
    import torch

    torch.manual_seed(seed)
    x_adv = attack(torch.from_numpy(np.moveaxis(x, -1, 1).copy()), torch.from_numpy(y.astype(np.int64)))
    return np.moveaxis(x_adv.detach().numpy(), 1, -1)


def torchattacks_(
    name: str, net: Weights = VICTIM, sigma: float = 0.0, mode: str | None = None, **options: Any
) -> Callable:
    """An attack of torchattacks by its class's name; `mode` is one of its targeted ones, as "least_likely"."""

    def run(seed, x, y):
        import torchattacks

        attack = getattr(torchattacks, name)(_network(net, sigma), **options)
        attack.set_device("cpu")
        if mode:
            getattr(attack, f"set_mode_targeted_{mode}")(quiet=True)
        return _in_torch(attack, seed, x, y)

    return run


def auto_attack(kind: str, norm: str, eps: float, sigma: float = 0.0, **options: Any) -> Callable:
    """A part of fra31/auto-attack: "apgd", "apgd-t", "fab", "square"; or "standard", all of them.

    On a random network its APGD counts pixels as moved in l1 only where they moved by more than rounding (`_l0`).
    """

    def run(seed, x, y):
        here = Path(__file__).parent
        sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != here]  # its autoattack.py is another
        from autoattack import AutoAttack, autopgd_base
        from autoattack.autopgd_base import APGDAttack, APGDAttack_targeted
        from autoattack.fab_pt import FABAttack_PT
        from autoattack.square import SquareAttack

        settings = dict(norm=norm.capitalize(), eps=eps, seed=seed, device="cpu", verbose=False, **options)
        network = _network(sigma=sigma)
        if kind == "standard":
            whole = AutoAttack(network, version="standard", **settings)
            return _in_torch(whole.run_standard_evaluation, seed, x, y)
        parts = {"apgd": APGDAttack, "apgd-t": APGDAttack_targeted, "fab": FABAttack_PT, "square": SquareAttack}
        with mock.patch.object(autopgd_base, "L0_norm", _l0 if sigma else autopgd_base.L0_norm):
            x_adv = _in_torch(parts[kind](network, **settings).perturb, seed, x, y)
        return _confirmed(x_adv, network, x, y) if sigma else x_adv

    return run


def _l0(delta):
    """How many pixels moved, by more than rounding.

    Its own count takes what x + t + δ leaves of pixels that the projection puts back, 320 of 768 at the start where 8
    moved. A step moves a share of that count. On a fixed network the first steps end it, since their point has a larger
    loss; noise makes the first point the best one for long, and robust accuracy in l1 is 87 instead of 71.
    """
    return (delta.abs() > 1e-6).flatten(1).sum(1).float()


def _confirmed(x_adv, network, x, y):
    """As AutoAttack keeps its books: what a random network answers rightly when it is asked once more is not broken."""
    import torch

    found = network(torch.from_numpy(np.moveaxis(x_adv, -1, 1).copy())).argmax(1).numpy() != y
    return np.where(found[:, None, None, None], x_adv, x)


def climb(
    norm: str,
    eps: float,
    step_size: float,
    steps: int,
    *,
    loss: str = "ce",
    momentum: float | None = None,
    start: bool = False,
    sigma: float = 0.0,
    samples: int = 1,
    net: Weights = VICTIM,
) -> Callable:
    """Projected ascent as its papers write it, a loop in PyTorch: PGD, or with `momentum` MIM; of `samples` draws."""

    def run(seed, x, y):
        import torch

        network = _network(net, sigma)

        def length(a):
            return a.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)

        def value(z, y):
            if loss == "ce":
                return torch.nn.functional.cross_entropy(z, y, reduction="sum")
            true = torch.nn.functional.one_hot(y, CLASSES).bool()
            return (z.masked_fill(true, -torch.inf).amax(1) - z[true]).sum()

        def attack(x, y):
            delta, g = torch.zeros_like(x), torch.zeros_like(x)
            if start and norm == "linf":
                delta = eps * (2 * torch.rand_like(x) - 1)
            elif start:
                direction = torch.randn_like(x)
                delta = eps * torch.rand(len(x), 1, 1, 1) * direction / length(direction)
            for _ in range(steps):
                x_adv = (x + delta).clamp(0, 1).requires_grad_()
                total = sum(value(network(x_adv), y) for _ in range(samples))
                slope = torch.autograd.grad(total, x_adv)[0]
                g = slope if momentum is None else momentum * g + slope / slope.abs().mean((1, 2, 3), keepdim=True)
                x_adv = x_adv.detach() + step_size * (g.sign() if norm == "linf" else g / length(g))
                delta = x_adv - x
                delta = delta.clamp(-eps, eps) if norm == "linf" else delta * (eps / length(delta)).clamp(max=1)
                delta = (x + delta).clamp(0, 1) - x
            return x + delta

        return _in_torch(attack, seed, x, y)

    return run


def spsa_l2(eps: float, delta: float, samples: int, lr: float, steps: int) -> Callable:
    """SPSA of Uesato et al. with the projection of l2, a loop in NumPy; Adam as Kingma & Ba write it."""

    def run(seed, x, y):
        rng = np.random.default_rng(seed)
        x_adv, m, v = x.astype(np.float64), 0.0, 0.0

        def loss(x):
            z, rows = logits_fn(x.astype(np.float32)).astype(np.float64), np.arange(len(x))
            true = z[rows, y]
            z[rows, y] = -np.inf
            return z.max(1) - true

        for t in range(1, steps + 1):
            g = np.zeros_like(x_adv)
            for _ in range(samples):
                signs = rng.choice([-1.0, 1.0], size=x.shape)
                difference = loss(x_adv + delta * signs) - loss(x_adv - delta * signs)
                g += difference[:, None, None, None] * signs / (2 * delta * samples)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            x_adv = x_adv + lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            moved = x_adv - x
            length = np.sqrt(np.sum(moved**2, axis=(1, 2, 3), keepdims=True))
            x_adv = np.clip(x + moved * np.minimum(1, eps / np.maximum(length, 1e-12)), 0, 1)
        return x_adv.astype(np.float32)

    return run


def deepfool_linf(steps: int, overshoot: float = 0.02) -> Callable:
    """DeepFool in l_inf by the paper's algorithm for many classes and any p, with clipping; NumPy, image by image."""

    def run(seed, x, y):
        w, b, v = (a.astype(np.float64) for a in VICTIM)
        found = []
        for image, label in zip(x.reshape(N, -1).astype(np.float64), y, strict=True):
            moved, total = image, np.zeros(_D)
            for _ in range(steps):
                h = np.tanh(moved @ w + b)
                z = h @ v
                if z.argmax() != label:
                    break
                jacobian = (w * (1 - h**2)) @ v  # (D, classes)
                f, slopes = z - z[label], jacobian - jacobian[:, [label]]
                reach = [np.inf if k == label else abs(f[k]) / np.abs(slopes[:, k]).sum() for k in range(CLASSES)]
                nearest = int(np.argmin(reach))
                total += reach[nearest] * np.sign(slopes[:, nearest])
                moved = np.clip(image + (1 + overshoot) * total, 0, 1)
            found.append(moved)
        return np.array(found, np.float32).reshape(x.shape)

    return run


def random_pixels(k: int, queries: int) -> Callable:
    """Sparse-RS in l0 by the paper's algorithm, with sets of pixels; NumPy, image by image."""

    def run(seed, x, y):
        rng, height, width = np.random.default_rng(seed), *SHAPE[:2]
        found = []

        def margin(image, label):
            z = logits_fn(image[None])[0]
            return z[label] - np.delete(z, label).max()

        def colours(count):
            return rng.integers(0, 2, (count, SHAPE[2])).astype(np.float32)

        for image, label in zip(x.reshape(N, height * width, SHAPE[2]), y, strict=True):
            inside, outside = np.split(rng.permutation(height * width), [k])
            best = image.copy()
            best[inside] = colours(k)
            smallest = margin(best, label)
            for count in exchanges(k, queries)[1:]:
                if smallest <= 0:
                    break
                back, new = rng.permutation(k)[:count], rng.permutation(len(outside))[:count]
                proposal = best.copy()
                proposal[inside[back]], proposal[outside[new]] = image[inside[back]], colours(count)
                if (value := margin(proposal, label)) < smallest:
                    best, smallest = proposal, value
                    inside[back], outside[new] = outside[new], inside[back]
            found.append(best)
        return np.array(found).reshape(x.shape)

    return run


def draws(kind: str, norm: str, eps: float) -> Callable:
    """Noise, drawn by NumPy."""

    def run(seed, x, y):
        rng = np.random.default_rng(seed)
        if kind == "sign":
            v = rng.choice([-1.0, 1.0], size=x.shape)
            delta = eps * v if norm == "linf" else eps * v / np.sqrt(_D)
        elif norm == "linf":
            delta = rng.uniform(-eps, eps, x.shape)
        else:
            v = rng.normal(size=x.shape)
            v /= np.sqrt(np.sum(v**2, axis=(1, 2, 3), keepdims=True))
            delta = eps * rng.uniform(size=(len(x), 1, 1, 1)) * v
        return np.clip(x + delta, 0, 1).astype(np.float32)

    return run


def ara_scipy(eps: float, steps: int) -> Callable:
    """Scipy's L-BFGS-B towards the guide's hidden layer, image by image."""

    def run(seed, x, y):
        from scipy.optimize import Bounds, minimize

        w, b = VICTIM.w.astype(np.float64), VICTIM.b.astype(np.float64)
        wanted, found = np.tanh(GUIDES.reshape(N, -1) @ w + b), []
        for flat, goal in zip(x.reshape(N, -1).astype(np.float64), wanted, strict=True):

            def distance(u, goal=goal):
                h = np.tanh(u @ w + b)
                return np.sum((h - goal) ** 2), w @ (2 * (h - goal) * (1 - h**2))

            bounds = Bounds(np.maximum(flat - eps, 0), np.minimum(flat + eps, 1))
            result = minimize(distance, flat, jac=True, method="L-BFGS-B", bounds=bounds, options=dict(maxiter=steps))
            found.append(result.x)
        return np.array(found, np.float32).reshape(x.shape)

    return run
