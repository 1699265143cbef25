"""Every family against its published file in PyTorch: same weights, same logits, features and statistics."""

from pathlib import Path

import jax
import numpy as np
import pytest

from ibjax.models import cnn, convnext, layers, patches, preact_resnet, resnet, swin, vgg, vit, wide_resnet, xcit
from ibjax.pytorch import architectures, fit

torch = pytest.importorskip("torch", reason="the oracle is PyTorch")
import torch_twins as twins  # noqa: E402

NORM = architectures.CIFAR10
DM = dict(activation="silu", **NORM)
# name -> (architecture, our model)
PAIRS = {
    "wrn_trades": ("wide_resnet", wide_resnet.Model(10, 10, 1)),
    "wrn_trades_wider": ("wide_resnet", wide_resnet.Model(10, 16, 2, **NORM)),
    "wrn_deepmind": ("dm_wide_resnet", wide_resnet.Model(10, 10, 1, variant="deepmind", **DM)),
    "wrn_ib_rar": ("ib_rar_wide_resnet", wide_resnet.Model(10, 10, 1, variant="ib_rar")),
    "preact_rice": ("preact_resnet", preact_resnet.Model(10, width=4, blocks=(1, 1))),
    "preact_raw": (
        "preact_resnet_raw",
        preact_resnet.Model(10, width=4, blocks=(1, 1), projection="raw", final_norm=False),
    ),
    "preact_deepmind": (
        "dm_preact_resnet",
        preact_resnet.Model(10, width=4, blocks=(1, 2), projection="deepmind", **DM),
    ),
    "resnet_basic": ("resnet", resnet.Model(10, width=4, blocks=(1, 1))),
    "resnet_bottleneck": ("resnet", resnet.Model(10, depth=50, width=4, blocks=(1, 1))),
    "resnet_imagenet": (
        "imagenet_resnet",
        resnet.Model(10, depth=50, width=4, blocks=(2, 1), stem="imagenet", **architectures.IMAGENET),
    ),
    "resnet_torchvision_cifar": (
        "torchvision_cifar_resnet",
        resnet.Model(10, width=4, blocks=(1, 1), **architectures.IMAGENET),
    ),
    "resnet_wide": (  # WideResNet-50-2, but for its size
        "imagenet_resnet",
        resnet.Model(10, depth=50, width=4, blocks=(1, 1), stem="imagenet", inner_width=2, **architectures.IMAGENET),
    ),
    "vgg11": ("vgg", vgg.Model(10, depth=11, width=2, hidden=(8, 8))),
    "vgg11_torchvision": (
        "torchvision_vgg",
        vgg.Model(10, depth=11, width=2, hidden=(8, 8), variant="torchvision", **architectures.IMAGENET),
    ),
    "cnn": ("cnn", cnn.Model(10, ((4, 4), (6,)), (), padding=1, batch_norm=True, pool="average")),
    "cnn_flattened": ("cnn", cnn.Model(10, ((4,), (6, 5)), (8, 7), padding=1, dropout=0.0)),
    "small_cnn": ("small_cnn", cnn.Model(10, ((4, 4), (6, 6)), (8, 7), dropout=0.0)),
    "convnext": ("convnext", convnext.Model(10, width=8, blocks=(1, 2), **architectures.IMAGENET)),
    "convnext_convstem": ("convnext_convstem", convnext.Model(10, width=8, blocks=(1, 1), stem="convstem")),
    "convnext_convstem_wide": ("convnext_convstem", convnext.Model(10, width=128, blocks=(1,), stem="convstem")),
    "vit": ("vit", vit.Model(10, depth=2, width=16, heads=2, patch=8, **architectures.IMAGENET)),
    "vit_convstem": ("vit_convstem", vit.Model(10, depth=1, width=64, stem="convstem", stem_width=4)),
    "xcit": ("xcit", xcit.Model(10, depth=1, width=16, heads=2, **architectures.IMAGENET)),
    "cifar_xcit": ("cifar_xcit", xcit.Model(10, depth=2, width=16, heads=2, patch=4, class_depth=1, **NORM)),
    "swin": ("swin", swin.Model(10, width=8, blocks=(2, 1), heads=2, window=4, **architectures.IMAGENET)),
    "mimir_swin": ("mimir_swin", swin.Model(10, width=8, blocks=(2,), heads=2, window=8, epsilon=1e-6)),
}
# what no file says of a network of ours that is nobody else's
FLAGS = {
    "cnn": ["--config.model.padding=1"],
    "cnn_flattened": ["--config.model.padding=1", "--config.model.dropout=0.0"],
    "small_cnn": ["--config.model.dropout=0.0"],
    "vit": ["--config.model.heads=2"],  # of its width one head of 64 channels, by default
}


def pair(name, groups=1):
    """(twin with random weights, our model, our variables, images of both)."""
    arch, model = PAIRS[name]
    torch.manual_seed(0)
    twin = twins.make(arch, model)
    images = np.random.default_rng(0).uniform(size=(4, 32, 32, 3)).astype(np.float32)
    return twin, model.clone(**(dict(bn_groups=groups) if groups > 1 else {})), ours(name, twin), images


def ours(name, twin):
    """The twin's weights and running statistics as our variables."""
    arch, model = PAIRS[name]
    fit.check(Path("the twin"), arch, model, twins.state(twin), (32, 32, 3))  # nothing missing, nothing left over
    variables = architectures.to_ours(arch, model, twins.state(twin))
    return jax.tree.map(np.asarray, variables)


