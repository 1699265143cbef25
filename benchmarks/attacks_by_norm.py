"""Compares every attack, in every norm that it supports, with an independent implementation at equal effort.

    pip install torch scipy && pip install --no-deps torchattacks==3.5.1
    pip install git+https://github.com/fra31/auto-attack@a39220048b3c9f2cca9a4d3a54604793c68eca7e
    python benchmarks/attacks_by_norm.py [--only=square] [--out=results/attacks-by-norm.json]

The measure is robust accuracy. The network has one tanh layer. Its random weights and the images come from NumPy's
generator, so that they are the same on every machine; the labels are the network's own predictions. In each row both
sides use the same number of steps, samples or queries. These numbers are small enough to reveal differences in single
steps, and eps leaves a part of the images robust. Random attacks run several times on both sides.

The reference implementations are fra31/auto-attack, torchattacks and scipy's L-BFGS-B. Where none of them has the
attack in a norm, its formula is written below as a loop in PyTorch or NumPy. Randomised networks are evaluated at their
mean weights, transfer attacks on the network that was not attacked. C&W's images count only within eps.

`tests/test_attacks_by_norm.py` runs our side of each row again; the result may differ by at most 2 points from the
reference's mean in the file that this script writes.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import measuring
import numpy as np
from parts import bare
from scipy import special

from ibjax import files
from ibjax.attacks import geometry
from ibjax.attacks.apgd import apgd
from ibjax.attacks.cw import cw
from ibjax.attacks.deepfool import deepfool
from ibjax.attacks.eot import eot
from ibjax.attacks.fab import fab
from ibjax.attacks.fgsm import fgsm
from ibjax.attacks.mim import mim
from ibjax.attacks.nifgsm import nifgsm
from ibjax.attacks.noise import noise
from ibjax.attacks.pgd import pgd
from ibjax.attacks.representation import ara, guides
from ibjax.attacks.sparse_rs import exchanges, sparse_rs
from ibjax.attacks.spsa import spsa
from ibjax.attacks.square import square
from ibjax.attacks.targeted import targeted
from ibjax.attacks.transfer import transfer

RESULTS = Path(__file__).parent.parent / "results" / "attacks-by-norm.json"
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
    return _hidden(x, net) @ net.v


def _hidden(x, net=VICTIM):
    array = np if isinstance(x, np.ndarray) else jnp
    return array.tanh(x.reshape(len(x), -1) @ net.w + net.b[None])


def randomised(key: jax.Array, x: jax.Array) -> jax.Array:
    """The network with noise on its last weights, drawn from one key."""
    return _hidden(x) @ (VICTIM.v + SIGMA * jax.random.normal(key, VICTIM.v.shape))


def randomised_each(x: jax.Array, keys: jax.Array) -> jax.Array:
    """The same, with a draw for each image."""
    return jax.vmap(lambda key, x: randomised(key, x[None])[0])(keys, x)


Y = logits_fn(X).argmax(1).astype(np.int32)
GUIDES = X[guides(Y)]


class Row(NamedTuple):
    """One attack in one norm, on both sides (numbers of images (N, H, W, C) in and out)."""

    attack: str
    norm: str
    eps: float
    settings: str  # as the table prints them
    ours: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (key, x, y) -> x_adv
    oracle: str
    theirs: Callable[[int, np.ndarray, np.ndarray], np.ndarray]  # (seed, x, y) -> x_adv
    runs: int = 5  # 1 where nothing is drawn

    @property
    def name(self) -> str:
        """Of the row, unique."""
        return f"{self.attack} {self.norm}{f' {self.settings}' * bool(self.settings)}"


def robust_accuracy(x_adv: Any, row: Row) -> float:
    """Percent of images that are still classified correctly, or whose perturbation is longer than eps."""
    x_adv = np.asarray(x_adv)
    far = np.asarray(geometry.distance(jnp.asarray(x_adv), jnp.asarray(X), row.norm)) > row.eps * (1 + 1e-4)
    return 100 * float(np.mean((logits_fn(x_adv).argmax(1) == Y) | far))


def run_ours(row: Row) -> list[float]:
    """Our robust accuracy in each run of a row."""
    attack, x, y = jax.jit(row.ours), jnp.asarray(X), jnp.asarray(Y)
    return [robust_accuracy(attack(jax.random.key(seed), x, y), row) for seed in range(row.runs)]


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


# ---- the rows ------------------------------------------------------------------------------------------------

AUTO, TORCH, LOOP = "auto-attack", "torchattacks", "PyTorch loop"
ROLLED = dict(unroll=False)
LINF, L2, L1 = 0.007, 0.16, 1.5  # radii that leave part of the images robust


def on_network(attack: Callable, network: Callable = logits_fn) -> Callable:
    """An attack as a row has it."""
    return lambda key, x, y: attack(key, network, x, y)


def rows() -> list[Row]:
    """The whole table."""
    table: list[Row] = []

    def add(attack, norm, eps, settings, ours, oracle, theirs, **options):
        table.append(Row(attack, norm, eps, settings, on_network(ours), oracle, theirs, **options))

    fixed, ta = dict(runs=1), torchattacks_
    linf, l2 = dict(norm="linf", eps=LINF, step_size=LINF / 4), dict(norm="l2", eps=L2, step_size=L2 / 4)
    their_linf, their_l2 = dict(eps=LINF, alpha=LINF / 4), dict(eps=L2, alpha=L2 / 4)

    add("fgsm", "linf", LINF, "", fgsm(eps=LINF), TORCH, ta("FGSM", eps=LINF), **fixed)
    one_step = ta("PGDL2", eps=L2, alpha=L2, steps=1, random_start=False)
    add("fgsm", "l2", L2, "", fgsm(norm="l2", eps=L2), TORCH, one_step, **fixed)
    for norm, ball, theirs in (
        ("linf", linf, ta("PGD", steps=5, **their_linf)),
        ("l2", l2, ta("PGDL2", steps=5, **their_l2)),
    ):
        eps, step = ball["eps"], ball["step_size"]
        add("pgd", norm, eps, "5 steps", pgd(steps=5, **ball, **ROLLED), TORCH, theirs)
        margin = pgd(loss="margin", steps=5, **ball, **ROLLED)
        add("pgd", norm, eps, "margin, 5 steps", margin, LOOP, climb(norm, eps, step, 5, loss="margin", start=True))
        bim = ta("BIM", steps=5, **their_linf) if norm == "linf" else climb(norm, eps, step, 5)
        oracle = TORCH if norm == "linf" else LOOP
        add("bim", norm, eps, "5 steps", pgd(init="none", steps=5, **ball, **ROLLED), oracle, bim, **fixed)
        momentum = ta("MIFGSM", steps=5, **their_linf) if norm == "linf" else climb(norm, eps, step, 5, momentum=1.0)
        add("mim", norm, eps, "5 steps", mim(steps=5, **ball, **ROLLED), oracle, momentum, **fixed)
        noisy = eot(attack=pgd, samples=4, steps=5, **ball, **ROLLED)
        eot_pgd = ta("EOTPGD", sigma=SIGMA, steps=5, eot_iter=4, **their_linf)
        if norm == "l2":
            eot_pgd = climb(norm, eps, step, 5, start=True, sigma=SIGMA, samples=4)
        ours = on_network(noisy, randomised)
        table.append(Row("eot(pgd)", norm, eps, "5 steps, 4 samples", ours, oracle, eot_pgd))
        noisy = eot(attack=mim, samples=4, steps=5, **ball, **ROLLED)
        ours, theirs = on_network(noisy, randomised), climb(norm, eps, step, 5, momentum=1.0, sigma=SIGMA, samples=4)
        table.append(Row("eot(mim)", norm, eps, "5 steps, 4 samples", ours, LOOP, theirs))
        surrogate = partial(logits_fn, net=SURROGATE)
        moved = transfer(attack=pgd(steps=5, **ball, **ROLLED), surrogate=surrogate)
        other = (
            ta("PGD", SURROGATE, steps=5, **their_linf)
            if norm == "linf"
            else ta("PGDL2", SURROGATE, steps=5, **their_l2)
        )
        add("transfer(pgd)", norm, eps, "5 steps", moved, TORCH, other)
        for kind in ("uniform", "sign"):
            far = 12 * eps
            add(
                "noise", norm, far, kind, noise(kind=kind, norm=norm, eps=far), "NumPy", draws(kind, norm, far), runs=20
            )

    target = special.softmax(logits_fn(X), axis=1)
    trades = pgd(loss="kl", init="gaussian", steps=10, **linf, **ROLLED)
    table.append(Row("pgd", "linf", LINF, "KL, 10 steps", lambda key, x, y: trades(key, logits_fn, x, target), TORCH,
                     ta("TPGD", steps=10, **their_linf)))  # fmt: skip
    for norm, ball, theirs in (
        ("linf", linf, ta("PGD", steps=5, mode="least_likely", **their_linf)),
        ("l2", l2, ta("PGDL2", steps=5, mode="least_likely", **their_l2)),
    ):
        add("targeted", norm, ball["eps"], "least likely, 5 steps", targeted(steps=5, **ball, **ROLLED), TORCH, theirs)
    lookahead = nifgsm(steps=5, **linf, **ROLLED)
    add("nifgsm", "linf", LINF, "5 steps", lookahead, TORCH, ta("NIFGSM", steps=5, **their_linf), **fixed)

    adam = dict(delta=0.01, lr=0.01)
    add("spsa", "linf", LINF, "4 steps, 32 samples", spsa(eps=LINF, steps=4, samples=32, **adam), TORCH,
        ta("SPSA", eps=LINF, nb_iter=4, nb_sample=32, **adam))  # fmt: skip
    add("spsa", "l2", L2, "4 steps, 32 samples", spsa(norm="l2", eps=L2, steps=4, samples=32, **adam), "NumPy loop",
        spsa_l2(L2, steps=4, samples=32, **adam))  # fmt: skip
    c_and_w = dict(c=1.0, steps=30, lr=0.01)
    for compat in (False, True):
        ours, text = cw(torchattacks_compat=compat, **c_and_w), "compat, 30 steps" if compat else "30 steps"
        add("cw", "l2", L2, text, ours, TORCH, ta("CW", **c_and_w), **fixed)
    for norm, eps, oracle, theirs in (
        ("linf", LINF, "NumPy loop", deepfool_linf(3)),
        ("l2", L2, TORCH, ta("DeepFool", steps=3)),
    ):
        add("deepfool", norm, eps, "3 steps", deepfool(norm=norm, eps=eps, steps=3), oracle, theirs, **fixed)
    add("sparse_rs", "l0", 2, "150 queries", sparse_rs(eps=2, queries=150), "NumPy loop", random_pixels(2, 150))
    climb_to_guide = ara(eps=4 * LINF, steps=6)
    ours = lambda key, x, y: climb_to_guide(key, _hidden, x, jnp.asarray(GUIDES))  # noqa: E731
    table.append(Row("ara", "linf", 4 * LINF, "6 iterations", ours, "scipy", ara_scipy(4 * LINF, 6), runs=1))

    for norm, eps in (("linf", LINF), ("l2", L2), ("l1", L1)):
        ball, same = dict(norm=norm, eps=eps), partial(auto_attack, norm=norm, eps=eps)
        for loss in ("ce", "dlr"):
            add("apgd", norm, eps, f"{loss}, 10 steps", apgd(loss=loss, steps=10, **ball), AUTO,
                same("apgd", loss=loss, n_iter=10))  # fmt: skip
        add("apgd-t", norm, eps, "10 steps, 3 targets", apgd(loss="dlr_targeted", steps=10, targets=3, **ball), AUTO,
            same("apgd-t", n_iter=10, n_target_classes=3))  # fmt: skip
        noisy = on_network(apgd(steps=10, eot=4, **ball), randomised_each)
        table.append(Row("apgd", norm, eps, "ce, 10 steps, 4 samples", noisy, AUTO,
                         same("apgd", sigma=SIGMA, loss="ce", n_iter=10, eot_iter=4), runs=20))  # fmt: skip
        add("fab", norm, eps, "5 steps", fab(steps=5, **ball), AUTO, same("fab", n_iter=5), **fixed)
        add("fab-t", norm, eps, "5 steps, 3 targets", fab(steps=5, targets=3, **ball), AUTO,
            same("fab", n_iter=5, targeted=True, n_target_classes=3), **fixed)  # fmt: skip
        add("fab", norm, eps, "5 steps, 2 restarts", fab(steps=5, restarts=2, **ball), AUTO,
            same("fab", n_iter=5, n_restarts=2))  # fmt: skip
    add("apgd", "l1", L1, "ce, 20 steps, from 3 eps", apgd(norm="l1", eps=L1, steps=20, larger_eps=True), AUTO,
        auto_attack("apgd", "l1", L1, loss="ce", n_iter=20, use_largereps=True))  # fmt: skip
    for norm, eps in (("linf", 1.5 * LINF), ("l2", 3 * L2), ("l1", 2 * L1)):
        for rescale in (False, True):
            text = f"150 queries{', rescaled' * rescale}"
            ours = square(norm=norm, eps=eps, queries=150, rescale=rescale)
            theirs = auto_attack("square", norm, eps, n_queries=150, resc_schedule=rescale)
            add("square", norm, eps, text, ours, AUTO, theirs)
    return table


def table(records: list[dict]) -> str:
    """The records as Markdown."""
    heads = ("attack", "norm", "eps", "settings", "oracle", "theirs", "ours", "difference")
    lines = []
    for record in records:
        theirs, ours = (np.mean(record[side]) for side in ("theirs", "ours"))
        cells = [record[key] for key in ("attack", "norm", "eps", "settings", "oracle")]
        lines.append((*cells, f"{theirs:.1f}", f"{ours:.1f}", f"{ours - theirs:+.1f}"))
    return measuring.markdown(heads, lines)


def main() -> None:
    """The command line."""
    parser = bare(__file__, __doc__)
    parser.add_argument("--only", default="", help="rows whose names begin so; the file keeps its others")
    parser.add_argument("--out", type=files.path, default=RESULTS)
    given = parser.parse_args()
    before = json.loads(given.out.read_text(encoding="utf-8"))["records"] if given.out.is_file() else []
    records, found = {record["name"]: record for record in before}, measuring.environment()
    for row in rows():
        if not row.name.startswith(given.only):
            continue
        theirs = [robust_accuracy(row.theirs(seed, X, Y), row) for seed in range(row.runs)]
        about = {key: getattr(row, key) for key in ("name", "attack", "norm", "eps", "settings", "oracle")}
        records[row.name] = {**about, "theirs": theirs, "ours": run_ours(row)}
        print(table([records[row.name]]).splitlines()[-1], flush=True)
        ordered = [records[other.name] for other in rows() if other.name in records]
        files.write_json(given.out, {"benchmark": "attacks_by_norm", "n": N, **found, "records": ordered})
        note = f"{N} images; robust accuracy in percent, the mean of the runs\n{measuring.provenance_line(found)}"
        given.out.with_suffix(".md").write_text(f"{table(ordered)}\n\n{note}\n", encoding="utf-8")


if __name__ == "__main__":
    measuring.run(main)
