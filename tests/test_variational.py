"""VIB and CEB: their divergences against independent numbers, their losses against their formulas."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from conftest import in_programs
from test_objectives import BATCH, NET, VARIABLES, X_ADV

from ibjax.errors import InputError
from ibjax.information.divergence import gaussian_kl
from ibjax.net import linen_net
from ibjax.objectives.ceb import ceb
from ibjax.objectives.vib import vib
from ibjax.step import trainable, with_trainable

KEY = jax.random.key(3)
gaussian_kl_of = jax.jit(gaussian_kl)


class Gaussian(nn.Module):
    """A network with the features of a stochastic layer: z = μ + σ·ξ in training."""

    unit: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        mu, s = jnp.split(nn.Dense(6)(x.reshape(x.shape[0], -1)), 2, -1)
        sigma = jnp.ones_like(s) if self.unit else jax.nn.softplus(s)
        z = mu + sigma * jax.random.normal(self.make_rng("sample"), mu.shape) if train else mu
        table = self.param("class_means", nn.initializers.normal(1.0), (4, 3))
        return nn.Dense(4)(z), {"mu": mu, "sigma": sigma, "z": z, "class_means": table}


@functools.cache
def gaussian_net(**options):
    model = Gaussian(**options)
    return in_programs(linen_net(model)), {"batch_stats": {}, **jax.jit(model.init)(jax.random.key(0), BATCH["image"])}


def cross_entropy(logits):
    """The mean over BATCH, in float64."""
    return -scipy.special.log_softmax(np.float64(logits), axis=-1)[np.arange(12), np.asarray(BATCH["label"])].mean()


@functools.cache
def computed(method, **options):
    """{adversarial: (logits, features, loss, metrics)} of a method, all as one program."""
    net, variables = gaussian_net(unit=method is ceb)

    def found(variables, adversarial):
        x = X_ADV if adversarial else BATCH["image"]
        (logits, features), _ = net.forward(variables, x, KEY)
        loss, (_, metrics) = method(adversarial=adversarial, **options).loss(net, variables, BATCH, x, KEY)
        return logits, features, loss, metrics

    return jax.jit(lambda variables: {each: found(variables, each) for each in (False, True)})(variables)


@pytest.mark.parametrize("mu, sigma, prior_mu", [(0.7, 0.3, 0.0), (-1.2, 2.5, 0.0), (0.0, 1.0, 0.0), (0.4, 1.0, -1.1)])
def test_the_gaussian_kl_is_its_integral(mu, sigma, prior_mu):
    """∫ p log(p/q), by quadrature."""
    stats = pytest.importorskip("scipy.stats", reason="the oracle is SciPy")
    from scipy.integrate import quad

    p, q = stats.norm(mu, sigma), stats.norm(prior_mu, 1.0)
    expected = quad(lambda z: p.pdf(z) * (p.logpdf(z) - q.logpdf(z)), mu - 12 * sigma, mu + 12 * sigma, epsabs=1e-10)[0]
    got = gaussian_kl_of(np.float32([[mu, mu]]), np.float32([[sigma, sigma]]), prior_mu)
    np.testing.assert_allclose(got, [2 * expected], rtol=1e-5, atol=1e-6)  # a sum over K = 2


def test_cebs_rate_is_the_mean_log_ratio_of_samples():
    """Unit variances: ½‖μ − μ_y‖² against 400,000 draws of log e(z|x) − log b(z|y)."""
    rng = np.random.default_rng(0)
    mu, mu_y = rng.normal(size=(2, 5))
    z = mu + rng.normal(size=(400_000, 5))
    log_ratio = 0.5 * (((z - mu_y) ** 2).sum(1) - ((z - mu) ** 2).sum(1))
    got = float(gaussian_kl_of(np.float32(mu[None]), np.ones((1, 5), np.float32), np.float32(mu_y[None]))[0])
    np.testing.assert_allclose(got, 0.5 * ((mu - mu_y) ** 2).sum(), rtol=1e-5)
    assert abs(got - log_ratio.mean()) < 4 * log_ratio.std() / np.sqrt(400_000)


@pytest.mark.parametrize("adversarial", [False, True])
def test_vib_is_its_formula_in_bits(adversarial):
    logits, features, loss, metrics = computed(vib, beta=0.2)[adversarial]
    mu, sigma = (np.asarray(features[name], np.float64) for name in ("mu", "sigma"))
    nats = cross_entropy(logits)
    rate = 0.5 * (mu**2 + sigma**2 - 1 - np.log(sigma**2)).sum(1).mean()
    np.testing.assert_allclose(loss, (nats + 0.2 * rate) * np.log2(np.e), rtol=1e-5)
    np.testing.assert_allclose(metrics["rate"], rate / np.log(2), rtol=1e-5)
    assert vib(adversarial=adversarial).attack_losses == (("ce", "margin") if adversarial else ())


@pytest.mark.parametrize("adversarial", [False, True])
def test_ceb_is_its_formula(adversarial):
    logits, features, loss, metrics = computed(ceb, rho=1.0)[adversarial]
    mu_y = np.asarray(features["class_means"], np.float64)[np.asarray(BATCH["label"])]
    rate = 0.5 * ((np.asarray(features["mu"], np.float64) - mu_y) ** 2).sum(1).mean()
    np.testing.assert_allclose(metrics["rate"], rate, rtol=1e-5)
    np.testing.assert_allclose(loss, cross_entropy(logits) + np.exp(-1.0) * rate, rtol=1e-5)


def test_the_class_means_move_towards_the_means_of_their_class():
    """∂L/∂μ_y = e^{−ρ}·(n_y/B)·(μ_y − mean_y μ(x)): the table learns from the rate, and from nothing else."""
    net, variables = gaussian_net(unit=True)

    def loss(params):
        return ceb(rho=0.5).loss(net, with_trainable(variables, params), BATCH, X_ADV, KEY)[0]

    gradient = jax.jit(jax.grad(loss))(trainable(variables))["params"]["class_means"]
    mu, y = np.asarray(net.predict(variables, X_ADV)[1]["mu"]), np.asarray(BATCH["label"])
    table = np.asarray(variables["params"]["class_means"])
    for label in range(4):
        expected = np.exp(-0.5) * np.mean(y == label) * (table[label] - mu[y == label].mean(0))
        np.testing.assert_allclose(gradient[label], expected, rtol=1e-4, atol=1e-6)


def test_training_draws_a_new_sample_with_each_key_and_evaluation_none():
    net, variables = gaussian_net(unit=False)
    loss = jax.jit(lambda key: vib().loss(net, variables, BATCH, None, key)[0])
    drawn = [loss(jax.random.key(seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    np.testing.assert_array_equal(*(net.predict(variables, X_ADV)[1][name] for name in ("z", "mu")))


@pytest.mark.parametrize("objective", [vib(), ceb(adversarial=False)], ids=["vib", "ceb"])
def test_a_network_without_a_stochastic_layer_is_refused(objective):
    with pytest.raises(InputError, match="stochastic layer"):
        jax.eval_shape(lambda: objective.loss(NET, VARIABLES, BATCH, None, KEY))


def test_ceb_refuses_a_network_without_class_means():
    net, variables = gaussian_net()

    def forward(variables, x, key):
        (logits, features), variables = net.forward(variables, x, key)
        return (logits, {name: features[name] for name in ("mu", "sigma", "z")}), variables

    with pytest.raises(InputError, match="class_means"):
        jax.eval_shape(lambda: ceb(adversarial=False).loss(net._replace(forward=forward), variables, BATCH, None, KEY))
