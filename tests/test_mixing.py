"""Mixed images and smoothed labels: their formulas, and that the attack and the loss see them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from conftest import smoke_config
from test_step import BATCH, KEY, NET, VARIABLES, X_ADV, X, recording, take

from ibjax import config, losses
from ibjax.data import mixing
from ibjax.errors import InputError
from ibjax.objectives.mart import mart
from ibjax.objectives.own import own_objective
from ibjax.objectives.trades import trades
from ibjax.training import hlo
from ibjax.training.experiment import build

IDENTITY = np.eye(24, dtype=np.float32)  # every image has a class of its own
CONSTANTS = np.tile(np.arange(24, dtype=np.float32).reshape(24, 1, 1, 1), (1, 8, 6, 1))
UP_TO_24 = np.arange(24, dtype=np.int32)
smooth = jax.jit(losses.smooth, static_argnums=(1, 2, 3))


def mixed(make, index=UP_TO_24):
    return jax.jit(make)(KEY, CONSTANTS, IDENTITY, index)


def shares(make, batches):
    """The shares of many batches of 24, in one program."""
    each = jax.jit(jax.vmap(lambda key: make(key, CONSTANTS, IDENTITY, UP_TO_24).share))
    return np.asarray(each(jax.random.split(KEY, batches))).ravel()


@pytest.fixture
def uniform(monkeypatch):
    """λ ~ Beta(1, 1) is drawn as the uniform distribution that it is, whose program is a tenth as long."""

    def beta(key, a, b):
        assert a == b == 1
        return jax.random.uniform(key)

    monkeypatch.setattr(jax.random, "beta", beta)


@pytest.mark.usefixtures("uniform")
@pytest.mark.parametrize("name", mixing.MIXES)
@pytest.mark.parametrize("options", [{}, {"per_image": True}], ids=["batch", "images"])
def test_labels_are_the_shares_of_the_images(name, options):
    """Images that are constants, and whose labels are all different, say what each was made of."""
    made = mixed(mixing.MIXES[name](**options))
    share, label = np.asarray(made.share, np.float64), np.asarray(made.label, np.float64)
    np.testing.assert_allclose(label.sum(1), 1, rtol=1e-5)
    pixels = np.asarray(made.image, np.float64).mean((1, 2, 3))
    np.testing.assert_allclose(pixels, label @ np.arange(24), rtol=1e-4, atol=1e-4)
    partner = np.where(label.max(1) < 1 - 1e-6, (label * (1 - np.eye(24))).argmax(1), np.arange(24))
    own = label[np.arange(24), np.arange(24)]
    np.testing.assert_allclose(own[partner != np.arange(24)], share[partner != np.arange(24)], rtol=1e-5)
    assert len(np.unique(np.round(share, 5))) == 1 or options


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_partners_are_a_shift_of_the_batch_and_every_shift_as_often(n):
    """None is its own partner, unless it is alone; over many steps each distance comes as often as any other."""
    draw = jax.jit(jax.vmap(lambda key: mixing._shifted(key, jnp.arange(n))[0]))
    distance = (np.asarray(draw(jax.random.split(KEY, 700))) - np.arange(n)) % n
    assert (distance == distance[:, :1]).all()
    counts = np.bincount(distance[:, 0], minlength=n)
    assert counts[0] == (700 if n == 1 else 0)
    assert (abs(counts[1:] - 700 / max(n - 1, 1)) < 4.5 * np.sqrt(700 / max(n - 1, 1))).all()


@pytest.mark.usefixtures("uniform")
def test_no_device_gathers_the_batch_to_mix_it():
    """Compiled for eight devices, each sends its part on, once for each power of two."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, split = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in ((), ("data",)))
    program = jax.jit(mixing.cutmix(), in_shardings=(whole, split, split, split), out_shardings=split)
    images, labels, index = (np.zeros(shape, np.float32) for shape in ((64, 16, 16, 3), (64, 4), (64,)))
    text = program.lower(KEY, images, labels, index.astype(np.int32)).compile().as_text()
    found = {item.kind: item.bytes for item in hlo.collectives(text)}
    part = (images.nbytes + labels.nbytes) // 8
    assert "all-gather" not in found
    assert part < found["collective-permute"] <= 6 * part


def by_inverse(key, a, b):
    """λ ~ Beta(a, b), by the inverse of its distribution function: JAX's own sampler takes seconds to compile."""
    levels = np.linspace(0, 1, 4001, dtype=np.float32)
    return jnp.interp(jax.random.uniform(key), levels, np.float32(scipy.stats.beta(a, b).ppf(levels)))


