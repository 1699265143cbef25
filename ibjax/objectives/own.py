"""What an objective of the user's own must be: an `Objective` whose functions return what the train step takes."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ibjax.errors import CodeError
from ibjax.step import Objective


def own_objective(source: Any, made: Any, options: Any) -> Objective:
    """The objective that a factory of the user's own has made, with checks of what its functions return.

    The checks run while JAX traces; the compiled step has none. A metric "loss" is added where there is none. Raises
    CodeError if it is no Objective.
    """
    if not isinstance(made, Objective):
        raise CodeError(f"{source} is a {type(made).__name__}; return ibjax.step.Objective(target, loss, …)")

    def target(net, variables, batch, key):
        found = made.target(net, variables, batch, key)
        if made.attack_loss is None and jnp.shape(found)[:1] != batch["label"].shape[:1]:
            given = _kind(found)
            raise CodeError(f"{source}: its target is {given}; return labels (B,) or distributions (B, classes)")
        return found

    def loss(net, variables, batch, x_adv, key):
        found = made.loss(net, variables, batch, x_adv, key)
        match found:
            case (value, (Mapping() as after, Mapping() as metrics)):
                pass
            case _:
                raise CodeError(f"{source}: its loss returns {_kind(found)}; return loss, (variables, metrics)")
        if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise CodeError(f"{source}: its loss is {_kind(value)}; return one number, as jnp.mean(…) does")
        if _form(after) != _form(variables):
            raise CodeError(
                f"{source}: its loss returns variables of another structure than it got; return those of net.forward"
            )
        for name, metric in metrics.items():
            if jnp.shape(metric) != ():
                raise CodeError(f"{source}: its metric '{name}' is {_kind(metric)}; give one number")
        return value, (after, {"loss": value, **jax.tree.map(jnp.asarray, dict(metrics))})

    return made._replace(target=target, loss=loss)


def _form(variables):
    leaves, structure = jax.tree.flatten(dict(variables))
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _kind(value):
    """What a value is, as "float32[8, 10]", "a tuple of 3" or "a dict"."""
    if hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple) else "")
