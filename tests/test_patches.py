"""Networks on patches: timm's constants and logits, options, stochastic depth, and attacks that run unchanged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibjax import losses
from ibjax.attacks import autoattack, pgd
from ibjax.errors import InputError
from ibjax.models import convnext, patches, swin, vit, xcit
from ibjax.pytorch import architectures, imports


def weights(model, *images):
    """Variables among which none is 0 or 1, made in NumPy: JAX would compile the initialisation."""
    rng = np.random.default_rng(0)

    def fill(leaf):
        return np.float32(
            rng.normal(1 if leaf.ndim == 1 else 0, 0.3 if leaf.ndim == 1 else leaf.size**-0.25, leaf.shape)
        )

    return jax.tree.map(fill, jax.eval_shape(model.init, jax.random.key(0), *images))


TINY = vit.Model(10, depth=1, width=8, heads=2, patch=4)
SWIN = swin.Model(10, blocks=(2, 1), width=8, heads=2, patch=2, window=2)  # of 8×8 pixels: maps of 4×4 and 2×2


@pytest.mark.parametrize(
    "model, side, match",
    [
        (convnext.Model(10, stem="conv_stem"), 32, r"model\.stem 'conv_stem' is unknown; .*'convstem'"),
        (convnext.Model(10, depth=20), 32, r"convnext has no depth 20; allowed: depth \[18, 36\]"),
        (convnext.Model(10), 28, r"images of \(28, 28\) pixels are too small for 4 stages"),
        (convnext.Model(10, drop_path=1.0), 32, r"model\.drop_path=1 is not allowed"),
        (vit.Model(10, width=96), 32, r"model\.width=96 is no multiple of 64; give model\.heads too"),
        (vit.Model(10, heads=5), 32, r"model\.heads=5 does not divide model\.width=384"),
        (vit.Model(10, patch=8, stem="convstem"), 32, r"the convstem makes patches of 16"),
        (vit.Model(10), 40, r"vit: images of \(40, 40\) pixels are not divisible into patches of 16×16"),
        (xcit.Model(10, patch=8), 32, r"model\.patch=8 is not allowed; give 16 or 4"),
        (xcit.Model(10, width=12, heads=2), 32, r"model\.width=12 is not allowed; give a multiple of 8"),
        (xcit.Model(10), 40, r"xcit: images of \(40, 40\) pixels"),
        (swin.Model(10, depth=18), 32, r"swin has no depth 18; allowed: depth \[12, 24\]"),
        (swin.Model(10), 40, r"swin: images of \(40, 40\) pixels are not divisible into patches of 32×32"),
        (swin.Model(10), 32, r"with 8 rows or columns, which do not divide into windows of 7×7; give another"),
        (swin.Model(10, width=48), 224, r"model\.width=48 is no multiple of 32; give model\.heads too"),
        (swin.Model(10, heads=5), 224, r"model\.heads=5 does not divide model\.width=96"),
        (swin.Model(10, window=0), 224, r"model\.window=0 is not allowed"),
    ],
)
def test_bad_options_and_images_are_one_clear_line(model, side, match):
    with pytest.raises(InputError, match=match):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))


def test_stochastic_depth_drops_whole_branches_of_single_images_in_training_only():
    """Rates rise linearly from 0; a branch is dropped for an image as a whole, or divided by 1 − rate."""
    assert patches.rates(0.3, 4) == pytest.approx([0, 0.1, 0.2, 0.3]) and patches.rates(0.3, 1) == [0]
    model = convnext.Model(10, width=4, blocks=(2,), drop_path=0.25, layer_scale=1.0)
    x = np.tile(np.random.default_rng(0).random((1, 8, 8, 3), np.float32), (400, 1, 1, 1))
    variables = weights(model, x[:1])

    @jax.jit
    def branches(key):
        kept = model.apply(variables, x[:1])[1]
        taps = model.apply(variables, x, train=True, rngs={"dropout": key})[1]
        return [(f["block2"] - f["block1"], f["block1"] - f["stem"]) for f in (kept, taps)]

    (branch, first), (drawn, never) = jax.device_get(branches(jax.random.key(2)))
    np.testing.assert_allclose(never, np.tile(first, (400, 1, 1, 1)), atol=1e-5)  # the first block's rate is 0
    dropped = np.abs(drawn).max((1, 2, 3)) == 0
    np.testing.assert_allclose(drawn[~dropped], np.tile(branch / 0.75, (sum(~dropped), 1, 1, 1)), atol=1e-5)
    assert 65 < dropped.sum() < 135  # 100 in the mean, four standard deviations


def test_the_class_token_and_the_map_of_patches_are_edited_separately():
    x = np.random.default_rng(0).random((2, 8, 8, 3), np.float32)
    variables = weights(TINY, x)

    @jax.jit
    def edited():
        changes = {}, {"block1": lambda f: 0 * f}, {"stem_class": lambda f: f * f + 1}
        return [TINY.apply(variables, x, edits=edits)[1] for edits in changes]

    taps, of_the_map, of_the_token = jax.device_get(edited())
    assert taps["stem"].shape == taps["block1"].shape == (2, 2, 2, 8) and taps["block1_class"].shape == (2, 8)
    np.testing.assert_allclose(of_the_map["pre_logits"], taps["pre_logits"], atol=1e-6)  # it reads the token alone
    assert np.abs(of_the_token["pre_logits"] - taps["pre_logits"]).max() > 1e-4


def test_tokens_and_positions_keep_their_shape_in_pytorch_and_matrices_are_transposed():
    variables = jax.eval_shape(TINY.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    leaves = architectures.key_map("vit", TINY, (8, 8, 3))
    assert leaves["params/pos_embed"].theirs() == variables["params"]["pos_embed"].shape == (1, 5, 8)
    assert leaves["params/block1/attn/qkv/dense/kernel"].theirs() == (24, 8)


@pytest.mark.parametrize("shift, windows", [((0, 0), (2, 2)), ((1, 1), (2, 2)), ((0, 2), (2, 4)), ((1, 0), (2, 8))])
def test_positions_attend_to_their_window_as_far_as_it_is_contiguous(shift, windows):
    """All derivatives of an attention by the definition: what rolling brings together from opposite ends is apart."""
    model = swin.WindowAttention(1, windows, shift, jnp.float32)
    x = np.float32(np.random.default_rng(0).normal(size=(1, 4, 8, 2)))
    variables = weights(model, x)
    derivatives = jax.jit(jax.jacobian(lambda x: model.apply(variables, x).sum(-1)))
    seen = np.abs(derivatives(x)).sum(-1).reshape(32, 32) > 1e-20
    row, column = np.divmod(np.arange(32), 8)
    parts = [(place - step) // side for place, step, side in zip((row, column), shift, windows, strict=True)]
    together = [part[:, None] == part[None] for part in parts]
    np.testing.assert_array_equal(seen, together[0] & together[1])


def test_swin_has_timms_logits_also_of_files_with_older_names(tmp_path):
    """Maps with shifted windows, a map of one window, biases of relative positions; a file's buffers are unused."""
    torch = pytest.importorskip("torch", reason="the oracle is timm")
    pytest.importorskip("timm", reason="the oracle is timm (pip install --no-deps timm)")
    import torch_twins
    from timm.models.swin_transformer import SwinTransformer

    sizes = dict(embed_dim=8, depths=(2, 1), num_heads=(2, 4), num_classes=10)
    network = torch_twins.randomize(SwinTransformer(img_size=8, patch_size=2, window_size=2, **sizes))
    state = network.state_dict()
    older = {name.replace("head.fc", "head").replace("layers.1.down", "layers.0.down"): state[name] for name in state}
    older |= {"layers.0.blocks.1.attn_mask": torch.zeros(4, 4, 4)}
    older |= {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(4, 4, dtype=torch.int64)}
    images = np.random.default_rng(0).random((4, 8, 8, 3), np.float32)
    theirs = torch_twins.logits(network, images)
    for name, saved in ("today", state), ("older", older):
        torch.save({"state_dict": saved}, tmp_path / name)
        read = imports.read(tmp_path / name, "swin", imports.Said(no_normalisation=True))
        assert read.model == SWIN and read.shape == (8, 8, 3) and read.found.left_out == 2 * (name == "older")
        variables = architectures.to_ours("swin", read.model, read.state, (8, 8, 3))
        np.testing.assert_allclose(jax.jit(SWIN.apply)(variables, images)[0], theirs, atol=1e-5)
    assert np.abs(theirs).max() > 0.1