def test_boxes_have_the_areas_of_beta(monkeypatch):
    """The mean share is the expectation over λ ~ Beta(α, α) and every centre, summed up in NumPy; so is its spread."""
    asked = set()

    def beta(key, a, b):
        asked.add((a, b))
        return by_inverse(key, a, b)

    monkeypatch.setattr(jax.random, "beta", beta)
    found = shares(mixing.cutmix(alpha=0.7, per_image=True), 120)
    assert asked == {(0.7, 0.7)}
    rng, (height, width) = np.random.default_rng(0), (8, 6)
    lam, expected = rng.beta(0.7, 0.7, 4000), []
    centres = [(i, j) for i in range(height) for j in range(width)]
    for r in np.sqrt(1 - lam):
        halves = int(height * r) // 2, int(width * r) // 2
        inside = [
            (min(i + halves[0], height) - max(i - halves[0], 0)) * (min(j + halves[1], width) - max(j - halves[1], 0))
            for i, j in centres[:: 1 + len(centres) // 48]
        ]
        expected += [1 - area / (height * width) for area in inside]
    assert abs(found.mean() - np.mean(expected)) < 4 * np.std(expected) / np.sqrt(len(found)) + 0.002
    assert abs(found.std() - np.std(expected)) < 0.02
    assert found.mean() > 0.6  # the shares of cut boxes are larger than λ, whose mean is a half


@pytest.mark.parametrize("sampler", [by_inverse, jax.random.beta], ids=["by_inverse", "jax"])
def test_mixups_shares_are_beta(sampler, monkeypatch):
    monkeypatch.setattr(jax.random, "beta", sampler)
    found = shares(mixing.mixup(alpha=0.3, per_image=True), 60)
    assert scipy.stats.kstest(found, scipy.stats.beta(0.3, 0.3).cdf).pvalue > 1e-3


@pytest.mark.usefixtures("uniform")
def test_draws_of_an_image_follow_its_index():
    """With per_image the λ of an image is that of (key, index), wherever it stands in the batch."""
    make, index = mixing.mixup(per_image=True), 7 * UP_TO_24
    first, turned = (np.asarray(mixed(make, order).share) for order in (index, index[::-1]))
    np.testing.assert_array_equal(first, turned[::-1])


# ---- in the step ---------------------------------------------------------------------------------------------


def half(key, batch):
    """Half of each image and of its label is its neighbour's."""
    y = losses.as_distribution(batch["label"], 4)
    x = batch["image"]
    roll = lambda a: 0.5 * (a + jnp.roll(a, 1, axis=0))  # noqa: E731
    return {**batch, "image": roll(x), "label": roll(y), "share": jnp.full(len(x), 0.5)}


@functools.cache
def mixed_batch():
    return jax.device_get(jax.jit(half)(None, BATCH))


def test_attack_and_loss_see_the_mixed_labels_and_the_loss_alone_the_smoothed():

    def attack(key, f, x, target):
        return dict(x=x, target=target)

    _, seen = take(recording(), attack, mix=half, smooth=lambda batch: losses.smooth(batch["label"], 4, 0.1))
    labels = np.eye(4)[BATCH["label"]]
    expected = [0.5 * (array + np.roll(array, 1, axis=0)) for array in (X, labels)]
    np.testing.assert_allclose(seen["x_adv"]["x"], expected[0], rtol=1e-6)
    np.testing.assert_allclose(seen["x_adv"]["target"], expected[1], rtol=1e-6)
    smoothed = (1 - 4 * 0.1 / 3) * expected[1] + 0.1 / 3
    np.testing.assert_allclose(seen["batch"]["label"], smoothed, rtol=1e-5)


def test_trades_attacks_mixed_images_away_from_their_labels():
    mixed = mixed_batch()
    np.testing.assert_array_equal(trades().target(NET, VARIABLES, mixed, KEY), mixed["label"])
    logits = jax.jit(NET.predict)(VARIABLES, X)[0]
    plain = jax.jit(lambda: trades().target(NET, VARIABLES, BATCH, KEY))()
    np.testing.assert_allclose(plain, scipy.special.softmax(logits, 1), rtol=1e-6)


@pytest.mark.parametrize("form", ["others", "uniform"])
def test_smoothing_is_its_formula_and_pytorchs(form):
    y, delta = np.array([2, 0, 1]), 0.3
    expected = np.full((3, 4), delta / (3 if form == "others" else 4))
    expected[np.arange(3), y] = 1 - delta if form == "others" else 1 - delta + delta / 4
    for target in (y.astype(np.int32), np.eye(4, dtype=np.float32)[y]):
        np.testing.assert_allclose(smooth(target, 4, delta, form), expected, rtol=1e-5)
    if form == "uniform":
        torch = pytest.importorskip("torch", reason="the oracle is PyTorch")
        logits = np.random.default_rng(0).normal(size=(3, 4))
        theirs = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(y), label_smoothing=delta)
        ours = jax.jit(losses.cross_entropy)(np.float32(logits), smooth(y.astype(np.int32), 4, delta, form))
        np.testing.assert_allclose(np.mean(ours), float(theirs), rtol=1e-5)


