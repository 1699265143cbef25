"""Optimisers and learning-rate schedules as the papers' PyTorch code has them.

    sgd:   g ← g + wd·w;  buf ← m·buf + g;  w ← w − lr·buf         (coupled weight decay, on every parameter)
           m may follow the learning rate, from `momentum` at rate 0 to `momentum_at_peak` at the highest: the momentum
           cycles of PyTorch's CyclicLR and OneCycleLR
    adam:  g ← g + wd·w;  w ← w − lr·Adam(g)                       (L2 regularisation)
    adamw: w ← w − lr·(Adam(g) + wd·w)                             (Loshchilov & Hutter, ICLR 2019: decoupled)

`decay_norm=False`, `decay_norm_and_bias=False` and `decay_bias=False` spare parameters from weight decay. DeepMind's
robust training adds ½·wd·‖w‖² to the loss for all but the parameters of batch-norm: that is sgd with decay_norm=False.

A schedule is a function of the epoch, a real number. `stepping` says at which epoch it is evaluated for a step:

| stepping    | the epoch, with n steps per epoch | used by                                                            |
|-------------|-----------------------------------|--------------------------------------------------------------------|
| "epoch"     | floor(step / n)                   | PyTorch's schedulers, stepped once per epoch                       |
| "step"      | step / n                          |                                                                    |
| "next_step" | (step + 1) / n                    | Rice et al., AWP: a drop at epoch 100 already applies to the last  |
|             |                                   | batch of epoch 99                                                  |
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ibjax.calls import call_arguments, factory
from ibjax.errors import CodeError, InputError, check_range, nearest

STEPPINGS = {
    "epoch": lambda step, n: step // n,
    "step": lambda step, n: epoch_of(step, n),
    "next_step": lambda step, n: epoch_of(step + 1, n),
}


def epoch_of(step: Array, n: int) -> Array:
    """step / n as float32, the epoch as a real number; its floor is exact, where a compiled division may fall short."""
    whole, rest = jnp.divmod(step, n)
    return whole.astype(jnp.float32) + rest.astype(jnp.float32) / n


def constant(*, lr: float, epochs: float) -> Callable[[Array], Array]:
    """The same learning rate throughout."""
    return lambda epoch: jnp.full_like(epoch, lr)


def piecewise(
    *,
    lr: float,
    epochs: float,
    boundaries: tuple[float, ...] = (100, 150),
    factor: float | tuple[float, ...] = 0.1,
) -> Callable:
    """lr, multiplied at each boundary (in epochs) by `factor`: one number, or one for each boundary."""
    if not isinstance(factor, tuple):
        return lambda epoch: lr * factor ** sum((epoch >= b).astype(jnp.float32) for b in boundaries)
    if len(factor) != len(boundaries):
        raise InputError(
            f"schedule.factor has {len(factor)} values for {len(boundaries)} boundaries; give one for each"
        )
    return lambda epoch: lr * math.prod(jnp.where(epoch >= b, f, 1.0) for b, f in zip(boundaries, factor, strict=True))


def cosine(*, lr: float, epochs: float, final: float = 0.0, warmup: float = 0.0) -> Callable:
    """Half a cosine from lr to `final`, after `warmup` epochs of linear rise."""

    def schedule(epoch):
        done = jnp.clip((epoch - warmup) / max(epochs - warmup, 1e-9), 0.0, 1.0)
        value = final + 0.5 * (lr - final) * (1 + jnp.cos(jnp.pi * done))
        return jnp.where(epoch < warmup, lr * epoch / max(warmup, 1e-9), value)

    return schedule


def exponential(*, lr: float, epochs: float, factor: float = 0.97, every: float = 2) -> Callable:
    """lr, multiplied by `factor` after each `every` epochs."""
    return lambda epoch: lr * factor ** jnp.floor(epoch / every + 1e-5)  # a compiled division may fall short of it


def one_cycle(*, lr: float, epochs: float, peak: float = 0.4, final: float = 0.0) -> Callable:
    """Rises linearly from 0 to lr at the fraction `peak` of training, then falls linearly to `final` (Fast-AT)."""

    def schedule(epoch):
        return jnp.interp(epoch, jnp.array([0.0, peak * epochs, epochs]), jnp.array([0.0, lr, final]))

    return schedule


def torch_one_cycle(
    *,
    lr: float,
    epochs: float,
    step_in_epochs: float,
    pct_start: float = 0.3,
    anneal: str = "cos",
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> Callable:
    """PyTorch's OneCycleLR: from lr/div_factor up to lr, then down to lr/(div_factor·final_div_factor).

    The peak is at the step pct_start·T − 1 of T, the end at T − 1; a step is an epoch with stepping="epoch", as Wang et
    al. (2023) step it (with pct_start=0.025), and an optimiser's step otherwise. `anneal` is "cos" or "linear".

    By default PyTorch's OneCycleLR also cycles the momentum, from 0.95 to 0.85 at the peak and back.
    `optimizer.momentum=0.95` with `optimizer.momentum_at_peak=0.85` reproduces this, to 0.004 during the rise and
    exactly afterwards.
    """
    if anneal not in ("cos", "linear"):
        raise InputError(f"schedule.anneal='{anneal}' is unknown; {nearest(anneal, ('cos', 'linear'))}")
    check_range("schedule.pct_start", pct_start, 0, 1)
    check_range("schedule.div_factor", div_factor, 1e-6)
    check_range("schedule.final_div_factor", final_div_factor, 1e-6)
    first, last = lr / div_factor, lr / div_factor / final_div_factor
    peak, end = pct_start * epochs - step_in_epochs, epochs - step_in_epochs

    def between(one, other, done):
        done = jnp.clip(done, 0.0, 1.0)
        return one + (other - one) * (done if anneal == "linear" else 0.5 * (1.0 - jnp.cos(jnp.pi * done)))

    def schedule(epoch):
        rise, fall = epoch / max(peak, 1e-9), (epoch - peak) / max(end - peak, 1e-9)
        return jnp.where(epoch <= peak, between(first, lr, rise), between(lr, last, fall))

    return schedule


def linear(*, lr: float, epochs: float, points: tuple[tuple[float, float], ...] = ((0.0, 1.0),)) -> Callable:
    """Interpolates linearly between `points` (epoch, factor of lr); constant before the first and after the last."""
    times = [epoch for epoch, _ in points]
    if not times or any(later <= earlier for earlier, later in itertools.pairwise(times)):
        raise InputError(f"schedule.points={points} is not allowed; give pairs (epoch, factor) of rising epochs")
    times, factors = jnp.array(times, jnp.float32), jnp.array([factor for _, factor in points], jnp.float32)
    return lambda epoch: lr * jnp.interp(epoch, times, factors)


SCHEDULES = {f.__name__: f for f in (constant, piecewise, cosine, one_cycle, torch_one_cycle, linear, exponential)}


def own_schedule(source: Any, made: Any, options: Any) -> Callable[[Array], Array]:
    """The schedule that a factory of the user's own has made; CodeError unless it maps an epoch to one number."""
    if not callable(made):
        raise CodeError(f"{source} is a {type(made).__name__}; return a function of the epoch")
    shape = jax.eval_shape(lambda epoch: jnp.asarray(made(epoch)), jax.ShapeDtypeStruct((), jnp.float32)).shape
    if shape:
        raise CodeError(f"{source} returns an array of shape {shape}; return the learning rate of an epoch, one number")
    return lambda epoch: jnp.asarray(made(epoch), jnp.float32)


