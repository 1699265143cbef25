"""Every objective through one table of properties; then the closed forms of each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from conftest import in_programs, smoke_config
from jax.sharding import AxisType

from ibjax import config, losses
from ibjax.attacks.pgd import pgd, stateful_pgd
from ibjax.devices import cluster
from ibjax.models import cnn
from ibjax.net import linen_net
from ibjax.objectives.ibd import ibd
from ibjax.objectives.pgd_at import pgd_at
from ibjax.objectives.standard import standard
from ibjax.objectives.trades import trades
from ibjax.optim import sgd
from ibjax.runs import checkpoint, trees
from ibjax.step import Problem, TrainState, make_train_step, trainable, with_trainable
from ibjax.training import feed
from ibjax.training.experiment import build, initial_state

CE, KL = dict(loss="ce", init="uniform"), dict(loss="kl", init="gaussian")
CNN = dict(name="cnn", widths=((8,), (8,)), hidden=(), padding=1, batch_norm=True, pool="average")
GAUSSIAN = dict(name="stochastic", backbone=CNN, latent=6)
SINGULAR = dict(
    name="siriib",
    backbone=dict(name="resnet", blocks=(1, 1), width=4),
    connections=2,
    scales=(8, 4),
    widths=(4,),
    fourier="reim",
)
OWN = dict(loss="objective", init="gaussian")
AWP = dict(perturb=dict(name="awp", gamma=0.01, warmup=0))
# name -> (objective section, changes of the attack section; None: no attack, other changes)
OBJECTIVES = {
    "standard": (dict(name="standard"), None, {}),
    "pgd_at": (dict(name="pgd_at"), CE, dict(model=CNN | dict(widths=((8,),)))),  # small: it runs by default
    "pgd_at-rice": (dict(name="pgd_at", passes="adv,adv,clean"), CE, dict(attack_bn="train")),
    "pgd_at-ema": (dict(name="pgd_at"), CE, dict(ema_decay=0.9)),
    "pgd_at-awp": (dict(name="pgd_at"), CE, AWP),
    "pgd_at-parts": (dict(name="pgd_at"), CE, dict(microbatches=2)),
    "pgd_at-fast": (dict(name="pgd_at"), CE | dict(steps=1), dict(attack_bn="train")),
    "trades": (dict(name="trades"), KL, {}),
    "trades-official": (dict(name="trades", passes="clean,adv,clean"), KL, {}),
    "trades-leaderboard": (
        dict(name="trades"),
        KL | dict(name="pgd_adam", step_size="0.1", init="uniform"),
        dict(
            attack_bn="batch",
            bn_statistics="adv",
            ema_decay=0.9,
            averaging=dict(warmup=True, start=0.0, statistics="averaged", batches=100),
            mix=dict(name="cutmix", per_image=True),
            augment=dict(name="random_erasing", pad=1, flip=False),
            smoothing=dict(delta=0.1, form="uniform", images="all"),
        ),
    ),
    "score": (dict(name="score"), OWN, {}),
    "score-pgd_at": (dict(name="score", base="pgd_at", clip=0.2), OWN | dict(init="uniform"), {}),
    "score-kl": (dict(name="score", divergence="kl", clip=0.2, clipped="robust"), OWN, {}),
    "dkl": (dict(name="dkl", beta=2.0), OWN, {}),
    "dkl-plain": (dict(name="dkl", variant="dkl", beta=4.0, power=0.5), OWN, {}),
    "hat": (dict(name="hat"), KL, {}),
    "hat-pgd_at": (dict(name="hat", base="pgd_at"), CE, {}),
    "hbar": (dict(name="hbar"), KL, {}),
    "hbar-pgd": (dict(name="hbar", base="pgd_at"), CE, {}),
    "ib_rar": (dict(name="ib_rar"), CE, {}),
    "ib_rar-mask": (dict(name="ib_rar", mask_tap="stage2", mask_channels=2, mask_every=1), CE, {}),
    "ib_rar-plain": (dict(name="ib_rar", base="standard", until_epoch=100.0), None, {}),
    "ib_rar-mart": (dict(name="ib_rar", base="mart", layers=("stage1", "pre_logits"), x_input="adv"), CE, {}),
    "ib_rar-trades": (dict(name="ib_rar", base="trades", form="original", y_kernel="gaussian"), KL, {}),
    "ibd": (dict(name="ibd"), KL, {}),
    "ibd-code": (dict(name="ibd", teacher_features="nat", teacher_noise=0.001, alpha=0.8), KL, {}),
    "ibd-paper-text": (
        dict(
            name="ibd", attack_target="student", positional=False, query_relu=True, energy="mean", granularity="stage"
        ),
        KL,
        {},
    ),
    "ibd-no-features": (dict(name="ibd", beta=0.0), KL, {}),
    "ibd-hand": (dict(name="ibd", matching="hand"), KL, {}),
    "ibd-onehot": (dict(name="ibd", labels="onehot"), KL, {}),
    "ibd-smooth": (dict(name="ibd", labels="smooth", smoothing=0.3), KL, {}),
    "ibd-natural-labels": (dict(name="ibd", labels="natural"), KL, {}),
    "ibd-natural": (dict(name="ibd", adversarial=False), None, {}),
    "ibd-awp": (dict(name="ibd"), KL, AWP),
    "rslad": (dict(name="rslad", scale=10.0), KL, {}),
    "rslad-sum": (dict(name="rslad", reduction="sum"), KL, {}),
    "ard": (dict(name="ard"), CE | dict(init="uniform_unclipped"), dict(attack_bn="train")),
    "ard-iad": (dict(name="ard", temperature=1.0, reduction="sum", alpha=0.5), CE, {}),
    "iad": (dict(name="iad", begin=0), CE, {}),
    "iad-code": (
        dict(name="iad", begin=0, weight_teacher_term=False, passes="code"),
        CE,
        dict(attack_bn="train"),
    ),
    "iad-2": (dict(name="iad", variant="II", begin=0), CE, {}),
    "vib": (dict(name="vib"), None, dict(model=GAUSSIAN | dict(sigma="shifted"), ema_decay=0.9)),
    "ceb": (dict(name="ceb"), CE, dict(model=GAUSSIAN | dict(sigma="unit", class_means=True))),
    "shared_information": (dict(name="shared_information", warmup=0, ramp=1), CE, dict(model=GAUSSIAN)),
    "shared_information-mine": (
        dict(name="shared_information", information="mine", lam=0.01),
        CE,
        dict(model=GAUSSIAN, head_optimizer=dict(name="adam", lr=1e-4)),
    ),
    "shared_information-ara": (
        dict(name="ara", steps=2, base=dict(name="shared_information", information="trace")),
        None,
        dict(model=GAUSSIAN),
    ),
    "siriib": (dict(name="siriib"), CE, dict(model=SINGULAR)),
    "siriib-trades": (
        dict(name="siriib", base="trades", lam=0.1, distance="l2_per_image"),
        KL | dict(init="uniform"),  # near x, where it is flat, rounding decides the signs of its gradient
        dict(model=SINGULAR),
    ),
    "siriib-stop": (dict(name="siriib", lam=1.0, info_stop=True), CE, dict(model=SINGULAR)),
    "siriib-te-awp": (dict(name="siriib", base="te"), OWN, AWP | dict(model=SINGULAR)),
    "mart": (dict(name="mart"), CE | dict(init="gaussian"), {}),
    "mart-awp": (dict(name="mart"), CE | dict(init="gaussian"), AWP),
    "mma": (dict(name="mma", steps=2, search_steps=3), None, {}),
    "mma-awp-ema": (dict(name="mma", steps=2, search_steps=3), None, dict(**AWP, ema_decay=0.9)),
    "te": (dict(name="te", start=1, end=3, weight=3.0), OWN, {}),
    "te-trades-awp": (dict(name="te", base="trades", start=1, end=3, weight=3.0), OWN, AWP),
    "alp": (dict(name="alp"), CE, {}),
    "label_smoothing": (dict(name="label_smoothing"), CE, {}),
    "label_smoothing-standard": (dict(name="label_smoothing", base="standard"), None, {}),
    "infoat_r": (dict(name="infoat_r"), OWN, {}),
}


def mesh(devices):
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def experiment(name, teacher, devices=8, **more):
    """A small experiment on 8 × 8 images, with the teacher of the smoke run; `more` are other changes."""
    objective, attack, changes = OBJECTIVES[name]
    settings = smoke_config("digits")
    settings.data.n_train = 64
    settings.objective = objective
    settings.batch_size = 16
    settings.teacher.recipe = None
    for role in config.build("objectives", objective, "objective").teachers:
        settings[role].workdir = str(teacher)
    settings.model.update(widths=((8,), (8,)))
    settings.optimizer.lr = 0.05
    for key, value in {**changes, **more}.items():
        settings[key] = value
    if attack is None:
        settings.attack = None
    else:
        settings.attack.update(attack, eps="0.02", step_size="0.01", unroll=False)
    return build(settings, mesh=mesh(devices))


class Stepper:
    """Runs single steps of an experiment on its mesh."""

    def __init__(self, made):
        self.experiment = made
        self.dispatch = feed.make_dispatch(made, 1)
        split = made.data.train
        key = jax.random.key(1)
        host = (split.images, split.labels)
        self.arguments = [cluster.replicate(array, made.mesh) for array in host]
        self.arguments += [jax.device_put(key, jax.sharding.NamedSharding(made.mesh, cluster.REPLICATED))]
        placed = jax.tree.map(lambda leaf: cluster.replicate(np.asarray(leaf), made.mesh), made.frozen)
        self.arguments += [placed, cluster.replicate(np.int32(1), made.mesh)]

    def __call__(self, state, steps=1):
        for _ in range(steps):
            state, metrics = self.dispatch(state, *self.arguments)
        return state, {name: float(value[0]) for name, value in metrics.items()}


@pytest.fixture(params=OBJECTIVES, scope="module")
def stepper(request):
    """A compiled step of each objective on eight devices, shared by the properties."""
    objective = config.build("objectives", OBJECTIVES[request.param][0], "objective")
    # a run is trained only for those that need a teacher
    teacher = request.getfixturevalue("digits_run") / "teacher" if objective.teachers else None
    made = Stepper(experiment(request.param, teacher))
    made.name, made.teacher = request.param, teacher
    return made


def test_one_and_eight_devices_take_the_same_step(stepper):
    """Values and the updated state agree within 1e-5, batch-norm statistics included.

    Within 1e-4 for SiRIIB: derivatives of the polar factor enlarge the last bits by up to σ_max/σ_min.
    """
    tolerance = 1e-4 if stepper.name.startswith("siriib") else 1e-5
    results = []
    for other in (Stepper(experiment(stepper.name, stepper.teacher, devices=1)), stepper):
        state, metrics = other(initial_state(other.experiment), steps=2)
        results.append((trees.flatten(jax.device_get(state)), metrics))
    (one, one_metrics), (eight, eight_metrics) = results
    assert one.keys() == eight.keys()
    for path, leaf in one.items():
        np.testing.assert_allclose(leaf, eight[path], rtol=tolerance, atol=tolerance, err_msg=path)
    for key, value in one_metrics.items():
        np.testing.assert_allclose(value, eight_metrics[key], rtol=1e-4, atol=1e-5, err_msg=key)


def test_the_loss_falls_and_the_step_compiles_once(stepper):
    """Over steps that are the first again and again: the same images, noise and learning rate."""
    state, first = stepper(initial_state(stepper.experiment))
    for _ in range(30):
        state = state._replace(step=cluster.replicate(np.int32(0), stepper.experiment.mesh))
        state, last = stepper(state)
    assert last["loss"] < first["loss"]
    assert stepper.dispatch._cache_size() == 1


def test_saving_and_restoring_changes_no_bit(stepper, tmp_path):
    state, _ = stepper(initial_state(stepper.experiment))
    with checkpoint.manager(tmp_path) as orbax:
        checkpoint.save(orbax, state, {"selection": 1.0})
        restored = checkpoint.restore_latest(orbax, initial_state(stepper.experiment))
    assert trees.digest(restored) == trees.digest(state)
    assert trees.digest(stepper(restored)[0]) == trees.digest(stepper(state)[0])


# ---- closed forms ------------------------------------------------------------------------------------------

MODEL = cnn.Model(4, widths=((6,),), hidden=(), padding=1, batch_norm=True, pool="average")
RNG = np.random.default_rng(0)
BATCH = {
    "image": jnp.asarray(RNG.uniform(size=(12, 8, 8, 1)), jnp.float32),
    "label": jnp.asarray(np.arange(12) % 4, jnp.int32),
    "index": jnp.asarray(np.arange(12), jnp.int32),
}
X_ADV = jnp.asarray(np.clip(np.asarray(BATCH["image"]) + 0.1 * RNG.normal(size=(12, 8, 8, 1)), 0, 1), jnp.float32)


def random_variables(seed, model=MODEL):
    """Variables among which none is 0 or 1; made in NumPy, since JAX would compile a program for every shape."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        start = {"kernel": rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))}
        value = start.get(path[-1].key, float(path[-1].key in ("scale", "var"))) + 0.3 * np.abs(
            rng.normal(size=leaf.shape)
        )
        return jnp.asarray(value, jnp.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0), BATCH["image"])
    return jax.tree_util.tree_map_with_path(fill, shapes)


