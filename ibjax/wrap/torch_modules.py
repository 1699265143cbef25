"""PyTorch modules as `logits_fn`: they run in PyTorch, called back from JAX's programs.

The logits come from `jax.pure_callback`, their derivative from `torch.autograd` in a second callback, so that every
attack can use them, with gradients too. Each call moves the images to PyTorch and back and waits for it, on one device
after the other. A network of a known architecture is faster as a run of ibjax: `python -m ibjax.convert`. Second
derivatives and forward-mode derivatives do not exist.
"""

import copy
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ibjax import files
from ibjax.errors import InputError
from ibjax.wrap.networks import Network, of


def pytorch(module: Any, *, taps: Sequence[str] = (), **call: Any) -> Network:
    """A PyTorch module that takes images (B, C, H, W) in [0, 1]; its normalisation is part of it.

    Args:
      module: `torch.nn.Module`, on any device. It is copied: training it further does not change the wrapped network.
      taps: names of submodules, as in `module.named_modules()`, whose outputs are the features, (B, H, W, C) or (B, D).
      call: further arguments of its `forward`.
    """
    try:
        import torch
    except ImportError:
        raise InputError("wrap.pytorch needs torch: pip install 'ibjax[torch]'") from None
    if not isinstance(module, torch.nn.Module):
        raise InputError(f"wrap.pytorch was given a {type(module).__name__}; give a torch.nn.Module")
    names = dict(module.named_modules())
    if missing := [name for name in taps if name not in names]:
        raise InputError(f"taps: the module has no submodule '{missing[0]}'; it has {', '.join(filter(None, names))}")
    try:
        frozen = copy.deepcopy(module).eval().requires_grad_(False)
    except Exception as error:  # tensors that are results of computations cannot be copied
        raise InputError(f"the PyTorch module cannot be copied: {' '.join(str(error).split())[:150]}") from error
    foreign = _Foreign(frozen, tuple(taps), call)

    def predict(variables, x):
        logits, *features = foreign.answer(x)
        return logits, dict(zip(taps, features, strict=True))

    kind = type(module)
    says = dict(library="torch", version=torch.__version__, network=f"{kind.__module__}.{kind.__qualname__}")
    says["weights"] = foreign.digest()
    return of(predict, (), says, sum(weights.numel() for weights in frozen.parameters()))


class _Foreign:
    """Calls a module with NumPy arrays.

    Under `jax.vmap`, an array has extra leading axes, of size 1 where it is not mapped.
    """

    def __init__(self, module, taps, call):
        self.module, self.call, self.kept = module, call, {}
        weights = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None)
        self.device, self.dtype = (None, None) if weights is None else (weights.device, weights.dtype)
        self.taps, self.shapes, self.lock = taps, {}, threading.Lock()  # several devices call at once
        names = dict(module.named_modules())
        for name in taps:
            names[name].register_forward_hook(lambda _, given, made, name=name: self.kept.update({name: made}))
        self.answer = jax.custom_vjp(self._forward)
        self.answer.defvjp(lambda x: (self._forward(x), x), self._backward)

    def digest(self):
        """A digest of the weights."""
        parts = [
            f"{name}:{files.digest(np.ascontiguousarray(value.detach().cpu().float().numpy()).tobytes())}"
            for name, value in self.module.state_dict().items()
        ]
        return files.digest(";".join(parts).encode())

    # ---- in JAX ------------------------------------------------------------------------------------------------

    def _forward(self, x: Array) -> tuple[Array, ...]:
        shapes = [jax.ShapeDtypeStruct((len(x), *shape), jnp.float32) for shape in self._shapes_for(x.shape[1:])]
        return tuple(jax.pure_callback(self._run, shapes, x, vmap_method="expand_dims"))

    def _backward(self, x, cotangents):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return (jax.pure_callback(self._pull, shape, x, *cotangents, vmap_method="expand_dims"),)

    def _shapes_for(self, image):
        """The shapes of logits and features for one image, found by asking once."""
        if image not in self.shapes:
            self.shapes[image] = [made.shape[1:] for made in self._run(np.zeros((2, *image), np.float32))]
        return self.shapes[image]

    # ---- in PyTorch ----------------------------------------------------------------------------------------------

    def _run(self, x):
        import torch

        x = np.asarray(x)
        with self.lock, torch.no_grad():
            made = self._called(self._tensor(x))
        return [_array(value, x.shape[:-4]) for value in made]

    def _pull(self, x, *cotangents):
        """The gradient of Σ cotangent · output with respect to x."""
        import torch

        x, cotangents = np.asarray(x), [np.asarray(each) for each in cotangents]
        axes = x.ndim - 4
        lead = np.broadcast_shapes(*(each.shape[:axes] for each in (x, *cotangents)))
        found = np.zeros((*lead, *x.shape[axes:]), x.dtype)
        asked: Any = None
        made: list[Any] = []
        with self.lock, torch.enable_grad():
            for place in np.ndindex(*lead):
                if asked is None or x.shape[:axes] != (1,) * axes:  # many cotangents at the same images: asked once
                    asked = self._tensor(_at(x, place)).requires_grad_()
                    made = self._called(asked.clone())  # not itself: the module may write into its input
                weights = [torch.from_numpy(_at(each, place)).to(made[0].device) for each in cotangents]
                parts = [torch.sum(value * weight) for value, weight in zip(made, weights, strict=True)]
                total = torch.stack(parts).sum()
                if total.requires_grad:
                    (slope,) = torch.autograd.grad(total, asked, retain_graph=True)
                    found[place] = np.moveaxis(slope.float().cpu().numpy(), 1, -1)
        return found

    def _tensor(self, x):
        """Images (…, H, W, C) of NumPy as (B, C, H, W), on the module's device and in its type."""
        import torch

        x = np.array(np.moveaxis(x.reshape(-1, *x.shape[-3:]), -1, 1), order="C")  # a copy: PyTorch may write into it
        return torch.from_numpy(x).to(device=self.device, dtype=self.dtype)

    def _called(self, x):
        """[logits, *taps], each (B, …) float32."""
        self.kept.clear()
        logits = self.module(x, **self.call)
        if not hasattr(logits, "ndim") or logits.ndim != 2 or len(logits) != len(x):
            given = f"shape {tuple(logits.shape)}" if hasattr(logits, "shape") else f"a {type(logits).__name__}"
            raise InputError(f"the PyTorch module returns {given}; give logits ({len(x)}, classes)")
        features = [self._feature(name) for name in self.taps]
        return [made.float().movedim(1, -1) if made.ndim == 4 else made.float() for made in (logits, *features)]

    def _feature(self, name):
        if name not in self.kept:
            raise InputError(f"taps: the module never calls its submodule '{name}'; name one that it calls")
        made = self.kept.pop(name)
        if not hasattr(made, "ndim"):
            raise InputError(f"taps: '{name}' returns a {type(made).__name__}; name a submodule that returns a tensor")
        return made


def _array(value, lead):
    """A tensor (B, …) as an array with the leading axes `lead`."""
    found = value.detach().cpu().numpy()
    return np.ascontiguousarray(found.reshape(*lead, -1, *found.shape[1:]))


def _at(array, place):
    """The part of an array at a place of its leading axes, of which those of size 1 are broadcast."""
    return np.array(array[tuple(min(i, size - 1) for i, size in zip(place, array.shape, strict=False))])
