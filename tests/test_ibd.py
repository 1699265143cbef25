"""IBD's attention-based feature distillation against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibjax.errors import InputError
from ibjax.objectives.ibd import AttentionMatching, adaptive_average, energy_differences, ibd, layers_of


def taps(seed, sizes, channels=5, batch=4):
    keys = jax.random.split(jax.random.key(seed), len(sizes))
    return {
        f"block{i}": jax.random.normal(k, (batch, s, s, channels))
        for i, (k, s) in enumerate(zip(keys, sizes, strict=True), 1)
    }


STUDENT, TEACHER = taps(0, [8, 8, 4, 2]), taps(1, [8, 4, 8])


def apply(head, student=STUDENT, teacher=TEACHER, train=False):
    variables = head.init(jax.random.key(2), student, teacher, train=False)
    return head.apply(variables, student, teacher, train=train, mutable=["batch_stats"])[0]


def test_attention_rows_sum_to_one_over_students():
    _, attention = apply(AttentionMatching(16))
    assert attention.shape == (4, 3, 4)  # (B, teacher layers, student layers)
    np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-5)
    assert np.abs(np.asarray(attention.sum(1)) - 1).max() > 0.05  # and not over teachers


def test_the_feature_loss_is_its_definition():
    """Energies, pooling, norms and the double sum in NumPy and float64, with PyTorch's pooling as the oracle."""
    torch = pytest.importorskip("torch", reason="the oracle of adaptive pooling is PyTorch")
    loss, attention = apply(AttentionMatching(16))
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
    flat = {f"block{i}": jnp.full((4, s, s, 5), 0.7) for i, s in enumerate([8, 8, 4], 1)}
    assert float(apply(AttentionMatching(16), flat, flat)[0]) < 1e-12
    black = {name: jnp.zeros_like(z) for name, z in flat.items()}
    head = AttentionMatching(16)
    variables = head.init(jax.random.key(0), black, TEACHER, train=False)
    gradient = jax.grad(lambda s: head.apply(variables, s, TEACHER, train=False)[0])(black)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(gradient))


def test_gradients_flow_through_values_keys_and_attention():
    """The attention is not detached: its own weights get a gradient, and from nothing else."""
    head = AttentionMatching(16)
    variables = head.init(jax.random.key(2), STUDENT, TEACHER, train=False)

    def loss(params):
        return head.apply({**variables, "params": params}, STUDENT, TEACHER, train=False)[0]

    gradient = jax.grad(loss)(variables["params"])
    for name in ("query1", "key1", "bilinear"):
        assert float(jnp.abs(gradient[name]["dense"]["kernel"]).max()) > 0
    assert float(jnp.abs(gradient["position_t"]).max()) > 0


def test_options_change_what_they_name():
    default = AttentionMatching(16)
    names = set(default.init(jax.random.key(2), STUDENT, TEACHER, train=False)["params"])
    bare = AttentionMatching(16, positional=False).init(jax.random.key(2), STUDENT, TEACHER, train=False)["params"]
    assert names - set(bare) == {"position_t", "position_s"}
    for option in (dict(query_relu=True), dict(energy="mean")):
        assert abs(float(apply(AttentionMatching(16, **option))[0] - apply(default)[0])) > 1e-6


@pytest.mark.parametrize("n, k", [(4, 8), (8, 4), (7, 3), (32, 16), (5, 5), (3, 7)])
def test_adaptive_pooling_is_pytorchs(n, k):
    torch = pytest.importorskip("torch", reason="the oracle is PyTorch")
    e = np.random.default_rng(0).normal(size=(2, n, n)).astype(np.float32)
    expected = torch.nn.functional.adaptive_avg_pool2d(torch.tensor(e), (k, k)).numpy()
    np.testing.assert_allclose(adaptive_average(jnp.asarray(e), (k, k)), expected, atol=1e-6)


def test_layers_come_in_numerical_order_after_their_activation_without_the_stem():
    features = {f"block{i}": jnp.full((1, 1, 1, 1), float(i)) for i in (10, 2, 1)}
    features |= {
        "stem": jnp.zeros((1, 1, 1, 1)),
        "block2_relu": jnp.full((1, 1, 1, 1), 20.0),
        "pre_logits": jnp.zeros((1, 1)),
    }
    assert [float(z.squeeze()) for z in layers_of(features, "block")] == [1.0, 20.0, 10.0]


def test_differences_keep_the_order_of_layers_across_sizes():
    z_t = list(taps(1, [4, 8, 4, 8]).values())
    both = energy_differences(list(STUDENT.values()), z_t, "square")
    alone = [energy_differences(list(STUDENT.values()), [z], "square") for z in z_t]
    np.testing.assert_allclose(both, jnp.concatenate(alone, 1), rtol=1e-5)


@pytest.mark.parametrize(
    "options", [dict(attack_target="pupil"), dict(teacher_features="both"), dict(granularity="x"), dict(energy="z")]
)
def test_unknown_choices_are_refused(options):
    with pytest.raises(InputError, match="allowed"):
        ibd(**options)
