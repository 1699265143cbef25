"""Mixed images and smoothed labels: their formulas, and that the attack and the loss see them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import smoke_config
from test_step import BATCH, KEY, NET, VARIABLES, recording, take

from ibjax import config, losses
from ibjax.attacks.pgd import pgd
from ibjax.data import mixing
from ibjax.errors import InputError
from ibjax.objectives.mart import mart
from ibjax.objectives.own import own_objective
from ibjax.objectives.trades import trades
from ibjax.training import hlo
from ibjax.training.experiment import build

IDENTITY = np.eye(24, dtype=np.float32)  # every image has a class of its own


def mixed(make, index=None, images=None, key=0):
    images = (
        jnp.arange(24, dtype=jnp.float32).reshape(24, 1, 1, 1) * jnp.ones((1, 8, 6, 1)) if images is None else images
    )
    index = jnp.arange(24) if index is None else index
    return jax.jit(make)(jax.random.key(key), images, jnp.asarray(IDENTITY), index)


def shares(make, batches):
    """The shares of many batches of 24, in one program."""
    images, labels, index = jnp.ones((24, 8, 6, 1)), jnp.asarray(IDENTITY), jnp.arange(24)
    each = jax.jit(jax.vmap(lambda key: make(key, images, labels, index).share))
    return np.asarray(each(jax.random.split(jax.random.key(0), batches))).ravel()


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
    draw = jax.vmap(lambda key: mixing._shifted(key, jnp.arange(n))[0])
    distance = (np.asarray(draw(jax.random.split(jax.random.key(0), 700))) - np.arange(n)) % n
    assert (distance == distance[:, :1]).all()
    counts = np.bincount(distance[:, 0], minlength=n)
    assert counts[0] == (700 if n == 1 else 0)
    assert (abs(counts[1:] - 700 / max(n - 1, 1)) < 4.5 * np.sqrt(700 / max(n - 1, 1))).all()


def test_no_device_gathers_the_batch_to_mix_it():
    """Compiled for eight devices, each sends its part on, once for each power of two."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, split = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in ((), ("data",)))
    program = jax.jit(mixing.cutmix(), in_shardings=(whole, split, split, split), out_shardings=split)
    images, labels, index = jnp.zeros((64, 16, 16, 3)), jnp.zeros((64, 4)), jnp.zeros(64, jnp.int32)
    text = program.lower(jax.random.key(0), images, labels, index).compile().as_text()
    found = {item.kind: item.bytes for item in hlo.collectives(text)}
    part = (images.nbytes + labels.nbytes) // 8
    assert "all-gather" not in found
    assert part < found["collective-permute"] <= 6 * part


def test_boxes_have_the_areas_of_beta():
    """The mean share is the expectation over λ ~ Beta(α, α) and every centre, summed up in NumPy; so is its spread."""
    found = shares(mixing.cutmix(alpha=0.7, per_image=True), 120)
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


def test_mixups_shares_are_beta():
    from scipy import stats

    found = shares(mixing.mixup(alpha=0.3, per_image=True), 60)
    assert stats.kstest(found, stats.beta(0.3, 0.3).cdf).pvalue > 1e-3


def test_draws_of_an_image_follow_its_index():
    """With per_image the λ of an image is that of (key, index), wherever it stands in the batch."""
    make = mixing.mixup(per_image=True)
    index = jnp.arange(24) * 7
    first, turned = mixed(make, index).share, mixed(make, index[::-1]).share
    np.testing.assert_array_equal(first, turned[::-1])


# ---- in the step ---------------------------------------------------------------------------------------------


def half(key, batch):
    """Half of each image and of its label is its neighbour's."""
    y = losses.as_distribution(batch["label"], 4)
    x = batch["image"]
    roll = lambda a: 0.5 * (a + jnp.roll(a, 1, axis=0))  # noqa: E731
    return {**batch, "image": roll(x), "label": roll(y), "share": jnp.full(len(x), 0.5)}


def test_attack_and_loss_see_the_mixed_labels_and_the_loss_alone_the_smoothed():
    seen, attacked = {}, {}

    def attack(key, f, x, target):
        attacked.update(x=x, target=target)
        return x

    take(recording(seen), attack, mix=half, smooth=lambda batch: losses.smooth(batch["label"], 4, 0.1))
    expected = half(None, BATCH)
    np.testing.assert_allclose(attacked["x"], expected["image"], rtol=1e-6)
    np.testing.assert_allclose(attacked["target"], expected["label"], rtol=1e-6)
    smoothed = (1 - 4 * 0.1 / 3) * np.asarray(expected["label"]) + 0.1 / 3
    np.testing.assert_allclose(seen["batch"]["label"], smoothed, rtol=1e-5)


def test_trades_attacks_mixed_images_away_from_their_labels():
    mixed_batch = half(None, BATCH)
    np.testing.assert_array_equal(trades().target(NET, VARIABLES, mixed_batch, KEY), mixed_batch["label"])
    plain = trades().target(NET, VARIABLES, BATCH, KEY)
    np.testing.assert_allclose(plain, jax.nn.softmax(NET.predict(VARIABLES, BATCH["image"])[0]), rtol=1e-6)


@pytest.mark.parametrize("form", ["others", "uniform"])
def test_smoothing_is_its_formula_and_pytorchs(form):
    y, delta = np.array([2, 0, 1]), 0.3
    expected = np.full((3, 4), delta / (3 if form == "others" else 4))
    expected[np.arange(3), y] = 1 - delta if form == "others" else 1 - delta + delta / 4
    for target in (jnp.asarray(y), jax.nn.one_hot(y, 4)):
        np.testing.assert_allclose(losses.smooth(target, 4, delta, form), expected, rtol=1e-5)
    if form == "uniform":
        torch = pytest.importorskip("torch", reason="the oracle is PyTorch")
        logits = np.random.default_rng(0).normal(size=(3, 4))
        theirs = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(y), label_smoothing=delta)
        ours = losses.cross_entropy(jnp.asarray(logits, jnp.float32), losses.smooth(jnp.asarray(y), 4, delta, form))
        np.testing.assert_allclose(jnp.mean(ours), float(theirs), rtol=1e-5)


@functools.cache
def both_passes():
    (clean, _), after = NET.forward(VARIABLES, BATCH["image"], KEY)
    x_adv = pgd(steps=1)(KEY, lambda x: NET.predict(VARIABLES, x)[0], BATCH["image"], BATCH["label"])
    (adv, _), _ = NET.forward(after, x_adv, KEY)
    soft = lambda z: np.asarray(jax.nn.softmax(z), np.float64)  # noqa: E731
    return soft(clean), soft(adv), x_adv


def smoothed_loss(objective):
    _, _, x_adv = both_passes()
    batch = {**BATCH, "label": losses.smooth(BATCH["label"], 4, 0.2)}
    return float(objective.loss(NET, VARIABLES, batch, x_adv, KEY)[0])


def test_trades_and_mart_with_smoothed_labels_are_their_formulas():
    p, q, _ = both_passes()
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
    batch = half(None, BATCH)
    made = own_objective("mine", recording({}), {})
    np.testing.assert_array_equal(made.target(NET, VARIABLES, batch, KEY), batch["label"])
    hard = own_objective("mine", recording({})._replace(target=lambda *_: BATCH["label"]), {})
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
