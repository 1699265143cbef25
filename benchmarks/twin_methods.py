"""PyTorch twins of ibjax's objectives, written from the same papers: the baseline for ibjax's speed.

Formulas and defaults are documented in `ibjax/objectives/`. A twin takes the same options as the objective of its name,
as far as it implements them. SiRIIB has no twin, since it also needs its own network.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from twin_step import Batch, Nets, Twin, ascend, kept_statistics, mode
from twin_terms import blocks, centered, distances, kl, kl_to, nhsic_terms, taps

# ---- adversarial training --------------------------------------------------------------------------------------


def standard() -> Twin:
    """CE(x)."""
    return Twin(lambda nets, batch, _: F.cross_entropy(nets.logits(batch.x), batch.y), start=None)


def pgd_at() -> Twin:
    """CE(x')."""
    return Twin(lambda nets, batch, x_adv: F.cross_entropy(nets.logits(x_adv), batch.y))


def awp(gamma: float = 0.01) -> Twin:
    """CE(x') at perturbed weights."""
    return pgd_at()._replace(gamma=gamma)


def label_smoothing(delta: float = 0.1) -> Twin:
    def loss(nets, batch, x_adv):
        logits = nets.logits(x_adv)
        target = torch.full_like(logits, delta / (logits.shape[1] - 1))
        return F.cross_entropy(logits, target.scatter(1, batch.y[:, None], 1 - delta))

    return Twin(loss)


def prediction(nets: Nets, batch: Batch) -> Tensor:
    """The network's own on the clean images, as TRADES climbs away from it."""
    return nets.logits(batch.x).softmax(1)


def climb_kl(nets: Nets, x: Tensor, target: Tensor) -> Tensor:
    """KL of a distribution to the prediction."""
    return kl_to(target, nets.logits(x))


def trades(beta: float = 6.0) -> Twin:
    def loss(nets, batch, x_adv):
        clean, adv = nets.logits(batch.x), nets.logits(x_adv)
        return F.cross_entropy(clean, batch.y) + beta * kl(clean, adv).mean()

    return Twin(loss, prediction, climb_kl, "gaussian")


def score(beta: float = 4.0) -> Twin:
    def square(logits, target):
        return (logits.softmax(1) - target).square().sum(1)

    def loss(nets, batch, x_adv):
        clean, adv = nets.logits(batch.x), nets.logits(x_adv)
        natural = square(clean, F.one_hot(batch.y, clean.shape[1]))
        return (natural + beta * square(adv, clean.softmax(1))).mean()

    return Twin(loss, prediction, lambda nets, x, target: square(nets.logits(x), target), "gaussian")


def dkl(alpha: float = 4.0, beta: float = 20.0, temperature: float = 4.0) -> Twin:
    def decoupled(clean, adv, w, alpha, beta):
        gaps, gaps_adv = (z[:, :, None] - z[:, None] for z in (clean, adv))
        square = 0.25 * ((gaps - gaps_adv).square() * w[:, :, None] * w[:, None]).sum((1, 2))
        return beta * square - alpha * (clean.softmax(1).detach() * adv.log_softmax(1)).sum(1)

    def target(nets, batch):
        return nets.logits(batch.x).detach(), nets.memory[0][batch.y]

    def climb(nets, x, given):
        clean, w = given
        return decoupled(clean, nets.logits(x), w, 1.0, 1.0)

    def loss(nets, batch, x_adv):
        adv, clean = nets.logits(x_adv), nets.logits(batch.x)
        value = F.cross_entropy(clean, batch.y) + decoupled(clean, adv, nets.memory[0][batch.y], alpha, beta).mean()
        one_hot = F.one_hot(batch.y, clean.shape[1]).float()
        nets.memory[1] += one_hot.T @ (clean.detach() / temperature).softmax(1)
        return value

    def memory(images, classes):  # the means of this epoch, the sums of the next
        return torch.stack([torch.full((classes, classes), 1 / classes), torch.zeros(classes, classes)])

    return Twin(loss, target, climb, "gaussian", memory=memory)


def boosted(logits: Tensor, y: Tensor) -> Tensor:
    """MART's −log p_y − log(1.0001 − max_{k≠y} p_k), shape (B,)."""
    others = logits.softmax(1).scatter(1, y[:, None], 0.0).amax(1)
    return F.cross_entropy(logits, y, reduction="none") - torch.log(1.0001 - others)


def mart(beta: float = 5.0) -> Twin:
    def loss(nets, batch, x_adv):
        clean, adv = nets.logits(batch.x), nets.logits(x_adv)
        p_y = clean.softmax(1).gather(1, batch.y[:, None])[:, 0]
        return boosted(adv, batch.y).mean() + beta * (kl(clean, adv) * (1.0000001 - p_y)).mean()

    return Twin(loss, start="gaussian")


def alp(pairing: float = 0.5) -> Twin:
    def loss(nets, batch, x_adv):
        logits = nets.logits(torch.cat([batch.x, x_adv]))
        clean, adv = logits.chunk(2)
        return F.cross_entropy(logits, batch.y.repeat(2)) + pairing * F.mse_loss(clean, adv)

    return Twin(loss)


def te(weight: float = 300.0, momentum: float = 0.9, start: int = 90, end: int = 150) -> Twin:
    def ramp(batch):
        epoch = math.floor(batch.epoch) + 1
        return 0.0 if epoch < start else weight * math.exp(-5 * (1 - min((epoch - start) / (end - start), 1.0)) ** 2)

    def remember(nets, batch):
        p = prediction(nets, batch)
        if math.floor(batch.epoch) + 1 >= start:
            nets.memory[batch.index] = momentum * nets.memory[batch.index] + (1 - momentum) * p

    def ensemble(nets, batch):
        e = nets.memory[batch.index]
        return e / e.sum(1, keepdim=True).clamp(min=1e-12)

    def per_image(logits, y, t, w):
        return F.cross_entropy(logits, y, reduction="none") + w * (logits.softmax(1) - t).square().mean(1)

    def target(nets, batch):
        return batch.y, ensemble(nets, batch), ramp(batch)

    return Twin(
        lambda nets, batch, x_adv: per_image(nets.logits(x_adv), *batch.target).mean(),
        target,
        lambda nets, x, given: per_image(nets.logits(x), *given),
        remember=remember,
        memory=lambda images, classes: torch.zeros(images, classes),
    )


def mma(
    max_eps: float = 12 / 255,
    min_eps: float = 0.005,
    clean_weight: float = 1 / 3,
    steps: int = 10,
    search_steps: int = 10,
) -> Twin:
    def margin(logits, y):  # logsumexp of the others less z_y
        chosen = logits.gather(1, y[:, None])[:, 0]
        return logits.scatter(1, y[:, None], -math.inf).logsumexp(1) - chosen

    def attack(nets, batch, start):
        x, y, column = batch.x, batch.y, (-1, 1, 1, 1)
        with torch.no_grad(), mode(nets.student, training=True):
            correct = margin(nets.logits(x), y) < 0
        eps = nets.memory[batch.index].clamp(min_eps, 1.05 * max_eps)
        radius = eps.view(column)

        def climb(nets, x, y):
            return margin(nets.logits(x), y)

        reached = ascend(nets, x, y, climb, start(x, radius), radius, 2.5 * radius / steps, steps)
        u = torch.where(correct.view(column), (reached - x) / radius, 0.0)
        low, high = torch.zeros_like(eps), torch.full_like(eps, 1.05 * max_eps)
        with torch.no_grad(), mode(nets.student, training=True):
            for i in range(search_steps + 1):  # the last value is not used, its statistics are
                value = margin(nets.logits((x + eps.view(column) * u).clamp(0, 1)), y)
                if i < search_steps:
                    low, high = torch.where(value < 0, eps, low), torch.where(value < 0, high, eps)
                    eps = (low + high) / 2
        eps = torch.where(correct, eps, 0.0)
        nets.memory[batch.index] = eps
        return x + eps.view(column) * u, (eps < max_eps).float()

    def loss(nets, batch, mixed):
        image, counts = mixed
        with kept_statistics(nets.student):  # they have seen x in the attack
            clean = F.cross_entropy(nets.logits(batch.x), batch.y)
        per_image = F.cross_entropy(nets.logits(image), batch.y, reduction="none")
        return (1 - clean_weight) * (counts * per_image).mean() + clean_weight * clean

    return Twin(loss, attack=attack, memory=lambda images, classes: torch.zeros(images))


def infoat_r(beta: float = 5.0, tau: float = 0.01) -> Twin:
    def moments(features):
        z = features["pre_logits"].float()
        return z.mean(0), z.var(0, correction=0)

    def rate(features, mean, variance):
        return 0.5 * ((features["pre_logits"].float() - mean).square() / (variance + 1e-5)).sum(1)

    def climb(nets, x, target):
        y, known = target
        logits, features = nets.outputs(x)
        return F.cross_entropy(logits, y, reduction="none") + tau * rate(features, *known)

    def loss(nets, batch, x_adv):
        (clean, features), (adv, features_adv) = nets.outputs(batch.x), nets.outputs(x_adv)
        r, d = rate(features_adv, *moments(features)), features["pre_logits"].shape[1]
        w = len(r) * (r.detach() / math.sqrt(d / 2)).softmax(0)
        return boosted(adv, batch.y).mean() + beta * (kl(clean, adv) * w).mean()

    return Twin(loss, lambda nets, batch: (batch.y, moments(nets.outputs(batch.x)[1])), climb)


# ---- distillation ----------------------------------------------------------------------------------------------


def taught(nets: Nets, batch: Batch) -> Tensor:
    """The teacher's prediction of the clean images."""
    return nets.teacher(batch.x)[0].softmax(1)


def ard(alpha: float = 1.0, temperature: float = 30.0) -> Twin:
    def loss(nets, batch, x_adv):
        teacher = nets.teacher(batch.x)[0] / temperature
        adv = nets.logits(x_adv)
        with torch.set_grad_enabled(alpha < 1):  # else for its statistics alone
            clean = nets.logits(batch.x)
        robust = kl(teacher, adv / temperature).mean() / adv.shape[1]
        return alpha * temperature**2 * robust + (1 - alpha) * F.cross_entropy(clean, batch.y)

    return Twin(loss)


def rslad(alpha: float = 5 / 6) -> Twin:
    def loss(nets, batch, x_adv):
        p = batch.target
        adv, clean = nets.logits(x_adv), nets.logits(batch.x)
        robust, natural = (((p + 1e-5).log() - z.log_softmax(1)).mul(p).mean() for z in (adv, clean))
        return alpha * robust + (1 - alpha) * natural

    return Twin(loss, taught, climb_kl, "gaussian")


def hat(beta: float = 2.5, gamma: float = 0.5, h: float = 2.0) -> Twin:
    def loss(nets, batch, x_adv):
        y_help = nets.teacher(x_adv)[0].argmax(1)
        clean, adv = nets.logits(batch.x), nets.logits(x_adv)
        helped = nets.logits(batch.x + h * (x_adv - batch.x))
        robust = beta * kl(clean, adv).mean()
        return F.cross_entropy(clean, batch.y) + robust + gamma * F.cross_entropy(helped, y_help)

    return Twin(loss, prediction, climb_kl, "gaussian")


def iad(beta: float = 0.1, begin: int = 60) -> Twin:
    def loss(nets, batch, x_adv):
        adv, clean = nets.logits(x_adv), nets.logits(batch.x)
        trust = torch.ones_like(adv[:, 0])
        t_adv = nets.teacher(x_adv)[0]
        if batch.epoch >= begin:
            trust = t_adv.softmax(1).gather(1, batch.y[:, None])[:, 0] ** beta
        return (trust * kl(nets.teacher(batch.x)[0], adv) + (1 - trust) * kl(clean, adv)).mean()

    return Twin(loss)


def ibd(alpha: float = 0.9, beta: float = 0.8) -> Twin:
    def loss(nets, batch, x_adv):
        y_t = batch.target
        clean, (adv, features) = nets.logits(batch.x), nets.outputs(x_adv)
        feature = nets.head(blocks(features), blocks(nets.teacher(x_adv)[1]))
        return (1 - alpha) * kl_to(y_t, clean).mean() + alpha * kl_to(y_t, adv).mean() + beta * feature

    return Twin(loss, taught, climb_kl, "gaussian")


# ---- information terms and stochastic layers -------------------------------------------------------------------


def ib_rar(alpha: float = 0.008, beta: float = 0.08) -> Twin:
    def loss(nets, batch, x_adv):
        adv, features = nets.outputs(x_adv)
        terms = nhsic_terms(batch.x, batch.y, adv.shape[1], taps(features), alpha, beta)
        return F.cross_entropy(adv, batch.y) + terms

    return Twin(loss)


def hbar(lambda_x: float = 0.0005, lambda_y: float = 0.005, robust_weight: float = 6.0) -> Twin:
    def loss(nets, batch, x_adv):
        (clean, features), adv = nets.outputs(batch.x), nets.logits(x_adv)
        base = F.cross_entropy(clean, batch.y) + robust_weight * kl(clean, adv).mean()
        return base + nhsic_terms(batch.x, batch.y, clean.shape[1], taps(features), lambda_x, lambda_y)

    return Twin(loss, prediction, climb_kl, "gaussian")


def shared_information(
    alpha: float = 0.5,
    beta: float = 4.0,
    beta_start: float = 1e-3,
    warmup: int = 10,
    ramp: int = 90,
    lam: float = 1e-3,
    neighbours: int = 10,
) -> Twin:
    def gram(z):
        squares = distances(z)
        with torch.no_grad():
            others = squares.clone().fill_diagonal_(math.inf).topk(min(neighbours, len(z) - 1), largest=False)[0]
            sigma = others.sqrt().mean()
        return torch.exp(-squares / (2 * sigma**2))

    def loss(nets, batch, x_adv):
        adv, f_adv = nets.outputs(x_adv)
        clean, f = nets.outputs(batch.x)
        m, s, m_adv, s_adv = f["mu"], f["sigma"].square(), f_adv["mu"], f_adv["sigma"].square()
        scale = (s - s_adv).square() / (s * s_adv)
        skl = (scale + (m - m_adv).square() * (1 / s + 1 / s_adv)).sum(1).mean() / 4
        progress = min(max((math.floor(batch.epoch) - warmup) / ramp, 0.0), 1.0)
        shared = (centered(gram(f["z"])) * centered(gram(f_adv["z"]))).sum() / (len(batch.y) - 1) ** 2
        fit = alpha * F.cross_entropy(adv, batch.y) + (1 - alpha) * F.cross_entropy(clean, batch.y)
        return fit + beta_start * (beta / beta_start) ** progress * skl - lam * shared

    return Twin(loss)


def rate(features: dict[str, Tensor], prior: Tensor | float = 0.0) -> Tensor:
    """mean_b KL(N(μ, σ²) || N(prior, I)) in nats."""
    mu, sigma = features["mu"], features["sigma"]
    return 0.5 * ((mu - prior).square() + sigma.square() - 1 - 2 * sigma.log()).sum(1).mean()


def vib(beta: float = 1e-3) -> Twin:
    def loss(nets, batch, _):
        logits, features = nets.outputs(batch.x)
        return (F.cross_entropy(logits, batch.y) + beta * rate(features)) / math.log(2)

    return Twin(loss, start=None)


def ceb(rho: float = 3.0) -> Twin:
    def loss(nets, batch, x_adv):
        logits, features = nets.outputs(x_adv)
        return F.cross_entropy(logits, batch.y) + math.exp(-rho) * rate(features, nets.student.class_means[batch.y])

    return Twin(loss)


OBJECTIVES = (standard, pgd_at, trades, mart, te, alp, label_smoothing, score, dkl, mma, awp, ard, rslad, hat, iad, ibd,
              ib_rar, hbar, shared_information, vib, ceb, infoat_r)  # fmt: skip
TWINS = {make.__name__: make for make in OBJECTIVES}
