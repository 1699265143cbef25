"""How large a network is: its parameters, and the multiply-adds of one image by ptflops' rules.

    python -m ibjax.analysis.complexity --config=configs/NAME.py[:arg] [--shape=32,32,3 --classes=10]

| operation                        | counts                                      |
|----------------------------------|---------------------------------------------|
| convolution                      | k²·C_in·C_out·H·W, with a bias + C_out·H·W  |
| linear layer                     | C_in·C_out, with a bias + C_out             |
| batch-norm                       | 2 per element                               |
| ReLU, SiLU                       | 1 per element                               |
| average- and max-pooling         | 1 per element of the input                  |
| `layers.Add`                     | 1 per element                               |
| everything else                  | 0: sigmoid, FFT, resizing, normalisation    |

ptflops sees `torch.add`, which WideResNet's published file has, and not `+=`, which ResNet's have: hence `layers.Add`
in the one and `+` in the other. Nothing is computed: the model is traced on shapes, its module calls intercepted.
"""

import math
import sys
from collections import Counter
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags

from ibjax import errors, run
from ibjax.errors import InputError
from ibjax.models import layers


class Complexity(NamedTuple):
    """Of each part of a network, in the order of their calls: trainable parameters, and multiply-adds of one image."""

    parameters: Counter[str]
    operations: Counter[str]


def complexity(model: nn.Module, shape: tuple[int, int, int]) -> Complexity:
    """Counts a model for images (H, W, C); sums are `.parameters.total()` and `.operations.total()`."""
    operations: Counter[str] = Counter()

    def count(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if context.method_name == "__call__":
            operations[part(context.module.path)] += multiply_adds(context.module, args[0] if args else None, output)
        return output

    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    with nn.intercept_methods(count):
        variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)
    parameters: Counter[str] = Counter()
    for path, leaf in jax.tree.leaves_with_path(variables["params"]):
        parameters[part(tuple(key.key for key in path))] += math.prod(leaf.shape)
    return Complexity(parameters, operations)


def multiply_adds(module: nn.Module, x: Any, y: Any) -> int:
    """What one call y = module(x) counts, by the table above."""
    match module:
        case nn.Conv():
            height_width = math.prod(y.shape[1:3])
            return (
                height_width * module.features * (math.prod(tuple(module.kernel_size)) * x.shape[-1] + module.use_bias)
            )  # pyright: ignore
        case nn.Dense():
            return module.features * (x.shape[-1] + module.use_bias)
        case layers.BatchNorm():
            return 2 * x.size
        case layers.AdaptiveAverage() | layers.AveragePool() | layers.GlobalAverage() | layers.MaxPool():
            return x.size
        case layers.Activation() | layers.Add():
            return x.size
    return 0


def part(path: tuple[str, ...]) -> str:
    """The part of a network that a module or a parameter belongs to; a network inside another shows its own parts."""
    return "/".join(path[: 2 if path[:1] == ("backbone",) else 1])


def table(found: Complexity) -> str:
    """One line for each part that has parameters or costs an operation, and the sums."""
    names = [name for name in found.operations | found.parameters if found.operations[name] or found.parameters[name]]
    rows = [(name, found.parameters[name], found.operations[name]) for name in names]
    rows.append(("total", found.parameters.total(), found.operations.total()))
    width = max(len(name) for name in ["part", *names])
    lines = [f"{'part':<{width}}  {'parameters':>12}  {'multiply-adds':>15}"]
    lines += [f"{name:<{width}}  {parameters:>12,}  {operations:>15,}" for name, parameters, operations in rows]
    sums = f"{rows[-1][1] / 1e6:.2f} M parameters, {rows[-1][2] / 1e9:.2f} G multiply-adds"
    return "\n".join([*lines, sums])


def main() -> None:
    """The command line of this module."""
    values = flags.FlagValues()
    given = config_flags.DEFINE_config_file("config", help_string="the recipe, FILE.py[:arg]", flag_values=values)
    shape = flags.DEFINE_list("shape", ["32", "32", "3"], "of an image: H,W,C", flag_values=values)
    classes = flags.DEFINE_integer("classes", 10, "that the network tells apart", flag_values=values)

    def command():
        try:
            values(sys.argv)
            if not values["config"].present:
                raise InputError("--config is missing; give --config=configs/NAME.py[:arg]")
            section, size = given.value.model, tuple(map(int, shape.value))
        except (flags.Error, OSError, ValueError) as error:
            raise InputError(str(error).splitlines()[-1]) from None
        if len(size) != 3 or min(size) < 1 or classes.value < 1:
            raise InputError(f"--shape={shape.value} --classes={classes.value}: give H,W,C and at least one class")
        print(table(complexity(run.build_model(section, classes.value, "model"), size)))

    errors.exit_with(command)


if __name__ == "__main__":
    main()