@pytest.mark.parametrize("name", PAIRS)
def test_same_weights_give_the_same_logits_features_and_running_statistics(name):
    twin, model, variables, images = pair(name)
    norms = [module for module in twin.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    assert {norm.eps for norm in norms} <= {layers.BatchNorm.epsilon}  # too small to be seen in the logits
    norms = [module for module in twin.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} <= {getattr(model, "epsilon", patches.LayerNorm.epsilon)}
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, {"batch_stats": {}, **shapes})

    expected, taps = twins.logits_and_taps(twin, images)
    logits, features = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)
    assert set(taps) == set(features)
    for tap, value in taps.items():
        np.testing.assert_allclose(features[tap], value, atol=1e-4, rtol=1e-4, err_msg=tap)

    expected = twins.logits(twin.train(), images)
    rngs = {"dropout": jax.random.key(0)}
    train = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"], rngs=rngs))
    (logits, _), updated = train(variables, images)
    if not any(isinstance(module, torch.nn.Dropout) and module.p for module in twin.modules()):
        np.testing.assert_allclose(logits, expected, atol=2e-4, rtol=1e-3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5),
        updated.get("batch_stats", {}),
        ours(name, twin)["batch_stats"],
    )


@pytest.mark.parametrize("name", ["wrn_trades", "resnet_basic"])
def test_batch_norm_groups_are_the_replicas_of_unsynchronised_training(name):
    """Each half of the batch by itself, as on two devices; the running statistics take the average of the two."""
    _, model, variables, images = pair(name, groups=2)
    apply = jax.jit(lambda variables, x: model.apply(variables, x, train=True, mutable=["batch_stats"]))
    (logits, _), updated = apply(variables, images)
    halves, statistics = [], []
    for half in (images[:2], images[2:]):
        replica, *_ = pair(name)
        halves.append(twins.logits(replica.train(), half))
        statistics.append(ours(name, replica)["batch_stats"])
    np.testing.assert_allclose(logits, np.concatenate(halves), atol=2e-4, rtol=1e-3)
    average = jax.tree.map(lambda a, b: (a + b) / 2, *statistics)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), updated["batch_stats"], average)


def test_the_twins_have_the_published_parameter_names():
    """These are the first and last keys, and one of each kind between, of the checkpoints that are out there."""
    published = {
        "wrn_trades": "conv1.weight block1.layer.0.bn1.weight block2.layer.0.convShortcut.weight bn1.bias fc.bias",
        "wrn_deepmind": "init_conv.weight layer.0.block.0.batchnorm_0.weight layer.1.block.0.shortcut.weight "
        "layer.2.block.0.conv_1.weight batchnorm.running_var logits.bias mean std",
        "preact_rice": "conv1.weight layer1.0.conv1.weight layer2.0.shortcut.0.weight bn.weight linear.bias",
        "preact_deepmind": "conv_2d.weight layer_0.0.conv_2d_1.weight layer_1.0.shortcut.weight "
        "layer_1.1.batchnorm_1.bias batchnorm.weight logits.weight",
        "resnet_basic": "bn1.running_mean layer2.0.shortcut.0.weight layer2.0.shortcut.1.bias linear.weight",
        "resnet_imagenet": "layer1.0.downsample.0.weight layer2.0.downsample.1.running_var layer1.1.conv3.weight "
        "fc.weight",
        "resnet_torchvision_cifar": "conv1.weight bn1.weight layer2.0.downsample.0.weight layer2.0.downsample.1.bias "
        "layer1.0.conv2.weight fc.bias",
        "resnet_wide": "layer1.0.conv3.weight layer1.0.downsample.1.running_mean fc.weight",
        "vgg11_torchvision": "features.0.bias features.1.weight classifier.0.weight classifier.3.bias "
        "classifier.6.weight",
        "small_cnn": "feature_extractor.conv1.weight feature_extractor.conv4.bias classifier.fc1.weight "
        "classifier.fc3.bias",
        "convnext": "stem.0.weight stem.1.bias stages.0.blocks.0.gamma stages.0.blocks.0.conv_dw.weight "
        "stages.1.downsample.0.weight stages.1.downsample.1.bias stages.1.blocks.1.mlp.fc2.weight head.norm.weight "
        "head.fc.bias",
        "convnext_convstem": "stem.stem.0.weight stem.stem.1.weight stem.stem.4.bias stages.0.blocks.0.norm.weight",
        "vit": "cls_token pos_embed patch_embed.proj.bias blocks.0.attn.qkv.weight blocks.1.mlp.fc1.bias norm.bias "
        "head.weight",
        "vit_convstem": "patch_embed.proj.stem.0.weight patch_embed.proj.stem.10.weight patch_embed.proj.stem.12.bias",
        "xcit": "cls_token patch_embed.proj.0.0.weight patch_embed.proj.6.1.running_var "
        "pos_embed.token_projection.weight blocks.0.gamma3 blocks.0.attn.temperature blocks.0.local_mp.bn.weight "
        "cls_attn_blocks.1.attn.v.bias cls_attn_blocks.0.gamma2 norm.weight head.bias",
        "swin": "patch_embed.proj.bias patch_embed.norm.weight layers.0.blocks.1.attn.relative_position_bias_table "
        "layers.0.blocks.0.attn.qkv.bias layers.1.downsample.norm.weight layers.1.downsample.reduction.weight "
        "layers.1.blocks.0.mlp.fc2.weight norm.bias head.fc.weight",
        "vgg11": "features.0.weight features.1.running_mean features.4.weight classifier.1.weight classifier.6.bias",
    }
    for name, keys in published.items():
        assert set(keys.split()) <= set(twins.make(*PAIRS[name]).state_dict())
