"""Layers that match PyTorch's initialisation, padding and batch-norm; input normalisation; and taps of features.

Parameters, batch statistics and logits are float32; convolutions and activations use `dtype`. The first convolution is
always float32, since bfloat16 pixels would round away small perturbations, such as a start of 0.001·N(0, 1). These are
dtypes of arrays. How an accelerator rounds the operands of float32 products is the caller's choice; JAX's default is
TensorFloat-32 on a GPU and bfloat16 on a TPU (docs/precision.md).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ibjax.devices import cores
from ibjax.errors import InputError, nearest

# U(−1/√fan_in, 1/√fan_in): PyTorch's default for convolutions and linear layers (kaiming_uniform with a=√5)
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# N(0, 2/(k²·C_out)): the published WideResNets, and torchvision's ResNets
fan_out_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# N(0, 2/fan_in): TRADES's network for MNIST
kaiming_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def uniform_bias(fan_in: int):
    """PyTorch's default bias initialiser, U(−1/√fan_in, 1/√fan_in)."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


# initialisation of linear layers, by name: "torch" is PyTorch's default; "xavier" is TensorFlow's, with weights
# U(±√(6/(fan_in + fan_out))) and zero biases
LINEAR_INITS: dict[str, dict[str, Any]] = {
    "torch": {},
    "xavier": dict(kernel_init=nn.initializers.xavier_uniform(), bias_init=nn.initializers.zeros),
}


def linear_init(name: str) -> dict[str, Any]:
    """The options of `Dense` called `name` in LINEAR_INITS; raises InputError on an unknown name."""
    if name not in LINEAR_INITS:
        raise InputError(f"model.linear_init '{name}' is unknown; {nearest(name, LINEAR_INITS)}")
    return LINEAR_INITS[name]


Edits = Mapping[str, Callable[[Array], Array]]  # name of a feature -> function that replaces it


class Taps:
    """The features of one forward pass, by name, and the caller's edits of them.

        x = tap("stage1", x)          records and returns edits["stage1"](x), or x if there is no such edit

    so the layers after a tap receive the edited feature. A model inside another model gets the outer model's `Taps` as
    its `edits`. Both then write to one dict of features, and only the outer model can tell whether an edit's name is
    unknown.
    """

    def __init__(self, edits: "Edits | Taps | None" = None):
        self.inner = isinstance(edits, Taps)
        self.edits: Edits = edits.edits if isinstance(edits, Taps) else edits or {}
        self.features: dict[str, Array] = edits.features if isinstance(edits, Taps) else {}

    def __call__(self, name: str, x: Array) -> Array:
        if name in self.edits:
            edited = self.edits[name](x)
            if edited.shape != x.shape:
                raise InputError(f"the edit of '{name}' returns {edited.shape}; the feature is {x.shape}")
            x = edited.astype(x.dtype)
        self.features[name] = x
        return x

    def finish(self) -> dict[str, Array]:
        """All features; raises InputError if an edit names a feature that does not exist."""
        for name in () if self.inner else self.edits:
            if name not in self.features:
                raise InputError(f"edits: there is no feature '{name}'; {nearest(name, self.features)}")
        return self.features


def remat(block: Callable[..., Array], wanted: bool) -> Callable[..., Array]:
    """`block(module, x, …)`; if wanted, with rematerialisation: the backward pass recomputes activations.

    Only the block's arguments are stored. Networks use it in training mode, with `remat=True`: the gradients are the
    same, a gradient costs up to one more forward pass, and memory use falls. It is not used in evaluation mode, where
    an attack stores less anyway, since it needs no gradients of weights.
    """
    return nn.remat(block) if wanted else block


