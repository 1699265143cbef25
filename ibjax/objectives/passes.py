"""The training-mode passes of an objective, in order: each updates the running statistics of batch-norm once.

Published code often makes more passes than its loss needs: for logging, or because it computes the loss in two places.
Such a pass yields the same outputs again, but it updates the running statistics once more, and the network is attacked
and tested with those. An order of passes is written as text: "adv,clean,clean" is first x', then x twice.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from ibjax.errors import InputError
from ibjax.net import Net, Output, Variables


def order(passes: str, needed: tuple[str, ...]) -> tuple[str, ...]:
    """The names in `passes`; InputError unless these are the names in `needed`, each at least once."""
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
    """Makes a training-mode pass over `images[name]` for each of `names`: ({name: (logits, features)}, variables).

    The outputs are those of the first pass over each image batch; repeated passes only update the running statistics.
    """
    outputs: dict[str, Output] = {}
    for name, key_pass in zip(names, jax.random.split(key, len(names)), strict=True):
        output, variables = net.forward(variables, images[name], key_pass)
        outputs.setdefault(name, output)
    return outputs, variables


def where(condition: Array, new: Variables, old: Variables) -> Variables:
    """`new` where the scalar `condition` holds, else `new` with the batch statistics of `old`: a conditional pass."""
    statistics = jax.tree.map(lambda a, b: jnp.where(condition, a, b), new["batch_stats"], old["batch_stats"])
    return {**new, "batch_stats": statistics}
