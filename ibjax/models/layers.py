"""Layers that match PyTorch's initialisation, padding and batch-norm; input normalisation; and taps of features.

Parameters, batch statistics and logits are float32; convolutions and activations use `dtype`. The first convolution
takes float32 pixels (`pixels=True`), since bfloat16 would round away small perturbations, such as a start of 0.001·N(0,
1): on accelerators each pixel of a bfloat16 network is the sum of two bfloat16 numbers. These are dtypes of stored
arrays. How an accelerator rounds the operands of float32 products is the caller's choice: every product states the
precision that is asked for where the network is called (`ibjax.devices.precision`). What a layer computes differently
on CPU, GPU and TPU is in the table of `ibjax.devices.forms`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ibjax.devices import cores, precision
from ibjax.errors import InputError, nearest
from ibjax.models import gradients, packed
from ibjax.models.packed import Packed, unpacked

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

    def __call__(self, name: str, x: Any) -> Any:
        feature = unpacked(x)
        if name in self.edits:
            edited = self.edits[name](feature)
            if edited.shape != feature.shape:
                raise InputError(f"the edit of '{name}' returns {edited.shape}; the feature is {feature.shape}")
            x = feature = edited.astype(feature.dtype)
        self.features[name] = feature
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


def normed(
    x: Array | Packed,
    train: bool,
    norm: "BatchNorm | None",
    *,
    conv: "Conv | Dense | None" = None,
    skip: Array | Packed | None = None,
    activation: str | None = None,
    packs: bool = False,
) -> Any:
    """activation(norm(conv(x)) + skip); parts that are None are left out. The platform decides how it is computed.

    In evaluation mode, where the platform's form says so, batch-norm is folded into the convolution or linear layer
    before it, γ = scale/√(var + ε):

        norm(Wx + b) = (γW)x + γb + bias − γ·mean

    `activation` is a kind of `Activation`. `packs` says that a network can go on with packed maps, see
    `ibjax.models.packed`: x and skip may be such maps, and so is the result.
    """
    form = cores.form()
    if conv and not train and form.fold and not conv.is_initializing():
        options = dict(packs=True) if packs and form.rows == "packed" else {}
        y = conv.scaled(x, norm.affine() if norm else None, **options)
    else:
        y = x if conv is None else conv(x)
        if norm and train and norm.one_pass():
            y, skip = norm.with_relu(y, skip, activation == "relu"), None
            activation = None if activation == "relu" else activation
        else:
            y = y if norm is None else norm(y, train)
    if isinstance(y, Packed) and (skip is None or isinstance(skip, Packed)):
        y = y.maps if skip is None else skip.maps + y.maps
        return Packed(y if activation is None else Activation(activation)(y))
    y = unpacked(y) if skip is None else unpacked(skip) + unpacked(y)
    return y if activation is None else Activation(activation)(y)


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
    pixels: bool = False  # x are pixels, which stay float32: see above; the result has `dtype`
    groups: int = 1  # as many as channels: a depthwise convolution

    @nn.compact
    def __call__(self, x: Array) -> Array:
        fan_in = self.kernel**2 * x.shape[-1] // self.groups
        return nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            (self.stride, self.stride),
            padding=[self.pads()] * 2,
            feature_group_count=self.groups,
            use_bias=self.use_bias,
            kernel_init=self.kernel_init,
            bias_init=uniform_bias(fan_in) if self.bias_init is None else self.bias_init,
            dtype=self.computes_in(),
            conv_general_dilated=lambda x, kernel, *_, **__: self.convolve(x, kernel).astype(x.dtype),
            name="conv",
        )(x).astype(self.dtype)

    def scaled(self, x: Array | Packed, affine: tuple[Array, Array] | None, packs: bool = False) -> Array | Packed:
        """conv(x)·mul + add, (mul, add) = affine, (C,) float32, as one convolution; None: conv(x).

        The variables must exist. packs: whether maps may be packed from here on.
        """
        kernel, bias = _scaled(self.variables["params"]["conv"], affine)
        x, kernel, strides, padding, packs = packed.arranged(x, kernel, self.stride, self.pads(), packs)
        y = self._convolve(x, kernel, strides, padding)
        if bias is not None:
            y = y + per_channel(jnp.tile(bias, 1 + packs).astype(y.dtype), y)
        y = y.astype(self.dtype)
        return Packed(y) if packs else y

    def convolve(self, x: Array, kernel: Array) -> Array:
        """The convolution itself, without a bias."""
        return self._convolve(x, kernel, (self.stride, self.stride), [self.pads()] * 2)

    def _convolve(self, x, kernel, strides, padding):
        form = cores.form()
        if self.pixels and self.dtype == jnp.bfloat16 and form.stem == "split":
            by_product = form.stem_gradient == "product"
            return gradients.convolve_pixels(x, kernel, strides, padding, self.dtype, by_product)
        x, kernel = x.astype(self.computes_in()), kernel.astype(self.computes_in())
        stated = precision.stated()
        return cores.in_parts(lambda x: gradients.convolve(x, kernel, strides, padding, stated, self.groups))(x)

    def computes_in(self) -> Any:
        """The dtype of the operands."""
        return jnp.float32 if self.pixels else self.dtype

    def pads(self) -> tuple[int, int]:
        """The padding (before, after)."""
        pad = (self.kernel - 1) // 2 if self.padding is None else self.padding
        return (pad, pad) if isinstance(pad, int) else pad


def _scaled(weights, affine):
    """(kernel, bias or None) of a linear map; followed by ·mul + add for each output, where `affine` has these."""
    kernel = weights["kernel"]
    if affine is None:
        return kernel, weights.get("bias")
    mul, add = affine
    return kernel * per_channel(mul, kernel), weights["bias"] * mul + add if "bias" in weights else add


class Dense(nn.Module):
    """Linear layer with PyTorch's default initialisation."""

    features: int
    use_bias: bool = True
    kernel_init: Any = torch_uniform
    bias_init: Any = None  # None: PyTorch's default
    dtype: Any = jnp.float32
    precision: lax.Precision | None = None  # of the matrix product; None: what is asked for, see `devices.precision`

    @nn.compact
    def __call__(self, x: Array) -> Array:
        bias_init = uniform_bias(x.shape[-1]) if self.bias_init is None else self.bias_init
        return nn.Dense(
            self.features,
            self.use_bias,
            kernel_init=self.kernel_init,
            bias_init=bias_init,
            dtype=self.dtype,
            precision=self.states(),
            name="dense",
        )(x)

    def scaled(self, x: Array, affine: tuple[Array, Array] | None) -> Array:
        """dense(x)·mul + add, (mul, add) = affine, (C,) float32, as one linear layer; None: dense(x).

        The variables must exist.
        """
        kernel, bias = _scaled(self.variables["params"]["dense"], affine)
        y = jnp.matmul(x.astype(self.dtype), kernel.astype(self.dtype), precision=self.states())
        return y if bias is None else y + per_channel(bias.astype(self.dtype), y)

    def states(self) -> lax.Precision | None:
        """The precision of its product."""
        return precision.stated() if self.precision is None else self.precision