class Conv(nn.Module):
    """Convolution with PyTorch's explicit symmetric padding ("SAME" would pad stride-2 layers on one side only)."""

    features: int
    kernel: int = 3
    stride: int = 1
    padding: int | tuple[int, int] | None = None  # (before, after); None: (kernel − 1) // 2
    use_bias: bool = False
    kernel_init: Any = torch_uniform
    bias_init: Any = None  # None: PyTorch's default
    dtype: Any = jnp.float32
    groups: int = 1  # as many as channels: a depthwise convolution

    @nn.compact
    def __call__(self, x: Array) -> Array:
        pad = (self.kernel - 1) // 2 if self.padding is None else self.padding
        before, after = (pad, pad) if isinstance(pad, int) else pad
        fan_in = self.kernel**2 * x.shape[-1] // self.groups
        return nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            (self.stride, self.stride),
            padding=[(before, after)] * 2,
            feature_group_count=self.groups,
            use_bias=self.use_bias,
            kernel_init=self.kernel_init,
            bias_init=uniform_bias(fan_in) if self.bias_init is None else self.bias_init,
            dtype=self.dtype,
            conv_general_dilated=_convolve,
            name="conv",
        )(x)


def _convolve(x, kernel, *args, **kwargs):
    return cores.in_parts(lambda x: lax.conv_general_dilated(x, kernel, *args, **kwargs))(x)


class Dense(nn.Module):
    """Linear layer with PyTorch's default initialisation."""

    features: int
    use_bias: bool = True
    kernel_init: Any = torch_uniform
    bias_init: Any = None  # None: PyTorch's default
    dtype: Any = jnp.float32
    precision: lax.PrecisionLike = None  # precision of the matrix product; None: JAX's default

    @nn.compact
    def __call__(self, x: Array) -> Array:
        bias_init = uniform_bias(x.shape[-1]) if self.bias_init is None else self.bias_init
        return nn.Dense(
            self.features,
            self.use_bias,
            kernel_init=self.kernel_init,
            bias_init=bias_init,
            dtype=self.dtype,
            precision=self.precision,
            name="dense",
        )(x)


def classifier(x: Array, num_classes: int | None, **options: Any) -> Array:
    """The final linear layer, in float32; with `num_classes=None`, x itself: a backbone for another head."""
    x = x.astype(jnp.float32)
    return x if num_classes is None else Dense(num_classes, **options, name="head")(x)


def compute_dtype(name: str) -> Any:
    """The dtype for a model's computations; raises InputError on names other than "float32" and "bfloat16"."""
    if name not in ("float32", "bfloat16"):
        raise InputError(f"model.dtype '{name}' is unknown; {nearest(name, ('float32', 'bfloat16'))}")
    return jnp.dtype(name)


def check_groups(groups: int, x: Array) -> None:
    """Raises InputError unless the batch size is a multiple of the number of groups."""
    if groups < 1 or x.shape[0] % groups:
        raise InputError(f"model.bn_groups={groups} does not divide a batch of {x.shape[0]}")


class BatchNorm(nn.Module):
    """Batch-norm with PyTorch's running statistics: the buffer takes the *unbiased* batch variance.

        train:  y = (x − mean_B) / √(var_B + ε) · scale + bias        running ← keep·running + (1 − keep)·batch
        eval:   the same with the running mean and variance

    Statistics are float32 and over the whole global batch, so they do not depend on the number of devices. `groups` > 1
    splits the batch into that many equal parts and normalises each with its own statistics, as data-parallel training
    without synchronised batch-norm does; the running statistics then use the average over the groups.
    """

    keep: float = 0.9  # PyTorch's momentum is 1 − keep
    epsilon: float = 1e-5
    groups: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        channels = x.shape[-1]
        scale = per_channel(self.param("scale", nn.initializers.ones, (channels,)), x)
        bias = per_channel(self.param("bias", nn.initializers.zeros, (channels,)), x)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        if not train:
            mul = scale * jax.lax.rsqrt(per_channel(running_var.value, x) + self.epsilon)
            add = bias - per_channel(running_mean.value, x) * mul
            return (x.astype(jnp.float32) * mul + add).astype(self.dtype)

        check_groups(self.groups, x)
        grouped = x.astype(jnp.float32).reshape((self.groups, -1, *x.shape[1:]))  # (G, B/G, …, C)
        axes = tuple(range(1, grouped.ndim - 1))
        mean = jnp.mean(grouped, axes, keepdims=True)
        var = jnp.mean(jnp.square(grouped - mean), axes, keepdims=True)
        if not self.is_initializing():
            n = grouped.size // (self.groups * channels)
            unbiased = var * (n / max(n - 1, 1))
            for running, batch in ((running_mean, mean), (running_var, unbiased)):
                batch = jax.lax.stop_gradient(jnp.mean(batch.reshape(self.groups, channels), 0))
                running.value = self.keep * running.value + (1 - self.keep) * batch
        y = (grouped - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale[None]) + bias[None]
        return y.reshape(x.shape).astype(self.dtype)


