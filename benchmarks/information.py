"""Times the information terms on a CIFAR batch, and for comparison the PGD-10 step of ResNet-18 without them.

    python benchmarks/information.py [--batch 128] [--repeats=5] [--dtype=float32|bfloat16] [--quiet]

    nHSIC   Σ_l nHSIC(X, T_l) − nHSIC(Y, T_l) over ResNet-18's ten taps, with its gradient to the taps
    mask    nHSIC of X and of Y with each of 512 pooled channels, no gradient
    SVD     mean squared differences of singular values, polar factors and pixels of two batches, with its gradient

Taps are those of a network with random weights; the images of the SVD are noise. Writes a JSON file with every single
time, and the table beside it as Markdown.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import measuring
import methods

from ibjax.information import hsic
from ibjax.information.svd import singular_values_and_polar

LAYERS = ("stem", *(f"block{i}" for i in range(1, 9)), "pre_logits")
BASE = "PGD-10 step, ResNet-18"
CALLS = 5  # of a term in one round: they are short


def terms(network: methods.Section, batch_size: int, dtype: str) -> dict[str, Callable[[int], Any]]:
    """{name: runs so many evaluations of the term and waits for them}."""
    model = methods.network(network, dtype)
    x, y = (jnp.asarray(array) for array in measuring.noise(batch_size))
    variables = jax.jit(model.init)(jax.random.key(0), x[:1])
    features = jax.jit(model.apply)(variables, x)[1]
    taps = [features[name] for name in LAYERS if name in features]

    def operators(x, y):
        return jnp.stack([hsic.correlation_operator(hsic.scaled_gram(x)), hsic.label_operator(y, 10)])

    def nhsic(taps, x, y):
        with_x, with_y = hsic.nhsic_layers(operators(x, y), taps)
        return jnp.sum(0.008 * with_x - 0.08 * with_y)

    def svd(x, other):
        pairs = zip(parts(x), parts(other), strict=True)
        return sum(jnp.mean(jnp.square(a - b)) for a, b in pairs)

    def parts(x):
        channels = jnp.moveaxis(x, -1, 1)
        return (*singular_values_and_polar(channels), channels)

    return {
        f"nHSIC, {len(taps)} layers, with gradient": runner(jax.value_and_grad(nhsic), taps, x, y),
        f"mask, {features['pre_logits'].shape[-1]} channels": runner(
            lambda z, x, y: hsic.nhsic_channels(operators(x, y), z), features["pre_logits"], x, y
        ),
        f"SVD, {3 * batch_size} of 32 × 32, with gradient": runner(jax.value_and_grad(svd), x, jnp.flip(x, axis=0)),
    }


def runner(f: Callable, *arguments: Any) -> Callable[[int], Any]:
    """`measuring.alternate`'s form of a function."""
    compiled = jax.jit(f)

    def steps(n):
        for _ in range(n):
            jax.block_until_ready(compiled(*arguments))

    return steps


def measure(
    batch_size: int, dtype: str, repeats: int, quiet: bool, network: methods.Section, attack_steps: int
) -> dict[str, Any]:
    """The record that the JSON holds."""
    case = methods.build(methods.settings("pgd_at", network, attack_steps), network, dtype=dtype)
    base = {BASE: methods.ibjax_steps(case, batch_size)}
    seconds, elsewhere = {}, {}
    for runners, calls in ((base, 1), (terms(network, batch_size, dtype), CALLS)):
        measuring.warm_up(runners, [])
        times = measuring.alternate(runners, repeats, calls, quiet)
        seconds |= times.seconds
        elsewhere |= times.elsewhere
    return {
        "batch": batch_size,
        "dtype": dtype,
        "repeats": repeats,
        "calls_per_repeat": {BASE: 1, "terms": CALLS},
        "seconds": seconds,
        "processors_busy_elsewhere": elsewhere,
    }


def table(records: list[dict]) -> str:
    """The records as Markdown."""
    rows = []
    for record in records:
        about = (record["batch"], record["dtype"])
        if "error" in record:
            rows.append((*about, record["error"], "", ""))
            continue
        for name, times in record["seconds"].items():
            share = measuring.ratio_of_medians(times, record["seconds"][BASE], ".1%").replace("%", " %")
            rows.append((*about, name, measuring.spread(times, ",.1f", 1e3), share))
    return measuring.markdown(("batch", "dtype", "", "ms, median (min – max)", "median, of the step's"), rows)


def main() -> None:
    """The command line."""
    given = measuring.parse(measuring.command_line(__doc__, batches=((128,), (128,))))
    size = dict(network=methods.TINY if given.quick else methods.RESNET18, attack_steps=1 if given.quick else 10)
    page = measuring.Page("information", given.out, table, f"{given.repeats} rounds", quick=given.quick)
    for batch_size in given.batch:
        timing = (batch_size, given.dtype, given.repeats, given.quiet)
        page.attempt(dict(batch=batch_size, dtype=given.dtype), partial(measure, *timing, **size))
    page.finish()


if __name__ == "__main__":
    measuring.run(main)