VARIABLES, TEACHER = random_variables(0), random_variables(7)
NET = in_programs(linen_net(MODEL, {"teacher": MODEL}, {"teacher": TEACHER}))


def loss_and_gradient(objective, variables=VARIABLES, net=NET, x_adv=X_ADV):
    return losses_and_gradients(objective, variables=variables, net=net, x_adv=x_adv)[0]


def losses_and_gradients(*objectives, variables=VARIABLES, net=NET, x_adv=X_ADV):
    """(loss, gradient, variables after it, metrics) of each objective, all as one program."""

    def found(objective, variables):
        if objective.head is not None and "head" not in variables:
            features = net.predict(variables, BATCH["image"])[1]
            variables = {**variables, "head": objective.head.init(jax.random.key(5), features, features, train=False)}

        def value(params):
            return objective.loss(net, with_trainable(variables, params), BATCH, x_adv, jax.random.key(2))

        (loss, (after, metrics)), gradient = jax.value_and_grad(value, has_aux=True)(trainable(variables))
        return loss, gradient, after, metrics

    return jax.jit(lambda variables: [found(objective, variables) for objective in objectives])(variables)


@functools.cache
def forms_of_trades():
    """Of `losses_and_gradients`: two forwards, three, and two without a gradient through the clean prediction."""

    def stopped(net, variables, batch, x_adv, key):
        (clean, _), variables = net.forward(variables, batch["image"], key)
        (adv, _), variables = net.forward(variables, x_adv, key)
        robust = losses.kl(adv, jax.lax.stop_gradient(jax.nn.softmax(clean)))
        return jnp.mean(losses.cross_entropy(clean, batch["label"])) + 6 * jnp.mean(robust), (variables, {})

    return losses_and_gradients(trades(), trades(forwards=3), standard()._replace(loss=stopped))