def dense_each(layers: Sequence[Dense], inputs: Sequence[Array]) -> Array:
    """Each of k linear layers on its own input (B, C), of one width C, as one product: (B, k, features).

    The variables must exist, biases too; layers of one dtype.
    """
    weights = [layer.variables["params"]["dense"] for layer in layers]
    kernel, bias = (jnp.stack([each[name] for each in weights]).astype(layers[0].dtype) for name in ("kernel", "bias"))
    x = jnp.stack(inputs).astype(layers[0].dtype)
    return jnp.einsum("kbc,kcd->bkd", x, kernel, precision=layers[0].states()) + bias[None]


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
    def __call__(self, x: Any, train: bool) -> Any:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        self.variable("batch_stats", "var", jnp.ones, (channels,))
        if not train:  # packed maps too
            mul, add = self.affine()
            if isinstance(x, Packed):
                return Packed(self._evaluated(x.maps, jnp.tile(mul, 2), jnp.tile(add, 2)))
            return self._evaluated(x, mul, add)

        scale, bias = per_channel(scale, x), per_channel(bias, x)
        check_groups(self.groups, x)
        grouped = x.astype(jnp.float32).reshape((self.groups, -1, *x.shape[1:]))  # (G, B/G, …, C)
        axes = tuple(range(1, grouped.ndim - 1))
        mean = jnp.mean(grouped, axes, keepdims=True)
        var = jnp.mean(jnp.square(grouped - mean), axes, keepdims=True)
        if not self.is_initializing():
            n = grouped.size // (self.groups * channels)
            unbiased = var * (n / max(n - 1, 1))
            self._update(*(jnp.mean(batch.reshape(self.groups, channels), 0) for batch in (mean, unbiased)))
        y = (grouped - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale[None]) + bias[None]
        return y.reshape(x.shape).astype(self.dtype)

    def _evaluated(self, x, mul, add):
        if cores.form().norm_gradient == "network":
            return gradients.scale_shift(x, mul, add, self.dtype)
        return (x.astype(jnp.float32) * per_channel(mul, x) + per_channel(add, x)).astype(self.dtype)

    def one_pass(self) -> bool:
        """Whether training mode reads the batch once for both moments: see `gradients.norm_add_relu`."""
        return self.groups == 1 and cores.form().norm == "one pass" and not self.is_initializing()

    def with_relu(self, x: Array, skip: Array | None, relu: bool) -> Array:
        """relu(norm(x) + skip) in training mode, in one pass; updates the running statistics, which must exist."""
        params, running = self.variables["params"], self.variables["batch_stats"]
        shift = jnp.where(jnp.isfinite(running["mean"]), running["mean"], 0.0)  # a NaN must not outlive its batch
        arguments = (x, params["scale"], params["bias"], lax.stop_gradient(shift), skip, self.epsilon, relu)
        made: Any = gradients.norm_add_relu(*arguments)
        y, mean, var = made
        n = x.size // x.shape[-1]
        self._update(mean, var * (n / max(n - 1, 1)))
        return y.astype(self.dtype)

    def _update(self, mean, var):
        """Moves the running statistics towards a batch's mean and unbiased variance."""
        for name, batch in (("mean", mean), ("var", var)):
            running = self.get_variable("batch_stats", name)
            moved = self.keep * running + (1 - self.keep) * lax.stop_gradient(batch)
            self.put_variable("batch_stats", name, moved)

    def affine(self) -> tuple[Array, Array]:
        """(mul, add), (C,) float32: in evaluation mode y = x·mul + add; the variables must exist."""
        params, running = self.variables["params"], self.variables["batch_stats"]
        mul = params["scale"] * jax.lax.rsqrt(running["var"] + self.epsilon)
        return mul, params["bias"] - running["mean"] * mul


