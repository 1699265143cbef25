"""IBD's attention-based feature distillation against its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from test_objectives import BATCH, NET, VARIABLES, X_ADV

from ibjax.errors import InputError
from ibjax.objectives.ibd import ibd
from ibjax.objectives.ibd_matching import AttentionMatching, adaptive_average, energy_differences, layers_of


def taps(seed, sizes, channels=5, batch=4):
    rng = np.random.default_rng(seed)
    return {f"block{i}": np.float32(rng.normal(size=(batch, s, s, channels))) for i, s in enumerate(sizes, 1)}


STUDENT, TEACHER = taps(0, [8, 4, 8]), taps(1, [8, 4])


def start(head, student=STUDENT, teacher=TEACHER):
    """Variables among which none is 0 or 1; made in NumPy, since JAX would compile a program for every shape."""
    shapes = jax.eval_shape(lambda *taps: head.init(jax.random.key(2), *taps, train=False), student, teacher)
    rng = np.random.default_rng(2)

    def fill(path, leaf):
        kernel, near_one = path[-1].key == "kernel", path[-1].key in ("scale", "var")
        start = rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[0]) if kernel else float(near_one)
        return np.float32(start + 0.3 * np.abs(rng.normal(size=leaf.shape)))

    return jax.tree_util.tree_map_with_path(fill, shapes)


def apply(head, student=STUDENT, teacher=TEACHER):
    variables = start(head, student, teacher)
    return jax.jit(lambda *given: head.apply(*given, train=False))(variables, student, teacher)


@functools.cache
def loss_and_attention():
    return apply(AttentionMatching(16))


def test_attention_rows_sum_to_one_over_students():
    _, attention = loss_and_attention()
    assert attention.shape == (4, 2, 3)  # (B, teacher layers, student layers)
    np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-5)
    assert np.abs(np.asarray(attention.sum(1)) - 1).max() > 0.05  # and not over teachers


def test_the_feature_loss_is_its_definition():
    """Energies, pooling, norms and the double sum in NumPy and float64, with PyTorch's pooling as the oracle."""
    torch = pytest.importorskip("torch", reason="the oracle of adaptive pooling is PyTorch")
    loss, attention = loss_and_attention()
    expected = 0.0
    for i, z_t in enumerate(TEACHER.values()):
        e_t = (np.asarray(z_t, np.float64) ** 2).mean(-1)
        for j, z_s in enumerate(STUDENT.values()):
            e_s = torch.tensor((np.asarray(z_s, np.float64) ** 2).mean(-1))[:, None]
            e_s = torch.nn.functional.adaptive_avg_pool2d(e_s, e_t.shape[1:])[:, 0].numpy()
            flat_s, flat_t = (
                e.reshape(4, -1) / np.linalg.norm(e.reshape(4, -1), axis=1, keepdims=True) for e in (e_s, e_t)
            )
            difference = ((flat_s - flat_t) ** 2).mean(1)
            expected += (np.asarray(attention)[:, i, j] * difference).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_the_feature_loss_is_bounded_by_its_normalisation():
    """L_feat ≤ Σ_i 2/(H_i·W_i): the bound that fixes the meaning of β."""
    loss, _ = apply(AttentionMatching(16), taps(3, [8, 4]), taps(4, [8, 4, 2]))
    assert 0 < float(loss) <= 2 / 64 + 2 / 16 + 2 / 4


def test_equal_uniform_maps_give_zero_and_a_finite_gradient():
    flat = {f"block{i}": np.full((4, s, s, 5), 0.7, np.float32) for i, s in enumerate([8, 8, 4], 1)}
    assert float(apply(AttentionMatching(16), flat, flat)[0]) < 1e-12
    black = {name: np.zeros_like(z) for name, z in flat.items()}
    head = AttentionMatching(16)
    variables = start(head, black)
    gradient = jax.jit(jax.grad(lambda s: head.apply(variables, s, TEACHER, train=False)[0]))(black)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_gradients_flow_through_values_keys_and_attention():
    """The attention is not detached: its own weights get a gradient, and from nothing else."""
    head = AttentionMatching(16)
    variables = start(head)

    def loss(params):
        return head.apply({**variables, "params": params}, STUDENT, TEACHER, train=False)[0]

    gradient = jax.jit(jax.grad(loss))(variables["params"])
    for name in ("query1", "key1", "bilinear"):
        assert np.abs(gradient[name]["dense"]["kernel"]).max() > 0
    assert np.abs(gradient["position_t"]).max() > 0