def first_state(optimizer, variables=VARIABLES, step=0):
    """The state of the network with these variables after so many steps, the optimiser's as before the first."""
    return TrainState(jnp.int32(step), variables, jax.jit(optimizer.init)(trainable(variables)), None)


def softmax(logits):
    return scipy.special.softmax(np.asarray(logits, np.float64), 1)


def test_trades_with_beta_zero_is_cross_entropy():
    (plain, gradient, *_), (zero, zero_gradient, *_) = losses_and_gradients(standard(), trades(beta=0.0))
    np.testing.assert_allclose(zero, plain, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, zero_gradient)


def test_trades_is_its_formula():
    (clean, _), after = NET.forward(VARIABLES, BATCH["image"], jax.random.key(0))
    (adv, _), _ = NET.forward(after, X_ADV, jax.random.key(0))
    p, q = softmax(clean), softmax(adv)
    natural = -np.log(p[np.arange(12), BATCH["label"]]).mean()
    robust = (p * np.log(p / q)).sum(1).mean()
    np.testing.assert_allclose(forms_of_trades()[0][0], natural + 6 * robust, rtol=1e-5)


def test_trades_gradient_flows_through_the_clean_prediction():
    """It differs from the version that stops the gradient there, which is another method."""
    (_, gradient, *_), _, (_, other, *_) = forms_of_trades()
    pairs = zip(*map(jax.tree.leaves, jax.device_get((gradient, other))), strict=True)
    assert max(np.abs(a - b).max() for a, b in pairs) > 1e-2


