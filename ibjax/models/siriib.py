"""The network of SiRIIB: singular regularisation with an implicit information bottleneck.

    x → resized to scales s  →  SR_s  →  sigmoid  →  resized to full size  →  mean over s  =  x_avg ∈ (0, 1)
    f_i = p_i(c(x_avg))  is added to the classifier's i-th feature: stem, stage 1, stage 2, …
    SR(x) = BN(W_u (A + B)),   A = shuffle₂(W_o unshuffle₂(x)) modulates singular vectors, W_o 12×12 near orthogonal
                               B = FFT⁻¹((W_f |F|) · F / |F|), F = FFT(x), modulates singular values

| paper       | code             | default             |                                                              |
|-------------|------------------|---------------------|--------------------------------------------------------------|
| {s}         | scales           | 32, 24, 16, 8       | for 32×32 images; 64, 48, 24, 16 for 64×64                   |
| # of p_i    | connections      | 3                   | added to the first 3 of stem, stage 1, 2, 3, 4; 0: nothing   |
|             |                  |                     | is added to the classifier, and SR is trained separately    |
|             | classify         | "image"             | the classifier's input: x, or with "calibrated", x_avg       |
| c           | widths           | (16, 32, 64)        | 3×3 convolutions – BN – ReLU                                 |
|             | basic_blocks     | False               | True: WRN blocks of these widths, then BN-ReLU. SR-L has     |
|             |                  |                     | widths=(160, 160), SR-XL widths=(160, 160, 160, 160)         |
| p_i         |                  |                     | 3×3 convolution at full resolution, then average-pooling     |
| W_f         | fourier          | "amplitude"         | or "amp_phase", "reim", which map 2·3 channels jointly       |
| A + B       | fuse             | "add"               | or "concat"                                                  |
| R_τ         | penalty          | "off_diagonal"      | ‖(W_o W_oᵀ) ⊙ (1 − I)‖²_F, or "full": ‖W_o W_oᵀ − I‖²_F      |

The features are those of the backbone, after the addition of f_i (of a stage's last block: from before it); `x_avg`;
`info1` …, the f_i; and `orthogonality`, the scalar R_τ. The method's losses need no others, and XLA removes the
computation of features that a loss does not use.

There is no public code. The published numbers of parameters and operations determine to which features f_i is added,
that p_i comes before the pooling, and the widths and blocks of c. They do not determine the inside of SR, which
therefore has options. That W_o acts on the 12 = 3·2² channels of 2×2 windows, and W_f on amplitudes, is our
interpretation of the text.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ibjax import config
from ibjax.errors import InputError, nearest
from ibjax.information import fourier
from ibjax.models import layers, wide_resnet

SCALES = {32: (32, 24, 16, 8), 64: (64, 48, 24, 16)}
FOURIER = {"amplitude": fourier.amplitude, "amp_phase": fourier.amplitude_and_phase, "reim": fourier.parts}
CHOICES = {"fourier": tuple(FOURIER), "fuse": ("add", "concat"), "penalty": ("off_diagonal", "full")}
INPUTS = ("image", "calibrated")
TAPS = ("stem", "stage1", "stage2", "stage3", "stage4")


class SingularRegularization(nn.Module):
    """(B, H, W, C) -> (SR(x) (B, H, W, C), R_τ of its W_o); H and W are even."""

    fourier: str
    fuse: str
    penalty: str
    bn_groups: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> tuple[Array, Array]:
        channels, wide = x.shape[-1], x.shape[-1] * 4
        vectors = layers.Conv(wide, 1, kernel_init=nn.initializers.orthogonal(), name="vectors")
        a = layers.pixel_shuffle(vectors(layers.pixel_unshuffle(x)))
        w_o = vectors.variables["params"]["conv"]["kernel"].reshape(wide, wide).T  # one filter per row
        stacked = channels if self.fourier == "amplitude" else 2 * channels
        b = FOURIER[self.fourier](x, layers.Conv(stacked, 1, name="values"))
        fused = a + b if self.fuse == "add" else jnp.concatenate([a, b], -1)
        norm = layers.BatchNorm(groups=self.bn_groups, name="bn")
        y = layers.normed(fused, train, norm, conv=layers.Conv(channels, 1, name="fuse"))

        gram = jnp.matmul(w_o, w_o.T, precision=jax.lax.Precision.HIGHEST)
        identity = jnp.eye(wide)
        error = gram * (1 - identity) if self.penalty == "off_diagonal" else gram - identity
        return y, jnp.sum(jnp.square(error))


class Calibration(nn.Module):
    """(B, H, W, C) in [0, 1] -> (x_avg (B, H, W, C) in (0, 1), R_τ): the calibrated images, as float32 arrays."""

    scales: tuple[int, ...] | None = None
    fourier: str = "amplitude"
    fuse: str = "add"
    penalty: str = "off_diagonal"
    bn_groups: int = 1

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> tuple[Array, Array]:
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise InputError(f"model.{name} '{value}' is unknown; {nearest(value, allowed)}")
        size = x.shape[1:3]
        scales = self.scales or (SCALES.get(size[0], ()) if size[0] == size[1] else ())
        if not scales or any(s < 2 or s % 2 for s in scales):
            raise InputError(
                f"model.scales={self.scales} for images of {size}: give even numbers, as {SCALES[32]}; "
                f"without, images are {' or '.join(f'{s}×{s}' for s in SCALES)}"
            )
        maps, penalties = [], []
        for i, s in enumerate(scales, 1):
            module = SingularRegularization(self.fourier, self.fuse, self.penalty, self.bn_groups, name=f"sr{i}")
            y, penalty = module(layers.resize(x, (s, s)), train)
            maps.append(layers.resize(jax.nn.sigmoid(y), size))  # the sigmoid is applied before the interpolation
            penalties.append(penalty)
        return jnp.mean(jnp.stack(maps), 0), jnp.sum(jnp.stack(penalties))


class Extractor(nn.Module):
    """c: (B, H, W, C) -> (B, H, W, widths[-1])."""

    widths: tuple[int, ...]
    basic_blocks: bool
    bn_groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        def norm_relu(x, name, conv=None):
            norm = layers.BatchNorm(groups=self.bn_groups, dtype=self.dtype, name=name)
            return layers.normed(x, train, norm, conv=conv, activation="relu")

        for i, width in enumerate(self.widths, 1):
            dtype = jnp.float32 if i == 1 else self.dtype  # float32 for pixels: see layers.py
            if self.basic_blocks:
                block = wide_resnet.Block(width, bn_groups=self.bn_groups, dtype=dtype, name=f"block{i}")
                x = block(x, train).astype(self.dtype)
            else:
                x = norm_relu(x, f"bn{i}", layers.Conv(width, dtype=self.dtype, pixels=i == 1, name=f"conv{i}"))
        return norm_relu(x, "bn") if self.basic_blocks else x


class Model(nn.Module):
    """(B, H, W, C) in [0, 1] -> (logits (B, num_classes), features).

    backbone: the section of the classifier, as dict(name="resnet", depth=18); its `dtype` and `bn_groups` apply to the
    added parts too. For the other options see above.
    """

    num_classes: int | None
    backbone: config.ModelSection
    connections: int = 3
    classify: str = "image"
    scales: tuple[int, ...] | None = None
    widths: tuple[int, ...] = (16, 32, 64)
    basic_blocks: bool = False
    fourier: str = "amplitude"
    fuse: str = "add"
    penalty: str = "off_diagonal"

    @nn.compact
    def __call__(
        self, x: Array, train: bool = False, edits: layers.Edits | layers.Taps | None = None
    ) -> tuple[Array, dict[str, Array]]:
        if not 0 <= self.connections <= len(TAPS) or not self.widths or min(self.widths) < 1:
            raise InputError(
                f"model.connections={self.connections}, model.widths={self.widths}: give 0 to {len(TAPS)} connections, "
                "and the width of one convolution or more"
            )
        if self.classify not in INPUTS:
            raise InputError(f"model.classify '{self.classify}' is unknown; {nearest(self.classify, INPUTS)}")
        dtype = layers.compute_dtype(self.backbone.get("dtype", "float32"))
        bn_groups = self.backbone.get("bn_groups", 1)
        tap = layers.Taps(edits)
        calibration = Calibration(self.scales, self.fourier, self.fuse, self.penalty, bn_groups, name="calibration")
        x_avg, penalty = calibration(x, train)
        x_avg = tap("x_avg", x_avg)
        tap("orthogonality", penalty)
        extracted = x_avg
        if self.connections:
            extracted = Extractor(self.widths, self.basic_blocks, bn_groups, dtype, name="extractor")(x_avg, train)

        def connection(i, edit):
            """An edit that adds f_i, built once the feature's shape is known, and then applies the caller's edit."""

            def add(feature):
                conv = layers.Conv(feature.shape[-1], use_bias=True, dtype=dtype, name=f"p{i}", parent=self)
                f = conv(extracted)
                factor = f.shape[1] // feature.shape[1]
                if f.shape[1:3] != (factor * feature.shape[1], factor * feature.shape[2]):
                    raise InputError(
                        f"model.connections: the images' size {f.shape[1:3]} is no multiple of that of the backbone's "
                        f"'{TAPS[i - 1]}', {feature.shape[1:3]}; give other images, or a backbone without a border"
                    )
                if factor != 1:
                    f = layers.AveragePool(factor, name=f"pool{i}", parent=self)(f)
                feature = layers.Add(name=f"add{i}", parent=self)(feature, tap(f"info{i}", f).astype(feature.dtype))
                return edit(feature) if edit else feature

            return add

        connected = {name: connection(i, tap.edits.get(name)) for i, name in enumerate(TAPS[: self.connections], 1)}
        tap.edits = {**tap.edits, **connected}
        options = dict(num_classes=self.num_classes, name="backbone")
        classifier = config.build("models", self.backbone, "model.backbone", **options)
        logits, features = classifier(x if self.classify == "image" else x_avg, train, edits=tap)
        for name in connected:
            if name not in features:
                raise InputError(f"model.connections={self.connections}: the backbone has no '{name}'; give fewer")
        return logits, tap.finish()