def softmax(x, mean):
    """The network's distributions, in float64."""
    return scipy.special.softmax(np.einsum("bhwc,hwck->bk", np.float64(x) - mean, VARIABLES["params"]["w"]), 1)


def smoothed_loss(objective):
    batch = {**BATCH, "label": smooth(BATCH["label"], 4, 0.2)}
    return float(jax.jit(lambda batch: objective.loss(NET, VARIABLES, batch, X_ADV, KEY)[0])(batch))


def test_trades_and_mart_with_smoothed_labels_are_their_formulas():
    p, q = (softmax(x, np.asarray(x).mean(0)) for x in (X, X_ADV))
    y = np.asarray(BATCH["label"])
    t = np.full((12, 4), 0.2 / 3)
    t[np.arange(12), y] = 0.8
    kl = (p * np.log(p / q)).sum(1)
    np.testing.assert_allclose(smoothed_loss(trades(beta=6.0)), (-(t * np.log(p)).sum(1) + 6 * kl).mean(), rtol=1e-4)
    others = np.where(np.eye(4)[y] == 1, 0, q).max(1)
    boosted = -(t * np.log(q)).sum(1) - np.log(1.0001 - others + 1e-12)
    weight = 1 - p[np.arange(12), y] + 1e-7
    np.testing.assert_allclose(smoothed_loss(mart(beta=5.0)), (boosted + 5 * kl * weight).mean(), rtol=1e-4)


def test_an_objective_of_ones_own_gets_distributions():
    """Its target may be labels or distributions, of mixed images too."""
    batch = mixed_batch()
    made = own_objective("mine", recording(), {})
    np.testing.assert_array_equal(made.target(NET, VARIABLES, batch, KEY), batch["label"])
    hard = own_objective("mine", recording()._replace(target=lambda *_: BATCH["label"]), {})
    np.testing.assert_array_equal(hard.target(NET, VARIABLES, batch, KEY), BATCH["label"])


# ---- configurations ------------------------------------------------------------------------------------------


def test_options_that_would_do_nothing_or_wrong_are_refused(digits_run):
    def settings(**changes):
        made = smoke_config("digits")
        made.teacher.recipe = None
        for key, value in changes.items():
            made[key] = value
        return made

    teacher = dict(teacher=dict(workdir=str(digits_run / "teacher"), checkpoint="best", recipe=None, made_by=""))
    with pytest.raises(InputError, match="'rslad' with these options has no cross-entropy with the labels"):
        build(settings(objective=dict(name="rslad"), smoothing=dict(delta=0.1, form="others", images="all"), **teacher))
    attack = dict(name="pgd", loss="objective", eps="8/255", step_size="2/255", norm="linf", init="uniform")
    with pytest.raises(InputError, match="objective 'te', which remembers something of each image"):
        build(settings(objective=dict(name="te"), attack=attack, mix=dict(name="mixup")))
    for changes, text in (
        (dict(mix=dict(name="cutmx")), "mix.name 'cutmx' is unknown; .*did you mean 'cutmix'"),
        (dict(mix=dict(name="cutmix", alpha=0.0)), "mix.alpha=0 is not allowed"),
        (dict(mix=dict(name="cutmix", beta=1.0)), "mix.beta is unknown to 'cutmix'"),
        (dict(smoothing=dict(delta=0.7, form="others", images="all")), "smoothing.delta=0.7 is not allowed"),
        (dict(smoothing=dict(delta=0.1, form="other", images="all")), "smoothing.form='other' is unknown"),
        (dict(smoothing=dict(delta=0.1)), "config key 'smoothing.form' is missing"),
    ):
        with pytest.raises(InputError, match=text):
            config.check(settings(**changes))
