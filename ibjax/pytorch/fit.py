"""Checks that a state dict matches an architecture exactly, in names and shapes; else finds the closest one."""

from pathlib import Path

import flax.linen as nn
import numpy as np

from ibjax.errors import CheckpointError, InputError, nearest
from ibjax.pytorch.architectures import ARCHITECTURES, Shape, State, anchors, build, has_blocks, key_map, of_today
from ibjax.pytorch.sizes import input_shape, sizes

_SIMILAR = 0.5  # minimum share of matching names for which an architecture is named as the closest


def check(where: Path, name: str, model: nn.Module, state: State, shape: Shape) -> None:
    """Raises CheckpointError unless the state has exactly the network's names and shapes, and sound values."""
    expected = {leaf.name: leaf.theirs() for leaf in key_map(name, model, shape).values()}
    missing = [key for key in expected if key not in state]
    extra = [key for key in state if key not in expected]
    if missing or extra:
        parts = [f"it lacks {some(missing)}"] * bool(missing) + [f"it has {some(extra)}"] * bool(extra)
        statistics = [key for key in expected if key.endswith(("running_mean", "running_var"))]
        said = closest(state)
        if missing == statistics and not extra:
            said = "they are all its batch statistics: save network.state_dict(), which has them"
        raise CheckpointError(f"{where} is no {name}: {'; '.join(parts)}; {said}")
    for key, size in expected.items():
        value = state[key]
        if value.shape != size:
            hint = closest(state)
            raise CheckpointError(
                f"{where}: {key} is {value.shape}, in {name} of these sizes {size}; it is another network"
                + (f"; {hint}" if f"--arch={name} " not in hint else "")
            )
        if not np.isfinite(value).all() or (key.endswith("running_var") and value.min() < 0):
            raise CheckpointError(f"{where}: {key} holds NaN, Inf or a negative variance; the file is damaged")


def closest(*states: State) -> str:
    """Says which architecture is closest to a file in names and shapes, or that none is close."""
    shares = {name: max(_agreement(name, state) for state in states) for name in ARCHITECTURES}
    best = max(shares.values())
    if best < _SIMILAR:
        return f"its names are of no architecture that is known here; {nearest('', ARCHITECTURES)}"
    names = [name for name, share in shares.items() if share == best]
    return f"closest: --arch={' or '.join(names)} ({100 * best:.0f} % of its names agree)"


def _agreement(name, state):
    """The share of names that a state and an architecture of the state's sizes share, with equal shapes."""
    # saves building a network of default size for nothing: without a block it shares far fewer names than half
    if not any(anchor in state for anchor in anchors(name)) or not has_blocks(name, state):
        return 0.0
    state = of_today(name, state)
    try:
        model = build(name, sizes(name, state))
        expected = {leaf.name: leaf.theirs() for leaf in key_map(name, model, input_shape(name, model, state)).values()}
    except InputError:  # there is no such size
        return 0.0
    present = {key: value.shape for key, value in state.items()}
    agree = sum(expected.get(key) == shape for key, shape in present.items())
    return agree / len({*expected, *present})


def some(keys: list[str]) -> str:
    """The first three of a list of names."""
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