def test_options_change_what_they_name():
    default = AttentionMatching(16)
    variables, bare = (start(head) for head in (default, AttentionMatching(16, positional=False)))
    assert set(variables["params"]) - set(bare["params"]) == {"position_t", "position_s"}
    heads = (default, AttentionMatching(16, query_relu=True), AttentionMatching(16, energy="mean"))
    student, teacher = taps(0, [8, 4]), taps(1, [8])
    given = (start(default, student, teacher), student, teacher)
    loss, *others = jax.jit(lambda *given: [head.apply(*given, train=False)[0] for head in heads])(*given)
    assert all(abs(other - loss) > 1e-6 for other in others)


@pytest.mark.parametrize("n, k", [(4, 8), (8, 4), (7, 3), (32, 16), (5, 5), (3, 7)])
def test_adaptive_pooling_is_pytorchs(n, k):
    torch = pytest.importorskip("torch", reason="the oracle is PyTorch")
    e = np.random.default_rng(0).normal(size=(2, n, n)).astype(np.float32)
    expected = torch.nn.functional.adaptive_avg_pool2d(torch.tensor(e), (k, k)).numpy()
    np.testing.assert_allclose(jax.jit(lambda e: adaptive_average(e, (k, k)))(e), expected, atol=1e-6)


def test_layers_come_in_numerical_order_after_their_activation_without_the_stem():
    features = {f"block{i}": np.full((1, 1, 1, 1), float(i)) for i in (10, 2, 1)}
    features |= {
        "stem": np.zeros((1, 1, 1, 1)),
        "block2_relu": np.full((1, 1, 1, 1), 20.0),
        "pre_logits": np.zeros((1, 1)),
    }
    assert [z.item() for z in layers_of(features, "block")] == [1.0, 20.0, 10.0]


def test_differences_keep_the_order_of_layers_across_sizes():
    @jax.jit
    def differences(z_s, z_t):
        return energy_differences(z_s, z_t, "square"), [energy_differences(z_s, [z], "square") for z in z_t]

    both, alone = differences(list(STUDENT.values()), list(taps(1, [4, 8, 4, 8]).values()))
    np.testing.assert_allclose(both, np.concatenate(alone, 1), rtol=1e-5)


@pytest.mark.parametrize(
    "options", [dict(attack_target="pupil"), dict(teacher_features="both"), dict(granularity="x"), dict(energy="z")]
)
def test_unknown_choices_are_refused(options):
    with pytest.raises(InputError, match="allowed"):
        ibd(**options)


# ---- independent values ------------------------------------------------------------------------------------


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def attention_oracle(head, variables, student, teacher, train=False):
    """The module's attention, written from the paper's formulas in NumPy and float64, layer by layer."""
    params, statistics = float64(variables["params"]), float64(variables["batch_stats"])

    def linear_norm(x, name, norm):
        y = x @ params[name]["dense"]["kernel"] + params[name]["dense"]["bias"]
        mean, var = (y.mean(0), y.var(0)) if train else (statistics[norm]["mean"], statistics[norm]["var"])
        y = (y - mean) / np.sqrt(var + 1e-5)
        return y * params[norm]["scale"] + params[norm]["bias"]

    z_t, z_s = ([np.asarray(z, np.float64).mean((1, 2)) for z in taps.values()] for taps in (teacher, student))
    n, m, d = len(z_t), len(z_s), head.qk_dim
    query = [linear_norm(z, f"query{i}", f"query_bn{i}") for i, z in enumerate(z_t, 1)]
    if head.query_relu:
        query = [np.maximum(q, 0) for q in query]
    score = np.zeros((len(z_t[0]), n, m))
    keys = [np.maximum(linear_norm(z, f"key{j}", f"key_bn{j}"), 0) for j, z in enumerate(z_s, 1)]
    bilinear = linear_norm(np.concatenate(keys), "bilinear", "bilinear_bn").reshape(m, -1, n, d)
    for j in range(m):
        for i in range(n):
            score[:, i, j] = (bilinear[j, :, i] * query[i]).sum(-1)
            if head.positional:
                score[:, i, j] += params["position_t"][i] @ params["position_s"][j]
    score = np.exp(score / np.sqrt(d))
    return score / score.sum(-1, keepdims=True)