def per_channel(values: Array, x: Array) -> Array:
    """(C,) -> (1, …, 1, C), which broadcasts against x."""
    return values.reshape((1,) * (x.ndim - 1) + (-1,))


def normalize(x: Array, mean: Sequence[float] | None, std: Sequence[float] | None) -> Array:
    """(x − mean) / std per channel; x if both are None. Raises InputError unless there is one value per channel."""
    if mean is None and std is None:
        return x
    channels = x.shape[-1]
    if mean is None or std is None or len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise InputError(f"model.mean={mean}, model.std={std}: give both, {channels} numbers each, std above 0")
    return (x - per_channel(jnp.asarray(mean, x.dtype), x)) / per_channel(jnp.asarray(std, x.dtype), x)


def standardize(x: Array) -> Array:
    """Subtracts each image's mean and divides by its standard deviation, or by 1/√(H·W·C) if that is larger.

    This is TensorFlow's per_image_standardization, but with PyTorch's standard deviation, which divides by H·W·C − 1,
    as in advertorch.
    """
    n = x.size // len(x)
    centred = x - jnp.mean(x, axis=(1, 2, 3), keepdims=True)
    variance = jnp.sum(jnp.square(centred), axis=(1, 2, 3), keepdims=True) / (n - 1)
    return centred * lax.rsqrt(jnp.maximum(variance, 1 / n))


def zero_border(x: Array, width: int) -> Array:
    """(B, H, W, C) with `width` zeros on each side of H and W; raises InputError on a negative width."""
    if width < 0:
        raise InputError(f"model.border={width} is not allowed; give a whole number of at least 0")
    return jnp.pad(x, ((0, 0), (width, width), (width, width), (0, 0))) if width else x


# Operations without parameters are modules too, so that code that intercepts module calls (`analysis.complexity`) sees
# them.


class Activation(nn.Module):
    """ReLU; SiLU (also called Swish), x·sigmoid(x); or GELU, x·Φ(x) with the exact normal distribution function."""

    kind: str = "relu"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        functions = {"relu": nn.relu, "silu": nn.silu, "gelu": functools.partial(nn.gelu, approximate=False)}
        if self.kind not in functions:
            raise InputError(f"model.activation '{self.kind}' is unknown; {nearest(self.kind, functions)}")
        return functions[self.kind](x)


class Add(nn.Module):
    """x + y."""

    @nn.compact
    def __call__(self, x: Array, y: Array) -> Array:
        return x + y