def default_stepping(name: str) -> str:
    """The value that `stepping=None` stands for with this schedule."""
    return "step" if name in ("one_cycle", "torch_one_cycle", "cosine", "linear") else "epoch"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """step (int) -> learning rate."""

    rate: Callable[[Array], Array]
    peak: float  # the configured learning rate: the value at which `rate` starts, or to which it rises

    def __call__(self, step: Any) -> Array:
        return self.rate(step)


def schedule(
    *, name: str, lr: float, epochs: float, steps_per_epoch: int, stepping: str | None = None, **options: Any
) -> Schedule:
    """The schedule made by the function called `name` in SCHEDULES; `options` are the arguments of that function."""
    make = factory("schedules", name)
    call_arguments(make, name, options, "schedule", ("lr", "epochs", "step_in_epochs"))
    stepping = stepping or default_stepping(name)
    if stepping not in STEPPINGS:
        raise InputError(f"schedule.stepping '{stepping}' is unknown; {nearest(stepping, STEPPINGS)}")
    if make is torch_one_cycle:
        options["step_in_epochs"] = 1.0 if stepping == "epoch" else 1.0 / steps_per_epoch
    value = make(lr=lr, epochs=epochs, **options)
    epoch = STEPPINGS[stepping]
    return Schedule(lambda step: value(jnp.asarray(epoch(jnp.asarray(step), steps_per_epoch), jnp.float32)), lr)


