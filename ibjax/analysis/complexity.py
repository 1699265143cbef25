"""The size of a network: its parameters, and its multiply-adds for one image, of convolutions by the rules of ptflops.

    python -m ibjax.analysis.complexity --config=configs/NAME.py[:arg] [--shape=H,W,C --classes=10] [--config.KEY=…]

Images have the shape and the classes of the recipe's data set, unless others are given.

| operation                        | counts                                      |
|----------------------------------|---------------------------------------------|
| convolution                      | k²·C_in/groups·C_out·H·W, with a bias + C_out·H·W |
| linear layer                     | C_in·C_out per token, with a bias + C_out   |
| attention, q (n, d), k (m, d)    | n·m·d for q kᵀ and as many as its product with v, in each head and window |
| batch-norm, layer norm           | 2 per element                               |
| ReLU, SiLU, GELU                 | 1 per element                               |
| average- and max-pooling         | 1 per element of the input                  |
| `layers.Add`                     | 1 per element                               |
| everything else                  | 0: sigmoid, softmax, FFT, resizing, normalisation, layer scale |

ptflops counts `torch.add`, as used in the published code of WideResNet, but not `+=`, as used in that of ResNet. Our
models therefore use `layers.Add` in the former and `+` in the latter. In transformers it also counts softmax and the
scaling of queries, and of a layer norm 1 per element. Nothing is computed: the model is traced on
shapes, and its module calls are intercepted.
"""

import math
from collections import Counter
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ibjax import errors
from ibjax.models import layers, patches
from ibjax.runs import command_line, run
from ibjax.training import ahead


class Complexity(NamedTuple):
    """Trainable parameters, and multiply-adds for one image, of each part of a network in the order of its calls."""

    parameters: Counter[str]
    operations: Counter[str]


def complexity(model: nn.Module, shape: tuple[int, int, int]) -> Complexity:
    """The complexity of a model for images (H, W, C); its sums are `.parameters.total()`, `.operations.total()`."""
    operations: Counter[str] = Counter()

    def count(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if context.method_name == "__call__":
            operations[part(context.module.path)] += multiply_adds(context.module, args, output)
        return output

    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    with nn.intercept_methods(count):
        variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)
    parameters: Counter[str] = Counter()
    for path, leaf in jax.tree.leaves_with_path(variables["params"]):
        parameters[part(tuple(key.key for key in path))] += math.prod(leaf.shape)
    return Complexity(parameters, operations)


def multiply_adds(module: nn.Module, inputs: tuple[Any, ...], y: Any) -> int:
    """The multiply-adds of one call y = module(*inputs) for one image, by the table above."""
    x: Any = inputs[0] if inputs else None
    match module:
        case nn.Conv():
            height_width = math.prod(y.shape[1:3])
            inner = math.prod(tuple(module.kernel_size)) * x.shape[-1] // module.feature_group_count  # pyright: ignore
            return height_width * module.features * (inner + module.use_bias)
        case nn.Dense():
            return y.size * (x.shape[-1] + module.use_bias)
        case patches.Attend():
            _, k, v = inputs
            return math.prod(x.shape[:3]) * k.shape[2] * (k.shape[3] + v.shape[3])
        case layers.BatchNorm() | patches.LayerNorm():
            return 2 * x.size
        case layers.AdaptiveAverage() | layers.AveragePool() | layers.GlobalAverage() | layers.MaxPool():
            return x.size
        case layers.Activation() | layers.Add():
            return x.size
    return 0


def part(path: tuple[str, ...]) -> str:
    """The part of a network that holds a module or parameter; a network inside another is split into its own parts."""
    return "/".join(path[: 2 if path[:1] == ("backbone",) else 1])


def table(found: Complexity) -> str:
    """One line for each part with parameters or operations, and the sums."""
    names = [name for name in found.operations | found.parameters if found.operations[name] or found.parameters[name]]
    rows = [(name, found.parameters[name], found.operations[name]) for name in names]
    rows.append(("total", found.parameters.total(), found.operations.total()))
    width = max(len(name) for name in ["part", *names])
    lines = [f"{'part':<{width}}  {'parameters':>12}  {'multiply-adds':>15}"]
    lines += [f"{name:<{width}}  {parameters:>12,}  {operations:>15,}" for name, parameters, operations in rows]
    sums = f"{_short(rows[-1][1])} parameters, {_short(rows[-1][2])} multiply-adds"
    return "\n".join([*lines, sums])


def _short(count):
    """A count in short form, such as "6.67 G", "0.07 M" or "9,999"."""
    unit, name = (1e9, "G") if count >= 1e8 else (1e6, "M")
    return f"{count / unit:.2f} {name}" if count >= 1e4 else f"{count:,}"


def main() -> None:
    """The command line of this module."""
    parser = command_line.of_recipe("ibjax.analysis.complexity", __doc__)
    ahead.add_images(parser)
    given, recipe = command_line.parse_recipe(parser)

    def command():
        settings = recipe()
        shape, classes = ahead.images_of(settings.data, given.shape, given.classes)
        print(ahead.in_words(shape, classes))
        print(table(complexity(run.build_model(settings.model, classes, "model"), shape)))

    errors.exit_with(command)


if __name__ == "__main__":
    main()
