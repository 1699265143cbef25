"""Networks of other libraries as `logits_fn`, for attacks and evaluation, and as Linen modules, for training.

    network = wrap.nnx(model)                             Flax NNX
    network = wrap.equinox(model, state)                  Equinox; one image (C, H, W) per call unless told otherwise
    network = wrap.haiku(transformed, params, state)      Haiku
    network = wrap.linen(model, variables)                Flax Linen
    network = wrap.function(f)                            any function that JAX can trace
    network = wrap.pytorch(module)                        PyTorch, evaluation only: it runs in PyTorch

Each returns a `Network`: `network.logits_fn` maps images (B, H, W, C) in [0, 1] to logits (B, classes), as attacks and
`ibjax.benchmark` take it; `network.predict(network.variables, x)` returns (logits, features). Features are what the
network returns beside its logits, `(logits, {name: array})`; Linen's `sow` and PyTorch's submodules count too.

A wrapped network is in evaluation mode; the given object stays as it is:

| library | how |
|---|---|
| NNX | a copy after `.eval()` |
| Equinox | `equinox.nn.inference_mode` |
| PyTorch | a copy after `.eval()`, whose weights have no gradients |
| NNX, Linen, Equinox | the argument that says so, if `__call__` has one: train, training or is_training=False, |
| | deterministic, use_running_average or inference=True |
| Haiku | functions do not tell: give their argument, as `wrap.haiku(…, is_training=False)` |

An attack tests at its first call whether the logits of an image depend on the rest of its batch, and refuses a network
that still uses batch statistics or draws random numbers.

Float32 products of a network in JAX, also of one that is a plain function, have the precision of an evaluation
(`ibjax.devices.precision`); PyTorch's are as PyTorch is set.

For training, a configuration names the class of an NNX or Equinox module, as any network of one's own
(docs/own_network.md). `linen_from_nnx` and `linen_from_equinox` make the Linen module that is trained, by any objective
that needs no features of it.
"""

from ibjax.wrap.networks import Network, equinox, function, haiku, linen, nnx
from ibjax.wrap.torch_modules import pytorch
from ibjax.wrap.training import linen_from_equinox, linen_from_nnx

__all__ = [
    "Network",
    "equinox",
    "function",
    "haiku",
    "linen",
    "linen_from_equinox",
    "linen_from_nnx",
    "nnx",
    "pytorch",
]