def test_three_forwards_move_the_running_statistics_once_more_and_nothing_else():
    (two, two_gradient, two_after, _), (three, three_gradient, three_after, _), _ = forms_of_trades()
    np.testing.assert_allclose(two, three, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), two_gradient, three_gradient)
    _, again = NET.forward(two_after, BATCH["image"], jax.random.key(0))
    expected, got = again["batch_stats"], three_after["batch_stats"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), expected, got)


def test_the_attack_leaves_the_running_statistics_alone_and_training_mode_moves_them():
    """Evaluation mode: the statistics after the step are of one pass over x_adv. Training mode: of the attack's too."""

    options = dict(eps=0.1, step_size=0.05, steps=3, init="none", unroll=False)
    optimizer, key = sgd(lr=lambda step: 0.0), jax.random.key(0)

    def step(training):
        attacks = (None, stateful_pgd(**options)) if training else (pgd(**options), None)
        made = make_train_step(Problem(lambda _: NET, pgd_at(), *attacks), optimizer)
        statistics = jax.jit(lambda state: made(state, BATCH, key)[0].variables["batch_stats"])  # nothing else is asked
        return statistics(first_state(optimizer))

    def loss(x, variables, training):
        (logits, _), after = NET.forward(variables, x, key) if training else (NET.predict(variables, x), variables)
        return jnp.sum(losses.cross_entropy(logits, BATCH["label"])), after

    slope_at = jax.jit(jax.grad(loss, has_aux=True), static_argnums=2)

    def by_hand(training):
        image = np.asarray(BATCH["image"])
        x, variables = image, VARIABLES
        for _ in range(3):
            slope, variables = slope_at(x, variables, training)
            x = np.clip(x + np.float32(0.05) * np.sign(slope), image - 0.1, image + 0.1).clip(0, 1)
        return NET.forward(variables, x, key)[1]["batch_stats"]

    expected = by_hand(False), by_hand(True)
    for training in (False, True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), expected[training], step(training)
        )
    assert any(np.abs(a - b).max() > 0.01 for a, b in zip(*map(jax.tree.leaves, expected), strict=True))