def norm_each(norms: Sequence[BatchNorm], x: Array, train: bool) -> Array:
    """Each of k batch-norms on its own part of x (B, k, C), as one of k·C channels; the variables must exist."""
    whole = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(dict(norm.variables) for norm in norms))
    collections: Any = ["batch_stats"] if train else False
    made: Any = norms[0].clone(parent=None).apply(whole, x.reshape(len(x), -1), train, mutable=collections)
    y, updated = made if train else (made, {})
    for name, values in updated.get("batch_stats", {}).items():
        for norm, part in zip(norms, jnp.split(values, len(norms)), strict=True):
            norm.put_variable("batch_stats", name, part)
    return y.reshape(x.shape)


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
        relu = gradients.relu_by_output if cores.form().relu == "output" else nn.relu
        functions = {"relu": relu, "silu": nn.silu, "gelu": lambda x: nn.gelu(x, approximate=False)}
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
        if self.window == self.stride and not self.padding and cores.form().max_pool == "own":
            return gradients.max_of_windows(x, self.window)
        return nn.max_pool(
            x, (self.window, self.window), (self.stride, self.stride), padding=[(self.padding, self.padding)] * 2
        )


class GlobalAverage(nn.Module):
    """(B, H, W, C) -> (B, C), the spatial mean, summed in float32."""

    @nn.compact
    def __call__(self, x: Array | Packed) -> Array:
        return global_average(unpacked(x))


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
        if cores.form().average_pool == "window":
            window = (self.factor, self.factor)
            return nn.pool(x, 0.0, lax.add, window, window, "VALID") / self.factor**2
        return x.reshape(b, h // self.factor, self.factor, w // self.factor, self.factor, c).mean((2, 4))


def resize(x: Array, size: tuple[int, int]) -> Array:
    """(B, H, W, C) -> (B, *size, C), bilinear between pixel centres and without anti-aliasing, PyTorch's default.

    Along each axis it computes y_i = Σ_j w_ij·x_j, in float32 whatever the accelerator's default precision is: on a CPU
    as a matrix product of precision HIGHEST, on a GPU as an elementwise product and a sum, on a TPU from the two pixels
    next to each new one. XLA's GPU compiler (jax 0.10.2) finds no tiling for such a product with three channels, while
    the sum is one pass over memory. With XLA's CPU compiler, the gradient of the sum recomputes its inputs for each
    term and is up to 200 times slower than that of the matrix product.
    """
    form = cores.form().resize
    if form == "product":
        return jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), "bilinear", antialias=False)
    for axis, length in zip((1, 2), size, strict=True):
        if x.shape[axis] != length:
            x = _from_neighbours(x, axis, length) if form == "neighbours" else _as_sum(x, axis, length)
    return x


def _as_sum(x, axis, length):
    weights = _bilinear(x.shape[axis], length)
    terms = [1] * (x.ndim + 1)
    terms[axis : axis + 2] = weights.shape
    return jnp.sum(jnp.asarray(weights, x.dtype).reshape(terms) * jnp.expand_dims(x, axis), axis + 1)


def _bilinear(n, length):
    """(length, n): the weight of each old pixel in each new one, falling linearly to 0 at a distance of one pixel."""
    centres = (np.arange(length) + 0.5) * n / length - 0.5
    weights = np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(n)))
    return weights / weights.sum(1, keepdims=True)  # at the border a neighbour is missing


def _from_neighbours(x, axis, length):
    """The resized axis. The weights repeat after every `old` pixels of x and `new` of the result.

    The i-th new pixels of all periods are a weighted sum of two strided slices of x.
    """
    periods = math.gcd(x.shape[axis], length)
    old, new = x.shape[axis] // periods, length // periods
    around = int(new > old)  # only new pixels that are closer than the old ones look beyond the border
    padded = jnp.pad(x, [(around, around) if i == axis else (0, 0) for i in range(x.ndim)], mode="edge")
    stop = (periods - 1) * old + 1
    pixels = []
    for i in range(new):
        low, weight = divmod((i + 0.5) * old / new - 0.5, 1)
        start = int(low) + around
        first, second = (lax.slice_in_dim(padded, i, i + stop, old, axis) for i in (start, start + (weight > 0)))
        pixels.append((1 - weight) * first + weight * second)
    shape = (*x.shape[:axis], length, *x.shape[axis + 1 :])
    return jnp.stack(pixels, axis + 1).reshape(shape)


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