def sgd(
    *,
    lr: Callable,
    momentum: float = 0.9,
    momentum_at_peak: float | None = None,
    weight_decay: float = 5e-4,
    nesterov: bool = False,
    decay_norm: bool = True,
    decay_norm_and_bias: bool = True,
    decay_bias: bool = True,
) -> optax.GradientTransformation:
    """PyTorch's SGD.

    Args:
      lr: step -> learning rate.
      momentum: m. With `momentum_at_peak`, its value at learning rate 0.
      momentum_at_peak: m at the highest learning rate; in between, m is linear in the rate, as in PyTorch's CyclicLR,
        which moves it from 0.9 to 0.8 and back, and in its OneCycleLR, from 0.95 to 0.85. None: m is constant.
      weight_decay: wd.
      nesterov: PyTorch's Nesterov form.
      decay_norm: False excludes scale and bias of batch-norm from weight decay (Fast-AT on ImageNet).
      decay_norm_and_bias: False excludes every one-dimensional parameter, biases of linear layers included.
      decay_bias: False excludes the biases of all layers and norms, and leaves scales (Singh et al.'s ConvNeXts).
    """
    check_range("optimizer.momentum", momentum, 0, 1, below=True)
    if nesterov and not (momentum or momentum_at_peak):
        raise InputError("optimizer.nesterov needs a momentum; set optimizer.momentum, or leave nesterov False")
    check_range("optimizer.weight_decay", weight_decay, 0)
    return optax.chain(
        optax.add_decayed_weights(weight_decay, _decayed(decay_norm, decay_norm_and_bias, decay_bias)),
        _trace(lr, momentum, momentum_at_peak, nesterov),
        optax.scale_by_learning_rate(lr),
    )


def _decayed(decay_norm, decay_norm_and_bias, decay_bias):
    """The mask of parameters that decay, as a function of the parameters; None: all of them."""
    if decay_norm and decay_norm_and_bias and decay_bias:
        return None

    def mask(params, name="", of_norm=False):
        if isinstance(params, optax.MaskedNode):  # in the place of a group that another optimiser trains
            return False
        if isinstance(params, Mapping):  # normalisations are the only modules with a `scale`
            return {key: mask(part, key, "scale" in params) for key, part in params.items()}
        spared = (
            of_norm and not decay_norm,
            params.ndim <= 1 and not decay_norm_and_bias,
            name == "bias" and not decay_bias,
        )
        return not any(spared)

    return mask


class _MovingTrace(NamedTuple):
    count: Array  # steps done
    trace: Any