class MaxPool(nn.Module):
    """Max-pooling; rows and columns that do not fill a window are dropped, as in PyTorch."""

    window: int = 2
    stride: int = 2
    padding: int = 0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if min(x.shape[1:3]) + 2 * self.padding < self.window:
            raise InputError(
                f"images are too small for the model: a map of {x.shape[1:3]} cannot be pooled; use fewer stages"
            )
        if self.window == self.stride and not self.padding:
            return _max_of_windows(x, self.window)
        return nn.max_pool(
            x, (self.window, self.window), (self.stride, self.stride), padding=[(self.padding, self.padding)] * 2
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_of_windows(x, size):
    """Max-pooling with windows that do not overlap; among equal values the first receives the gradient, as usual.

    The gradient is implemented here because XLA's (select-and-scatter) takes three times as long on CPUs, longer than
    the neighbouring convolutions. The forward pass keeps where each maximum is. To look for the value again would not
    be safe: where XLA computes x twice, in two fusions, the two results may differ in their last bit.
    """
    return nn.max_pool(x, (size, size), (size, size))


def _max_forward(x, size):
    b, h, w, c = x.shape[0], x.shape[1] // size, x.shape[2] // size, x.shape[3]
    windows = x[:, : h * size, : w * size].reshape(b, h, size, w, size, c)
    pooled, place = windows[:, :, 0, :, 0], jnp.zeros((b, h, w, c), jnp.int8 if size < 12 else jnp.int32)
    for i in range(1, size**2):
        value = windows[:, :, i // size, :, i % size]
        place = jnp.where(value > pooled, i, place)
        pooled = jnp.maximum(pooled, value)
    return pooled, (place, x.shape)


def _max_backward(size, saved, gradient):
    place, shape = saved
    b, h, w, c = gradient.shape
    spread = lambda a: a[:, :, None, :, None]  # noqa: E731  (b, h, 1, w, 1, c)
    places = jnp.arange(size**2, dtype=place.dtype).reshape(1, 1, size, 1, size, 1)
    back = jnp.where(places == spread(place), spread(gradient), 0).reshape(b, h * size, w * size, c)
    return (jnp.pad(back, ((0, 0), (0, shape[1] - h * size), (0, shape[2] - w * size), (0, 0))),)


_max_of_windows.defvjp(_max_forward, _max_backward)


class GlobalAverage(nn.Module):
    """(B, H, W, C) -> (B, C), the spatial mean, summed in float32."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return global_average(x)


def global_average(x: Array) -> Array:
    """(B, H, W, C) -> (B, C), the spatial mean, summed in float32."""
    return jnp.mean(x.astype(jnp.float32), axis=(1, 2))


class AdaptiveAverage(nn.Module):
    """(B, H, W, C) -> (B, size, size, C), PyTorch's adaptive average pooling.

    Cell i is the mean of rows floor(i·H/size) to ceil((i + 1)·H/size) − 1, and likewise for columns. The pixels of a
    map smaller than `size` are repeated.
    """

    size: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for axis in (1, 2):
            length = x.shape[axis]
            bounds = [(i * length // self.size, -(-(i + 1) * length // self.size)) for i in range(self.size)]
            cells = [jnp.mean(lax.slice_in_dim(x, *bound, axis=axis), axis, keepdims=True) for bound in bounds]
            x = jnp.concatenate(cells, axis)
        return x


class AveragePool(nn.Module):
    """Average-pooling with windows of `factor`×`factor`; height and width must be multiples of `factor`."""

    factor: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        if h % self.factor or w % self.factor:
            raise InputError(f"a map of {(h, w)} does not divide into windows of {self.factor}×{self.factor}")
        return x.reshape(b, h // self.factor, self.factor, w // self.factor, self.factor, c).mean((2, 4))


def resize(x: Array, size: tuple[int, int]) -> Array:
    """(B, H, W, C) -> (B, *size, C), bilinear between pixel centres and without anti-aliasing, PyTorch's default.

    Along each axis it computes y_i = Σ_j w_ij·x_j, in float32 whatever the accelerator's default precision is: on a CPU
    as a matrix product of precision HIGHEST, elsewhere as an elementwise product and a sum. XLA's GPU compiler (jax
    0.10.2) finds no tiling for such a product with three channels, while the sum is one pass over memory. With XLA's
    CPU compiler, the gradient of the sum recomputes its inputs for each term and is up to 200 times slower than that of
    the matrix product.
    """
    if cores.on_cpu():
        return jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), "bilinear", antialias=False)
    for axis, length in zip((1, 2), size, strict=True):
        if x.shape[axis] != length:
            weights = _bilinear(x.shape[axis], length)
            terms = [1] * (x.ndim + 1)
            terms[axis : axis + 2] = weights.shape
            x = jnp.sum(jnp.asarray(weights, x.dtype).reshape(terms) * jnp.expand_dims(x, axis), axis + 1)
    return x


def _bilinear(n, length):
    """(length, n): the weight of each old pixel in each new one, falling linearly to 0 at a distance of one pixel."""
    centres = (np.arange(length) + 0.5) * n / length - 0.5
    weights = np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(n)))
    return weights / weights.sum(1, keepdims=True)  # at the border a neighbour is missing


def pixel_unshuffle(x: Array, factor: int = 2) -> Array:
    """(B, H, W, C) -> (B, H/factor, W/factor, C·factor²): each window becomes channels, in PyTorch's order."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // factor, factor, w // factor, factor, c)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(b, h // factor, w // factor, c * factor**2)


def pixel_shuffle(x: Array, factor: int = 2) -> Array:
    """The inverse of `pixel_unshuffle`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, c // factor**2, factor, factor)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(b, h * factor, w * factor, c // factor**2)