@pytest.mark.parametrize("model", [TINY, SWIN.clone(blocks=(2,))])
def test_attacks_run_unchanged(model):
    x, y = np.random.default_rng(0).random((4, 8, 8, 3), np.float32), np.arange(4, dtype=np.int32)
    variables = weights(model, x)
    attack = pgd.pgd(loss="ce", norm="linf", eps=8 / 255, step_size=2 / 255, steps=3, init="none", unroll=False)

    @jax.jit
    def attacked(key):
        logits_fn = lambda x: model.apply(variables, x)[0]  # noqa: E731
        x_adv = attack(key, logits_fn, x, y)
        both, labels = jnp.concatenate([x, x_adv]), np.concatenate([y, y])
        return x_adv, losses.cross_entropy(logits_fn(both), labels).reshape(2, -1)

    x_adv, (before, after) = jax.device_get(attacked(jax.random.key(2)))
    assert np.abs(x_adv - x).max() <= 8 / 255 + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
    assert (after > before).all()


@pytest.mark.slow
@pytest.mark.parametrize("model", [TINY, SWIN, xcit.Model(10, depth=1, width=8, heads=2, patch=4, class_depth=1)])
def test_autoattack_runs_unchanged(model):
    x, y = jax.random.uniform(jax.random.key(0), (4, 8, 8, 3)), jnp.arange(4)
    variables = jax.tree.map(
        lambda leaf: 8 * leaf, jax.jit(model.init)(jax.random.key(1), x)
    )  # the start is too smooth
    logits_fn = lambda x: model.apply(variables, x)[0]  # noqa: E731
    y = jax.jit(logits_fn)(x).argmax(1)
    result = autoattack.autoattack(jax.random.key(2), logits_fn, x, y, norm="linf", eps=8 / 255, version="standard")
    assert set(result.robust_after) == {"apgd-ce", "apgd-t", "fab-t", "square"} and not result.robust.all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "timm_name, arch",
    [
        ("convnext_tiny", "convnext"),
        ("vit_small_patch16_224", "vit"),
        ("xcit_small_12_p16_224", "xcit"),
        *((f"swin_{size}_patch4_window7_224", "swin") for size in ("tiny", "small", "base", "large")),
    ],
)
def test_timms_networks_have_the_same_logits(timm_name, arch, tmp_path):
    """Weights that hide nothing, at 224 pixels: as the file is imported, and as it comes back from an export."""
    torch = pytest.importorskip("torch", reason="the oracle is timm")
    timm = pytest.importorskip("timm", reason="the oracle is timm (pip install --no-deps timm)")
    import torch_twins

    from ibjax.pytorch import gate

    torch.manual_seed(0)
    network = torch_twins.randomize(timm.create_model(timm_name))
    images = gate.crops(224, 4)
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in architectures.IMAGENET.values())
    with torch.no_grad():
        theirs = network((torch_twins.nchw(images.astype(np.float32) / 255) - mean) / std).numpy()
    torch.save({"state_dict": network.state_dict()}, tmp_path / "a.pt")
    read = imports.read(tmp_path / "a.pt", arch, imports.Said(**architectures.IMAGENET))
    variables = architectures.to_ours(arch, read.model, read.state, (224, 224, 3))
    ours = gate.of_ours(read.model, variables, images)
    print(f"{timm_name}: max |Δlogit| {np.abs(ours - theirs).max():.1e}, logits up to {np.abs(theirs).max():.1f}")
    assert np.abs(theirs).max() > 0.5 and gate.compare(ours, theirs, "crops", timm_name) <= 1e-4
    back = architectures.to_theirs(arch, read.model, variables, (224, 224, 3))
    given = {key: value.numpy() for key, value in network.state_dict().items() if value.is_floating_point()}
    assert set(back) == set(given) and all((back[key] == value).all() for key, value in given.items())


@pytest.mark.slow
def test_autoattack_runs_on_a_swin_at_224_pixels():
    """Its checks of the network and its first attack, on Swin-T but for the number of blocks."""
    model = swin.Model(10, blocks=(2, 2, 2, 2))
    x = jax.random.uniform(jax.random.key(0), (2, 224, 224, 3))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    logits_fn = lambda x: model.apply(variables, x)[0]  # noqa: E731
    y = jax.jit(logits_fn)(x).argmax(1)
    options = dict(attacks=["apgd-ce"], options={"steps": 5})
    result = autoattack.autoattack(jax.random.key(2), logits_fn, x, y, norm="linf", eps="4/255", **options)
    assert np.abs(result.x_adv - x).max() <= 4 / 255 + 1e-6 and set(result.robust_after) == {"apgd-ce"}