def _trace(lr, momentum, momentum_at_peak, nesterov):
    """buf ← m·buf + g, with m constant or a function of the learning rate."""
    if momentum_at_peak is None:
        return optax.trace(momentum, nesterov) if momentum else optax.identity()
    check_range("optimizer.momentum_at_peak", momentum_at_peak, 0, 1, below=True)
    if not isinstance(lr, Schedule):
        raise InputError("optimizer.momentum_at_peak follows a schedule of the rate; give lr=optim.schedule(…)")

    def init(params):
        return _MovingTrace(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(gradients, state, params=None):
        m = momentum + (momentum_at_peak - momentum) * lr(state.count) / lr.peak
        trace = jax.tree.map(lambda g, buffer: g + m * buffer, gradients, state.trace)
        updates = jax.tree.map(lambda g, buffer: g + m * buffer, gradients, trace) if nesterov else trace
        return updates, _MovingTrace(optax.safe_increment(state.count), trace)

    return optax.GradientTransformation(init, update)


def adam(
    *,
    lr: Callable,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_norm: bool = True,
    decay_norm_and_bias: bool = True,
    decay_bias: bool = True,
) -> optax.GradientTransformation:
    """PyTorch's Adam: weight decay is added to the gradient before the moments are computed (L2 regularisation)."""
    _check_adam(b1, b2, eps, weight_decay)
    return optax.chain(
        optax.add_decayed_weights(weight_decay, _decayed(decay_norm, decay_norm_and_bias, decay_bias)),
        _moments(b1, b2, eps),
        optax.scale_by_learning_rate(lr),
    )


def adamw(
    *,
    lr: Callable,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    decay_norm: bool = True,
    decay_norm_and_bias: bool = True,
    decay_bias: bool = True,
) -> optax.GradientTransformation:
    """PyTorch's AdamW: weights shrink by lr·wd beside Adam's step. Transformers: decay_norm_and_bias=False, wd 0.05."""
    _check_adam(b1, b2, eps, weight_decay)
    return optax.chain(
        _moments(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, _decayed(decay_norm, decay_norm_and_bias, decay_bias)),
        optax.scale_by_learning_rate(lr),
    )


def _check_adam(b1, b2, eps, weight_decay):
    for name, value in (("b1", b1), ("b2", b2)):
        check_range(f"optimizer.{name}", value, 0, 1, below=True)
    check_range("optimizer.eps", eps, 1e-30)
    check_range("optimizer.weight_decay", weight_decay, 0)


def _moments(b1, b2, eps):
    """Adam's step, without the learning rate."""
    moments = optax.scale_by_adam(b1, b2, eps)

    def update(gradients, state, params=None):
        with jax.numpy_dtype_promotion("standard"):  # optax computes b ** count, a float and an integer
            return moments.update(gradients, state, params)

    return optax.GradientTransformation(moments.init, update)


OPTIMIZERS = {"sgd": sgd, "adam": adam, "adamw": adamw}


def average_decay(tau: float, *, warmup: bool = False, start: int = 0) -> Callable[[Array], Array]:
    """The decay of the average of the weights, as a function of the steps done: ema <- decay·ema + (1 − decay)·w.

        decay_t = 0 for t < start;   then min(τ, (1 + t − start) / (10 + t − start)) with `warmup`, else τ

    With warm-up the first weights are soon forgotten, as in the code of Gowal et al. (2020, 2021; start=0). In the code
    of SCORE and of Wang et al. (2023), start is 2.5 % of the training steps.
    """

    def decay(step: Array) -> Array:
        t = (step - start).astype(jnp.float32)
        value = jnp.minimum(tau, (1.0 + t) / (10.0 + t)) if warmup else jnp.full_like(t, tau)
        return jnp.where(step >= start, value, 0.0)

    return decay


def own_optimizer(source: Any, made: Any, options: Any) -> optax.GradientTransformation:
    """The optimiser that a factory of the user's own has made; CodeError unless it is one of optax's form."""
    if not isinstance(made, optax.GradientTransformation):
        raise CodeError(f"{source} is a {type(made).__name__}; return an optax.GradientTransformation")
    return made


def optimizer(*, name: str, lr: Callable, **options: Any) -> optax.GradientTransformation:
    """The optimiser called `name` in OPTIMIZERS; `lr` maps the step to the learning rate."""
    make = factory("optimizers", name)
    call_arguments(make, name, options, "optimizer", ("lr",))
    return make(lr=lr, **options)


def with_head(network: optax.GradientTransformation, head: optax.GradientTransformation | None):
    """One transformation of {"params": …, "head": …}; with `head=None` both use the network's optimiser."""
    if head is None:
        return network
    return optax.partition({"params": network, "head": head}, lambda tree: {name: name for name in tree})
