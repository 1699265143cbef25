"""The training-mode passes of an objective, in order: each moves the running statistics of batch-norm once.

Published code runs more passes than its loss needs: for its log, or because a loss is written in two places. What such
a pass computes is the same again, but it counts once more in the running statistics, with which the network is attacked
and tested. An order is text, "adv,clean,clean": first x', then x twice.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from ibjax.errors import InputError
from ibjax.step import Net, Output, Variables


def order(passes: str, needed: tuple[str, ...]) -> tuple[str, ...]:
    """The names in `passes`, each of `needed` at least once and no other; raises InputError."""
    names = tuple(name.strip() for name in passes.split(","))
    if set(names) != set(needed):
        raise InputError(
            f"objective.passes='{passes}' is not allowed; give the order of passes over {' and '.join(needed)}, as "
            f"'{','.join(needed)}', each once or more often"
        )
    return names


def forward(
    net: Net, variables: Variables, images: Mapping[str, Array], names: tuple[str, ...], key: Array
) -> tuple[dict[str, Output], Variables]:
    """Passes over `images[name]` for each of `names`: ({name: (logits, features)}, variables).

    The outputs are those of the first pass over each; the others only count for the statistics.
    """
    outputs: dict[str, Output] = {}
    for name, key_pass in zip(names, jax.random.split(key, len(names)), strict=True):
        output, variables = net.forward(variables, images[name], key_pass)
        outputs.setdefault(name, output)
    return outputs, variables


def where(condition: Array, new: Variables, old: Variables) -> Variables:
    """`new`, with the batch statistics of `old` unless `condition` () holds: a pass that is made at times only."""
    statistics = jax.tree.map(lambda a, b: jnp.where(condition, a, b), new["batch_stats"], old["batch_stats"])
    return {**new, "batch_stats": statistics}