MIXED = {f"block{i}": z for i, z in enumerate((*taps(5, [8, 4]).values(), *taps(6, [2], channels=3).values()), 1)}
MIXED["block2"], MIXED["block3"] = MIXED["block3"], MIXED["block2"]  # layers of two widths, not in order


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("options", [dict(), dict(query_relu=True), dict(positional=False)])
def test_the_attention_is_its_formula(options, train):
    head = AttentionMatching(16, **options)
    variables = start(head, STUDENT, MIXED)
    (_, attention), updated = jax.jit(lambda *given: head.apply(*given, train=train, mutable=["batch_stats"]))(
        variables, STUDENT, MIXED
    )
    expected = attention_oracle(head, variables, STUDENT, MIXED, train)
    assert expected.max() - expected.min() > 0.1
    np.testing.assert_allclose(attention, expected, rtol=2e-4, atol=1e-5)
    if train:  # each layer's statistics follow its own batch
        weights = float64(variables["params"]["query3"]["dense"])
        y = MIXED["block3"].mean((1, 2)) @ weights["kernel"] + weights["bias"]
        before, after = (v["batch_stats"]["query_bn3"]["mean"] for v in (variables, updated))
        np.testing.assert_allclose(after, 0.9 * before + 0.1 * y.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("teacher_features", ["adv", "nat"])
def test_the_whole_loss_is_its_formula(teacher_features):
    """From predictions and features that are computed one by one, in the order of the batch-norm policy."""
    objective = ibd(alpha=0.7, beta=30.0, teacher_features=teacher_features, qk_dim=16)
    x, key = BATCH["image"], jax.random.key(0)
    _, shapes = jax.eval_shape(NET.teacher, x)
    head = start(objective.head, shapes, shapes)

    @jax.jit
    def found(variables):
        of_x, of_x_adv = NET.teacher(x), NET.teacher(X_ADV)
        (clean, _), after = NET.forward(variables, x, key)
        (adv, features), after = NET.forward(after, X_ADV, key)
        taught = (of_x if teacher_features == "nat" else of_x_adv)[1]
        feature, moved = objective.head.apply(head, features, taught, train=True, mutable=["batch_stats"])
        return of_x[0], clean, adv, feature[0], after, moved, objective.loss(NET, variables, BATCH, X_ADV, key)

    target, clean, adv, feature, after, moved, (loss, (got, metrics)) = found({**VARIABLES, "head": head})

    def kl(logits):
        p, q = (scipy.special.softmax(np.float64(z), axis=-1) for z in (target, logits))
        return (p * np.log(p / q)).sum(-1).mean()

    assert float(feature) > 1e-4
    np.testing.assert_allclose(loss, 0.3 * kl(clean) + 0.7 * kl(adv) + 30 * float(feature), rtol=1e-5)
    np.testing.assert_allclose([metrics["natural"], metrics["robust"]], [kl(clean), kl(adv)], rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got["batch_stats"], after["batch_stats"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got["head"]["batch_stats"], moved["batch_stats"]
    )


def test_the_teacher_sees_noise_of_the_size_asked_for():
    """Its logits move, by more where the noise is larger, and not at all without."""

    @jax.jit
    def distances(batch):
        exact = jax.nn.softmax(NET.teacher(batch["image"])[0])
        objectives = [ibd(teacher_noise=noise) for noise in (0.0, 0.001, 0.1)]
        targets = [objective.target(NET, VARIABLES, batch, jax.random.key(0)) for objective in objectives]
        return [jnp.abs(target - exact).max() for target in targets]

    distance = distances(BATCH)
    assert distance[0] == 0 and 0 < distance[1] < distance[2] / 10