def test_ibd_is_kl_to_the_teacher_and_has_cross_entropys_gradient():
    """The paper's D is the cross-entropy with the teacher's distribution, ours the KL: a constant apart."""
    y_t = softmax(NET.teacher(BATCH["image"])[0])

    def cross_entropy(net, variables, batch, x_adv, key):
        (clean, _), variables = net.forward(variables, batch["image"], key)
        (adv, _), variables = net.forward(variables, x_adv, key)
        natural, robust = (losses.cross_entropy(logits, np.float32(y_t)) for logits in (clean, adv))
        return 0.1 * jnp.mean(natural) + 0.9 * jnp.mean(robust), (variables, {})

    (loss, gradient, *_), (value, expected, *_) = losses_and_gradients(
        ibd(beta=0.0, alpha=0.9), standard()._replace(loss=cross_entropy)
    )
    entropy = -np.mean(np.sum(y_t * np.log(y_t), -1))
    np.testing.assert_allclose(loss, float(value) - entropy, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, expected)


def test_no_gradient_reaches_the_teacher():
    objective = ibd()

    def loss(teacher_variables):
        net = linen_net(MODEL, {"teacher": MODEL}, {"teacher": teacher_variables})
        features = net.predict(VARIABLES, BATCH["image"])[1]
        head = objective.head.init(jax.random.key(5), features, features, train=False)
        return objective.loss(net, {**VARIABLES, "head": head}, BATCH, X_ADV, jax.random.key(2))[0]

    gradient = jax.device_get(jax.jit(jax.grad(loss))(TEACHER))
    assert all(np.abs(leaf).max() == 0.0 for leaf in jax.tree.leaves(gradient["params"]))


def test_the_attacks_target_follows_its_option():
    def target(objective):
        return objective.target(NET, VARIABLES, BATCH, jax.random.key(0))

    student = softmax(NET.predict(VARIABLES, BATCH["image"])[0])
    np.testing.assert_allclose(target(ibd()), softmax(NET.teacher(BATCH["image"])[0]), rtol=1e-5)
    np.testing.assert_allclose(target(ibd(attack_target="student")), student, rtol=1e-5)
    np.testing.assert_allclose(target(trades()), student, rtol=1e-5)
    np.testing.assert_array_equal(target(pgd_at()), BATCH["label"])
